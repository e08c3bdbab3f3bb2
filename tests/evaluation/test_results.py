"""What a measuring command leaves behind: true JSON, no old result, and what it was of."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from muse import load_config
from muse.data.dataloader import eval_loader
from muse.data.eval import spread_sample
from muse.evaluation import evaluator, segmentation
from muse.evaluation.metrics.psnr_ssim import psnr
from muse.models.loading import load_model
from muse.models.muse_vit import MUSE_ViT
from scripts import evaluate, evaluate_images, linear_probe, segment_probe, zero_shot
from tests.helpers import ROOT, one_error

COMMANDS = {
    "evaluate": (evaluate, ["--metrics", "psnr,fd_efficientnet_lite0"]),
    "linear_probe": (linear_probe, ["--epochs", "2"]),
    "zero_shot": (zero_shot, ["--templates", "{}/templates.txt", "--retrieval", "4"]),
    "segment_probe": (segment_probe, ["--labels", "plain", "--steps", "2"]),
}


@pytest.fixture
def flags(trained_run):
    config, run = trained_run
    return ["--config", str(config), "--checkpoint", str(run / "final"), "--device", "cpu"]


@pytest.fixture
def run(flags, tmp_path):
    """run(name, further flags) into tmp_path/out; its exit code."""
    (tmp_path / "templates.txt").write_text("a {}\n")

    def command(name, *extra):
        script, own = COMMANDS[name]
        own = [word.replace("{}", str(tmp_path), 1) if "/" in word else word for word in own]
        return script.main([*flags, *own, "--output_dir", str(tmp_path / "out"), *extra])

    return command


def read(path):
    """metrics.json; NaN and Infinity, which are no JSON, are errors."""

    def refuse(word):
        raise AssertionError(f"{word} in {path}")

    return json.loads((path / "metrics.json").read_text(), parse_constant=refuse)


def nulls(value, path=""):
    """Paths of all nulls."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, one in items for found in nulls(one, f"{path}.{key}")]
    return [path] if value is None else []


def picture(path, value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(map(ord, path.name)))
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels if value is None else np.full((32, 32), value, np.uint8)).save(path)


# ---------------------------------------------------------------------------------------- the file
@pytest.mark.parametrize("name", COMMANDS)
def test_no_old_result_survives_a_run_that_fails(name, run, tmp_path, capsys):
    old = tmp_path / "out" / "metrics.json"
    old.parent.mkdir()
    old.write_text("{}")
    code = run(name, "--max_images", "0")  # a wrong flag starts nothing
    assert "--max_images must be at least 1" in one_error(capsys, code) and old.exists()
    code = run(name, "--val_url", f"{tmp_path}/nothing-*.tar")
    assert "no such shard" in one_error(capsys, code) and not old.exists()


def test_no_old_result_survives_two_sets_that_fail(tmp_path, capsys):
    old = tmp_path / "metrics.json"
    old.write_text("{}")
    sets = ["--real", f"{tmp_path}/none.npz", "--fake", f"{tmp_path}/none.npz"]
    out = ["--output_dir", str(tmp_path), "--device", "cpu"]
    code = evaluate_images.main([*sets, *out, "--metrics", "fud"])
    assert "unknown metric 'fud'" in one_error(capsys, code) and old.exists()
    code = evaluate_images.main([*sets, *out, "--metrics", "psnr"])
    assert "none.npz" in one_error(capsys, code) and not old.exists()


