"""Demo data: masks against pixels, splits, captions, reuse of folders, errors."""

import importlib.util
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from muse.errors import ConfigError, DataError
from muse.experiments.demo_data import (
    build,
    captions,
    catalogue,
    compose,
    debian,
    library,
    make_demo_data,
    shapes,
    stamp_tables,
    stamps,
)
from muse.experiments.demo_data.kept_out import read_kept_out

ROOT = Path(__file__).resolve().parents[2]


def read_shards(folder: Path, split: str) -> dict[str, dict[str, bytes]]:
    """{key: {extension: content}} of all shards of a split."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


def picture(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "shapes"
    make_demo_data(
        kind="shapes", output=folder, images=32, val_images=16, size=64, seed=3, workers=1
    )
    return folder


@pytest.fixture(scope="module")
def roots() -> dict[str, Path]:
    if not (
        debian.cache_dir() / "debian" / stamp_tables.STAMPS_PACKAGE
    ).is_dir() and not shutil.which("apt-get"):
        pytest.skip("no Debian package tools on this machine")
    try:
        return debian.fetch(stamp_tables.PACKAGES)
    except DataError as error:
        pytest.skip(f"packages not reachable: {error}")


@pytest.fixture(scope="module")
def cutouts(roots) -> list[catalogue.Cutout]:
    return catalogue.find_cutouts(roots[stamp_tables.STAMPS_PACKAGE])


# --- shapes


def test_shapes_shards_hold_what_the_contract_says(drawn):
    train, val = read_shards(drawn, "train"), read_shards(drawn, "val")
    assert (len(train), len(val)) == (32, 16)
    assert len(list(drawn.glob("train-*.tar"))) >= 8 and len(list(drawn.glob("val-*.tar"))) >= 2
    classes = (drawn / "classes.txt").read_text().splitlines()
    for members in [*train.values(), *val.values()]:
        assert set(members) == {"jpg", "txt", "cls", "seg.png"}
        mask, label = picture(members["seg.png"]), int(members["cls"])
        assert (
            picture(members["jpg"]).shape == (64, 64, 3)
            and mask.shape == (64, 64)
            and mask.dtype == np.uint8
        )
        assert 1 + label in mask and mask.max() <= len(classes)
        assert classes[label] in members["txt"].decode()


def test_shapes_masks_have_the_area_of_their_shape():
    """Area over bounding box of a lone shape: pi/4 for a disc, pi/4 (1 - .55^2) for a ring."""
    make = shapes.Shapes(size=128, seed=0)
    seen = set()
    for index in range(120):
        sample = make("train", index)
        name = shapes.CLASSES[sample.label]
        if " " in sample.names["object"] or name not in ("circle", "ring"):
            continue
        y, x = np.where(sample.mask)
        share = (sample.mask > 0).sum() / (np.ptp(x) + 1) / (np.ptp(y) + 1)
        assert share == pytest.approx(
            np.pi / 4 * (1 if name == "circle" else 1 - 0.55**2), abs=0.03
        )
        seen.add(name)
    assert seen == {"circle", "ring"}


def test_shapes_val_pairs_and_backgrounds_are_unseen(drawn):
    records = [json.loads(line) for line in (drawn / "index.jsonl").read_text().splitlines()]
    pairs = {
        split: {
            pair
            for record in records
            if record["split"] == split
            for pair in record["object"].split()
        }
        for split in ("train", "val", "seen")
    }
    grounds = {
        split: {record["background"] for record in records if record["split"] == split}
        for split in pairs
    }
    assert pairs["val"] and not pairs["train"] & pairs["val"]
    assert not grounds["train"] & grounds["val"]
    assert pairs["seen"] <= {
        f"{colour}-{shape}"
        for colour in shapes.COLOURS
        for shape in shapes.CLASSES
        if not shapes.held_out(colour, shape)
    }
    assert grounds["seen"] <= grounds["val"] and not grounds["seen"] & grounds["train"]
    colours = {split: {pair.split("-")[0] for pair in found} for split, found in pairs.items()}
    assert colours["val"] <= colours["train"]  # the parts are known, their combination is not


# --- the folder


def test_bytes_do_not_depend_on_the_number_of_workers(drawn, tmp_path):
    make_demo_data(
        kind="shapes", output=tmp_path / "two", images=32, val_images=16, size=64, seed=3, workers=2
    )
    for path in sorted(file for file in drawn.iterdir() if file.suffix != ".idx"):  # hold times
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes(), path.name


def test_other_seed_gives_other_pictures(drawn):
    first = shapes.Shapes(64, 3)("train", 0).image
    assert np.array_equal(first, shapes.Shapes(64, 3)("train", 0).image)
    assert not np.array_equal(first, shapes.Shapes(64, 4)("train", 0).image)


def test_finished_folder_is_reused_and_other_arguments_are_refused(drawn, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(drawn, folder)
    (folder / "train-000000.tar").write_bytes(b"marked")
    arguments = dict(kind="shapes", output=folder, val_images=16, size=64, seed=3, workers=1)
    manifest = make_demo_data(images=32, **arguments)
    assert manifest["images"] == 32 and (folder / "train-000000.tar").read_bytes() == b"marked"
    with pytest.raises(ConfigError, match=r"images 32 -> 24.*--overwrite"):
        make_demo_data(images=24, **arguments)
    assert (folder / "train-000000.tar").read_bytes() == b"marked"
    make_demo_data(images=24, overwrite=True, **arguments)
    assert len(read_shards(folder, "train")) == 24
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_failed_run_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "write_card", full_disk)
    with pytest.raises(DataError, match="No space left"):
        make_demo_data(kind="shapes", output=tmp_path / "data", images=8, size=32, workers=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        dict(kind="photos"),
        dict(objects="some"),
        dict(images=3),
        dict(size=8),
        dict(seed=-1),
        dict(val_images=1),
        dict(output=""),
    ],
)
def test_wrong_arguments(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        make_demo_data(**{"kind": "shapes", "output": tmp_path / "data", **wrong})
    assert not list(tmp_path.iterdir())


def test_foreign_folder_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="no folder of demo data"):
        make_demo_data(kind="shapes", output=tmp_path, overwrite=True)
    with pytest.raises(DataError, match="cannot be written"):
        make_demo_data(kind="shapes", output=tmp_path / "thesis.tex" / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def load_script():
    spec = importlib.util.spec_from_file_location(
        "make_demo_data_script", ROOT / "tools/make_demo_data.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_prints_the_card_or_one_line(tmp_path, capsys):
    script = load_script()
    flags = [
        "--kind",
        "shapes",
        "--output",
        str(tmp_path / "data"),
        "--images",
        "8",
        "--size",
        "32",
        "--workers",
        "1",
    ]
    assert script.main(flags) == 0
    assert capsys.readouterr().out.strip() == (tmp_path / "data/datacard.md").read_text().strip()
    assert script.main([*flags, "--seed", "1"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ") and "seed 0 -> 1" in error[-1]


# --- packages


def test_missing_debian_tools_name_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("MUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="apt-get.*--kind shapes"):
        make_demo_data(kind="stamps", output=tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_failed_download_leaves_no_package(tmp_path, monkeypatch):
    """Tools that fail, as without a network: one error, and the cache holds no half package."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("apt-get", "dpkg"):
        (tools / name).write_text("#!/bin/sh\nexit 100\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("MUSE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="apt-get update"):
        debian.fetch(("some-package",))
    assert not list((tmp_path / "cache/debian").iterdir())
    (tmp_path / "cache/debs").mkdir()
    (tmp_path / "cache/debs/some-package_1_all.deb").write_text("broken")
    with pytest.raises(DataError, match="not a readable Debian package"):
        debian.fetch(("some-package",))
    assert not list((tmp_path / "cache/debian").iterdir())


