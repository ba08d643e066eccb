"""The measures of an evaluation, each on pictures whose value is known, and one evaluation from end to end."""

import json

import pytest
import torch
import torch.nn.functional as F
from distill_case import arguments, blob, settings, write_images, write_truth

from vision_attn import Clear, convert
from vision_attn.cli import main
from vision_attn.demo import load_teacher
from vision_attn.distill.cache import write_cache
from vision_attn.distill.evaluate import Evaluation, read_truth
from vision_attn.distill.measures import agreement, copies, kernel_distance, retrieval
from vision_attn.highres.positions import stretched_positions
from vision_attn.highres.redraw import unit_of


def test_copies_are_counted():
    one, half = blob(), F.interpolate(blob()[None], 64, mode="area")[0]
    assert copies(one) == pytest.approx(1, abs=0.3)
    assert copies(torch.cat([half, half], 2)) == pytest.approx(2, abs=0.3)
    four = half.repeat(1, 2, 2)
    assert copies(four) == pytest.approx(4, abs=0.5)
    assert copies((four + 0.05 * torch.randn(four.shape)).clamp(0, 1)) == pytest.approx(4, abs=0.7)
    different = torch.cat([half, F.interpolate(blob(seed=5)[None], 64, mode="area")[0]], 2)
    assert copies(different) < 1.8  # their outlines are equal
    assert copies(torch.ones(3, 32, 32)) == 1  # nothing repeats in white


def test_copies_that_differ_in_detail_are_counted():
    generator = torch.Generator().manual_seed(0)
    bends = torch.eye(2, 3) + 0.1 * torch.randn(16, 2, 3, generator=generator)
    grids = F.affine_grid(bends, [16, 3, 128, 128], align_corners=False)
    bent = F.grid_sample(blob(128)[None].expand(16, -1, -1, -1), grids, padding_mode="border", align_corners=False)
    assert copies(torch.cat([torch.cat(list(bent[i : i + 4]), 2) for i in range(0, 16, 4)], 1)) > 2


def test_agreement_and_distance_and_retrieval():
    pictures = torch.stack([blob(seed=i) for i in range(8)])
    same = agreement(pictures, pictures)
    assert same["psnr_db"] == pytest.approx(100) and same["ssim"] == pytest.approx(1)
    assert agreement(torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.1))["psnr_db"] == pytest.approx(
        20, abs=1e-3
    )
    near, far = kernel_distance(pictures, pictures), kernel_distance(pictures, 1 - pictures)
    assert far > 10 * abs(near)
    right = [3, 0, 1]
    assert retrieval(pictures[right], pictures, right) == {"top1": 1, "top5": 1}
    assert retrieval(pictures[right], pictures, [4, 5, 6])["top1"] == 0


def test_unknown_features_are_refused():
    pictures = torch.rand(2, 3, 32, 32)
    with pytest.raises(ValueError, match="no_such_model"):
        kernel_distance(pictures, pictures, "no_such_model")


def test_a_student_that_is_its_teacher_has_no_error(tmp_path):
    write_images(tmp_path / "images", count=4)
    write_truth(tmp_path / "truth.npz", ["octopus", "red-apple"])
    changes = {"eval.count": 3, "eval.num_inference_steps": 1, "eval.batch_size": 2}
    changes["eval.truth"] = tmp_path / "truth.npz"
    config = settings(tmp_path, **changes)
    write_cache(config)
    pipe = load_teacher("nano")
    evaluation = Evaluation(config, pipe)
    teacher = evaluation.draw("teacher")
    convert(pipe, Clear(radius=99))
    same = evaluation.compare(evaluation.draw("student"), teacher)
    assert same["kd_error_mean"] < 1e-9 and same["psnr_db"] > 60
    pipe = load_teacher("nano")
    convert(pipe, Clear(radius=1.5))
    other = evaluation.__class__(config, pipe).draw("student")
    measures = evaluation.compare(other, teacher)
    assert measures["kd_error_mean"] > 1e-3 and measures["psnr_db"] < 40
    assert set(measures["kd_error"]) == {"0.15", "0.4", "0.65", "0.9"}
    assert {"retrieval_top1", "truth_psnr_db", "copies", "ssim", "kid_pixels_x1000"} <= set(measures)
    assert read_truth(tmp_path / "truth.npz")[1].shape == (2, 3, 64, 64)
    with pytest.raises(FileNotFoundError, match="rasterise"):
        read_truth(tmp_path / "nothing.npz")


def test_pictures_are_drawn_with_the_positions_of_the_cache(tmp_path):
    write_images(tmp_path / "images", count=2)
    changes = {"eval.count": 1, "eval.num_inference_steps": 1, "eval.sigmas": [0.5], "data.sizes": [[64, 64]]}
    drawn = {}
    for native in (None, [32, 32], [64, 64]):
        more = {"data.native": native, "data.cache": tmp_path / f"cache{native}"} if native else {}
        config = settings(tmp_path, **changes, **more)
        write_cache(config)
        pipe = load_teacher("nano")
        drawn[str(native)] = Evaluation(config, pipe).draw("teacher").pictures
    grid = (64 // unit_of(pipe), 64 // unit_of(pipe))
    with stretched_positions(pipe.transformer, grid, 2.0, "interpolate"):
        want = Evaluation(settings(tmp_path, **changes), pipe).draw("teacher").pictures
    # each pipeline has read its weights to other addresses, so equal pictures differ by rounding
    torch.testing.assert_close(drawn["[32, 32]"], want, atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn["None"], drawn["[64, 64]"], atol=1e-4, rtol=0)
    assert (drawn["None"] - want).abs().max() > 0.05


def test_the_command_from_images_to_the_report(tmp_path, capsys):
    write_images(tmp_path / "images", count=4)
    extra = {"student.processor": "Clear", "student.fields": {"radius": 3}}
    extra |= {"eval.count": 2, "eval.num_inference_steps": 1}
    given = arguments(tmp_path, **extra, **{"run.steps": 2, "model.base": "emoji:unet", "run.save_every": 0})
    for action in ("cache", "train", "eval"):
        assert main(["distill", action, *given]) == 0
    report = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert report["student"]["kd_error_mean"] > 0 and report["teacher"]["copies"] >= 1
    assert '"kd_error_mean"' in capsys.readouterr().out
