"""Flags of the picture commands. No torch here: `--help` must answer at once."""

import argparse
import os
import re

from muse import cli
from muse.errors import ConfigError

PACKAGED_MODEL = "muse_tiny"


def picture_parser(description: str, positional: str = "pictures") -> argparse.ArgumentParser:
    """A parser of a command that uses a finished model: nothing but its input must be named.

    Without --config the checkpoint's own configuration holds, without --checkpoint the model that
    comes with the package. `picture_words` reads the positional words.
    """
    made = cli.plain_parser(description)
    made.add_argument("words", nargs="*", metavar=positional.upper(), help="files, folders, globs")
    made.add_argument(
        "--config", default=None, help="YAML configuration; default: the checkpoint's own"
    )
    made.add_argument(
        "--checkpoint",
        default=PACKAGED_MODEL,
        help="save_pretrained directory, hub id, training checkpoint-N, .safetensors with its "
        "config.json, or, with --config, the authors' .bin",
    )
    made.add_argument(
        "--device", default=None, help="cuda, mps or cpu; the first that exists when not given"
    )
    return made


def picture_words(args: argparse.Namespace, named: str | None = None) -> list[str]:
    """The inputs among the positional words; the others, key=value, become `args.overrides`.

    named: what a flag has named as input; then every positional word is an override.
    """
    override = re.compile(r"[a-z_]+(\.\w+)*=")
    is_override = [bool(named) or bool(override.match(word)) for word in args.words]
    is_override = [yes and not os.path.exists(w) for yes, w in zip(is_override, args.words)]
    args.overrides = [word for word, yes in zip(args.words, is_override) if yes]
    inputs = [word for word, yes in zip(args.words, is_override) if not yes]
    inputs = [*([named] if named else []), *inputs]
    if not inputs:
        raise ConfigError("no input: name a file, a folder or a glob")
    return inputs
