"""Whole processes: how long a command takes to answer, and how much memory one picture takes."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import muse

# One picture through a model; `plain` is how it was done before: random weights that are replaced.
PICTURE = """
import sys, torch
from muse.models.muse_vit import MUSE_ViT
from muse.models.low_precision import computing
way, source = sys.argv[1:]
if way == "plain":
    import diffusers.models.autoencoders.autoencoder_dc
    from muse.models.pretrained import WEIGHTS_FILE, read_model_config
    from muse.utils.weights import load_into, locate, read_state_dict
    path = locate(source)
    model = MUSE_ViT(read_model_config(path), load_backbones=False)
    load_into(model, read_state_dict(path / WEIGHTS_FILE), path)
else:
    model = MUSE_ViT.from_pretrained(source, precision=way)
torch.manual_seed(0)
with torch.inference_mode(), computing(model.eval()):
    image = model.reconstruct(torch.rand(1, 3, 224, 224)).float()
print(image.double().sum().item())
"""


def run_child(*words: str) -> tuple[float, int, str]:
    """Seconds, peak bytes and output of a Python process that finds this package."""
    package = str(Path(muse.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "MUSE_LOG": "ERROR"}
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, *words], env=environment, stdout=output)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if child.returncode:
            raise RuntimeError(f"{' '.join(words[:1])}: ended with exit code {child.returncode}")
        return seconds, usage.ru_maxrss * 1024, output.read()


def bench_startup(
    source: str = "muse_tiny", repeats: int = 3, precisions: tuple[str, ...] = ("bf16", "int8")
) -> dict[str, Any]:
    """Rows of `import muse`, of the torch import that no command can avoid, and of one picture.

    `ours` is the picture in float32 beside the `plain` way; the sums of their pixels must be equal.
    """
    commands = {
        "import_muse": ("-c", "import muse"),
        "import_torch": ("-c", "import torch"),
        **{way: ("-c", PICTURE, way, source) for way in ("float32", *precisions, "plain")},
    }
    taken: dict[str, list[tuple[float, int, str]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, words in commands.items():
            taken[name].append(run_child(*words))
    rows = {
        name: {
            "seconds": statistics.median(one[0] for one in runs),
            "peak_bytes": max(one[1] for one in runs),
        }
        for name, runs in taken.items()
    }
    sums = [float(taken[name][0][2]) for name in ("float32", "plain")]
    if sums[0] != sums[1]:
        raise AssertionError(f"startup: the pictures' sums are {sums[0]} and {sums[1]}")
    ours, slow = rows.pop("float32"), rows.pop("plain")
    return {
        "ours": ours,
        "plain": slow,
        "ratio": slow["seconds"] / ours["seconds"],
        "memory_ratio": ours["peak_bytes"] / slow["peak_bytes"],
        **rows,
    }
