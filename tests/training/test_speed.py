"""What a step must not do: keep graphs of frozen parts, step tensor by tensor, copy pageable
memory.
"""

import pytest
import torch

from muse.data import dataloader
from muse.models.ema_model import EMAModel
from muse.training.tokenizer_task import TokenizerTask
from tests.helpers import random_images


@pytest.mark.parametrize(
    ("stage", "frozen"),
    [("topology_warmup", True), ("semantic_injection", True), ("synergistic_tuning", False)],
)
def test_frozen_parts_run_without_graph(stage, frozen, trainer):
    one = trainer(stage)
    seen = {}
    hooks = [
        one.model.encoder.register_forward_hook(
            lambda module, inputs, out: seen.update(encoder=out)
        )
    ]
    hooks += [
        term.teacher.register_forward_hook(
            lambda module, inputs, out, name=name: seen.update({name: out})
        )
        for name, term in one.task.loss.terms.items()
        if hasattr(term, "teacher")
    ]
    one.train_step([{"images": random_images(2, 32, 32), "text": ["a", "b"], "keys": ["a", "b"]}])
    for hook in hooks:
        hook.remove()
    encoder = (
        seen["encoder"][0]
        if isinstance(seen["encoder"], tuple)
        else seen["encoder"].last_hidden_state
    )
    assert encoder.requires_grad is not frozen
    assert all(not tensor.requires_grad for tensor in seen["topology"].maps)
    if "itc" in one.task.loss.terms:
        assert not seen["itc"].requires_grad
    assert all(
        p.grad is None and not p.requires_grad
        for term in one.task.loss.terms.values()
        for p in term.parameters()
    )


def test_optimizers_are_fused_and_means_are_one_call(trainer, monkeypatch):
    one = trainer("synergistic_tuning")
    for optimizer in (one.optimizer, one.task.adversary.optimizer):
        assert all(group["fused"] for group in optimizer.param_groups)
    calls, real = [], torch._foreach_lerp_
    monkeypatch.setattr(
        torch, "_foreach_lerp_", lambda *args: (calls.append(len(args[0])), real(*args))
    )
    EMAModel(one.model).update()
    assert calls == [sum(p.requires_grad for p in one.model.parameters())]


@pytest.mark.parametrize(("kind", "pinned"), [("cuda", True), ("cpu", False)])
def test_batches_are_pinned_for_gpus_and_prefetched_by_workers(kind, pinned, settings, monkeypatch):
    class Place:
        process_index, num_processes, device = 0, 1, torch.device(kind)

    made = {}
    monkeypatch.setattr(dataloader, "train_loader", lambda *args, **options: made.update(options))
    cfg = settings("semantic_injection", {"dataset": {"params": {"num_workers_per_gpu": 3}}})
    task = TokenizerTask(cfg)
    task.accelerator = Place
    task.train_loader()
    assert made["pin_memory"] is pinned and made["num_workers"] == 3
