"""Attention teachers: the library's own attentions, cut to patches, whatever the source."""

import json

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from muse.errors import CheckpointError, ConfigError
from muse.models.internvit import build_encoder
from muse.models.layers import IMAGENET_MEAN, IMAGENET_STD
from muse.teachers import build_topology_teacher
from muse.teachers.base import choose_layers, evenly_spaced_layers
from muse.teachers.vit_attention import patch_attention

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
}
DINOS = {
    "dinov3_vit": SIZES | {"patch_size": 16, "num_register_tokens": 4},
    "dinov2": SIZES | {"patch_size": 14},
    "dinov2_with_registers": SIZES | {"patch_size": 14, "num_register_tokens": 2},
}


def dino(num_maps=2, **options):
    return build_topology_teacher(
        {"source": "random", "config": DINOS["dinov3_vit"]} | options, num_maps, (4, 3)
    )


def pictures(height=64, width=48, count=2):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def imagenet(images):
    return (images - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(
        3, 1, 1
    )


def own_attentions(network, pixels):
    """What transformers itself reports, with every layer eager."""
    network.set_attn_implementation("eager")
    with torch.no_grad():
        return network(pixel_values=pixels, output_attentions=True).attentions


def test_evenly_spaced_layers():
    assert evenly_spaced_layers(32, 6) == [5, 10, 15, 21, 26, 31]
    assert evenly_spaced_layers(12, 4) == [2, 5, 8, 11]
    assert evenly_spaced_layers(12, 1) == [11]
    assert evenly_spaced_layers(2, 6) == [0, 0, 0, 1, 1, 1]
    assert choose_layers([-1], 12, 3) == [11, 11, 11]
    assert choose_layers([0, -2], 12, 2) == [0, 10]


@pytest.mark.parametrize(
    "layers, message",
    [([0, 1], "2 layers for 3"), ([12], "0..11"), ([{"block": 1}], "layer numbers")],
)
def test_layers_that_cannot_be_are_named(layers, message):
    with pytest.raises(ConfigError, match=message):
        choose_layers(layers, 12, 3)


def test_patch_attention_drops_prefix_and_renormalises():
    weights = torch.tensor(
        [
            [
                [[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.6, 0.1, 0.3]],
                [[1.0, 0, 0], [0.8, 0.1, 0.1], [0.2, 0.4, 0.4]],
            ]
        ]
    )
    mean = patch_attention(weights, num_prefix=1)
    torch.testing.assert_close(
        mean, torch.tensor([[[[0.7 / 1.0, 0.3 / 1.0], [0.5 / 1.2, 0.7 / 1.2]]]])
    )
    heads = patch_attention(weights, num_prefix=1, heads="per_head")
    torch.testing.assert_close(heads[0, 1], torch.tensor([[0.5, 0.5], [0.5, 0.5]]))


@pytest.mark.parametrize("model_type", DINOS)
@pytest.mark.parametrize("heads", ["mean", "per_head"])
def test_maps_are_the_attentions_transformers_reports(model_type, heads):
    torch.manual_seed(0)
    teacher = dino(config=DINOS[model_type] | {"model_type": model_type}, heads=heads)
    patch = DINOS[model_type]["patch_size"]
    images = pictures(4 * patch, 3 * patch)
    target = teacher(images)
    assert target.grid == (4, 3) and teacher.layers == (1, 3)
    prefix = 1 + DINOS[model_type].get("num_register_tokens", 0)
    attentions = own_attentions(teacher.network, imagenet(images))
    for layer, found in zip((1, 3), target.maps):
        expected = attentions[layer][..., prefix:, prefix:]
        expected = expected.mean(1, keepdim=True) if heads == "mean" else expected
        expected = expected / expected.sum(-1, keepdim=True)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert found.dtype == torch.float32 and not found.requires_grad


def test_only_the_layers_asked_for_are_written_out():
    teacher = dino(num_maps=1)
    eager = [
        module.config._attn_implementation == "eager"
        for module in teacher.network.modules()
        if type(module).__name__ == "DINOv3ViTAttention"
    ]
    assert eager == [False, False, False, True]
    teacher(pictures())
    assert not any(module._forward_hooks for module in teacher.network.modules())


def test_image_sizes():
    images = pictures(70, 50)
    assert dino()(images).grid == (4, 3)  # 70 x 50 rounded to whole patches: 64 x 48
    assert dino(image_size=32)(images).grid == (2, 2)
    assert dino(image_size=[96, 32])(images).grid == (6, 2)
    assert dino(image_size="grid")(images).grid == (4, 3)  # the student's
    assert dino(num_maps=3, layers=[-1])(images).maps[0].shape == (2, 1, 12, 12)


def test_frozen_whatever_train_is_told():
    teacher = dino(
        config=DINOS["dinov3_vit"] | {"pos_embed_rescale": 2.0, "attention_dropout": 0.5}
    )
    parent = torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in parent[0].modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = pictures().requires_grad_()
    first, second = teacher(images), teacher(images)
    assert torch.equal(first.maps[0], second.maps[0]) and first.maps[0].grad_fn is None


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_local_directory_single_and_sharded(tmp_path, shard):
    torch.manual_seed(1)
    saved = dino()
    saved.network.save_pretrained(tmp_path, max_shard_size=shard)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "20KB")
    loaded = build_topology_teacher({"kind": "dinov3", "source": str(tmp_path)}, 2, None)
    for expected, found in zip(saved(pictures()).maps, loaded(pictures()).maps):
        assert torch.equal(expected, found)


