"""The folders of the package, each above those that it may import from."""

# From the ground up: a folder may import from itself and from the lines above its own.
ORDER = (
    ("_compat", "_checks"),
    ("grid",),
    ("kernels",),
    ("processors",),
    ("hosts", "backbones"),
    ("adapters", "estimation", "graphs", "parallel"),
    ("conversion",),
    ("highres",),
    ("pipelines", "demo"),
    ("distill",),
    ("bench",),
    ("gallery",),
    ("cli",),
)
LEVELS = {folder: level for level, row in enumerate(ORDER) for folder in row}
