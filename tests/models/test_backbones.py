"""Encoder and decoder from local directories in every layout, against transformers' and diffusers'
own classes.
"""

import json
import re
import shutil
import socket

import pytest
import safetensors
import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

from muse import MUSE_ViT
from muse.errors import CheckpointError, ConfigError
from muse.models.dc_ae import build_decoder
from muse.models.internvit import build_encoder, internvit_to_transformers
from muse.utils.weights import TensorFiles, locate
from tests.helpers import DECODER, ENCODER, MODEL, ROOT, merged, random_images

TEXT = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
DECODER_DIR = {
    **DECODER,
    "encoder_block_types": "ResBlock",
    "encoder_block_out_channels": [8, 8, 8],
    "encoder_layers_per_block": [1, 1, 1],
    "encoder_qkv_multiscales": [[], [], []],
}


def filled(module, seed: int = 0):
    """Every tensor random, so that no two are alike and no norm is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.fixture(scope="module")
def full_model():
    """A small whole InternVL: vision tower, projector, language model."""
    return filled(
        InternVLForConditionalGeneration(
            InternVLConfig(vision_config=dict(ENCODER), text_config=dict(TEXT))
        )
    )


@pytest.fixture(scope="module")
def tower(full_model):
    return full_model.model.vision_tower


def original_layout(tower) -> dict[str, torch.Tensor]:
    """The tower's weights as the original InternViT stores them, written out by hand."""
    old = {}
    weights = {name: tensor.detach().clone() for name, tensor in tower.state_dict().items()}
    old["embeddings.class_embedding"] = weights["embeddings.cls_token"]
    old["embeddings.position_embedding"] = weights["embeddings.position_embeddings"]
    for kind in ("weight", "bias"):
        old[f"embeddings.patch_embedding.{kind}"] = weights[
            f"embeddings.patch_embeddings.projection.{kind}"
        ]
        for layer in range(2):
            here, there = f"encoder.layer.{layer}", f"encoder.layers.{layer}"
            old[f"{there}.attn.qkv.{kind}"] = torch.cat(
                [weights[f"{here}.attention.{part}_proj.{kind}"] for part in "qkv"]
            )
            old[f"{there}.attn.proj.{kind}"] = weights[f"{here}.attention.projection_layer.{kind}"]
            old[f"{there}.norm1.{kind}"] = weights[f"{here}.layernorm_before.{kind}"]
            old[f"{there}.norm2.{kind}"] = weights[f"{here}.layernorm_after.{kind}"]
            for part in ("fc1", "fc2"):
                old[f"{there}.mlp.{part}.{kind}"] = weights[f"{here}.mlp.{part}.{kind}"]
    for layer in range(2):
        old[f"encoder.layers.{layer}.ls1"] = weights[f"encoder.layer.{layer}.lambda_1"]
        old[f"encoder.layers.{layer}.ls2"] = weights[f"encoder.layer.{layer}.lambda_2"]
    return {f"vision_model.{name}": tensor for name, tensor in old.items()}


ORIGINAL_CONFIG = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "auto_map": {"AutoModel": "modeling.InternVLChatModel"},
    "llm_config": {"hidden_size": 32},
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": 16,
        "image_size": 32,
        "patch_size": 8,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "use_flash_attn": True,
        "drop_path_rate": 0.0,
        "initializer_factor": 1.0,
    },
}
LANGUAGE = {
    "language_model.model.embed_tokens.weight": (7, 3),
    "language_model.lm_head.weight": (5, 11),
    "mlp1.1.weight": (2, 2),
}


