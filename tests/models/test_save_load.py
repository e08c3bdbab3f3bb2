"""Saving and loading: bit for bit, whole or not at all, and every form of checkpoint through one
door.
"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from muse import CheckpointError, MUSE_ViT
from muse.config import load_config, model_config
from muse.models import pretrained
from muse.models.loading import EMA_FILE, initial_model, load_model, weights_file
from muse.utils.io import atomic_directory
from tests.helpers import MODEL, merged, random_images, tiny_model

FILES = ["README.md", "config.json", "model.safetensors"]  # the first is the card


def equal(left, right) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def saved(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


# --------------------------------------------------------------------------------------- round trip
def test_round_trip_is_bit_equal_and_in_eval_mode(saved):
    model, folder = saved
    again = MUSE_ViT.from_pretrained(folder, device="cpu")
    assert equal(model, again) and not again.training
    images = random_images(2, 37, 53)
    with torch.no_grad():
        assert torch.equal(model.reconstruct(images), again.reconstruct(images))
        assert torch.equal(model.embed_image(images), again.embed_image(images))
    assert sorted(os.listdir(folder)) == FILES
    again.save_pretrained(folder.parent / "second")
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (folder.parent / "second" / name).read_bytes()


def test_config_json_spells_out_both_parts_and_keeps_the_switches(tmp_path):
    model = tiny_model(routing="release", isolate_streams=True, unshuffle=1)
    model.save_pretrained(tmp_path / "model")
    section = json.loads((tmp_path / "model/config.json").read_text())["model"]
    assert (
        section["routing"] == "release"
        and section["isolate_streams"] is True
        and section["unshuffle"] == 1
    )
    assert (
        section["encoder"]["source"] == "random"
        and section["encoder"]["config"]["hidden_size"] == 16
    )
    assert section["decoder"]["config"]["decoder_block_out_channels"] == [8, 8, 8]
    again = MUSE_ViT.from_pretrained(tmp_path / "model").config
    assert (again.routing, again.isolate_streams, again.shield_attention, again.join_semantics) == (
        "release",
        True,
        True,
        False,
    )


def test_weights_loaded_in_half_precision_come_back_as_the_model_s(saved):
    _, folder = saved
    half = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(half, folder / "model.safetensors")
    again = MUSE_ViT.from_pretrained(folder)
    assert all(parameter.dtype == torch.float32 for parameter in again.parameters())
    assert torch.equal(again.to_latent.weight, half["to_latent.weight"].float())


# ----------------------------------------------------------------------------------- atomic writing
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("a bug"), KeyboardInterrupt()]
)
def test_a_write_that_fails_leaves_the_old_directory_whole(saved, error, monkeypatch):
    model, folder = saved
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def fail(target, state, config=None):
        (target / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(pretrained, "write_weights", fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)) as caught:
        tiny_model(1).save_pretrained(folder)
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    assert os.listdir(folder.parent) == ["model"]  # no leftovers beside it
    assert equal(model, MUSE_ViT.from_pretrained(folder))


def test_saving_over_an_old_directory_replaces_it_whole(saved):
    _, folder = saved
    (folder / "stale.txt").write_text("from before")
    other = tiny_model(7)
    other.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == FILES and os.listdir(folder.parent) == ["model"]
    assert equal(other, MUSE_ViT.from_pretrained(folder))


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="exists and is not a directory"):
        tiny_model().save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        tiny_model().save_pretrained(tmp_path / "file" / "below")
    with atomic_directory(tmp_path / "deep" / "new") as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "deep/new/a").read_text() == "1" and (
        tmp_path / "deep/new"
    ).stat().st_mode & 0o777 == 0o755


# ------------------------------------------------------------------------------- what does not load
def test_directories_that_are_no_model(saved, tmp_path):
    _, folder = saved
    with pytest.raises(CheckpointError, match="no such directory, and not a hub id"):
        MUSE_ViT.from_pretrained(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no config.json"):
        MUSE_ViT.from_pretrained(tmp_path / "empty")
    for text in ("{", "[]", "{}", '{"model": 3}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="not the config.json of a MUSE model"):
            MUSE_ViT.from_pretrained(folder)


def test_weights_that_are_missing_broken_or_of_another_model(saved):
    model, folder = saved
    file = folder / "model.safetensors"
    whole, state = file.read_bytes(), load_file(file)
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        MUSE_ViT.from_pretrained(folder)
    file.unlink()
    with pytest.raises(
        CheckpointError, match="weights of the model not found: .*model.safetensors"
    ):
        MUSE_ViT.from_pretrained(folder)
    save_file({name: tensor for name, tensor in state.items() if name != "to_latent.bias"}, file)
    with pytest.raises(CheckpointError, match="to_latent.bias"):
        MUSE_ViT.from_pretrained(folder)
    save_file({**state, "extra.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="extra.weight"):
        MUSE_ViT.from_pretrained(folder)
    save_file({**state, "to_latent.bias": torch.zeros(9)}, file)
    with pytest.raises(
        CheckpointError,
        match=r"to_latent.bias has shape \(9,\), the model makes it \(8,\): .* another size",
    ):
        MUSE_ViT.from_pretrained(folder)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        CheckpointError,
        match="someone/some-model: neither a local directory nor reachable on the hub",
    ) as caught:
        MUSE_ViT.from_pretrained("someone/some-model")
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- one door for all forms
def test_load_model_takes_every_form(saved, tmp_path):
    model, folder = saved
    assert equal(model, load_model(folder, MODEL))
    assert equal(model, load_model(folder / "model.safetensors", MODEL))
    save_file(model.state_dict(), tmp_path / "elsewhere.safetensors")
    assert equal(model, load_model(tmp_path / "elsewhere.safetensors", MODEL))
    assert weights_file(folder) == folder / "model.safetensors"


def test_a_training_checkpoint_gives_its_running_means(saved):
    model, folder = saved
    save_file({"to_latent.bias": torch.full((8,), 5.0)}, folder / EMA_FILE)
    loaded = load_model(folder, MODEL)
    assert torch.equal(loaded.to_latent.bias, torch.full((8,), 5.0)) and torch.equal(
        loaded.to_latent.weight, model.to_latent.weight
    )
    assert weights_file(folder) == folder / EMA_FILE


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 64}, "another size: its model.dim is 32, the configuration says 64"),
        ({"num_blocks": 3}, "its model.num_blocks is 2, the configuration says 3"),
        ({"unshuffle": 1}, "its model.unshuffle is 2"),
        (
            {"encoder": {"config": {"hidden_size": 32}}},
            "its model.encoder.config.hidden_size is 16, the configuration says 32",
        ),
        (
            {"decoder": {"config": {"decoder_block_out_channels": [8, 8, 16]}}},
            "its model.decoder.config.decoder_block_out_channels",
        ),
        (
            {"routing": "release"},
            "trained with model.routing=paper, the configuration says release",
        ),
        ({"join_semantics": False}, "trained with model.join_semantics=True"),
    ],
)
def test_a_directory_that_contradicts_the_configuration(saved, changes, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(saved[1], merged(MODEL, changes))
    assert "\n" not in str(caught.value)


def test_sizes_given_as_a_number_or_a_pair_are_the_same(saved):
    model, folder = saved
    assert equal(
        model,
        load_model(
            folder, merged(MODEL, {"encoder": {"config": {"image_size": 32, "patch_size": 8}}})
        ),
    )


def test_a_weights_file_of_another_size(saved):
    with pytest.raises(CheckpointError, match="another size"):
        load_model(saved[1] / "model.safetensors", merged(MODEL, {"dim": 64}))


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="none: no such checkpoint"):
        load_model(tmp_path / "none", MODEL)
    with pytest.raises(
        CheckpointError, match="holds neither model.safetensors nor ema.safetensors"
    ):
        load_model(tmp_path, MODEL)


# ---------------------------------------------------------------------------------------- hand-over
def test_initial_model_takes_a_run_its_newest_checkpoint_or_a_directory(saved, tmp_path):
    model, folder = saved

    def start(source):
        (tmp_path / "c.yaml").write_text(
            json.dumps(
                {
                    "model": MODEL,
                    "experiment": {"init_from": str(source)},
                    "dataset": {"preprocessing": {"crop_size": 32}},
                }
            )
        )
        return initial_model(load_config(tmp_path / "c.yaml"))

    assert equal(model, start(folder))
    run = tmp_path / "run"
    for step in (9, 100):
        tiny_model(step).save_pretrained(run / f"checkpoint-{step}")
    assert equal(tiny_model(100), start(run))
    model.save_pretrained(run / "final")
    assert equal(model, start(run))
    with pytest.raises(
        CheckpointError,
        match="experiment.init_from=.*no such checkpoint; run the stage before this one",
    ):
        start(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        start(tmp_path / "empty")


def test_hand_over_may_change_the_routing_switches_of_the_next_stage(saved, tmp_path):
    """Stage 3 opens the streams: a difference in training alone is no contradiction."""
    loaded = load_model(
        saved[1],
        merged(MODEL, {"isolate_streams": False, "grad_scale": 0.5, "shield_attention": False}),
    )
    assert loaded.config.isolate_streams is False and not loaded.muse_blocks[0].isolate_streams
    assert model_config(MODEL).isolate_streams is True
