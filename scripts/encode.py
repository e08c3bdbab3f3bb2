"""Pictures to latents: NAME.safetensors a picture, which `muse decode` turns back.

Each file carries the sha256 of the model's weights and the picture's size.
"""

import sys

from muse import cli
from muse.commands.picture_flags import picture_parser, picture_words
from muse.utils.io import file_sha256, writable_directory


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Parse, encode, print a line for each picture."""
    parser = picture_parser(__doc__)
    parser.add_argument("--output_dir", default="latents", help="where the latents go")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="stored"
    )
    parser.add_argument(
        "--max_side", type=int, default=2048, help="larger pictures are shrunk to this side, pixels"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="pictures of one size at a time")
    args = cli.parse(parser, argv)
    pictures = picture_words(args)
    cfg = cli.load_cfg(args)
    # They import torch, which `--help` does not need.
    from muse.commands.latent_files import encode_files  # noqa: PLC0415
    from muse.commands.picture_batches import check_bounds, find_all  # noqa: PLC0415
    from muse.models.loading import weights_file  # noqa: PLC0415

    check_bounds(args.max_side, args.batch_size)
    files = find_all(pictures)
    folder = writable_directory(args.output_dir)
    model = cli.open_model(args, cfg)
    sha256 = file_sha256(weights_file(args.checkpoint))
    done, failed = encode_files(
        model, sha256, files, folder, args.dtype, args.max_side, args.batch_size
    )
    for picture, file, shape in done:
        print(f"{picture} -> {file} {'x'.join(map(str, shape))} {args.dtype}")
    for picture, reason in failed:
        print(f"error: {picture}: {reason}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
