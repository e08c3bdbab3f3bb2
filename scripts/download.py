"""Fetch the weights that a configuration needs from the hub into one directory, and verify them.

Afterwards CHECKPOINT_DIR=DIRECTORY and HF_HUB_OFFLINE=1 are enough. Nothing else in muse calls
this.
"""

import sys
from pathlib import Path

from muse import cli
from muse.utils.io import writable_directory


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Parse, fetch, print a line for each part."""
    parser = cli.plain_parser(__doc__)
    parser.add_argument("--config", required=True, help="such as muse_1b/stage1")
    parser.add_argument("--output", default="checkpoints", help="the directory")
    parser.add_argument("--list", action="store_true", help="name what is needed; fetch nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    args = cli.parse(parser, argv)
    args.checkpoint = None
    cfg = cli.load_cfg(args)
    # Imports torch, which `--help` does not need.
    from muse.commands import download_weights as download  # noqa: PLC0415

    needed = download.needed_weights(cfg, download.open_clip_hub_id)
    for line in download.other_sources(cfg, needed):
        print(line)
    if args.list or not needed:
        for part in needed:
            print(f"{part.key}: {part.repo_id} ({', '.join(part.patterns)})")
        if not needed:
            print("nothing of the hub is needed")
        return 0
    root = writable_directory(Path(args.output))
    results = download.fetch_weights(needed, root)
    for one in results:
        if not one.problem:
            print(f"{one.needed.key}: {one.needed.repo_id} -> {one.folder} ({one.bytes:,} bytes)")
    for one in results:
        if one.problem:
            print(f"error: {one.needed.key}: {one.needed.repo_id}: {one.problem}", file=sys.stderr)
    print(f"export CHECKPOINT_DIR={root.resolve()}")
    return 2 if any(one.problem for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
