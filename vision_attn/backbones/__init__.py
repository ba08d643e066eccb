"""Image backbones for timm that load their authors' weights. Importing this package registers them.

    import vision_attn.backbones  # before timm, which it also makes importable beside a CPU build of torch
    import timm

    model = timm.create_model("nat_tiny.shi_in1k", pretrained=True)

A family is one file in a folder: a class over `Backbone`, its `checkpoint_filter_fn`, its `default_cfgs`, its table of
variants and a call of `register`. Its name is added here. Files beside this one hold what several folders use.
"""

from vision_attn._compat import ensure_torchvision

ensure_torchvision()

from vision_attn.backbones.agent import agent_cswin, agent_deit, agent_pvt, agent_swin  # noqa: E402
from vision_attn.backbones.backbone import Backbone  # noqa: E402
from vision_attn.backbones.halonet import halonet  # noqa: E402
from vision_attn.backbones.inline import inline_cswin, inline_deit, inline_pvt, inline_swin  # noqa: E402
from vision_attn.backbones.litv2 import litv2  # noqa: E402
from vision_attn.backbones.nat import dinat, dinat_s, nat, nat_isotropic  # noqa: E402
from vision_attn.backbones.nat.nat import NAT  # noqa: E402
from vision_attn.backbones.nat.nat_isotropic import NATIsotropic  # noqa: E402
from vision_attn.backbones.ravlt import ravlt  # noqa: E402
from vision_attn.backbones.svit import svit  # noqa: E402

__all__ = [
    "NAT",
    "Backbone",
    "NATIsotropic",
    "agent_cswin",
    "agent_deit",
    "agent_pvt",
    "agent_swin",
    "dinat",
    "dinat_s",
    "halonet",
    "inline_cswin",
    "inline_deit",
    "inline_pvt",
    "inline_swin",
    "litv2",
    "nat",
    "nat_isotropic",
    "ravlt",
    "svit",
]
