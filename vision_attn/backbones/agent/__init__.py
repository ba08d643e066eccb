"""Backbones with agent attention: importing a module registers its variants with timm."""
