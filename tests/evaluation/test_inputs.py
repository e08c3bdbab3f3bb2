"""Every command reads shards, `pipe:` urls and image folders, and a pretrained source's encoder."""

import json
import tarfile

import numpy as np
import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from muse.data.dataloader import eval_loader
from scripts import evaluate, linear_probe, segment_probe, zero_shot
from tests import helpers
from tests.data.helpers import FAULTS, key, sample, write_tar

COMMANDS = {
    "evaluate": (evaluate, ["--metrics", "psnr,ssim"]),
    "linear_probe": (linear_probe, ["--epochs", "2"]),
    "zero_shot": (zero_shot, []),
    "segment_probe": (segment_probe, ["--labels", "plain", "--steps", "3"]),
}


@pytest.fixture
def flags(trained_run):
    config, run = trained_run
    return ["--config", str(config), "--checkpoint", str(run / "final"), "--device", "cpu"]


@pytest.fixture
def prompts(shapes_data, tmp_path):
    (tmp_path / "templates.txt").write_text("a drawn {}\n")
    return [
        "--classnames",
        str(shapes_data / "classes.txt"),
        "--templates",
        str(tmp_path / "templates.txt"),
    ]


def values(folder):
    return {
        key: value
        for key, value in json.loads((folder / "metrics.json").read_text()).items()
        if key != "protocol"
    }


def measure(name, flags, output, *extra):
    script, own = COMMANDS[name]
    assert script.main([*flags, "--output_dir", str(output), *own, *extra]) == 0
    return values(output)


def members(shards):
    """(key, extension, bytes) of every file in the shards."""
    for shard in sorted(shards):
        with tarfile.open(shard) as archive:
            for info in archive:
                yield *info.name.split(".", 1), archive.extractfile(info).read()


@pytest.mark.parametrize("name", COMMANDS)
def test_pipes_give_what_the_files_give(name, flags, prompts, shapes_data, tmp_path):
    extra = prompts if name == "zero_shot" else []
    kinds = {"--val_url": "val"} | ({"--train_url": "train"} if name.endswith("probe") else {})
    pipes, files = [], []
    for flag, kind in kinds.items():
        shards = sorted(shapes_data.glob(f"{kind}-*.tar"))[:2]
        files += [flag, "::".join(map(str, shards))]
        pipes += [flag, "::".join(f"pipe:cat {shard}" for shard in shards)]
    assert measure(name, flags, tmp_path / "a", *pipes, *extra) == measure(
        name, flags, tmp_path / "b", *files, *extra
    )


def test_segmentation_folders_give_what_the_shards_give(flags, shapes_data, tmp_path):
    for kind in ("train", "val"):
        for name, extension, data in members(shapes_data.glob(f"{kind}-*.tar")):
            folder = {"jpg": "images", "seg.png": "masks"}.get(extension)
            if folder:
                path = tmp_path / kind / folder / f"{name}.{extension.split('.')[-1]}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    folders = ["--train_url", str(tmp_path / "train"), "--val_url", str(tmp_path / "val")]
    got = measure("segment_probe", flags, tmp_path / "a", *folders)
    assert got == measure("segment_probe", flags, tmp_path / "b")


def test_class_folders_give_what_the_shards_give(flags, prompts, shapes_data, tmp_path):
    names = (shapes_data / "classes.txt").read_text().split("\n")
    for kind in ("train", "val"):
        labels = {
            name: int(data)
            for name, kind_, data in members(shapes_data.glob(f"{kind}-*.tar"))
            if kind_ == "cls"
        }
        for label in range(
            8
        ):  # a validation set may lack a class: its folder must not shift the others' labels
            (tmp_path / kind / f"{label} {names[label]}").mkdir(parents=True)
        for name, extension, data in members(shapes_data.glob(f"{kind}-*.tar")):
            if extension == "jpg":
                (
                    tmp_path / kind / f"{labels[name]} {names[labels[name]]}" / f"{name}.jpg"
                ).write_bytes(data)
    val = ["--val_url", str(tmp_path / "val")]
    shards = measure("zero_shot", flags, tmp_path / "a", *prompts)
    folders = measure("zero_shot", flags, tmp_path / "b", *val, *prompts)
    assert folders == pytest.approx(shards, rel=1e-6)
    measure("linear_probe", flags, tmp_path / "a")
    measure("linear_probe", flags, tmp_path / "b", *val, "--train_url", str(tmp_path / "train"))
    for run in (
        "ab"
    ):  # the order of the samples is the folders'; the set of (feature, label) is the shards'
        (store,) = [
            s
            for s in (tmp_path / run / "features").iterdir()
            if len(np.load(s / "labels.npy")) == 64
        ]
        rows = np.column_stack([np.load(store / "labels.npy"), np.load(store / "features.npy")])
        order = np.lexsort(rows.round(4).T)
        first = rows[order] if run == "a" else first  # noqa: F821
    np.testing.assert_allclose(rows[order], first, rtol=1e-5, atol=1e-6)


