"""Image embeddings of pictures: a CSV, or an .npy with the names beside it.

With --text or --texts also the cosine of each picture with each text, by the text tower that the
model was trained with.
"""

import sys
from pathlib import Path

from muse import cli
from muse.commands.picture_flags import picture_parser, picture_words
from muse.errors import ConfigError


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Parse, embed, print each picture's best texts."""
    parser = picture_parser(__doc__)
    parser.add_argument("--output", default="embeddings.csv", help="FILE.csv or FILE.npy")
    parser.add_argument("--text", action="append", default=[], help="may be given several times")
    parser.add_argument("--texts", metavar="FILE", help="texts, one a line")
    parser.add_argument("--top", type=int, default=3, help="texts printed for each picture")
    parser.add_argument(
        "--max_side", type=int, default=2048, help="larger pictures are shrunk to this side, pixels"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="pictures of one size at a time")
    args = cli.parse(parser, argv)
    pictures = picture_words(args)
    target = Path(args.output).expanduser()
    if target.suffix not in (".csv", ".npy"):
        raise ConfigError(f"--output {target}: must end in .csv or .npy")
    named = args.checkpoint
    cfg = cli.load_cfg(args)
    # They import torch, which `--help` does not need.
    from muse.commands import embed_pictures  # noqa: PLC0415
    from muse.commands.picture_batches import check_bounds, find_all  # noqa: PLC0415

    check_bounds(args.max_side, args.batch_size)
    texts = embed_pictures.read_texts(args.text, args.texts)
    files = find_all(pictures)
    of_texts = embed_pictures.embed_texts(texts, named, args.config) if texts else None
    model = cli.open_model(args, cfg)
    files, embeds, failed = embed_pictures.embed_files(model, files, args.max_side, args.batch_size)
    if files:
        embed_pictures.write_embeddings(target, files, embeds)
        print(f"{len(files)} pictures x {embeds.shape[1]} numbers: {target}")
    if files and of_texts is not None:
        cosines = embeds @ of_texts.T  # (N, T)
        table = target.with_name(f"{target.stem}_texts.csv")
        embed_pictures.write_similarities(table, files, texts, cosines)
        for file, row in zip(files, cosines):
            best = row.topk(min(args.top, len(texts)))
            found = (f"{value:.3f} {texts[i]}" for value, i in zip(*map(list, best)))
            print(f"{file}: {'; '.join(found)}")
        print(table)
    for file, reason in failed:
        print(f"error: {file}: {reason}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
