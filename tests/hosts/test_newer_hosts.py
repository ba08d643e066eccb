"""What hosts have beside a grid and text: masks of several kinds, caches of keys, shared layers, given grids."""

import logging
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from dense_oracle import KERNEL_3, RADIUS_2, DenseOracle
from diffusers import DDPMWuerstchenScheduler
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from host_runs import TEXT, run, stock
from tiny_host_case import CHANNELS, Layout, build, noise, sample
from tiny_hosts import HOST
from tiny_latent_dits import kandinsky_inputs
from torch import Tensor, nn

from vision_attn import Clear, Grid, LinFusion, Neighborhood, Softmax, convert, use_grid
from vision_attn.conversion import grids, masks
from vision_attn.conversion.state import is_rerouted, state_of
from vision_attn.distill.student import _projections
from vision_attn.hosts.selection import denoisers_of, find_host
from vision_attn.processors import AttnSpec

SIZE = (6, 8)
COVERING = pytest.mark.parametrize("spec", [Softmax(), Clear(radius=100)], ids=["softmax", "covering-disc"])


def statuses(model: nn.Module) -> set[str]:
    return {state_of(module).status for module in model.modules() if is_rerouted(module)}


def test_a_mask_of_numbers_keeps_chroma_dense(caplog: pytest.LogCaptureFixture) -> None:
    """The pipeline gives 0 and 1 where booleans are meant, and they are added to the logits."""
    case, plain, model = HOST["chroma-masked"], HOST["chroma-masked"].build(), HOST["chroma-masked"].build()
    inputs = case.inputs(*SIZE, 2, TEXT)
    inputs["attention_mask"] = inputs["attention_mask"].float()
    convert(model, Clear(radius=2))
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        assert torch.equal(model(**inputs).sample, plain(**inputs).sample)
    assert statuses(model) == {"dense: the attention mask is added to the logits; a bool mask would hide padding"}
    assert "a bool mask would hide padding" in caplog.text


def test_padding_that_a_mask_of_pairs_hides_is_not_seen() -> None:
    case, model = HOST["chroma-masked"], HOST["chroma-masked"].build()
    convert(model, Clear(radius=2))
    inputs = case.inputs(*SIZE, 2, TEXT)
    with torch.no_grad():
        before = model(**inputs).sample
        hidden = ~inputs["attention_mask"][:, :TEXT]
        assert hidden.any()
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"] + 9.0 * hidden[..., None]
        torch.testing.assert_close(model(**inputs).sample, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("query", "key", "message"),
    [(TEXT + 3, 2, "differs by query"), (TEXT, TEXT + 5, "hides grid tokens")],
    ids=["one-query", "grid"],
)
def test_a_mask_of_pairs_that_hides_more_is_refused(query: int, key: int, message: str) -> None:
    case, model = HOST["bria-fibo"], HOST["bria-fibo"].build()
    convert(model, Clear(radius=2))
    inputs = case.inputs(*SIZE, 1, TEXT)
    tokens = TEXT + SIZE[0] * SIZE[1]
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    mask[..., query, key] = False
    with pytest.raises(ValueError, match=f"cannot honour an attention mask that {message}"):
        model(**inputs | dict(joint_attention_kwargs=dict(attention_mask=mask)))


@pytest.mark.parametrize("spec", [Clear(radius=2), Neighborhood(kernel_size=3)], ids=["clear", "neighborhood"])
def test_pictures_of_a_batch_that_have_other_sizes(spec: AttnSpec) -> None:
    """JoyImage pads the tokens of a sample to those of the longest."""
    case, model = HOST["joy-image-edit-plus"], HOST["joy-image-edit-plus"].build()
    convert(model, spec)
    both = case.inputs(*SIZE, 2, TEXT) | dict(encoder_hidden_states_mask=torch.ones(2, TEXT, dtype=torch.long))
    both["shape_list"] = [[(1, *SIZE), (1, 3, 5)], [(1, 5, 4), (1, 4, 6)]]
    with torch.no_grad():
        found = model(**both).sample
        for i, images in enumerate(both["shape_list"]):
            own = sum(rows * columns for _, rows, columns in images)
            one = {name: value[i : i + 1] for name, value in both.items()}
            want = model(**one | dict(hidden_states=one["hidden_states"][:, :own])).sample
            torch.testing.assert_close(found[i : i + 1, :own], want, rtol=0, atol=2e-5)


