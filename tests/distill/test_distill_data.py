"""Settings, images, captions, the cache and the order of the data; all that can be wrong with them."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import yaml
from distill_case import WORDS, arguments, settings, write_images
from PIL import Image
from safetensors import safe_open

from vision_attn.cli import main
from vision_attn.demo import load_teacher
from vision_attn.distill import cache
from vision_attn.distill.cache import write_cache
from vision_attn.distill.data import CachedData, Order
from vision_attn.distill.images import find_items, generate, nearest_size, read_prompts
from vision_attn.distill.reading import read_config

NAMES = ("emoji:nano", "FluxTransformer2DModel")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--run.step=3"], "run.step"),
        (["--optimizer.name=sgd"], "sgd"),
        (["--student.processor=Clera"], "known are agent"),
        (["--student.processor=Clear", "--student.fields={radiu: 3}"], "has no field radiu"),
        (["--run.steps=0"], "run.steps must be at least 1"),
        (["--loss.attention=-1"], "loss.attention must be at least 0"),
        (["--loss.attention=0", "--loss.prediction=0"], "all weights are zero"),
        (["--data.sizes=[[0, 8]]"], "data.sizes"),
        (["--student.init=random", "--student.trainable=new"], "random projections must be trained"),
        (["--student.init=random", "--student.adapter=a"], "student.adapter decides about start and layers"),
        (["--model.dtype=bfloat16"], "run.precision must be 'bf16'"),
        (["--student.projections=[q, w]"], "'w'"),
        (["--optimizer.ema=1"], "below 1"),
        (["--eval.sigmas=[2]"], "between 0 and 1"),
        (["--eval.sigmas=[]"], "at least one number between 0 and 1"),
    ],
)
def test_wrong_settings(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_config([*arguments(tmp_path), *wrong], "test")


def test_a_file_and_values_that_have_the_last_word(tmp_path, capsys):
    file = tmp_path / "a.yaml"
    text = read_config([*arguments(tmp_path), "--print-config"], "test")
    file.write_text(text)
    assert read_config(["--config", str(file)], "test") == settings(tmp_path)
    changed = read_config(["--config", str(file), "--student.fields.mid_dim=8", "--run.steps=9"], "test")
    assert changed.student.fields == {"mid_dim": 8, "feature_map": "hedgehog"} and changed.run.steps == 9
    assert main(["distill", "train", "--config", str(file), "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["run"]["steps"] == 4
    file.write_text(text.replace("processor:", "proccessor:"))
    assert main(["distill", "--config", str(file)]) == 2
    assert "proccessor" in capsys.readouterr().err
    for wrong, message in (
        (["tarin"], "'tarin' is none of train"),
        (["--config", "no.yaml"], "no.yaml does not exist"),
        (["--config", str(file), "--run.steps=many"], "run.steps"),
        (["--config", str(file), "--eval.size=large"], "eval.size"),
    ):
        assert main(["distill", *wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert main(["distill", "--help"]) == 0


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["distill", "train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "The schedule of the learning rate ends with them. (type: float | null, default: null)" in text
    text = re.sub(r", --[a-z._]+[+] \[ITEM,[.]{3}\]", "", text)  # lists have a second option, which adds an item
    bare = re.findall(r"--([a-z]+[.][a-z_]+)[^-]*? (?=[(]type|[(]required)", text)
    assert len(bare) > 20
    assert not [key for key in bare if not re.search(rf"--{key} [^-(]*[a-z]", text)]
    assert "class '" not in text.replace("<class 'Path'>", "")


def test_commands_say_what_is_missing(tmp_path, capsys):
    for action, message in (
        ("cache", "images does not exist"),
        ("generate", "data.prompts are needed"),
        ("train", "holds no cache"),
        ("eval", "train first"),
    ):
        assert main(["distill", action, *arguments(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "images").mkdir()
    assert main(["distill", "cache", *arguments(tmp_path)]) == 2
    assert "has nothing to learn from" in capsys.readouterr().err


def test_a_folder_and_a_tar_hold_the_same(tmp_path):
    folder = tmp_path / "images"
    write_images(folder, count=3)
    (folder / "2.txt").unlink()
    (folder / "2.json").write_text(json.dumps({"caption": "rocket"}))
    (folder / "alone.png").write_bytes((folder / "0.png").read_bytes())  # without a caption
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    for place in (folder, tmp_path / "data.tar", tmp_path):
        items = [item for item in find_items(place) if ("tar" in item.key) == (place.suffix == ".tar")][:3]
        assert [item.caption() for item in items] == list(WORDS[:3])
        assert items[1].open().size == (32, 32)
    (tmp_path / "data.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match="no uncompressed tar"):
        find_items(tmp_path / "data.tar")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_items(tmp_path / "nowhere")


def test_transparent_images_lie_on_white(tmp_path):
    write_images(tmp_path, count=1)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "0.png")
    assert find_items(tmp_path)[0].open().getpixel((3, 3)) == (255, 255, 255)


def opened(folder, image, **options):
    """Return an image as training sees it, in numbers."""
    image.save(folder / "0.png", options.pop("format", "PNG"), **options)
    return np.asarray(find_items(folder)[0].open()).astype(int)


@pytest.mark.parametrize(("dtype", "form"), [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF")])
def test_grey_of_16_bits_is_no_white(dtype, form, tmp_path):
    write_images(tmp_path, count=1)
    grey = np.linspace(0, 65535, 64).reshape(8, 8)
    seen = opened(tmp_path, Image.fromarray(grey.astype(dtype)), format=form)
    assert np.abs(seen - grey[..., None] / 257).max() <= 1


def test_photos_stand_upright(tmp_path):
    write_images(tmp_path, count=1)
    upright = np.zeros((12, 8, 3), np.uint8)
    upright[:4] = 200
    (turned := Image.Exif())[0x112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it
    lying = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(opened(tmp_path, lying, exif=turned), upright)


def test_pixels_without_a_known_white_are_refused(tmp_path):
    write_images(tmp_path, count=1)
    for values in (np.full((8, 8), 0.5, np.float32), np.full((8, 8), 70000, np.int32)):
        with pytest.raises(ValueError, match="no numbers of 8 or 16 bits"):
            opened(tmp_path, Image.fromarray(values), format="TIFF")


def test_prompts_and_captions_are_utf_8(tmp_path):
    """Also where that is not the encoding of the system; an editor's mark of it is no word."""
    words = "caf\u00e9 \u2014 \u7f8a"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(words + "\n", "utf-8-sig")
    write_images(tmp_path, count=1)
    (tmp_path / "0.txt").write_text(words, "utf-8-sig")
    assert find_items(tmp_path)[0].caption() == words
    program = (
        "from pathlib import Path; from vision_attn.distill.images import read_prompts; "
        f"print(ascii(read_prompts(Path({str(prompts)!r}), '')[0]))"
    )
    plain = os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    run = subprocess.run([sys.executable, "-c", program], env=plain, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ascii(words)
    prompts.write_bytes(words.encode("utf-16"))
    with pytest.raises(ValueError, match=r"prompts.txt is not UTF-8"):
        read_prompts(prompts, "data.prompts")


def test_the_nearest_size():
    sizes = [(64, 64), (32, 64), (128, 128)]
    assert nearest_size(300, 290, sizes) == (128, 128) and nearest_size(60, 50, sizes) == (64, 64)
    assert nearest_size(200, 100, sizes) == (32, 64)


def cached(config):
    """Return the captions of a cache, in order, and its latents by caption."""
    data = CachedData(config.data, *NAMES)
    return list(data.captions.values()), {caption: data[[place]].latents for place, caption in data.captions.items()}


def test_a_small_cache_is_read_once(tmp_path, monkeypatch):
    write_images(tmp_path / "images", count=3)
    config = settings(tmp_path, data__shard_size=2)
    write_cache(config)
    data, places = CachedData(config.data, *NAMES), [(0, 1), (1, 0)]
    first = data[places]
    assert pickle.loads(pickle.dumps(data)).kept == {}  # a worker's copy
    for path in data.shards:
        path.unlink()
    data.files.clear()
    again = data[places]
    assert torch.equal(again.latents, first.latents) and again.size == first.size == (32, 32)
    assert again.tensors.keys() == first.tensors.keys() and again.null.keys() == first.null.keys()
    with pytest.raises(FileNotFoundError):
        data[[(0, 0)]]  # was not read

    write_cache(config)
    monkeypatch.setattr("vision_attn.distill.data._ROOM", first.latents[:1].nbytes)
    data = CachedData(config.data, *NAMES)
    assert torch.equal(data[places].latents, first.latents)
    assert sum(t.nbytes for kept in data.kept.values() for t in kept.values()) <= first.latents[:1].nbytes


def test_damaged_images_are_skipped_counted_and_listed_and_the_cache_goes_on(tmp_path, caplog):
    write_images(tmp_path / "images", sizes=((32, 32), (32, 48)), count=8)
    whole = (tmp_path / "images" / "0.png").read_bytes()
    (tmp_path / "images" / "0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images" / "1.png").write_bytes(b"")
    (tmp_path / "images" / "2.json").write_text('{"no": "caption"}')
    (tmp_path / "images" / "2.txt").unlink()
    config = settings(tmp_path, data__sizes=[[32, 32], [32, 48]], data__shard_size=2)
    found = write_cache(config)
    assert found["samples"] == 5 and found["skipped"] == 3
    listed = (tmp_path / "cache" / "skipped.txt").read_text()
    assert [line.split(":")[0] for line in listed.splitlines()] == ["0.png", "1.png", "2.png"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    damaged, removed = sorted(times)[:2]
    damaged.write_bytes(damaged.read_bytes()[:50])
    removed.unlink()
    assert write_cache(config) == found
    assert f"{damaged} is damaged and is made again" in caplog.text
    assert {p for p in times if p not in (damaged, removed) and p.stat().st_mtime_ns != times[p]} == set()
    data = CachedData(config.data, *NAMES)
    assert len(data) == 5 and set(data.buckets) == {(32, 32), (32, 48)}
    write_images(tmp_path / "images", sizes=((32, 32), (32, 48)), count=8)
    (tmp_path / "images" / "2.json").unlink()
    assert write_cache(config) == {"samples": 8, "shards": 4, "skipped": 0}


@pytest.mark.parametrize("in_tar", [False, True], ids=["folder", "tar"])
def test_what_changed_under_the_same_name_is_encoded_again(in_tar, tmp_path):
    images, place = tmp_path / "images", tmp_path / "data.tar" if in_tar else tmp_path / "images"
    write_images(images, count=3)
    config = settings(tmp_path, data__images=place, data__shard_size=1)

    def encode():
        if in_tar:
            with tarfile.open(place, "w") as tar:
                tar.add(images, "images")
        write_cache(config)
        return cached(config)

    captions, latents = encode()
    assert captions == list(WORDS[:3])
    files = set((tmp_path / "cache").glob("*.safetensors"))
    (images / "1.txt").write_text("a squid")
    Image.new("RGB", (32, 32), "red").save(images / "2.png")
    captions, again = encode()
    assert captions == [WORDS[0], "a squid", WORDS[2]]
    assert torch.equal(again["a squid"], latents[WORDS[1]]) and not torch.equal(again[WORDS[2]], latents[WORDS[2]])
    assert len(files & set((tmp_path / "cache").glob("*.safetensors"))) == 1


def test_a_cache_of_fewer_images_or_another_model_setting_leaves_nothing_behind(tmp_path):
    write_images(tmp_path / "images", count=5)
    config = settings(tmp_path, data__shard_size=2)
    write_cache(config)
    other = tmp_path / "cache" / "transformer.safetensors"
    other.write_bytes(b"not a shard")
    for name in ("2", "3", "4"):
        (tmp_path / "images" / f"{name}.png").unlink()
    assert write_cache(config)["shards"] == 1
    shard, kept = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert cached(config)[0] == list(WORDS[:2]) and kept == other
    write_cache(settings(tmp_path, data__shard_size=2, model__guidance=2))
    assert not shard.exists()


def test_other_sizes_are_cached_anew_and_refused_until_then(tmp_path):
    write_images(tmp_path / "images", count=2)
    small, large = settings(tmp_path), settings(tmp_path, data__sizes=[[64, 64]])
    write_cache(small)
    wrong = r"was cached at \[\[32, 32\]\], not at \[\[64, 64\]\]: run 'vision-attn distill cache' with these sizes"
    with pytest.raises(ValueError, match=wrong):
        CachedData(large.data, *NAMES)
    write_cache(large)
    assert set(CachedData(large.data, *NAMES).buckets) == {(64, 64)}
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    both, turned = ([[64, 64], [32, 32]], [[32, 32], [64, 64]])
    write_cache(settings(tmp_path, data__sizes=both))
    CachedData(settings(tmp_path, data__sizes=turned).data, *NAMES)


def test_the_last_cache_stays_in_use_until_the_next_is_finished(tmp_path, monkeypatch):
    write_images(tmp_path / "images", count=3)
    config = settings(tmp_path, data__shard_size=1)
    real, calls = cache.save_file, []

    def stop(tensors, path, metadata):
        calls.append(path)
        if len(calls) in (2, 6):
            raise KeyboardInterrupt
        real(tensors, path, metadata)

    monkeypatch.setattr(cache, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        write_cache(config)
    with pytest.raises(FileNotFoundError, match="no cache that was finished"):
        CachedData(config.data, *NAMES)
    write_cache(config)
    assert len(calls) == 4  # one of three was there
    for i, word in enumerate(WORDS[3:]):
        (tmp_path / "images" / f"{i}.txt").write_text(word)
    with pytest.raises(KeyboardInterrupt):
        write_cache(config)
    assert cached(config)[0] == list(WORDS[:3])
    write_cache(config)
    assert len(calls) == 8 and cached(config)[0] == list(WORDS[3:])
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_nothing_but_damage(tmp_path):
    write_images(tmp_path / "images", count=1)
    (tmp_path / "images" / "0.png").write_bytes(b"?")
    with pytest.raises(ValueError, match="none of the 1 images"):
        write_cache(settings(tmp_path))


def test_a_cached_sample_is_what_the_pipeline_would_give(tmp_path):
    write_images(tmp_path / "images", count=3)
    config = settings(tmp_path)
    write_cache(config)
    data = CachedData(config.data, *NAMES)
    batch = data[[(0, 2), (0, 0)]]
    pipe = load_teacher("nano")
    embeds, pooled, _ = pipe.encode_prompt([WORDS[2], WORDS[0]])
    torch.testing.assert_close(batch.tensors["encoder_hidden_states"], embeds)
    torch.testing.assert_close(batch.tensors["pooled_projections"], pooled)
    assert batch.tensors["img_ids"].shape == (64, 3) and batch.size == (32, 32)
    image = Image.open(tmp_path / "images" / "2.png")
    first = batch.latents[0].unflatten(0, (8, 8))[0, 0]  # a token of 4 x 4 pixels
    assert first.std(0, unbiased=False).max() < 2
    red = image.getpixel((0, 0))[0] / 127.5 - 1
    assert any(abs(first - (red - 0.6) * 1.6).flatten() < 1e-5)
    null = batch.without_prompts(torch.tensor([True, False]))
    torch.testing.assert_close(null["pooled_projections"], torch.stack([pipe.encode_prompt("")[1][0], pooled[1]]))


@pytest.mark.parametrize("damage", ["model", "denoiser", "index", "shard", "missing", "format", "version"])
def test_a_cache_that_does_not_fit(damage, tmp_path):
    write_images(tmp_path / "images", count=2)
    config = settings(tmp_path)
    write_cache(config)
    shard, index = next((tmp_path / "cache").glob("*.safetensors")), tmp_path / "cache" / "index.json"
    names, message = (
        list(NAMES),
        {"model": "base", "index": "damaged", "shard": "damaged", "version": "earlier version"},
    )
    if damage in ("model", "denoiser"):
        names[damage == "denoiser"] = "another"
    elif damage == "index":
        index.write_text("{")
    elif damage == "format":
        index.write_text("{}")
    elif damage == "version":
        index.write_text(index.read_text().replace("cache.v2", "cache.v1"))
    elif damage == "shard":
        shard.write_bytes(shard.read_bytes()[:50])
    else:
        shard.unlink()
    with pytest.raises(ValueError, match=message.get(damage, damage)):
        CachedData(config.data, *names)
    if damage in ("shard", "missing", "version"):
        write_cache(config)
        assert len(CachedData(config.data, *names)) == 2
    if damage == "model":
        with pytest.raises(ValueError, match="holds another cache"):
            write_cache(settings(tmp_path, model__base="emoji:unet"))


def test_all_processes_get_one_size_at_a_time_and_the_order_goes_on():
    buckets = {(32, 32): [(0, i) for i in range(7)], (32, 48): [(1, i) for i in range(4)], (8, 8): [(2, 0)]}

    def take(rank, start=0, count=12, seed=0):
        order = iter(Order(buckets, batch_size=2, rank=rank, world=2, seed=seed, start=start))
        return [next(order) for _ in range(count)]

    first, second = take(0), take(1)
    for mine, others in zip(first, second, strict=True):
        assert len(mine) == len(others) == 2
        assert len({sample[0] for sample in mine + others}) == 1
        assert mine[0][0] == 2 or len(set(mine + others)) == 4
    assert take(0, start=5, count=7) == first[5:]
    assert take(0, seed=1) != first
    assert {s for batch in take(0, count=60) + take(1, count=60) for s in batch} == {
        s for b in buckets.values() for s in b
    }


def pixels(path):
    return np.asarray(Image.open(path), np.int16)


def test_the_teacher_draws_its_own_data_and_goes_on(tmp_path):
    (tmp_path / "prompts.txt").write_text("octopus\n\nred apple\nrocket\n")
    config = settings(tmp_path, data__prompts=tmp_path / "prompts.txt", data__num_inference_steps=1)
    assert generate(config) == {"drawn": 3, "before": 0}
    second = tmp_path / "images" / "00000001.png"
    before = pixels(second)
    second.unlink()
    assert generate(config) == {"drawn": 1, "before": 2}
    # alone as in its batch, up to rounding: weights that are read again lie at other addresses
    assert np.abs(pixels(second) - before).max() <= 1
    assert second.with_suffix(".txt").read_text() == "red apple\n"
    assert write_cache(config)["samples"] == 3
    (tmp_path / "prompts.txt").write_text("octopus\ngreen apple\nrocket\n")
    assert generate(config) == {"drawn": 1, "before": 2}
    assert np.abs(pixels(second) - before).max() > 8 and second.with_suffix(".txt").read_text() == "green apple\n"
    assert generate(config) == {"drawn": 0, "before": 3}
    shutil.rmtree(tmp_path / "images")
    assert [generate(config, rank=rank, world=2)["drawn"] for rank in range(2)] == [2, 1]
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        generate(config)


def test_drawing_again_leaves_no_old_picture_beside_a_new_prompt(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("octopus\n")
    config = settings(tmp_path, data__prompts=tmp_path / "prompts.txt", data__num_inference_steps=1)
    generate(config)
    (tmp_path / "prompts.txt").write_text("rocket\n")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match="No space"):
            generate(config)
    assert generate(config) == {"drawn": 1, "before": 0}


def test_nothing_is_pickled(tmp_path):
    write_images(tmp_path / "images", count=2)
    write_cache(settings(tmp_path))
    files = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert re.fullmatch(r"32x32-00000-[0-9a-f]{16}\.safetensors", files[0])
    assert files[1:] == ["index.json", "skipped.txt"]
    with safe_open(tmp_path / "cache" / files[0], "pt") as file:
        assert "cond.pooled_projections" in file.keys() and json.loads(file.metadata()["captions"]) == list(WORDS[:2])  # noqa: SIM118