def write_original(tower, folder, shards: int = 1):
    """A directory as the authors of InternVL publish it, in `shards` files; the language model's
    tensors have impossible sizes.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    state = {
        **{name: torch.zeros(shape) for name, shape in LANGUAGE.items()},
        **original_layout(tower),
    }
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    names, where = sorted(state), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: state[name] for name in part}, folder / file)
        where.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    return folder


@pytest.fixture
def reads(monkeypatch):
    """Names of the tensors that were really read from safetensors files."""
    names, real = [], safetensors.safe_open

    class Handle:
        def __init__(self, *args, **kwargs):
            self.handle = real(*args, **kwargs)

        def keys(self):
            return self.handle.keys()

        def get_tensor(self, name):
            names.append(name)
            return self.handle.get_tensor(name)

    monkeypatch.setattr(safetensors, "safe_open", Handle)
    return names


def hold_encoder(encoder, tower) -> None:
    """Equal to transformers' own class, run on the same weights, up to the last layer (no final
    norm).
    """
    images = random_images(2, 48, 32)
    with torch.no_grad():
        ours = encoder(pixel_values=images).last_hidden_state
        theirs = tower(pixel_values=images, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------------------------ encoder
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_encoder_from_a_whole_internvl_of_transformers(
    full_model, tower, tmp_path, reads, shard_size
):
    full_model.save_pretrained(tmp_path / "internvl", max_shard_size=shard_size)
    assert (len(list((tmp_path / "internvl").glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    hold_encoder(build_encoder(str(tmp_path / "internvl"), {}), tower)
    assert (
        reads and all("vision_tower." in name for name in reads) and len(reads) == len(set(reads))
    )


def test_encoder_from_the_tower_alone(tower, tmp_path):
    tower.save_pretrained(tmp_path / "tower")
    hold_encoder(build_encoder(str(tmp_path / "tower"), {}), tower)


@pytest.mark.parametrize("shards", [1, 3])
def test_encoder_from_the_original_layout(tower, tmp_path, reads, shards):
    folder = write_original(tower, tmp_path / "internvl", shards)
    hold_encoder(build_encoder(str(folder), {}), tower)
    assert len(reads) == len(original_layout(tower)) and all(
        name.startswith("vision_model.") for name in reads
    )


def test_a_hub_id_is_read_from_checkpoint_dir(tower, autoencoder, tmp_path, monkeypatch):
    """`$CHECKPOINT_DIR/InternVL3-1B`, the original layout, stands for its -hf, and so on."""
    source = "OpenGVLab/InternVL3-1B-hf"
    write_original(tower, tmp_path / "InternVL3-1B")
    autoencoder.save_pretrained(tmp_path / "dc-ae-f32c32-sana-1.1-diffusers")
    monkeypatch.setenv("CHECKPOINT_DIR", str(tmp_path))
    hold_encoder(build_encoder(source, {}), tower)
    decoder, _ = build_decoder("mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers", {})
    latent = torch.randn(2, 8, 3, 2)
    with torch.no_grad():
        assert torch.equal(decoder(latent), autoencoder.decode(latent).sample)
    tower.save_pretrained(tmp_path / "InternVL3-1B-hf")
    assert locate(source) == tmp_path / "InternVL3-1B-hf"  # its own name comes first
    with pytest.raises(CheckpointError, match="InternVL3-2B-hf: neither a local directory nor"):
        locate("OpenGVLab/InternVL3-2B-hf")


def test_encoder_configuration_given_stands_over_the_directory_s(tower, tmp_path):
    folder = write_original(tower, tmp_path / "internvl")
    (folder / "config.json").unlink()
    hold_encoder(build_encoder(str(folder), ENCODER), tower)
    with pytest.raises(
        CheckpointError, match=r"has shape .*, the model makes it .*: a checkpoint of another size"
    ) as caught:
        build_encoder(str(folder), {**ENCODER, "intermediate_size": 48})
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"missing tensors \(the first is encoder.layer.2"):
        build_encoder(str(folder), {**ENCODER, "num_hidden_layers": 3})


def test_half_precision_files_are_read_as_float32(tower, tmp_path):
    folder = write_original(tower, tmp_path / "internvl")
    file = folder / "model.safetensors"
    half = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    save_file(half, file)
    encoder = build_encoder(str(folder), {})
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())
    assert torch.equal(
        encoder.embeddings.cls_token, half["vision_model.embeddings.class_embedding"].float()
    )


def test_names_of_the_original_layout():
    assert internvit_to_transformers("encoder.layers.3.attn.qkv.bias") == [
        f"encoder.layer.3.attention.{part}_proj.bias" for part in "qkv"
    ]
    assert internvit_to_transformers("encoder.layers.11.norm2.weight") == [
        "encoder.layer.11.layernorm_after.weight"
    ]
    assert internvit_to_transformers("encoder.layers.0.attn.q_norm.weight") == [
        "encoder.layer.0.attention.q_norm.weight"
    ]
    assert internvit_to_transformers("encoder.layers.0.mlp.fc1.weight") == [
        "encoder.layer.0.mlp.fc1.weight"
    ]


# ------------------------------------------------------------------------------------------ decoder
@pytest.fixture(scope="module")
def autoencoder():
    return filled(AutoencoderDC(**DECODER_DIR))


@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
def test_decoder_from_a_diffusers_directory(autoencoder, tmp_path, reads, shard_size):
    autoencoder.save_pretrained(tmp_path / "dcae", max_shard_size=shard_size)
    assert (len(list((tmp_path / "dcae").glob("*.safetensors"))) > 1) == (shard_size == "10KB")
    decoder, fields = build_decoder(str(tmp_path / "dcae"), {})
    latent = torch.randn(2, 8, 3, 2)
    with torch.no_grad():
        assert torch.equal(decoder(latent), autoencoder.decode(latent).sample)
    assert fields["latent_channels"] == 8 and list(fields["decoder_block_out_channels"]) == [
        8,
        8,
        8,
    ]
    assert all(name.startswith("decoder.") for name in reads)  # the encoder half is never read


def test_the_student_from_both_directories(tower, autoencoder, tmp_path):
    write_original(tower, tmp_path / "internvl")
    autoencoder.save_pretrained(tmp_path / "dcae")
    sources = {
        "encoder": {"source": str(tmp_path / "internvl")},
        "decoder": {"source": str(tmp_path / "dcae")},
    }
    model = MUSE_ViT({**MODEL, **sources}).eval()
    latent = torch.randn(1, 8, 2, 2)
    with torch.no_grad():
        assert torch.equal(
            model.decode(latent, size=(8, 8)), (autoencoder.decode(latent).sample + 1) / 2
        )
    # Saved, it needs its sources no more.
    model.save_pretrained(tmp_path / "muse")
    shutil.rmtree(tmp_path / "internvl")
    shutil.rmtree(tmp_path / "dcae")
    again = MUSE_ViT.from_pretrained(tmp_path / "muse")
    images = random_images(1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.reconstruct(images), model.reconstruct(images))


def test_a_latent_of_another_width_gets_an_adapter(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path / "dcae")
    model = MUSE_ViT(
        {**MODEL, "latent_dim": 5, "decoder": {"source": str(tmp_path / "dcae")}}
    ).eval()
    assert model.decoder_adapter.weight.shape == (8, 5, 1, 1)
    latent = torch.randn(1, 5, 2, 2)
    with torch.no_grad():
        widened = torch.einsum(
            "oc,bchw->bohw", model.decoder_adapter.weight[..., 0, 0], latent
        ) + model.decoder_adapter.bias.view(1, -1, 1, 1)
        assert torch.allclose(
            model.decode(latent, (8, 8)), (autoencoder.decode(widened).sample + 1) / 2, atol=1e-5
        )
    model.save_pretrained(tmp_path / "muse")
    with torch.no_grad():
        assert torch.equal(
            MUSE_ViT.from_pretrained(tmp_path / "muse").decode(latent), model.decode(latent)
        )


# ------------------------------------------------------------------------------- what does not load
BUILDERS = {"encoder": build_encoder, "decoder": build_decoder}


@pytest.mark.parametrize("part", BUILDERS)
def test_sources_that_are_missing_or_broken(part, tmp_path, monkeypatch):
    build = BUILDERS[part]

    def refused(words, source=tmp_path / "dir", config=None):
        with pytest.raises(CheckpointError, match=words) as caught:
            build(str(source), config or {})
        assert "\n" not in str(caught.value)

    refused("no such directory, and not a hub id", tmp_path / "none")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("owner/name: neither a local directory nor reachable on the hub", "owner/name")
    (tmp_path / "dir").mkdir()
    refused("holds no config.json")
    for text in ("{ half", "[1, 2]", "3"):
        (tmp_path / "dir/config.json").write_text(text)
        refused("config.json")
    config = ENCODER if part == "encoder" else DECODER
    (tmp_path / "dir/config.json").write_text(json.dumps(config))
    refused("holds no .safetensors file")
    (tmp_path / "dir/model.safetensors").write_bytes(b"not one")
    refused("model.safetensors: not a readable safetensors file")
    save_file({"language_model.weight": torch.zeros(2)}, tmp_path / "dir/model.safetensors")
    refused(r"[0-9]+ missing tensors \(the first is")
    index = tmp_path / "dir/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    refused("the index names model-00001-of-00002.safetensors, which is missing")
    for text in ("{ half", "{}", "[]", '{"weight_map": [1]}'):
        index.write_text(text)
        refused("index.json")


def test_a_path_with_one_slash_that_is_absent_is_not_taken_for_a_hub_id(tmp_path):
    for source in (str(tmp_path / "x"), "./owner/name", "~/owner/name", "name", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such directory"):
            locate(source, [])
    assert locate(str(tmp_path), []) == tmp_path


def test_a_file_by_itself_and_lazily(tower, tmp_path, reads):
    save_file(original_layout(tower), tmp_path / "one.safetensors")
    files = TensorFiles(tmp_path / "one.safetensors")
    assert len(files.keys()) == len(original_layout(tower)) and not reads
    assert files["vision_model.encoder.layers.0.ls1"].shape == (16,) and reads == [
        "vision_model.encoder.layers.0.ls1"
    ]


def test_unknown_fields_of_a_part_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown key model.encoder.config.depth"):
        build_encoder("random", {"depth": 3})
    with pytest.raises(ConfigError, match="unknown key model.decoder.config.depth"):
        build_decoder("random", {"depth": 3})


def test_no_remote_code_and_no_unsafe_pickle_anywhere():
    files = [
        file for folder in ("muse", "scripts", "tools") for file in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 50
    for file in files:
        text = file.read_text()
        assert not re.search(r"trust_remote_code\s*=\s*True", text), file
        for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text):
            assert "weights_only=True" in call, (file, call)


def test_random_parts_need_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    MUSE_ViT(merged(MODEL))
