"""Runs of a few steps with tiny parts."""

import pytest

from muse.config import load_config
from muse.training.tokenizer_task import TokenizerTask, train
from muse.training.trainer import Trainer
from tests import helpers
from tests.data.helpers import encode, key, picture, write_tar


@pytest.fixture
def settings(shapes_data, tmp_path):
    """`settings(stage, changes…, output=…)` -> the configuration of a run below `tmp_path`."""

    def make(stage="topology_warmup", *changes, output="run"):
        name = f"{len(list(tmp_path.glob('*.yaml')))}.yaml"
        return load_config(
            helpers.run_config(tmp_path / name, shapes_data, tmp_path / output, stage, *changes)
        )

    return make


@pytest.fixture
def run(settings):
    """Train to the end; gives the run's output directory."""

    def go(*args, **kwargs):
        return train(settings(*args, **kwargs)).parent

    return go


@pytest.fixture
def trainer(settings):
    """A `Trainer` that has not taken a step."""

    def make(*args, **kwargs):
        cfg = settings(*args, **kwargs)
        return Trainer(cfg, TokenizerTask(cfg))

    return make


@pytest.fixture
def two_shards(tmp_path):
    """Two shards of four pictures: an epoch is one shard for each of two processes, and one batch
    of eight for a single one.
    """
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        numbers = range(4 * shard, 4 * shard + 4)
        write_tar(
            folder / f"train-{shard}.tar",
            {
                key(n): {"png": encode(picture(n, 32, 32)), "txt": f"picture {n}".encode()}
                for n in numbers
            },
        )
    write_tar(
        folder / "val-0.tar",
        {key(n): {"png": encode(picture(n, 32, 32)), "txt": b"x"} for n in range(5)},
    )
    return folder