def test_a_pretrained_source_is_probed_without_a_checkpoint(shapes_data, tmp_path):
    """`--baseline`: transformers' vision tower, saved within InternVL, gives what is stored."""
    text = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 64,
    }
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    vision = helpers.ENCODER | {"patch_size": [14, 14], "image_size": [28, 28]}
    model = InternVLForConditionalGeneration(
        InternVLConfig(vision_config=vision, text_config=text)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "internvl")
    settings = helpers.run_settings(shapes_data, tmp_path / "run", "semantic_injection")
    settings["model"]["encoder"] = {"source": str(tmp_path / "internvl"), "config": {}}
    settings["dataset"]["preprocessing"] = {"resize_shorter_edge": 28, "crop_size": 28}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    flags = ["--config", str(tmp_path / "run.yaml"), "--device", "cpu"]
    measure("linear_probe", flags, tmp_path / "probe", "--baseline")
    measure("segment_probe", flags, tmp_path / "segment", "--mode", "baseline")

    batch = next(
        iter(
            eval_loader(
                f"{shapes_data}/val-*.tar", batch_size=8, resize_shorter_edge=28, crop_size=28
            )
        )
    )
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        tokens = model.model.vision_tower(
            pixel_values=(batch["images"] - mean) / std
        ).last_hidden_state[:, 1:]
    for run, wanted in (
        ("probe", tokens.mean(1)),
        ("segment", tokens.transpose(1, 2).unflatten(2, (2, 2))),
    ):
        (found,) = [
            f for f in (tmp_path / run / "features").glob("*/features.npy") if len(np.load(f)) == 8
        ]
        np.testing.assert_allclose(np.load(found), wanted.numpy(), rtol=1e-4, atol=1e-4)
        network = json.loads((tmp_path / run / "metrics.json").read_text())["protocol"]["network"]
        assert network["feature"] == "bare encoder" and network["source"] == str(
            tmp_path / "internvl"
        )


def test_a_store_that_skipped_more_than_allowed_is_not_reused(flags, tmp_path, capsys):
    write_tar(
        tmp_path / "data.tar",
        {key(n): sample(n) for n in range(8)} | {"bad": FAULTS["truncated_image"]},
    )
    data = ["--train_url", str(tmp_path / "data.tar"), "--val_url", str(tmp_path / "data.tar")]
    measure("linear_probe", flags, tmp_path / "out", *data, "dataset.max_bad_fraction=0.5")
    capsys.readouterr()
    code = linear_probe.main(
        [*flags, *data, "--output_dir", str(tmp_path / "out"), "--epochs", "2"]
    )
    assert "1 of 9 samples could not be used: missing_label 1 (bad)" in helpers.one_error(
        capsys, code
    )


def test_skipped_samples_are_counted_and_their_keys_listed(flags, tmp_path):
    samples = {key(n): sample(n) for n in range(20)}
    samples |= {f"bad{n:02d}": FAULTS["truncated_image"] for n in range(12)}
    write_tar(tmp_path / "data.tar", samples)
    measure(
        "evaluate",
        flags,
        tmp_path / "out",
        "--val_url",
        str(tmp_path / "data.tar"),
        "dataset.max_bad_fraction=0.5",
    )
    protocol = json.loads((tmp_path / "out" / "metrics.json").read_text())["protocol"]
    assert protocol["images"] == 20
    assert protocol["samples"] == {
        "read": 32,
        "skipped": 12,
        "kinds": {"truncated_image": 12},
        "keys": {"truncated_image": [f"bad{n:02d}" for n in range(10)]},
    }
