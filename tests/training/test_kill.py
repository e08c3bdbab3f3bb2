"""SIGKILL at random instants of starting, stepping and saving: the end is that of a run nobody
touched.
"""

import random
import time

import pytest

from muse import load_config
from muse.training.tokenizer_task import train
from tests.helpers import run_config
from tests.training.processes import Forked, train_alone
from tools.killing import differences, kill_often, logged

KILLS, EVERY = 20, 3
PLAN = {
    "experiment": {"save_every": EVERY, "keep_last": 2},
    "training": {"max_train_steps": 6 * KILLS},
    "losses": {"perceptual": {"weight": 0.0}},
}


@pytest.fixture
def both(shapes_data, tmp_path):
    """(the unbroken run's folder, the other's configuration, its folder, seconds of a step with its
    share of a save)
    """
    whole = run_config(
        tmp_path / "whole.yaml", shapes_data, tmp_path / "whole", "semantic_injection", PLAN
    )
    begun = time.monotonic()
    train(load_config(whole))
    step_time = (time.monotonic() - begun) / (6 * KILLS)
    return (
        tmp_path / "whole",
        run_config(
            tmp_path / "broken.yaml", shapes_data, tmp_path / "broken", "semantic_injection", PLAN
        ),
        tmp_path / "broken",
        step_time,
    )


def test_twenty_kills_cost_steps_but_change_nothing(both, tmp_path):
    whole, config, output, step_time = both
    found = kill_often(
        lambda: Forked(train_alone, str(config), str(tmp_path / "log")),
        output,
        KILLS,
        random.Random(5),
        step_time,
    )
    assert len(found) == KILLS
    # After every kill each checkpoint was read whole (`kill_often` does), and no more was lost than
    # the steps since the newest.
    assert max(kill.logged - kill.saved for kill in found) <= EVERY
    assert sum(kill.aim != "start" for kill in found) >= KILLS // 2  # not all fell into the start
    assert (
        sum(bool(kill.unfinished) for kill in found) >= 3
    )  # some in the middle of a save: its folder was left behind
    assert logged(output) == 6 * KILLS
    assert differences(whole, output) == []
    assert (
        sorted(path.name for path in output.glob(".*")) == []
    )  # the last start removed what the killed ones left
