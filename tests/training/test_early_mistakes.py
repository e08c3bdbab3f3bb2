"""Missing data are named before networks load, which takes minutes at full size."""

import pytest

from muse.training import tokenizer_task
from scripts import train_stage1


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Arguments of a stage whose networks must not load."""
    monkeypatch.setattr(tokenizer_task, "initial_model", lambda *_: pytest.fail("too late"))
    return ["--config", "muse_tiny/stage1", f"experiment.output_dir={tmp_path}/run"]


def test_an_unset_variable(command, monkeypatch, capsys):
    monkeypatch.delenv("MUSE_DATA", raising=False)
    assert train_stage1.main(command) == 2
    assert "environment variable MUSE_DATA is not set" in capsys.readouterr().err.splitlines()[-1]


def test_missing_shards(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MUSE_DATA", str(tmp_path))
    assert train_stage1.main(command) == 2
    assert f"{tmp_path}/train-*.tar" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
