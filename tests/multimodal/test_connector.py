"""The connector: our blocks as they are, or the language model's last layers, both ways."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from muse.errors import ConfigError
from muse.multimodal.connector import LanguageLayersConnector, SynergisticConnector
from tests.multimodal.parts import INTERNVL, filled


@pytest.fixture
def language_model():
    return filled(Qwen2Model(Qwen2Config(**INTERNVL["text_config"])))


@pytest.mark.parametrize("dim", [None, 16])
def test_equals_the_blocks_called_by_hand(dim):
    connector = filled(SynergisticConnector(32, num_layers=3, dim=dim, num_heads=2))
    x = torch.randn(2, 7, 32)
    by_hand = x if dim is None else x @ connector.proj_in.weight.T + connector.proj_in.bias
    width = dim or 32
    # Rotary tables written out: position n, frequency 10000^(-2k/d), both halves alike.
    d = width // 2
    frequencies = 10000.0 ** (-torch.arange(0, d, 2) / d)
    angles = torch.outer(torch.arange(7.0), frequencies).repeat(1, 2)
    for block in connector.blocks:
        by_hand = block(by_hand, (angles.cos(), angles.sin()), return_attention=True).tokens
    torch.testing.assert_close(connector(x), by_hand, rtol=1e-4, atol=1e-4)
    assert connector.width == width


def test_one_loss_reaches_every_weight_of_the_blocks():
    connector = filled(SynergisticConnector(32, num_layers=2, num_heads=2))
    connector(torch.randn(2, 5, 32)).square().sum().backward()
    still = [name for name, p in connector.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_heads_are_64_wide_unless_told_and_must_divide_the_width():
    assert SynergisticConnector(896, 1).blocks[0].num_heads == 14
    with pytest.raises(ConfigError, match="connector_dim=30 must be model.connector_heads=4"):
        SynergisticConnector(32, 1, dim=30, num_heads=4)


def test_language_layers_equal_the_last_layers_run_with_a_mask_of_ones(language_model):
    """Reference: the same layers inside transformers' own model, with an explicit full mask."""
    connector = LanguageLayersConnector(language_model, 2)
    x = torch.randn(2, 6, 32)
    language_model.layers = language_model.layers[-2:]
    language_model.config.num_hidden_layers = 2
    full = torch.zeros(2, 1, 6, 6)
    reference = language_model(
        inputs_embeds=x, attention_mask={"full_attention": full}, use_cache=False
    ).last_hidden_state
    torch.testing.assert_close(connector(x), reference, rtol=1e-4, atol=1e-4)


def test_language_layers_attend_both_ways(language_model):
    connector = LanguageLayersConnector(language_model, 2)
    x = torch.randn(1, 6, 32)
    other = x.clone()
    other[:, -1] += 1
    assert (connector(x)[:, 0] != connector(other)[:, 0]).any()


def test_language_layers_are_a_copy_that_learns(language_model):
    language_model.requires_grad_(False)
    connector = LanguageLayersConnector(language_model, 2)
    assert all(p.requires_grad for p in connector.parameters())
    before = language_model.layers[-1].mlp.up_proj.weight.clone()
    with torch.no_grad():
        connector.layers[-1].mlp.up_proj.weight.zero_()
    assert torch.equal(language_model.layers[-1].mlp.up_proj.weight, before)
    assert language_model.layers[-1].self_attn.is_causal


def test_more_layers_than_there_are(language_model):
    with pytest.raises(ConfigError, match="connector_layers=4, but the language model has 3"):
        LanguageLayersConnector(language_model, 4)


@pytest.mark.parametrize("kind", ["synergistic", "llm_layers"])
def test_recomputing_changes_no_gradient(kind, language_model):
    if kind == "synergistic":
        connector = filled(SynergisticConnector(32, num_layers=2, num_heads=2))
    else:
        connector = LanguageLayersConnector(language_model, 2)
    connector.train()
    x = torch.randn(2, 5, 32)
    gradients = []
    for recompute in (False, True):
        connector.zero_grad()
        connector.gradient_checkpointing = recompute
        connector(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in connector.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))
