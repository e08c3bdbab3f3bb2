"""A resumed run equals an unbroken one, bit for bit; stages hand over."""

import os
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from muse import MUSE_ViT, load_config
from muse.data.dataloader import eval_loader
from muse.errors import CheckpointError, ConfigError
from muse.evaluation.metrics.psnr_ssim import psnr
from muse.losses import reconstruction
from muse.training.checkpointer import read_tree
from muse.training.tokenizer_task import TokenizerTask, train
from muse.training.trainer import Trainer
from tests.helpers import tiny_model
from tests.training.helpers import hold_equal
from tools.killing import records

FOUR_STEPS = {"training": {"max_train_steps": 4}, "experiment": {"save_every": 2, "keep_last": 5}}
CASES = {
    "stage1": ("topology_warmup", {}),
    "stage2": ("semantic_injection", {}),
    "stage3-adversarial": ("synergistic_tuning", {}),
    "accumulation": (
        "topology_warmup",
        {"training": {"gradient_accumulation_steps": 2, "per_gpu_batch_size": 3}},
    ),
    # Two passes over each micro-batch that draw the same.
    "accumulated-contrast": (
        "semantic_injection",
        {
            "training": {"gradient_accumulation_steps": 2, "per_gpu_batch_size": 3},
            "losses": {"itc": {"across_accumulation": True}},
            "model": {"encoder": {"drop_path": 0.5}},
        },
    ),
    "one-worker": ("topology_warmup", {"dataset": {"params": {"num_workers_per_gpu": 1}}}),
    "two-workers": ("semantic_injection", {"dataset": {"params": {"num_workers_per_gpu": 2}}}),
    # Draws from the global generator in every step (docs/fidelity.md row 45).
    "stochastic-depth": ("topology_warmup", {"model": {"encoder": {"drop_path": 0.5}}}),
    "stage0-heads": (
        "encoder_distillation",
        {
            "teacher": {"feature": {"kind": "backbone", "source": "random", "layers": [0, 1]}},
            "losses": {
                "reconstruction": {"weight": 0.0},
                "perceptual": {"weight": 0.0},
                "distillation": {"weight": 1.0},
            },
        },
    ),
}


def new_trainer(cfg) -> Trainer:
    return Trainer(cfg, TokenizerTask(cfg))


@pytest.mark.parametrize("case", CASES)
def test_two_steps_and_two_more_equal_four(case, run, settings, tmp_path):
    hold_resumable(*CASES[case], run, settings, tmp_path)


def test_a_step_that_draws_at_random_is_resumed_too(run, settings, tmp_path, monkeypatch):
    """Nothing draws from the global generators in a step as it is; whatever will one day goes on
    where it was.
    """
    real = reconstruction.pixel_loss
    monkeypatch.setattr(
        reconstruction,
        "pixel_loss",
        lambda *args: real(*args) * (torch.rand(()) + random.random() + np.random.rand()),
    )
    hold_resumable("topology_warmup", {}, run, settings, tmp_path)


def moments(optimizer: dict) -> dict[str, torch.Tensor]:
    """Adam's means by the names of their tensors, in the order of the groups."""
    names = [name for group in optimizer["param_groups"] for name in group["names"]]
    return {name: optimizer["state"][index]["exp_avg"] for index, name in enumerate(names)}


def hold_resumable(stage, changes, run, settings, tmp_path) -> None:
    whole = run(stage, changes, FOUR_STEPS, output="whole")
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(whole / "checkpoint-2", broken / "checkpoint-2")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    # As a run leaves it that was killed while it wrote step 4: step 3 was logged but is not in the
    # checkpoint.
    (broken / "metrics.jsonl").write_text("".join(lines[:3]) + '{"step": 4, "lo')
    torch.manual_seed(99)  # whatever the process did before
    train(settings(stage, changes, FOUR_STEPS, output="broken"))
    hold_equal(whole / "checkpoint-4", broken / "checkpoint-4")
    assert records(whole) == records(broken) and len(records(whole)) == 4
    for name in os.listdir(whole / "final"):
        assert (whole / "final" / name).read_bytes() == (broken / "final" / name).read_bytes()


