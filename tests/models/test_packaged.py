"""Packaged models: found by name wherever a checkpoint is, 16 bits on disk, float32 in use."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from muse import CheckpointError, MUSE_ViT
from muse.config import load_config, model_config, shipped_config
from muse.models.internvit import build_encoder
from muse.models.loading import initial_model, load_model, weights_file
from muse.utils import weights
from tests.helpers import MODEL, tiny_model


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A shelf of packaged models that holds one, `small`, in float16; the model it was made of."""
    model = tiny_model(seed=3)
    folder = tmp_path / "shelf" / "small"
    folder.parent.mkdir()
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    save_file({k: v.half() for k, v in state.items()}, folder / "model.safetensors")
    monkeypatch.setattr(weights, "PACKAGED", folder.parent)
    return model, folder


def rounded(model):
    return {name: tensor.half().float() for name, tensor in model.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


def test_one_name_in_every_place(shelf):
    model, folder = shelf
    expected = rounded(model)
    config = model_config(MODEL)
    by_name = MUSE_ViT.from_pretrained("small")
    assert same(by_name.state_dict(), expected)
    assert {tensor.dtype for tensor in by_name.state_dict().values()} == {torch.float32}
    assert same(load_model("small", config).state_dict(), expected)
    assert weights_file("small") == folder / "model.safetensors"
    assert same(load_model(folder, config).state_dict(), expected)


def test_a_run_starts_from_it(shelf):
    cfg = load_config(shipped_config("muse_tiny/stage1.yaml"), ["experiment.init_from=small"])
    with pytest.raises(CheckpointError, match="another size"):
        initial_model(cfg)
    own = [f"model.{key}={value}" for key, value in MODEL.items() if isinstance(value, int)]
    cfg = load_config(shipped_config("default.yaml"), ["experiment.init_from=small", *own])
    assert same(initial_model(cfg).state_dict(), rounded(shelf[0]))


@pytest.mark.parametrize("source", ["small", "folder"])
def test_its_encoder_alone(shelf, source):
    model, folder = shelf
    encoder = build_encoder("small" if source == "small" else str(folder), {})
    expected = {
        name.removeprefix("encoder."): tensor
        for name, tensor in rounded(model).items()
        if name.startswith("encoder.")
    }
    assert same(encoder.state_dict(), expected)
    assert encoder.config.hidden_size == MODEL["encoder"]["config"]["hidden_size"]
    wide = {**MODEL["encoder"]["config"], "hidden_size": 32}
    with pytest.raises(CheckpointError, match="small|model"):
        build_encoder("small", wide)


def test_a_local_directory_of_that_name_is_named_by_its_path(shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tiny_model(seed=4)
    other.save_pretrained("small")
    assert same(MUSE_ViT.from_pretrained("./small").state_dict(), other.state_dict())
    assert same(MUSE_ViT.from_pretrained("small").state_dict(), rounded(shelf[0]))


def test_no_name_leaves_the_shelf(shelf):
    for name in ("", ".", "..", "../shelf/small", "small/", "nothing"):
        assert weights.packaged(name) is None
    with pytest.raises(CheckpointError, match="nothing: no such"):
        MUSE_ViT.from_pretrained("nothing")
