"""The table of protocols: what stands in it, held to what the field's own code says."""

import json

import pytest
import torch
from PIL import Image
from skimage.data import coffee
from torchvision import transforms

from muse.data.crops import PictureCrop
from muse.errors import ConfigError
from muse.evaluation.protocols import PROTOCOLS, find_protocol, protocol_names
from muse.evaluation.used_protocol import UsedProtocol, cut_facts, use_protocol, with_cut

NAMES = "native release unilip256 adm256 mae dinov2 coco-retrieval flickr-retrieval".split()
DEFAULT = PictureCrop("center", 224, 224)
BF16 = ("release", "evaluate")  # its recipe's own precision
ENTRIES = [(name, command) for name, recipes in PROTOCOLS.items() for command in recipes]


def test_the_names():
    assert list(PROTOCOLS) == NAMES
    commands = {command for recipes in PROTOCOLS.values() for command in recipes}
    assert commands == {
        "evaluate", "evaluate_images", "linear_probe", "knn", "zero_shot", "segment_probe",
        "topology",
    }  # fmt: skip
    assert set(PROTOCOLS["native"]) == commands  # every command has the configuration's own crop
    assert protocol_names("knn") == ["native", "dinov2"]


@pytest.mark.parametrize(
    "name, command, says",
    [
        ("mae", "knn", "knn has no protocol 'mae': one of native, dinov2"),
        ("imagenet", "evaluate", "one of native, release, unilip256, adm256"),
    ],
)
def test_a_protocol_that_a_command_does_not_have(name, command, says):
    with pytest.raises(ConfigError, match=says):
        find_protocol(name, command)


@pytest.mark.parametrize("name, command", ENTRIES)
def test_what_goes_into_metrics_json(name, command):
    """Plain values without a null; each names its source."""
    standard = with_cut(find_protocol(name, command), DEFAULT)
    facts = json.loads(json.dumps(UsedProtocol(name, command, standard, standard).facts()))
    assert facts["name"] == name
    assert facts["source"]
    assert facts["changed"] == (["precision"] if (name, command) == BF16 else [])
    assert nulls(facts) == []
    cut = PROTOCOLS[name][command].crop or DEFAULT
    assert facts["resize"]["filter"] == cut.filter and facts["resize"]["antialias"] is True
    key = "square" if cut.method == "squash" else "center_crop"
    assert facts["crop"].get(key) == cut.crop_size


def nulls(value):
    if isinstance(value, (dict, list)):
        items = value.values() if isinstance(value, dict) else value
        return [found for one in items for found in nulls(one)]
    return [value] if value is None else []


def test_the_cut_in_words():
    got = cut_facts(PictureCrop("center", 256, 224))
    assert got["crop"] == {"resize_shorter_edge": 256, "center_crop": 224}
    assert got["resize"] == {
        "method": "shorter edge", "filter": "bicubic", "antialias": True,
        "rounding": "to bytes after each resize", "library": "Pillow",
    }  # fmt: skip
    assert cut_facts(PictureCrop("squash", None, 512))["crop"] == {"square": 512}
    assert cut_facts(PictureCrop("adm", None, 256))["crop"] == {"center_crop": 256}
    assert "as they are" in cut_facts(None)["resize"]["method"]


def test_the_precision_of_a_protocol_and_of_a_flag():
    assert use_protocol("release", "evaluate").facts()["precision"] == "bf16"
    used = use_protocol("release", "evaluate", precision="float32")
    assert used.recipe.precision == used.precision == "float32"
    assert used.facts()["changed"] == ["precision"]
    assert use_protocol("mae", "linear_probe", precision="bf16").facts()["changed"] == ["precision"]
    assert use_protocol("mae", "linear_probe").facts()["changed"] == []
    with pytest.raises(ConfigError, match="unknown precision 'half': one of float32, bf16, fp16"):
        use_protocol("native", "knn", precision="half")


