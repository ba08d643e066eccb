"""Local attention as a problem of the benchmarks: its definition row by row, its candidates, its operations."""
