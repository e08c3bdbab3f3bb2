"""`losses.itc.across_accumulation`: several micro-batches contrast as one batch would."""

import logging

import pytest
import torch

from muse.config import load_config
from muse.errors import ConfigError
from muse.losses.contrastive import caption_positives, itc_loss
from muse.training.tokenizer_task import TokenizerTask
from muse.training.trainer import Trainer
from tests.helpers import random_images, run_config
from tests.training.processes import run_in_two

# 48 pictures with 20 captions, so that equal ones stand in several micro-batches.
PICTURES = {
    "images": random_images(48, 32, 32),
    "text": [f"picture {n % 20}" for n in range(48)],
    "keys": [str(n) for n in range(48)],
}
PLAN = {
    "training": {"max_grad_norm": 0.0},
    "losses": {"adversarial": {"weight": 0.0}, "itc": {"across_accumulation": True}},
}


ALL = ("loss", "itc", "topology", "reconstruction", "logit_scale", "grad_norm")


def part(first: int, count: int) -> dict:
    return {name: values[first : first + count] for name, values in PICTURES.items()}


def micro(sizes: list[int], first: int = 0) -> list[dict]:
    starts = [first + sum(sizes[:index]) for index in range(len(sizes))]
    return [part(start, size) for start, size in zip(starts, sizes)]


def accumulate(count: int, size: int) -> dict:
    return {"training": {"gradient_accumulation_steps": count, "per_gpu_batch_size": size}}


def step_of(trainer: Trainer, batches: list[dict]) -> tuple[dict, dict]:
    """The numbers and all gradients of one optimizer step."""
    gradients = {}

    def keep(skip, optimizers, averages):
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                gradients[name] = getattr(grad, "full_tensor", grad.clone)().clone()

    trainer.guard.take_step = keep
    numbers = trainer.train_step(batches)
    return {name: value.item() for name, value in numbers.items()}, gradients


def hold_same(left: tuple[dict, dict], right: tuple[dict, dict], numbers=ALL) -> None:
    for name in numbers:
        assert left[0][name] == pytest.approx(right[0][name], rel=1e-5), name
    assert left[1].keys() == right[1].keys() and "logit_scale" in left[1]
    for name, grad in left[1].items():
        scale = float(right[1][name].abs().max())
        torch.testing.assert_close(grad, right[1][name], rtol=1e-4, atol=1e-5 * scale + 1e-9)


def test_four_times_twelve_are_forty_eight(trainer):
    whole = step_of(trainer("synergistic_tuning", PLAN, output="whole"), [part(0, 48)])
    across = trainer("synergistic_tuning", PLAN, accumulate(4, 12), output="across")
    hold_same(step_of(across, micro([12] * 4)), whole)
    off = {"losses": {"itc": {"across_accumulation": False}}}
    weaker = trainer("synergistic_tuning", PLAN, accumulate(4, 12), off, output="off")
    numbers, _ = step_of(weaker, micro([12] * 4))
    assert whole[0]["itc"] - numbers["itc"] > 1  # about log 4: negatives of one micro-batch


def test_the_second_pass_draws_what_the_first_drew(trainer):
    """Stochastic depth: the gradient is that of one pass that keeps all graphs."""
    deep = {"model": {"encoder": {"drop_path": 0.5}}}
    one = trainer("synergistic_tuning", PLAN, deep, accumulate(3, 4))
    batches, begun = micro([4] * 3), torch.get_rng_state()
    one.model.train()
    outs = [one.model(batch["images"], **one.task.loss.needs) for batch in batches]
    embeds = torch.cat([out.image_embeds for out in outs], dim=1)
    captions = PICTURES["text"][:12]
    text = one.task.loss.terms["itc"].teacher(captions)
    contrast = itc_loss(embeds, text, outs[0].logit_scale, caption_positives(captions))
    total = one.cfg.losses.itc.weight * contrast
    for out, batch in zip(outs, batches):
        values, _ = one.task.loss.weighted(out, batch)
        total = total + (sum(values.values()) - values["itc"]) / 3
    names, tensors = zip(*[(n, p) for n, p in one.model.named_parameters() if p.requires_grad])
    expected = dict(zip(names, torch.autograd.grad(total, tensors, allow_unused=True)))
    ended = torch.get_rng_state()

    torch.set_rng_state(begun)
    numbers, gradients = step_of(one, batches)
    assert numbers["itc"] == pytest.approx(contrast.item(), rel=1e-5)
    assert numbers["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert torch.equal(torch.get_rng_state(), ended) and not torch.equal(begun, ended)
    for name, grad in gradients.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5 * scale + 1e-9)


def _two(config: str, folder: str) -> None:
    """Process r takes pictures 12 r to 12 r + 11 in two micro-batches."""
    cfg = load_config(config)
    trainer = Trainer(cfg, TokenizerTask(cfg))
    rank = trainer.accelerator.process_index
    result = step_of(trainer, micro([6, 6], first=12 * rank))
    torch.save(result, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_contrast_over_all_their_micro_batches(fsdp, trainer, shapes_data, tmp_path):
    whole = step_of(trainer("synergistic_tuning", PLAN, output="whole"), [part(0, 24)])
    file = tmp_path / "two.yml"
    settings = (PLAN, accumulate(2, 6))
    run_config(file, shapes_data, tmp_path / "two", "synergistic_tuning", *settings)
    run_in_two(_two, str(tmp_path / "log"), fsdp, str(file), str(tmp_path))
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        # The other terms are logged of this process's pictures until the log averages them.
        hold_same(result, whole, ("itc", "logit_scale", "grad_norm"))


def test_it_says_where_negatives_come_from(trainer, caplog):
    off = {"losses": {"itc": {"across_accumulation": False}}}
    lines = {}
    for name, stage, changes in (
        ("off", "semantic_injection", (accumulate(2, 4), off)),
        ("on", "semantic_injection", (accumulate(2, 4),)),
        ("once", "semantic_injection", (accumulate(1, 4),)),
        ("no contrast", "topology_warmup", (accumulate(2, 4), off)),
    ):
        caplog.clear()
        trainer(stage, PLAN, *changes, output=name)
        lines[name] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    (line,) = lines.pop("off")
    assert "one micro-batch (4 images" in line and "losses.itc.across_accumulation=true" in line
    (line,) = lines.pop("once")
    assert "changes nothing with training.gradient_accumulation_steps=1" in line
    assert lines == {"on": [], "no contrast": []}


def test_a_regression_has_no_negatives(settings):
    with pytest.raises(ConfigError, match="no meaning with losses.itc.objective=distillation"):
        settings("semantic_injection", PLAN, {"losses": {"itc": {"objective": "distillation"}}})
