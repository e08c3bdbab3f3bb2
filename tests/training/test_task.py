"""The trainer runs any task: here a linear regression without pictures, teachers or captions."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from muse.errors import MuseError
from muse.training.task import TrainingTask
from muse.training.trainer import Trainer

WEIGHT = torch.tensor([[1.0, -2.0, 0.5]])


class Line(nn.Linear):
    """y = w x."""

    def __init__(self):
        super().__init__(3, 1, bias=False)
        nn.init.zeros_(self.weight)

    def portable_config(self):
        return {"model_type": "line"}


class Points:
    """Endless batches of 4 points; batch n depends on n alone."""

    bad, retries = SimpleNamespace(summary=lambda: "none"), 0

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(self.position)
            self.position += 1
            yield {
                "x": torch.randn(4, 3, generator=generator),
                "keys": [f"{self.position}.{i}" for i in range(4)],
            }

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Regression(TrainingTask):
    """Mean squared error with noise on the targets, drawn from the global generator."""

    noise, broken_at = 0.1, -1

    def build(self, accelerator):
        return self.empty_model().to(accelerator.device)

    def empty_model(self):
        return Line()

    def train_loader(self):
        return Points()

    def compute_loss(self, model, batch, step):
        target = batch["x"] @ WEIGHT.T + self.noise * torch.randn(4, 1)
        loss = (model(batch["x"]) - target).square().mean()
        return loss * (float("nan") if step == self.broken_at else 1.0), {"mse": loss.detach()}

    def evaluate(self, model):
        return {"distance": float((model.weight - WEIGHT).norm())}

    def pictures(self, model):
        return {"weight": torch.full((3, 4, 4), 0.5)}

    def continues(self, saved):
        return saved["training"]["seed"] == self.cfg.training.seed


PLAN = {
    "training": {"max_train_steps": 6, "max_grad_norm": 0.0},
    "experiment": {"save_every": 3, "keep_last": 5, "eval_every": 3, "generate_every": 6},
    "optimizer": {"params": {"learning_rate": 0.1}},
}


def test_the_first_step_is_the_closed_form(settings):
    """The gradient of the mean square at w = 0 is -2/n Xᵀy."""
    task = Regression(settings("topology_warmup", PLAN))
    task.noise = 0.0
    one = Trainer(task.cfg, task)
    batch = next(one.batches())
    numbers = one.train_step([batch])
    y = batch["x"] @ WEIGHT.T
    gradient = -2 / 4 * batch["x"].T @ y
    assert float(numbers["grad_norm"]) == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert float(numbers["mse"]) == float(numbers["loss"]) == pytest.approx(float((y**2).mean()))
    assert one.progress.images_seen == 4


def test_it_is_logged_drawn_and_resumed_bit_for_bit(settings, tmp_path):
    cfg = settings("topology_warmup", PLAN, output="whole")
    final = Trainer(cfg, Regression(cfg)).run()
    whole = final.parent
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    distances = [record["eval"]["distance"] for record in records if "eval" in record]
    assert len(distances) == 2 and distances[1] < distances[0] < float(WEIGHT.norm())
    assert (whole / "images/weight-6.png").is_file()
    averaged = load_file(final / "model.safetensors")["weight"]
    assert distances[1] == pytest.approx(float((averaged - WEIGHT).norm()), rel=1e-5)

    broken = tmp_path / "broken"
    shutil.copytree(whole / "checkpoint-3", broken / "checkpoint-3")
    torch.manual_seed(99)
    cfg = settings("topology_warmup", PLAN, output="broken")
    Trainer(cfg, Regression(cfg)).run()
    for name in ("model", "ema", "state", "rank-0"):
        left, right = (
            load_file(run / f"checkpoint-6/{name}.safetensors") for run in (whole, broken)
        )
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name


def test_its_bad_batch_is_named_and_dumped(settings, tmp_path):
    task = Regression(settings("topology_warmup", PLAN))
    task.broken_at = 1
    with pytest.raises(
        MuseError, match="^loss is not finite at step 2; samples 2.0, 2.1, 2.2, 2.3"
    ):
        Trainer(task.cfg, task).run()
    dumped = load_file(tmp_path / "run/nonfinite-2-rank-0.safetensors")
    assert dumped.keys() == {"x"} and torch.equal(
        dumped["x"], torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    )
