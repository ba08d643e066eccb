"""Operators on q, k, v, which know no paper and no model. One operator: signature, definition, implementations."""
