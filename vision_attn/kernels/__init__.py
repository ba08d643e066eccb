"""Operators on q, k, v, which know no paper and no model: one folder each, `triton/` for what they share."""
