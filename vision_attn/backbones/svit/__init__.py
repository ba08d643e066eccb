"""SViT, with super token attention: importing a module registers its variants with timm."""
