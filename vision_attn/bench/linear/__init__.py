"""The linear family as problems of the benchmarks: the papers' formulas, candidates, bytes and operations."""
