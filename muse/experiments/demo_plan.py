"""How much of everything the demo does, and how its time is shared among the stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from muse.errors import ConfigError

STAGES = ("stage1", "stage2", "stage3")
SCRATCH_STAGES = ("stage0", *STAGES)  # with an encoder from random weights
# Of the time for training. The decoder starts from random weights in stage 1 and learns most in
# stage 2, where the semantic stream needs many captions; stage 3 refines all parts together.
SHARES = {"stage0": 0.4, "stage1": 0.2, "stage2": 0.6, "stage3": 0.2}
MEASURING = 25.0  # seconds that a stage's measurements may take, before the first is known


@dataclass(frozen=True)
class DemoPlan:
    """How much of everything.

    With `seconds` the steps are only the most that a stage takes: training ends with the time.
    """

    steps: tuple[int, int, int, int]  # of stages 0 to 3
    images: int = 3000
    probe_images: int = 600
    val_images: int | None = None  # of each validation set; None: all
    seconds: float | None = None  # for training and measuring all stages
    kind: str = "everything"  # of demo data
    precision: str | None = "no"  # of training; None: the faster one of this machine

    def steps_of(self, stage: str) -> int:
        """Steps of a stage, or the most that it takes."""
        return self.steps[SCRATCH_STAGES.index(stage)]

    def with_steps(self, text: str, stages: Sequence[str]) -> "DemoPlan":
        """This plan with these numbers of steps, such as `150,400,120`, whatever time they take."""
        numbers = text.split(",")
        if len(numbers) != len(stages) or not all(n.isdecimal() and int(n) for n in numbers):
            raise ConfigError(
                f"--steps {text}: {len(stages)} numbers were expected, of {', '.join(stages)}"
            )
        known = dict(zip(stages, map(int, numbers)))
        steps = tuple(known.get(stage, self.steps_of(stage)) for stage in SCRATCH_STAGES)
        return replace(self, steps=steps, seconds=None)

    def seconds_for(
        self, stage: str, stages: Sequence[str], records: Mapping[str, Mapping[str, Any]]
    ) -> float | None:
        """What a stage may train: its share of the time that is left, less that for measuring.

        Args:
            stage: the next one.
            stages: all of the run.
            records: of the stages before it, with `train_seconds` and `measure_seconds`.
        """
        if self.seconds is None:
            return None
        spent = sum(one["train_seconds"] + one["measure_seconds"] for one in records.values())
        measuring = max([one["measure_seconds"] for one in records.values()], default=MEASURING)
        to_come = stages[list(stages).index(stage) :]
        left = self.seconds - spent - measuring * len(to_come)
        return max(1.0, left * SHARES[stage] / sum(SHARES[one] for one in to_come))


DEMO_PLANS = {
    "default": DemoPlan((3000, 3000, 5000, 3000), images=6000, seconds=840.0, precision=None),
    "fast": DemoPlan((12, 12, 10, 8), images=160, probe_images=120, val_images=64, kind="stamps"),
    "full": DemoPlan((4300, 1200, 2400, 400), images=24000, probe_images=1500, precision=None),
}
