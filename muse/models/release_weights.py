"""The authors' checkpoint file: names there and here, a key report (FIDELITY rows 21, 22, 53)."""

import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from muse.config import model_config
from muse.errors import CheckpointError
from muse.models.internvit import convert_internvit, is_original_layout, original_internvit
from muse.models.layers import IMAGENET_MEAN, IMAGENET_STD
from muse.models.muse_vit import MUSE_ViT
from muse.models.pretrained import save_tensors
from muse.utils.io import atomic_file
from muse.utils.weights import TensorFiles, load_into, read_state_dict

log = logging.getLogger(__name__)

WRAPPERS = ("ema_model", "model", "state_dict", "module")
PREFIXES = ("module.", "_orig_mod.")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # how PyTorch's own files are named
# What the file may hold beside the student, and why it is left out.
SKIPPED = [
    (r"^dino_teacher\.", "the topology teacher lives with the trainer"),
    (
        r"^dino_(mean|std)$",
        "the teacher's pixel statistics; every network here normalises its own input",
    ),
]
ENCODER = "encoder."
CLASS_TOKEN = "encoder.embeddings.class_embedding"  # the authors' name of it, not ours
# The authors' stage 1 trains without these and leaves them out of its files (row 53).
SEMANTIC_PARTS = r"^(semantic_projector\.|logit_scale$)"


@dataclass
class KeyReport:
    """Which tensors of a file went where, by module (first part of the name)."""

    loaded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line a module, then one line a reason for what was skipped."""
        rows = {
            kind: Counter(name.split(".")[0] for name in getattr(self, kind))
            for kind in ("loaded", "skipped", "missing", "unexpected")
        }
        modules = sorted(set().union(*rows.values()))
        text = [
            f"{module:<20} " + "  ".join(f"{kind} {rows[kind][module]:>4}" for kind in rows)
            for module in modules
        ]
        return text + [f"skipped: {reason}" for reason in sorted(set(self.skipped.values()))]


def is_release_file(file: Path) -> bool:
    """Whether a file of weights is read as the authors': a pickle, or tensors by their names."""
    if file.suffix == ".safetensors":
        return any(name.endswith(CLASS_TOKEN) for name in TensorFiles(file).keys())
    return file.suffix.lower() in PICKLES


def read_release_file(path: str | Path) -> dict[str, Tensor]:
    """The student's tensors, without the wrappers and prefixes that training leaves around them."""
    state = read_state_dict(path, "the authors' model", WRAPPERS)
    if not state:
        raise CheckpointError(f"{path}: holds no mapping of names to tensors")
    pattern = re.compile("^(" + "|".join(map(re.escape, PREFIXES)) + ")+")
    return {pattern.sub("", name): tensor for name, tensor in state.items()}


def from_release(
    state: dict[str, Tensor], expected: dict[str, Tensor]
) -> tuple[dict[str, Tensor], KeyReport]:
    """The release's tensors in this project's names, all but the skipped ones.

    The report holds them against the tensors that a model expects, in the file's own names.
    """
    report, converted = KeyReport(), {}
    encoder = [name.removeprefix(ENCODER) for name in state if name.startswith(ENCODER)]
    original = is_original_layout(encoder)
    for name, tensor in state.items():
        reason = next((why for pattern, why in SKIPPED if re.search(pattern, name)), None)
        if reason:
            report.skipped[name] = reason
            continue
        renamed = {name: tensor}
        if original and name.startswith(ENCODER):
            parts = convert_internvit(name.removeprefix(ENCODER), tensor)
            renamed = {ENCODER + new: part for new, part in parts.items()}
        known = all(new in expected for new in renamed)
        (report.loaded if known else report.unexpected).append(name)
        converted.update(renamed)
    report.missing = sorted(expected.keys() - converted.keys())
    return converted, report


def to_release(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """This project's tensors in the release's names, q, k and v of the encoder fused.

    The inverse of `from_release`. `dino_mean` and `dino_std`, which the release keeps beside the
    student, are ImageNet's.
    """
    statistics = {"dino_mean": IMAGENET_MEAN, "dino_std": IMAGENET_STD}
    converted = {name: torch.tensor(values).view(1, 3, 1, 1) for name, values in statistics.items()}
    encoder = {
        name.removeprefix(ENCODER): tensor
        for name, tensor in state.items()
        if name.startswith(ENCODER)
    }
    for name, tensor in original_internvit(encoder).items():
        converted[ENCODER + name] = tensor
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(ENCODER)}
    return {**converted, **rest}


def write_release_file(path: str | Path, state: dict[str, Tensor]) -> None:
    """Write a `.safetensors` file, or else a pickle of tensors as the authors do; atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_file(path, durable=True) as partial:
        if partial.suffix == ".safetensors":
            save_tensors(partial, tensors)
        else:
            torch.save(tensors, partial)


def load_release_checkpoint(
    path: str | Path, config: Any, device: str | torch.device = "cpu"
) -> MUSE_ViT:
    """`MUSE_ViT` in eval mode with the weights of the authors' file; logs a key report by module.

    Args:
        path: `pytorch_model.bin`, or the same tensors as `.safetensors`.
        config: the `model` section with `routing=release`.
        device: where the model goes.

    Raises:
        CheckpointError: under another routing, which would give other outputs; or a tensor is
            missing, has no place, or is of another shape. A file of the authors' stage 1 may lack
            the semantic projector and the logit scale, which then keep their initial values.
    """
    config = model_config(config)
    _check_routing(path, config)
    model = MUSE_ViT(config, load_backbones=False)
    expected = model.state_dict()
    state, report = from_release(read_release_file(path), expected)
    for line in report.lines():
        log.info("%s", line)
    if report.missing == sorted(name for name in expected if re.search(SEMANTIC_PARTS, name)):
        log.warning(
            "%s: a file of the authors' stage 1, without semantic_projector and logit_scale; both "
            "are initialised anew, so its image embeddings mean nothing before stage 2",
            path,
        )
        state |= {name: expected[name] for name in report.missing}
    load_into(model, state, path)
    return model.to(device).eval()


def _check_routing(path: str | Path, config: DictConfig) -> None:
    """`CheckpointError` where the authors' weights would not give the authors' outputs."""
    if config.routing != "release":
        wrong, right = f"routing={config.routing}", "model.routing=release"
    elif config.join_semantics:
        wrong, right = "join_semantics=true", "model.join_semantics=null"
    else:
        return
    raise CheckpointError(
        f"{path}: the authors' weights give other outputs with model.{wrong}; pass {right} (to "
        "train on from them under another routing, first make a directory of them with "
        "tools/convert_checkpoint.py)"
    )
