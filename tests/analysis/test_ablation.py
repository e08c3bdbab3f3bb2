"""The ablations: what the rows mean, what is trained once, and the study itself, very small."""

import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from muse.experiments import ablation
from muse.experiments.ablation import SETS, VARIANTS, Study, StudyPlan
from muse.experiments.ablation_study import Task, collect, markdown, plan_tasks, work_through
from muse.utils.io import write_json
from scripts.ablate import main
from tests.helpers import one_error


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path / "study", tmp_path / "data", StudyPlan(steps=(4, 6, 5)))


def cells(study, name, leg):
    cfg = study.runs(name, 0)[leg].cfg
    weights = tuple(cfg.losses[term].weight > 0 for term in ("topology", "itc"))
    return cfg, weights


# --- the table
def test_the_study_can_distil_an_encoder_of_its_own(study):
    own = replace(study, pretrained=None)
    assert Path(own.encoder).is_relative_to(study.output)
    assert {run.cfg.model.encoder.source for run in own.runs("paper", 0)} == {own.encoder}
    assert own.runs("paper", 0)[0].folder != study.runs("paper", 0)[0].folder


def test_every_variant_trains_the_same_number_of_steps_from_the_same_encoder(study):
    for name in VARIANTS:
        runs = study.runs(name, 1)
        assert sum(run.cfg.training.max_train_steps for run in runs) == 15, name
        assert {run.cfg.model.encoder.source for run in runs} == {"muse_tiny"}
        assert [run.cfg.experiment.init_from for run in runs] == [
            None,
            *(str(run.folder) for run in runs[:-1]),
        ]
        assert all(run.cfg.training.seed == 1 for run in runs)


def test_rows_switch_what_their_labels_say(study):
    paper, weights = cells(study, "paper", 1)
    assert (
        weights == (True, True)
        and paper.model.routing == "paper"
        and paper.losses.itc.objective == "nce"
    )
    assert cells(study, "release", 0)[0].losses.topology.blocks == "last"
    stops = cells(study, "no_stop_gradient", 1)[0].model
    assert (
        not (stops.isolate_streams or stops.shield_attention or stops.shield_semantics)
        and stops.join_semantics
    )
    assert [cells(study, "no_topology", leg)[1] for leg in range(3)] == [
        (False, False),
        (False, True),
        (False, True),
    ]
    assert [cells(study, "no_nce", leg)[1] for leg in range(3)] == [(True, False)] * 3
    assert cells(study, "distillation", 2)[0].losses.itc.objective == "distillation"
    assert cells(study, "not_joined", 0)[0].model.join_semantics is False
    assert [cells(study, "reversed", leg)[1] for leg in range(3)] == [
        (False, True),
        (True, True),
        (True, True),
    ]
    assert [run.cfg.model.isolate_streams for run in study.runs("paper", 0)] == [True, True, False]
    assert cells(study, "isolated", 2)[0].model.isolate_streams is True
    rates = {name: cells(study, name, -1)[0].optimizer.lr_multipliers for name in VARIANTS}
    assert dict(rates["slow_encoder"]) == {"^encoder\\.": 0.02}
    assert dict(rates["paper"]) == {"^encoder\\.": 0.2}
    sources = {name: cells(study, name, 0)[0].teacher.topology.source for name in SETS["teachers"]}
    assert sources == {
        "paper": "efficientnet_lite0",
        "teacher_vit": "internvit:muse_tiny",
        "teacher_vit_affinity": "internvit:muse_tiny",
        "teacher_untrained": "random",
        "no_topology": "efficientnet_lite0",
    }
    baseline, weights = cells(study, "baseline", 0)
    assert (
        weights == (True, True)
        and baseline.model.routing == "shared"
        and baseline.training.max_train_steps == 10
    )


def test_what_is_equal_is_trained_once_and_nothing_else(study):
    first = {name: study.runs(name, 0)[0].folder for name in VARIANTS}
    alike = ("paper", "no_nce", "isolated", "slow_encoder")
    assert len({first[name] for name in alike}) == 1
    assert len(set(first.values())) == len(VARIANTS) - 3
    second = {name: study.runs(name, 0)[1].folder for name in VARIANTS}
    assert second["paper"] == second["isolated"] == second["slow_encoder"]
    assert len(set(second.values())) == len(VARIANTS) - 2  # the objectives differ from here on
    assert len({study.runs(name, 0)[-1].folder for name in VARIANTS}) == len(VARIANTS)
    assert study.runs("paper", 1)[0].folder not in first.values()
    other = Study(study.output, study.data, study.plan, ("losses.topology.weight=3",))
    assert other.runs("paper", 0)[0].folder != first["paper"]

    tasks = plan_tasks(study, list(VARIANTS), range(2))
    names = [task.name for task in tasks]
    # First legs: four variants share one. Second: three. Third: the baseline has none.
    # And a measurement each.
    assert len(set(names)) == len(names) == 2 * (12 + 13 + 14 + 15)
    for place, task in enumerate(tasks):
        assert all(needed in names[:place] for needed in task.after)


