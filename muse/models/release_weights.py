"""The authors' checkpoint file: its layout in this project's names, and a key report by module (FIDELITY rows 21, 22)."""

import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muse.errors import CheckpointError
from muse.models.internvit import convert_internvit, is_original_layout
from muse.models.muse_vit import IMAGENET_MEAN, IMAGENET_STD
from muse.utils.weights import UNREADABLE, reason

log = logging.getLogger(__name__)

WRAPPERS = ("ema_model", "model", "state_dict", "module")
PREFIXES = ("module.", "_orig_mod.")
# What the file may hold beside the student, and why it is left out.
SKIPPED = [
    (r"^dino_teacher\.", "the topology teacher lives with the trainer"),
    (
        r"^dino_(mean|std)$",
        "the teacher's pixel statistics; every network here normalises its own input",
    ),
]
# Transformers' words for InternViT (left) in the release's: the way back of `backbones.internvit_to_transformers`.
_TO_INTERNVIT = [
    (r"^embeddings\.cls_token$", "embeddings.class_embedding"),
    (r"^embeddings\.position_embeddings$", "embeddings.position_embedding"),
    (r"^embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embedding."),
    (r"^encoder\.layer\.", "encoder.layers."),
    (r"\.lambda_([12])$", r".ls\1"),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.(q_norm|k_norm)\.", r".attn.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
]


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

    def raise_if_unfit(self, where: str) -> None:
        """`CheckpointError` naming the first tensor that is missing or has no place."""
        if self.missing or self.unexpected:
            first = (
                f"missing {self.missing[0]}" if self.missing else f"unexpected {self.unexpected[0]}"
            )
            raise CheckpointError(
                f"{where}: {len(self.missing)} tensors missing and {len(self.unexpected)} unexpected "
                f"for this configuration ({first})"
            )


def read_release_file(path: str | Path) -> dict[str, Tensor]:
    """The student's tensors of a `.bin`/`.pt` (tensors only, never code) or `.safetensors` file, wrappers and prefixes off."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f"{file}: no such checkpoint file")
    if file.suffix == ".safetensors":
        from muse.models.pretrained import read_weights

        state: Any = read_weights(file)
    else:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            raise CheckpointError(
                f"{file}: not a checkpoint that loads with weights_only=True "
                f"({reason(error)[:160]})"
            ) from None
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if (
        not isinstance(state, dict)
        or not all(isinstance(value, Tensor) for value in state.values())
        or not state
    ):
        raise CheckpointError(f"{file}: holds no mapping of names to tensors")
    pattern = re.compile("^(" + "|".join(map(re.escape, PREFIXES)) + ")+")
    return {pattern.sub("", name): tensor for name, tensor in state.items()}


def from_release(
    state: dict[str, Tensor], expected: dict[str, Tensor]
) -> tuple[dict[str, Tensor], KeyReport]:
    """The release's tensors in this project's names, with the report against the tensors that a model expects."""
    report, converted = KeyReport(), {}
    encoder = [name.removeprefix("encoder.") for name in state if name.startswith("encoder.")]
    original = is_original_layout(encoder)
    for name, tensor in state.items():
        reason = next((why for pattern, why in SKIPPED if re.search(pattern, name)), None)
        if reason:
            report.skipped[name] = reason
            continue
        renamed = {name: tensor}
        if original and name.startswith("encoder."):
            renamed = {
                f"encoder.{new}": part
                for new, part in convert_internvit(name.removeprefix("encoder."), tensor).items()
            }
        if all(new in expected for new in renamed):
            report.loaded.append(name)
            converted.update(renamed)
        else:
            report.unexpected.append(name)
    report.missing = sorted(expected.keys() - converted.keys())
    return converted, report


def to_release(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """This project's tensors in the release's names, q, k and v of the encoder fused; the inverse of `from_release`.

    `dino_mean` and `dino_std`, which the release keeps beside the student, are ImageNet's.
    """
    statistics = {"dino_mean": IMAGENET_MEAN, "dino_std": IMAGENET_STD}
    converted = {name: torch.tensor(values).view(1, 3, 1, 1) for name, values in statistics.items()}
    for name, tensor in state.items():
        short = name.removeprefix("encoder.")
        if short == name:
            converted[name] = tensor
            continue
        if ".attention.q_proj." in short:
            fused = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            converted[
                "encoder." + _internvit_name(short).replace(".attention.q_proj.", ".attn.qkv.")
            ] = fused
        elif not re.search(r"\.attention\.[kv]_proj\.", short):
            converted["encoder." + _internvit_name(short)] = tensor
    return converted


def write_release_file(path: str | Path, state: dict[str, Tensor]) -> None:
    """Write a `.safetensors` file, or else a pickle of tensors as the authors do; beside it first, then renamed."""
    from safetensors.torch import save_file

    target = Path(path)
    partial = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        if target.suffix == ".safetensors":
            save_file(tensors, partial, metadata={"format": "pt"})
        else:
            torch.save(tensors, partial)
        partial.replace(target)
    except OSError as error:
        if partial.is_file():
            partial.unlink()
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from None


def _internvit_name(name: str) -> str:
    for pattern, replacement in _TO_INTERNVIT:
        name = re.sub(pattern, replacement, name)
    return name


def load_release_checkpoint(path: str | Path, config: Any, device: str | torch.device = "cpu"):
    """`MUSE_ViT` in eval mode with the weights of the authors' file; logs a key report by module.

    Use `model.routing=release` for the authors' outputs. Raises `CheckpointError` on a tensor that is missing or has no place.
    """
    from muse.models.muse_vit import MUSE_ViT
    from muse.models.pretrained import load_weights

    model = MUSE_ViT(config, load_backbones=False)
    if model.config.join_semantics or model.config.routing == "shared":
        log.warning(
            "%s: with model.routing=%s the outputs differ from the authors'; theirs are model.routing=release",
            path,
            model.config.routing,
        )
    state, report = from_release(read_release_file(path), model.state_dict())
    for line in report.lines():
        log.info("%s", line)
    report.raise_if_unfit(str(path))
    load_weights(model, state, str(path))
    return model.to(device).eval()
