"""HaloNet, the backbone that halo attention comes from."""
