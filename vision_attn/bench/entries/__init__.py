"""One file = one entry of `vision-attn bench`: a title, its cases, and how one case becomes a row.

An entry is a module with

    TITLE: str                                       # what is measured, for the tables' head
    CANDIDATES: Sequence                             # all that can take part, objects with a `name`
    def cases(device: torch.device, quick: bool)     # objects with a `name`, in the order of the tables
    def row(case, measurement: Measurement)          # a row of `document.py`'s schema

and, if its rows do not compare functions with a subject,

    TIMING: str                                      # how the times were taken
    def table(document, groups=())                   # the stored result as Markdown

and, if it measures pretrained weights,

    def cases(device, quick, sources: Sources)       # where the weights are, photos and adapters
    def download(sources: Sources)                   # fetches the weights

A file `kernels_x.py` belongs to the group `kernels`: `vision-attn bench kernels` runs all of a group.
"""