def test_a_hub_id_is_read_from_the_checkpoint_directory(tmp_path, monkeypatch):
    torch.manual_seed(1)
    saved = dino()
    saved.network.save_pretrained(tmp_path / "dinov3-vith16plus-pretrain-lvd1689m")
    monkeypatch.setenv("CHECKPOINT_DIR", str(tmp_path))
    loaded = build_topology_teacher({}, 2, None)  # the default source
    for expected, found in zip(saved(pictures()).maps, loaded(pictures()).maps):
        assert torch.equal(expected, found)


def test_stored_normalisation_is_used(tmp_path):
    saved = dino()
    saved.network.save_pretrained(tmp_path)
    stored = {"image_mean": [0.4, 0.4, 0.4], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    loaded = build_topology_teacher({"source": str(tmp_path)}, 2, None)
    torch.testing.assert_close(
        loaded.normalise(torch.full((1, 3, 2, 2), 0.5)), torch.full((1, 3, 2, 2), 0.5)
    )


def test_incomplete_weights_are_refused(tmp_path):
    dino().network.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(key for key in state if "q_proj" in key)
    del state[name]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 of the network's tensors.*q_proj"):
        build_topology_teacher({"source": str(tmp_path)}, 2, None)


def test_refused_access_is_one_line_with_the_ways_out(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(CheckpointError) as error:
        build_topology_teacher({}, 6, (8, 8))
    message = str(error.value)
    assert (
        "gated repo" in message
        and "local directory" in message
        and "timm:" in message
        and "affinity" in message
    )
    assert "\n" not in message


def test_mistakes_are_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"unknown key teacher.topology.sorce; did you mean source\?"
    ):
        build_topology_teacher({"sorce": "x"}, 1)
    with pytest.raises(
        ConfigError, match="teacher.topology.kind must be one of none, dinov3, affinity"
    ):
        build_topology_teacher({"kind": "dino"}, 1)
    with pytest.raises(ConfigError, match="teacher.topology.heads"):
        dino(heads="all")
    with pytest.raises(ConfigError, match="image_size"):
        dino(image_size=[1, 2, 3])
    with pytest.raises(CheckpointError, match="config.json"):
        build_topology_teacher({"source": str(tmp_path)}, 1)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="'bert' model"):
        build_topology_teacher({"source": str(tmp_path)}, 1)
    with pytest.raises(ConfigError, match="timm:resnet18' is not a plain ViT"):
        build_topology_teacher({"source": "timm:resnet18", "config": {"pretrained": False}}, 1)
    with pytest.raises(CheckpointError, match="Unknown model"):
        build_topology_teacher({"source": "timm:vit_nowhere"}, 1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        dino()(pictures() * 255)
    assert build_topology_teacher({"kind": "none"}, 1) is None


def test_without_weights_the_architecture_is_the_same_and_no_weights_file_is_asked_for(tmp_path):
    ours = dino()
    ours.network.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        build_topology_teacher({"source": str(tmp_path)}, 2)
    with torch.device("meta"):
        made = build_topology_teacher({"source": str(tmp_path)}, 2, pretrained=False)
    assert {name: tensor.shape for name, tensor in made.state_dict().items()} == {
        name: tensor.shape for name, tensor in ours.state_dict().items()
    }
    assert made.layers == ours.layers and made.num_prefix == ours.num_prefix
    target = made(pictures().to("meta"))
    assert target.grid == (4, 3) and target.maps[0].is_meta
    assert target.maps[0].shape == ours(pictures()).maps[0].shape


def test_an_internvit_is_a_teacher_too(tmp_path):
    """The packaged encoder, and a directory: transformers' own attentions, cut to the patches."""
    teacher = build_topology_teacher({"source": "internvit:muse_tiny"}, 2, (8, 8))
    assert teacher.layers == (1, 3) and not teacher.network.training
    images = pictures(64, 48)
    target = teacher(images)
    assert target.grid == (8, 6)  # patches of 8 pixels
    build_encoder("muse_tiny", {}).save_pretrained(tmp_path)
    network = transformers.InternVLVisionModel.from_pretrained(tmp_path).eval()
    attentions = own_attentions(network, imagenet(images))
    for layer, found in zip((1, 3), target.maps):
        expected = attentions[layer][..., 1:, 1:].mean(1, keepdim=True)
        expected = expected / expected.sum(-1, keepdim=True)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        build_topology_teacher({"source": "internvit:nowhere"}, 2)


# --------------------------------------------------------------------------------------------- timm
TIMM_DINOV3 = {
    "pretrained": False,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 1.5,
    "img_size": 64,
}


def copied_to_timm(state, depth):
    """A transformers DINOv3 state dict under timm's names."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "reg_token",
        "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    }
    copied = {new: state[old] for old, new in names.items()}
    parts = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attention.o_proj": "attn.proj",
        "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2",
    }
    for index in range(depth):
        old, new = (
            next(key for key in state if key.endswith(f"layer.{index}.norm1.weight"))[:-12],
            f"blocks.{index}.",
        )
        for source, goal in parts.items():
            for kind in ("weight", "bias"):
                copied[f"{new}{goal}.{kind}"] = state[f"{old}{source}.{kind}"]
        copied[f"{new}attn.qkv.weight"] = torch.cat(
            [state[f"{old}attention.{part}_proj.weight"] for part in "qkv"]
        )
        for number in (1, 2):
            copied[f"{new}gamma_{number}"] = state[f"{old}layer_scale{number}.lambda1"]
    return copied


def test_timm_dinov3_with_the_same_weights_gives_the_maps_of_transformers():
    torch.manual_seed(2)
    ours = dino(
        config=DINOS["dinov3_vit"] | {"query_bias": False, "key_bias": False, "value_bias": False}
    )
    theirs = build_topology_teacher(
        {"source": "timm:vit_small_patch16_dinov3", "config": TIMM_DINOV3}, 2, None
    )
    with torch.no_grad():
        for parameter in ours.network.parameters():
            parameter.normal_(std=0.3)
    report = theirs.network.load_state_dict(
        copied_to_timm(ours.network.state_dict(), 4), strict=False
    )
    assert not report.unexpected_keys and not [
        key for key in report.missing_keys if "bias" not in key
    ]
    images = pictures()
    for expected, found in zip(ours(images).maps, theirs(images).maps):
        assert expected.std() > 0.01  # mean .083: far from uniform
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)


def test_timm_vit_against_a_hand_computation(tmp_path):
    config = {
        "pretrained": False,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 2,
        "img_size": 32,
        "qk_norm": True,
    }
    torch.manual_seed(3)
    options = {"source": "timm:vit_tiny_patch16_224", "config": config, "image_size": 48}
    teacher = build_topology_teacher(options, 3, None)
    seen = {}
    attention = teacher.network.blocks[1].attn
    handle = attention.register_forward_hook(
        lambda module, inputs, output: seen.update(x=inputs[0])
    )
    found = teacher(pictures(48, 48)).maps[1]
    handle.remove()
    x, width = seen["x"], 24
    q, k, _ = (x @ attention.qkv.weight.T + attention.qkv.bias).split(width, dim=-1)
    q, k = (part.view(2, 10, 2, 12) for part in (q, k))
    q, k = attention.q_norm(q), attention.k_norm(k)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 12**0.5
    expected = scores.softmax(-1)[..., 1:, 1:].mean(1, keepdim=True)
    torch.testing.assert_close(
        found, expected / expected.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5
    )


def test_timm_vit_of_one_size_sees_that_size():
    config = {"pretrained": False, "embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32}
    for size in (None, 32):
        options = {"source": "timm:beitv2_base_patch16_224", "config": config, "image_size": size}
        assert build_topology_teacher(options, 1, None)(pictures(48, 64)).grid == (2, 2)


def test_timm_directory(tmp_path):
    torch.manual_seed(4)
    config = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **config)
    timm.models.save_for_hf(network, tmp_path, model_args=config, safe_serialization=True)
    teacher = build_topology_teacher({"source": str(tmp_path)}, 1, None)
    assert all(
        torch.equal(value, teacher.network.state_dict()[key])
        for key, value in network.state_dict().items()
    )
    assert teacher(pictures(32, 64)).grid == (2, 4)
    assert timm.is_model(
        "vit_huge_plus_patch16_dinov3"
    )  # the name that error messages and docs give
