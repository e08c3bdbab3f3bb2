"""Every set of losses trains what it reaches, in every stage, also on two processes under DDP; one
that reaches nothing is refused.
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from muse.config import load_config
from muse.errors import ConfigError
from muse.training.reach import unreached
from muse.training.tokenizer_task import TokenizerTask
from muse.training.trainer import Trainer
from tests.helpers import merged, random_images, run_config
from tests.training.processes import run_in_two

STAGES = ("encoder_distillation", "topology_warmup", "semantic_injection", "synergistic_tuning")
TERMS = ("reconstruction", "perceptual", "topology", "itc", "distillation", "adversarial")
PIXELS = {"reconstruction", "perceptual", "adversarial"}
FEATURES = {"kind": "backbone", "source": "random", "layers": [0, 1]}


def subsets(terms: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All but the empty one."""
    sizes = range(1, len(terms) + 1)
    return [chosen for size in sizes for chosen in itertools.combinations(terms, size)]


# Routing, stage, terms. The perceptual loss reaches what the pixel loss does, so it has few rows of
# its own; pixels, structure and semantics are enough to tell the routings apart.
TABLE = (
    [("paper", stage, set_) for stage in STAGES for set_ in subsets(TERMS[:1] + TERMS[2:])]
    + [("paper", stage, ("perceptual", "itc")) for stage in STAGES]
    + [
        (routing, "synergistic_tuning", terms)
        for routing in ("release", "shared")
        for terms in subsets(("reconstruction", "topology", "itc"))
    ]
)


def changes(routing: str, terms: tuple[str, ...]) -> dict:
    losses = {name: {"weight": 0.5 if name in terms else 0.0} for name in TERMS}
    return {
        "losses": merged(losses, {"adversarial": {"base_channels": 8, "num_stages": 1}}),
        "teacher": {"feature": FEATURES},
        "model": {"routing": routing, **({"isolate_streams": None} if routing != "paper" else {})},
    }


def learns(stage: str, terms: tuple[str, ...]) -> bool:
    """Whether a term reaches a tensor of the stage, after docs/fidelity.md."""
    reaching = {
        # The encoder alone: where streams are isolated, structure and semantics do not reach it.
        "encoder_distillation": PIXELS | {"distillation"},
        # Not the encoder, and not W_ITC with its projector.
        "topology_warmup": PIXELS | {"topology"},
        "semantic_injection": PIXELS | {"topology", "itc"},
        "synergistic_tuning": set(TERMS),
    }[stage]
    return bool(reaching & set(terms))


def batch(seed: int) -> dict:
    return {
        "images": random_images(2, 32, 32, seed),
        "text": [f"caption {seed}", f"another {seed}"],
        "keys": [f"{seed}.0", f"{seed}.1"],
    }


def try_all(folder: str) -> None:
    """In each of two processes: two steps of every row of the table; writes what became of it."""
    found = []
    for number in range(len(TABLE)):
        cfg = load_config(f"{folder}/{number}.json")
        try:
            one = Trainer(cfg, TokenizerTask(cfg))
        except ConfigError as error:
            found.append(str(error))
            continue
        before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
        for step in range(2):
            one.train_step([batch(10 * step + dist.get_rank())])
        moved = [n for n, p in one.model.named_parameters() if not torch.equal(p, before[n])]
        sums = [float(p.detach().double().sum()) for p in one.model.parameters()]
        found.append({"moved": moved, "sums": sums})
    Path(f"{folder}/found.{dist.get_rank()}").write_text(json.dumps(found))


def test_every_set_of_losses_on_two_processes(two_shards, tmp_path):
    for number, (routing, stage, terms) in enumerate(TABLE):
        file, change = tmp_path / f"{number}.json", changes(routing, terms)
        run_config(file, two_shards, tmp_path / "run", stage, change)
    run_in_two(try_all, str(tmp_path / "log"), False, str(tmp_path))
    first, second = (json.loads((tmp_path / f"found.{rank}").read_text()) for rank in range(2))
    for row, one, other in zip(TABLE, first, second, strict=True):
        if learns(*row[1:]):
            assert one["moved"] and one == other, row  # gradients have crossed the processes
        else:
            assert one.startswith("nothing would be learned: none of the"), (row, one)


@pytest.mark.parametrize("stage", STAGES)
def test_the_paper_s_stages_need_no_search(stage, trainer):
    """DDP's search for parameters without gradient costs a walk through the graph every step."""
    own = {"encoder_distillation": ("distillation", "reconstruction")}
    plan = changes("paper", own[stage]) if stage in own else {}
    assert not trainer(stage, plan).accelerator.ddp_handler.find_unused_parameters
    release = {"model": {"routing": "release", "isolate_streams": None}}
    if stage == "synergistic_tuning":  # the last block alone is read
        assert trainer(stage, release).accelerator.ddp_handler.find_unused_parameters
        chosen = {"training": {"find_unused_parameters": False}}
        assert not trainer(stage, release, chosen).accelerator.ddp_handler.find_unused_parameters


def test_the_graph_names_what_gets_no_gradient(trainer):
    """Against what a backward pass leaves behind, with choices of tensors of one's own."""
    for trainable in (["."], ["^encoder", "q_topo"], ["^encoder", "decoder", "v_itc"]):
        for terms in (("topology",), ("itc", "reconstruction")):
            one = trainer(
                "synergistic_tuning",
                changes("paper", terms),
                {"training": {"trainable": trainable}},
            )
            images = random_images(2, 32, 32)
            out = one.model(images, **one.task.loss.needs)
            total, _ = one.task.loss(out, batch(1) | {"images": images})
            expected = unreached(total, one.model.named_parameters())
            total.backward()
            named = [(n, p) for n, p in one.model.named_parameters() if p.requires_grad]
            assert expected == [name for name, p in named if p.grad is None]
            assert one.accelerator.ddp_handler.find_unused_parameters == bool(expected)


def test_a_part_of_the_encoder_learns(trainer):
    """Its first tensor, the class token, stays frozen."""
    layer = {"training": {"trainable": [r"^encoder\.encoder\.layer\.1\."]}}
    one = trainer("synergistic_tuning", layer)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    one.train_step([batch(1)])
    moved = {n for n, p in one.model.named_parameters() if not torch.equal(p, before[n])}
    assert "encoder.encoder.layer.1.mlp.fc1.weight" in moved
    assert all(name.startswith("encoder.encoder.layer.1.") for name in moved)


def test_what_would_learn_nothing_is_refused_by_name(trainer):
    frozen = {"training": {"trainable": ["^decoder"]}}
    with pytest.raises(ConfigError, match=r"nothing would be learned: .*such as decoder\."):
        trainer("topology_warmup", changes("paper", ("topology",)), frozen)
    late = {"losses": {"adversarial": {"start": 5}}}
    with pytest.raises(ConfigError, match="before step losses.adversarial.start=5"):
        trainer("topology_warmup", changes("paper", ("adversarial",)), late)