def test_a_film_is_not_a_picture() -> None:
    for host_id, change, message in (
        ("joy-image-edit", dict(hidden_states=noise(1, CHANNELS, 2, 12, 16)), "the input is not one image"),
        ("joy-image-edit-plus", dict(shape_list=[[(2, 6, 4), (1, 3, 5)]]), "shape_list holds 2 frames"),
        ("kandinsky5", kandinsky_inputs(*SIZE, 1, TEXT, frames=2), "the input is a video of 2 frames"),
    ):
        case, model = HOST[host_id], HOST[host_id].build()
        convert(model, Clear(radius=2))
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            model(**case.inputs(*SIZE, 1, TEXT) | change)


def test_the_denoisers_of_stable_cascade_are_found() -> None:
    """They are named as what is no denoiser elsewhere: a decoder of images, a prior of embeddings."""
    parts = dict(prior_prior=HOST["stable-cascade-prior"].build(), decoder=HOST["stable-cascade-decoder"].build())
    pipe = SimpleNamespace(components=parts | dict(vqgan=nn.Linear(2, 2)))
    assert denoisers_of(pipe) == parts
    compiled = torch.compile(parts["decoder"], backend="eager")
    assert denoisers_of(SimpleNamespace(components=dict(decoder=compiled))) == dict(decoder=compiled)
    assert denoisers_of(SimpleNamespace(components=dict(decoder=nn.Linear(2, 2), prior_prior=nn.Linear(2, 2)))) == {}
    whole = diffusers.StableCascadeDecoderPipeline(parts["decoder"], None, None, DDPMWuerstchenScheduler(), None)
    assert convert(whole, Clear(radius=2)).models.keys() == {"decoder"}


def test_a_kandinsky_that_chooses_its_blocks_has_no_grid() -> None:
    """NABLA reorders the tokens, and makes a mask of blocks; it is given where the model is asked for a video."""
    case, model = HOST["kandinsky5"], HOST["kandinsky5"].build()
    inputs, probe = case.inputs(*SIZE, 1, TEXT), find_host(model).probe
    assert probe(model, inputs) == Grid(*SIZE)
    found = probe(model, inputs | dict(sparse_params=dict(to_fractal=True)))
    assert isinstance(found, str) and "sparse_params reorder the tokens" in found


def test_only_self_attention_is_converted() -> None:
    """Both attentions of a UViT's blocks attend to the text, and the text of Kandinsky 5 to itself."""
    for host_id, found in (
        ("uvit-down", ["transformer_layers.0.attn1", "transformer_layers.1.attn1"]),
        ("kandinsky5", ["visual_transformer_blocks.0.self_attention"]),
        ("lumina-next", ["layers.0.attn1", "layers.1.attn1"]),
    ):
        assert list(convert(HOST[host_id].build(), Clear(radius=2)).status) == found


def test_the_scale_of_lumina_next_follows_the_number_of_tokens() -> None:
    """The pipeline gives the tokens of its native size; a window keeps the host's scale."""
    case = HOST["lumina-next"]
    inputs = case.inputs(*SIZE, 2, TEXT)
    drawn = []
    for base in (None, 12):
        with DenseOracle({Layout(0, SIZE)}, RADIUS_2), torch.no_grad():
            want = case.build()(**inputs | dict(cross_attention_kwargs=dict(base_sequence_length=base))).sample
        model: Any = case.build()
        convert(model, Clear(radius=2))
        with torch.no_grad():
            drawn.append(model(**inputs | dict(cross_attention_kwargs=dict(base_sequence_length=base))).sample)
        torch.testing.assert_close(drawn[-1], want, rtol=0, atol=2e-5)
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


@pytest.mark.parametrize("host_id", ["lumina-next", "uvit-down", "kandinsky5"])
def test_four_times_the_sides(host_id: str) -> None:
    case, model, size = HOST[host_id], HOST[host_id].build(), (4 * SIZE[0], 4 * SIZE[1])
    convert(model, Clear(radius=2))
    run(case, model, *SIZE)
    with DenseOracle({Layout(0, size)}, RADIUS_2) as oracle:
        want = run(case, case.build(), *size)
    assert oracle.calls
    torch.testing.assert_close(run(case, model, *size), want, rtol=0, atol=2e-5)


def test_codes_that_are_no_picture() -> None:
    case, model = HOST["uvit"], HOST["uvit"].build()
    inputs = case.inputs(*SIZE, 1, TEXT)
    found = find_host(model).probe(model, inputs | dict(input_ids=inputs["input_ids"].flatten(1)))
    assert found == "input_ids are not those of an image [B, height, width], but (1, 48)"