# --- captions


@pytest.mark.parametrize(
    "path, line, phrase",
    [
        ("animals/mammals/bovines/zebu", "A zebu.", "a zebu"),
        ("food/vegetables/broccoli", "Eat your broccoli!", "broccoli"),
        (
            "household/toilet",
            "Remember to flush the toilet and wash your hands with soap!",
            "a toilet",
        ),
        ("food/fruit/apple_fuji", "A “Fuji” apple.", "a Fuji apple"),
        ("animals/birds/peacock", "A peacock (a male peafowl).", "a peacock"),
        ("household/tools/wrench_plumbers", "A plumber’s wrench.", "a plumber's wrench"),
        ("animals/mammals/hippopotamus", "An hippopotamus.", "a hippopotamus"),
    ],
)
def test_captions_become_nouns(path, line, phrase):
    assert captions.noun_phrase(path, line) == phrase


def test_sentences():
    assert captions.sentence("a zebu") == "A zebu."
    assert captions.sentence("a zebu", category="animal") == "A zebu, a kind of animal."
    assert captions.sentence("an igloo", "cartoon") == "A cartoon of an igloo."
    assert captions.first_line("\n A frog.\nde=Ein Frosch.\n") == "A frog."


# --- composites, of drawn cut-outs


def fake_library(size: int) -> library.Library:
    """A pure green disc on dark photographs."""
    disc = Image.new("RGBA", (90, 60), (0, 230, 0, 0))
    ImageDraw.Draw(disc).ellipse((2, 2, 87, 57), fill=(0, 230, 0, 255))
    item = catalogue.Cutout("food/pea", Path("pea.png"), "a pea", 1, "photo", True)
    dark = [
        Image.fromarray(np.random.default_rng(k).integers(0, 50, (300, 400, 3), np.uint8))
        for k in range(2)
    ]
    names = [catalogue.Background(f"dark{k}", Path("dark.jpg"), None) for k in range(2)]
    return library.Library([item], [disc], names, dark)


