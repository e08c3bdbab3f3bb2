"""The routing table of docs/fidelity.md, written by hand, against the rules and autograd."""

import json

import pytest
import torch

from muse.analysis.routing import (
    LOSSES,
    all_trainable,
    measure_routing,
    owned_parameters,
    routing_report,
    routing_table,
)
from tests.helpers import random_images, tiny_model

BODY = {"W_V", "norm1", "W_O+MLP"}
PIXELS = {"encoder", "adapter"}
NONE: set[str] = set()
# (routing, isolate_streams): loss -> groups that learn (in the blocks before the last, in the last
# block, outside the blocks).
TABLE = {
    ("paper", True): {
        "reconstruction": (BODY, BODY, PIXELS | {"decoder"}),
        "topology": ({"W_QK"}, {"W_QK"}, NONE),
        "itc": ({"W_ITC"}, {"W_ITC"}, {"projector"}),
    },
    ("paper", False): {
        "reconstruction": (BODY, BODY, PIXELS | {"decoder"}),
        "topology": (BODY | {"W_QK"}, {"W_QK", "norm1"}, PIXELS),
        "itc": (BODY | {"W_ITC"}, {"W_ITC"}, PIXELS | {"projector"}),
    },
    ("release", False): {
        "reconstruction": (BODY, BODY, PIXELS | {"decoder"}),
        "topology": (BODY, {"W_QK", "norm1"}, PIXELS),
        "itc": (BODY, {"W_ITC"}, PIXELS | {"projector"}),
    },
    ("release", True): {
        "reconstruction": (BODY, BODY, PIXELS | {"decoder"}),
        "topology": (NONE, {"W_QK"}, NONE),
        "itc": (NONE, {"W_ITC"}, {"projector"}),
    },
    ("shared", False): {
        "reconstruction": (BODY | {"W_QK"}, BODY | {"W_QK"}, PIXELS | {"decoder"}),
        "topology": (BODY | {"W_QK"}, {"W_QK", "norm1"}, PIXELS),
        "itc": (BODY | {"W_QK"}, {"W_V", "norm1"}, PIXELS | {"projector"}),
    },
    ("shared", True): {
        "reconstruction": (BODY | {"W_QK"}, BODY | {"W_QK"}, PIXELS | {"decoder"}),
        "topology": ({"W_QK"}, {"W_QK"}, NONE),
        "itc": (BODY | {"W_QK"}, {"W_V", "norm1"}, PIXELS | {"projector"}),
    },
}


def by_hand(routing: str, isolate: bool, num_blocks: int) -> dict[str, dict[str, bool]]:
    table = {}
    for loss, (before, last, outside) in TABLE[routing, isolate].items():
        inner = BODY | {"W_QK"} | (NONE if routing == "shared" else {"W_ITC"})
        table[loss] = {
            f"muse_blocks.{index}.{group}": group in (last if index == num_blocks - 1 else before)
            for index in range(num_blocks)
            for group in inner
        }
        table[loss].update(
            {group: group in outside for group in ("encoder", "adapter", "projector", "decoder")}
        )
    return table


@pytest.mark.parametrize(("routing", "isolate"), TABLE)
def test_every_loss_reaches_what_the_table_says_and_nothing_else(routing, isolate):
    model = tiny_model(routing=routing, isolate_streams=isolate, num_blocks=3)
    expected = by_hand(routing, isolate, 3)
    assert routing_table(routing, num_blocks=3, isolate_streams=isolate) == expected

    report = routing_report(model, random_images(3))
    for loss, groups in report["losses"].items():
        assert {group: entry["measured"] for group, entry in groups.items()} == expected[loss], loss
        for group, entry in groups.items():
            # All or nothing: each tensor of a group learns where the group does, and none of them
            # where it does not. (A key's bias in the encoder's two layers moves no softmax; its
            # gradient is zero but for rounding.)
            learns = expected[loss][group]
            assert (
                entry["tensors"] - 2 * (group == "encoder") <= entry["reached"]
                if learns
                else entry["reached"] == 0
            ), (loss, group)
    assert report["agrees"] and not report["differing"]


