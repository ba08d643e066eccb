"""RAVLT, with rank-augmented linear attention: importing a module registers its variants with timm."""
