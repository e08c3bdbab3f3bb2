"""Runs of a few steps with tiny parts."""
import pytest

from muse.config import load_config
from muse.training.trainer import Trainer, train
from tests import helpers


@pytest.fixture
def settings(shapes_data, tmp_path):
    """`settings(stage, changes…, output=…)` -> the loaded configuration of a run below `tmp_path`."""
    def make(stage="topology_warmup", *changes, output="run"):
        name = f"{len(list(tmp_path.glob('*.yaml')))}.yaml"
        return load_config(helpers.run_config(tmp_path / name, shapes_data, tmp_path / output, stage, *changes))
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
        return Trainer(settings(*args, **kwargs))
    return make
