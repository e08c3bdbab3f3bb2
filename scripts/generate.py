"""Generate pictures: a PNG folder or an npz for evaluate_images.py, and a grid to look at.

Picture i depends on --seed and i alone. Several processes (torchrun) share the pictures out.
"""

import sys
from pathlib import Path

import torch

from muse import __version__, cli
from muse.config import plain
from muse.errors import CheckpointError, ConfigError
from muse.evaluation.measurement import check_number
from muse.generation.generate_images import GenerationPlan, generate_images
from muse.generation.generator import Generator
from muse.generation.generator_config import load_generator_config
from muse.generation.image_sampler import ImageSampler
from muse.generation.latent_tokenizer import open_tokenizer
from muse.generation.sampler import METHODS
from muse.utils.distributed import join_processes, leave_processes
from muse.utils.io import versions, write_json

SAMPLING = ("steps", "method", "shift", "cfg_scale", "cfg_interval", "cfg_channels")


def make_parser():
    """The flags; those of sampling default to what the generator was saved with."""
    parser = cli.plain_parser(__doc__)
    add = parser.add_argument
    add(
        "--config",
        help="generator's configuration: its `sampling`, and the architecture and "
        "latents of a checkpoint that is a file of weights alone",
    )
    add("--checkpoint", required=True, help="run, final, checkpoint-N, or a published .pt")
    add("--tokenizer", help="what decodes; default: the one that the generator names")
    add("--num_images", type=int, required=True, help="pictures")
    add("--output", required=True, help="folder of PNG files, or FILE.npz with arr_0")
    add(
        "--labels",
        default="all",
        help="all: each class as often as the others; random; or classes, such as 207,360",
    )
    add("--seed", type=int, default=0, help="of noise and random labels")
    add("--steps", type=int, help="of the solver")
    add("--method", choices=METHODS, help="of the solver")
    add("--shift", type=float, help="of the grid of times")
    add("--cfg_scale", type=float, help="guidance; 1: none")
    add("--cfg_interval", help="LOW,HIGH: guided where LOW <= t < HIGH")
    add("--cfg_channels", type=int, help="guide this many first channels alone")
    add("--guide", metavar="CHECKPOINT", help="a weaker generator, for autoguidance")
    add("--image_size", type=int, help="side of the pictures; default: the decoder's own")
    add("--batch_size", type=int, default=64, help="pictures at a time")
    add("--mixed_precision", default="no", choices=("no", "bf16"), help="of all networks")
    add("--grid", metavar="FILE.png", help="also a sheet of the first pictures")
    add("--grid_images", type=int, default=48, help="pictures on it, eight in a row")
    add("--device", help="cuda, mps or cpu; the first that exists when not given")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    return parser


def parsed(argv):
    """The flags, checked as far as they can be without a network."""
    args = cli.parse(make_parser(), argv)
    for name, least in (
        ("num_images", 1),
        ("steps", 1),
        ("shift", 0.0),
        ("cfg_channels", 1),
        ("image_size", 1),
        ("batch_size", 1),
        ("grid_images", 1),
        ("seed", 0),
    ):
        check_number(name, getattr(args, name), least)
    if args.labels not in ("all", "random"):
        args.labels = tuple(numbers(args.labels, int, "labels"))
    if args.cfg_interval is not None:
        args.cfg_interval = numbers(args.cfg_interval, float, "cfg_interval")
        if len(args.cfg_interval) != 2 or not args.cfg_interval[0] <= args.cfg_interval[1]:
            raise ConfigError(f"--cfg_interval must be LOW,HIGH, got {args.cfg_interval}")
    if args.overrides and args.config is None:
        raise ConfigError(f"{args.overrides[0]}: an override needs --config")
    return args


def numbers(text: str, kind: type, flag: str) -> list:
    """Numbers with commas between them."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--{flag} must be numbers with commas between them, got {text!r}"
        ) from None


def open_generator(args, cfg, path: str) -> Generator:
    """A directory as it was saved, or a file by the configuration."""
    if Path(path).is_file() and cfg is not None:
        return Generator.from_published(path, cfg, args.device)
    return Generator.from_pretrained(path, args.device)


@cli.entry
def main(argv=None) -> int:
    args = parsed(argv)
    cfg = load_generator_config(args.config, args.overrides) if args.config else None
    args.device = join_processes(cli.device(args.device))
    torch.set_flush_denormal(True)
    generator = open_generator(args, cfg, args.checkpoint)
    facts = generator.facts["tokenizer"]
    path = args.tokenizer or (cfg and cfg.tokenizer.checkpoint) or facts["path"]
    if path is None:
        raise CheckpointError(f"{args.checkpoint}: names no tokenizer: give --tokenizer")
    tokenizer = open_tokenizer(path, facts["model"], args.device, facts["sha256"])
    guide = open_generator(args, cfg, args.guide) if args.guide else None
    if guide is not None and guide.facts["tokenizer"]["sha256"] != facts["sha256"]:
        raise CheckpointError(f"--guide {args.guide}: learned latents of another tokenizer")
    options = plain(cfg.sampling) if cfg else generator.facts["sampling"]
    given = {name: getattr(args, name) for name in SAMPLING}
    options = {**options, **{name: value for name, value in given.items() if value is not None}}
    sampler = ImageSampler(
        generator,
        tokenizer,
        options,
        args.seed,
        args.image_size or facts["image_size"],
        torch.bfloat16 if args.mixed_precision == "bf16" else None,
        guide and guide.net,
    )
    plan = GenerationPlan(
        args.num_images, args.output, args.labels, args.batch_size, args.grid, args.grid_images
    )
    generate_images(sampler, plan)
    if leave_processes():
        protocol = {**vars(args), "sampling": options, "tokenizer": {**facts, "path": str(path)}}
        protocol |= {"flow": generator.facts["flow"], "muse": __version__, "versions": versions()}
        write_json(f"{args.output.rstrip('/')}.json", {"protocol": protocol})
        print(args.output, *([args.grid] if args.grid else []))
    return 0


if __name__ == "__main__":
    sys.exit(main())
