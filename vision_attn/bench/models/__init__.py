"""Whole image classifiers as candidates of the benchmarks: ours, timm's, and dense twins of ours."""
