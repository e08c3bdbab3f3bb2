"""Training for a time: the clock ends it and moves the learning rate; with a clock of its own."""

import json
import math

import pytest
from omegaconf import OmegaConf

from muse import MUSE_ViT
from muse.experiments import timed_training
from muse.experiments.demo_plan import DEMO_PLANS, MEASURING, STAGES, DemoPlan
from muse.experiments.timed_training import TimedTrainer, train_for
from muse.training.tokenizer_task import TokenizerTask

LONG = {"training": {"max_train_steps": 50}, "experiment": {"log_every": 1}}
COSINE = {
    "optimizer": {"params": {"learning_rate": 1e-3}},
    "lr_scheduler": {
        "scheduler": "cosine",
        "params": {"warmup_steps": 2, "end_lr": 1e-5, "hold_fraction": 0.3},
    },
}


class Clock:
    """Time as the trainer sees it: each step takes `seconds`, from step `busy` on three times."""

    def __init__(self, busy=10**9):
        self.trainer, self.busy = None, busy

    def __call__(self):
        steps = self.trainer.progress.step if self.trainer else 0
        return float(steps + 2 * max(0, steps - self.busy))


@pytest.fixture
def timed(settings, monkeypatch):
    monkeypatch.setattr(timed_training, "LEAST_STEPS", 3)

    def make(seconds, clock, *changes):
        cfg = settings("topology_warmup", *changes)
        trainer = TimedTrainer(cfg, TokenizerTask(cfg), seconds, clock)
        clock.trainer = trainer
        return trainer

    return make


def rates(trainer):
    records = [json.loads(line) for line in (trainer.output / "metrics.jsonl").open()]
    return {record["step"]: record["lr"] for record in records}


def test_it_ends_with_the_time_and_so_does_the_learning_rate(timed):
    trainer = timed(10.0, Clock(), LONG, COSINE)
    final = trainer.run()
    assert trainer.progress.step == 10
    MUSE_ViT.from_pretrained(final)
    found = rates(trainer)
    assert found[1] == pytest.approx(5e-4)  # warm-up counts steps
    assert [found[n] for n in (3, 4)] == pytest.approx([1e-3, 1e-3])  # up to .3 of the time
    for step in (5, 8, 10):  # by the clock before the step: step - 4 of 7 seconds of the cosine
        turn = math.cos(math.pi * (step - 4) / 7)
        assert found[step] == pytest.approx(1e-5 + 0.99e-3 * (1 + turn) / 2, rel=2e-3, abs=1e-7)


def test_a_machine_that_gets_busy_takes_fewer_steps_in_the_same_time(timed):
    trainer = timed(20.0, Clock(busy=8), LONG)
    trainer.run()
    assert trainer.progress.step == 12  # 8 of a second, 4 of three


def test_a_very_slow_machine_takes_a_few_steps_all_the_same(timed):
    trainer = timed(0.5, Clock(), LONG)
    trainer.run()
    assert trainer.progress.step == 3


def test_the_steps_of_the_configuration_still_end_it(timed):
    trainer = timed(1000.0, Clock(), {"training": {"max_train_steps": 4}})
    trainer.run()
    assert trainer.progress.step == 4


def test_the_configuration_of_the_run_names_the_steps_that_were_taken(settings, monkeypatch):
    monkeypatch.setattr(timed_training, "LEAST_STEPS", 2)
    cfg = settings("topology_warmup", LONG)
    steps = train_for(cfg, 0.0)
    assert steps == 2
    saved = OmegaConf.load(f"{cfg.experiment.output_dir}/config.yaml")
    assert saved.training.max_train_steps == 2


def test_the_stages_share_the_time_that_is_left():
    plan = DemoPlan((9, 9, 9, 9), seconds=400.0)
    assert plan.seconds_for("stage1", STAGES, {}) == pytest.approx((400 - 3 * MEASURING) * 0.2)
    # Stage 1 and its measurements took longer than planned: the others get less.
    records = {"stage1": {"train_seconds": 100.0, "measure_seconds": 40.0}}
    assert plan.seconds_for("stage2", STAGES, records) == pytest.approx((260 - 80) * 0.75)
    records["stage2"] = {"train_seconds": 250.0, "measure_seconds": 40.0}
    assert plan.seconds_for("stage3", STAGES, records) == 1.0  # nothing is left
    assert plan.with_steps("4,5,6", STAGES).steps == (9, 4, 5, 6)
    assert plan.with_steps("4,5,6", STAGES).seconds is None
    assert DEMO_PLANS["fast"].seconds_for("stage1", STAGES, {}) is None


@pytest.mark.parametrize(
    ("passes", "chosen"),
    [
        ([(1, 9), (5, 4)], "bf16"),  # seconds of float32 and bfloat16; the first pair warms up
        ([(9, 1), (4, 5)], "no"),
        ([(1, 1), (3, 4), (8, 2)], "bf16"),  # the best pass of each counts
        ([(1, 1), (1, 9), None], "no"),  # clear after one pass: the others are not made
    ],
)
def test_the_faster_precision_is_chosen(passes, chosen, settings):
    ticks = iter(
        [tick for pair in passes if pair for seconds in pair for tick in (0.0, float(seconds))]
    )
    cfg = settings("topology_warmup")
    found = timed_training.fastest_precision(cfg, len(passes) - 1, lambda: next(ticks))
    assert found == chosen
