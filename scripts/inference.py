"""Reconstruct pictures of any size: one file, a directory or a glob."""

import sys

from muse import cli
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
    args = cli.parse(parser, argv)
    cfg = cli.load_cfg(args)
    from muse.inference import find_images, reconstruct_files  # noqa: PLC0415 (imports torch)

    files = find_images(args.image_path)
    folder = writable_directory(args.output_dir)
    model = cli.open_model(args, cfg)
    results, failed = reconstruct_files(model, files, folder, args.max_side)
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
