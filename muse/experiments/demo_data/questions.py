"""The kind `questions`: a picture, and what one may ask about its object.

Each picture has three questions with their answers: which of four classes (by letter, in the words
of MMBench's prompt), what kind of thing, and what it is. In val objects and backgrounds are such
as training never showed.
"""

import json
import string
from dataclasses import dataclass, field

import numpy

from muse.experiments.demo_data.compose import blend, to_uint8_rgb
from muse.experiments.demo_data.picture_layers import (
    LAYERS,
    LayerSet,
    balanced_object,
    draw_picture,
)
from muse.experiments.demo_data.sample import Sample, jpeg_bytes, png_bytes

VERSION = 1
OPTIONS = 4
ASKED = "What is in the picture?"
KIND_ASKED, NAME_ASKED = "What kind of thing is it?", "What is it called?"
_SPLITS = {"train": 30, "val": 31}


@dataclass(frozen=True)
class QuestionSample(Sample):
    """`caption` names the object; `pairs` are the questions with their answers."""

    pairs: tuple[tuple[str, str], ...] = ()
    options: dict[str, str] = field(default_factory=dict)  # letter -> words
    answer: str = ""  # the right letter

    def members(self) -> dict[str, bytes]:
        turns = [
            {"from": speaker, "value": value}
            for pair in self.pairs
            for speaker, value in zip(("human", "gpt"), pair)
        ]
        return {
            "jpg": jpeg_bytes(self.image),
            "json": json.dumps({"conversations": turns}).encode(),
            "cls": str(self.label).encode(),
            "seg.png": png_bytes(self.mask),
        }


@dataclass(frozen=True)
class Questions:
    """Callable (split, index) -> QuestionSample; each class is shown equally often."""

    layers: LayerSet
    seed: int

    def __call__(self, split: str, index: int) -> QuestionSample:
        # torch, which the other kinds of demo data do without
        from muse.multimodal.benchmarks import Question  # noqa: PLC0415

        rng = numpy.random.default_rng([self.seed, _SPLITS[split], index])
        own, classes = getattr(self.layers, split), self.layers.classes
        item = balanced_object(own, rng)
        picture = draw_picture(own, item, rng)
        label, phrase = own.labels[item], own.phrases[item]
        wrong = rng.permutation([other for other in range(len(classes)) if other != label])
        chosen = rng.permutation([label, *wrong[: OPTIONS - 1]])
        options = {
            letter: _with_article(classes[other])
            for letter, other in zip(string.ascii_uppercase, chosen)
        }
        answer = string.ascii_uppercase[list(chosen).index(label)]
        asked = Question(index, ASKED, options, answer, picture="")
        return QuestionSample(
            to_uint8_rgb(blend(*picture.layer, picture.background)),
            numpy.where(picture.layer.alpha >= 0.5, 1 + label, 0).astype(numpy.uint8),
            phrase,
            label,
            {"object": phrase, "background": own.grounds[picture.ground]},
            (
                (asked.prompt(), answer),
                (KIND_ASKED, _with_article(classes[label])),
                (NAME_ASKED, phrase),
            ),
            options,
            answer,
        )


def _with_article(noun: str) -> str:
    if noun == "food":
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def prepare_questions(size: int, seed: int, objects: str = "photo") -> Questions:
    """Questions about cut-outs on photographs (photo) or about drawn shapes (drawn)."""
    return Questions(LAYERS[objects](size, seed), seed)