def test_a_run_goes_on_bit_for_bit_with_other_gradient_checkpointing(run, settings):
    """What is recomputed changes no number: a run that ran out of memory may turn it on."""
    stage = "synergistic_tuning"
    whole = run(stage, FOUR_STEPS, output="whole")
    broken = whole.with_name("broken")
    shutil.copytree(whole / "checkpoint-2", broken / "checkpoint-2")
    more = {"model": {"gradient_checkpointing": "all"}}
    train(settings(stage, more, FOUR_STEPS, output="broken"))
    hold_equal(whole / "checkpoint-4", broken / "checkpoint-4")


def test_a_checkpoint_of_an_older_version_goes_on(run, settings):
    """It says `gradient_checkpointing: false`."""
    done = run("topology_warmup", FOUR_STEPS, output="old")
    shutil.rmtree(done / "checkpoint-4")
    shutil.rmtree(done / "final")
    file = done / "checkpoint-2" / "state.json"
    text = file.read_text()
    assert text.count('"gradient_checkpointing", "none"') == 1
    file.write_text(
        text.replace('"gradient_checkpointing", "none"', '"gradient_checkpointing", false')
    )
    assert train(settings("topology_warmup", FOUR_STEPS, output="old")).is_dir()


def test_a_finished_run_only_hands_out_its_result(run, settings, monkeypatch):
    done = run(output="done")
    before = (done / "final/model.safetensors").read_bytes()
    monkeypatch.setattr(Trainer, "train_step", lambda self, micro: pytest.fail("a step was taken"))
    assert train(settings(output="done")) == done / "final"
    assert (done / "final/model.safetensors").read_bytes() == before and len(records(done)) == 2


def test_resume_can_be_refused_and_another_model_is(run, settings):
    done = run(output="done")
    with pytest.raises(
        ConfigError,
        match="written by another model or stage; choose another experiment.output_dir.*"
        r"\(model.num_blocks=2 there, 3 here\)",
    ):
        train(settings("topology_warmup", {"model": {"num_blocks": 3}}, output="done"))
    with pytest.raises(
        ConfigError,
        match="another model or stage.*stage=topology_warmup there, semantic_injection here",
    ):
        train(settings("semantic_injection", output="done"))
    before = (done / "metrics.jsonl").read_text()
    with pytest.raises(
        ConfigError, match="holds checkpoints of an earlier run and experiment.resume=false"
    ):
        train(settings("topology_warmup", {"experiment": {"resume": False}}, output="done"))
    assert (done / "metrics.jsonl").read_text() == before
    train(settings("topology_warmup", {"experiment": {"resume": False}}, output="new"))
    assert records(done) == records(done.parent / "new")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dim": 64}, "model.dim=32 there, 64 here"),
        ({"routing": "release"}, "model.routing=paper there, release here"),
        ({"join_semantics": False}, "model.join_semantics=True there, False here"),
        (
            {"encoder": {"config": {"layer_norm_eps": 1e-3}}},
            "model.encoder.config.layer_norm_eps=1e-06 there, 0.001 here",
        ),
    ],
    ids=["dim", "routing", "stream", "encoder"],
)
def test_what_changes_outputs_is_refused_by_name(change, named, run, settings):
    done = run("topology_warmup", {"model": EPSILON}, output="done")
    with pytest.raises(ConfigError, match=f"another model or stage.*{named}"):
        train(settings("topology_warmup", {"model": EPSILON}, {"model": change}, output="done"))
    assert len(records(done)) == 2


EPSILON = {"encoder": {"config": {"layer_norm_eps": 1e-6}}}


