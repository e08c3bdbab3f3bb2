#!/usr/bin/env python3
"""Write configs/default.yaml: every key, its default and its sentence, from the schema's fields."""

import dataclasses
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import OmegaConf

from muse import cli
from muse.config import shipped_config
from muse.config_schema import Config

HEAD = """\
# Every key with its default. A configuration states only what differs; `base:` names files to read
# first (paths beside it). On the command line any script takes trailing key=value overrides, such
# as model.routing=release training.seed=1. ${oc.env:NAME} takes an environment variable, resolved
# when the value is used.
# Written by tools/make_default_config.py from the fields of muse/config_schema.py.
"""
WIDTH, COMMENT_COLUMN = 100, 31


def default_yaml(schema: type) -> str:
    """The text of the file: sections in the order of their classes, a comment beside each key."""
    return HEAD + "\n".join(_lines(schema, "")) + "\n"


def _lines(schema: type, indent: str) -> Iterator[str]:
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            if not indent:
                yield ""
            yield from _commented(f"{indent}{field.name}:", _comment(field))
            yield from _lines(field.type, indent + "  ")
        else:
            value = getattr(schema(), field.name)
            entry = OmegaConf.to_yaml(OmegaConf.create({field.name: value})).strip()
            yield from _commented(indent + entry, _comment(field))


def _comment(field: dataclasses.Field) -> str:
    """The choices, then the sentence."""
    choices = " | ".join(map(str, field.metadata.get("choices") or ()))
    return "; ".join(filter(None, (choices, field.metadata["sentence"])))


def _commented(entry: str, comment: str) -> list[str]:
    """`entry  # comment`, continued on lines of its own below where the comment is long."""
    if not comment:
        return [entry]
    return textwrap.wrap(
        comment,
        WIDTH,
        initial_indent=f"{entry:<{COMMENT_COLUMN - 2}}  # ",
        subsequent_indent=" " * COMMENT_COLUMN + "# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Write the file and say where it is."""
    parser = cli.plain_parser(__doc__)
    parser.add_argument("--output", default=str(shipped_config("default.yaml")), metavar="FILE")
    output = Path(parser.parse_args(argv).output)
    output.write_text(default_yaml(Config), encoding="utf-8")
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