def test_projections_of_kandinsky_learn_and_take_residuals() -> None:
    """They are called to_query, to_key, to_value and out_layer."""
    case, model = HOST["kandinsky5"], HOST["kandinsky5"].build()
    conversion = convert(model, LinFusion())
    layer = model.get_submodule("visual_transformer_blocks.0.self_attention")
    assert [name for name, _ in _projections(conversion, ["q", "k", "v", "out"])] == [
        f"visual_transformer_blocks.0.self_attention.{name}" for name in ("to_query", "to_key", "to_value", "out_layer")
    ]
    before = run(case, model, *SIZE)
    with torch.no_grad():
        for parameter in conversion.parameters():
            parameter.add_(0.3 * noise(*parameter.shape))
    assert (run(case, model, *SIZE) - before).abs().max() > 1e-3
    assert state_of(layer).status == "rerouted"


def glm_edit(model: Any, spec: AttnSpec | None) -> Tensor:
    """Draw with the keys of a reference image of another size in a cache."""
    case = HOST["glm-image"]
    if spec is not None:
        convert(model, spec)
    cache = GlmImageKVCache(num_layers=2)
    with torch.no_grad():
        cache.set_mode("write")
        model(**case.inputs(4, 5, 1, 0), kv_caches=cache)
        cache.set_mode("read")
        found: Tensor = model(**case.inputs(*SIZE, 1, TEXT), kv_caches=cache).sample
    return found


def qwen_cached(model: Any, spec: AttnSpec | None) -> Tensor:
    """Draw with the keys of the text and of a reference image in a cache; only the image asks."""
    case = HOST["qwen-image-2.1-edit"]
    if spec is not None:
        convert(model, spec)
    cache, inputs = QwenImage21KVCache(num_layers=2), case.inputs(*SIZE, 2, TEXT)
    with torch.no_grad():
        model(**inputs, kv_cache=cache, kv_cache_mode="extract")
        found: Tensor = model(**inputs, kv_cache=cache, kv_cache_mode="cached").sample
    return found


CACHED = {
    "glm-image": (glm_edit, {Layout(20 + TEXT, SIZE), Layout(0, (4, 5))}),
    "qwen-image-2.1-edit": (qwen_cached, {Layout(TEXT + 12, SIZE)}),
}


@pytest.mark.parametrize("host_id", CACHED)
@COVERING
def test_a_cache_of_keys_changes_nothing(host_id: str, spec: AttnSpec) -> None:
    draw, _ = CACHED[host_id]
    model = HOST[host_id].build()
    torch.testing.assert_close(draw(model, spec), draw(HOST[host_id].build(), None), rtol=0, atol=2e-5)
    assert statuses(model) == {"rerouted"}


