"""Saved conversions: our adapter folders, and the files that the authors of CLEAR and LinFusion released."""
