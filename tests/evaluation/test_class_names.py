"""Zero-shot scores the classes that the data has, under their own names, or says what lacks."""

import json

import numpy as np
import pytest
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image

from muse.evaluation.imagenet_classes import imagenet_wordnet_ids
from scripts import zero_shot
from tests.helpers import one_error

SUBSET = (0, 217, 482, 491)  # of ImageNet's labels, as Imagenette has them


@pytest.fixture
def run(trained_run, tmp_path):
    config, output = trained_run
    (tmp_path / "templates.txt").write_text("a {}\n")
    flags = ["--config", str(config), "--checkpoint", str(output / "final"), "--device", "cpu"]
    flags += ["--templates", str(tmp_path / "templates.txt"), "--output_dir", str(tmp_path / "out")]
    return lambda *extra: zero_shot.main([*flags, *extra])


@pytest.fixture
def subset(tmp_path):
    """Class folders of WordNet ids."""
    rng = np.random.default_rng(0)
    for label in SUBSET:
        folder = tmp_path / "data" / imagenet_wordnet_ids()[label]
        folder.mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{label}-{number}.png")
    return tmp_path / "data"


def read(tmp_path):
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    return found, found.pop("protocol")["prompts"]


@pytest.mark.parametrize("classnames", [[], ["--classnames", "imagenet"]])
def test_a_subset_of_imagenet_is_scored_under_its_own_names(classnames, run, subset, tmp_path):
    assert run("--val_url", str(subset), *classnames) == 0
    found, prompts = read(tmp_path)
    assert found["classes"] == found["classes_present"] == 4 and prompts["classes"] == 4
    assert found["top1_chance"] == 1 / 4
    assert prompts["classnames"] == ("open_clip's ImageNet names by WordNet ids of 4 class folders")
    (tmp_path / "names.txt").write_text("\n".join(IMAGENET_CLASSNAMES[label] for label in SUBSET))
    assert run("--val_url", str(subset), "--classes", str(tmp_path / "names.txt")) == 0
    by_hand, same_prompts = read(tmp_path)
    assert by_hand == found and same_prompts["sha256"] == prompts["sha256"]


def test_names_that_differ_in_number_from_the_folders_are_refused(run, subset, tmp_path, capsys):
    (tmp_path / "all.txt").write_text("\n".join(IMAGENET_CLASSNAMES))
    code = run("--val_url", str(subset), "--classnames", str(tmp_path / "all.txt"))
    assert "1000 class names" in (line := one_error(capsys, code)) and "4 class folders" in line
    (subset / "classes.txt").write_text("tench\nspaniel\ncassette player\n")
    code = run("--val_url", str(subset))
    assert "3 class names" in (line := one_error(capsys, code)) and "classes.txt" in line
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_folders_of_other_ids_are_refused(run, subset, tmp_path, capsys):
    (subset / imagenet_wordnet_ids()[0]).rename(subset / "n00000001")
    line = one_error(capsys, run("--val_url", str(subset)))
    assert "none of ImageNet's 1000 WordNet ids: 'n00000001'" in line


def test_labels_without_names_are_not_taken_for_imagenets(run, shapes_data, tmp_path, capsys):
    """Eight classes in a stream, beside which no list can lie."""
    stream = ["--val_url", "::".join(f"pipe:cat {one}" for one in shapes_data.glob("val-*.tar"))]
    line = one_error(capsys, run(*stream))
    assert "no class names are given" in line and "each of the 1000 of ImageNet" in line
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert run(*stream, "--classnames", "imagenet") == 0  # one who knows may say so
    found, prompts = read(tmp_path)
    assert found["classes"] == 1000 and prompts["classnames"] == "open_clip's ImageNet names"


def test_a_blank_line_among_the_names_is_named(run, shapes_data, tmp_path, capsys):
    names = (shapes_data / "classes.txt").read_text().split("\n")
    (tmp_path / "names.txt").write_text("\n".join([*names[:3], "", *names[3:]]))
    line = one_error(capsys, run("--classnames", str(tmp_path / "names.txt")))
    assert "names.txt: line 4 is blank" in line
