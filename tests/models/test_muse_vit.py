"""The student's public surface: shapes, ranges, any picture size, and each part against the formula
it stands for.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from muse.analysis.counters import SavedTensors
from muse.errors import ConfigError
from muse.models.muse_vit import FEATURES, MUSE_ViT
from tests.helpers import MODEL, merged, random_images, tiny_model

CELL = 16  # 8 px patches, unshuffled 2x2
PUBLIC = {
    "encode": {},
    "reconstruct": {},
    "embed_image": {},
    "features": {"kind": "semantic"},
    "encoder_features": {},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# ----------------------------------------------------------------------------------------- any size
@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (37, 53), (16, 64), (80, 16), (32, 32), (3, 130)]
)
def test_reconstruct_keeps_any_size_and_the_range(model, height, width):
    with torch.no_grad():
        recon = model.reconstruct(random_images(2, height, width))
    assert recon.shape == (2, 3, height, width) and recon.dtype == torch.float32
    assert 0 <= recon.min() and recon.max() <= 1


def test_reconstruct_pads_by_repeating_the_border_and_crops_back(model):
    images = random_images(1, 37, 53)
    by_hand = F.pad(images, (0, 11, 0, 0), mode="replicate")
    by_hand = torch.cat([by_hand, by_hand[:, :, -1:].expand(-1, -1, 11, -1)], dim=2)
    with torch.no_grad():
        whole = model.decode(model.encode(by_hand).latent)
        assert torch.allclose(
            model.reconstruct(images), whole[..., :37, :53].clamp(0, 1), atol=1e-6
        )


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (5, 2), (1, 4)])
def test_encode_on_any_grid(model, grid):
    (h, w), count = grid, grid[0] * grid[1]
    images = random_images(2, h * CELL, w * CELL)
    with torch.no_grad():
        encoding = model.encode(images, return_attention=True)
        plain = model.encode(images)
    assert encoding.grid == grid
    assert (
        encoding.latent.shape == (2, 8, h, w)
        and encoding.semantic.shape == (2, count, 32)
        and encoding.anchors.shape == (2, 2, 32)
    )
    assert len(encoding.topology) == 2 and plain.topology == ()
    for maps in encoding.topology:
        assert maps.shape == (2, 2, count, count) and maps.min() >= 0
        assert torch.allclose(maps.sum(-1), torch.ones(2, 2, count), atol=1e-5)
    # The path without maps runs another kernel (SDPA).
    for name in ("latent", "semantic", "anchors"):
        assert torch.allclose(getattr(encoding, name), getattr(plain, name), atol=1e-5), name
    assert torch.allclose(encoding.anchors[:, -1], encoding.semantic.mean(1), atol=1e-6)


def test_the_grid_is_carried_not_guessed(model):
    """A picture and its transpose have as many tokens; only the grid tells them apart."""
    images = random_images(1, 2 * CELL, 8 * CELL)
    with torch.no_grad():
        assert model.encode(images).latent.shape == (1, 8, 2, 8)
        assert model.encode(images.transpose(2, 3)).latent.shape == (1, 8, 8, 2)
        # Row by row: a change in the picture's lower half shows there first.
        changed = images.clone()
        changed[:, :, CELL:] = 1 - changed[:, :, CELL:]
        encoder = (
            (model.encoder_features(images) - model.encoder_features(changed))
            .abs()
            .mean(dim=(0, 1, 3))
        )
    assert encoder[2:].min() > encoder[:2].max()


def test_unshuffle_of_one_keeps_every_encoder_token():
    model = tiny_model(unshuffle=1)
    with torch.no_grad():
        assert model.encode(random_images(1, 24, 40)).latent.shape == (1, 8, 3, 5)
        assert model.reconstruct(random_images(1, 9, 33)).shape == (1, 3, 9, 33)


def test_encode_refuses_sizes_that_are_no_multiple(model):
    with pytest.raises(
        ValueError,
        match=r"multiples of 16 \(patch 8 x unshuffle 2\), got 37x48; "
        r"reconstruct\(\) takes any size",
    ):
        model.encode(random_images(1, 37, 48))


@pytest.mark.parametrize("call", PUBLIC)
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (2 * random_images(1, 32, 32) - 1, r"must be RGB in \[0, 1\], got values in \[-"),
        (255 * torch.ones(1, 3, 32, 32), r"got values in \[255, 255\]"),
        (torch.ones(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 32, 32), math.nan), "nan"),
        (torch.rand(3, 32, 32), r"shape \(B, 3, H, W\), got \(3, 32, 32\)"),
    ],
)
def test_every_public_entry_holds_the_pixel_contract(model, call, images, words):
    with pytest.raises(ValueError, match=words):
        getattr(model, call)(images, **PUBLIC[call])


# --------------------------------------------------------------------------------- parts by formula
def test_trunk_is_encoder_unshuffle_adapter_blocks(model):
    """The path of FIDELITY, "The method", with torch's own functions."""
    images = random_images(2, 48, 32)
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1),
        torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1),
    )
    with torch.no_grad():
        states = model.encoder(
            pixel_values=(images - mean) / std, output_hidden_states=True
        ).hidden_states
        tokens = states[-1][:, 1:]  # all layers, no final norm, no class token
        cells = tokens.view(2, 3, 2, 2, 2, 16).permute(0, 1, 3, 2, 4, 5).reshape(2, 6, 64)
        normed = (
            cells
            / (cells.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            * model.adapter_mlp[0].weight
        )
        x = F.gelu(normed @ model.adapter_mlp[1].weight.T)
        for block in model.muse_blocks:
            x, semantic, _ = block(x, model.rotary(6, x.device))
        encoding = model.encode(images)
        latent = (
            (x @ model.to_latent.weight.T + model.to_latent.bias)
            .transpose(1, 2)
            .reshape(2, 8, 3, 2)
        )
    assert torch.allclose(encoding.semantic, semantic, atol=1e-5)
    assert torch.allclose(encoding.latent, latent, atol=1e-5)
    assert model.adapter_mlp[1].bias is None and model.to_latent.bias is not None


def test_decode_is_the_decoder_in_zero_to_one(model):
    latent = torch.randn(2, 8, 3, 2)
    with torch.no_grad():
        pixels = (model.decoder(latent) + 1) / 2  # x4 with this decoder
        assert pixels.shape == (2, 3, 12, 8)
        resized = F.interpolate(pixels, size=(48, 32), mode="bilinear")
        assert torch.allclose(model.decode(latent), resized, atol=1e-6)
        assert torch.allclose(model.decode(latent, size=(12, 8)), pixels, atol=1e-6)
        assert model.decode(latent, size=(7, 5)).shape == (2, 3, 7, 5)
        loud = tiny_model()
        loud.decoder.conv_out.bias.add_(torch.tensor([4.0, -4.0, 0.0]))
        assert torch.allclose(
            loud.decode(latent) - model.decode(latent),
            torch.tensor([2.0, -2.0, 0.0]).view(1, 3, 1, 1),
            atol=1e-5,
        )
    with pytest.raises(
        ValueError, match=r"latent must have shape \(B, 8, h, w\), got \(2, 4, 3, 2\)"
    ):
        model.decode(latent[:, :4])


def test_decode_of_encode_is_the_training_reconstruction(model):
    images = random_images(2, 32, 48)
    with torch.no_grad():
        assert torch.allclose(
            model(images).reconstruction,
            model.decode(model.encode(images).latent, size=(32, 48)),
            atol=1e-5,
        )


def test_embed_image_is_the_projected_mean_semantic_token(model):
    images = random_images(3, 32, 48)
    with torch.no_grad():
        embeds = model.embed_image(images)
        hidden = model.encode(images).semantic.mean(1) @ model.semantic_projector[0].weight.T
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        expected = hidden @ model.semantic_projector[2].weight.T
        assert torch.allclose(embeds, expected / expected.norm(dim=-1, keepdim=True), atol=1e-5)
        assert torch.allclose(embeds.norm(dim=-1), torch.ones(3), atol=1e-6)
        assert torch.allclose(model(images).image_embeds[-1], embeds, atol=1e-5)
    assert embeds.shape == (3, 16)


def test_features_by_kind(model):
    images = random_images(2, 37, 53)
    padded = F.pad(images, (0, 11, 0, 11), mode="replicate")
    with torch.no_grad():
        found = {kind: model.features(images, kind) for kind in FEATURES}
        encoding, raw = model.encode(padded), model.encoder_features(images)
    assert {kind: tuple(value.shape) for kind, value in found.items()} == {
        "semantic": (2, 32, 3, 4),
        "block": (2, 32, 3, 4),
        "latent": (2, 8, 3, 4),
        "encoder": (2, 16, 3, 4),
    }
    assert torch.allclose(
        found["semantic"].flatten(2).transpose(1, 2), encoding.semantic, atol=1e-5
    )
    assert torch.allclose(found["latent"], encoding.latent, atol=1e-5)
    from_block = (
        found["block"].flatten(2).transpose(1, 2) @ model.to_latent.weight.T + model.to_latent.bias
    )
    assert torch.allclose(from_block, encoding.latent.flatten(2).transpose(1, 2), atol=1e-5)
    assert raw.shape == (2, 16, 6, 8)
    assert torch.allclose(
        found["encoder"][0, :, 1, 2], raw[0, :, 2:4, 4:6].mean(dim=(1, 2)), atol=1e-6
    )
    with pytest.raises(
        ValueError, match="kind must be one of semantic, block, latent, encoder, got 'pixels'"
    ):
        model.features(images, "pixels")


def test_a_picture_does_not_see_its_batch(model):
    images = random_images(3, 32, 48)
    with torch.no_grad():
        together = [
            *model.encode(images, return_attention=True)[:3:2],
            model.reconstruct(images),
            model.embed_image(images),
        ]
        for index in range(3):
            one = images[index : index + 1]
            alone = [
                *model.encode(one, return_attention=True)[:3:2],
                model.reconstruct(one),
                model.embed_image(one),
            ]
            assert all(torch.allclose(a[index], b[0], atol=1e-5) for a, b in zip(together, alone))


def test_larger_pictures_interpolate_the_positions(model):
    """The encoder's positions are of its own size; elsewhere transformers interpolates them."""
    with torch.no_grad():
        embeddings = model.encoder.embeddings
        own = embeddings.interpolate_pos_encoding(torch.zeros(1, 17, 16), 32, 32)
        assert torch.equal(own, embeddings.position_embeddings)
        large = embeddings.interpolate_pos_encoding(torch.zeros(1, 6 * 10 + 1, 16), 48, 80)
    assert large.shape == (1, 61, 16)


# -------------------------------------------------------------------------------- the training pass
def test_forward_computes_what_is_asked_for(model):
    images = random_images(2, 32, 32)
    with torch.no_grad():
        whole, none = (
            model(images),
            model(images, topology=False, semantics=False, reconstruction=False),
        )
        encoder = model(images, encoder_only=True)
    assert (
        len(whole.log_topology) == 2
        and whole.image_embeds.shape == (2, 2, 16)
        and whole.reconstruction.shape == images.shape
    )
    assert (
        whole.encoder_tokens.shape == (2, 16, 4, 4)
        and whole.grid == (2, 2)
        and whole.anchors.shape == (2, 2, 32)
    )
    assert (
        none.log_topology == ()
        and none.image_embeds is None
        and none.reconstruction is None
        and none.latent is None
    )
    assert encoder.anchors is None and torch.equal(encoder.encoder_tokens, whole.encoder_tokens)
    assert (
        abs(whole.logit_scale.item() - 1 / 0.07) < 1e-4
        and abs(model.logit_scale.item() - 2.6592) < 1e-4
    )


def test_a_frozen_encoder_keeps_no_graph_and_the_rest_learns():
    model = tiny_model()
    model.encoder.requires_grad_(False)
    out = model(random_images(2, 32, 32))
    assert out.encoder_tokens.grad_fn is None and out.reconstruction.grad_fn is not None
    out.reconstruction.mean().backward()
    assert model.adapter_mlp[1].weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.encoder.parameters())


