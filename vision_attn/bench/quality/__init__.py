"""How near a converted model stays to its dense self, untrained: each attention in turn, in one model with weights.

`fidelity.py` turns a case and its contenders into a row, `contenders.py` lists them. The cases are the embedded
teachers (`drawing.py`), a DINOv2 on photos (`dinov2.py`) and a diffusion UNet of height maps (`terrain.py`);
`weights.py` fetches the last two. The entries `quality_*` of `vision-attn bench` run them.
"""
