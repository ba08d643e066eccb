"""Backbones with neighborhood attention: importing a module registers its variants with timm."""
