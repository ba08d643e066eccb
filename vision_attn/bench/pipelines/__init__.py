"""Denoisers of real pipelines as candidates of the benchmarks: architectures, ways to attend, and steps."""
