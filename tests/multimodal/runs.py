"""Shards of the three kinds of samples, and configurations of runs that take seconds."""

import json
from pathlib import Path
from typing import Any

from tests.data.helpers import encode, key, picture, write_tar
from tests.helpers import merged
from tests.multimodal.parts import UMM

SIDE = 32


def members(kind: str, number: int, side: int = SIDE) -> dict[str, bytes]:
    """A good sample of a kind; its number is in its text."""
    image = encode(picture(number, side, side))
    if kind == "image":
        return {"png": image, "txt": f"picture {number}".encode()}
    if kind == "edit":
        changed = encode(picture(number + 1000, side, side))
        return {"input.png": image, "output.png": changed, "txt": f"change {number}".encode()}
    asked = {"question": f"what is {number}?", "answer": f"it is {number}"}
    return {"png": image, "json": json.dumps(asked).encode()}


def write_kinds(folder: Path, shards: int = 2, per_shard: int = 4) -> dict[str, str]:
    """Kind -> glob of its training shards; one `KIND-val.tar` of five samples beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("image", "edit", "question"):
        for shard in range(shards):
            numbers = range(shard * per_shard, (shard + 1) * per_shard)
            samples = {key(n): members(kind, n) for n in numbers}
            write_tar(folder / f"{kind}-train-{shard}.tar", samples)
        held_out = {key(n): members(kind, n) for n in range(100, 105)}
        write_tar(folder / f"{kind}-val.tar", held_out)
    return {kind: f"{folder}/{kind}-train-*.tar" for kind in ("image", "edit", "question")}


def mixture(folder: Path, kinds: dict[str, float], split: str = "train-*") -> list[dict[str, Any]]:
    """`dataset.params.*_shards_path_or_url` of some kinds with their weights."""
    return [
        {"urls": f"{folder}/{kind}-{split}.tar", "kind": kind, "weight": weight}
        for kind, weight in kinds.items()
    ]


def umm_settings(data: Path, output: Path, text_tokenizer: Path, *changes) -> dict[str, Any]:
    """The sections of a four-step run of stage 2 on pictures and edits, a checkpoint after two."""
    settings = {
        "model": merged(UMM, {"text_tokenizer": str(text_tokenizer)}),
        "dataset": {
            "params": {
                "train_shards_path_or_url": mixture(data, {"image": 1.0, "edit": 1.0}),
                "eval_shards_path_or_url": mixture(data, {"image": 1.0, "edit": 1.0}, "val"),
                "num_workers_per_gpu": 0,
                "shuffle_buffer": 16,
                "eval_batch_size": 2,
            },
            "preprocessing": {"resize_shorter_edge": SIDE, "crop_size": SIDE, "random_flip": False},
        },
        "optimizer": {"params": {"learning_rate": 1e-3}},
        "lr_scheduler": {"params": {"warmup_steps": 2}},
        "training": {
            "stage": "connector_generator",
            "max_train_steps": 4,
            "per_gpu_batch_size": 3,
            "mixed_precision": "no",
        },
        "sampling": {"steps": 2},
        "experiment": {
            "name": "umm",
            "output_dir": str(output),
            "log_every": 1,
            "save_every": 2,
            "keep_last": 5,
            "eval_every": 0,
            "generate_every": 0,
            "num_pictures": 2,
        },
    }
    return merged(settings, *changes)


def write_umm_config(path: Path, *args, **kwargs) -> Path:
    """A file of `umm_settings` (JSON is YAML)."""
    path.write_text(json.dumps(umm_settings(*args, **kwargs), indent=1))
    return path
