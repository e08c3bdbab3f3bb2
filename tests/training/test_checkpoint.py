"""What a checkpoint is made of: trees, generators, the directory's housekeeping."""

import json
import random

import numpy as np
import pytest
import torch

from muse.errors import CheckpointError
from muse.models.loading import checkpoints, latest_checkpoint
from muse.training.checkpointer import (
    pack,
    read_tree,
    rng_state,
    set_rng_state,
    unpack,
    write_tree,
)
from muse.training.run_directory import prune_checkpoints
from tests.training.helpers import same_tree

TREE = {
    "step": 3,
    "lr": 0.1,
    "none": None,
    "flags": [True, "text", {"inner": torch.arange(6).view(2, 3)}],
    "state": {0: {"exp_avg": torch.randn(4), "step": torch.tensor(3.0)}, 7: {}},
    "empty": {},
}


def test_trees_go_out_and_in(tmp_path):
    skeleton, tensors = pack(TREE)
    assert same_tree(TREE, unpack(json.loads(json.dumps(skeleton)), tensors)) and len(tensors) == 3
    write_tree(tmp_path, "state", TREE)
    assert same_tree(TREE, read_tree(tmp_path, "state"))


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe"])
def test_a_tree_that_is_missing_or_broken(content, tmp_path):
    write_tree(tmp_path, "state", TREE)
    file = tmp_path / "state.json"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(CheckpointError, match="state.json: missing or unreadable"):
        read_tree(tmp_path, "state")


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    random.gauss(0, 1), np.random.randn()  # leaves a half-used pair in both
    write_tree(tmp_path, "rng", rng_state())
    first = draw()
    set_rng_state(read_tree(tmp_path, "rng"))
    assert draw() == first


def test_old_checkpoints_go_and_half_written_ones_do_not_count(tmp_path):
    for step in (5, 10, 15, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for other in (".checkpoint-200.abc", ".partial-300", "checkpoint-7x", "final"):
        (tmp_path / other).mkdir()
    assert [step for step, _ in checkpoints(tmp_path)] == [5, 10, 15, 20, 100]
    assert (
        latest_checkpoint(tmp_path).name == "checkpoint-100"
        and latest_checkpoint(tmp_path / "none") is None
    )
    prune_checkpoints(tmp_path, 2, 10)
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 20, 100]
    prune_checkpoints(tmp_path, 1, None)
    assert [step for step, _ in checkpoints(tmp_path)] == [100]
    assert (tmp_path / "final").is_dir() and (tmp_path / ".checkpoint-200.abc").is_dir()
