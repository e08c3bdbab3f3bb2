"""Time parts of the tokenizer and of the evaluator beside the plain ways, in one run.

Only ratios count, of both ways and of the measured peak of the machine. Each part holds first that
both ways give the same numbers. Parts of the tokenizer need --config; their weights are random.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools/ is no part of the package

from muse import cli  # noqa: E402
from muse.analysis.benchmark_clock import machine_facts  # noqa: E402
from muse.analysis.benchmark_loader import bench_loader  # noqa: E402
from muse.analysis.benchmark_parts import PARTS as BENCHES  # noqa: E402
from muse.analysis.benchmark_parts import Bench  # noqa: E402
from muse.analysis.benchmark_startup import bench_startup  # noqa: E402
from muse.config import load_config  # noqa: E402
from muse.errors import ConfigError  # noqa: E402
from muse.evaluation.evaluator import Evaluator  # noqa: E402
from muse.evaluation.metrics.accuracy_iou import ConfusionMatrix  # noqa: E402
from muse.evaluation.metrics.frechet import RunningMoments, frechet_distance  # noqa: E402
from muse.utils.io import write_json  # noqa: E402
from tools import slow_metrics  # noqa: E402

BATCH = 32
REPEATS = 3
PARTS = ("evaluator", "frechet", "miou")
MODEL_PARTS = ("encode", "decode", "reconstruct", "teacher", "losses", "train_step", "growth")
KNOWN = (*PARTS, *MODEL_PARTS, "loader", "startup")


def race(*ways: Callable[[], object], repeats: int = REPEATS) -> list[tuple[float, object]]:
    """Each way's shortest time in seconds and last result.

    They take turns: what else the machine does meets all of them, and only ever adds time.
    """
    times: list[list[float]] = [[] for _ in ways]
    results: list[object] = [None] * len(ways)
    for _ in range(repeats):
        for i, way in enumerate(ways):
            start = time.perf_counter()
            results[i] = way()
            times[i].append(time.perf_counter() - start)
    return [(min(taken), result) for taken, result in zip(times, results, strict=True)]


def agree(name: str, ours: float, slow: float, tolerance: float) -> None:
    """AssertionError when two ways differ by more than a relative tolerance."""
    if abs(ours - slow) > tolerance * abs(slow):
        raise AssertionError(f"{name}: {ours} here, {slow} the slow way")


def time_evaluator(dim: int, images: int) -> dict:
    """ms an image pair at 224×224 outside the network: PSNR, SSIM, moments of both sides."""
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(images, 3, 224, 224, generator=generator)
    fake = (real + 0.05 * torch.randn(real.shape, generator=generator)).clamp(0, 1)
    features = torch.randn(2, images, dim, generator=generator)

    def ours() -> dict:
        evaluator, sides = Evaluator(("psnr", "ssim")), (RunningMoments(), RunningMoments())
        for index in torch.arange(images).split(BATCH):
            evaluator.update(real[index], fake[index])
            for moments, rows in zip(sides, features, strict=True):
                moments.update(rows[index])
        return {"cov": [moments.compute()[2] for moments in sides], **evaluator.compute()}

    def slow() -> dict:
        quality = slow_metrics.slow_quality(real, fake)
        cov = [slow_metrics.slow_statistics(rows.numpy())[1] for rows in features]
        return {"cov": cov, **quality}

    (fast_time, fast), (slow_time, reference) = race(ours, slow)
    for name in ("psnr", "ssim"):
        agree(name, fast[name], reference[name], 1e-5)
    agree("covariance", float(fast["cov"][0].trace()), float(reference["cov"][0].trace()), 1e-9)
    return {
        "ours": fast_time / images * 1e3,
        "slow": slow_time / images * 1e3,
        "unit": "ms",
        "goal": 29.6 / 5,
    }


def time_frechet(dim: int) -> dict:
    """Seconds for one distance between two full-rank Gaussians of width `dim`."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -3, dim, dtype=torch.float64)
    moments = []
    for _ in range(2):
        rows = torch.randn(2 * dim, dim, generator=generator, dtype=torch.float64) * spectrum.sqrt()
        moments += [rows.mean(0), rows.T.cov()]
    (fast_time, fast), (slow_time, reference) = race(
        lambda: frechet_distance(*moments),
        lambda: slow_metrics.slow_frechet(*moments),
        repeats=1,
    )
    agree("Fréchet distance", fast, reference, 1e-5)
    return {"ours": fast_time, "slow": slow_time, "unit": "s", "goal": 8.4 / 2}