# ------------------------------------------------------------------------------ --resize and --crop
@pytest.mark.parametrize(
    "name, command, flags, want",
    [
        ("release", "linear_probe", (None, None), PictureCrop("center", 256, 224)),
        ("release", "linear_probe", (320, None), PictureCrop("center", 320, 224)),
        ("release", "linear_probe", (None, 192), PictureCrop("center", 256, 192)),
        ("native", "evaluate", (256, 256), PictureCrop("center", 256, 256)),
        ("native", "evaluate", (None, 256), PictureCrop("center", 256, 256)),
        ("native", "evaluate", (256, None), PictureCrop("center", 256, 224)),
        ("adm256", "evaluate", (None, 128), PictureCrop("adm", None, 128)),
        ("adm256", "evaluate", (288, None), PictureCrop("center", 288, 256)),
        ("release", "segment_probe", (None, 448), PictureCrop("squash", None, 448)),
    ],
)
def test_flags_win_over_the_protocol_and_are_said(name, command, flags, want):
    recipe = find_protocol(name, command)
    used = with_cut(recipe, DEFAULT, *flags)
    assert used.crop == want
    said = UsedProtocol(name, command, with_cut(recipe, DEFAULT), used, "bf16").facts()["changed"]
    assert ("crop" in said) == (flags != (None, None))


def test_without_a_default_pictures_stay_as_they_are():
    recipe = find_protocol("native", "evaluate_images")
    assert with_cut(recipe, None).crop is None
    assert with_cut(recipe, None, crop=64).crop == PictureCrop("center", None, 64)
    assert with_cut(recipe, None, 96, 64).crop == PictureCrop("center", 96, 64)


def test_impossible_flags_are_one_line():
    with pytest.raises(ConfigError, match="crop_size 224 does not fit into resize_shorter_edge 96"):
        with_cut(find_protocol("release", "zero_shot"), DEFAULT, 96)


# ------------------------------------------------------------------- held to what each one copies
def test_256_to_224_is_the_evaluation_transform_of_mae_and_dinov2():
    picture = Image.fromarray(coffee())
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose(
        [transforms.Resize(256, bicubic), transforms.CenterCrop(224), transforms.PILToTensor()]
    )(picture)
    for name in ("mae", "dinov2", "release"):
        assert torch.equal(find_protocol(name, "linear_probe").crop(picture), theirs)


def test_dinov2_rates_are_its_grid():
    """1, 2 and 5 in each decade from 1e-5 to 5e-2, then .1; 52 probes in one pass."""
    recipe = find_protocol("dinov2", "linear_probe")
    grid = [digit * 10.0**decade for decade in range(-5, -1) for digit in (1, 2, 5)] + [0.1]
    assert recipe.learning_rates == pytest.approx(tuple(grid))
    probes = len(recipe.learning_rates) * len(recipe.pooling) * len(recipe.last_blocks)
    assert probes == 13 * 2 * 2
    assert recipe.epochs * recipe.epoch_steps == 12_500
    assert recipe.norm_eps is None


def test_adm_takes_ten_parts_of_the_inception_score_in_order():
    recipe = find_protocol("adm256", "evaluate_images")
    assert recipe.images / recipe.is_part == 10 and recipe.is_splits is None
    assert (recipe.manifold_k, recipe.manifold_dtype, recipe.manifold_images) == (
        3, "float16", 10_000,
    )  # fmt: skip


def test_unilips_padding_is_whole_patches():
    recipe = find_protocol("unilip256", "evaluate")
    assert recipe.crop.crop_size + 2 * 12 == 10 * recipe.pad_multiple


def test_the_release_rows_of_the_ledger():
    """Rows 40 to 42 and 55 of docs/fidelity.md."""
    probe, scene = (
        find_protocol("release", "linear_probe"),
        find_protocol("release", "segment_probe"),
    )
    assert (probe.normalise, probe.norm_eps, probe.batch_size) == (True, 1e-6, 4096)
    assert (probe.cosine_by, probe.report, probe.evaluate_every) == ("epoch", "best", 5)
    assert (scene.crop.method, scene.crop.crop_size) == ("squash", 512)
    assert (scene.optimizer, scene.learning_rates, scene.epochs) == ("sgd", (0.01,), 10)
    assert (scene.schedule, scene.batch_size, scene.affine) == ("constant", 8 * 8, True)
    assert (scene.loss, scene.report, scene.mean_over) == ("pixels", "best", "all")
    whole = find_protocol("release", "evaluate")
    assert (whole.is_splits, whole.rounded_pairs, whole.precision) == (1, True, "bf16")


def test_every_choice_is_made_away_from_the_reported_pictures():
    for name, command in ENTRIES:
        recipe = find_protocol(name, command)
        if hasattr(recipe, "chosen_on"):
            assert recipe.chosen_on == "held-out training pictures"
