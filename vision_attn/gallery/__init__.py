"""`vision-attn gallery`: runs the example programs and builds one static page that opens from disk."""

from vision_attn.gallery.build import build_gallery

__all__ = ["build_gallery"]
