"""Linear attention whose features are rotated instead of q and k, and the Hedgehog with several W."""

import pytest
import torch

import vision_attn
from vision_attn import RALA, Grid, LinFusion, convert
from vision_attn.demo import load_teacher
from vision_attn.kernels.linear import rotate_pairs
from vision_attn.parallel.processors import attend
from vision_attn.processors.base import Layer, Moment

GRID = Grid(3, 4, prefix=2)
HEDGEHOG = dict(mid_dim=-1, feature_map="hedgehog", rotate=True)


def case(seed=0, heads=2, channels=8):
    """Queries, keys and values before the rotation, and cosine and sine."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, GRID.tokens, heads, channels, generator=generator, dtype=torch.float64)
    angles = torch.randn(GRID.tokens, channels // 2, generator=generator, dtype=torch.float64).repeat_interleave(2, 1)
    return q, k, v, (angles.cos(), angles.sin())


def hedgehog(x, weight):
    y = torch.einsum("bnhd,hde->bnhe", x, weight)
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


@pytest.mark.parametrize("spec", [
    LinFusion(mid_dim=-1, rotate=True), LinFusion(**HEDGEHOG), LinFusion(**HEDGEHOG, features=2),
    RALA(kernel_size=0, rotate=True),
], ids=str)  # fmt: skip
def test_features_of_what_was_not_rotated_are_rotated(spec):
    q, k, v, rotary = case()
    processor = spec.build(Layer("x", 2, 8, "torch")).double()
    with torch.no_grad():
        for parameter in processor.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    phi_q, phi_k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    if isinstance(spec, LinFusion) and spec.feature_map == "hedgehog":
        parts = [m.weight.chunk(spec.features) for m in (processor.features_q, processor.features_k)]
        phi_q, phi_k = (torch.cat([hedgehog(x, w) for w in own], -1) for x, own in zip((q, k), parts, strict=True))
    weight = torch.ones(2, GRID.tokens, 2, dtype=torch.float64)
    if isinstance(spec, RALA):
        weight = GRID.tokens * torch.einsum("bhc,bmhc->bmh", phi_q.mean(1) * 8**-0.5, phi_k).softmax(1)
    turned = [rotate_pairs(x, *(t.repeat(1, x.shape[-1] // 8) for t in rotary)) for x in (phi_q, phi_k)]
    scores = torch.einsum("bnhc,bmhc,bmh->bhnm", *turned, weight)
    eps = 1e-6 if isinstance(spec, RALA) else 1e-4
    total = torch.einsum("bnhc,bmhc,bmh->bhn", phi_q, phi_k, weight) + GRID.tokens * eps
    wanted = torch.einsum("bhnm,bmhd->bnhd", scores / total[..., None], v)
    if isinstance(spec, RALA):
        wanted = wanted + wanted * torch.einsum("bnhd,hde->bnhe", v, processor.gate)
    rotated = [rotate_pairs(x, *rotary) for x in (q, k)]
    found = processor(*rotated, v, GRID, None, None, Moment(rotary=rotary))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_rotation_inside_compiles_whole():
    q, k, v, rotary = (t if isinstance(t, tuple) else t.float() for t in case())
    moment = Moment(rotary=tuple(t.float() for t in rotary))
    for spec in (LinFusion(**HEDGEHOG, kernel_size=3), RALA(rotate=True)):
        processor = spec.build(Layer("x", 2, 8, "torch"))
        compiled = torch.compile(processor, fullgraph=True, backend="eager")
        torch.testing.assert_close(
            compiled(q, k, v, GRID, None, None, moment), processor(q, k, v, GRID, None, None, moment)
        )


def draw(pipe):
    call = dict(
        num_inference_steps=1, height=32, width=32, output_type="pt", generator=torch.Generator().manual_seed(0)
    )
    return pipe("octopus", **call).images


@pytest.mark.parametrize("spec", [LinFusion(**HEDGEHOG, kernel_size=3), RALA(rotate=True)], ids=str)
def test_a_host_tells_how_it_rotated(spec, tmp_path):
    pipe = load_teacher("nano")
    pipe.set_progress_bar_config(disable=True)
    conversion = convert(pipe, spec)
    moments = []
    inner = pipe.transformer.get_submodule("single_transformer_blocks.0.attn.substitute")
    inner.register_forward_pre_hook(lambda module, args: moments.append((args[0].shape[1], args[-1])))
    pictures = draw(pipe)
    tokens, moment = moments[0]
    cos, sin = moment.rotary
    assert cos.shape == sin.shape == (tokens, 64)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))
    assert not torch.equal(cos[-1], cos[-2])  # neighbours in a row
    conversion.save(tmp_path)
    other = load_teacher("nano")
    other.set_progress_bar_config(disable=True)
    vision_attn.load(other, tmp_path)
    assert torch.equal(draw(other), pictures) and pictures.isfinite().all()


def test_hosts_that_do_not_rotate_so_are_refused():
    unet = load_teacher("unet").unet
    convert(unet, RALA(rotate=True))
    with pytest.raises(ValueError, match=r"RALA\(rotate=True\) needs a host that passes cosine and sine"):
        unet(torch.zeros(1, unet.config.in_channels, 32, 32), 0, torch.zeros(1, 4, unet.config.cross_attention_dim))
    q, k, v, (cos, sin) = case()
    processor = LinFusion(**HEDGEHOG).build(Layer("x", 2, 8)).double()
    shuffled = cos[:, ::2].repeat(1, 2), sin[:, ::2].repeat(1, 2)
    with pytest.raises(ValueError, match="pairs of neighbouring channels"):
        processor(q, k, v, GRID, None, None, Moment(rotary=shuffled))
    with pytest.raises(ValueError, match="cannot attend over processes"):
        attend(processor, q, k, v, None)


@pytest.mark.parametrize(("make", "match"), [
    (lambda: LinFusion(features=2), "features=2 needs feature_map='hedgehog'"),
    (lambda: LinFusion(features=0, feature_map="hedgehog"), "features must be at least 1"),
    (lambda: LinFusion(kernel_size=4), "kernel_size must be odd"),
], ids=["map", "count", "even"])  # fmt: skip
def test_fields_that_do_not_fit_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
