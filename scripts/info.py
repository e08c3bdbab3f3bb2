"""What a checkpoint is: kind, parameters, configuration, sha256, and what it can do."""

import sys

from muse import cli


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Parse, describe, print."""
    parser = cli.plain_parser(__doc__)
    parser.add_argument(
        "checkpoint", nargs="?", default="muse_tiny", help="name, directory, file or hub id"
    )
    parser.add_argument("--config", default=None, help="configuration that names its text tower")
    args = cli.parse(parser, argv)
    # Imports torch, which `--help` does not need.
    from muse.commands.checkpoint_info import describe_checkpoint, info_lines  # noqa: PLC0415

    print("\n".join(info_lines(describe_checkpoint(args.checkpoint, args.config))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