@pytest.mark.parametrize("host_id", CACHED)
def test_a_window_beside_cached_keys(host_id: str) -> None:
    draw, layouts = CACHED[host_id]
    for spec, window in ((Clear(radius=2), RADIUS_2), (Neighborhood(kernel_size=3), KERNEL_3)):
        with DenseOracle(layouts, window, more_keys=True) as oracle:
            want = draw(HOST[host_id].build(), None)
        assert oracle.calls == 4
        torch.testing.assert_close(draw(HOST[host_id].build(), spec), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("how", ["list", "tensor"])
def test_hidream_with_patches_that_were_cut_before(how: str) -> None:
    """In training samples come as patches, padded and masked, and their sizes beside them."""
    case = HOST["hidream"]
    inputs = case.inputs(*SIZE, 2, TEXT)
    model = case.build()
    tokens, seen, sizes, ids = model.patchify(inputs["hidden_states"])
    cut = dict(hidden_states=tokens, hidden_states_masks=seen, img_ids=ids)
    cut["img_sizes"] = sizes if how == "tensor" else [tuple(size) for size in sizes.tolist()]
    convert(model, Clear(radius=2))
    with torch.no_grad():
        want = model(**inputs).sample
        assert torch.equal(model(**inputs | cut).sample, want)
    assert statuses(model) == {"rerouted"}


def test_hidream_with_images_of_different_sizes() -> None:
    case, model = HOST["hidream"], HOST["hidream"].build()
    convert(model, Clear(radius=2))
    model.train()  # it returns patches then
    sizes, inputs = [(6, 8), (9, 4)], case.inputs(6, 8, 2, TEXT)
    with torch.no_grad():
        parts = [model.patchify(noise(1, CHANNELS, 2 * h, 2 * w, seed=i)) for i, (h, w) in enumerate(sizes)]
        tokens, seen, _, ids = (torch.cat(part) for part in zip(*parts, strict=True))
        cut = dict(hidden_states=tokens, hidden_states_masks=seen, img_ids=ids, img_sizes=sizes)
        together = model(**inputs | cut).sample
        for b in range(2):
            own = {name: value[b : b + 1] for name, value in (inputs | cut).items() if "llama" not in name}
            own["encoder_hidden_states_llama3"] = inputs["encoder_hidden_states_llama3"][:, b : b + 1]
            torch.testing.assert_close(together[b : b + 1], model(**own).sample, rtol=0, atol=2e-5)
    assert statuses(model) == {"rerouted"}


def test_a_layer_that_two_models_share_takes_no_grid_of_the_other() -> None:
    """A ControlNet of Z-Image runs layers of its transformer, before the transformer has seen the new size."""
    case, control_case = HOST["z-image"], HOST["z-image-controlnet"]
    transformer: Any = case.build()
    config = dict(control_layers_places=[0], control_in_dim=CHANNELS, dim=32, n_refiner_layers=1, n_heads=2)
    control: Any = build(diffusers.ZImageControlNetModel, n_kv_heads=2, **config)
    diffusers.ZImageControlNetModel.from_transformer(control, transformer)
    assert control.noise_refiner is transformer.noise_refiner
    inputs = control_case.inputs(4, 16, 2, TEXT)
    with torch.no_grad():
        want = control(**inputs)[0]
        convert(transformer, Clear(radius=2))
        run(case, transformer, 8, 8)  # as many tokens as 4 x 16
        assert torch.equal(control(**inputs)[0], want)
    convert(control, Clear(radius=2))
    with torch.no_grad():
        assert not torch.equal(control(**inputs)[0], want)
    assert state_of(transformer.noise_refiner[0].attention).status == "dense: it runs outside of a forward of its model"
    assert state_of(control.control_layers[0].attention).status == "rerouted"


def test_an_unconditional_unet_has_a_grid_for_each_level() -> None:
    config = dict(
        in_channels=CHANNELS, out_channels=CHANNELS, layers_per_block=1, block_out_channels=(16, 32, 32),
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"), norm_num_groups=8, attention_head_dim=16,
    )  # fmt: skip
    model, masked = (build(diffusers.UNet2DModel, **config) for _ in range(2))
    inputs = dict(sample=noise(2, CHANNELS, 12, 8), timestep=torch.tensor(600))
    conversion = convert(model, Clear(radius=2))
    layouts = {Layout(0, (12, 8)), Layout(0, (6, 4)), Layout(0, (3, 2))}
    with torch.no_grad(), DenseOracle(layouts, RADIUS_2):
        want = sample(masked(**inputs))
    with torch.no_grad():
        torch.testing.assert_close(sample(model(**inputs)), want, rtol=0, atol=2e-5)
    seen = [state_of(model.get_submodule(row.name)).grid for row in conversion.layers]
    found = [(grid.height, grid.width) for grid in seen if grid is not None]
    assert found == [(12, 8), (6, 4), (6, 4), (6, 4), (12, 8), (12, 8), (3, 2)]


@pytest.mark.parametrize(
    "host_id",
    [
        "prx",
        "lumina-next",
        *(
            pytest.param(host_id, marks=pytest.mark.slow)
            for host_id in ("flux3-reference", "krea2-masked", "qwen-image-2.1", "kandinsky5", "uvit-down")
        ),
    ],
)
def test_a_whole_model_is_compiled(host_id: str) -> None:
    case = HOST[host_id]
    model = case.build()
    convert(model, Clear(radius=2))
    want = run(case, model, *SIZE)
    whole = host_id != "qwen-image-2.1"  # it reads the places of images in the text
    compiled = torch.compile(model, fullgraph=whole, backend="eager")
    with use_grid(model, *SIZE):
        torch.testing.assert_close(run(case, compiled, *SIZE), want, rtol=0, atol=2e-5)


def test_a_grid_that_is_given_is_compared_with_the_tokens_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    case, model = HOST["krea2"], HOST["krea2"].build()
    convert(model, Clear(radius=2), grid=(6, 10))
    monkeypatch.setattr(grids, "_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="6 x 10, is not that of this forward, whose hidden_states has 48 tokens"):
        run(case, model, *SIZE)


def test_four_heads_of_queries_share_two_of_keys() -> None:
    """Krea 2 repeats them itself, so that nothing is repeated twice."""
    torch.testing.assert_close(run(HOST["krea2"], HOST["krea2"].build(), 12, 10), stock("krea2"), rtol=0, atol=0)
    assert {state_of(m).num_heads for m in _converted("krea2").modules() if is_rerouted(m)} == {4}


def _converted(host_id: str) -> nn.Module:
    model = HOST[host_id].build()
    convert(model, Clear(radius=2))
    return model


def test_one_reading_of_a_mask_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each reading waits for all that runs there."""
    case, model = HOST["hunyuan-image"], HOST["hunyuan-image"].build()
    conversion = convert(model, Clear(radius=2))
    read: list[Any] = []
    padding = masks._padding
    monkeypatch.setattr(masks, "_padding", lambda *args: read.append(args) or padding(*args))
    run(case, model, *SIZE)
    assert len(conversion.layers) == 2 and len(read) == 1
