#!/usr/bin/env python3
"""Run the commands of README and docs that no test runs: blocks below *Needs …* or *Takes …*.

Every other block is run by tests/test_doc_blocks.py. Without names this runs the blocks that only
take time, one after another, each in a shell of its own in the project's folder, as a reader does,
who comes from README and has run the demo. What needs GPUs, weights, data or the network is named,
and run if it is asked for. What a block prints goes to outputs/check_docs. Exit code 1: one failed.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muse import cli
from muse.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"\*((?:Needs|Takes) [^*]+)\*")
LANGUAGES = {"bash": ("bash", "-euo", "pipefail"), "python": ("python", "-")}


class Block(NamedTuple):
    """A code block of a document."""

    document: str
    line: int
    language: str
    code: str
    mark: str = ""  # "Needs …" or "Takes …", from the line in italics above it

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def documents() -> list[Path]:
    """README and the pages of docs, in their order."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read_blocks(document: str, text: str) -> list[Block]:
    """The blocks of a document, in order."""
    blocks = []
    for found in FENCE.finditer(text):
        above = MARK.fullmatch(text[: found.start()].rstrip().rpartition("\n")[2])
        line = text.count("\n", 0, found.start()) + 1
        blocks.append(Block(document, line, found[1], found[2], above[1] if above else ""))
    return blocks


def marked_blocks(files: Sequence[Path]) -> list[Block]:
    """The blocks of these documents that say what they need or take."""
    return [
        block
        for file in files
        for block in read_blocks(file.name, file.read_text(encoding="utf-8"))
        if block.mark and block.language in LANGUAGES
    ]


def chosen_blocks(blocks: Sequence[Block], names: Sequence[str], needy: bool) -> list[Block]:
    """The blocks to run: those named, DOCUMENT or DOCUMENT:LINE; without names those that take."""
    for name in names:
        if not any(name in (str(block), block.document) for block in blocks):
            raise ConfigError(f"{name}: no such block below *Needs …* or *Takes …* (see --list)")
    if names:
        return [block for block in blocks if str(block) in names or block.document in names]
    return [block for block in blocks if needy or block.mark.startswith("Takes")]


def run_block(block: Block, log: Path, limit: float | None) -> tuple[int | None, float]:
    """Exit code (None: over the limit) and seconds; what it prints goes into `log`."""
    program, *flags = LANGUAGES[block.language]
    words = [sys.executable if program == "python" else program, *flags]
    started = time.monotonic()
    with log.open("wb") as out:
        done = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all that it starts can be ended with it
        )
        try:
            done.communicate(block.code.encode(), timeout=limit)
            code = done.returncode
        except BaseException as error:
            os.killpg(done.pid, signal.SIGKILL)
            done.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise  # Ctrl-C
            code = None
    return code, time.monotonic() - started


def first_command(block: Block) -> str:
    """Its first line that is no comment."""
    lines = [line.strip() for line in block.code.splitlines()]
    return next((line for line in lines if line and not line.startswith("#")), "")


def make_parser():
    """The flags."""
    parser = cli.plain_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="BLOCK", help="README.md, or README.md:30")
    parser.add_argument("--list", action="store_true", help="name the blocks, run nothing")
    parser.add_argument("--all", action="store_true", help="also blocks that need something")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of each block")
    parser.add_argument("--output", default=str(ROOT / "outputs/check_docs"), help="for the logs")
    parser.add_argument("--documents", nargs="+", type=Path, help="other files than README, docs")
    return parser


@cli.entry
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    blocks = marked_blocks(args.documents or documents())
    chosen = chosen_blocks(blocks, args.names, args.all or args.list)
    if args.list:
        for block in chosen:
            print(f"{block}\t{block.mark}\t{first_command(block)}")
        return 0
    output, failed = Path(args.output), 0
    output.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        if block not in chosen:
            if not args.names:
                print(f"not run  {block}: {block.mark}")
            continue
        log = output / f"{block.document}-{block.line}.log"
        code, seconds = run_block(block, log, args.limit)
        failed += code != 0
        how = "passed" if code == 0 else "failed" if code is not None else "too long"
        where = "" if code == 0 else f" (exit code {code}, see {shlex.quote(str(log))})"
        print(f"{how:<8} {block}: {seconds:.0f} s{where}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
