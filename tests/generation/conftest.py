"""The golden generator: LightningDiT's published layout, filled by the rule of tests/golden."""

import json

import pytest
from safetensors.torch import load_file

from muse.generation import LightningDiT
from tests.golden.fill import GOLDEN, filled_state_dict

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
