"""Kill training processes at random instants, and compare the end of a run with one that nobody
touched. For the study and the tests.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from muse.models.loading import checkpoints
from muse.utils.weights import read_state_dict

AIMS = ("start", "step", "save", "save")  # where a kill falls; half of them into a save
CLOCK = (
    "images_per_s",
    "data_time",
    "memory",
)  # what a clock or the machine fills in the log: beginnings of keys


class Process(Protocol):
    """A training process: its number, and its exit status once it ended."""

    pid: int

    def poll(self) -> int | None: ...


class Kill(NamedTuple):
    """What was found after one SIGKILL."""

    aim: str
    logged: int  # the last step in metrics.jsonl
    saved: int  # the newest checkpoint
    unfinished: tuple[str, ...]  # what the process was writing or removing


# ------------------------------------------------------------------------------------- killing
def logged(output: Path) -> int:
    """The last step in `metrics.jsonl`; 0 without one. A line that was cut off does not count."""
    try:
        lines = (output / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError):
            continue
    return 0


def unfinished(output: Path) -> tuple[str, ...]:
    """Names of the folders that a run writes before it renames them."""
    try:
        names = os.listdir(output)
    except FileNotFoundError:
        return ()
    return tuple(
        name
        for name in names
        if name.startswith((".partial-", ".checkpoint-", ".final.", ".removed-"))
    )


def hold_whole(output: Path) -> int:
    """Read every file of every checkpoint, as a resume would; gives the newest one's step (0: there
    is none).
    """
    found = checkpoints(output)
    for _, path in found:
        names = {file.name for file in path.iterdir()}
        assert {
            "model.safetensors",
            "state.json",
            "state.safetensors",
            "rank-0.json",
            "rank-0.safetensors",
        } <= names, (path, names)
        for file in path.iterdir():
            json.loads(file.read_text()) if file.suffix == ".json" else read_state_dict(file)
    return found[-1][0] if found else 0


def wait_for(condition: Callable[[], bool], process: Process, limit: float = 300.0) -> bool:
    """Poll until the condition holds (True) or the process has ended (False)."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    raise TimeoutError("the process neither ended nor did what was waited for")


def kill_often(
    start: Callable[[], Process], output: Path, kills: int, rng: random.Random, step_time: float
) -> list[Kill]:
    """Start and SIGKILL `kills` times, at random instants of starting, stepping and saving; then
    let it end.
    """
    found: list[Kill] = []
    begun = 2.0
    while len(found) < kills:
        before, aim, clock = max(logged(output), 0), rng.choice(AIMS), time.monotonic()
        saved = hold_whole(output)
        process = start()
        if aim == "start":
            time.sleep(rng.uniform(0, begun))
        elif aim == "step":
            first = min(saved, before)
            wait_for(lambda first=first: logged(output) > first, process)
            begun = time.monotonic() - clock
            time.sleep(rng.uniform(0, 4 * step_time))
        else:
            # The leftovers of the run before must be gone, and a save begun.
            wait_for(lambda saved=saved: not unfinished(output) and logged(output) > saved, process)
            wait_for(lambda: bool(unfinished(output)), process)
            time.sleep(rng.uniform(0, step_time))
        if process.poll() is not None:
            raise RuntimeError(
                f"the run ended (status {process.poll()}) after {len(found)} of {kills} kills: "
                "give it more steps"
            )
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda process=process: process.poll() is not None, process)
        found.append(Kill(aim, logged(output), hold_whole(output), unfinished(output)))
    process = start()
    wait_for(lambda: process.poll() is not None, process)
    if process.poll() != 0:
        raise RuntimeError(f"the last start ended with status {process.poll()}")
    return found


# ----------------------------------------------------------------------------------- comparing
def records(output: Path) -> list[dict]:
    """The log without what a clock or the machine says."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.startswith(CLOCK)} for line in lines
    ]


def differences(left: Path, right: Path) -> list[str]:
    """What is not equal, bit for bit, between the ends of two runs; empty where everything is."""
    (step, a), (other, b) = checkpoints(left)[-1], checkpoints(right)[-1]
    found = [f"last checkpoint {step} and {other}"] if step != other else []
    for one, two in ((a, b), (left / "final", right / "final")):
        names = sorted(os.listdir(one))
        found += [f"files of {one.name}"] if names != sorted(os.listdir(two)) else []
        # state.json holds the configuration, and with it the run's own folder.
        found += [
            f"{one.name}/{name}"
            for name in names
            if name != "state.json"
            and (two / name).is_file()
            and (one / name).read_bytes() != (two / name).read_bytes()
        ]
    states = [json.loads((path / "state.json").read_text())["__dict__"] for path in (a, b)]
    found += [
        f"state.json {key}"
        for (key, one), (_, two) in zip(*states)
        if key != "config" and one != two
    ]
    return found + (["metrics.jsonl"] if records(left) != records(right) else [])
