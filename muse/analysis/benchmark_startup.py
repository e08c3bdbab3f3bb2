"""Whole processes: how long a command takes to answer, and how much memory one picture takes."""

import os
import statistics
import subprocess
import sys
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


# A process tells its own peak, in kB: that of its usage (ru_maxrss) starts from its parent's.
PEAK = """
with open("/proc/self/status") as status:
    print(next(line for line in status if line.startswith("VmHWM")).split()[1])
"""


def run_child(code: str, *words: str) -> tuple[float, int, str]:
    """Seconds, peak bytes (Linux) and output of Python code in a process of its own."""
    package = str(Path(muse.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "MUSE_LOG": "ERROR"}
    start = time.perf_counter()
    command = [sys.executable, "-c", code + PEAK, *words]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    if child.returncode:
        raise RuntimeError(f"{code.strip()[:40]}: ended with exit code {child.returncode}")
    *output, peak = child.stdout.splitlines()
    return seconds, int(peak) * 1024, "\n".join(output)


def bench_startup(
    source: str = "muse_tiny", repeats: int = 3, precisions: tuple[str, ...] = ("bf16", "int8")
) -> dict[str, Any]:
    """Rows of `import muse`, of the torch import that no command can avoid, and of one picture.

    `ours` is the picture in float32 beside the `plain` way; the sums of their pixels must be equal.
    """
    commands = {
        "import_muse": ("import muse",),
        "import_torch": ("import torch",),
        **{way: (PICTURE, way, source) for way in ("float32", *precisions, "plain")},
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
