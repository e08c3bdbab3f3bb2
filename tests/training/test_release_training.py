"""Switches that train as the release does: rows 36, 44, 45, 48 and 55 of docs/fidelity.md."""

import pytest
import torch

from muse import load_config
from muse.losses.adversarial import build_discriminator
from muse.training.optim import parameter_groups
from tests.helpers import ROOT, random_images, tiny_model

RELEASE = load_config(ROOT / "configs/muse_1b/stage3.yaml", recipe="release")


def a_batch():
    images = random_images(4, 32, 32)
    return {"images": images, "text": list("abcd"), "keys": list("abcd")}


@pytest.mark.parametrize("clamped", [True, False])
def test_no_gradient_from_outside_of_the_range(clamped, trainer):
    """Row 44, of each of the three terms alone: pixels, perceptual, adversarial."""
    one = trainer("synergistic_tuning", {"losses": {"clamp_reconstruction": clamped}})
    batch, loss, adversary = a_batch(), one.task.loss, one.task.adversary
    out = one.model(batch["images"], **loss.needs)
    pixels = torch.randn(out.reconstruction.shape) + 0.5  # about two thirds lie outside
    outside = (pixels < 0) | (pixels > 1)
    terms = {
        "reconstruction": lambda x: loss.weighted(out._replace(reconstruction=x), batch)[0],
        "perceptual": lambda x: loss.weighted(out._replace(reconstruction=x), batch)[0],
        "adversarial": lambda x: {"adversarial": adversary.generator_term(batch["images"], x, 0)},
    }
    for name, values in terms.items():
        leaf, inside = pixels.clone().requires_grad_(), pixels.clamp(0, 1).requires_grad_()
        value, reference = values(leaf)[name], values(inside)[name]
        value.backward()
        reference.backward()
        assert leaf.grad[~outside].abs().sum() > 0, name
        if clamped:
            assert torch.equal(leaf.grad[outside], torch.zeros_like(leaf.grad[outside])), name
            assert value.item() == reference.item(), name
            assert torch.equal(leaf.grad[~outside], inside.grad[~outside]), name
        else:
            assert leaf.grad[outside].abs().sum() > 0 and value.item() != reference.item(), name
    shown = adversary._pairs[0][1]
    assert (0 <= shown.min() and shown.max() <= 1) == clamped  # the discriminator sees the same


def test_a_step_with_clamped_reconstructions(trainer):
    """The whole step runs, and the pixel loss in the log is that of the clamped picture."""
    one = trainer("synergistic_tuning", {"losses": {"clamp_reconstruction": True}})
    with torch.no_grad():
        one.model.train()
        out = one.model(a_batch()["images"])
    expected = (out.reconstruction.clamp(0, 1) - a_batch()["images"]).square().mean().item()
    numbers = one.train_step([a_batch()])
    assert numbers["reconstruction"].item() == pytest.approx(expected, rel=1e-5)


def test_what_the_release_does_not_decay():
    """Row 36: the encoder's class embedding, position embedding and patch weight, by its recipe."""
    named = list(tiny_model().named_parameters())
    decayed = [
        {name for group in groups if group["weight_decay"] for name in group["names"]}
        for groups in (
            parameter_groups(named, 0.1),
            parameter_groups(named, 0.1, {}, RELEASE.optimizer.no_decay),
        )
    ]
    assert decayed[0] - decayed[1] == {
        "encoder.embeddings.cls_token",
        "encoder.embeddings.position_embeddings",
        "encoder.embeddings.patch_embeddings.projection.weight",
    }
    assert decayed[1] < decayed[0] == {name for name, p in named if p.ndim > 1}


def test_tensors_that_a_configuration_does_not_decay_reach_the_optimizer(trainer):
    one = trainer("topology_warmup", {"optimizer": {"no_decay": [r"\.q_topo\.", "^to_latent"]}})
    of = {name: g["weight_decay"] for g in one.optimizer.param_groups for name in g["names"]}
    exempt = {name for name in of if ".q_topo." in name or name.startswith("to_latent")}
    assert len(exempt) == 4 and not any(of[name] for name in exempt)
    assert of["muse_blocks.0.k_topo.weight"] == one.cfg.optimizer.params.weight_decay > 0


@pytest.mark.parametrize("precision", ["mixed", "float32"])
def test_the_discriminator_s_precision(precision, settings):
    """Row 48: within autocast, as accelerate runs it, bf16 or all in float32."""
    cfg = settings("synergistic_tuning", {"losses": {"adversarial": {"precision": precision}}})
    network, images, dtypes = build_discriminator(cfg), random_images(2, 32, 32), set()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda *args: dtypes.add(args[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images.bfloat16())
    assert dtypes == {torch.float32 if precision == "float32" else torch.bfloat16}
    difference = (logits.float() - network(images.bfloat16().float())).abs().max()
    assert (difference == 0) == (precision == "float32")
    assert RELEASE.losses.adversarial.precision == "float32"


@pytest.mark.parametrize(("end", "expected"), [(None, 1e-5), (2e-6, 2e-6)])
def test_the_discriminator_s_rate_at_the_last_step(end, expected, trainer):
    """Row 55: the release ends it at 2e-6, the student at the schedule's own."""
    schedule = {"lr_scheduler": {"params": {"warmup_steps": 0, "discriminator_end_lr": end}}}
    one = trainer("synergistic_tuning", schedule)
    for _ in range(2):
        one.train_step([a_batch()])
    (discriminator,) = {group["lr"] for group in one.task.adversary.optimizer.param_groups}
    assert discriminator == pytest.approx(expected)
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
    assert RELEASE.lr_scheduler.params.discriminator_end_lr == 2e-6
