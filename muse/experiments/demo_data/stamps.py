"""The kind `stamps`: real cut-outs on real photographs, split by object and by background.

`val` shows objects and photographs that `train` never shows; `seen` shows the photo-like objects of
`train` on the photographs of `val`.
"""

from dataclasses import dataclass

import numpy

from muse.experiments.demo_data import catalogue, debian
from muse.experiments.demo_data.compose import composite
from muse.experiments.demo_data.library import Library, load_library
from muse.experiments.demo_data.sample import Sample
from muse.experiments.demo_data.stamp_tables import PACKAGES, STAMPS_PACKAGE

VERSION = 1
EXTRA_SHARE = 0.3  # of the training pictures show objects that are not evaluated (objects="all")
EXTRA_SPLITS = ("seen",)
_SPLITS = {"train": 0, "val": 1, "seen": 2}


@dataclass(frozen=True)
class Stamps:
    """Callable (split, index) -> Sample; every picture has its own generator, whoever makes it."""

    train: Library
    val: Library
    main: int  # the first `main` objects of `train` are the photo-like ones
    size: int
    seed: int

    def __call__(self, split: str, index: int) -> Sample:
        rng = numpy.random.default_rng([self.seed, _SPLITS[split], index])
        return composite(self._library(split), self._object(split, index, rng), self.size, rng)

    def _library(self, split: str) -> Library:
        known, held = self.train, self.val
        if split != "seen":
            return known if split == "train" else held
        return Library(known.objects, known.cutouts, held.backgrounds, held.photographs)

    def _object(self, split: str, index: int, rng: numpy.random.Generator) -> int:
        """Each object equally often: the pictures run through shuffled rounds of all objects."""
        if split == "val":
            return self._round(len(self.val.objects), split, index)
        extra = len(self.train.objects) - self.main if split == "train" else 0
        if extra and rng.random() < EXTRA_SHARE:
            return self.main + int(rng.integers(extra))
        return self._round(self.main, split, index)

    def _round(self, count: int, split: str, index: int) -> int:
        order = numpy.random.default_rng(
            [self.seed, _SPLITS[split], index // count, count]
        ).permutation(count)
        return int(order[index % count])


def prepare_stamps(size: int, seed: int, objects: str = "photo") -> Stamps:
    """Fetch the packages, split, and shrink every layer once; DataError if that is not possible."""
    roots = debian.fetch(PACKAGES)
    items = catalogue.find_cutouts(roots[STAMPS_PACKAGE])
    train, val, extra = catalogue.split_objects(items)
    train_photos, val_photos = catalogue.find_backgrounds(roots)
    chosen = train + (extra if objects == "all" else [])
    return Stamps(
        load_library(chosen, train_photos, size),
        load_library(val, val_photos, size),
        len(train),
        size,
        seed,
    )
