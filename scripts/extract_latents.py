"""Encode labelled pictures once: shards of latents, their statistics, and an index with counts.

The same command goes on after an interruption. Several processes (torchrun) share the shards out.
"""

import sys

import torch

from muse import cli
from muse.config import plain
from muse.data.mixture import parse_mixture
from muse.errors import ConfigError
from muse.evaluation import command
from muse.evaluation.measurement import Crop
from muse.generation.extraction import ExtractionPlan, extract_latents
from muse.generation.latent_tokenizer import open_tokenizer
from muse.utils.distributed import leave_processes


def make_parser():
    """The flags."""
    parser = cli.parser(__doc__, checkpoint=True)
    add = parser.add_argument
    add(
        "--train_url",
        action="append",
        help="shard pattern, directory of shards, or class folders of pictures; may be given "
        "several times; default: the configuration's training data",
    )
    add("--output", dest="output_dir", required=True, help="folder of the latents")
    add("--flip", action="store_true", help="store the latents of mirrored pictures too")
    add("--resize", type=int, help="shorter edge in pixels; default: the configuration's")
    add("--crop", type=int, help="side of the square in pixels; default: the configuration's")
    add("--dtype", default="float16", choices=("float16", "bfloat16", "float32"), help="stored")
    add(
        "--statistics",
        default="channel",
        choices=("channel", "position"),
        help="what has a mean and a deviation of its own",
    )
    add("--images_per_shard", type=int, default=1000, help="of image folders")
    add("--mixed_precision", default="no", choices=("no", "bf16"), help="of the encoder")
    add("--batch_size", type=int, default=32, help="pictures at a time")
    add("--num_workers", type=int, default=0, help="loader processes")
    return parser


@cli.entry
def main(argv=None) -> int:
    args = cli.parse(make_parser(), argv)
    cfg = cli.load_cfg(args)
    if args.images_per_shard < 1:
        raise ConfigError(f"--images_per_shard must be at least 1, not {args.images_per_shard}")
    preprocessing = cfg.dataset.preprocessing
    crop = args.crop or preprocessing.crop_size
    resize = args.resize or args.crop or preprocessing.resize_shorter_edge
    if crop > resize:
        raise ConfigError(f"--crop {crop} is larger than --resize {resize}")
    setup = command.set_up(args, cfg)
    plan = ExtractionPlan(
        crop=Crop(resize, crop),
        flip=args.flip,
        dtype=args.dtype,
        statistics=args.statistics,
        images_per_shard=args.images_per_shard,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        max_bad_fraction=cfg.dataset.max_bad_fraction,
        autocast=torch.bfloat16 if args.mixed_precision == "bf16" else None,
        device=setup.device,
    )
    sources = args.train_url or parse_mixture(plain(cfg.dataset.params.train_shards_path_or_url))[0]
    notes = cli.protocol(
        setup,
        cfg,
        crop=crop,
        resize=resize,
        flip=args.flip,
        mixed_precision=args.mixed_precision,
    )
    tokenizer = open_tokenizer(args.checkpoint, cfg.model, setup.device)
    index = extract_latents(tokenizer, sources, args.output_dir, plan, notes)
    if leave_processes():
        print(
            f"{index['count']} images x {index['views']} latents of {index['shape']} in "
            f"{len(index['shards'])} shards, {index['skipped']} pictures skipped: {args.output_dir}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
