"""What the model answers for single pictures: which caption of 32, and which class."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muse.evaluation.suite import Yardstick
from muse.experiments.demo_pictures import named_thing, spread_over_captions
from muse.utils.curves import save_figure

GROUP = 32  # captions that a picture chooses from
COUNT, COLUMNS = 20, 5  # pictures on the sheet
RIGHT, WRONG = "#1a7f37", "#b42318"


class Answer(NamedTuple):
    """One picture's answers, right or wrong."""

    picture: int  # its index in the set
    caption: str  # its own
    chosen: str  # the caption whose embedding is nearest, of `group`
    rank: int  # of its own caption among them, from 1
    group: int
    truth: str  # its class
    answer: str  # the class whose embedding is nearest
    probability: float  # of the answer, softmax over the classes at the model's logit scale
    truth_probability: float

    @property
    def caption_is_right(self) -> bool:
        return self.rank == 1

    @property
    def class_is_right(self) -> bool:
        return self.answer == self.truth


@torch.no_grad()
def answer_pictures(model: Any, yardstick: Yardstick, count: int = COUNT) -> list[Answer]:
    """Answers for `count` pictures, spread over the set without a look at the answers.

    Each picture gets its own caption and others drawn at random, all different, none of which names
    the same thing in other words (the retrieval of the table leaves those in).
    """
    val = yardstick.val
    chosen = spread_over_captions(val.text, count)
    embeds = model.embed_image(val.images[chosen]).float()
    classes = (model.logit_scale.exp() * embeds @ yardstick.class_text.float().T).softmax(-1)
    first: dict[str, int] = {}  # caption -> a picture that has it
    for index, caption in enumerate(val.text):
        first.setdefault(caption, index)
    generator = torch.Generator().manual_seed(0)
    found = []
    for picture, embed, probabilities in zip(chosen.tolist(), embeds, classes):
        own = val.text[picture]
        others = [caption for caption in first if named_thing(caption) != named_thing(own)]
        drawn = torch.randperm(len(others), generator=generator)[: GROUP - 1]
        captions = [own, *(others[i] for i in drawn.tolist())]
        similarity = yardstick.text[[first[one] for one in captions]].float() @ embed
        found.append(_answer(yardstick, picture, captions, similarity, probabilities))
    return found


def _answer(
    yardstick: Yardstick,
    picture: int,
    captions: list[str],
    similarity: Tensor,
    probabilities: Tensor,
) -> Answer:
    """`captions` begin with the picture's own; `similarity` is theirs."""
    names, label = yardstick.classes, int(yardstick.val.labels[picture])
    # A tie counts against the picture's own caption, as an argmax of the others would.
    rank = 1 + int((similarity[1:] >= similarity[0]).sum())
    best = 0 if rank == 1 else 1 + int(similarity[1:].argmax())
    answer = int(probabilities.argmax())
    return Answer(
        picture,
        captions[0],
        captions[best],
        rank,
        len(captions),
        names[label],
        names[answer],
        float(probabilities[answer]),
        float(probabilities[label]),
    )


def answers_line(answers: list[Answer]) -> str:
    """How many of the shown pictures are right."""
    captions = sum(one.caption_is_right for one in answers)
    classes = sum(one.class_is_right for one in answers)
    group = answers[0].group
    return (
        f"{captions} of {len(answers)} chose their own caption of {group} (chance "
        f"{len(answers) / group:.1f}), {classes} their class"
    )


def draw_answers(answers: list[Answer], yardstick: Yardstick, path: Path) -> Path:
    """The pictures with their answers below them: green where right, red where wrong."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow, and most commands draw nothing)

    rows = -(-len(answers) // COLUMNS)
    figure = Figure(figsize=(2.6 * COLUMNS, 3.3 * rows))
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, one in zip(axes, answers):
        axis.imshow(yardstick.val.images[one.picture].permute(1, 2, 0).clamp(0, 1).numpy())
        for height, text, right in (
            (-0.04, caption_text(one), one.caption_is_right),
            (-0.25, class_text(one), one.class_is_right),
        ):
            axis.text(
                0,
                height,
                text,
                color=RIGHT if right else WRONG,
                fontsize=7.5,
                va="top",
                transform=axis.transAxes,
            )
    figure.subplots_adjust(0.01, 0.34 / rows, 0.99, 0.99, 0.08, 0.48)
    return save_figure(figure, path)


def caption_text(one: Answer) -> str:
    """What the picture chose, and where its own caption stood."""
    if one.caption_is_right:
        return f"{_short(one.chosen)}\n(right, of {one.group})"
    return f"{_short(one.chosen)}\nis: {_short(one.caption)}\n(place {one.rank} of {one.group})"


def class_text(one: Answer) -> str:
    """The zero-shot answer and its probability, and the truth's where that is another."""
    text = f"{one.answer}: {one.probability:.2f}"
    return text if one.class_is_right else f"{text}\nis: {one.truth}: {one.truth_probability:.2f}"


def _short(caption: str, most: int = 38) -> str:
    return caption if len(caption) <= most else f"{caption[: most - 1]}…"
