"""What each measuring command says of a wrong input: one line, exit code 2, no metrics.json."""

import numpy as np
import pytest
import torch
from PIL import Image

from muse import load_config
from muse.data.faults import BadSamples
from muse.errors import DataError
from muse.evaluation import measurement
from muse.models.loading import load_model
from scripts import benchmark, evaluate, linear_probe, segment_probe, zero_shot
from tests.helpers import one_error


def picture(path, value=None, size=(32, 32)):
    """A noise picture, or a mask of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(list(path.parent.iterdir())))
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels if value is None else np.full(size[::-1], value, np.uint8)).save(path)


def scenes(folder, value, size=(32, 32)):
    for i in range(3):
        picture(folder / "images" / f"{i}.png")
        picture(folder / "masks" / f"{i}.png", value, size)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of wrong things, named by what is wrong with them."""
    at = tmp_path_factory.mktemp("wrong")
    for i in range(3):
        picture(at / "flat" / f"{i}.png")
        picture(at / "one_class" / "cat" / f"{i}.png")
        for name in ("cat", "dog"):
            picture(at / "two_classes" / name / f"{i}.png")
    scenes(at / "good_masks", 2)
    scenes(at / "masks_of_7", 7)
    scenes(at / "small_masks", 1, (16, 16))
    scenes(at / "ignored", 255)
    scenes(at / "unpaired", 1)
    for mask in (at / "unpaired" / "masks").iterdir():
        mask.rename(mask.with_name(f"other-{mask.name}"))
    (at / "empty").mkdir()
    (at / "text.txt").write_text("hello\n")
    (at / "templates.txt").write_text("a {}\n")
    (at / "names.txt").write_text("ant\nbee\n")
    torch.save({"a": torch.zeros(3)}, at / "other.pt")
    return at


