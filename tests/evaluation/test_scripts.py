"""The measuring commands on drawn data: what they write, and what they say of a user's mistake."""

import io
import json
import subprocess
import tarfile

import pytest
import torch
from PIL import Image

from muse import load_config
from muse.data.dataloader import eval_loader
from muse.data.masks import IGNORE_INDEX
from muse.evaluation.metrics.accuracy_iou import ConfusionMatrix
from muse.evaluation.metrics.psnr_ssim import psnr, ssim
from muse.models.loading import load_model
from scripts import benchmark, evaluate, linear_probe, segment_probe, zero_shot
from tests.helpers import ROOT, one_error


@pytest.fixture
def flags(trained_run):
    config, run = trained_run
    return ["--config", str(config), "--checkpoint", str(run / "final"), "--device", "cpu"]


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_evaluate_writes_what_the_model_gives(flags, trained_run, shapes_data, tmp_path):
    code = evaluate.main(
        [
            *flags,
            "--output_dir",
            str(tmp_path),
            "--metrics",
            "psnr,ssim,perceptual_random,fd_efficientnet_lite0",
        ]
    )
    got = read(tmp_path)
    assert code == 0
    config, run = trained_run
    model = load_model(run / "final", load_config(config).model)
    batch = next(
        iter(
            eval_loader(
                f"{shapes_data}/val-*.tar", batch_size=8, resize_shorter_edge=32, crop_size=32
            )
        )
    )
    with torch.no_grad():
        recon = model.reconstruct(batch["images"])
    assert got["psnr"] == pytest.approx(float(psnr(batch["images"], recon).mean()), rel=1e-5)
    assert got["ssim"] == pytest.approx(float(ssim(batch["images"], recon).mean()), rel=1e-4)
    assert got["perceptual_random"] > 0 and got["fd_efficientnet_lite0"] > 0
    protocol = got["protocol"]
    assert (
        protocol["images"] == 8
        and protocol["samples"]["skipped"] == 0
        and protocol["data"].endswith("val-*.tar")
    )
    assert protocol["crop"] == {"resize_shorter_edge": 32, "center_crop": 32}
    assert len(protocol["feature_networks"]["fd_efficientnet_lite0"]["weights_sha256"]) == 64
    assert {"checkpoint", "config", "seed", "versions"} <= set(protocol)
    assert Image.open(tmp_path / "reconstructions.png").height == 3 * (32 + 4) + 4


