"""`training.compile`: each part traces as one graph, and a compiled run computes the same."""

import functools

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from muse.models.discriminator import PatchDiscriminator
from muse.training.tokenizer_task import train
from tests.helpers import MIXED_DECODER, random_images, tiny_model


@pytest.fixture
def as_one_graph(monkeypatch):
    """Compiling traces for real, fails on a second graph, and runs the graph as it is."""
    torch._dynamo.reset()
    whole = functools.partialmethod(nn.Module.compile, fullgraph=True, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", whole)
    yield
    torch._dynamo.reset()


def step(model, images, half):
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = model(images)
    structure = out.log_topology[0][..., 0].sum()
    (out.reconstruction.float().square().mean() + structure).backward()
    return [out.reconstruction, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("mode", ["none", "all"])
def test_decoder_and_blocks_are_one_graph_each_with_the_same_numbers(as_one_graph, mode, half):
    changes = {"gradient_checkpointing": mode, "decoder": {"config": MIXED_DECODER}}
    images = random_images(2, 32, 32)
    plain, compiled = (tiny_model(isolate_streams=False, **changes).train() for _ in range(2))
    names = list(compiled.state_dict())
    for part in (compiled.decoder, *compiled.muse_blocks):
        part.compile()
    found = [step(model, images, half) for model in (plain, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert list(compiled.state_dict()) == names


def test_the_discriminator_is_one_graph(as_one_graph):
    torch.manual_seed(0)
    network, images = PatchDiscriminator(32, 2), random_images(2, 32, 32)
    logits = network(images)
    network.compile()
    assert torch.equal(network(images), logits)


def test_a_compiled_run_equals_a_plain_one(as_one_graph, settings, monkeypatch):
    compiled, weights = [], []
    real = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self: (compiled.append(type(self).__name__), real(self))
    )
    for compile_parts in (False, True):
        changes = {"training": {"compile": compile_parts}}
        final = train(settings("synergistic_tuning", changes, output=f"run-{compile_parts}"))
        weights.append(load_file(final / "model.safetensors"))
    assert compiled == ["DCDecoder", "SynergisticBlock", "SynergisticBlock", "PatchDiscriminator"]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