def time_miou(masks: int, classes: int = 150) -> dict:
    """ms an image of 512×512 with 150 classes, predictions given."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, classes, (2, masks, 16, 16), generator=generator)
    truth, guess = coarse.repeat_interleave(32, 2).repeat_interleave(32, 3)

    def ours() -> float:
        confusion = ConfusionMatrix(classes)
        for a, b in zip(guess, truth, strict=True):
            confusion.update(a, b)
        return confusion.compute().mean

    (fast_time, fast), (slow_time, reference), (loop_time, by_loop) = race(
        ours,
        lambda: slow_metrics.one_hot_miou(guess, truth, classes),
        lambda: slow_metrics.looped_miou(guess, truth, classes),
    )
    agree("mIoU", fast, reference, 1e-12)
    agree("mIoU", fast, by_loop, 1e-12)
    ours_ms, slow_ms, loop_ms = (taken / masks * 1e3 for taken in (fast_time, slow_time, loop_time))
    return {
        "ours": ours_ms,
        "slow": slow_ms,
        "unit": "ms",
        "goal": 651 / 200,
        "also": {"loop over the classes": loop_ms},
    }


def compare(parts: Sequence[str], dim: int, images: int, masks: int) -> dict[str, dict]:
    """part -> {ours, slow, unit, goal, perhaps also}; ConfigError on a wrong size.

    goal: what `ours` should not exceed on two CPU cores: a fifth, a half and a 200th of the
    authors' scripts' time. `also`: times of other ways to the same number.
    """
    for name, value, least in (("dim", dim, 1), ("images", images, 2), ("masks", masks, 1)):
        if value < least:
            raise ConfigError(f"--{name} must be at least {least}, not {value}")
    timers = {
        "evaluator": lambda: time_evaluator(dim, images),
        "frechet": lambda: time_frechet(dim),
        "miou": lambda: time_miou(masks),
    }
    return {part: timers[part]() for part in parts}


def time_model(parts: Sequence[str], args) -> dict[str, dict]:
    """part -> row of `muse.analysis.benchmark_parts`; ConfigError without --config."""
    if not parts:
        return {}
    if args.config is None:
        raise ConfigError(f"part {parts[0]} needs --config")
    device = cli.device(args.device)
    # On a CPU everything in float32, so that the share of one peak says something.
    single = ["training.mixed_precision=no"] if device == "cpu" else []
    bench = Bench(
        load_config(args.config, [*single, *args.overrides]),
        device,
        args.batch,
        args.size,
        args.repeats,
    )
    return {part: BENCHES[part](bench) for part in parts}


def check_parts(words: str) -> list[str]:
    """The parts of a comma-separated list; ConfigError for an unknown one."""
    parts = [part.strip() for part in words.split(",")]
    unknown = [part for part in parts if part not in KNOWN]
    if unknown:
        raise ConfigError(f"unknown part '{unknown[0]}': one of {', '.join(KNOWN)}")
    return parts


def read_old(file: str | None) -> dict[str, dict]:
    """The parts of an earlier output; ConfigError where it is none."""
    if file is None:
        return {}
    try:
        return dict(json.loads(Path(file).read_text())["parts"])
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"--against {file}: not an output of this script") from None


def flat_seconds(row: dict) -> float | None:
    """Seconds (or the evaluator's unit) that our way takes; None for a row of several."""
    ours = row.get("ours")
    return ours.get("seconds") if isinstance(ours, dict) else ours


def show(name: str, row: dict, old: dict) -> None:
    """One line a part; growth has one a size."""
    if name == "growth":
        for size, one in row.items():
            pixel = one.get("bytes_per_pixel")
            memory = "" if pixel is None else f", {pixel:.0f} bytes a pixel"
            print(
                f"growth {size:>5} px {one['seconds']:>10.3f} s, time over operations "
                f"{one['time_over_flops']:.2f}{memory}"
            )
        return
    if name == "loader":
        return [show_loader(size, one) for size, one in row.items()]
    unit = row.get("unit", "s")
    slow = row["slow"] if "slow" in row else row["plain"]["seconds"]
    line = f"{name:<12}{flat_seconds(row):>10.3f}{unit:>3}{slow:>10.3f}{unit:>3}"
    line += f"{slow / flat_seconds(row):>8.2f}x"
    for key, label in (
        ("share_of_peak", "of the peak"),
        ("images_per_second", "images/s"),
        ("over_forward", "x a fused forward"),
        ("memory_ratio", "x the memory"),
        ("goal", f"{unit} wanted at most"),
    ):
        if key in row:
            line += f"  {row[key]:.2f} {label}"
    if name in old and flat_seconds(old[name]):
        line += f"  {flat_seconds(row) / flat_seconds(old[name]):.2f} x the time in --against"
    print(line)
    for way, value in row.get("also", {}).items():
        print(f"{'':<12}{'':>13}{value:>10.3f}{unit:>3}{value / row['ours']:>8.2f}x  {way}")


def show_loader(size: str, one: dict) -> None:
    """A line for a size of pictures, or for the resume."""
    if size == "resume":
        taken = f"{one['seconds_processor']:.2f} s of the processor, {one['seconds_clock']:.2f} s"
        return print(f"loader resumed after {one['resumed_after']} samples: {taken}")
    print(
        f"loader {size:<10}{one['loader_images_per_s']:>8.1f} images/s, plain way "
        f"{one['plain_images_per_s']:.1f}: {one['loader_over_plain_processor']:.2f}x, "
        f"{one['loader_over_plain_clock']:.2f}x by the clock"
    )


@cli.entry
def main(argv=None) -> int:
    parser = cli.plain_parser(__doc__)
    parser.add_argument(
        "--parts",
        default=",".join(PARTS),
        help=f"comma-separated, of {', '.join(KNOWN)}",
    )
    parser.add_argument("--config", default=None, help="of one stage, for parts of the tokenizer")
    parser.add_argument("--device", default="cpu", help="of parts of the tokenizer")
    parser.add_argument("--checkpoint", default="muse_tiny", help="a saved model, for startup")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--size", type=int, default=None, help="pixels; default: the crop")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each way")
    parser.add_argument("--against", default=None, help="an earlier output: also ratios to it")
    parser.add_argument(
        "--dim", type=int, default=2048, help="feature width of evaluator and frechet"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=128,
        help="image pairs of 224x224 for evaluator; pictures of a round for loader",
    )
    parser.add_argument(
        "--masks", type=int, default=4, help="512x512 masks of 150 classes for miou"
    )
    parser.add_argument(
        "--output", default=None, help="also write the figures as JSON to this file"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration overrides")
    args = cli.parse(parser, argv)
    parts = check_parts(args.parts)
    for name in ("batch", "repeats", *(["size"] if args.size is not None else [])):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, not {getattr(args, name)}")
    old = read_old(args.against)
    rows = compare([part for part in parts if part in PARTS], args.dim, args.images, args.masks)
    rows |= time_model([part for part in parts if part in MODEL_PARTS], args)
    if "loader" in parts:
        rows["loader"] = bench_loader(args.images, args.repeats)
    if "startup" in parts:
        rows["startup"] = bench_startup(args.checkpoint, args.repeats)
    print(f"{'part':<12}{'ours':>13}{'plain way':>13}{'ratio':>9}")
    for name, row in rows.items():
        show(name, row, old)
    if args.output:
        facts = machine_facts(cli.device(args.device))
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        write_json(args.output, {"machine": facts, "settings": settings, "parts": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
