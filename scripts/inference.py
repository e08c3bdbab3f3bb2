"""Reconstruct pictures of any size: one file, a directory or a glob."""

import sys

from muse import cli
from muse.errors import ConfigError
from muse.utils.io import writable_directory


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Parse, reconstruct, print a line for each picture."""
    parser = cli.parser(__doc__, checkpoint=True)
    parser.add_argument(
        "--image_path", "--image", required=True, help="picture file, directory or glob"
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--max_side", type=int, default=2048, help="larger pictures are shrunk to this side, pixels"
    )
    parser.add_argument(
        "--tile", type=int, default=None, help="decode in tiles of this side, pixels: less memory"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bf16", "int8"),
        default="float32",
        help="of the weights in memory; int8 computes in float32",
    )
    args = cli.parse(parser, argv)
    if args.tile is not None and args.tile < 1:
        raise ConfigError(f"--tile must be at least 1 pixel, not {args.tile}")
    cfg = cli.load_cfg(args)
    from muse.inference import find_images, reconstruct_files  # noqa: PLC0415 (imports torch)
    from muse.models.loading import load_model  # noqa: PLC0415 (imports torch)

    files = find_images(args.image_path)
    folder = writable_directory(args.output_dir)
    args.device = cli.device(args.device)
    model = load_model(args.checkpoint, cfg.model, args.device, args.precision)
    results, failed = reconstruct_files(model, files, folder, args.max_side, args.tile)
    for result in results:
        print(
            f"{result.source} {result.width}x{result.height} -> {result.reconstruction} "
            f"(PSNR {result.psnr:.2f} dB)"
        )
    for file, reason in failed:
        print(f"error: {file}: {reason}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
