"""What the multimodal demo measures of a finished run: prompts, edits, questions.

A measurement of the same weights with the same plan is not made again.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muse.evaluation.metrics.accuracy_iou import accuracy
from muse.evaluation.metrics.networks import load_feature_network
from muse.evaluation.zero_shot import read_lines
from muse.experiments.generation_judge import BATCH, LinearClassifier
from muse.experiments.latent_spaces import SIDE
from muse.experiments.multimodal_data import EditPairs, read_captioned, read_choices, read_edits
from muse.experiments.multimodal_judge import (
    EditJudge,
    choice_scores,
    majority_share,
    shuffled_accuracy,
    with_others_pictures,
)
from muse.experiments.multimodal_report import answer_lines, draw_edits, draw_prompts
from muse.experiments.multimodal_stages import FRESH, MultimodalDemoPlan
from muse.generation.latent_tokenizer import MuseTokenizer
from muse.multimodal.umm import MUSE_UMM
from muse.multimodal.umm_loading import open_umm
from muse.utils.io import write_json
from muse.utils.viz_utils import to_uint8

log = logging.getLogger(__name__)

JUDGE_NETWORK = "efficientnet_lite0"


class DemoMeasuring:
    """The three measurements of a finished run; what they share is made when it is first needed."""

    def __init__(
        self,
        output: Path,
        kind: str,
        plan: MultimodalDemoPlan,
        tokenizer: MuseTokenizer,
        umm: MUSE_UMM,
    ):
        self.output, self.plan, self.tokenizer, self.umm = output, plan, tokenizer, umm
        self.pictures, self.edits, self.questions = (
            output / "data" / f"{name}-{kind}" for name in ("pictures", "edits", "questions")
        )
        self.classes = read_lines(self.pictures / "classes.txt", "class names")

    def all(self, sha256: str) -> dict[str, Any]:
        """All three; a measurement of the same weights with the same plan is read.

        sha256: of the model's weights.
        """
        key = json.loads(json.dumps({"model": sha256, "plan": asdict(self.plan)}))
        parts = {
            "prompts": self.measure_prompts,
            "edits": self.measure_edits,
            "questions": self.measure_questions,
        }
        found = {}
        for name, measure in parts.items():
            found[name] = _once(self.output / "measured" / f"{name}.json", key, measure)
            log.info("%s: %s", name, {k: v for k, v in found[name].items() if k != "examples"})
        return found

    # ------------------------------------------------------------------------------- what is shared
    @cached_property
    def network(self) -> Callable[[Tensor], Tensor]:
        return load_feature_network(JUDGE_NETWORK)

    @cached_property
    def objects(self) -> LinearClassifier:
        """The independent classifier, of real training pictures."""
        real = read_captioned(f"{self.pictures}/train-*.tar", self.plan.judged)
        return LinearClassifier(self.features(real.images), real.labels, len(self.classes))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) uint8 -> (n, D)."""
        return torch.cat([self.network(part / 255) for part in images.split(BATCH)])

    def there_and_back(self, images: Tensor) -> Tensor:
        """Pictures (n, 3, H, W) uint8 through the tokenizer."""
        return torch.cat(
            [
                to_uint8(self.tokenizer.decode(self.tokenizer.encode(part / 255), (SIDE, SIDE)))
                for part in images.split(BATCH)
            ]
        )

    def _batches(self, count: int) -> Iterator[range]:
        for start in range(0, count, BATCH):
            yield range(start, min(start + BATCH, count))

    def _options(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "steps": plan.sampler_steps,
            "guidance_scale": plan.guidance,
            "seed": plan.seed,
        }

    def generate(self, texts: Sequence[str]) -> Tensor:
        """A picture (n, 3, H, W) uint8 for each text."""
        return torch.cat(
            [
                to_uint8(
                    self.umm.generate(
                        [texts[i] for i in part], size=SIDE, indices=part, **self._options()
                    )
                )
                for part in self._batches(len(texts))
            ]
        )

    def edit(self, pairs: EditPairs) -> Tensor:
        """The sources as their instructions say, (n, 3, H, W) uint8."""
        return torch.cat(
            [
                to_uint8(
                    self.umm.edit(
                        pairs.sources[part.start : part.stop] / 255,
                        [pairs.texts[i] for i in part],
                        indices=part,
                        **self._options(),
                    )
                )
                for part in self._batches(len(pairs.texts))
            ]
        )

    # ------------------------------------------------------------------------------- measurements
    def measure_prompts(self) -> dict[str, Any]:
        """(a) Captions of pictures that training did not show, of objects that it did."""
        real = read_captioned(f"{self.pictures}/seen-*.tar", self.plan.prompts)
        count = len(self.classes)
        made = self.generate(real.texts)
        guesses = self.objects.predict(self.features(made))

        def share(images: Tensor) -> float:
            return accuracy(self.objects.predict(self.features(images)), real.labels, count).macro

        back = self.there_and_back(real.images)
        draw_prompts(self.output, made, real.labels, self.classes)
        return {
            "chance": 1 / count,
            "generated": accuracy(guesses, real.labels, count).macro,
            "shuffled": shuffled_accuracy(guesses, real.labels, count),
            "reconstructions": share(back),
            "real": share(real.images),
            "examples": [
                f"{text} → {self.classes[guess]}"
                for text, guess in zip(real.texts, guesses.tolist())
            ],
        }

    def measure_edits(self) -> dict[str, Any]:
        """(b) Edits of objects and backgrounds that training did not show."""
        train = read_edits(self.edits, "train", self.plan.judged)
        judge = EditJudge(self.network, self.objects, len(self.classes), train)
        pairs = read_edits(self.edits, "val", self.plan.edits)
        rows = {
            "edited": self.edit(pairs),
            "copy": pairs.sources,
            "no_source": self.generate(pairs.texts),
            "reconstruction": self.there_and_back(pairs.targets),
            "real": pairs.targets,
        }
        draw_edits(self.output, rows, pairs.sources)
        found: dict[str, Any] = {name: judge.measure(made, pairs) for name, made in rows.items()}
        found["chance"] = judge.chance(pairs)
        return {**found, "examples": pairs.texts}

    def measure_questions(self) -> dict[str, Any]:
        """(c) Four choices about objects and backgrounds that training did not show."""
        train = read_choices(f"{self.questions}/train-*.tar")
        asked = read_choices(f"{self.questions}/val-*.tar")
        models = {
            "with_language": open_umm(self.output / "language"),
            "before": open_umm(self.output / FRESH),
        }
        found: dict[str, Any] = {
            "chance": sum(1 / len(question.options) for question in asked) / len(asked),
            "majority": majority_share(train, asked),
        }
        for name, model in models.items():
            found[name] = choice_scores(model, asked)[0]
        found["after"], said = choice_scores(self.umm, asked)
        found["text_only"], blind = choice_scores(self.umm, asked, pictures=False)
        found["others_picture"], _ = choice_scores(self.umm, with_others_pictures(asked))
        return {**found, "examples": answer_lines(asked, said, blind)}


def _once(file: Path, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` finds, or what the file says that it found for the same key."""
    if file.is_file():
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["of"] == key:
            log.info("%s is there already", file)
            return record["found"]
    found = measure()
    write_json(file, {"of": key, "found": found})
    return found
