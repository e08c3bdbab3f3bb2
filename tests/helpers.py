"""Tiny parts that tests share: a 2-block model of 8 px patches, a run that takes seconds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muse.models.muse_vit import MUSE_ViT

ROOT = Path(__file__).resolve().parents[1]

ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": [32, 32],
    "patch_size": [8, 8],
    "attention_bias": True,
}
DECODER = {
    "latent_channels": 8,
    "decoder_block_types": "ResBlock",
    "decoder_block_out_channels": [8, 8, 8],
    "decoder_layers_per_block": [1, 1, 1],
    "decoder_qkv_multiscales": [[], [], []],
    "upsample_block_type": "interpolate",
}
# Every kind of block that DC-AE has: residual, with attention, both ways to enlarge.
MIXED_DECODER = {
    "latent_channels": 8,
    "attention_head_dim": 4,
    "decoder_block_types": ["ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
    "decoder_block_out_channels": [8, 8, 16],
    "decoder_layers_per_block": [1, 1, 1],
    "decoder_qkv_multiscales": [[], [], [5]],
    "upsample_block_type": "interpolate",
}
MODEL = {
    "dim": 32,
    "num_heads": 2,
    "num_blocks": 2,
    "unshuffle": 2,
    "latent_dim": 8,
    "semantic_dim": 16,
    "encoder": {"source": "random", "config": ENCODER},
    "decoder": {"source": "random", "config": DECODER},
}

STAGE_LOSSES = {
    "topology_warmup": {"topology": {"weight": 1.0}},
    "semantic_injection": {"topology": {"weight": 1.0}, "itc": {"weight": 0.5}},
    "synergistic_tuning": {
        "topology": {"weight": 0.5},
        "itc": {"weight": 0.5},
        "adversarial": {"weight": 0.1, "base_channels": 8, "num_stages": 1},
    },
}


def merged(base: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with nested `changes` laid over it; neither is touched."""
    result = json.loads(json.dumps(base))
    for change in changes:
        for key, value in change.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else value
    return result


def tiny_model(seed: int = 0, **changes: Any):
    """A `MUSE_ViT` of random tiny parts, always the same for a seed."""
    torch.manual_seed(seed)
    model = MUSE_ViT(merged(MODEL, changes))
    with torch.no_grad():  # the usual 0.02 makes attention uniform to five digits
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith(
                ("muse_blocks", "adapter_mlp", "to_latent", "semantic_projector")
            ):
                parameter.mul_(8)
        for (
            name,
            parameter,
        ) in (
            model.decoder.named_parameters()
        ):  # a new decoder's residual branches rest at zero: wake them
            if name.endswith("norm.weight"):
                parameter.fill_(1)
    return model.eval()


def random_images(count: int = 2, height: int = 64, width: int = 64, seed: int = 1) -> Tensor:
    """(count, 3, height, width) in [0, 1]"""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def run_settings(data: Path, output: Path, stage: str) -> dict[str, Any]:
    """The sections of a two-step run of a stage on 32 px pictures."""
    return {
        "model": merged(MODEL, {"unshuffle": 1, "isolate_streams": stage != "synergistic_tuning"}),
        "teacher": {
            "topology": {"kind": "random"},
            "text": {"kind": "random", "config": {"dim": 16}},
        },
        "losses": merged(
            {"perceptual": {"name": "random", "weight": 0.1}}, STAGE_LOSSES.get(stage, {})
        ),
        "dataset": {
            "params": {
                "train_shards_path_or_url": f"{data}/train-*.tar",
                "eval_shards_path_or_url": f"{data}/val-*.tar",
                "num_workers_per_gpu": 0,
                "shuffle_buffer": 16,
                "eval_batch_size": 4,
            },
            "preprocessing": {"resize_shorter_edge": 32, "crop_size": 32},
        },
        "optimizer": {"params": {"learning_rate": 1e-3}},
        "lr_scheduler": {"params": {"warmup_steps": 2}},
        "training": {
            "stage": stage,
            "max_train_steps": 2,
            "per_gpu_batch_size": 4,
            "mixed_precision": "no",
        },
        "experiment": {
            "name": "tiny",
            "output_dir": str(output),
            "log_every": 1,
            "save_every": 0,
            "eval_every": 0,
            "generate_every": 0,
        },
    }


def run_config(
    path: Path,
    data: Path,
    output: Path,
    stage: str = "topology_warmup",
    *changes: Mapping[str, Any],
) -> Path:
    """Write the configuration of `run_settings` with `changes`; gives its path (JSON is YAML)."""
    path.write_text(json.dumps(merged(run_settings(data, output, stage), *changes), indent=1))
    return path


def one_error(capsys, code: int) -> str:
    """Hold that a command ended as on a user's mistake; gives its one `error: …` line.

    Exit code 2, no traceback on stderr.
    """
    written = capsys.readouterr().err
    lines = [line for line in written.splitlines() if line.startswith("error: ")]
    assert code == 2, written
    assert len(lines) == 1, written
    assert "Traceback" not in written
    return lines[0]
