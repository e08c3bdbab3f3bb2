"""Latents that `muse encode` wrote to pictures: NAME.png each, in the size of the original.

Latents of another model are refused.
"""

import sys

from muse import cli
from muse.commands.picture_flags import picture_parser, picture_words
from muse.utils.io import file_sha256, writable_directory


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Parse, decode, print a line for each picture."""
    parser = picture_parser(__doc__, "latents")
    parser.add_argument("--output_dir", default="decoded", help="where the pictures go")
    args = cli.parse(parser, argv)
    words = picture_words(args)
    cfg = cli.load_cfg(args)
    # They import torch, which `--help` does not need.
    from muse.commands.latent_files import decode_files, find_latents  # noqa: PLC0415
    from muse.models.loading import weights_file  # noqa: PLC0415

    files = find_latents(words)
    folder = writable_directory(args.output_dir)
    model = cli.open_model(args, cfg)
    sha256 = file_sha256(weights_file(args.checkpoint))
    for file, picture in zip(files, decode_files(model, sha256, files, folder)):
        print(f"{file} -> {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
