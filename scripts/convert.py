"""Turn the authors' checkpoint file into a `from_pretrained` directory, or the way back.

With `--to release` any checkpoint becomes a file in the authors' layout.
"""

import sys
from pathlib import Path

from muse import cli
from muse.errors import CheckpointError


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Parse, convert, say where the result is."""
    parser = cli.parser(__doc__, checkpoint=True)
    parser.add_argument(
        "--output", required=True, help="directory; with --to release a file, .bin or .safetensors"
    )
    parser.add_argument(
        "--to", choices=("muse", "release"), default="muse", help="which layout to write"
    )
    args = cli.parse(parser, argv)
    # The authors' weights give the authors' outputs under their routing alone; a user's own
    # override comes later and wins.
    args.overrides = ["model.routing=release", "model.join_semantics=null", *args.overrides]
    cfg = cli.load_cfg(args)
    target = Path(args.output).expanduser()
    if args.to == "release" and target.suffix not in (".bin", ".safetensors"):
        raise CheckpointError(
            f"{target}: with --to release the output is a file named .bin or .safetensors"
        )
    model = cli.open_model(args, cfg)
    if args.to == "muse":
        model.save_pretrained(target)
    else:
        from muse.models.release_weights import (  # noqa: PLC0415 (imports torch)
            to_release,
            write_release_file,
        )

        if model.config.join_semantics or model.config.routing == "shared":
            raise CheckpointError(
                f"{args.checkpoint}: model.routing={model.config.routing}, but the authors' code "
                "computes routing=release alone and would give other outputs"
            )
        write_release_file(target, to_release(model.state_dict()))
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
