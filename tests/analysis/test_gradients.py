"""Gradients of the objectives: against numbers worked out by hand, against the routing table, and
through the command.
"""

import json
import math

import pytest
import torch

from muse.analysis.gradients import (
    conflict,
    cosine,
    energy_shares,
    gradient_records,
    gradient_report,
    objectives,
    take_gradients,
)
from muse.config import load_config
from muse.training.tokenizer_task import TokenizerTask, train
from muse.training.trainer import Trainer
from muse.utils.weights import read_state_dict
from scripts.analyze_gradients import main
from tests.helpers import one_error, run_config

ALL = {"losses": {"topology": {"weight": 1.0}, "itc": {"weight": 0.5}}}
W_Q, W_K, W_V, W_ITC = (
    f"muse_blocks.0.{part}.weight" for part in ("q_topo", "k_topo", "v_sem", "v_itc")
)


# ------------------------------------------------------------------------------------- by hand
def test_cosine_is_that_of_the_tensors_taken_as_one_vector():
    first = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    second = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([-2.0])}
    whole = torch.nn.functional.cosine_similarity(
        torch.tensor([3.0, 0, 4]), torch.tensor([1.0, 1, -2]), dim=0
    )
    assert (
        cosine(first, second, ["a", "b"])
        == pytest.approx(float(whole), abs=1e-7)
        == pytest.approx(-1 / math.sqrt(6), abs=1e-7)
    )
    assert cosine(first, first, ["a", "b"]) == pytest.approx(1.0)
    # What only one of them reaches lengthens that one: it is part of the step that the objective
    # asks for.
    assert cosine({**first, "c": torch.tensor([12.0])}, second, ["a", "b", "c"]) == pytest.approx(
        -5 / (13 * math.sqrt(6))
    )


@pytest.mark.parametrize("other", [None, torch.zeros(2)])
def test_no_shared_tensor_is_none_and_orthogonal_is_zero(other):
    first = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0])}
    assert cosine(first, {"a": other, "b": None}, ["a", "b"]) is None
    assert cosine(first, {"a": other, "b": torch.tensor([1.0])}, ["a"]) is None
    assert cosine(first, {"a": torch.tensor([0.0, 2.0]), "b": None}, ["a", "b"]) == 0.0


def test_energy_shares_are_squares_over_all_blocks():
    grads = {
        W_Q: torch.tensor([1.0, 1.0]),
        W_K: torch.tensor([2.0]),
        "muse_blocks.1.k_topo.weight": torch.tensor([1.0]),
        W_V: None,
        W_ITC: torch.tensor([3.0]),
        "muse_blocks.0.norm1.weight": torch.tensor([100.0]),
        "adapter_mlp.1.weight": torch.tensor([9.0]),
    }
    assert energy_shares(grads) == pytest.approx(
        {"W_Q": 2 / 16, "W_K": 5 / 16, "W_V": 0.0, "W_ITC": 9 / 16}
    )
    assert energy_shares({W_V: None, "adapter_mlp.1.weight": torch.tensor([9.0])}) is None


def test_objectives_sum_their_terms_and_leave_out_what_is_off():
    values = {
        "reconstruction": torch.tensor(1.0),
        "perceptual": torch.tensor(0.25),
        "itc": torch.tensor(2.0),
    }
    assert {name: float(value) for name, value in objectives(values).items()} == {
        "reconstruction": 1.25,
        "semantics": 2.0,
    }


def test_conflict_counts_only_steps_that_share_a_gradient():
    steps = [
        {"cosine": {"structure~semantics": {"W_QK": None, "W_V": value}}}
        for value in (None, 0.5, -0.25, -0.75)
    ]
    found = conflict(steps)["structure~semantics"]
    assert found["W_QK"] is None
    assert found["W_V"] == pytest.approx(
        {
            "abs": 0.5,
            "mean": -1 / 6,
            "negative": 2 / 3,
            "conflict": 1 / 3,
            "steps": 3,
            "measured": 4,
        }
    )


# ------------------------------------------------------------------------------------ on a run
@pytest.fixture
def report(shapes_data, tmp_path):
    """`report(stage, changes…)` -> trainer, gradients by objective, and their report, on the first
    batch of a run.
    """

    def make(stage="semantic_injection", *changes):
        cfg = load_config(
            run_config(tmp_path / "run.yaml", shapes_data, tmp_path / "run", stage, ALL, *changes)
        )
        trainer = Trainer(cfg, TokenizerTask(cfg))
        batch = next(trainer.batches())
        out = trainer.model(batch["images"], **trainer.task.loss.needs)
        values, _ = trainer.task.loss.weighted(out, batch)
        grads = take_gradients(trainer.model, objectives(values))
        return trainer, batch, grads, gradient_report(grads)

    return make


def test_objectives_gradients_add_up_to_the_step_s_own(report):
    trainer, batch, grads, _ = report(
        "synergistic_tuning", {"losses": {"adversarial": {"weight": 0.0}}}
    )
    out = trainer.model(batch["images"], **trainer.task.loss.needs)
    total, _ = trainer.task.loss(out, batch)
    total.backward()
    checked = 0
    for name, parameter in trainer.model.named_parameters():
        parts = [
            grads[objective][name] for objective in grads if grads[objective].get(name) is not None
        ]
        if parts:
            torch.testing.assert_close(sum(parts), parameter.grad, rtol=1e-3, atol=1e-6)
            checked += 1
    assert checked > 40 and set(grads) == {"reconstruction", "structure", "semantics"}