def test_grad_scale_halves_what_reaches_the_blocks_from_the_reconstruction_alone():
    images, gradients = random_images(2, 32, 32), {}
    for scale in (1.0, 0.5):
        model = tiny_model(grad_scale=scale)
        out = model(images)
        (out.reconstruction.square().mean() + out.log_topology[-1].exp().square().sum()).backward()
        gradients[scale] = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    assert gradients[1.0].keys() == gradients[0.5].keys()
    for name, whole in gradients[1.0].items():
        outside = not name.startswith(("encoder", "adapter_mlp", "muse_blocks"))
        own = outside or any(part in name for part in ("_topo", ".q_norm", ".k_norm"))
        assert torch.allclose(
            gradients[0.5][name], whole * (1.0 if own else 0.5), rtol=1e-4, atol=1e-8
        ), name


@pytest.mark.parametrize("half", [False, True])
def test_gradient_checkpointing_changes_no_output_and_no_gradient(half):
    images, given = random_images(2, 32, 32), []
    for mode in ("none", "blocks", "all", False, True):
        model = tiny_model(gradient_checkpointing=mode, isolate_streams=False).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = model(images)
        structure = sum(maps[..., 0].sum() for maps in out.log_topology)
        (out.reconstruction.square().mean() + out.image_embeds.sum() + structure).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        given.append({"reconstruction": out.reconstruction, "latent": out.latent, **gradients})
    for other in given[1:]:
        assert other.keys() == given[0].keys()
        for name, value in given[0].items():
            assert (value is None) == (other[name] is None), name
            assert value is None or torch.equal(value, other[name]), name


