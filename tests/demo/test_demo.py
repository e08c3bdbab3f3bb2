"""The demo end to end, small: it runs, it reuses, and what it prints is what was measured."""

import json

import pytest
import torch
from PIL import Image

from muse.errors import DataError
from muse.experiments import demo, demo_pictures, demo_report
from scripts import demo as demo_script

PLAN = demo.DemoPlan((3, 3, 2, 2), images=64, probe_images=48, val_images=40, limited=False)
SMALL = ["model.num_blocks=2", "training.per_gpu_batch_size=8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    return output, demo.run_demo(output, PLAN, kind="shapes", overrides=SMALL)


def test_everything_that_is_promised_is_there(run):
    output, results = run
    assert json.loads((output / "metrics.json").read_text()) == json.loads(json.dumps(results))
    assert Image.open(output / "reconstructions.png").size[0] > 8 * 128
    assert Image.open(output / "attention.png").size[1] > 4 * 128  # query, two blocks, teacher
    page = (output / "report.html").read_text()
    for name, values, baseline in demo_report.table_rows(results):
        assert name in page and values[-1] in page and baseline in page
    assert list(results["stages"]) == ["stage0", "stage1", "stage2", "stage3"]


def test_figures_lie_where_their_definitions_put_them(run):
    _, results = run
    last = results["stages"]["stage3"]
    assert last["retrieval"]["chance_r5"] == pytest.approx(5 / last["retrieval"]["group"])
    assert last["topology"]["kl_uniform"] > last["topology"]["kl_positional"] > 0
    assert len(last["topology"]["blocks"]) == 2
    assert 0 <= last["foreground_iou"] <= 1
    assert results["baselines"]["probe_chance"] == pytest.approx(1 / last["zero_shot"]["classes"])


def test_routing_of_the_trained_model(run):
    _, results = run
    assert results["routing"]["agrees"]
    assert "zero exactly where" in demo_report.routing_line(results)
    assert "DIFFERS" in demo_report.routing_line({"routing": {"agrees": False}})


def test_a_second_run_trains_nothing(run, monkeypatch):
    output, results = run
    before = {
        stage: (output / stage / "final" / "model.safetensors").stat().st_mtime_ns
        for stage in demo.STAGES
    }
    monkeypatch.setattr(demo.Yardstick, "measure", lambda *_: pytest.fail("measured again"))
    again = demo.run_demo(output, PLAN, kind="shapes", overrides=SMALL)
    assert again["stages"] == results["stages"]
    assert before == {
        stage: (output / stage / "final" / "model.safetensors").stat().st_mtime_ns
        for stage in demo.STAGES
    }


def test_the_page_shows_samples_where_they_exist(tmp_path):
    demo_folder, beside = tmp_path / "demo", tmp_path / "demo-generation"
    demo_folder.mkdir()
    assert demo_report._samples(demo_folder) == []
    beside.mkdir()
    (beside / "guided.png").write_bytes(b"")
    assert "<img src='../demo-generation/guided.png'" in demo_report._samples(demo_folder)[1]


def test_a_slow_machine_gets_fewer_steps():
    plan = demo.DemoPlan((100, 200, 100, 50))
    assert plan.fitted(demo.REFERENCE_STEP) == plan
    slow = plan.fitted(2 * demo.REFERENCE_STEP)
    assert slow.steps == (100, 100, 50, 25)


def test_without_the_packages_it_draws_shapes(tmp_path, monkeypatch, caplog):
    calls = []

    def make(kind, output, images, **_):
        calls.append(kind)
        if kind == "stamps":
            raise DataError("apt-get was not found; use --kind shapes")

    monkeypatch.setattr(demo, "make_demo_data", make)
    assert demo.demo_data(tmp_path, PLAN.images, "stamps") == (tmp_path / "data-shapes", "shapes")
    assert calls == ["stamps", "shapes"]


def test_unwritable_output_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo_script.main(["--fast", "--output", str(tmp_path / "file" / "deeper")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error:")


def test_own_data_without_shards_is_one_line(tmp_path, capsys):
    assert (
        demo_script.main(
            ["--fast", "--data", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]
        )
        == 2
    )
    assert "nothing" in capsys.readouterr().err.strip().splitlines()[-1]


def test_query_is_the_object_cell_nearest_its_middle():
    cells = torch.zeros(16, dtype=torch.long)
    cells[[5, 6, 9, 10, 11]] = (
        1  # rows 1-2 of a 4x4 grid, leaning right: centre (1.6, 1.8) is nearest to cell (2, 2)
    )
    assert demo_pictures._query(cells, (4, 4)) == 10
    assert demo_pictures._query(torch.zeros(16, dtype=torch.long), (4, 4)) == 10
