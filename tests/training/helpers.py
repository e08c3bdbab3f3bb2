"""What tests of training share."""

import os

import torch
from safetensors.torch import load_file

from muse.training.checkpointer import read_tree

TENSORS = ("model.safetensors", "ema.safetensors", "state.safetensors", "rank-0.safetensors")


def same_tree(left, right) -> bool:
    """Whether nested dicts and lists are equal in order, types and tensors, bit for bit."""
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and torch.equal(left, right)
        )
    if isinstance(left, dict):
        return list(left) == list(right) and all(same_tree(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same_tree, left, right))
    return type(left) is type(right) and left == right


def hold_equal(left, right) -> None:
    """Two checkpoint directories with the same tensors, generators, data position and counters."""
    assert sorted(os.listdir(left)) == sorted(os.listdir(right))
    for name in TENSORS:
        a, b = load_file(left / name), load_file(right / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    assert (left / "rank-0.json").read_text() == (right / "rank-0.json").read_text()
    states = [
        {key: value for key, value in read_tree(path, "state").items() if key != "config"}
        for path in (left, right)
    ]
    assert same_tree(*states)