def test_a_run_goes_on_with_checkpointing_and_from_moved_sources(run, settings, tmp_path):
    """Neither changes what a step computes: the end is that of an unbroken run, bit for bit."""
    model = tiny_model()
    for part, prefix in (("encoder", ""), ("decoder", "decoder.")):
        (tmp_path / "first" / part).mkdir(parents=True)
        state = getattr(model, part).state_dict()
        tensors = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        save_file(tensors, tmp_path / "first" / part / "model.safetensors")
    first, moved = (
        {part: {"source": str(tmp_path / folder / part)} for part in ("encoder", "decoder")}
        for folder in ("first", "moved")
    )
    whole = run("topology_warmup", FOUR_STEPS, {"model": first}, output="whole")
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(whole / "checkpoint-2", broken / "checkpoint-2")
    (tmp_path / "first").rename(tmp_path / "moved")
    moved["gradient_checkpointing"] = "blocks"
    train(settings("topology_warmup", FOUR_STEPS, {"model": moved}, output="broken"))
    hold_equal(whole / "checkpoint-4", broken / "checkpoint-4")


def test_a_checkpoint_from_before_a_key_of_the_model_goes_on(run, settings):
    """`model.encoder.drop_path` came later: its absence is its default."""
    done = run("topology_warmup", FOUR_STEPS, output="done")
    shutil.rmtree(done / "final")
    shutil.rmtree(done / "checkpoint-4")
    state = done / "checkpoint-2/state.json"
    text = state.read_text()
    assert text.count('["drop_path", 0.0]') == 1
    state.write_text(text.replace(', ["drop_path", 0.0]', ""))
    assert "drop_path" not in state.read_text()
    train(settings("topology_warmup", FOUR_STEPS, output="done"))
    assert (done / "final/model.safetensors").is_file()


def test_moments_are_never_given_to_other_tensors(run, settings):
    """W_Q and W_K have equal shapes: matched by place, their moments would change hands unseen
    where their groups do.
    """
    twice = {"optimizer": {"lr_multipliers": {"q_topo": 2.0}}}
    done = run("topology_warmup", twice, output="done")
    longer = {"training": {"max_train_steps": 3}}
    with pytest.raises(ConfigError, match="trained other tensors: keep training.trainable"):
        train(
            settings(
                "topology_warmup",
                longer,
                {"training": {"trainable": ["^adapter_mlp"]}},
                output="done",
            )
        )
    before = moments(read_tree(done / "checkpoint-2", "state")["optimizer"])
    other = new_trainer(
        settings(
            "topology_warmup",
            longer,
            {"optimizer": {"lr_multipliers": {"k_topo": 2.0}}},
            output="done",
        )
    )
    other.checkpointer.restore()
    after = moments(other.optimizer.state_dict())
    assert (
        list(before) != list(after) and before.keys() == after.keys()
    )  # other groups, the same tensors
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(
        before["muse_blocks.0.q_topo.weight"], before["muse_blocks.0.k_topo.weight"]
    )
    one = new_trainer(
        settings(
            "topology_warmup",
            longer,
            {"optimizer": {"lr_multipliers": {"q_topo": 4.0}}},
            output="done",
        )
    )
    one.run()  # another factor for the same tensors is a change of mind, and is heard
    rates = {name: group["lr"] for group in one.optimizer.param_groups for name in group["names"]}
    assert rates["muse_blocks.0.q_topo.weight"] == pytest.approx(
        4 * rates["muse_blocks.0.k_topo.weight"]
    )


def test_a_broken_checkpoint_is_named(run, settings):
    done = run(output="done")
    file = done / "checkpoint-2/state.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="state.safetensors: not a readable safetensors file"):
        train(settings(output="done"))


