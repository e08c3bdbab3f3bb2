"""The cut-outs and photographs of the `stamps` data, their categories, and the split of both."""

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy

from muse.errors import DataError
from muse.experiments.demo_data.captions import first_line, noun_phrase
from muse.experiments.demo_data.stamp_tables import (
    CLASSES,
    DRAWINGS,
    EXTRA,
    EXTRA_PHOTO,
    FOLDERS,
    LETTERED,
    NO_BACKGROUNDS,
    PARTS,
    SAME_SUBJECT,
    SKIMAGE,
    SKIPPED,
    SKLEARN,
    STAMPS_PACKAGE,
    VAL_BACKGROUNDS,
)

logger = logging.getLogger(__name__)

VAL_OBJECTS = 57
MAX_PER_SUBJECT = 2  # of one subject in val, so that the 57 objects show many subjects
# The split does not depend on --seed, so that figures of several seeds can be compared. Ten splits
# were looked at before anything was trained; this one's val holds the most different and
# best-known subjects.
SPLIT_SEED = 2029


@dataclass(frozen=True)
class Cutout:
    """One cut-out with alpha."""

    name: str  # path below the stamps folder, without extension
    path: Path
    phrase: str  # such as "a zebra"
    label: int  # index of CLASSES
    style: str  # photo | cartoon | drawing
    flip: bool  # may be mirrored (no letters on it)


@dataclass(frozen=True)
class Background:
    """One photograph."""

    name: str
    path: Path
    part: tuple[float, float, float, float] | None  # crops come from this box (fractions)


def find_cutouts(root: Path) -> list[Cutout]:
    """All usable cut-outs of the unpacked stamps package, by name; DataError if there are none."""
    stamps = root / "usr/share/tuxpaint/stamps"
    found = [item for path in sorted(stamps.rglob("*.png")) if (item := _cutout(stamps, path))]
    if not found:
        raise DataError(f"no cut-outs under {stamps}; delete {root} and run again")
    return found


def _cutout(stamps: Path, path: Path) -> Cutout | None:
    name = path.relative_to(stamps).with_suffix("").as_posix()
    text = path.with_suffix(".txt")
    label, style = _kind(name)
    if label is None or name in SKIPPED or not text.is_file():
        return None
    phrase = noun_phrase(name, first_line(text.read_text(encoding="utf-8", errors="replace")))
    return Cutout(name, path, phrase, label, style, _may_flip(name, path)) if phrase else None


def _may_flip(name: str, path: Path) -> bool:
    """Whether the mirrored picture is as good: no letters on it."""
    notes = path.with_suffix(".dat")
    marked = (
        notes.is_file()
        and "nomirror" in notes.read_text(encoding="utf-8", errors="replace").split()
    )
    return not (
        marked or name.startswith(LETTERED) or path.with_name(f"{path.stem}_mirror.png").exists()
    )


def _kind(name: str) -> tuple[int | None, str]:
    """(category index or None, style) of a cut-out by its path."""
    top = name.split("/")[0]
    if top in FOLDERS:
        style = "cartoon" if "/cartoon/" in name else "drawing" if name in DRAWINGS else "photo"
        return FOLDERS.index(top), style
    prefixes = [prefix for prefix in EXTRA if name.startswith(prefix)]
    if not prefixes:
        return None, "photo"
    photo = "/cartoon/" not in name and name.startswith(EXTRA_PHOTO)
    return EXTRA[max(prefixes, key=len)], "photo" if photo else "cartoon"


def is_evaluated(item: Cutout) -> bool:
    """Photo-like and of the six folders: such objects are split, and evaluated."""
    return item.style == "photo" and item.name.split("/")[0] in FOLDERS


def names_category(item: Cutout) -> bool:
    """Whether its caption may say ", a kind of …": castles and graves are no street objects."""
    return is_evaluated(item) or CLASSES[item.label] != "street object"


def subjects(items: list[Cutout]) -> dict[str, str]:
    """Name -> subject, which objects of one caption or one line of SAME_SUBJECT share."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    known = {stem: f"subject:{line.split()[0]}" for line in SAME_SUBJECT for stem in line.split()}
    for item in items:
        stem = item.name.rsplit("/", 1)[-1]
        for key in (f"caption:{item.phrase}", known.get(stem)):
            if key:
                parent[root(item.name)] = root(key)
    return {item.name: root(item.name) for item in items}


def split_objects(items: list[Cutout]) -> tuple[list[Cutout], list[Cutout], list[Cutout]]:
    """(train, val, extra).

    The evaluated objects are split by subject within each category, about VAL_OBJECTS into val;
    `extra` are all others, without any subject that val holds.
    """
    subject = subjects(items)
    main = [item for item in items if is_evaluated(item)]
    rng = numpy.random.default_rng(SPLIT_SEED)
    held: set[str] = set()
    for label, quota in enumerate(_quotas(main)):
        groups: dict[str, list[str]] = {}
        for item in main:
            if item.label == label:
                groups.setdefault(subject[item.name], []).append(item.name)
        keys = sorted(groups)
        for index in rng.permutation(len(keys)):
            members = groups[keys[index]]
            crosses = any(subject[i.name] == keys[index] and i.label != label for i in main)
            if len(members) <= min(quota, MAX_PER_SUBJECT) and not crosses:
                held.add(keys[index])
                quota -= len(members)
    train = [item for item in main if subject[item.name] not in held]
    val = [item for item in main if subject[item.name] in held]
    extra = [item for item in items if not is_evaluated(item) and subject[item.name] not in held]
    return train, val, extra


def _quotas(main: list[Cutout]) -> list[int]:
    counts = numpy.bincount([item.label for item in main], minlength=len(CLASSES))
    exact = VAL_OBJECTS * counts / max(counts.sum(), 1)
    quotas = numpy.floor(exact).astype(int)
    quotas[numpy.argsort(quotas - exact, kind="stable")[: VAL_OBJECTS - quotas.sum()]] += 1
    return quotas.tolist()


def find_backgrounds(roots: dict[str, Path]) -> tuple[list[Background], list[Background]]:
    """(train, val) photographs: wallpapers, scikit-image's and scikit-learn's if installed."""
    paths = [
        path
        for name, root in roots.items()
        if name != STAMPS_PACKAGE
        for path in (root / "usr/share/backgrounds").rglob("*.jpg")
        if path.stem not in NO_BACKGROUNDS
    ]
    for package, folder, files in (
        ("skimage", "data", SKIMAGE),
        ("sklearn", "datasets/images", SKLEARN),
    ):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            logger.info("%s is not installed: fewer backgrounds", package)
            continue
        base = Path(spec.origin).parent / folder
        paths += [base / file for file in files if (base / file).is_file()]
    found = sorted(
        (Background(path.stem, path, PARTS.get(path.stem)) for path in paths),
        key=lambda item: item.name,
    )
    val = [item for item in found if item.name in VAL_BACKGROUNDS]
    train = [item for item in found if item.name not in VAL_BACKGROUNDS]
    if not train or not val:
        raise DataError(
            "too few background photographs; delete the package cache (~/.cache/muse) and run again"
        )
    return train, val
