"""Importing this gives every diffusers pipeline `set_attn_processor`, unless diffusers has one of its own by then.

    import vision_attn.hosts
    pipe.set_attn_processor("clear", radius=16)

`vision_attn.convert(pipe, ...)` does the same and leaves the class of the pipeline alone.
"""

from vision_attn.hosts.pipeline import register

register()
