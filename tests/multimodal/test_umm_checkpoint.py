"""Saving and loading: everything, or without what is frozen and can be had from its source."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from muse.errors import CheckpointError
from muse.multimodal import MUSE_UMM
from muse.multimodal.umm_checkpoint import PARTS
from muse.multimodal.umm_stages import UMM_STAGES
from muse.stages import select_trainable
from tests.helpers import merged, random_images, tiny_model
from tests.multimodal.parts import UMM, filled


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("muse") / "tokenizer"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def from_sources(tokenizer_dir, internvl_dir, sana_dir):
    """`from_sources(**changes)`: a model whose parts all come from directories."""

    def make(**changes):
        config = merged(UMM, {"num_queries": 3}, changes)
        for part, folder in (
            ("tokenizer", tokenizer_dir),
            ("language_model", internvl_dir),
            ("generator", sana_dir),
        ):
            config[part] = {"source": str(folder), "config": {}}
        return MUSE_UMM(config).eval()

    return make


def same(one: MUSE_UMM, other: MUSE_UMM) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"connector": "llm_layers", "source_tokens": ["latent", "language"]},
        {"language_model": {"config": {"tie_word_embeddings": True}}},
    ],
)
def test_a_saved_model_is_the_same_model(make_umm, tmp_path, changes):
    umm = make_umm(changes)
    umm.save_pretrained(tmp_path / "model")
    loaded = MUSE_UMM.from_pretrained(tmp_path / "model")
    assert same(umm, loaded)
    images = random_images(2, 32, 32)
    texts = ["a cat", "a longer text"]
    assert torch.equal(loaded.generate(texts, steps=2), umm.generate(texts, steps=2))
    assert torch.equal(loaded.edit(images, texts, steps=2), umm.edit(images, texts, steps=2))
    assert loaded.answer(images, texts, 5) == umm.answer(images, texts, 5)
    assert not loaded.training


def test_a_directory_holds_safetensors_and_the_text_tokenizer(make_umm, tmp_path):
    umm = make_umm({"language_model": {"config": {"tie_word_embeddings": True}}})
    umm.save_pretrained(tmp_path / "model")
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    state = load_file(tmp_path / "model" / "model.safetensors")
    assert umm.state_dict().keys() - state.keys() == {"internvl.lm_head.weight"}  # tied: once


def test_parts_come_from_their_directories(from_sources, tokenizer_dir, internvl, sana_dir):
    umm = from_sources()
    assert torch.equal(
        umm.tokenizer.to_latent.weight,
        load_file(tokenizer_dir / "model.safetensors")["to_latent.weight"],
    )
    assert torch.equal(umm.internvl.lm_head.weight, internvl.lm_head.weight)
    weights = load_file(sana_dir / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(umm.generator.proj_out.weight, weights["proj_out.weight"])


def test_without_frozen_parts(from_sources, tmp_path):
    umm = from_sources()
    select_trainable(umm, UMM_STAGES["connector"].trainable)
    with torch.no_grad():
        umm.queries.add_(1)
    umm.save_pretrained(tmp_path / "whole")
    umm.save_pretrained(tmp_path / "small", frozen=False)

    saved = load_file(tmp_path / "small" / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == {
        "queries", "connector", "to_caption", "latent_scale",
    }  # fmt: skip
    for folder in ("whole", "small"):
        assert same(umm, MUSE_UMM.from_pretrained(tmp_path / folder))
    # A loaded model can leave the same parts out again.
    again = MUSE_UMM.from_pretrained(tmp_path / "small")
    select_trainable(again, UMM_STAGES["connector"].trainable)
    again.save_pretrained(tmp_path / "again", frozen=False)
    assert same(umm, MUSE_UMM.from_pretrained(tmp_path / "again"))
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == saved.keys()


@pytest.mark.parametrize(
    ("stage", "left_out"),
    [
        ("projector", {"tokenizer", "language_model", "generator"}),
        ("connector", set(PARTS)),
        ("connector_generator", {"tokenizer", "language_model", "projector"}),
        ("instructions", {"tokenizer", "language_model", "projector"}),
    ],
)
def test_a_part_that_learns_is_saved(from_sources, tmp_path, stage, left_out):
    umm = from_sources()
    select_trainable(umm, UMM_STAGES[stage].trainable)
    with torch.no_grad():
        for parameter in umm.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    assert set(umm.left_out(frozen=False)) == left_out
    umm.save_pretrained(tmp_path / "model", frozen=False)
    loaded = MUSE_UMM.from_pretrained(tmp_path / "model")
    assert same(umm, loaded)
    # In the next stage it is frozen again, but its source no longer has it.
    select_trainable(loaded, (r"^queries$",))
    assert set(loaded.left_out(frozen=False)) == left_out


def test_random_parts_are_always_saved(umm):
    assert umm.left_out(frozen=False) == []
    assert umm.portable_state(frozen=False).keys() == umm.state_dict().keys()


def test_a_source_that_has_changed_is_noticed(from_sources, tmp_path, tokenizer_dir):
    moved = tmp_path / "tokenizer"
    tiny_model().save_pretrained(moved)
    umm = from_sources()
    umm.sources["tokenizer"] = str(moved)
    select_trainable(umm, UMM_STAGES["connector"].trainable)
    umm.save_pretrained(tmp_path / "small", frozen=False)
    assert same(umm, MUSE_UMM.from_pretrained(tmp_path / "small"))
    filled(tiny_model(), seed=9).save_pretrained(moved)
    with pytest.raises(CheckpointError, match="its tokenizer is not the one with which"):
        MUSE_UMM.from_pretrained(tmp_path / "small")


def test_parts_are_frozen_from_the_start(umm):
    learns = {name.split(".")[0] for name, p in umm.named_parameters() if p.requires_grad}
    assert learns == {"queries", "connector", "to_caption", "generator"}


def test_directories_that_do_not_fit(umm, tmp_path):
    folder = tmp_path / "model"
    umm.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    queries = state.pop("queries")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing tensor \(queries\)"):
        MUSE_UMM.from_pretrained(folder)
    save_file({**state, "queries": queries[:2]}, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"queries has shape \(2, 32\), .* makes it \(5, 32\)"
    ):
        MUSE_UMM.from_pretrained(folder)

    config = json.loads((folder / "config.json").read_text())
    config["left_out"] = {"hat": "0"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**state, "queries": queries}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="leaves out hat, which is no part"):
        MUSE_UMM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="weights of the model not found"):
        MUSE_UMM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        MUSE_UMM.from_pretrained(tmp_path / "nowhere")