# ------------------------------------------------------------------------------- the directory
def test_the_run_directory_is_what_the_contract_says(run, tmp_path):
    three = {
        "training": {"max_train_steps": 5},
        "experiment": {
            "save_every": 1,
            "keep_last": 2,
            "keep_every": 3,
            "eval_every": 5,
            "generate_every": 5,
            "num_pictures": 2,
            "log_every": 2,
        },
    }
    output = run("semantic_injection", three)
    kept = [f"checkpoint-{step}" for step in (3, 4, 5)]
    assert sorted(os.listdir(output)) == [*kept, "config.yaml", "final", "images", "metrics.jsonl"]
    assert sorted(os.listdir(output / "images")) == ["attention-5.png", "reconstruction-5.png"]
    assert [line["step"] for line in records(output)] == [
        2,
        4,
        5,
        5,
    ]  # every second step, the last, its evaluation
    assert {
        "loss",
        "reconstruction",
        "perceptual",
        "topology",
        "itc",
        "grad_norm",
        "lr",
        "images",
        "topology_block0",
    } <= records(output)[0].keys()
    assert records(output)[0]["images"] == 8 and records(output)[-1]["eval"].keys() >= {
        "psnr",
        "ssim",
    }
    again = load_config(output / "config.yaml")
    assert again.training.max_train_steps == 5 and again.model.dim == 32
    # `final` holds the averages of what the stage trains, and the rest as it is.
    last = {
        **load_file(output / "checkpoint-5/model.safetensors"),
        **load_file(output / "checkpoint-5/ema.safetensors"),
    }
    final = MUSE_ViT.from_pretrained(output / "final").state_dict()
    assert final.keys() == last.keys() and all(
        torch.equal(final[name], last[name]) for name in final
    )


def test_the_evaluation_in_the_log_is_the_final_model_s(run, shapes_data):
    output = run("topology_warmup", {"experiment": {"eval_every": 2}})
    model = MUSE_ViT.from_pretrained(output / "final")
    batch = next(
        iter(
            eval_loader(
                f"{shapes_data}/val-*.tar", batch_size=8, resize_shorter_edge=32, crop_size=32
            )
        )
    )
    with torch.no_grad():
        expected = float(psnr(batch["images"], model.reconstruct(batch["images"])).mean())
    assert records(output)[-1]["eval"]["psnr"] == pytest.approx(expected, rel=1e-4)


# ----------------------------------------------------------------------------------- hand-over
def test_three_stages_hand_over(run, settings):
    """Each starts from the averages of the one before, trains its own part and leaves the rest bit
    for bit.
    """
    runs, before = {}, None
    for stage in ("topology_warmup", "semantic_injection", "synergistic_tuning"):
        change = {"experiment": {"init_from": str(before) if before else None}}
        start = new_trainer(settings(stage, change, output=stage)).model
        if before:
            expected = load_file(before / "final/model.safetensors")
            assert all(
                torch.equal(tensor, expected[name]) for name, tensor in start.state_dict().items()
            )
        kept = {name: parameter.detach().clone() for name, parameter in start.named_parameters()}
        before = runs[stage] = run(stage, change, output=stage)
        after = load_file(before / "final/model.safetensors")
        moved = {name for name, tensor in kept.items() if not torch.equal(tensor, after[name])}
        trained = set(load_file(before / "checkpoint-2/ema.safetensors"))
        assert moved <= trained
        assert not {name for name in trained - moved if not name.endswith("k_proj.bias")}, stage
        assert any(name.startswith("encoder.") for name in moved) == (stage == "synergistic_tuning")
        assert any("v_itc" in name for name in moved) == (stage != "topology_warmup")
    assert MUSE_ViT.from_pretrained(before / "final").config.isolate_streams is False


@pytest.mark.parametrize("source", ["/nowhere/stage1", "an_empty_directory"])
def test_a_missing_stage_before_is_said_before_any_data_is_read(source, settings, tmp_path):
    if not source.startswith("/"):
        (tmp_path / source).mkdir()
        source = str(tmp_path / source)
    nowhere = {
        "dataset": {"params": {"train_shards_path_or_url": "/nowhere/data/*.tar"}},
        "experiment": {"init_from": source},
    }
    with pytest.raises(CheckpointError) as caught:
        train(settings("semantic_injection", nowhere))
    assert source in str(caught.value) and "/nowhere/data" not in str(caught.value)
    assert not (tmp_path / "run").exists()
