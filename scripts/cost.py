"""What a configuration costs, computed on the meta device: parameters, FLOPs, memory, GPU-hours.

No weights, no GPU, no data.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from muse import cli
from muse.config import load_config, stage_files
from muse.errors import ConfigError
from muse.utils.io import versions, write_json


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = cli.plain_parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--config", help="YAML configuration of one stage, such as configs/muse_1b/stage3.yaml"
    )
    which.add_argument("--recipe", metavar="DIR", help="every stage of a variant, such as muse_1b")
    which.add_argument(
        "--generator", metavar="FILE", help="a generator's, such as generation/imagenet256_xl"
    )
    which.add_argument("--umm", metavar="FILE", help="a multimodal stage's, such as umm_1b/stage2")
    parser.add_argument(
        "--batch_size",
        type=int,
        help="images of one process, for the memory; without it the configuration's",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        default=8,
        help="processes; with the configuration's batch they give the images of a step",
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="share of the peak that a step reaches"
    )
    parser.add_argument(
        "--peak_tflops",
        type=float,
        default=989,
        help="of a GPU in mixed precision; H100 SXM, dense",
    )
    parser.add_argument(
        "--peak_tflops_float32",
        type=float,
        default=67,
        help="of a GPU in float32; H100 SXM without TF32",
    )
    parser.add_argument(
        "--peak_tflops_tf32", type=float, default=494, help="of a GPU in TF32; H100 SXM, dense"
    )
    parser.add_argument(
        "--bandwidth_gb", type=float, default=3350, help="of a GPU's memory, GB/s; H100 SXM"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", metavar="FILE", help="also write every number to this file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration overrides")
    return parser


def check_numbers(args: argparse.Namespace) -> None:
    """`ConfigError` for a flag out of its range."""
    peaks = ("peak_tflops", "peak_tflops_float32", "peak_tflops_tf32", "bandwidth_gb")
    for name in ("batch_size", "gpus", "utilisation", *peaks):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ConfigError(f"--{name} must be above 0, got {getattr(args, name)}")
    if args.utilisation > 1:
        raise ConfigError(
            f"--utilisation is a share of the peak, at most 1, got {args.utilisation}"
        )


def check_flags(args: argparse.Namespace) -> list[Path]:
    """The files to count; `ConfigError` for a flag out of its range."""
    check_numbers(args)
    return [Path(args.config)] if args.config else stage_files(args.recipe)


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the cost of a model of any kind is told of the machine."""
    return {
        "gpus": args.gpus,
        "utilisation": args.utilisation,
        "peak": args.peak_tflops,
        "peak_float32": args.peak_tflops_float32,
    }


def show(args: argparse.Namespace, text: str, cost: dict[str, Any]) -> int:
    """Print the text and, where it was asked for, write every number."""
    print(text)
    if args.json:
        write_json(args.json, {**cost, "overrides": args.overrides, "versions": versions()})
    return 0


def print_generator_cost(args: argparse.Namespace) -> int:
    """Training and sampling of a generator on latents; an encoder's pass is not in it."""
    from muse.generation.generator_config import load_generator_config  # noqa: PLC0415 (torch)
    from muse.generation.generator_cost import generator_cost, generator_cost_text  # noqa: PLC0415

    check_numbers(args)
    cost = generator_cost(load_generator_config(args.generator, args.overrides), **machine(args))
    return show(args, generator_cost_text(args.generator, cost), cost)


def print_umm_cost(args: argparse.Namespace) -> int:
    """Training and sampling of a stage of the multimodal model."""
    from muse.multimodal.umm_cost import umm_cost, umm_cost_text  # noqa: PLC0415 (torch)
    from muse.multimodal.umm_run_config import load_umm_config  # noqa: PLC0415

    check_numbers(args)
    folder = Path(args.umm).expanduser().absolute().parent.name
    cost = umm_cost(load_umm_config(args.umm, args.overrides), folder, **machine(args))
    return show(args, umm_cost_text(args.umm, cost), cost)


@cli.entry
def main(argv=None) -> int:
    args = cli.parse(make_parser(), argv)
    if args.generator:
        return print_generator_cost(args)
    if args.umm:
        return print_umm_cost(args)
    files = check_flags(args)

    # Heavy, and not needed to refuse a flag.
    from muse.analysis.cost import cost_markdown, cost_text, run_cost  # noqa: PLC0415

    costs = [
        run_cost(
            load_config(file, args.overrides),
            batch=args.batch_size,
            **machine(args),
            peak_tf32=args.peak_tflops_tf32,
            bandwidth=args.bandwidth_gb,
        )
        | {"name": f"{file.parent.name}/{file.stem}"}
        for file in files
    ]
    text = cost_markdown(costs) if args.markdown else cost_text(costs)
    return show(args, text, {"stages": costs})


if __name__ == "__main__":
    sys.exit(main())
