"""The flags that every measuring command shares: --protocol, --resize, --crop, --precision."""

import json

import pytest
import torch

from muse import load_config
from muse.data.crops import PictureCrop
from muse.data.dataloader import eval_loader
from muse.evaluation.metrics.psnr_ssim import psnr
from muse.models.loading import load_model
from muse.models.muse_vit import MUSE_ViT
from scripts import evaluate, evaluate_images, zero_shot
from tests.helpers import one_error


@pytest.fixture
def run(trained_run, tmp_path):
    """run(script, further flags) into tmp_path/out: its exit code."""
    config, folder = trained_run
    flags = ["--config", str(config), "--checkpoint", str(folder / "final"), "--device", "cpu"]

    def command(script, *extra):
        return script.main([*flags, "--output_dir", str(tmp_path / "out"), *extra])

    return command


def read(tmp_path):
    return json.loads((tmp_path / "out" / "metrics.json").read_text())


PSNR = ["--metrics", "psnr"]


def test_without_flags_it_is_native(run, tmp_path):
    assert run(evaluate, *PSNR) == 0
    protocol = read(tmp_path)["protocol"]
    assert protocol["name"] == "native" and protocol["changed"] == []
    assert protocol["precision"] == "float32"
    assert protocol["crop"] == {"resize_shorter_edge": 32, "center_crop": 32}
    assert protocol["resize"]["filter"] == "bicubic" and protocol["resize"]["antialias"] is True


@pytest.mark.parametrize(
    "flags, cut",
    [
        (["--crop", "40"], PictureCrop("center", 40, 40)),
        (["--resize", "48", "--crop", "40"], PictureCrop("center", 48, 40)),
        (["--protocol", "adm256", "--crop", "40"], PictureCrop("adm", None, 40)),
        (["--protocol", "unilip256", "--crop", "40"], PictureCrop("center", 256, 40)),
    ],
)
def test_pictures_are_cut_so(flags, cut, run, monkeypatch, shapes_data, tmp_path):
    """By the pictures, in a model that turns all black."""
    monkeypatch.setattr(MUSE_ViT, "reconstruct", lambda self, images: torch.zeros_like(images))
    assert run(evaluate, *PSNR, *flags) == 0
    (batch,) = eval_loader(f"{shapes_data}/val-*.tar", batch_size=8, transform=cut)
    want = psnr(batch["images"], torch.zeros_like(batch["images"])).mean()
    got = read(tmp_path)
    assert got["psnr"] == pytest.approx(float(want), rel=1e-6)
    assert got["protocol"]["crop"]["center_crop"] == 40
    assert "crop" in got["protocol"]["changed"]


def test_precision_is_that_of_the_model(run, trained_run, shapes_data, tmp_path):
    assert run(evaluate, *PSNR, "--precision", "bf16") == 0
    got = read(tmp_path)
    assert got["protocol"]["precision"] == "bf16"
    config, folder = trained_run
    model = load_model(folder / "final", load_config(config).model)
    cut = PictureCrop("center", 32, 32)
    (batch,) = eval_loader(f"{shapes_data}/val-*.tar", batch_size=8, transform=cut)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        halves = model.reconstruct(batch["images"]).float()
    with torch.no_grad():
        full = model.reconstruct(batch["images"])
    want = float(psnr(batch["images"], halves).mean())
    assert got["psnr"] == pytest.approx(want, rel=1e-4)
    assert abs(want - float(psnr(batch["images"], full).mean())) > 1e-4 * want


@pytest.mark.parametrize("script", [evaluate, zero_shot])
@pytest.mark.parametrize(
    "flags, says",
    [
        (["--protocol", "mae"], "has no protocol 'mae': one of native, release, "),
        (["--resize", "16", "--crop", "32"], "crop_size 32 does not fit into resize_shorter_edge"),
        (["--crop", "0"], "--crop must be at least 1"),
        (["--precision", "half"], "invalid choice: 'half'"),
    ],
)
def test_a_wrong_flag_is_one_line_and_starts_nothing(script, flags, says, run, tmp_path, capsys):
    old = tmp_path / "out" / "metrics.json"
    old.parent.mkdir()
    old.write_text("{}")
    assert says in one_error(capsys, run(script, *flags))
    assert old.exists()


def test_two_sets_take_the_same_flags(shapes_data, tmp_path, capsys):
    sets = ["--real", f"{shapes_data}/val-*.tar", "--fake", f"{shapes_data}/val-*.tar"]
    flags = ["--metrics", "ssim", "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert evaluate_images.main([*sets, *flags, "--protocol", "adm256", "--crop", "32"]) == 0
    protocol = read(tmp_path)["protocol"]
    assert protocol["name"] == "adm256" and protocol["crop"] == {"center_crop": 32}
    assert "null" not in json.dumps(protocol)
    assert evaluate_images.main([*sets, *flags]) == 0
    assert read(tmp_path)["protocol"]["crop"] == {}
    code = evaluate_images.main([*sets, *flags, "--protocol", "mae"])
    assert "evaluate_images has no protocol 'mae': one of native, " in one_error(capsys, code)