@pytest.mark.parametrize(("routing", "dead"), [("paper", 0), ("release", 25), ("shared", 0)])
def test_dead_block_tensors_on_six_blocks(routing, dead):
    report = routing_report(tiny_model(routing=routing, num_blocks=6), random_images(2))
    assert report["block_tensors"] == (66 if routing == "shared" else 72)
    parts = ("q_topo", "k_topo", "q_norm", "k_norm", "v_itc")
    expected = [f"muse_blocks.{index}.{part}.weight" for index in range(5) for part in parts]
    assert len(report["dead"]) == dead and set(report["dead"]) == set(expected if dead else [])


@pytest.mark.parametrize(
    ("changes", "cells", "loss", "group", "reached"),
    [
        (
            {"shield_attention": False},
            {"shield_attention": False},
            "reconstruction",
            "muse_blocks.0.W_QK",
            True,
        ),
        (
            {"join_semantics": False},
            {"join_semantics": False},
            "reconstruction",
            "muse_blocks.1.W_ITC",
            False,
        ),
        (
            {"routing": "release", "join_semantics": True},
            {"join_semantics": True},
            "reconstruction",
            "muse_blocks.1.W_ITC",
            False,
        ),
        (
            {"routing": "release", "isolate_streams": True},
            {},
            "topology",
            "muse_blocks.0.norm1",
            False,
        ),
        (
            {"shield_semantics": False},
            {"shield_semantics": False},
            "reconstruction",
            "muse_blocks.0.W_ITC",
            True,
        ),
        (
            {"shield_semantics": False, "join_semantics": False},
            {"shield_semantics": False, "join_semantics": False},
            "reconstruction",
            "muse_blocks.0.W_ITC",
            False,
        ),
    ],
)
def test_each_switch_alone(changes, cells, loss, group, reached):
    model = tiny_model(**changes)
    report = routing_report(model, random_images(2))
    assert report["losses"][loss][group]["measured"] is reached and report["agrees"]
    cells = {"isolate_streams": model.config.isolate_streams} | cells
    table = routing_table(model.config.routing, num_blocks=2, **cells)
    assert table[loss][group] is reached


@pytest.mark.parametrize(("blocks", "reached"), [("all", True), ("last", False)])
def test_which_blocks_an_objective_reads(blocks, reached):
    report = routing_report(
        tiny_model(), random_images(2), topology_blocks=blocks, itc_blocks=blocks
    )
    assert report["losses"]["topology"]["muse_blocks.0.W_QK"]["measured"] is reached
    assert report["losses"]["itc"]["muse_blocks.0.W_ITC"]["measured"] is reached
    assert report["agrees"]


def test_a_broken_stop_is_seen(monkeypatch):
    """The report is worth something only if a missing detach makes it disagree."""
    model = tiny_model()
    model.muse_blocks[1].shield_attention = False
    report = routing_report(model, random_images(2))
    assert not report["agrees"] and "reconstruction on muse_blocks.1.W_QK" in report["differing"]


def test_groups_partition_the_parameters_and_requires_grad_is_restored():
    model = tiny_model()
    groups = owned_parameters(model)
    assert sorted(name for names in groups.values() for name in names) == sorted(
        name for name, _ in model.named_parameters()
    )
    model.encoder.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with all_trainable(model):
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_given_targets_are_used_and_the_report_is_json():
    model, images = tiny_model(), random_images(2)
    own = [maps.detach() for maps in model.encode(images, return_attention=True).topology]
    at_rest = measure_routing(
        model, images, topology_targets=[maps.mean(1, keepdim=True) for maps in own]
    )
    moved = measure_routing(model, images)
    name = "muse_blocks.1.q_topo.weight"
    assert (
        at_rest["topology"][name] < 1e-6 < 1e-3 < moved["topology"][name]
    )  # the KL from itself is at its minimum
    text = torch.randn(2, 16)
    report = json.loads(json.dumps(routing_report(model, images, text)))
    assert set(report["losses"]) == set(LOSSES) and report["agrees"] is True
