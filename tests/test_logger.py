"""What a run writes down: records, pictures, memory, curves; and that a step between two records
touches no number.
"""

import importlib.util
import json
import logging
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from muse import load_config
from muse.errors import DataError
from muse.inference import read_image
from muse.training.accelerator import build_accelerator
from muse.training.logger import RunLog, memory_in_use
from muse.utils.curves import draw_curves, numbers_of, points, read_run
from muse.utils.viz_utils import save_image, to_uint8
from scripts import demo
from tests.helpers import ROOT, one_error, random_images, run_config


class Tracker:
    """Keeps what it is told."""

    def __init__(self, name):
        self.name, self.calls = name, []

    def log_images(self, values, step=None, **options):
        self.calls.append((values, step, options))


class Machine:
    """As much of accelerate as a log needs: one process on the CPU."""

    is_main_process, num_processes, device = True, 1, torch.device("cpu")

    def __init__(self, *trackers):
        self.trackers, self.logged = trackers, []

    def init_trackers(self, name, config):
        self.started = name, config

    def log(self, values, step):
        self.logged.append((step, values))

    def end_training(self):
        self.ended = True


@pytest.fixture
def opened(shapes_data, tmp_path):
    """`opened(every, tracker, trackers…)` -> (the open log, its machine); it writes into
    `tmp_path`.
    """

    def make(every=3, tracker="none", *trackers):
        changes = {
            "experiment": {"log_every": every, "tracker": tracker},
            "training": {"max_train_steps": 100},
        }
        cfg = load_config(
            run_config(tmp_path / "c.yaml", shapes_data, tmp_path, "topology_warmup", changes)
        )
        machine = Machine(*trackers)
        return RunLog(cfg, machine, tmp_path, 0), machine

    return make


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class NoOperation(TorchDispatchMode):
    """No tensor is computed with, and none read, within it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} between two log steps")


# ------------------------------------------------------------------------------------- records
def test_a_step_between_two_records_touches_no_number(opened, tmp_path):
    log, _ = opened(3)
    numbers = {"loss": torch.tensor(2.0), "grad_norm/encoder": torch.tensor(5.0)}
    with log:
        with NoOperation():
            log.step(1, 8, numbers, 0.1, 1e-3)
            log.step(2, 16, {"loss": torch.tensor}, 0.3, 1e-3)  # not even a tensor: nothing asks
        assert not (tmp_path / "metrics.jsonl").exists()
        with pytest.raises(AssertionError, match="between two log steps"), NoOperation():
            log.step(3, 24, numbers, 0.2, 1e-3)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_has_a_bar_and_a_file_a_line_a_log_step(
    terminal, opened, monkeypatch, capsys, caplog
):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    caplog.set_level(logging.INFO, "muse.training.logger")
    log, _ = opened(2)
    with log:
        for step in (1, 2, 3):
            log.step(step, 8 * step, {"loss": torch.tensor(0.5)}, 0.0, 1e-3)
    assert ("step/s" in capsys.readouterr().err) == terminal
    lines = [record.getMessage().partition(", ")[0] for record in caplog.records]
    assert lines == ([] if terminal else ["step 2 of 100: loss 0.5000"])


def test_a_record_holds_losses_norms_rates_memory_and_data_time(opened, tmp_path, monkeypatch):
    clock = iter([10.0, 14.0, 18.0])
    monkeypatch.setattr("muse.training.logger.time.perf_counter", lambda: next(clock))
    log, _ = opened(3)
    with log:
        for step in range(1, 7):
            numbers = {"loss": torch.tensor(float(step)), "topology": torch.tensor(0.5)}
            if step == 2:  # made between two records: it waits for the next
                numbers["grad_norm/encoder"] = torch.tensor(7.0)
            log.step(step, 8 * step, numbers, 0.1 * step, {"lr": 1e-3, "lr/discriminator": 2e-4})
    first, second = records(tmp_path)
    assert (first["step"], first["images"], first["loss"], first["topology"]) == (3, 24, 3.0, 0.5)
    assert first["grad_norm/encoder"] == 7.0 and "grad_norm/encoder" not in second
    assert (first["lr"], first["lr/discriminator"]) == (1e-3, 2e-4)
    assert second["images_per_s"] == 24 / 4 and second["data_time"] == pytest.approx(
        (0.4 + 0.5 + 0.6) / 3
    )
    resident = int(open(f"/proc/{os.getpid()}/statm").read().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )
    assert second["memory_gb"] == pytest.approx(resident / 1e9, rel=0.05)


def test_memory_of_a_gpu_is_the_peak_of_its_tensors(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", {torch.device("cuda", 1): 123}.__getitem__
    )
    assert memory_in_use(torch.device("cuda", 1)) == 123


# ------------------------------------------------------------------------------------ trackers
def test_pictures_reach_every_tracker_in_its_own_form(opened, tmp_path):
    board, other = Tracker("tensorboard"), Tracker("wandb")
    image = random_images(1, 6, 9)[0]
    save_image(image, tmp_path / "p.png")
    log, machine = opened(1, "none")
    log.picture(4, "images", image)  # without a tracker: nothing
    log.cfg = SimpleNamespace(experiment=SimpleNamespace(tracker="wandb"))
    machine.trackers = [board, other, SimpleNamespace(name="silent")]
    log.picture(4, "images", image)
    log.picture(5, "images", tmp_path / "p.png")
    pixels = to_uint8(image).permute(1, 2, 0).numpy()
    for step, (by_board, by_other) in zip(
        (4, 5), zip(board.calls, other.calls, strict=True), strict=True
    ):
        assert by_board[1] == by_other[1] == step and by_board[2] == {"dataformats": "NHWC"}
        assert np.array_equal(by_board[0]["images"], pixels[None]) and np.array_equal(
            by_other[0]["images"][0], pixels
        )
    machine.is_main_process = log.main = False
    log.picture(6, "images", image)
    assert len(board.calls) == 2


def test_a_picture_is_read_as_it_was_written(tmp_path):
    image = random_images(1, 5, 7)[0]
    save_image(image, tmp_path / "p.png")
    assert torch.equal(to_uint8(read_image(tmp_path / "p.png")), to_uint8(image))


def test_tensorboard_gives_back_what_a_run_logged(shapes_data, tmp_path):
    pytest.importorskip(
        "tensorboard", reason="tensorboard is not installed: pip install tensorboard"
    )
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
        EventAccumulator,
    )

    changes = {"experiment": {"log_every": 1, "tracker": "tensorboard", "name": "tiny"}}
    cfg = load_config(
        run_config(tmp_path / "c.yaml", shapes_data, tmp_path / "run", "topology_warmup", changes)
    )
    (tmp_path / "run").mkdir()
    image = random_images(1, 6, 9)[0]
    with RunLog(cfg, build_accelerator(cfg), tmp_path / "run", 0) as log:
        for step in (1, 2):
            log.step(
                step,
                4 * step,
                {"loss": torch.tensor(step / 4), "grad_norm/encoder": torch.tensor(3.0)},
                0.1,
                1e-3,
            )
        log.record(2, {"eval": {"psnr": 20.5}})
        log.picture(2, "reconstruction", image)
    folder = (
        tmp_path / "run/tiny"
    )  # the run's name; the table of its configuration stands in a folder below
    events = EventAccumulator(str(next(folder.glob("events.out.*"))), size_guidance={"images": 0})
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.25), (2, 0.5)]
    assert (
        events.Scalars("eval/psnr")[0].value == 20.5
        and events.Scalars("grad_norm/encoder")[0].value == 3.0
    )
    assert {"lr", "images_per_s", "memory_gb", "data_time"} <= set(events.Tags()["scalars"])
    shown = events.Images("reconstruction")[0]
    assert (shown.step, shown.height, shown.width) == (2, 6, 9)
    (tmp_path / "shown.png").write_bytes(shown.encoded_image_string)
    assert torch.equal(to_uint8(read_image(tmp_path / "shown.png")), to_uint8(image))


# -------------------------------------------------------------------------------------- curves
def write_run(folder, rows, tail=""):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


@pytest.fixture
def runs(tmp_path):
    first = write_run(
        tmp_path / "stage1",
        [
            {"step": 10, "loss": 1.0, "topology": 0.5},
            {"step": 20, "loss": 0.5, "topology": None},
            {"step": 20, "eval": {"psnr": 21.0}},
        ],
        '{"step": 30, "lo',
    )
    second = write_run(
        tmp_path / "stage2",
        [{"step": 5, "loss": 0.4, "itc": float("nan")}, {"step": 10, "loss": 0.3, "itc": 2.0}],
    )
    return first, second


def test_points_are_the_finite_numbers_one_stage_after_another(runs):
    first, second = map(read_run, runs)
    assert (first.name, len(first.records)) == ("stage1", 3)  # the half-written line is left out
    assert points(first, "loss") == [(10, 1.0), (20, 0.5)] and points(first, "topology") == [
        (10, 0.5)
    ]
    assert points(first, "eval/psnr") == [(20, 21.0)] and points(second, "itc", 20) == [(30, 2.0)]
    assert numbers_of([first, second]) == ["loss", "topology", "itc", "eval/psnr"]


@pytest.mark.parametrize(
    ("together", "expected"), [(False, [[10, 20], [25, 30]]), (True, [[10, 20], [5, 10]])]
)
def test_the_picture_has_a_line_a_run(together, expected, runs, tmp_path, monkeypatch):
    drawn, plot = [], Axes.plot

    def watched(self, x, y, **more):
        drawn.append((list(x), list(y), more["label"]))
        return plot(self, x, y, **more)

    monkeypatch.setattr(Axes, "plot", watched)
    path = draw_curves(
        [read_run(run) for run in runs],
        tmp_path / "new/c.png",
        ["loss", "itc"],
        one_after_another=not together,
    )
    losses = [(x, y, name) for x, y, name in drawn if len(x) == 2]
    assert [x for x, _, _ in losses] == expected and [name for *_, name in losses] == [
        "stage1",
        "stage2",
    ]
    assert losses[0][1] == [1.0, 0.5] and Image.open(path).size[0] == round(2 * 2.8 * 110)
    assert os.listdir(path.parent) == ["c.png"]


def test_curves_of_runs_that_are_not_there(runs, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="no run recorded nonsense"):
        draw_curves([read_run(runs[0])], tmp_path / "c.png", ["nonsense"])


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_draws_and_says_where(runs, tmp_path, capsys):
    main = tool("plot_run").main
    assert main([*map(str, runs), "--output", str(tmp_path / "c.png"), "--together"]) == 0
    assert (
        capsys.readouterr().out.strip() == str(tmp_path / "c.png")
        and Image.open(tmp_path / "c.png").format == "PNG"
    )
    for words, message in (
        ([str(tmp_path / "none"), "--output", "x.png"], "no such file"),
        ([str(runs[0])], "--output"),
        ([str(runs[0]), "--output", "x.docx"], ".png, .svg"),
    ):
        assert message in one_error(capsys, main(words))


@pytest.mark.parametrize(
    "words",
    [["--kind"], ["--unknown", "x", "--output", "y"], ["--output", "y", "--images", "many"]],
)
def test_flags_of_the_demo_data_are_checked_in_one_line(words, capsys):
    assert "(see " in one_error(capsys, tool("make_demo_data").main(words))


@pytest.mark.parametrize("words", [["--fast", "--full"], ["--kind", "clouds"], ["--outptu", "x"]])
def test_flags_of_the_demo_are_checked_in_one_line(words, capsys):
    assert "(see " in one_error(capsys, demo.main(words))
