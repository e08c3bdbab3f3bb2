"""Stochastic depth of the encoder, `model.encoder.drop_path`: row 45 of docs/fidelity.md."""

import pytest
import torch

from muse import MUSE_ViT
from muse.errors import ConfigError
from muse.models.internvit import build_encoder
from muse.models.layers import DropPath
from muse.models.loading import load_model
from tests.helpers import ENCODER, MODEL, merged, random_images, tiny_model

RATE = 0.4


def drop_paths(encoder) -> dict[str, float]:
    return {name: m.rate for name, m in encoder.named_modules() if isinstance(m, DropPath)}


def test_a_branch_is_dropped_by_sample_and_keeps_its_expectation():
    torch.manual_seed(0)
    drop = DropPath(RATE).train()
    out = drop(torch.ones(20_000, 3, 2))
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))  # a sample as a whole
    dropped = (per_sample[:, 0] == 0).double().mean()
    assert abs(dropped - RATE) < 4 * (RATE * (1 - RATE) / 20_000) ** 0.5
    kept = per_sample[per_sample[:, 0] != 0]
    assert torch.allclose(kept, torch.tensor(1 / (1 - RATE)))
    assert abs(out.mean() - 1) < 4 * (RATE / (1 - RATE) / 20_000) ** 0.5
    assert torch.equal(drop.eval()(out), out)


def test_rates_by_layer_are_those_that_internvl3_prints():
    """0.1 at the last of 24 layers: .004 at layer 1, .074 at layer 17, none at layer 0."""
    encoder = build_encoder("random", {**ENCODER, "num_hidden_layers": 24}, drop_path=0.1)
    rates = drop_paths(encoder)
    for layer in range(24):
        own = [rate for name, rate in rates.items() if f".layer.{layer}." in name]
        assert len(own) == (2 if layer else 0)
        assert all(rate == pytest.approx(0.1 * layer / 23) for rate in own)
    shown = {layer: f"{rates[f'encoder.layer.{layer}.dropout.1']:.3f}" for layer in (1, 17, 23)}
    assert shown == {1: "0.004", 17: "0.074", 23: "0.100"}
    assert not drop_paths(build_encoder("random", ENCODER))


def test_no_tensor_changes_its_name_and_evaluation_is_exact(tmp_path):
    without, model = tiny_model(), MUSE_ViT(merged(MODEL, {"encoder": {"drop_path": RATE}})).eval()
    assert list(model.state_dict()) == list(without.state_dict())
    model.load_state_dict(without.state_dict())
    images = random_images()
    with torch.no_grad():
        assert torch.equal(model.reconstruct(images), without.reconstruct(images))
        assert not torch.equal(
            model.train().encoder_features(images), without.train().encoder_features(images)
        )
    model.save_pretrained(tmp_path)
    assert drop_paths(MUSE_ViT.from_pretrained(tmp_path).encoder) == drop_paths(model.encoder) != {}
    # A stage that goes on from these weights follows its own configuration.
    assert not drop_paths(load_model(tmp_path, MODEL).encoder)


def test_a_frozen_encoder_in_training_drops_branches_of_single_samples():
    """Every output is one of the four that a last layer without this or that branch gives."""
    model = tiny_model(encoder={"drop_path": RATE}).train()
    model.encoder.requires_grad_(False)
    image = random_images(1)
    with torch.no_grad():
        seen = model.encoder_features(image.repeat(400, 1, 1, 1)).flatten(2).transpose(1, 2)
        pixels = (image - model.pixel_mean) / model.pixel_std
        layer, last = model.encoder.encoder.layer
        x = layer(model.encoder.embeddings(pixels))  # the first layer drops nothing
        possible = {}
        model.eval()
        for attention in (0, 1):
            y = (
                x
                + attention
                / (1 - RATE)
                * last.lambda_1
                * last.attention(last.layernorm_before(x))[0]
            )
            for mlp in (0, 1):
                z = y + mlp / (1 - RATE) * last.lambda_2 * last.mlp(last.layernorm_after(y))
                possible[attention, mlp] = z[:, 1:]
    distances = torch.stack([(seen - z).abs().amax((1, 2)) for z in possible.values()])  # (4, 400)
    assert (distances.amin(0) < 1e-5).all()
    counts = dict(zip(possible, distances.argmin(0).bincount(minlength=4).tolist()))
    for (attention, mlp), count in counts.items():
        expected = ((1 - RATE) if attention else RATE) * ((1 - RATE) if mlp else RATE)
        assert abs(count / 400 - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5


def test_a_rate_is_a_share():
    for wrong in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="model.encoder.drop_path must be"):
            MUSE_ViT(merged(MODEL, {"encoder": {"drop_path": wrong}}))