# --- the work
def test_work_keeps_to_what_each_task_needs():
    done = []
    names = {"a": (), "b": ("a",), "c": (), "d": ("b", "c"), "e": ("d",)}
    tasks = [Task(name, done.append, (name,), after) for name, after in names.items()]
    with ThreadPoolExecutor(2) as pool:
        work_through(tasks, pool, 2)
    assert sorted(done) == sorted(names) and all(
        done.index(before) < done.index(name) for name, after in names.items() for before in after
    )


def test_a_failure_ends_the_study_and_is_told():
    done = []
    tasks = [
        Task("good", done.append, (1,), ()),
        Task("bad", int, ("x",), ("good",)),
        Task("later", done.append, (2,), ("bad",)),
    ]
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="invalid literal"):
        work_through(tasks, pool, 1)
    assert done == [1]


def test_means_and_deviations_over_seeds(study):
    psnr, cosines = [20.0, 21.0, 23.5], [0.5, None, 0.25]
    for seed in range(3):
        space = None if cosines[seed] is None else {"abs": cosines[seed], "conflict": 0.0}
        pair = {"blocks": space, "W_QK": None, "W_V": space}
        write_json(
            study.record("paper", seed),
            {
                "measured": {
                    "psnr": psnr[seed],
                    "perceptual_efficientnet_lite0": 1.0,
                    "zero_shot_macro": 0.2,
                    "retrieval_r5": 0.25,
                    "linear_probe_macro": 0.3,
                    "miou": 0.1,
                    "topology": {"kl": 0.4},
                    "gradients": {
                        "structure~semantics": pair,
                        "reconstruction~semantics": {
                            **pair,
                            "encoder": {"abs": 0.4, "conflict": 0.1},
                        },
                    },
                }
            },
        )
    results = collect(study, ["paper"], range(3))
    row = results["variants"]["paper"]["columns"]
    assert row["PSNR, dB ↑"]["mean"] == pytest.approx(21.5) and row["PSNR, dB ↑"][
        "std"
    ] == pytest.approx(statistics.stdev(psnr))
    table = markdown(results)
    assert (
        "| 21.50 ± 1.80 |" in table
        and "| none | 0.375 ± 0.177 | 0.400 ± 0.000 |" in table
        and "the encoder of `muse_tiny`" in table
        and "over 3 seeds; 4 + 6 + 5 steps of 16" in table
    )


SMALL = [
    "model.dim=32",
    "model.num_heads=2",
    "model.num_blocks=2",
    "model.unshuffle=2",
    "model.encoder.config={hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
    "num_attention_heads: 2, image_size: [128, 128], patch_size: [8, 8], attention_bias: true}",
]


def test_the_study_from_end_to_end_and_again(tmp_path, monkeypatch, capsys):
    """Two variants share stage 1; a second call with one more variant trains that one alone."""
    pytest.importorskip(
        "efficientnet_lite_pytorch", reason="requirements-demo.txt is not installed"
    )
    monkeypatch.setitem(ablation.STUDY_PLANS, "fast", StudyPlan(2, (1, 1, 1), 4, 24, 16, 8, 1))
    words = [
        "--fast",
        "--kind",
        "shapes",
        "--output",
        str(tmp_path / "out"),
        "--seeds",
        "1",
        "--jobs",
        "2",
        "--encoder",
        "distilled",  # a small one of its own
    ]
    assert main([*words, "--variants", "paper,no_nce", *SMALL]) == 0
    results = json.loads((tmp_path / "out" / "ablation.json").read_text())
    paper, no_nce = (results["variants"][name]["seeds"]["0"] for name in ("paper", "no_nce"))
    assert paper["psnr"] != no_nce["psnr"] and "structure~semantics" not in no_nce["gradients"]
    assert (
        paper["gradients"]["structure~semantics"]["W_QK"] is None
        and (tmp_path / "out" / "ablation.md").read_text() in capsys.readouterr().out
    )
    finals = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "out" / "runs").rglob("final/model.safetensors")
    }
    assert len(finals) == 1 + 5  # the encoder; stage 1 for both, stages 2 and 3 for each

    assert main([*words, "--variants", "paper,no_nce,baseline", *SMALL]) == 0
    after = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "out" / "runs").rglob("final/model.safetensors")
    }
    assert len(after) == 6 + 2 and finals.items() <= after.items()
    assert (tmp_path / "out" / "gradients.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--variants", "paper,papre"], "papre: there are claims, teachers, all, paper"),
        (["--seeds", "0"], "must be 1"),
        (["--fast", "--full"], "not allowed with"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_line(words, said, tmp_path, capsys):
    code = main(
        [*words, "--kind", "shapes", "--jobs", "1", "--output", str(tmp_path / "out")]
        if "--jobs" not in words
        else words
    )
    assert said in one_error(capsys, code)
    assert not (tmp_path / "out" / "ablation.json").exists()
