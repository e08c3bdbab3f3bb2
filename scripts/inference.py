"""Reconstruct pictures of any size: files, directories or globs.

Without further flags by the model that comes with the package. Each picture is written as NAME.png,
and beside its original as NAME_compare.png; PSNR and SSIM go to reconstructions.csv.
"""

import sys

from muse import cli
from muse.commands.picture_flags import picture_parser, picture_words
from muse.utils.io import writable_directory


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Parse, reconstruct, print a line for each picture."""
    parser = picture_parser(__doc__)
    parser.add_argument("--image_path", "--image", help="picture file, directory or glob")
    parser.add_argument("--output_dir", default="reconstructions", help="where the pictures go")
    parser.add_argument(
        "--max_side", type=int, default=2048, help="larger pictures are shrunk to this side, pixels"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="pictures of one size at a time")
    parser.add_argument(
        "--tile", type=int, help="decode in tiles of this side, pixels: less memory"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bf16", "int8"),
        default="float32",
        help="of the weights in memory; int8 computes in float32",
    )
    args = cli.parse(parser, argv)
    pictures = picture_words(args, args.image_path)
    cfg = cli.load_cfg(args)
    # They import torch, which `--help` does not need.
    from muse.commands.picture_batches import check_bounds, find_all  # noqa: PLC0415
    from muse.commands.reconstruct_pictures import (  # noqa: PLC0415
        reconstruct_files,
        write_quality,
    )

    check_bounds(args.max_side, args.batch_size, args.tile)
    files = find_all(pictures)
    folder = writable_directory(args.output_dir)
    model = cli.open_model(args, cfg, args.precision)
    results, failed = reconstruct_files(
        model, files, folder, args.max_side, args.batch_size, args.tile
    )
    for result in results:
        notes = "".join(f", {note}" for note in result.notes)
        print(
            f"{result.source} {result.width}x{result.height} -> {result.reconstruction} "
            f"(PSNR {result.psnr:.2f} dB, SSIM {result.ssim:.4f}{notes})"
        )
    if results:
        write_quality(folder / "reconstructions.csv", results)
    for file, reason in failed:
        print(f"error: {file}: {reason}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
