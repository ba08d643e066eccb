"""Measurements a user can repeat: every candidate is checked first, then timed beside its peers in one run.

`entries/` has one file per measurement (`vision-attn bench NAME`); `run.py` finds them there. An entry yields rows of
`document.py`'s schema. Functions (`local/`, `linear.py`) are checked against a definition and timed by `measure.py`;
whole classifiers make their rows in `models.py`, the denoisers of pipelines in `pipelines/`.
"""