EVALUATE = [
    (["--metrics", "psnr,foo"], "unknown metric 'foo'"),
    (["--metrics", ","], "no metric was named"),
    (["--bogus", "1"], "unrecognized arguments: --bogus"),
    (["--val_url", "{}/empty"], "empty holds neither *.tar shards nor pictures"),
    (["--val_url", "{}/nothing-*.tar"], "no such shard"),
    (["--val_url", "{}/text.txt"], "text.txt is not a tar shard"),
    (["--val_url", "gopher://a.tar"], "unknown scheme 'gopher'"),
    (["--checkpoint", "{}/empty"], "no checkpoint of MUSE"),
    (["--checkpoint", "{}/other.pt"], "other.pt does not hold the weights of the model: 9"),
    (["--checkpoint", "{}/text.txt"], "text.txt: not a checkpoint"),
    (["model.dim=64"], "a checkpoint of another size: its model.dim is 32"),
    (["model.dimm=64"], "did you mean model.dim?"),
    (["--batch_size", "0"], "--batch_size must be at least 1, not 0"),
    (["--max_images", "0"], "--max_images must be at least 1, not 0"),
    (["--num_workers", "-1"], "--num_workers must be at least 0, not -1"),
    (["--num_pictures", "-1"], "--num_pictures must be at least 0, not -1"),
    (["--device", "toaster"], "--device toaster"),
    (["--output_dir", "{}/text.txt"], "text.txt: cannot be written"),
    (["--feature_network", "nonet"], "unknown feature network 'nonet'"),
    (
        ["--feature_network", "resnet18", "--feature_weights", "{}/none.pt"],
        "weights of the feature network resnet18 not found",
    ),
    (
        ["--feature_network", "resnet18", "--feature_weights", "{}/text.txt"],
        "weights of the feature network resnet18 cannot be",
    ),
    (
        ["--feature_network", "resnet18", "--feature_weights", "{}/other.pt"],
        "other.pt does not hold the weights of the feature",
    ),
    (
        ["--metrics", "rfid", "--inception_weights", "{}/other.pt"],
        "does not hold torch-fidelity's Inception weights",
    ),
    (
        ["--metrics", "lpips", "--lpips_weights", "{}/other.pt"],
        "does not hold the weights of LPIPS's backbone",
    ),
    (
        ["--metrics", "fd_efficientnet_lite0", "--max_images", "1"],
        "a covariance needs at least 2 images, got 1",
    ),
]
PROBE = [
    (["--train_url", "{}/flat"], "missing_label 3 (0.png, 1.png, 2.png)"),
    (
        ["--train_url", "{}/one_class", "--val_url", "{}/one_class"],
        "all training samples are of one class",
    ),
    (
        ["--train_url", "{}/two_classes", "--val_url", "{}/one_class"],
        "'dog' is in one of them only",
    ),
    (["--num_classes", "5"], "training set: labels 0..7 do not fit 5 classes"),
    (["--num_classes", "1"], "--num_classes must be at least 2, not 1"),
    (["--epochs", "0"], "--epochs must be at least 1, not 0"),
    (["--probe_batch_size", "1"], "--probe_batch_size must be at least 2, not 1"),
    (["--learning_rates", "0.1", "nan"], "--learning_rates must be above 0, not nan"),
    (["--feature", "foo"], "invalid choice: 'foo'"),
    (["--cache_dir", "{}/text.txt"], "text.txt"),
]
ZERO_SHOT = [
    (["--classnames", "{}/names.txt"], "labels 0..7 do not fit 2 classes"),
    (["--classnames", "{}/none.txt"], "none.txt cannot be read"),
    (["--templates", "{}/names.txt"], "template without {} for the class name: 'ant'"),
    (["--retrieval", "1"], "--retrieval must be 0 (none) or at least 2 candidates, not 1"),
    (["--val_url", "{}/flat"], "missing_label"),
    (["teacher.text.kind=none"], "teacher.text.kind is none"),
    (["teacher.text.config.dim=24"], "the text tower gives width 24, model.semantic_dim is 16"),
]
SEGMENT = [
    (
        ["--train_url", "{}/masks_of_7", "--val_url", "{}/masks_of_7", "--num_classes", "5"],
        "mask labels 7..7 do not fit 5 classes",
    ),
    (
        ["--train_url", "{}/good_masks", "--val_url", "{}/masks_of_7"],
        "mask labels 7..7 do not fit 3 classes",
    ),
    (["--train_url", "{}/small_masks"], "mask_size 3 (0.png, 1.png, 2.png)"),
    (["--train_url", "{}/unpaired"], "has the name of a picture"),
    (["--train_url", "{}/flat"], "missing_mask"),
    (["--train_url", "{}/ignored"], "the training masks hold no labelled pixel"),
    (["--train_url", "{}/good_masks", "--val_url", "{}/ignored"], "no labelled pixel was given"),
    (["--num_classes", "65536"], "65536 classes: at most 65535"),
    (
        ["--labels", "foreground", "--num_classes", "9"],
        "--num_classes does not go with --labels foreground",
    ),
    (["--steps", "0"], "--steps must be at least 1, not 0"),
    (["--learning_rate", "inf"], "--learning_rates must be above 0, not inf"),
]
CASES = [
    *((evaluate, ["--metrics", "psnr", *extra], said) for extra, said in EVALUATE),
    *((linear_probe, ["--epochs", "1", *extra], said) for extra, said in PROBE),
    *((zero_shot, ["--templates", "{}/templates.txt", *extra], said) for extra, said in ZERO_SHOT),
    *(
        (segment_probe, ["--steps", "2", "--labels", "plain", *extra], said)
        for extra, said in SEGMENT
    ),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Features of the good data are extracted once for all cases."""
    return tmp_path_factory.mktemp("features")


def base_flags(trained_run, output):
    config, run = trained_run
    return [
        "--config",
        str(config),
        "--checkpoint",
        str(run / "final"),
        "--device",
        "cpu",
        "--output_dir",
        str(output),
    ]


@pytest.mark.parametrize(
    "script, extra, said", CASES, ids=lambda value: getattr(value, "__name__", None)
)
def test_one_line_and_no_result(script, extra, said, trained_run, place, shared, tmp_path, capsys):
    flags = base_flags(trained_run, tmp_path / "out")
    if script in (linear_probe, segment_probe):
        flags += ["--cache_dir", str(shared)]
    code = script.main([*flags, *(word.replace("{}", str(place)) for word in extra)])
    line = one_error(capsys, code)
    assert said in line, line
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("script, extra, said", [
    (evaluate, ["--metrics", "psnr"], "fake images must be RGB in [0, 1], got values in [nan, nan]"),  # noqa: E501
    (linear_probe, ["--epochs", "1"], "contain NaN or infinity"),
    (zero_shot, ["--templates", "{}/templates.txt"], "image embeddings contain NaN or infinity"),
    (segment_probe, ["--steps", "2", "--labels", "plain"], "contain NaN or infinity"),
], ids=lambda value: getattr(value, "__name__", None))  # fmt: skip
def test_a_checkpoint_that_gives_nan(script, extra, said, trained_run, place, tmp_path, capsys):
    config, run = trained_run
    model = load_model(run / "final", load_config(config).model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.save_pretrained(tmp_path / "nan")
    flags = [*base_flags(trained_run, tmp_path / "out"), "--checkpoint", str(tmp_path / "nan")]
    code = script.main([*flags, *(word.replace("{}", str(place)) for word in extra)])
    line = one_error(capsys, code)
    assert said in line, line
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_probes_without_a_checkpoint_say_who_goes_without(trained_run, tmp_path, capsys):
    for script in (linear_probe, segment_probe):
        code = script.main(
            ["--config", str(trained_run[0]), "--device", "cpu", "--output_dir", str(tmp_path)]
        )
        assert "--checkpoint is needed: only --baseline pixels" in one_error(capsys, code)


def test_benchmark_refuses(capsys):
    for extra, said in (
        (["--images", "1"], "--images must be at least 2"),
        (["--bogus"], "unrecognized"),
        (["--dim", "x"], "dim"),
    ):
        assert said in one_error(capsys, benchmark.main(extra))


class _Loader:
    """What `runs` asks of a loader after its pass."""

    num_samples = 200

    def __init__(self, seen, bad):
        self.bad = BadSamples(1.0)
        self.bad.add(seen, [("bad_label", f"key{i}") for i in range(bad)])


def test_the_share_of_bad_samples_is_that_of_all_processes(monkeypatch):
    """Two of one process's hundred are too many for it alone, not for both together; five are."""
    for bad, allowed in ((2, True), (5, False)):
        loader = _Loader(100, bad)
        other = _Loader(100, 0).bad.state_dict()
        monkeypatch.setattr(measurement, "all_objects", lambda state, other=other: [state, other])
        if allowed:
            assert measurement.skipped(loader, 0.01) == {
                "read": 200,
                "skipped": 2,
                "kinds": {"bad_label": 2},
                "keys": {"bad_label": ["key0", "key1"]},
            }
        else:
            with pytest.raises(DataError, match="5 of 200 samples could not be used"):
                measurement.skipped(loader, 0.01)


def test_a_count_that_is_not_the_data_sets_is_an_error():
    facts = {"data": "val.tar", "samples": {"skipped": 3}}
    measurement.check_count(_Loader(0, 0), facts, 197)
    with pytest.raises(
        DataError, match=r"val.tar: 198 samples were measured, the data set has 200 \(3 skipped\)"
    ):
        measurement.check_count(_Loader(0, 0), facts, 198)
