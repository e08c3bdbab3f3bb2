"""The golden generator: LightningDiT's published layout, filled by the rule of tests/golden."""

import json

import pytest
from safetensors.torch import load_file

from muse.generation import LightningDiT
from muse.generation.generator_config import load_generator_config
from scripts import extract_latents
from tests.golden.fill import GOLDEN, filled_state_dict
from tests.helpers import merged, run_config, tiny_model

ARGUMENTS = (
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "num_classes",
)


@pytest.fixture(scope="session")
def golden():
    return load_file(GOLDEN / "lightningdit_tiny.safetensors")


@pytest.fixture
def make_net():
    """`make_net(**changes)`: the golden network in eval mode, with some arguments changed."""
    published = json.loads((GOLDEN / "lightningdit_tiny_config.json").read_text())
    filled = filled_state_dict(GOLDEN / "lightningdit_tiny_keys.json", scale=0.2)

    def make(**changes):
        net = LightningDiT(**{**{name: published[name] for name in ARGUMENTS}, **changes})
        tables = {name: net.state_dict()[name] for name in net.state_dict().keys() - filled.keys()}
        assert set(tables) <= {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
        net.load_state_dict({**filled, **tables})
        return net.eval()

    return make


@pytest.fixture
def net(make_net):
    return make_net()


# ------------------------------------------------------------------- a tokenizer and its latents
SIDE, CLASSES = 32, 8


def save_tokenizer(folder, seed=0):
    """A tiny MUSE with random weights: 32 px to latents of 8 x 4 x 4, decoded to 16 px."""
    tiny_model(seed, unshuffle=1).save_pretrained(folder)
    return folder


def generator_settings(latents, output, *changes):
    """A configuration of a generator that takes milliseconds a step."""
    settings = {
        "generator": {"hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES},
        "latents": {
            "path": str(latents),
            "num_workers_per_gpu": 0,
            "shuffle_buffer": 16,
            "cache_in_memory": True,
        },
        "tokenizer": {"image_size": SIDE},
        "sampling": {"steps": 3},
        "evaluation": {"images": 0, "steps": 2, "guidance": 2.0},
        "optimizer": {"params": {"learning_rate": 1e-3, "weight_decay": 0.0}},
        "lr_scheduler": {"scheduler": "constant", "params": {"warmup_steps": 0}},
        "training": {
            "max_train_steps": 4,
            "per_gpu_batch_size": 8,
            "mixed_precision": "no",
            "ema_decay": 0.9,
        },
        "experiment": {
            "name": "generator",
            "output_dir": str(output),
            "log_every": 1,
            "save_every": 0,
            "eval_every": 0,
            "generate_every": 0,
            "num_pictures": 3,
        },
    }
    return merged(settings, *changes)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "muse")


@pytest.fixture(scope="session")
def tokenizer_config(shapes_data, tmp_path_factory):
    """The tokenizer's configuration file, with the data."""
    folder = tmp_path_factory.mktemp("tokenizer-config")
    return run_config(folder / "muse.yaml", shapes_data, folder / "run")


@pytest.fixture(scope="session")
def latents_dir(tokenizer_dir, tokenizer_config, tmp_path_factory):
    """Latents of 64 pictures with their mirror images, in 8 shards."""
    folder = tmp_path_factory.mktemp("latents") / "flipped"
    words = ["--config", str(tokenizer_config), "--checkpoint", str(tokenizer_dir)]
    assert extract_latents.main([*words, "--output", str(folder), "--flip"]) == 0
    return folder


@pytest.fixture
def generator_cfg(latents_dir, tmp_path):
    """`generator_cfg(*changes, output=…)` -> a loaded configuration of a run below `tmp_path`."""

    def make(*changes, output="run"):
        file = tmp_path / f"{len(list(tmp_path.glob('*.yaml')))}.yaml"
        settings = generator_settings(latents_dir, tmp_path / output, *changes)
        file.write_text(json.dumps(settings))
        return load_generator_config(file)

    return make