def test_masks_are_where_the_object_is(monkeypatch):
    """The green pixels of the picture, found by colour, against the mask."""
    monkeypatch.setattr(compose, "PLAIN", 0.0)
    library = fake_library(128)
    for seed in range(12):
        sample = compose.composite(library, 0, 128, np.random.default_rng(seed))
        image = sample.image.astype(int)
        green = image[..., 1] - np.maximum(image[..., 0], image[..., 2]) > 85
        assert set(np.unique(sample.mask)) == {0, 2}
        object_here = sample.mask == 2
        assert (green & object_here).sum() / (green | object_here).sum() > 0.97
        y, x = np.where(object_here)
        longest = max(np.ptp(x), np.ptp(y)) + 1
        # The disc is 86 of the 90 pixels and may be rotated.
        assert 0.65 * 128 * 0.9 < longest < 0.95 * 128
        assert sample.caption in ("A pea.", "A pea, a kind of food.")


def test_halo_is_trimmed_and_thin_parts_stay():
    """A red disc with a white rim (one pixel) and a thin pole: the rim goes, the pole stays."""
    cut = Image.new("RGBA", (100, 100), (255, 255, 255, 0))
    draw = ImageDraw.Draw(cut)
    draw.ellipse((20, 10, 80, 70), fill=(255, 255, 255, 255))
    draw.ellipse((21, 11, 79, 69), fill=(200, 0, 0, 255))
    draw.rectangle((49, 66, 50, 95), fill=(90, 60, 30, 255))
    values = np.asarray(library._trim(cut), dtype=float) / 255
    seen = values[..., :3] * values[..., 3:]
    assert seen.min(-1)[:64].max() < 0.3
    assert (values[75:95, :, 3].max(1) > 0.7).all()
    alpha = np.asarray(cut)[..., 3]
    assert 0.85 < values[..., 3].sum() / (alpha / 255).sum() < 0.97


def test_dust_is_dropped():
    alpha = np.zeros((40, 40), np.uint8)
    alpha[5:25, 5:25] = 255
    alpha[35, 35] = 255
    assert library._largest_parts(alpha).sum() == 400 * 255


# --- stamps, of the real packages


def test_stamps_split_by_subject(cutouts):
    train, val, extra = catalogue.split_objects(cutouts)
    subject = catalogue.subjects(cutouts)
    assert len(val) == catalogue.VAL_OBJECTS and len(train) > 200 and len(extra) > 100
    assert {item.label for item in val} == set(range(6)) and {item.label for item in train} == set(
        range(6)
    )
    assert all(catalogue.is_evaluated(item) for item in train + val)
    held = {subject[item.name] for item in val}
    assert not held & {subject[item.name] for item in train + extra}
    assert not {item.phrase for item in val} & {item.phrase for item in train + extra}
    side = {item.name.rsplit("/", 1)[-1]: item in val for item in train + val}
    for group in ("frog frog-1", "lion lion-2", "wrench wrench_adjustable", "gnu-baby gnu-stand"):
        first, second = group.split()
        assert side[first] == side[second], group


