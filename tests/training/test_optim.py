"""Which tensors learn, at which rate, with which decay."""

import pytest
import torch
from torch import nn

from muse.errors import ConfigError
from muse.stages import select_trainable
from muse.training.optim import build_adamw, gradient_norms, parameter_groups, set_lr
from tests.helpers import random_images, tiny_model


def named(model):
    return [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]


def test_selection_is_by_pattern_and_sets_requires_grad_both_ways():
    model = tiny_model()
    model.requires_grad_(False)
    names = select_trainable(model, [r"^to_latent\.", r"\.q_topo\."])
    assert names == [
        "muse_blocks.0.q_topo.weight",
        "muse_blocks.1.q_topo.weight",
        "to_latent.weight",
        "to_latent.bias",
    ]
    assert [name for name, _ in named(model)] == names
    assert select_trainable(model, ["."]) == [name for name, _ in model.named_parameters()]
    with pytest.raises(ConfigError, match="no parameter of the model matches"):
        select_trainable(model, ["^nothing"])


def test_patterns_that_are_no_regular_expression_are_named():
    with pytest.raises(ConfigError, match=r"training.trainable.*\(encoder"):
        select_trainable(tiny_model(), ["(encoder"])
    with pytest.raises(ConfigError, match=r"optimizer.lr_multipliers.*\(encoder"):
        parameter_groups(named(tiny_model()), 0.1, {"(encoder": 0.5})


def test_groups_carry_rate_and_decay_and_hold_every_tensor_once():
    model = tiny_model()
    groups = parameter_groups(
        named(model), 0.05, {r"^encoder\.": 0.5, r"\.(q_topo|k_topo)\.": 2.0, r"\.0\.": 3.0}
    )
    of = {name: group for group in groups for name in group["names"]}
    assert sorted(of) == sorted(name for name, _ in named(model))
    assert sum(len(group["params"]) for group in groups) == len(of)
    for name, parameter in named(model):
        factor = (
            (0.5 if name.startswith("encoder.") else 1.0)
            * (2.0 if "_topo." in name else 1.0)
            * (3.0 if ".0." in name else 1.0)
        )
        assert of[name]["lr_multiplier"] == factor, name
        assert of[name]["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0), name
    kinds = {
        (group["lr_multiplier"], group["weight_decay"], group["params"][0].ndim == 0)
        for group in groups
    }
    assert len(groups) == len(kinds)  # nothing is split further; scalars stand apart
    assert [group["names"] for group in groups if group["params"][0].ndim == 0] == [["logit_scale"]]


def test_set_lr_multiplies_and_one_step_is_adamw_s_formula():
    weight, bias = nn.Parameter(torch.tensor([[2.0]])), nn.Parameter(torch.tensor([2.0]))
    groups = parameter_groups([("a.weight", weight), ("a.bias", bias)], 0.1, {"weight": 4.0})
    optimizer = build_adamw(groups, 1.0, (0.9, 0.999))
    set_lr(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.04, 0.01]
    (3 * weight.sum() + 3 * bias.sum()).backward()
    optimizer.step()
    # The first step of Adam is lr * sign(gradient); the matrix is shrunk by lr * decay before.
    assert weight.item() == pytest.approx(2 * (1 - 0.04 * 0.1) - 0.04, abs=1e-6)
    assert bias.item() == pytest.approx(2 - 0.01, abs=1e-6)


def test_gradient_norms_by_module():
    model = tiny_model()
    out = model(random_images(2, 32, 32))
    out.reconstruction.square().mean().backward()
    norms = gradient_norms(model)
    for key, value in norms.items():
        prefix = key.removeprefix("grad_norm/") + "."
        squares = sum(
            float(p.grad.square().sum())
            for name, p in model.named_parameters()
            if (name + ".").startswith(prefix) and p.grad is not None
        )
        assert float(value) == pytest.approx(squares**0.5, rel=1e-4), key
    assert {
        "grad_norm/encoder",
        "grad_norm/muse_blocks.0",
        "grad_norm/muse_blocks.1",
        "grad_norm/decoder",
    } <= norms.keys()
    assert "grad_norm/semantic_projector" not in norms
