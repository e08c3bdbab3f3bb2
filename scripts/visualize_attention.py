"""Draw what the blocks attend to: of one picture (`single`) or of many (`batch`)."""

import sys
from pathlib import Path

from muse import cli
from muse.utils.io import writable_directory


@cli.entry
def main(argv=None) -> int:
    parser = cli.parser(__doc__, checkpoint=True)
    parser.add_argument("--mode", choices=("single", "batch"), default="single")
    parser.add_argument(
        "--style",
        choices=("query", "release"),
        default="query",
        help="query: a row a block, what the query's cell attends to; release: as the authors' "
        "figures, where three heads of the last block look",
    )
    parser.add_argument(
        "--image",
        "--image_path",
        default=None,
        help="picture file (single), or directory or glob (batch); batch without one takes "
        "the configuration's evaluation pictures",
    )
    parser.add_argument("--output", required=True, help="directory for the sheets")
    parser.add_argument(
        "--query",
        type=float,
        nargs=2,
        default=None,
        metavar=("Y", "X"),
        help="where the query is, as fractions of height and width; default: the middle, and for "
        "single four more places",
    )
    parser.add_argument(
        *("--num_images", "--max_images", "--max-images"),
        type=int,
        default=8,
        help="batch: how many pictures",
    )
    args = cli.parse(parser, argv)
    cfg = cli.load_cfg(args)

    from muse.analysis import attention_pictures  # noqa: PLC0415 - heavy, and --help is quick

    pictures = attention_pictures.pictures_for(cfg, args.mode, args.image, args.num_images)
    folder = writable_directory(args.output)
    model = cli.open_model(args, cfg)
    for path in attention_pictures.draw_attention(
        model, pictures, Path(folder), args.mode, args.query, args.style
    ):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
