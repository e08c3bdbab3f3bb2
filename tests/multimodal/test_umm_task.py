"""Training through the one trainer: what moves, what is written, and a resume to the bit."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from muse.errors import CheckpointError, ConfigError
from muse.multimodal import MUSE_UMM
from muse.multimodal.umm_loading import open_umm
from muse.multimodal.umm_run_config import load_umm_config
from muse.multimodal.umm_task import UmmTask, train_umm
from muse.training.checkpointer import read_tree
from muse.training.trainer import Trainer
from tests.helpers import tiny_model
from tests.multimodal.runs import mixture, write_kinds, write_umm_config
from tests.training.helpers import same_tree
from tools.killing import records

TENSORS = ("model.safetensors", "ema.safetensors", "state.safetensors", "rank-0.safetensors")
WATCHED = {"experiment": {"eval_every": 2, "generate_every": 4, "log_grad_every": 2}}
QUESTIONS = {
    "training": {"stage": "projector"},
    "model": {"source_tokens": ["encoder"]},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    write_kinds(folder)
    return folder


@pytest.fixture
def settings(data, tmp_path, text_tokenizer_dir):
    """`settings(*changes, output=...)` -> the configuration of a run below `tmp_path`."""

    def make(*changes, output="run"):
        path = tmp_path / f"{len(list(tmp_path.glob('*.yaml')))}.yaml"
        write_umm_config(path, data, tmp_path / output, text_tokenizer_dir, *changes)
        return load_umm_config(path)

    return make


@pytest.fixture
def from_sources(internvl_dir, sana_dir, tmp_path):
    """Changes of a configuration: every part comes from a directory."""
    tiny_model().save_pretrained(tmp_path / "tokenizer")
    return {
        "model": {
            "tokenizer": {"source": str(tmp_path / "tokenizer")},
            "language_model": {"source": str(internvl_dir)},
            "generator": {"source": str(sana_dir)},
        }
    }


def questions_of(data) -> dict:
    return {
        "dataset": {
            "params": {
                "train_shards_path_or_url": mixture(data, {"question": 1.0}),
                "eval_shards_path_or_url": mixture(data, {"question": 1.0}, "val"),
            }
        }
    }


def hold_equal(left, right) -> None:
    """Two checkpoint directories with the same tensors, generators, data position and counters."""
    assert sorted(os.listdir(left)) == sorted(os.listdir(right))
    for name in TENSORS:
        a, b = load_file(left / name), load_file(right / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    assert (left / "rank-0.json").read_text() == (right / "rank-0.json").read_text()
    states = [
        {key: value for key, value in read_tree(path, "state").items() if key != "config"}
        for path in (left, right)
    ]
    assert same_tree(*states)


# ------------------------------------------------------------------------------------- resuming
CASES = {
    "both kinds": {},
    "one worker, accumulation": {
        "dataset": {"params": {"num_workers_per_gpu": 1}},
        "training": {"gradient_accumulation_steps": 2},
    },
    "latent tokens": {"model": {"source_tokens": ["latent", "encoder"]}},
    "tied head, everything learns": {
        "model": {"language_model": {"config": {"tie_word_embeddings": True}}},
        "training": {"trainable": ["^internvl", "^queries", "^connector", "^generator"]},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_two_steps_and_two_more_equal_four(case, settings, tmp_path):
    train_umm(settings(CASES[case], WATCHED, output="whole"))
    hold_a_resume(settings, CASES[case], tmp_path)


def test_a_run_of_questions_is_resumed(settings, data, tmp_path):
    case = {**QUESTIONS, **questions_of(data)}
    train_umm(settings(case, WATCHED, output="whole"))
    hold_a_resume(settings, case, tmp_path)


def test_a_run_from_sources_is_resumed_though_its_checkpoints_hold_less(
    settings, from_sources, tmp_path
):
    train_umm(settings(from_sources, WATCHED, output="whole"))
    hold_a_resume(settings, from_sources, tmp_path)


def hold_a_resume(settings, case, tmp_path) -> None:
    """The run `whole`, begun anew from its checkpoint-2 in another process's state, is itself."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(whole / "checkpoint-2", broken / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", broken)
    torch.manual_seed(99)
    train_umm(settings(case, WATCHED, output="broken"))
    hold_equal(whole / "checkpoint-4", broken / "checkpoint-4")
    assert load_file(whole / "final/model.safetensors").keys() == (
        MUSE_UMM.from_pretrained(broken / "final").portable_state().keys()
    )
    for line, again in zip(records(whole), records(broken), strict=True):
        assert line == again