@pytest.mark.parametrize("name", ["evaluate", "zero_shot"])
def test_own_flags_are_checked_before_the_old_result_goes(name, run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("{}")
    extra = {"evaluate": ["--metrics", "psnr,foo"], "zero_shot": ["--retrieval", "1"]}[name]
    one_error(capsys, run(name, *extra))
    assert (tmp_path / "out" / "metrics.json").exists()


def test_an_infinite_value_is_null_and_named(run, monkeypatch, tmp_path):
    """The PSNR of equal pictures."""
    monkeypatch.setattr(MUSE_ViT, "reconstruct", lambda self, images: images)
    assert run("evaluate", "--metrics", "psnr,ssim") == 0
    got = read(tmp_path / "out")
    assert got["psnr"] is None and got["ssim"] == 1
    assert got["protocol"]["not_finite"] == {"psnr": "inf"}


def test_pairs_of_equal_sets_are_null_and_named(shapes_data, tmp_path):
    sets = ["--real", f"{shapes_data}/val-*.tar", "--fake", f"{shapes_data}/val-*.tar"]
    flags = ["--metrics", "psnr", "--output_dir", str(tmp_path), "--device", "cpu"]
    assert evaluate_images.main([*sets, *flags]) == 0
    got = read(tmp_path)
    assert got["psnr"] is None and got["protocol"]["not_finite"] == {"psnr": "inf"}


@pytest.mark.parametrize(
    "name, module, function",
    [
        ("evaluate", evaluator, "comparison_sheet"),
        ("segment_probe", segmentation, "segmentation_sheet"),
    ],
)
def test_values_are_written_before_pictures(name, module, function, run, monkeypatch, tmp_path):
    def fail(*args):
        raise RuntimeError("no room for a picture")

    monkeypatch.setattr(module, function, fail)
    with pytest.raises(RuntimeError, match="no room"):
        run(name)
    assert read(tmp_path / "out")["protocol"]["config"]


# ------------------------------------------------------------------------------------ the protocol
@pytest.mark.parametrize("name", COMMANDS)
def test_the_protocol_says_the_values_that_were_used(name, run, tmp_path):
    assert run(name) == 0
    protocol = read(tmp_path / "out")["protocol"]
    protocol.pop("config")  # the resolved configuration has keys that are null
    assert nulls(protocol) == []
    assert protocol["loading"] == {"batch_size": 4, "num_workers": 0, "processes": 1}
    parts = [protocol[part] for part in ("train", "val") if part in protocol] or [protocol]
    assert {part["selection"] for part in parts} == {"all"}
    if name == "linear_probe":
        probe = protocol["probe"]
        assert probe["batch_size"] == 58 and probe["fitted_samples"] == 58  # of 64, 6 held out
        assert probe["num_classes"] == 8 and probe["epochs"] == 2
        assert probe["chosen_on"].startswith("6 held-out training samples")
    if name == "segment_probe":
        assert protocol["probe"]["num_classes"] == 9
    if name == "evaluate":
        assert protocol["feature_networks"]["fd_efficientnet_lite0"]["rounded_to_bytes"] is True


# ------------------------------------------------------------------------------ which pictures
def test_max_images_is_a_seeded_sample_and_recorded(run, shapes_data, tmp_path):
    seen = []

    def mean_psnr(seed):
        assert (
            run("evaluate", "--metrics", "psnr", "--max_images", "3", f"training.seed={seed}") == 0
        )
        seen.append(read(tmp_path / "out"))
        return seen[-1]["psnr"]

    first = mean_psnr(5)
    assert mean_psnr(5) == first and mean_psnr(6) != first
    how = "one at random from each of as many stretches of the set"
    wanted = {"max_images": 3, "of": 8, "how": how, "seed": 5}
    assert seen[0]["protocol"]["selection"] == wanted and seen[0]["protocol"]["images"] == 3


def test_the_sample_is_the_one_that_is_named(run, monkeypatch, shapes_data, tmp_path):
    """By the pictures: a model that turns all black."""
    monkeypatch.setattr(MUSE_ViT, "reconstruct", lambda self, images: torch.zeros_like(images))
    assert run("evaluate", "--metrics", "psnr", "--max_images", "3", "training.seed=5") == 0
    size = {"resize_shorter_edge": 32, "crop_size": 32}
    (batch,) = eval_loader(f"{shapes_data}/val-*.tar", batch_size=8, **size)
    chosen = batch["images"][spread_sample(8, 3, seed=5)]
    want = float(psnr(chosen, torch.zeros_like(chosen)).mean())
    assert read(tmp_path / "out")["psnr"] == pytest.approx(want, rel=1e-6)


def test_a_sample_of_class_folders_has_all_classes(run, tmp_path):
    for label in range(4):
        for number in range(6):
            picture(tmp_path / "data" / f"class{label}" / f"{label}-{number}.png")
    data = ["--train_url", f"{tmp_path}/data", "--val_url", f"{tmp_path}/data"]
    assert run("linear_probe", *data, "--max_images", "8", "--baseline", "pixels") == 0
    got = read(tmp_path / "out")
    assert got["classes"] == 4 and got["train_samples"] == 8
    assert got["majority"]["micro"] == pytest.approx(1 / 4)  # two of each class
    assert got["protocol"]["train"]["selection"]["of"] == 24


def test_another_sample_is_another_store(run, tmp_path):
    for seed in (1, 2, 1):
        code = run(
            "linear_probe", "--max_images", "5", f"training.seed={seed}", "--num_classes", "8"
        )
        assert code == 0
    assert len(list((tmp_path / "out" / "features").iterdir())) == 4


@pytest.mark.parametrize("named", [True, False])
def test_the_training_runs_limit_does_not_limit_a_measurement(named, run, shapes_data, tmp_path):
    data = ["--val_url", f"{shapes_data}/val-*.tar"] if named else []
    code = run("evaluate", *data, "--metrics", "psnr", "dataset.params.max_eval_images=3")
    assert code == 0 and read(tmp_path / "out")["protocol"]["images"] == 8


def test_folders_of_pictures_and_masks_are_one_flag(run, tmp_path):
    for number in range(4):
        picture(tmp_path / "pair" / "images" / f"{number}.png")
        picture(tmp_path / "pair" / "masks" / f"{number}.png", number % 2)
    apart = tmp_path / "apart"
    apart.mkdir()
    for folder, name in (("images", "photos"), ("masks", "labels")):
        (tmp_path / "pair" / folder).rename(apart / name)
    source = f"{{images: {apart}/photos, masks: {apart}/labels}}"
    assert run("segment_probe", "--train_url", source, "--val-url", source) == 0
    got = read(tmp_path / "out")
    assert got["classes"] == 2 and got["protocol"]["val"]["masks"] == f"{apart}/labels"
    for folder, name in (("images", "photos"), ("masks", "labels")):
        (apart / name).rename(tmp_path / "pair" / folder)
    pair = ["--train_url", f"{tmp_path}/pair", "--val_url", f"{tmp_path}/pair"]
    assert run("segment_probe", *pair) == 0
    assert read(tmp_path / "out")["iou_by_class"] == got["iou_by_class"]


# ------------------------------------------------------------------- crops that are no whole cells
CROP = ["dataset.preprocessing.crop_size=36", "dataset.preprocessing.resize_shorter_edge=36"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_crop_need_not_be_whole_cells(name, run, tmp_path):
    """36 pixels, cells of 8."""
    assert run(name, *CROP) == 0
    protocol = read(tmp_path / "out")["protocol"]
    crop = (protocol if "crop" in protocol else protocol["val"])["crop"]
    assert crop == {"resize_shorter_edge": 36, "center_crop": 36}


def test_segmentation_of_padded_pictures_is_measured_on_the_pictures(run, flags, tmp_path):
    """Against the same probe by hand: features of 40 pixels, masks of 36."""
    assert run("segment_probe", *CROP, "--num_classes", "9") == 0
    got = read(tmp_path / "out")
    assert got["protocol"]["network"]["cell"] == 8
    config = load_config(flags[1])
    model = load_model(flags[3], config.model)
    sets = []
    for part in ("train", "eval"):
        source = config.dataset.params[f"{part}_shards_path_or_url"]
        size = {"resize_shorter_edge": 36, "crop_size": 36}
        loader = eval_loader(source, batch_size=64, fields=("images", "masks"), **size)
        (batch,) = loader
        padded = F.pad(batch["images"], (0, 4, 0, 4), mode="replicate")
        with torch.no_grad():
            sets += [model.features(padded, "block"), batch["masks"]]
    seed = config.training.seed
    probe = segmentation.train_segmentation_probe(*sets[:2], 9, steps=2, seed=seed, cell=8)
    want = segmentation.evaluate_segmentation(probe, *sets[2:], cell=8)
    assert got["pixel_accuracy"] == pytest.approx(want.pixel_accuracy, abs=2e-3)
    assert got["miou"] == pytest.approx(want.mean, abs=2e-3)


# ---------------------------------------------------------------------------- a mixture to train on
PIXELS = ["--baseline", "pixels", "--device", "cpu"]


@pytest.mark.parametrize("script", [linear_probe, segment_probe])
@pytest.mark.parametrize("config", ["muse_1b", "muse_3b"])
def test_a_mixture_is_no_set_to_measure_on(script, config, tmp_path, capsys, monkeypatch):
    """Whether or not DATA_DIR is set."""
    flags = ["--config", f"{ROOT}/configs/{config}/stage2.yaml", *PIXELS]
    for folder in (None, str(tmp_path)):
        monkeypatch.delenv("DATA_DIR", raising=False)
        if folder is not None:
            monkeypatch.setenv("DATA_DIR", folder)
        code = script.main([*flags, "--output_dir", str(tmp_path / "out")])
        line = one_error(capsys, code)
        assert "--train_url is needed" in line and "a mixture of 3 sources" in line
    data = ["--train_url", f"{tmp_path}/none.tar"]
    code = script.main([*flags, *data, "--output_dir", str(tmp_path / "out")])
    assert "none.tar" in one_error(capsys, code)


def test_pixels_with_a_large_configuration_need_the_data_alone(shapes_data, tmp_path, monkeypatch):
    for name in ("DATA_DIR", "CHECKPOINT_DIR"):
        monkeypatch.delenv(name, raising=False)
    flags = ["--config", f"{ROOT}/configs/muse_1b/stage2.yaml", *PIXELS, "--epochs", "2"]
    data = ["--train_url", f"{shapes_data}/train-*.tar", "--val_url", f"{shapes_data}/val-*.tar"]
    assert linear_probe.main([*flags, *data, "--output_dir", str(tmp_path)]) == 0
    assert read(tmp_path)["protocol"]["network"] == {"feature": "pixels 16x16"}
