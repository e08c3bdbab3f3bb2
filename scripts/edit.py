"""Edit pictures as instructed: one picture, or ImgEdit's own prompt file.

An edit depends on --seed and its number alone. Several processes (torchrun) share the file out.
"""

import sys
from pathlib import Path

from muse import cli
from muse.errors import ConfigError, DataError
from muse.multimodal.picture_files import write_edited
from muse.multimodal.prompt_files import Prompt, PromptFile, read_prompts
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
    parser.add_argument("--image", metavar="FILE", help="one picture, with --instruction")
    parser.add_argument("--instruction", metavar="TEXT", help="what to change")
    parser.add_argument("--prompts", metavar="FILE", help="ImgEdit's .json")
    parser.add_argument("--sources", metavar="DIR", help="where the pictures of FILE are")
    parser.add_argument("--output", required=True, help="folder for KEY.png, as ImgEdit reads it")
    return parser


def edits_of(args) -> tuple[PromptFile, str | Path]:
    """The instructions, and the folder of their pictures; `MuseError` for what does not fit."""
    if one_of(args, "image", "prompts") == "image":
        if not (args.instruction or "").strip():
            raise ConfigError("--image needs --instruction TEXT")
        image = Path(args.image).expanduser()
        if not image.is_file():
            raise DataError(f"{image}: no such picture")
        prompt = Prompt(0, image.stem, args.instruction.strip(), image.name)
        return PromptFile("imgedit", (prompt,)), image.parent
    if args.sources is None:
        raise ConfigError("--prompts needs --sources DIR")
    return read_prompts(args.prompts, "imgedit"), args.sources


@cli.entry
def main(argv=None) -> int:
    args = parse_umm(make_parser(), argv)
    file, sources = edits_of(args)
    root = writable_directory(args.output)
    umm = open_for_command(args)
    umm.latent_scale.require()
    written = write_edited(
        umm,
        file,
        root,
        sources,
        args.batch_size,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
    )
    if leave_processes():
        facts = command_facts(args, edits=len(file.prompts))
        write_json(f"{args.output.rstrip('/')}.json", {"protocol": facts})
        print(written[0] if len(written) == 1 else root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
