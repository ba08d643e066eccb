"""LITv2, with HiLo attention: importing a module registers its variants with timm."""