def test_the_packaged_encoder_was_kept_from_the_same_objects(cutouts, roots):
    """The split's val is the list that lies beside muse_tiny, and its train shows none of it."""
    kept = read_kept_out()
    train, val, extra = catalogue.split_objects(cutouts)
    assert {item.name for item in val} == {
        name for name in kept["object"] if not name.startswith("openclipart/")
    }
    assert not {item.name for item in train + extra} & kept["object"]
    train_photos, val_photos = catalogue.find_backgrounds(roots)
    assert {item.name for item in val_photos} == kept["photograph"]
    assert not {item.name for item in train_photos} & kept["photograph"]


def test_seen_shows_objects_of_train_on_photographs_of_val(tmp_path):
    library_of = lambda names, grounds: library.Library(  # noqa: E731
        [catalogue.Cutout(name, Path(name), f"a {name}", 0, "photo", True) for name in names],
        [Image.new("RGBA", (20, 20), (200, 0, 0, 255))] * len(names),
        [catalogue.Background(name, Path(name), None) for name in grounds],
        [Image.new("RGB", (96, 96), (0, 0, 200))] * len(grounds),
    )
    make = stamps.Stamps(library_of(["a", "b", "x"], ["t"]), library_of(["v"], ["p"]), 2, 32, 0)
    shown = [make("seen", index).names for index in range(20)]
    assert {one["object"] for one in shown} == {"a", "b"}  # photo-like ones alone
    assert {one["background"] for one in shown} == {"p", "gradient"}


def test_every_same_subject_name_exists(cutouts):
    stems = {item.name.rsplit("/", 1)[-1] for item in cutouts}
    assert not [
        name for line in stamp_tables.SAME_SUBJECT for name in line.split() if name not in stems
    ]
    known = {item.name for item in cutouts}
    assert not set(captions.NOUNS) - known - stamp_tables.SKIPPED


def test_all_stamp_captions_are_noun_phrases(cutouts):
    for item in cutouts:
        text = captions.sentence(item.phrase, item.style)
        assert re.fullmatch(r"[A-Z][^.!?()“”\"]{2,70}\.", text), (item.name, text)
        assert not re.match(r"(Eat|Remember|This|It|Because|Put|Fire)\b", text), (item.name, text)


def test_stamps_end_to_end(roots, tmp_path):
    folder = tmp_path / "stamps"
    arguments = dict(kind="stamps", images=24, val_images=12, size=64, seed=1)
    manifest = make_demo_data(output=folder, **arguments, workers=2)
    records = {
        split: [
            json.loads(line)
            for line in (folder / "index.jsonl").read_text().splitlines()
            if f'"{split}"' in line
        ]
        for split in ("train", "val")
    }
    for name in ("object", "background"):
        sides = [{record[name] for record in records[split]} - {"gradient"} for split in records]
        assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert (
        len({record["object"] for record in records["val"]}) == 12
    )  # every object once before any twice
    for key, members in read_shards(folder, "val").items():
        mask, label = picture(members["seg.png"]), int(members["cls"])
        assert set(np.unique(mask)) == {0, 1 + label}, key
        assert 0.01 < (mask > 0).mean() < 0.9
    assert (
        manifest["classes"]
        == (folder / "classes.txt").read_text().splitlines()
        == list(stamp_tables.CLASSES)
    )


def test_val_is_the_same_for_photo_and_all(roots, monkeypatch):
    """With plain pictures in place of the real ones; the share of extras is as told."""

    def stand_ins(objects, backgrounds, size):
        return library.Library(
            objects,
            [Image.new("RGBA", (9, 9), (200, 0, 0, 255))] * len(objects),
            backgrounds,
            [Image.new("RGB", (64, 64), (0, 0, 9))] * len(backgrounds),
        )

    monkeypatch.setattr(stamps, "load_library", stand_ins)
    photo, both = (stamps.prepare_stamps(32, 0, objects) for objects in ("photo", "all"))
    assert len(both.train.objects) > len(photo.train.objects) == photo.main == both.main
    for index in range(60):
        one, two = photo("val", index), both("val", index)
        assert (
            one.names == two.names
            and one.caption == two.caption
            and np.array_equal(one.image, two.image)
        )
    names = [both("train", index).names["object"] for index in range(400)]
    main = {item.name for item in photo.train.objects}
    assert np.mean([name not in main for name in names]) == pytest.approx(
        stamps.EXTRA_SHARE, abs=0.08
    )
