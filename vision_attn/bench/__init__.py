"""Measurements a user can repeat: every candidate is checked first, then timed beside its peers in one run.

`entries/` holds one file per measurement (`vision-attn bench NAME`); `run.py` finds them there. An entry yields rows of
`document.py`'s schema; those that time functions against a definition get them from `measure.py`, whole classifiers
from `models/` and the denoisers of pipelines from `pipelines/`.
"""
