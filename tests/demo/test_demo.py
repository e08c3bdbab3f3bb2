"""The demo end to end, small: it runs, it reuses, and what it prints is what was measured."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from muse.errors import ConfigError, DataError
from muse.experiments import demo, demo_pictures, demo_report, demo_tables
from muse.experiments.demo_plan import STAGES, DemoPlan
from muse.models.internvit import build_encoder
from scripts import demo as demo_script

PLAN = DemoPlan((3, 3, 2, 2), images=64, probe_images=48, val_images=40, kind="shapes")
SMALL = ["model.num_blocks=2", "training.per_gpu_batch_size=8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    return output, demo.run_demo(output, PLAN, overrides=SMALL)


def test_everything_that_is_promised_is_there(run):
    output, results = run
    assert json.loads((output / "metrics.json").read_text()) == json.loads(json.dumps(results))
    for name in ("reconstructions", "reconstructions-seen"):
        assert Image.open(output / f"{name}.png").size[0] > 8 * 128
    assert Image.open(output / "attention.png").size[1] > 4 * 128  # query, two blocks, teacher
    page, written = (output / "report.html").read_text(), (output / "table.md").read_text()
    (table,) = demo_tables.tables_of(results)
    for name, *values, baseline in table.rows:
        assert name in page and values[-1] in page and baseline in page
        assert f"| {name} | {' | '.join(values)} | {baseline} |" in written
    assert list(results["stages"]) == ["stage1", "stage2", "stage3"]


def test_both_sets_of_pictures_stand_in_every_place(run):
    """Unseen objects, and new pictures of seen ones, as separate columns."""
    output, results = run
    head = demo_tables.stage_table(results).head
    assert head[1:-1] == [f"{n} {what}" for n in (1, 2, 3) for what in ("unseen", "seen")]
    psnr = demo_tables.stage_table(results).rows[0][1:-1]
    assert psnr == [
        f"{results['stages'][stage][name]['psnr']:.2f}"
        for stage in STAGES
        for name in ("val", "seen")
    ]
    assert results["baselines"]["val"] != results["baselines"]["seen"]
    assert results["protocol"]["images"]["validation"] == {"val": 8, "seen": 8}
    assert set(results["answers"]) == {"val", "seen"}
    page = (output / "report.html").read_text()
    assert "answers-val.png" in page and "answers-seen.png" in page


def test_stage_1_starts_from_the_packaged_encoder(run):
    """It stays frozen in stages 1 and 2, so they hold the packaged weights."""
    output, _ = run
    packaged = build_encoder("muse_tiny", {}).state_dict()
    for stage in ("stage1", "stage2"):
        saved = load_file(output / stage / "final" / "model.safetensors")
        for name, tensor in packaged.items():
            assert torch.equal(saved[f"encoder.{name}"], tensor)


def test_from_scratch_there_is_a_stage_0(tmp_path, monkeypatch):
    calls = []

    def stop(run):
        calls.append(run)
        raise DataError("far enough")

    monkeypatch.setattr(demo, "_run_stages", stop)
    monkeypatch.setattr(demo, "_yardsticks", lambda *_: {})
    with pytest.raises(DataError, match="far enough"):
        demo.run_demo(tmp_path, PLAN, overrides=SMALL, encoder="scratch")
    (run,) = calls
    assert run.stages == ("stage0", "stage1", "stage2", "stage3")
    first, second = (demo._stage_cfg(run, stage) for stage in run.stages[:2])
    assert first.training.stage == "encoder_distillation"
    assert first.model.encoder.source == "random" and first.experiment.init_from is None
    assert second.experiment.init_from == str(tmp_path / "stage0")


def test_figures_lie_where_their_definitions_put_them(run):
    _, results = run
    last = results["stages"]["stage3"]["val"]
    assert last["retrieval"]["chance_r5"] == pytest.approx(5 / last["retrieval"]["group"])
    assert last["topology"]["kl_uniform"] > last["topology"]["kl_positional"] > 0
    assert len(last["topology"]["blocks"]) == 2
    assert 0 <= last["foreground_iou"] <= 1
    chance = results["baselines"]["val"]["probe_chance"]
    assert chance == pytest.approx(1 / last["zero_shot"]["classes"])


def test_routing_of_the_trained_model(run):
    _, results = run
    assert results["routing"]["agrees"]
    assert "zero exactly where" in demo_report.routing_line(results)
    assert "DIFFERS" in demo_report.routing_line({"routing": {"agrees": False}})


def test_a_second_run_trains_nothing(run, monkeypatch):
    output, results = run

    def written():
        files = [output / stage / "final" / "model.safetensors" for stage in STAGES]
        return [file.stat().st_mtime_ns for file in files]

    before = written()
    monkeypatch.setattr(demo.Yardstick, "measure", lambda *_: pytest.fail("measured again"))
    again = demo.run_demo(output, PLAN, overrides=SMALL)
    assert again["stages"] == results["stages"]
    assert before == written()


def test_the_curves_of_a_short_run_have_points(run):
    output, _ = run
    steps = [json.loads(line)["step"] for line in (output / "stage1/metrics.jsonl").open()]
    assert steps == [1, 2, 3]


def test_a_table_for_the_other_sets():
    """Drawings get columns of their own, measured after the last stage alone."""
    one = {
        "psnr": 20.0,
        "topology": {"kl": 0.5, "kl_positional": 0.6},
        "retrieval_r5": 0.25,
        "retrieval": {"chance_r5": 0.15625},
        "zero_shot_macro": 0.3,
        "zero_shot": {"majority_macro": 1 / 6},
        "linear_probe_macro": 0.4,
        "foreground_iou": 0.5,
    }
    base = {
        "psnr_shrunk_to_grid": 19.0,
        "probe_pixels": 0.2,
        "foreground_everywhere_iou": 0.22,
    }
    names = ("val", "seen", "drawn", "seendrawn")
    sets = {name: one | {"psnr": 20.0 + index} for index, name in enumerate(names)}
    results = {"stages": {"stage3": sets}, "baselines": dict.fromkeys(names, base)}
    table = demo_tables.set_table(results)
    assert table.head[1:] == ["unseen", "seen", "unseen drawings", "seen drawings"]
    assert table.rows[0] == ["PSNR, dB ↑", "20.00", "21.00", "22.00", "23.00"]
    assert demo_tables.markdown_table(table).splitlines()[1] == "|---|---:|---:|---:|---:|"


def test_the_page_shows_samples_where_they_exist(tmp_path):
    demo_folder, beside = tmp_path / "demo", tmp_path / "demo-generation"
    demo_folder.mkdir()
    assert demo_report._samples(demo_folder) == []
    beside.mkdir()
    (beside / "guided.png").write_bytes(b"")
    assert "<img src='../demo-generation/guided.png'" in demo_report._samples(demo_folder)[1]


def test_without_the_packages_it_draws_shapes(tmp_path, monkeypatch, caplog):
    calls = []

    def make(kind, output, images, **_):
        calls.append(kind)
        if kind != "shapes":
            raise DataError("apt-get was not found; use --kind shapes")

    monkeypatch.setattr(demo, "make_demo_data", make)
    found = demo.demo_data(tmp_path, PLAN.images, "everything")
    assert found == (tmp_path / "data-shapes", "shapes")
    assert calls == ["everything", "stamps", "shapes"]


def test_unwritable_output_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo_script.main(["--fast", "--output", str(tmp_path / "file" / "deeper")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error:")


def test_own_data_without_shards_is_one_line_before_any_network_loads(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(demo, "shared_topology_teacher", lambda *_: pytest.fail("too late"))
    command = ["--fast", "--data", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]
    assert demo_script.main(command) == 2
    assert "nothing: holds no train-*.tar" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("steps", ["1,2", "1,2,x", "1,2,0", "1,2,3,4"])
def test_wrong_steps_are_refused(steps):
    with pytest.raises(ConfigError, match="3 numbers were expected, of stage1, stage2, stage3"):
        PLAN.with_steps(steps, STAGES)


def test_query_is_the_object_cell_nearest_its_middle():
    cells = torch.zeros(16, dtype=torch.long)
    cells[[5, 6, 9, 10, 11]] = (
        1  # rows 1-2 of a 4x4 grid, leaning right: centre (1.6, 1.8) is nearest to cell (2, 2)
    )
    assert demo_pictures._query(cells, (4, 4)) == 10
    assert demo_pictures._query(torch.zeros(16, dtype=torch.long), (4, 4)) == 10
