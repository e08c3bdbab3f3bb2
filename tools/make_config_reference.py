#!/usr/bin/env python3
"""Write docs/configuration.md: every key of every kind of configuration, from the schemas' fields.

A test (tests/test_configuration_page.py) fails where the page is not what this would write.
"""

import dataclasses
import re
import sys
import types
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from muse import cli
from muse.config_fields import walk
from muse.config_schema import Config
from muse.generation.generator_config import GeneratorConfig
from muse.multimodal.umm_run_config import UMMRunConfig

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Configuration

*Written by `python tools/make_config_reference.py` from the fields of `muse/config_schema.py`, \
`muse/generation/generator_config.py` and `muse/multimodal/umm_run_config.py`. Do not edit it \
here.*

A configuration is a YAML file that states only what differs from the defaults of this page. \
`base:` names files to read first, beside it. Later values win, in this order: the defaults, the \
files under `base`, the file itself, `--recipe NAME` (a file of `configs/recipes`), and the \
`key=value` words at the end of a command.

- A key is written with dots on the command line: `losses.itc.weight=0.5`, \
`model.encoder.config={}`. Quote braces and spaces.
- `${oc.env:NAME}` is an environment variable, read when the value is used. A run that needs one \
that is not set stops with its name.
- An unknown key, a wrong type, a value out of its range and an impossible combination are one \
line and exit code 2 ([questions.md](questions.md#configuration)).
- A run writes the whole configuration that it used into `config.yaml` of its output directory. \
That file is a configuration too.

`null` is "no value"; the sentence says what it means. The same keys with the same sentences, as \
a file to copy from: [`configs/default.yaml`](../configs/default.yaml).
"""
# Title, schema, and what stands above its tables.
KINDS = (
    ("Tokenizer", Config, "For `tools/train_stage1.sh` and every command that takes `--config`."),
    (
        "Generator",
        GeneratorConfig,
        "For `tools/train_generator.sh` and `configs/generation` ([generation.md](generation.md)).",
    ),
    (
        "Multimodal model",
        UMMRunConfig,
        "For `tools/train_umm.sh` and `configs/umm_1b` ([multimodal.md](multimodal.md)).",
    ),
)
WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", Any: "several forms"}


def reference_page() -> str:
    """The text of docs/configuration.md."""
    lines = [HEAD, *(f"- [{title}](#{_anchor(title)})" for title, _, _ in KINDS)]
    (first, tokenizer, _), *_ = KINDS
    known = dict(walk(tokenizer))
    for title, schema, sentence in KINDS:
        lines += ["", f"## {title}", "", sentence]
        for name, field in walk(schema):
            if dataclasses.is_dataclass(field.type):
                lines += _section(name, field, known if title != first else {}, title)
    return "\n".join(lines) + "\n"


def _anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _section(
    name: str, field: dataclasses.Field, known: dict[str, dataclasses.Field], title: str
) -> Iterator[str]:
    """Heading, sentence and table of one section.

    Args:
        name: dotted.
        field: whose type is the section's class.
        known: dotted name -> field of the tokenizer's, which are not told of again.
        title: of the kind of configuration.
    """
    told = known.get(name)
    if told is not None and told.type is field.type:
        if "." not in name:  # with all sections inside
            yield from ("", f"### {title}: `{name}`", "")
            yield f"As [`{name}`](#{_anchor(name)}) of the tokenizer.{_said(field)}"
        return
    yield from ("", f"### {title}: `{name}`" if known else f"### `{name}`")
    if said := _said(field).strip():
        yield from ("", said)
    keys = {
        f"{name}.{one.name}": one
        for one in dataclasses.fields(field.type)
        if not dataclasses.is_dataclass(one.type)
    }
    same = [key for key, one in keys.items() if _same(one, known.get(key))]
    if same:
        names = ", ".join(f"`{key.rpartition('.')[2]}`" for key in same)
        yield from ("", f"As [`{name}`](#{_anchor(name)}) of the tokenizer: {names}.")
    if len(same) < len(keys):
        yield from ("", "| key | type | default | choices, range | |", "|---|---|---|---|---|")
    yield from (_row(key, one) for key, one in keys.items() if key not in same)


def _said(field: dataclasses.Field) -> str:
    sentence = field.metadata["sentence"]
    return f" {_escaped(sentence[:1].upper() + sentence[1:])}." if sentence else ""


def _same(field: dataclasses.Field, other: dataclasses.Field | None) -> bool:
    """Whether two keys are told of in the same words."""
    return other is not None and (
        dict(field.metadata) == dict(other.metadata) and _default(field) == _default(other)
    )


def _default(field: dataclasses.Field) -> Any:
    given = field.default is not dataclasses.MISSING
    return field.default if given else field.default_factory()


def _row(name: str, field: dataclasses.Field) -> str:
    shown = (
        yaml.safe_dump(_default(field), default_flow_style=True, width=10_000)
        .split("\n...")[0]
        .strip()
    )
    about = field.metadata
    cells = (f"`{name}`", type_words(field.type), f"`{shown}`", allowed(about), about["sentence"])
    first, *others = (cell if cell.startswith("`") else _escaped(cell) for cell in cells)
    return "| " + " | ".join((first, *others)) + " |"


def type_words(kind: Any) -> str:
    """A type as a reader of YAML says it: `list of integer, or null`."""
    if kind in WORDS:
        return WORDS[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        (one,) = [part for part in inner if part is not type(None)]
        return f"{type_words(one)}, or null"
    if origin is list:
        return "list" if inner[0] is Any else f"list of {type_words(inner[0])}s"
    if origin is dict:
        return "mapping" if inner[1] is Any else f"mapping of text to {type_words(inner[1])}"
    raise TypeError(f"no words for the type {kind}")


def allowed(about: Any) -> str:
    """The choices or the range of a key: `l1`, `l2`; ≥ 0, < 1."""
    choices: Collection[Any] | None = about["choices"]
    if choices is not None:
        return ", ".join(f"`{choice}`" for choice in choices)
    signs = (("≥", about["least"]), (">", about["above"]), ("<", about["below"]))
    return ", ".join(f"{sign} {bound:g}" for sign, bound in signs if bound is not None)


def _escaped(text: str) -> str:
    """Plain text as Markdown shows it."""
    for sign in "*|<":
        text = text.replace(sign, "\\" + sign)
    return text


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Write the file and say where it is."""
    parser = cli.plain_parser(__doc__)
    parser.add_argument("--output", default=str(ROOT / "docs/configuration.md"), metavar="FILE")
    output = Path(parser.parse_args(argv).output)
    output.write_text(reference_page(), encoding="utf-8")
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
