"""Pictures from text: one prompt, a file of prompts, or GenEval's or WISE's own prompt file.

A picture depends on --seed and its number alone. Several processes (torchrun) share the prompts.
"""

import sys

from muse import cli
from muse.errors import ConfigError
from muse.multimodal.picture_files import write_generated
from muse.multimodal.prompt_files import LAYOUTS, Prompt, PromptFile, read_prompts
from muse.multimodal.umm_command import (
    command_facts,
    one_of,
    open_for_command,
    parse_umm,
    umm_parser,
)
from muse.utils.distributed import leave_processes
from muse.utils.io import writable_directory, write_json


def make_parser():
    """The flags."""
    parser = umm_parser(__doc__, sampling=True)
    parser.add_argument("--prompt", metavar="TEXT", help="one prompt")
    parser.add_argument("--prompts", metavar="FILE", help="one a line, .jsonl (geneval), .json")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), help="of FILE; told by its ending")
    parser.add_argument(
        "--output", required=True, help="folder, laid out as the file's judge reads"
    )
    parser.add_argument("--samples", type=int, default=1, help="pictures a prompt (GenEval: 4)")
    parser.add_argument("--size", help="side, or HEIGHTxWIDTH, in pixels; default: the model's")
    return parser


def picture_size(text: str | None) -> int | tuple[int, int] | None:
    """ "512" or "512x768" as the model takes it."""
    sides = [] if text is None else text.lower().split("x")
    if not all(side.isdigit() and int(side) > 0 for side in sides) or len(sides) > 2:
        raise ConfigError(f"--size must be a side or HEIGHTxWIDTH, got {text!r}")
    if len(sides) < 2:
        return int(sides[0]) if sides else None
    return int(sides[0]), int(sides[1])


@cli.entry
def main(argv=None) -> int:
    args = parse_umm(make_parser(), argv)
    size = picture_size(args.size)
    if args.samples < 1:
        raise ConfigError(f"--samples must be at least 1, not {args.samples}")
    if one_of(args, "prompt", "prompts") == "prompt":
        if not args.prompt.strip():
            raise ConfigError("--prompt is empty")
        file = PromptFile("plain", (Prompt(0, "00000", args.prompt.strip()),))
    else:
        file = read_prompts(args.prompts, args.layout)
    if file.layout == "imgedit":
        raise ConfigError(f"{args.prompts}: holds edits; scripts/edit.py reads it")
    root = writable_directory(args.output)
    umm = open_for_command(args)
    umm.latent_scale.require()
    written = write_generated(
        umm,
        file,
        root,
        args.samples,
        args.batch_size,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        size=size,
    )
    if leave_processes():
        facts = command_facts(args, layout=file.layout, prompts_read=len(file.prompts))
        write_json(f"{args.output.rstrip('/')}.json", {"protocol": facts})
        print(written[0] if len(written) == 1 else root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
