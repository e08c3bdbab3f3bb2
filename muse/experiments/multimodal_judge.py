"""What the multimodal demo's pictures and answers are judged by.

Linear heads on the frozen EfficientNet-Lite0, learnt on real pictures, say what is shown;
differences of pixels inside and outside an edit's mask say what was kept.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from muse.evaluation.metrics.accuracy_iou import accuracy
from muse.experiments.generation_judge import BATCH, LinearClassifier
from muse.experiments.multimodal_data import EditPairs
from muse.multimodal.benchmarks import Question, ask_benchmark, mmbench_scores
from muse.multimodal.umm import MUSE_UMM

LEAST_ERROR = 1e-6  # mean square; equal pixels have 60 dB, not infinitely many
LETTER_TOKENS = 8  # of an answer: a letter and what ends it
PRESENT, GONE = 1, 0


def masked_psnr(images: Tensor, targets: Tensor, where: Tensor) -> Tensor:
    """dB of each picture over the pixels `where`; NaN for a picture without any.

    Args:
        images: (n, 3, H, W) uint8.
        targets: (n, 3, H, W) uint8.
        where: (n, H, W) bool.
    """
    error = (images.double() - targets.double()).div(255).square().mean(1)  # (n, H, W)
    mean = (error * where).sum((1, 2)) / where.sum((1, 2))
    return -10 * mean.clamp_min(LEAST_ERROR).log10()


def shuffled_accuracy(guesses: Tensor, labels: Tensor, num_classes: int) -> float:
    """Accuracy (macro) when each picture is held to another's prompt.

    The mean over all n - 1 ways to move the prompts along by so many places.
    """
    shifts = range(1, len(labels))
    found = [accuracy(guesses, labels.roll(shift), num_classes).macro for shift in shifts]
    return sum(found) / len(found)


class EditJudge:
    """Says whether an edited picture shows what was asked for.

    replace: a classifier of objects names the new one's class. background: one of backgrounds names
    the new one. remove: one of two classes, pictures with and without an object, says without.

    Args:
        network: images (B, 3, H, W) in [0, 1] -> features (B, D).
        objects: the classifier of objects.
        num_classes: of objects.
        train: real pairs, which the other two learn from.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        objects: LinearClassifier,
        num_classes: int,
        train: EditPairs,
    ):
        self.network, self.objects, self.num_classes = network, objects, num_classes
        self.grounds = sorted(set(train.grounds))
        features = self.features(train.sources)
        places = torch.tensor([self.grounds.index(ground) for ground in train.grounds])
        self.places = LinearClassifier(features, places, len(self.grounds))
        rows = torch.tensor([i for i, change in enumerate(train.changes) if change == "remove"])
        both = torch.cat([features[rows], self.features(train.targets[rows])])
        present = torch.tensor([PRESENT] * len(rows) + [GONE] * len(rows))
        self.presence = LinearClassifier(both, present, 2)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) uint8 -> (n, D)."""
        return torch.cat([self.network(part / 255) for part in images.split(BATCH)])

    def shows_what_was_asked(self, images: Tensor, pairs: EditPairs) -> Tensor:
        """(n,) bool for pictures (n, 3, H, W) uint8."""
        features = self.features(images)
        objects = self.objects.predict(features).tolist()
        places = [self.grounds[index] for index in self.places.predict(features)]
        present = self.presence.predict(features).tolist()
        right = {
            "replace": [guess == label for guess, label in zip(objects, pairs.labels.tolist())],
            "background": [guess == wanted for guess, wanted in zip(places, pairs.becomes)],
            "remove": [guess == GONE for guess in present],
        }
        return torch.tensor([right[change][i] for i, change in enumerate(pairs.changes)])

    def measure(self, images: Tensor, pairs: EditPairs) -> dict[str, float]:
        """PSNR against the exact result, by what stays and what changes, and shares of success."""
        asked = self.shows_what_was_asked(images, pairs).double()
        found = {
            "stays": float(masked_psnr(images, pairs.targets, pairs.stays).nanmean()),
            "changes": float(masked_psnr(images, pairs.targets, ~pairs.stays).nanmean()),
            "asked": float(asked.mean()),
        }
        return found | by_change(asked, pairs.changes)

    def chance(self, pairs: EditPairs) -> dict[str, float]:
        """The shares of a judge that guesses."""
        odds = {
            "replace": 1 / self.num_classes,
            "background": 1 / len(self.grounds),
            "remove": 1 / 2,
        }
        values = torch.tensor([odds[change] for change in pairs.changes], dtype=torch.float64)
        return {"asked": float(values.mean()), **by_change(values, pairs.changes)}


def by_change(values: Tensor, changes: Sequence[str]) -> dict[str, float]:
    """The mean of (n,) values for each kind of change that occurs."""
    return {
        change: float(values[[one == change for one in changes]].mean())
        for change in sorted(set(changes))
    }


# ------------------------------------------------------------------------------------- questions
def choice_scores(
    umm: MUSE_UMM, questions: Sequence[Question], pictures: bool = True
) -> tuple[dict[str, float], list[str]]:
    """(`accuracy`, and the share `unmatched` that named no option), and the answers themselves."""
    said = ask_benchmark(umm, questions, BATCH, pictures, LETTER_TOKENS)
    scores = mmbench_scores(questions, said)
    return {"accuracy": scores["vanilla"], "unmatched": scores["unmatched"]}, said


def with_others_pictures(questions: Sequence[Question]) -> list[Question]:
    """Each question with the picture of the next one whose answer is other words, if there is one.

    What remains right then was not read off the picture.
    """
    moved = []
    for index, question in enumerate(questions):
        later = [*questions[index + 1 :], *questions[:index]]
        words = question.options[question.answer]
        other = next((one for one in later if one.options[one.answer] != words), question)
        moved.append(replace(question, picture=other.picture))
    return moved


def majority_share(train: Sequence[Question], held_out: Sequence[Question]) -> float:
    """What always giving the commonest letter of training scores."""
    (letter, _), *_ = Counter(question.answer for question in train).most_common()
    return sum(question.answer == letter for question in held_out) / len(held_out)
