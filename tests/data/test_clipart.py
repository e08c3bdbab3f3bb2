"""Drawings with captions, and the five parts of the kind `everything`, on pictures made here."""

import json

import numpy as np
import pytest
from PIL import Image

from muse.experiments.demo_data import build, clipart, everything, make_demo_data, stamps
from muse.experiments.demo_data.catalogue import Background, Cutout
from muse.experiments.demo_data.library import Library
from muse.experiments.demo_data.stamp_tables import CLASSES

SVG = """<svg><metadata><dc:title>{title}</dc:title><rdf:Bag>{keywords}</rdf:Bag>
<dc:creator><dc:title>{creator}</dc:title></dc:creator></metadata></svg>"""


def draw(roots, name, title="", keywords=(), creator="", size=(64, 60), opaque=False):
    """One drawing of the two packages: a square in the middle, or nothing transparent."""
    png = roots["openclipart-png"] / f"usr/share/openclipart/png/{name}.png"
    svg = roots["openclipart-svg"] / f"usr/share/openclipart/svg/{name}.svg"
    for path in (png, svg):
        path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 4), np.uint8)
    if opaque:
        pixels[..., 3] = 255
    else:
        pixels[size[1] // 4 : -size[1] // 4, size[0] // 4 : -size[0] // 4] = (200, 30, 30, 255)
    Image.fromarray(pixels, "RGBA").save(png)
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    svg.write_text(SVG.format(title=title, keywords=items, creator=creator))


@pytest.fixture
def roots(tmp_path):
    return {name: tmp_path / name for name in clipart.PACKAGES}


def test_captions_come_from_titles_and_keywords(roots):
    draw(
        roots,
        "tools/roller_ann_example_01",
        "Brush Roller 2",
        ["Ann Example", "tool"],
        "Ann Example",
    )
    draw(
        roots,
        "animals/bugs/insetto_01",
        "insetto",
        ["francesco rollandin", "insect"],
        "Francesco Rollandin",
    )
    draw(roots, "food/fruit/apples", "Green &amp; Red Apples", ["clip_art", "food"])
    draw(roots, "transportation/roadsigns/bend", "Bend Ahead", [])
    found = {item.name: item for item in clipart.find_clipart(roots, set())}
    phrases = {name: item.phrase for name, item in found.items()}
    assert phrases == {
        "openclipart/animals/bugs/insetto_01": "an insect",
        "openclipart/food/fruit/apples": "green red apples",
        "openclipart/tools/roller_ann_example_01": "a brush roller, tool",
        "openclipart/transportation/roadsigns/bend": "a bend ahead",
    }
    assert [found[name].label for name in sorted(found)] == [0, 1, 3, 4]
    assert not found["openclipart/transportation/roadsigns/bend"].flip  # letters
    assert found["openclipart/tools/roller_ann_example_01"].flip


def test_what_is_no_cutout_and_what_val_shows_is_left_out(roots):
    draw(roots, "animals/cat", "Cat")
    draw(roots, "animals/opaque", "Cow", opaque=True)
    draw(roots, "animals/small", "Ant", size=(30, 30))
    draw(roots, "signs_and_symbols/arrow", "Arrow")
    draw(roots, "animals/big_cat", "King", ["Lions"])
    draw(roots, "animals/lion_02", "Sovereign")
    excluded = clipart.subject_words([cutout("animals/mammals/lion-2", "a lion")])
    assert [item.name for item in clipart.find_clipart(roots, excluded)] == [
        "openclipart/animals/cat"
    ]


def test_subjects_are_words_that_name_something():
    items = [
        cutout("plants/flowers/flower7", "orange flowers"),
        cutout("food/x", "a bunch of cherries"),
    ]
    assert clipart.subject_words(items) == {"cherry", "x"}


def cutout(name, phrase, label=0, style="photo"):
    return Cutout(name, None, phrase, label, style, True)


def library(names, grounds, style="photo"):
    square = Image.new("RGBA", (40, 40), (220, 40, 40, 255))
    photograph = Image.new("RGB", (96, 96), (30, 60, 200))
    return Library(
        [cutout(name, f"a {name}", index % 6, style) for index, name in enumerate(names)],
        [square] * len(names),
        [Background(name, None, None) for name in grounds],
        [photograph] * len(grounds),
    )


@pytest.fixture
def maker():
    train = library(["cat", "cow", "bat", "oak", "pen"], ["meadow"])
    parts = {
        "train": train,
        "seen": library(["cat", "cow"], ["desert"]),
        "drawn": library(["owl"], ["desert"], "drawing"),
        "seendrawn": library(["pen"], ["desert"], "drawing"),
    }
    val = library(["elk", "fox"], ["desert"])
    return everything.Everything(stamps.Stamps(val, val, 2, 32, 5), parts, 2, 2, 32, 5)


def test_val_is_that_of_the_stamps_and_every_part_keeps_to_its_own(maker):
    for index in range(6):
        assert np.array_equal(maker("val", index).image, maker.stamps("val", index).image)
    for split, part in maker.parts.items():
        samples = [maker(split, index) for index in range(60)]
        assert {s.names["object"] for s in samples} == {item.name for item in part.objects}
        assert {s.names["background"] for s in samples} <= {
            "gradient", *(item.name for item in part.backgrounds)
        }  # fmt: skip
        assert np.array_equal(samples[3].image, maker(split, 3).image)


def test_training_pictures_keep_the_shares_of_the_domains(maker):
    names = [maker("train", index).names["object"] for index in range(400)]
    photos = sum(name in ("cat", "cow") for name in names) / len(names)
    stamps_ = sum(name in ("bat", "oak") for name in names) / len(names)
    assert photos == pytest.approx(everything.PHOTO_SHARE, abs=0.08)
    assert stamps_ == pytest.approx(everything.STAMP_SHARE, abs=0.08)


def test_variants_of_a_drawing_stay_on_one_side():
    held = {
        word
        for word in map(chr, range(97, 123))
        if everything._is_held(cutout("", f"a {word}{word}"))
    }
    assert 0 < len(held) < 13
    for word in ("truck", "owl", "kite"):
        sides = {
            everything._is_held(cutout("", phrase))
            for phrase in (f"a {word}", f"a big {word}, transport", f"old {word}s")
        }
        assert len(sides) == 1


def test_the_folder_has_all_parts_and_its_card_names_them(maker, tmp_path, monkeypatch):
    kind = build.KINDS["everything"]._replace(prepare=lambda *_: maker)
    monkeypatch.setitem(build.KINDS, "everything", kind)
    made = make_demo_data(
        "everything", tmp_path / "data", images=16, val_images=4, size=32, workers=1
    )
    found = {path.name.split("-")[0] for path in (tmp_path / "data").glob("*.tar")}
    assert found == {"train", "val", "seen", "drawn", "seendrawn"}
    records = [
        json.loads(line) for line in (tmp_path / "data/index.jsonl").read_text().splitlines()
    ]
    counts = {split: sum(r["split"] == split for r in records) for split in found}
    assert counts == {"train": 16, "val": 4, "seen": 4, "drawn": 4, "seendrawn": 4}
    card = (tmp_path / "data/datacard.md").read_text()
    assert "| drawn | 4 | 1 |" in card and "openclipart-svg" in card
    assert made["classes"] == list(CLASSES)


def test_one_picture_of_each_wallpaper(tmp_path):
    roots = {name: tmp_path / name for name in everything.PHOTO_PACKAGES}
    plasma = roots["plasma-workspace-wallpapers"] / "usr/share/wallpapers"
    for name, size in (("Hill", (20, 20)), ("Hill", (60, 40)), ("FlyingKonqui", (30, 30))):
        folder = plasma / name / "contents/images"
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{size[0]}x{size[1]}.png")
    mate = roots["mate-backgrounds"] / "usr/share/backgrounds/mate/nature"
    mate.mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(mate / "Dune.jpg")
    found = everything.find_photographs(roots)
    assert [(item.name, item.path.name) for item in found] == [
        ("Dune", "Dune.jpg"),
        ("Hill", "60x40.png"),
    ]
