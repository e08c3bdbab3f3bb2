"""docs/questions.md: every message that it quotes is one that the program says."""

import ast
import functools
import re

import pytest

from muse.command_line import missing_package
from tests.helpers import ROOT

ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
QUOTED = ROW.findall((ROOT / "docs/questions.md").read_text(encoding="utf-8"))


def text_of(node: ast.expr) -> str | None:
    """A string of the code with … for what is put in; None for other expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" for part in node.values)
    return None


@functools.cache
def said() -> tuple[str, ...]:
    """All strings of the package and its scripts that are no docstrings."""
    found = []
    for file in sorted([*(ROOT / "muse").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        parts = {
            id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values
        }
        alone = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if id(node) not in parts | alone and isinstance(node, ast.expr):
                found.append(text_of(node) or "")
    return tuple(filter(None, found))


def is_said(message: str, strings: tuple[str, ...]) -> bool:
    """Whether the fixed parts of a message occur in one string, in this order."""
    parts = [part.strip() for part in message.split("…") if part.strip()]
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return any(pattern.search(text) for text in strings)


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_said(message):
    assert max(map(len, message.split("…"))) >= 8, "too short to be found again"
    assert is_said(message, said())


def test_what_is_not_said_is_found():
    """Words of another string, another order, words of a docstring."""
    strings = ("…: no such picture in …", "cannot be written")
    assert is_said("…: no such picture in …", strings) and is_said("cannot be … written", strings)
    assert not is_said("no such picture … cannot be written", strings)
    assert not is_said("picture in no such", strings)
    assert not is_said("One line about a package that is not installed", said())
    assert missing_package.__doc__.startswith("One line about a package that is not installed")
    assert len(QUOTED) == len(set(QUOTED)) > 40
