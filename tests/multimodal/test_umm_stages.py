"""What each stage trains, and what stays exactly where it was."""

import pytest
import torch

from muse.multimodal.umm_stages import UMM_STAGES
from muse.stages import select_trainable
from tests.helpers import random_images

CONNECTOR = {"queries", "connector", "to_caption", "latent_tokens"}
PARTS = {
    "projector": {"internvl.model.multi_modal_projector"},
    "connector": CONNECTOR,
    "connector_generator": CONNECTOR | {"generator"},
    "instructions": CONNECTOR | {"generator"},
}


@pytest.fixture
def umm(make_umm):
    return make_umm({"source_tokens": ["latent", "encoder"]})


def part(name: str) -> str:
    return ".".join(name.split(".")[:3]) if name.startswith("internvl") else name.split(".")[0]


def loss_of(umm, stage: str) -> torch.Tensor:
    images = random_images(2, 32, 32)
    if stage == "projector":
        return umm(["what is it?", "what?"], images, answers=["a cat", "dog"]).mean()
    return umm(["make it red", "x"], images, targets=random_images(2, 32, 32, seed=2)).mean()


@pytest.mark.parametrize("stage", UMM_STAGES)
def test_a_stage_moves_its_parts_and_nothing_else(umm, stage):
    names = select_trainable(umm, UMM_STAGES[stage].trainable)
    assert {part(name) for name in names} == PARTS[stage]
    before = {name: p.detach().clone() for name, p in umm.named_parameters()}
    learning = [p for p in umm.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1e-6)
    loss_of(umm.train(), stage).backward()
    for name, parameter in umm.named_parameters():
        if name in names:
            # Not None: a tensor without gradient has no place in DDP's buckets.
            assert parameter.grad is not None, name
        else:
            assert parameter.grad is None, name
    optimizer.step()
    for name, parameter in umm.named_parameters():
        if name not in names:
            assert torch.equal(parameter, before[name]), name
    moved = {part(n) for n, p in umm.named_parameters() if not torch.equal(p, before[n])}
    assert moved == PARTS[stage]


def test_text_to_image_alone_leaves_the_source_pictures_layer_without_gradient(umm):
    """`latent_tokens` is the one part that only edits train: a mixture must hold both."""
    names = select_trainable(umm, UMM_STAGES["connector"].trainable)
    umm(["a cat"], targets=random_images(1, 32, 32)).mean().backward()
    still = {n for n, p in umm.named_parameters() if n in names and p.grad is None}
    assert still == {"latent_tokens.weight", "latent_tokens.bias"}


@pytest.mark.parametrize("connector", ["synergistic", "llm_layers"])
def test_text_to_image_reaches_all_that_a_stage_trains(make_umm, connector):
    umm = make_umm({"connector": connector})
    names = select_trainable(umm, UMM_STAGES["connector_generator"].trainable)
    umm(["a cat"], targets=random_images(1, 32, 32)).mean().backward()
    still = [n for n, p in umm.named_parameters() if n in names and not p.grad.any()]
    assert still == []


def test_learning_makes_the_loss_smaller(make_umm):
    """Stage 2 on two pictures with fixed noise: the parts together can learn them."""
    umm = make_umm()
    select_trainable(umm, UMM_STAGES["connector_generator"].trainable)
    with torch.no_grad():  # small weights again: these learn
        for parameter in umm.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.3)
    torch.manual_seed(1)
    fixed = {
        "targets": random_images(2, 32, 32),
        "level": torch.tensor([0.3, 0.6]),
        "noise": torch.randn(2, 8, 2, 2),
    }
    optimizer = torch.optim.Adam([p for p in umm.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = umm(["a cat", "a dog"], **fixed).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
