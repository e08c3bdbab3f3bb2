"""A disk that is full, a folder that may not be written, what killed runs left: one line, and the
checkpoint before stays whole.
"""

import errno
import os
import shutil

import pytest
import safetensors.torch
from safetensors import SafetensorError

from muse.errors import CheckpointError
from muse.models.loading import checkpoints
from muse.training.tokenizer_task import train
from muse.training.trainer import Trainer
from muse.utils.weights import read_state_dict
from tests.helpers import run_config
from tests.training.processes import Forked, run_script
from tools.killing import hold_whole


def at_step_two(trainer) -> Trainer:
    """A run that stands at its second step, with a checkpoint of its first."""
    one = trainer("synergistic_tuning", {"experiment": {"keep_last": 5}}, output="run")
    one.checkpointer.open()
    batches = one.batches()
    one.train_step([next(batches)])
    one.checkpointer.save()
    one.train_step([next(batches)])
    return one


def test_every_write_of_a_save_may_be_refused(trainer, monkeypatch, tmp_path):
    """The system says ENOSPC at the first write, at the second, … until all are through."""
    one = at_step_two(trainer)
    real_text, real_tensors, left = type(tmp_path).write_text, safetensors.torch.serialize_file, [0]

    def limited(real, error):
        def write(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise error
            return real(*args, **kwargs)

        return write

    monkeypatch.setattr(
        type(tmp_path),
        "write_text",
        limited(real_text, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    )
    monkeypatch.setattr(
        safetensors.torch,
        "serialize_file",
        limited(
            real_tensors,
            SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            ),
        ),
    )
    writes = 0
    while True:
        left[0] = writes
        try:
            one.checkpointer.save()
            break
        except CheckpointError as error:
            assert "checkpoint-2: cannot be written" in str(
                error
            ) and "No space left on device" in str(error)
            assert "\n" not in str(error)
        assert [step for step, _ in checkpoints(tmp_path / "run")] == [1] and hold_whole(
            tmp_path / "run"
        ) == 1
        assert not list(
            (tmp_path / "run").glob(".*")
        )  # nothing of the attempt is left to fill the disk
        writes += 1
    assert writes == 7  # model, its config, averages, two for the state, two for the process
    assert hold_whole(tmp_path / "run") == 2


@pytest.mark.parametrize("limit", [20_000, 60_000])
def test_the_script_ends_with_one_line_where_the_system_refuses(limit, shapes_data, tmp_path):
    """Files may grow to `limit` bytes: too few for the model, or for the optimizers' state."""
    config = run_config(
        tmp_path / "c.yaml",
        shapes_data,
        tmp_path / "run",
        "topology_warmup",
        {"experiment": {"save_every": 1, "keep_last": 5}},
    )
    argv = ["--config", str(config), "--device", "cpu"]
    assert (
        Forked(
            run_script, 1, str(tmp_path / "first"), -1, [*argv, "training.max_train_steps=1"]
        ).wait()
        == 0
    )
    whole = {file.name: file.read_bytes() for file in (tmp_path / "run/checkpoint-1").iterdir()}
    assert Forked(run_script, 1, str(tmp_path / "log"), limit, argv).wait() == 2
    log = (tmp_path / "log").read_text()
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    assert (
        len(lines) == 1
        and "Traceback" not in log
        and "cannot be written" in lines[0]
        and "File too large" in lines[0]
    )
    assert hold_whole(tmp_path / "run") == 1
    assert whole == {
        file.name: file.read_bytes() for file in (tmp_path / "run/checkpoint-1").iterdir()
    }
    assert (
        Forked(run_script, 1, str(tmp_path / "last"), -1, argv).wait() == 0
    )  # with room again the same command goes on
    assert hold_whole(tmp_path / "run") == 2


def test_a_folder_that_is_gone_or_no_folder(trainer, settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/run.*: cannot be written"):
        train(settings(output="file/run"))
    one = at_step_two(trainer)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="checkpoint-2: cannot be written"):
        one.checkpointer.save()


# ------------------------------------------------------------------------------- what was left
def test_what_killed_runs_left_goes_and_does_not_come_back(run, settings, tmp_path, caplog):
    """Files of a process that is no more must not get into the next checkpoint."""
    output = run("topology_warmup", {"training": {"max_train_steps": 1}})
    for name in (
        ".partial-2",
        ".checkpoint-2.x1",
        ".final.y2",
        ".removed-1",
        ".checkpoint-2.x1.old",
    ):
        (output / name).mkdir()
        (output / name / "rank-3.json").write_text("{}")
    with caplog.at_level("INFO"):
        train(settings())
    assert (
        "removed what an interrupted run had not finished: .checkpoint-2.x1, .checkpoint-2.x1.old, "
        ".final.y2, .partial-2" in caplog.text
    )
    assert not list(output.glob(".*"))
    assert [path.name for path in (output / "checkpoint-2").glob("rank-*.json")] == ["rank-0.json"]


def test_another_number_of_processes_is_said_in_one_line(run, trainer, caplog):
    """As a checkpoint of four processes looks to a run of one: all exact but the data, which go on
    with the next epoch.
    """
    output = run("topology_warmup", {"training": {"max_train_steps": 1}})
    for name, old, new in (
        ("state.json", '["processes", 1]', '["processes", 4]'),
        ("rank-0.json", '["world", 1]', '["world", 4]'),
    ):
        file = output / "checkpoint-1" / name
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    one = trainer()
    one.checkpointer.restore()
    said = [record.message for record in caplog.records if "goes on with 1" in record.message]
    assert len(said) == 1 and "was written by 4 processes" in said[0] and "next epoch" in said[0]
    assert one.loader.epoch == 1 and one.progress.step == 1
    weights = read_state_dict(output / "checkpoint-1/model.safetensors")
    assert all((tensor == weights[name]).all() for name, tensor in one.model.state_dict().items())