def test_gradient_checkpointing_repeats_the_random_numbers_of_the_forward_pass():
    """Dropout in the encoder, drawn once: what is recomputed must meet the same masks."""
    given = []
    for mode in ("none", "all"):
        config = {"hidden_dropout_prob": 0.5, "attention_dropout": 0.5}
        model = tiny_model(gradient_checkpointing=mode, encoder={"config": config}).train()
        torch.manual_seed(3)
        model(random_images(2, 32, 32)).reconstruction.square().mean().backward()
        gradients = [parameter.grad for parameter in model.encoder.parameters()]
        given.append([*(g for g in gradients if g is not None), torch.rand(3)])
    assert len(given[0]) == len(given[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*given))


def test_gradient_checkpointing_keeps_less_and_runs_again_what_it_says(monkeypatch):
    """`all` runs each decoder block and encoder layer twice a step, a frozen encoder's once."""
    kept, runs = {}, {}
    for mode, frozen in (("none", False), ("blocks", False), ("all", False), ("all", True)):
        model = tiny_model(gradient_checkpointing=mode, isolate_streams=False).train()
        model.encoder.requires_grad_(not frozen)
        counts = {"encoder": 0, "blocks": 0, "decoder": 0}

        def count(part, module, counts=counts):
            def hook(*_):
                counts[part] += 1

            module.register_forward_pre_hook(hook)

        count("encoder", model.encoder.encoder.layer[0].mlp)
        count("blocks", model.muse_blocks[0].mlp)
        count("decoder", model.decoder.up_blocks[0][1].conv1)
        with SavedTensors(model) as saved:
            out = model(random_images(2, 32, 32))
        kept[mode, frozen] = saved.bytes()
        out.reconstruction.square().mean().backward()
        runs[mode, frozen] = tuple(counts.values())
    assert runs == {
        ("none", False): (1, 1, 1),
        ("blocks", False): (1, 2, 1),
        ("all", False): (2, 2, 2),
        ("all", True): (1, 2, 2),
    }
    assert kept["all", True] < kept["all", False] < kept["blocks", False] < kept["none", False]


