"""For all tests: no network, one thread (the tensors are tiny), demo data and a run made once."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from muse.config import load_config  # noqa: E402
from muse.experiments.demo_data import make_demo_data  # noqa: E402
from muse.training.tokenizer_task import train  # noqa: E402
from tests import helpers  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory):
    """A folder of drawn 32 px scenes: 8 shards of 8 training pictures, 2 of 4 to evaluate."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    make_demo_data(kind="shapes", output=folder, images=64, val_images=8, size=32, workers=1)
    return folder


@pytest.fixture(scope="session")
def trained_run(shapes_data, tmp_path_factory):
    """(configuration file, output directory) of two steps of stage 2, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("trained")
    config = helpers.run_config(
        folder / "run.yaml",
        shapes_data,
        folder / "run",
        "semantic_injection",
        {"experiment": {"save_every": 1, "keep_last": 5}},
    )
    train(load_config(config))
    return config, folder / "run"