# -------------------------------------------------------------------------- what a run leaves
def test_a_checkpoint_holds_what_moves_and_final_everything(settings, from_sources, tmp_path):
    train_umm(settings(from_sources, {"training": {"stage": "connector"}}))
    run = tmp_path / "run"
    parts = {name.split(".")[0] for name in load_file(run / "checkpoint-4/model.safetensors")}
    assert parts == {"queries", "connector", "to_caption", "latent_scale"}
    config = json.loads((run / "checkpoint-4/config.json").read_text())
    assert set(config["left_out"]) == {"tokenizer", "language_model", "projector", "generator"}

    final, newest = MUSE_UMM.from_pretrained(run / "final"), open_umm(run / "checkpoint-4")
    assert json.loads((run / "final/config.json").read_text())["left_out"] == {}
    first, second = final.state_dict(), newest.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    images = final.generate(["a cat"], steps=1)
    assert torch.equal(images, newest.generate(["a cat"], steps=1))
    assert open_umm(run).state_dict()["queries"].equal(first["queries"])  # a run's directory


def test_a_stage_starts_from_the_one_before(settings, from_sources, tmp_path):
    """Frozen parts still come from their sources, so the next stage's checkpoints are small too."""
    first = settings(from_sources, {"training": {"stage": "connector"}}, output="one")
    train_umm(first)
    start = {"experiment": {"init_from": str(tmp_path / "one")}}
    cfg = settings(from_sources, start, {"model": {"flow_shift": 1.0}}, output="two")
    task = UmmTask(cfg)
    trainer = Trainer(cfg, task)
    before = MUSE_UMM.from_pretrained(tmp_path / "one/final").state_dict()
    now = trainer.model.state_dict()
    assert all(torch.equal(before[name], now[name]) for name in before)
    assert trainer.model.config["flow_shift"] == 1.0
    assert set(trainer.model.left_out(frozen=False)) == {"tokenizer", "language_model", "projector"}
    trainer.run()
    moved = MUSE_UMM.from_pretrained(tmp_path / "two/final").state_dict()
    changed = {name.split(".")[0] for name in moved if not torch.equal(moved[name], before[name])}
    assert changed == {"queries", "connector", "to_caption", "generator"}
    config = json.loads((tmp_path / "two/checkpoint-4/config.json").read_text())
    assert set(config["left_out"]) == {"tokenizer", "language_model", "projector"}


def test_the_language_model_of_a_run_from_random_parts_is_in_its_checkpoints(settings, tmp_path):
    train_umm(settings({"training": {"stage": "connector"}}))
    saved = MUSE_UMM.from_pretrained(tmp_path / "run/checkpoint-4")
    assert saved.left_out(frozen=False) == []
    assert "internvl.lm_head.weight" in load_file(tmp_path / "run/checkpoint-4/model.safetensors")


# ------------------------------------------------------------------------------------- watching
def test_it_logs_evaluates_and_draws(settings, data, tmp_path):
    train_umm(settings(WATCHED))
    run = tmp_path / "run"
    lines = records(run)
    evaluated = [line["eval"] for line in lines if "eval" in line]
    assert [set(each) for each in evaluated] == [{"loss_image", "loss_edit"}] * 2
    assert evaluated[0] != evaluated[1]
    assert {"loss/image", "loss/edit"} <= {name for line in lines for name in line}
    norms = {name for line in lines for name in line if name.startswith("grad_norm/")}
    assert {"grad_norm/generator", "grad_norm/queries", "grad_norm/connector"} <= norms
    assert sorted(os.listdir(run / "images")) == ["edit-4.png", "image-4.png"]