def test_isolated_streams_share_nothing_and_the_baseline_shares_everything(report):
    _, _, _, isolated = report()
    assert isolated["cosine"]["structure~semantics"] == dict.fromkeys(
        ("all", "blocks", "W_QK", "W_V", "encoder")
    )
    assert (
        isolated["cosine"]["reconstruction~semantics"]["W_V"] is None
    )  # texture in W_V, semantics in W_ITC
    assert (
        isolated["energy"]["structure"]["W_V"] == 0.0
        and isolated["energy"]["semantics"]["W_ITC"] == 1.0
    )

    _, _, _, shared = report(
        "semantic_injection", {"model": {"routing": "shared", "isolate_streams": False}}
    )
    spaces = shared["cosine"]["structure~semantics"]
    assert all(
        isinstance(spaces[space], float) and 0 < abs(spaces[space]) < 1
        for space in ("blocks", "W_QK", "W_V", "encoder")
    )
    assert sum(shared["energy"]["semantics"].values()) == pytest.approx(1.0)


def test_measuring_changes_nothing_of_the_run(shapes_data, tmp_path):
    """Weights of a run whose gradients are looked at each step equal those of one that is left
    alone, bit for bit.
    """
    finals = []
    for every in (0, 1):
        path = run_config(
            tmp_path / f"{every}.yaml",
            shapes_data,
            tmp_path / str(every),
            "synergistic_tuning",
            ALL,
            {"experiment": {"log_grad_every": every}},
        )
        finals.append(read_state_dict(train(load_config(path)) / "model.safetensors"))
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    records = list(gradient_records([tmp_path / "1", tmp_path / "1"]))
    assert [record["total_step"] for record in records] == [1, 2, 3, 4]
    assert (
        records[0]["stage"] == "synergistic_tuning"
        and records[0]["cosine"]["reconstruction~semantics"]["W_V"] is not None
    )
    assert not list(gradient_records([tmp_path / "0"]))


# --------------------------------------------------------------------------------- the command
def test_command_compares_both_arms_and_reads_runs(trained_run, shapes_data, tmp_path, capsys):
    config, checkpoint = trained_run
    args = [
        "--config",
        str(config),
        "--checkpoint",
        str(checkpoint / "final"),
        "--device",
        "cpu",
        "training.per_gpu_batch_size=4",
    ]
    assert main([*args, "--output_dir", str(tmp_path / "out"), "--steps", "2", "--every", "1"]) == 0
    printed = capsys.readouterr().out
    assert (
        "structure~semantics on W_QK: baseline 0." in printed
        and "muse no shared gradient" in printed
    )
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "gradients.jsonl").read_text().splitlines()
    ]
    assert [(line["arm"], line["step"]) for line in lines] == [
        ("baseline", 1),
        ("baseline", 2),
        ("muse", 1),
        ("muse", 2),
    ]
    muse = [line for line in lines if line["arm"] == "muse"]
    assert all(line["cosine"]["structure~semantics"]["W_QK"] is None for line in muse)
    assert (tmp_path / "out" / "gradients.png").stat().st_size > 20_000

    runs = tmp_path / "out" / "runs"
    again = [
        "--runs",
        f"muse={runs / 'muse'}",
        f"baseline={runs / 'baseline'}",
        f"baseline={runs / 'baseline'}",
    ]
    assert main([*again, "--output_dir", str(tmp_path / "again")]) == 0
    first, second = (
        json.loads((tmp_path / name / "metrics.json").read_text())["arms"]
        for name in ("out", "again")
    )
    assert second["muse"] == first["muse"] and second["baseline"] == first["baseline"] * 2


def test_frozen_measures_one_set_of_weights(trained_run, tmp_path):
    config, checkpoint = trained_run
    assert (
        main(
            [
                "--config",
                str(config),
                "--checkpoint",
                str(checkpoint / "final"),
                "--output_dir",
                str(tmp_path),
                "--device",
                "cpu",
                "--steps",
                "2",
                "--every",
                "1",
                "--frozen",
            ]
        )
        == 0
    )
    before, after = (
        read_state_dict(folder / "final" / "model.safetensors")
        for folder in (checkpoint, tmp_path / "runs" / "muse")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--config is needed"),
        (["--runs", "muse=nowhere", "baseline=nowhere"], "no run directory"),
        (["--runs", "other=a"], "not of the form"),
        (["--steps", "0", "--config", "configs/muse_tiny/stage2.yaml"], "must be 1 or more"),
        (["--config", "configs/muse_tiny/stage1.yaml"], "losses.itc.weight is 0"),
        (["--config", "nowhere.yaml"], "no such configuration"),
        (["--stepz", "1"], "--stepz"),
    ],
)
def test_wrong_input_is_one_line(words, said, tmp_path, capsys):
    code = main([*words, "--output_dir", str(tmp_path / "out")])
    assert said in one_error(capsys, code)
    assert not (tmp_path / "out" / "metrics.json").exists()
