"""What a linear probe costs: a step here against the plain one, in one run, on the same features.

The plain step is what one writes down first: float32 rows, a layer and a parameter group for each
rate, autograd, torch's SGD and a scheduler. Ours reads rows of 16 bits and updates all rates at
once. Both steps are taken in turn, so that a busy machine slows both. The cost of the whole probe
is computed from the measured steps, not run.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse import cli
from muse.evaluation.frozen_features import read_rows
from muse.evaluation.linear_probe import NATIVE_PROBE, on_device
from muse.evaluation.measurement import check_number
from muse.evaluation.probe_heads import LinearProbe, rate_factor
from muse.utils.io import write_json

BLOCK = 4096
NUMBERS = ("rows", "width", "classes", "batch", "steps", "pictures", "epochs")


class PlainProbe:
    """One layer a rate, by autograd and torch's optimizer; starts from the weights of `like`."""

    def __init__(self, like: LinearProbe, rates: list[float], steps: int):
        group = like.groups[0]
        self.norm = nn.BatchNorm1d(group.weight.shape[1], affine=False).to(group.weight.device)
        weights = group.weight.view(group.heads, like.num_classes, -1)
        self.layers = [nn.Linear(*weight.shape[::-1]) for weight in weights]
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.to(weight.device)
            layer.weight.data.copy_(weight)
            layer.bias.data.zero_()
        groups = [
            {"params": layer.parameters(), "lr": rate}
            for layer, rate in zip(self.layers, rates, strict=True)
        ]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self, features: Tensor, labels: Tensor) -> None:
        weight = torch.cat([layer.weight for layer in self.layers])
        bias = torch.cat([layer.bias for layer in self.layers])
        logits = F.linear(self.norm(features), weight, bias)  # (n, R·K)
        logits = logits.unflatten(1, (len(self.layers), -1)).flatten(0, 1)
        targets = labels.repeat_interleave(len(self.layers))
        loss = F.cross_entropy(logits, targets, reduction="sum") / len(features)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()


def write_features(folder: Path, rows: int, width: int, classes: int, seed: int) -> Tensor:
    """Features around a centre a class, as float32 and float16 files; gives the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    files = {
        kind: numpy.lib.format.open_memmap(folder / f"{kind}.npy", "w+", kind, (rows, width))
        for kind in ("float32", "float16")
    }
    for start in range(0, rows, BLOCK):
        block = slice(start, min(start + BLOCK, rows))
        drawn = torch.randn(block.stop - start, width, generator=generator)
        for array in files.values():
            array[block] = (centres[labels[block]] + drawn).numpy()
    return labels


def clock(act: Callable[[], None], device: torch.device) -> float:
    """Seconds, the device's work included."""
    start = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(args, folder: Path) -> dict:
    """Milliseconds of a step each way, and by how much the trained weights differ."""
    device, seed = torch.device(args.device), 0
    labels = write_features(folder, args.rows, args.width, args.classes, seed)
    wide, narrow = (
        numpy.load(folder / f"{kind}.npy", mmap_mode="r") for kind in ("float32", "float16")
    )
    recipe = replace(NATIVE_PROBE, epochs=1)
    rates = [rate * args.batch / 256 for rate in recipe.learning_rates]
    columns = [slice(0, args.width)]

    def heads(kept: int) -> LinearProbe:
        probe = LinearProbe(columns, args.classes, recipe, rates[-kept:], seed)
        return probe.to(device)

    ours, same, one = heads(len(rates)), heads(len(rates)), heads(1)
    plain = PlainProbe(ours, rates, args.steps)
    resident = on_device(narrow, device)
    seconds = {"plain": [], "all_rates": [], "one_rate": []}
    generator = torch.Generator().manual_seed(seed)
    for step in range(args.steps):
        index = torch.randperm(args.rows, generator=generator)[: args.batch].sort().values
        factor = rate_factor(recipe, step, args.steps)

        def rows(array, index=index) -> tuple[Tensor, Tensor]:
            return read_rows(array, index).to(device).float(), labels[index].to(device)

        ways = {
            "plain": lambda rows=rows: plain.step(*rows(wide)),
            "all_rates": lambda rows=rows, f=factor: ours.step(*rows(resident), f),
            "one_rate": lambda rows=rows, f=factor: one.step(*rows(resident), f),
        }
        for name, act in ways.items():
            seconds[name].append(clock(act, device))
        same.step(*rows(wide), factor)
    weight = torch.cat([layer.weight for layer in plain.layers]).detach()
    size = weight.abs().max()
    gap = {
        "float32": float((same.groups[0].weight - weight).abs().max() / size),
        "float16": float((ours.groups[0].weight - weight).abs().max() / size),
    }
    warm = {name: 1000 * median(each[1:] or each) for name, each in seconds.items()}
    return {"step_ms": warm, "greatest_weight_difference": gap}


def whole_probe(measured: dict, args) -> dict:
    """Hours of the whole probe, computed: plain, all rates, and a trial before one rate."""
    step = measured["step_ms"]
    steps = args.pictures // args.batch
    hours = {
        "plain": args.epochs * steps * step["plain"],
        "all_rates": args.epochs * steps * step["all_rates"],
        "trial": steps * (args.trial_epochs * step["all_rates"] + args.epochs * step["one_rate"]),
    }
    hours = {name: ms / 3.6e6 for name, ms in hours.items()}
    ratio = {name: each / hours["plain"] for name, each in hours.items()}
    return {"steps_an_epoch": steps, "hours": hours, "ratio": ratio}


@cli.entry
def main(argv=None) -> int:
    parser = cli.plain_parser(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=65536, help="of the features that are read")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=12, help="measured, after one more")
    parser.add_argument("--pictures", type=int, default=1_281_167, help="of the whole probe")
    parser.add_argument("--epochs", type=int, default=100, help="of the whole probe")
    parser.add_argument("--trial_epochs", type=int, default=10, help="of all rates before one")
    parser.add_argument("--output", help="a JSON file for the numbers")
    args = parser.parse_args(argv)
    for name in NUMBERS:
        check_number(name, getattr(args, name), 1)
    check_number("rows", args.rows, args.batch)
    args.device = cli.device(args.device)
    args.steps += 1  # the first is not counted
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(args, Path(folder))
    found = measured | {"whole": whole_probe(measured, args)}
    rates, whole = len(NATIVE_PROBE.learning_rates), found["whole"]
    print(
        f"{args.width} features, {args.classes} classes, {rates} rates, batches of {args.batch}, "
        f"on {args.device}; {torch.get_num_threads()} thread(s)"
    )
    names = {
        "plain": "plain, all rates",
        "all_rates": "here, all rates",
        "one_rate": "here, one rate",
    }
    for key, name in names.items():
        ms = measured["step_ms"]
        print(f"{name:>18}: {ms[key]:9.2f} ms a step, {ms[key] / ms['plain']:.3f} of plain")
    for kind, gap in measured["greatest_weight_difference"].items():
        print(f"greatest difference of trained weights, {kind} features: {gap:.1e} of the largest")
    print(f"computed for {args.pictures} pictures, {args.epochs} epochs:")
    for key, name in (("plain", names["plain"]), ("all_rates", names["all_rates"])):
        print(f"{name:>18}: {whole['hours'][key]:9.2f} h")
    print(
        f"{f'{args.trial_epochs} epochs, then one':>18}: {whole['hours']['trial']:9.2f} h, "
        f"{whole['ratio']['trial']:.3f} of plain"
    )
    if args.output:
        write_json(args.output, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
