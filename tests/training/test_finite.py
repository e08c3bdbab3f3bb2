"""Numbers that blow up: named, dumped, never stepped on; and on an accelerator found without
waiting for the device.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from muse.errors import MuseError
from muse.losses import reconstruction
from muse.training.nonfinite import FiniteGuard
from muse.training.progress import Progress
from muse.training.tokenizer_task import train
from muse.training.trainer import Trainer
from tests.helpers import random_images

NAN, INF = float("nan"), float("inf")


def batch(seed: int = 1, count: int = 2) -> dict:
    return {
        "images": random_images(count, 32, 32, seed),
        "text": [f"caption {seed}.{i}" for i in range(count)],
        "keys": [f"key{seed}.{i}" for i in range(count)],
    }


@pytest.fixture
def broken_at(monkeypatch):
    """Multiply the pixel loss by a value (NaN) at the calls given (counted from 0)."""

    def install(*calls, value=NAN):
        count, real = iter(range(10**6)), reconstruction.pixel_loss

        def broken(*args):
            if len(args[0]) == 1:  # the one picture whose graph is read before the run
                return real(*args)
            return real(*args) * (value if next(count) in calls else 1.0)

        monkeypatch.setattr(reconstruction, "pixel_loss", broken)

    return install


def state_of(one: Trainer) -> dict[str, torch.Tensor]:
    """All that a step moves: weights, moments, LeCam's means, the discriminator, but for the
    running means and counters.
    """
    tensors = {f"model.{name}": tensor for name, tensor in one.model.state_dict().items()}
    optimizers = {"student": one.optimizer}
    if one.task.adversary:
        tensors |= {
            f"lecam.{name}": tensor for name, tensor in one.task.adversary.loss.state_dict().items()
        }
        tensors |= {
            f"discriminator.{name}": tensor
            for name, tensor in one.task.adversary.discriminator.state_dict().items()
        }
        optimizers["discriminator"] = one.task.adversary.optimizer
    for kind, optimizer in optimizers.items():
        tensors |= {
            f"{kind}.{index}.{key}": value
            for index, entry in optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
    return {name: tensor.clone() for name, tensor in tensors.items()}


def hold_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]


# ------------------------------------------------------------------------------------- at once
def test_a_loss_that_is_not_finite_stops_the_run_by_name(broken_at, settings, tmp_path):
    broken_at(1)
    with pytest.raises(
        MuseError,
        match=r"^reconstruction, loss is not finite at step 2; samples \w+.*max_skipped_steps=0",
    ) as caught:
        train(settings(output="run"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/final").exists() and not list(
        (tmp_path / "run").glob("checkpoint-*")
    )


@pytest.mark.parametrize("lazy", [False, True])
def test_the_batch_is_dumped(lazy, broken_at, trainer, tmp_path):
    """Its pictures, keys, captions and numbers; of several bad steps in a row the device keeps the
    pictures of the first.
    """
    broken_at(1, 2)
    one = trainer(
        "topology_warmup",
        {"training": {"max_skipped_steps": 5, "gradient_accumulation_steps": 2}},
        output=".",
    )
    one.guard.lazy = lazy
    for number in range(3):  # two micro-batches each: calls 1 and 2 are of steps 1 and 2
        one.train_step([batch(2 * number), batch(2 * number + 1)])
    one.guard.settle()
    assert sorted(path.name for path in tmp_path.glob("nonfinite-*.json")) == [
        "nonfinite-1-rank-0.json",
        "nonfinite-2-rank-0.json",
    ]
    record = json.loads((tmp_path / "nonfinite-1-rank-0.json").read_text())
    assert record["step"] == 1 and {"reconstruction", "loss"} <= set(record["not_finite"])
    assert record["numbers"]["reconstruction"] == "nan" and isinstance(
        record["numbers"]["topology"], float
    )
    assert (
        record["keys"] == ["key0.0", "key0.1", "key1.0", "key1.1"]
        and record["text"][3] == "caption 1.1"
    )
    images = load_file(tmp_path / "nonfinite-1-rank-0.safetensors")["images"]
    assert torch.equal(images, torch.cat([batch(0)["images"], batch(1)["images"]]))
    assert (tmp_path / "nonfinite-2-rank-0.safetensors").exists() is not lazy
    assert one.progress == Progress(step=3, images_seen=4, skipped=2)


def test_a_dump_that_cannot_be_written_hides_nothing(broken_at, trainer, tmp_path):
    broken_at(0)
    one = trainer(output="nowhere/run")
    with pytest.raises(
        MuseError,
        match=r"reconstruction, loss is not finite at step 1; .*could not be written"
        r".*max_skipped_steps=0",
    ):
        one.train_step([batch()])


def test_steps_may_be_skipped_as_often_as_allowed(broken_at, trainer):
    broken_at(0, 2)
    one = trainer("topology_warmup", {"training": {"max_skipped_steps": 1}})
    before = state_of(one)
    numbers = one.train_step([batch()])
    assert not torch.isfinite(numbers["loss"])
    assert one.progress == Progress(step=1, images_seen=0, skipped=1)
    hold_same(before, state_of(one))
    assert all(parameter.grad is None for parameter in one.model.parameters())
    one.train_step([batch()])
    assert one.progress == Progress(step=2, images_seen=2, skipped=1)
    assert not torch.equal(
        one.model.state_dict()["to_latent.weight"], before["model.to_latent.weight"]
    )
    with pytest.raises(MuseError, match="not finite at step 3"):
        one.train_step([batch()])


@pytest.mark.parametrize("lazy", [False, True])
def test_a_gradient_that_is_not_finite_is_caught_before_the_step(lazy, trainer):
    one = trainer("topology_warmup")
    one.guard.lazy = lazy
    one.model.to_latent.weight.register_hook(lambda gradient: gradient * INF)
    before = one.model.to_latent.weight.detach().clone()
    with pytest.raises(
        MuseError, match="grad_norm is not finite at step 1; samples key1.0, key1.1"
    ):
        one.train_step([batch()])
        one.guard.settle()
    assert torch.equal(one.model.to_latent.weight, before)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("where", ["student", "discriminator"])
def test_a_skipped_step_moves_nothing_of_either_optimizer(lazy, where, broken_at, trainer):
    """Not the weights, not a moment, not LeCam's means: the steps around it are those of a run
    without it.
    """
    if where == "student":
        broken_at(1)
    runs = []
    for broken in (True, False):
        torch.manual_seed(0)
        one = trainer(
            "synergistic_tuning",
            {
                "training": {"max_skipped_steps": 1},
                "lr_scheduler": {"scheduler": "constant", "params": {"warmup_steps": 0}},
            },
        )
        one.guard.lazy = lazy
        one.train_step([batch(1)])
        if broken:
            hook = None
            if where == "discriminator":
                hook = next(one.task.adversary.discriminator.parameters()).register_hook(
                    lambda gradient: gradient * NAN
                )
            before = state_of(one)
            one.train_step([batch(2)])
            hold_same(before, state_of(one))
            one.guard.settle()
            assert one.progress.skipped == 1
            if hook:
                hook.remove()
        one.train_step([batch(3)])
        one.guard.settle()
        runs.append(state_of(one))
    hold_same(*runs)


# ----------------------------------------------------------------------------- without waiting
class CountWaits(TorchDispatchMode):
    """Counts what would make the host wait for a device: reading a number, finding places,
    comparing whole tensors.
    """

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.masked_select,
        ):
            self.waits.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """Counts within `with`; copies to the host go round the dispatcher and are counted by their
    methods.
    """
    mode = CountWaits()
    for name in ("tolist", "numpy", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *args, _real=real, _name=name, **kw: (
                mode.waits.append(_name),
                _real(self, *args, **kw),
            )[1],
        )
    return mode


@pytest.mark.parametrize("stage", ["topology_warmup", "semantic_injection", "synergistic_tuning"])
def test_a_step_on_an_accelerator_waits_for_nothing(stage, trainer, waits, monkeypatch):
    # The range of pictures is read only where they lie on a CPU; here they do, so the teacher's
    # check is taken out.
    monkeypatch.setattr("muse.teachers.vit_attention.check_images", lambda images, wait: None)
    one = trainer(stage)
    one.guard.lazy = True  # as on an accelerator
    one.train_step([batch(1)])
    with waits:
        waits.waits.clear()
        for number in range(2, 5):
            one.train_step([batch(number)])
        assert waits.waits == []
        one.guard.settle()
        assert waits.waits == ["tolist"]  # one reading for all the steps since
        one.guard.lazy = False
        one.train_step([batch(5)])
        assert len(waits.waits) > 1  # on a CPU each step is asked; so the count does see it


def test_the_loop_settles_where_it_logs_saves_and_ends(settings, monkeypatch):
    """log_every 4, save_every 5, 7 steps: the device is asked after steps 4, 5 and 7, and all
    records are as on a CPU.
    """
    plan = {"experiment": {"log_every": 4, "save_every": 5}, "training": {"max_train_steps": 7}}
    cpu = train(settings("semantic_injection", plan, output="cpu")).parent
    asked, settle = [], FiniteGuard.settle
    monkeypatch.setattr(
        FiniteGuard, "settle", lambda self: (asked.append(self.progress.step), settle(self))
    )
    monkeypatch.setattr(
        FiniteGuard,
        "__init__",
        lambda self, *args, _real=FiniteGuard.__init__: _real(self, *args, lazy=True),
    )
    lazy = train(settings("semantic_injection", plan, output="lazy")).parent
    assert asked == [4, 5, 7]
    a, b = (load_file(path / "checkpoint-7/model.safetensors") for path in (cpu, lazy))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_on_an_accelerator_stops_with_the_name_of_the_step(
    broken_at, settings, monkeypatch, tmp_path
):
    """Step 2 is bad, the device is asked at step 4: nothing was learned from step 2, and nothing
    was saved since.
    """
    broken_at(1)
    monkeypatch.setattr(
        FiniteGuard,
        "__init__",
        lambda self, *args, _real=FiniteGuard.__init__: _real(self, *args, lazy=True),
    )
    with pytest.raises(
        MuseError,
        match=r"^reconstruction, loss is not finite at step 2; samples "
        r".*nonfinite-2-rank-0.safetensors",
    ):
        train(
            settings(
                "topology_warmup",
                {"experiment": {"log_every": 4}, "training": {"max_train_steps": 8}},
                output="run",
            )
        )
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert load_file(tmp_path / "run/nonfinite-2-rank-0.safetensors")["images"].shape == (
        4,
        3,
        32,
        32,
    )


# ------------------------------------------------------------------------------- fp16's scaler
@pytest.mark.parametrize("stage", ["topology_warmup", "synergistic_tuning"])
def test_gradients_that_overflow_are_the_scaler_s_business(stage, trainer):
    """A real GradScaler at a scale that overflows float32: it skips and lowers the scale, until the
    step equals the unscaled one.
    """
    plan = {
        "losses": {"reconstruction": {"weight": 1e4}},
        "lr_scheduler": {"scheduler": "constant", "params": {"warmup_steps": 0}},
    }
    torch.manual_seed(0)
    plain = trainer(stage, plan)
    expected = plain.train_step([batch()])
    torch.manual_seed(0)
    one = trainer(stage, plan)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-30)
    one.accelerator.scaler, one.accelerator.native_amp = scaler, True
    one.accelerator.state._mixed_precision = (
        "fp16"  # accelerate refuses it on a CPU; the arithmetic here is float32's
    )
    try:
        start = state_of(one)
        assert not torch.isfinite(one.train_step([batch()])["grad_norm"])
        assert scaler.get_scale() == 2.0**97 and one.progress.skipped == 0
        kept = {
            name: tensor
            for name, tensor in state_of(one).items()
            if name in start and not name.startswith("lecam.")
        }
        hold_same(
            {name: start[name] for name in kept}, kept
        )  # (LeCam's means take in what was finite)
        numbers = one.train_step([batch()])
        assert scaler.get_scale() == 2.0**97
        assert numbers["grad_norm"].item() == pytest.approx(expected["grad_norm"].item(), rel=1e-4)
        for name, tensor in one.model.state_dict().items():
            assert torch.allclose(tensor, plain.model.state_dict()[name], atol=1e-5), name
        assert not torch.equal(one.model.to_latent.weight, start["model.to_latent.weight"])
    finally:
        one.accelerator.state._mixed_precision = "no"


def test_a_loss_that_is_not_finite_is_an_error_with_a_scaler_too(broken_at, trainer):
    broken_at(0)
    one = trainer("topology_warmup")
    one.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(MuseError, match="reconstruction, loss is not finite at step 1"):
        one.train_step([batch()])
