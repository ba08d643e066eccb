"""How near a converted model stays to its dense self, untrained: each attention in turn, in one model with weights.

`fidelity.py` turns a case and its contenders into a row, `contenders.py` lists them, `drawing.py` is the case of the
embedded teachers. The entries `quality_*` of `vision-attn bench` run them.
"""