# ----------------------------------------------------------------------------------------- building
def test_the_same_seed_builds_the_same_weights_and_in_float32():
    assert all(
        torch.equal(a, b) for a, b in zip(tiny_model(5).parameters(), tiny_model(5).parameters())
    )
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert next(tiny_model().encoder.parameters()).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"encoder": {"config": {"hiden_size": 3}}},
            "unknown key model.encoder.config.hiden_size; did you mean hidden_size",
        ),
        ({"encoder": {"config": {"hidden_size": "wide"}}}, "model.encoder.config"),
        (
            {"decoder": {"config": {"latent_chanels": 3}}},
            "unknown key model.decoder.config.latent_chanels; did you mean latent_channels",
        ),
        (
            {"decoder": {"config": {"decoder_layers_per_block": [1]}}},
            "decoder_layers_per_block has 1 entries, but decoder_block_out_channels makes 3 stages",
        ),
        (
            {"decoder": {"config": {"decoder_block_types": "NoBlock"}}},
            "does not make an AutoencoderDC decoder",
        ),
    ],
)
def test_parts_that_cannot_be_built_say_why(change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        MUSE_ViT(merged(MODEL, change))
    assert "\n" not in str(caught.value)


def test_the_student_holds_no_teacher_and_its_names_are_the_contract_s(model):
    top = {name.split(".")[0] for name in model.state_dict()}
    assert top == {
        "encoder",
        "adapter_mlp",
        "muse_blocks",
        "to_latent",
        "semantic_projector",
        "logit_scale",
        "decoder",
    }
    assert not [name for name in model.state_dict() if "pixel_mean" in name or "teacher" in name]
