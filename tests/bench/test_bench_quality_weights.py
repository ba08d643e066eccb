"""Fidelity on real weights: how ONNX graphs become state dicts, and the measurement itself where they were fetched."""

from types import SimpleNamespace

import pytest
import torch

from vision_attn.bench.candidate import AbsentError
from vision_attn.bench.document import read_document
from vision_attn.bench.entries import quality_dinov2, quality_terrain
from vision_attn.bench.quality import dinov2, terrain
from vision_attn.bench.quality.contenders import DEFAULT
from vision_attn.bench.quality.weights import DINOV2, TERRAIN, Graph, read_graph
from vision_attn.cli import main

CPU = torch.device("cpu")
FETCHED = DINOV2.path.exists() and TERRAIN.path.exists()
needs_weights = pytest.mark.skipif(not FETCHED, reason="vision-attn bench quality --download was not run here")


def node(op_type, inputs, output):
    return SimpleNamespace(op_type=op_type, input=inputs, output=[output])


def test_matrices_of_the_vision_transformer_are_found_by_their_biases():
    torch.manual_seed(0)
    import timm  # after torchvision's stand-in

    wanted = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True).state_dict()
    wanted = {name: torch.randn_like(t) for name, t in wanted.items()}
    first, rest = wanted["pos_embed"].split((1, dinov2.NATIVE**2), 1)
    tensors, nodes = {"onnx::Concat_1": first, "position": rest}, []
    tensors["backbone.embeddings.cls_token"] = wanted["cls_token"]

    def put(target, weight, bias):
        tensors[f"onnx::MatMul_{len(nodes)}"], tensors[f"{target}.bias"] = weight.T, bias
        nodes.append(node("MatMul", ["x", f"onnx::MatMul_{len(nodes)}"], f"product {target}"))
        nodes.append(node("Add", [f"{target}.bias", f"product {target}"], f"sum {target}"))

    for kind in ("weight", "bias"):
        tensors[f"backbone.embeddings.patch_embeddings.projection.{kind}"] = wanted[f"patch_embed.proj.{kind}"]
        tensors[f"backbone.layernorm.{kind}"] = wanted[f"norm.{kind}"]
    for i in range(dinov2.BLOCKS):
        own, theirs = f"blocks.{i}", f"backbone.encoder.layer.{i}"
        qkv = [wanted[f"{own}.attn.qkv.{kind}"].chunk(3) for kind in ("weight", "bias")]
        for name, weight, bias in zip(("query", "key", "value"), *qkv, strict=True):
            put(f"{theirs}.attention.attention.{name}", weight, bias)
        for ours, name in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            put(f"{theirs}.{name}", wanted[f"{own}.{ours}.weight"], wanted[f"{own}.{ours}.bias"])
        for number in (1, 2):
            tensors[f"{theirs}.layer_scale{number}.lambda1"] = wanted[f"{own}.ls{number}.gamma"]
            for kind in ("weight", "bias"):
                tensors[f"{theirs}.norm{number}.{kind}"] = wanted[f"{own}.norm{number}.{kind}"]
    found = dinov2.backbone_weights(Graph(tensors, nodes))
    assert set(found) == set(wanted) and all(torch.equal(found[name], t) for name, t in wanted.items())


def test_norms_of_the_unet_are_found_by_the_convolutions_after_them():
    gain, shift = torch.randn(2, 4, 1, 1)
    tensors = {"gain": gain, "shift": shift, "network.input_blocks.1.0.in_layers.2.weight": torch.randn(4, 4, 3, 3)}
    nodes = [
        node("InstanceNormalization", ["x"], "normed"),
        node("Reshape", ["normed"], "shaped"),
        node("Mul", ["shaped", "gain"], "scaled"),
        node("Add", ["scaled", "shift"], "shifted"),
        node("Sigmoid", ["shifted"], "gate"),
        node("Mul", ["shifted", "gate"], "silu"),
        node("Conv", ["silu", "network.input_blocks.1.0.in_layers.2.weight"], "out"),
    ]
    found = terrain.openai_weights(Graph(tensors, nodes))
    assert torch.equal(found["input_blocks.1.0.in_layers.0.weight"], gain.flatten())
    assert torch.equal(found["input_blocks.1.0.in_layers.0.bias"], shift.flatten())
    with pytest.raises(KeyError):  # the whole UNet is not there
        terrain.unet_weights(found)


@pytest.mark.parametrize("shipped", [DINOV2, TERRAIN], ids=["dinov2", "terrain"])
def test_without_the_weights_it_says_how_to_get_them(shipped, tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_ATTN_WEIGHTS", str(tmp_path))
    with pytest.raises(AbsentError, match="vision-attn bench quality --download"):
        read_graph(shipped)
    assert main(["bench", "quality_terrain", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    (row,) = read_document(tmp_path / "quality_terrain_cpu.json")["rows"]
    assert all("--download" in candidate["reason"] for candidate in row["candidates"])


def test_the_musts_are_the_issues():
    (terrain_case,) = quality_terrain.cases(CPU)
    assert [(b.subject, b.measure, b.most) for b in terrain_case.bounds] == [(DEFAULT.name, "sigma_80", 0.01)]
    by_size = {case.pixels: case for case in quality_dinov2.cases(torch.device("cuda"))}
    assert set(by_size) == {518, 896, 1288} and all(case.photos == 20 for case in by_size.values())
    assert [(b.subject, b.measure, b.least) for b in by_size[518].bounds] == [(DEFAULT.name, "cosine", 0.99)]
    assert sum(map(len, dinov2.PHOTOS.values())) == 20


@pytest.mark.slow
@needs_weights
def test_fetched_weights_compute_what_onnxruntime_computes():
    assert dinov2.difference() < 1e-5 and terrain.difference() < 2e-5


@pytest.mark.slow
@needs_weights
@pytest.mark.parametrize("entry", ["quality_dinov2", "quality_terrain"])
def test_fetched_weights_are_measured(entry, tmp_path):
    assert main(["bench", entry, "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    (row,) = read_document(tmp_path / f"{entry}_cpu.json")["rows"]
    found = {c["name"]: c["quality"] for c in row["candidates"]}
    measure = "error" if entry == "quality_dinov2" else "sigma_80"
    assert found[DEFAULT.name][measure] < 0.1 * found["clear r16"][measure] < 0.1 * found["clear r8"][measure]
