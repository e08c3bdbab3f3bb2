"""The kind `everything`: photo-like cut-outs, cartoons and drawings on photographs.

Five parts:

- `train`;
- `val`, the `val` of the kind `stamps`, picture for picture: photo-like objects that no training
  picture shows;
- `seen`: photo-like training objects in new pictures;
- `drawn` and `seendrawn`: the same two with drawings.

Every photograph behind the objects of the last four is one that training never shows.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy

from muse.experiments.demo_data import clipart, debian, stamps
from muse.experiments.demo_data.catalogue import Background, Cutout
from muse.experiments.demo_data.compose import composite
from muse.experiments.demo_data.library import Library, load_library
from muse.experiments.demo_data.sample import Sample

VERSION = 1
EXTRA_SPLITS = ("seen", "drawn", "seendrawn")  # shards beside those of train and val
PHOTO_PACKAGES = ("plasma-workspace-wallpapers", "mate-backgrounds")
PHOTO_SHARE, STAMP_SHARE = 0.4, 0.2  # of the training pictures; the others show drawings
HELD_DRAWINGS = 0.08
_SEEDS = {"train": 10, "seen": 11, "drawn": 12, "seendrawn": 13}
# Wallpapers on which an object of the six classes is to be seen, or a mascot.
NO_BACKGROUNDS = {"ColorfulCups", "FlyingKonqui", "Elephants", "LadyBird", "OneStandsOut"}
LICENCES = """- Drawings: Debian packages `openclipart-png` and, for titles and keywords,
  `openclipart-svg` (public domain dedication; each drawing's SVG file names its author).
- More photographs and rendered pictures: Debian packages `plasma-workspace-wallpapers` (GPL-2+)
  and `mate-backgrounds` (GPL-2+, CC-BY-SA 4.0), whose copyright files name the authors.
"""


@dataclass(frozen=True)
class Everything:
    """Callable (split, index) -> Sample; every picture has its own generator, whoever makes it."""

    stamps: stamps.Stamps  # for `val`
    parts: dict[str, Library]  # the libraries of the other splits
    photos: int  # in the training library come first the photo-like main objects,
    extras: int  # then the further stamps, then the drawings
    size: int
    seed: int

    def __call__(self, split: str, index: int) -> Sample:
        if split == "val":
            return self.stamps(split, index)
        rng = numpy.random.default_rng([self.seed, _SEEDS[split], index])
        library = self.parts[split]
        chosen = self._training_object(rng) if split == "train" else None
        if chosen is None:
            chosen = self._round(split, len(library.objects), index)
        return composite(library, chosen, self.size, rng)

    def _training_object(self, rng: numpy.random.Generator) -> int:
        domain, count = rng.random(), len(self.parts["train"].objects)
        if domain < PHOTO_SHARE:
            return int(rng.integers(self.photos))
        if domain < PHOTO_SHARE + STAMP_SHARE:
            return self.photos + int(rng.integers(self.extras))
        return self.photos + self.extras + int(rng.integers(count - self.photos - self.extras))

    def _round(self, split: str, count: int, index: int) -> int:
        """Each object equally often."""
        order = numpy.random.default_rng([self.seed, _SEEDS[split], index // count, count])
        return int(order.permutation(count)[index % count])


def prepare_everything(size: int, seed: int, objects: str = "photo") -> Everything:
    """Fetch the packages, split, and shrink every layer once; `objects` means nothing here."""
    base = stamps.prepare_stamps(size, seed, "all")
    drawings = clipart.find_clipart(
        debian.fetch(clipart.PACKAGES), clipart.subject_words(base.val.objects)
    )
    held = [item for item in drawings if _is_held(item)]
    known = [item for item in drawings if not _is_held(item)]
    more = load_library([], find_photographs(debian.fetch(PHOTO_PACKAGES)), size)
    held_library, known_library = load_library(held, [], size), load_library(known, [], size)
    train = Library(
        base.train.objects + known_library.objects,
        base.train.cutouts + known_library.cutouts,
        base.train.backgrounds + more.backgrounds,
        base.train.photographs + more.photographs,
    )
    drawn = [i for i, item in enumerate(train.objects) if item.style != "photo"]
    parts = {
        "train": train,
        "seen": _on_new_ground(train, range(base.main), base.val),
        "drawn": _on_new_ground(held_library, range(len(held_library.objects)), base.val),
        "seendrawn": _on_new_ground(train, drawn, base.val),
    }
    extras = len(base.train.objects) - base.main
    return Everything(replace(base, train=base.val), parts, base.main, extras, size, seed)


def describe_parts(records: list[dict]) -> list[str]:
    """Lines of the data card: what each part shows."""
    lines = ["| part | pictures | objects | photographs |", "|---|---|---|---|"]
    for split in ("train", "val", *EXTRA_SPLITS):
        mine = [record for record in records if record["split"] == split]
        objects, grounds = ({record[key] for record in mine} for key in ("object", "background"))
        lines.append(f"| {split} | {len(mine)} | {len(objects)} | {len(grounds - {'gradient'})} |")
    return [
        *lines,
        "",
        "`val`: photo-like objects that no training picture shows, the same pictures as `val` of "
        "the kind `stamps`. `seen`: photo-like training objects in new pictures. `drawn` and "
        "`seendrawn`: the same with drawings (`drawn` holds out every drawing of a subject). "
        "Photographs of these four are never in train; no drawing whose title, keywords or file "
        "name name a subject of `val` is in train. The split does not depend on the seed.",
        f"{PHOTO_SHARE:.0%} of the training pictures show photo-like objects of the six folders, "
        f"{STAMP_SHARE:.0%} further stamps and cartoons, the others drawings.",
    ]


def _on_new_ground(objects: Library, chosen: Iterable[int], grounds: Library) -> Library:
    return Library(
        [objects.objects[i] for i in chosen],
        [objects.cutouts[i] for i in chosen],
        grounds.backgrounds,
        grounds.photographs,
    )


def _is_held(item: Cutout) -> bool:
    """Whether a drawing belongs to `drawn`: by its subject, so that variants stay together."""
    subject = (clipart.split_words(item.phrase.split(",")[0]) or [""])[-1]
    digest = hashlib.blake2b(subject.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") / 2**32 < HELD_DRAWINGS


def find_photographs(roots: dict[str, Path]) -> list[Background]:
    """One picture of each wallpaper: the largest JPEG or PNG up to 4 megabytes."""
    found = {}
    plasma = roots["plasma-workspace-wallpapers"] / "usr/share/wallpapers"
    for path in sorted(plasma.glob("*/contents/images/*")):
        if path.suffix in (".jpg", ".png") and path.stat().st_size < 4 << 20:
            name = path.parts[-4]
            if name not in found or path.stat().st_size > found[name].stat().st_size:
                found[name] = path
    mate = roots["mate-backgrounds"] / "usr/share/backgrounds/mate"
    found |= {path.stem: path for path in sorted(mate.glob("nature/*.jpg"))}
    return [
        Background(name, path, None)
        for name, path in sorted(found.items())
        if name not in NO_BACKGROUNDS
    ]