def test_the_evaluation_is_the_same_whatever_the_batch(settings):
    values = []
    for size in (1, 5):
        cfg = settings({"dataset": {"params": {"eval_batch_size": size}}})
        task = UmmTask(cfg)
        trainer = Trainer(cfg, task)
        state = torch.get_rng_state()
        values.append(trainer.evaluate())
        assert torch.equal(torch.get_rng_state(), state)
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_step_is_the_loss_by_hand(settings):
    """One step of SGD's direction: the gradient is that of the mean loss with the same draws."""
    cfg = settings({"training": {"max_grad_norm": 0.0, "drop_text": 0.5}})
    task = UmmTask(cfg)
    trainer = Trainer(cfg, task)
    batch = next(trainer.batches())
    state = torch.get_rng_state()
    numbers = trainer.train_step([batch])

    other = Trainer(cfg, UmmTask(cfg))
    torch.set_rng_state(state)
    kept = torch.rand(len(batch["text"])) >= 0.5
    texts = [text if keep else "" for text, keep in zip(batch["text"], kept)]
    loss = other.model.train()(texts, batch.get("sources"), targets=batch["images"]).mean()
    loss.backward()
    assert float(numbers["loss"]) == pytest.approx(loss.item(), rel=1e-6)
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in other.model.parameters() if p.grad is not None]
    )
    assert float(numbers["grad_norm"]) == pytest.approx(norm.item(), rel=1e-5)


# --------------------------------------------------------------------------------------- mistakes
def test_a_kind_that_trains_nothing_in_a_stage(settings, data):
    with pytest.raises(ConfigError, match="learns from image and edit, but .* kind question"):
        train_umm(settings(questions_of(data)))
    with pytest.raises(ConfigError, match="learns from question, but .* kind edit"):
        train_umm(settings({"training": {"stage": "projector"}}))


def test_sizes_and_scales_that_are_missing(settings):
    crop = {"dataset": {"preprocessing": {"resize_shorter_edge": 40, "crop_size": 40}}}
    with pytest.raises(ConfigError, match="crop_size=40 must be a multiple of 16"):
        train_umm(settings(crop))
    with pytest.raises(ConfigError, match="the scale of the latents is not known"):
        train_umm(settings({"model": {"latent_factor": None}}))
    with pytest.raises(ConfigError, match=r"drop_text must be 0 to 1, got 1\.5"):
        settings({"training": {"drop_text": 1.5}})
    with pytest.raises(ConfigError, match="crop_size=64 is larger than resize_shorter_edge=32"):
        settings({"dataset": {"preprocessing": {"crop_size": 64}}})
    with pytest.raises(ConfigError, match="training.stage must be one of projector, connector"):
        settings({"training": {"stage": "topology_warmup"}})
    with pytest.raises(ConfigError, match="did you mean model.num_queries"):
        settings({"model": {"num_query": 3}})


def test_checkpoints_of_another_kind(settings, tmp_path):
    missing = {"experiment": {"init_from": str(tmp_path / "nowhere")}}
    with pytest.raises(CheckpointError, match="no such checkpoint; run the stage before"):
        train_umm(settings(missing))
    tiny_model().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="a model of type muse, not a multimodal one"):
        open_umm(tmp_path / "tokenizer")
    (tmp_path / "file.bin").write_text("x")
    with pytest.raises(CheckpointError, match="a file; a multimodal checkpoint is a directory"):
        open_umm(tmp_path / "file.bin")
    with pytest.raises(CheckpointError, match="nowhere"):
        open_umm(tmp_path / "nowhere")


def test_another_stage_does_not_go_on_from_a_checkpoint(settings):
    train_umm(settings())
    with pytest.raises(ConfigError, match="was written by another model or stage"):
        train_umm(settings({"training": {"stage": "connector"}}))
