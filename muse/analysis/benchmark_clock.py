"""Clocks of the benchmark: times of several ways in turns, peak memory, what the machine can do."""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from muse.analysis.counters import FlopCounter
from muse.utils.io import versions
from muse.utils.memory import return_freed_memory

TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def time_ways(
    ways: Mapping[str, Callable[[], Any]], device: str = "cpu", repeats: int = 5, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Name -> median seconds, spread ((slowest - fastest) / median), fastest.

    The ways take turns, so that what else the machine does meets all of them. On CUDA the device's
    own events are read.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warmup + repeats):
        for name, way in ways.items():
            taken = _seconds(way, device)
            if turn >= warmup:
                seconds[name].append(taken)
    return {
        name: {
            "seconds": statistics.median(taken),
            "spread": (max(taken) - min(taken)) / statistics.median(taken),
            "fastest": min(taken),
        }
        for name, taken in seconds.items()
    }


def _seconds(way: Callable[[], Any], device: str) -> float:
    if not device.startswith("cuda"):
        start = time.perf_counter()
        way()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    way()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def matrix_peak(device: str = "cpu", precision: str = "float32", side: int | None = None) -> float:
    """Operations a second of a square matrix product: the best of ten.

    side: of the matrices; default 1536 on a CPU, 8192 on a GPU.
    """
    side = side or (8192 if device.startswith("cuda") else 1536)
    a, b = (torch.randn(side, side, device=device, dtype=TYPES[precision]) for _ in range(2))
    times = time_ways({"product": lambda: a @ b}, device, repeats=10, warmup=2)
    return 2 * side**3 / times["product"]["fastest"]


def count_flops(way: Callable[[], Any]) -> int:
    """Operations of one call by torch's counter."""
    with FlopCounter() as counter:
        way()
    return counter.get_total_flops()


def peak_bytes(way: Callable[[], Any], device: str = "cpu") -> int | None:
    """Bytes that the process, or the device, holds at most beyond what it held before the call.

    None where the system does not tell (anything but Linux and CUDA).
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    return_freed_memory()  # a call that used it again would seem to need nothing
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew from what is resident now
        before = _status("VmRSS")
        way()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _status(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name))
    return int(line.split()[1]) * 1024


def machine_facts(device: str) -> dict[str, Any]:
    """What a time depends on: device, cores, threads, how they wait, versions."""
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "spin_count": os.environ.get("GOMP_SPINCOUNT"),
        "python": platform.python_version(),
        "versions": versions(),
    }