def bad_shard(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def picture_bytes(size, mode="RGB", fill=0, kind="JPEG"):
    buffer = io.BytesIO()
    Image.new(mode, size, fill).save(buffer, kind)
    return buffer.getvalue()


def test_mistakes_are_one_line_and_leave_no_result(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    out = ["--output_dir", str(tmp_path / "out")]
    jpeg = picture_bytes((32, 32))
    bad_shard(tmp_path / "corrupt.tar", {"a.jpg": jpeg, "b.jpg": b"not a picture"})
    bad_shard(tmp_path / "unlabelled.tar", {"a.jpg": jpeg, "a.txt": b"x"})
    bad_shard(tmp_path / "big_label.tar", {"a.jpg": jpeg, "a.cls": b"99"})
    small, large = picture_bytes((16, 16), "L", 1, "PNG"), picture_bytes((32, 32), "L", 200, "PNG")
    bad_shard(tmp_path / "small_mask.tar", {"a.jpg": jpeg, "a.seg.png": small})
    bad_shard(tmp_path / "large_mask.tar", {"a.jpg": jpeg, "a.seg.png": large})
    (tmp_path / "empty").mkdir()
    quick = ["--metrics", "psnr"]

    def val(name):
        return ["--val_url", str(tmp_path / name)]

    cases = [
        (evaluate, [*quick, *val("empty")], "empty"),
        (evaluate, [*quick, *val("missing-{0..3}.tar")], "missing-0.tar"),
        (
            evaluate,
            [*quick, *val("corrupt.tar")],
            "1 of 2 samples could not be used: not_an_image 1 (b)",
        ),
        (evaluate, ["--metrics", "fid"], "unknown metric 'fid'"),
        (
            evaluate,
            ["--metrics", "rfid", "--inception_weights", str(tmp_path / "none.pth")],
            "none.pth",
        ),
        (evaluate, [*quick, "--checkpoint", str(tmp_path / "none")], "no such checkpoint"),
        (linear_probe, val("unlabelled.tar"), "missing_label"),
        (linear_probe, val("big_label.tar"), "labels 99..99 do not fit 8 classes"),
        (
            zero_shot,
            [
                *val("big_label.tar"),
                "--classnames",
                str(ROOT / "requirements.txt"),
                "--templates",
                str(tmp_path / "none.txt"),
            ],
            "none.txt",
        ),
        (segment_probe, val("small_mask.tar"), "mask_size"),
        (
            segment_probe,
            [*val("large_mask.tar"), "--labels", "plain", "--steps", "2"],
            "labels 200..200 do not fit",
        ),
    ]
    for script, extra, said in cases:
        code = script.main([*flags, *out, *extra])
        line = one_error(capsys, code)
        assert said in line, line
        assert not (tmp_path / "out" / "metrics.json").exists()


def test_linear_probe_caches_features_and_has_baselines(flags, tmp_path, capsys):
    run = [*flags, "--output_dir", str(tmp_path), "--epochs", "3"]
    assert linear_probe.main(run) == 0
    first = read(tmp_path)
    stores = sorted((tmp_path / "features").iterdir())
    times = [(store / "features.npy").stat().st_mtime_ns for store in stores]
    assert linear_probe.main([*run, "--batch_size", "3"]) == 0
    again = read(tmp_path)
    assert sorted((tmp_path / "features").iterdir()) == stores
    assert [(store / "features.npy").stat().st_mtime_ns for store in stores] == times
    assert again["by_rate"] == first["by_rate"]
    assert (
        first["classes"] == 8
        and first["chance"] == 1 / 8
        and first["train_samples"] == 64
        and first["val_samples"] == 8
    )
    assert first["protocol"]["network"]["feature"] == "semantic"
    assert linear_probe.main([*run, "--baseline", "pixels"]) == 0
    assert read(tmp_path)["protocol"]["network"] == {"feature": "pixels 16x16"}
    assert (
        linear_probe.main([*run, "--baseline"]) == 0
    )  # a random source: the checkpoint's own encoder
    assert read(tmp_path)["protocol"]["network"]["feature"] == "encoder"
    assert "chance" in capsys.readouterr().out


def test_zero_shot_takes_the_names_beside_the_data(flags, tmp_path):
    (tmp_path / "templates.txt").write_text("a drawn {}\n{}\n")
    run = [
        *flags,
        "--output_dir",
        str(tmp_path),
        "--templates",
        str(tmp_path / "templates.txt"),
        "--retrieval",
        "32",
    ]
    assert zero_shot.main(run) == 0
    first = read(tmp_path)
    assert (
        first["classes"] == 8
        and first["top5_chance"] == 5 / 8
        and 0 <= first["top1"] <= first["top5"] <= 1
    )
    assert (
        first["retrieval_group"] <= 8
        and first["retrieval_chance_r1"] == 1 / first["retrieval_group"]
    )
    assert (
        first["protocol"]["prompts"]["classnames"].endswith("classes.txt")
        and first["protocol"]["prompts"]["templates"] == 2
    )
    (cached,) = (tmp_path / "text").iterdir()
    weights = torch.load(cached, weights_only=True)
    torch.save(torch.zeros_like(weights), cached)  # the second run must read this: all classes tie
    assert zero_shot.main(run) == 0
    assert read(tmp_path)["top1"] == pytest.approx(1 / 8) and weights.norm(
        dim=1
    ).tolist() == pytest.approx([1] * 8)


def test_segment_probe_launcher_keeps_a_quoted_pattern(flags, shapes_data, tmp_path):
    """The shell launcher, with plain labels; mIoU is the mean over the classes that occur."""
    pattern = f"{shapes_data}/train-{{000000..000007}}.tar"
    command = [
        "bash",
        str(ROOT / "tools" / "segment_probe.sh"),
        "muse",
        *flags,
        "--train-url",
        pattern,
        "--val-url",
        f"{shapes_data}/val-{{000000..000001}}.tar",
        "--labels",
        "plain",
        "--steps",
        "20",
        "--output_dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    got = read(tmp_path)
    assert got["protocol"]["train"]["data"] == pattern and got["protocol"]["train"]["images"] == 64
    present = [value for value in got["iou_by_class"] if value is not None]
    assert got["miou"] == pytest.approx(sum(present) / len(present)) and got["classes"] == 9
    assert len(present) == 9 - got["classes_absent"]
    assert (tmp_path / "segmentation.png").exists()


def test_segment_probe_baseline_and_ade20k_numbering(flags, tmp_path):
    out = ["--output_dir", str(tmp_path), "--steps", "5"]
    assert segment_probe.main([*flags, *out, "--mode", "baseline"]) == 0
    got = read(tmp_path)
    assert got["classes"] == 150 and got["protocol"]["network"]["feature"] == "encoder"
    assert got["iou_by_class"].count(None) == got["classes_absent"]
    assert segment_probe.main([*flags, *out, "--labels", "foreground"]) == 0
    assert read(tmp_path)["classes"] == 2


def test_evaluate_launcher_usage():
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "evaluate.sh"), "only-one"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith(
        "error: usage: tools/evaluate.sh CONFIG CHECKPOINT"
    )


def test_benchmark_compares_equal_numbers(tmp_path, capsys):
    """Each part holds its own result against the slow way's before it reports times."""
    assert (
        benchmark.main(
            ["--dim", "48", "--images", "2", "--masks", "1", "--output", str(tmp_path / "b.json")]
        )
        == 0
    )
    rows = json.loads((tmp_path / "b.json").read_text())["parts"]
    assert set(rows) == {"evaluator", "frechet", "miou"} and all(
        row["ours"] > 0 < row["slow"] for row in rows.values()
    )
    assert one_error(capsys, benchmark.main(["--parts", "fast"])).startswith(
        "error: unknown part 'fast'"
    )


def test_confusion_is_not_touched_by_ignored_pixels():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 1, 2, 2]), torch.tensor([IGNORE_INDEX, 1, IGNORE_INDEX, 2]))
    assert confusion.counts.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]
