"""Time a training step alone and beside busy processes, for several ways in which threads wait.

Every measurement is a process of its own, since OpenMP reads its settings once. The settings take
turns, so that what else the machine does meets all of them; only the ratios count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SETTINGS = ("none", "OMP_WAIT_POLICY=PASSIVE", "GOMP_SPINCOUNT=100", "GOMP_SPINCOUNT=10000")
# Forward and backward pass of the packaged model: seconds of each step, as JSON.
STEPS = """
import json, sys, time, torch
from muse import MUSE_ViT
steps, batch = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
model = MUSE_ViT.from_pretrained("muse_tiny").train()
images, seconds = torch.rand(batch, 3, 128, 128), []
for _ in range(steps + 1):
    start = time.perf_counter()
    out = model(images)
    (out.reconstruction - images).abs().mean().backward()
    model.zero_grad()
    seconds.append(time.perf_counter() - start)
print(json.dumps({"seconds": seconds[1:], "threads": torch.get_num_threads()}))
"""


def environment(setting: str, threads: int) -> dict[str, str]:
    """This process's environment with one setting of how threads wait."""
    made = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    made["OMP_NUM_THREADS"] = str(threads)
    if setting != "none":
        name, _, value = setting.partition("=")
        made[name] = value
    made["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return made


def time_steps(setting: str, busy: int, args: argparse.Namespace) -> list[float]:
    """Seconds of each step under a setting, beside `busy` processes that never wait."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        done = subprocess.run(
            [sys.executable, "-c", STEPS, str(args.steps), str(args.batch)],
            env=environment(setting, args.threads),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    finally:
        for other in others:
            other.kill()
            other.wait()
    return json.loads(done.stdout)["seconds"]


def compare_settings(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Setting -> median seconds alone and busy, their ratio, and each against `none` alone."""
    taken: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.repeats):
        for setting in args.settings:
            for busy in (0, args.busy):
                taken.setdefault((setting, busy), []).extend(time_steps(setting, busy, args))
    medians = {key: statistics.median(seconds) for key, seconds in taken.items()}
    first = medians[args.settings[0], 0]
    return {
        setting: {
            "alone": medians[setting, 0],
            "busy": medians[setting, args.busy],
            "busy_over_alone": medians[setting, args.busy] / medians[setting, 0],
            "alone_over_first": medians[setting, 0] / first,
            "busy_over_first_alone": medians[setting, args.busy] / first,
        }
        for setting in args.settings
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="NAME=VALUE|none")
    parser.add_argument("--busy", type=int, default=1, help="processes that never wait")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS")
    parser.add_argument("--steps", type=int, default=5, help="steps of a measurement")
    parser.add_argument("--batch", type=int, default=8, help="images of 128x128 in a step")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all settings")
    parser.add_argument("--output", help="also write the figures as JSON to this file")
    args = parser.parse_args(argv)
    for setting in args.settings:
        if setting != "none" and setting.partition("=")[0] not in VARIABLES:
            parser.error(f"{setting}: none, or one of {', '.join(VARIABLES)} with a value")
    if args.busy < 1 or min(args.threads, args.steps, args.batch, args.repeats) < 1:
        parser.error("--busy, --threads, --steps, --batch and --repeats must be at least 1")
    rows = compare_settings(args)
    print(f"{'setting':<28}{'alone s':>10}{'busy s':>10}{'busy/alone':>12}{'alone/first':>13}")
    for setting, row in rows.items():
        print(
            f"{setting:<28}{row['alone']:>10.3f}{row['busy']:>10.3f}"
            f"{row['busy_over_alone']:>12.2f}{row['alone_over_first']:>13.2f}"
        )
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
