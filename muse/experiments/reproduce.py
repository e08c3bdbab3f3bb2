"""Measures the tables of the paper: what is there is run, what is missing is named."""

import glob
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muse.errors import ConfigError
from muse.experiments.paper_measurements import MEASUREMENTS, NEEDS, Measurement, Need
from muse.experiments.paper_tables import TABLES, Cell
from muse.utils.io import write_json

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]  # commands are those of a clone
COMMANDS_FILE = "commands.json"


# ------------------------------------------------------------------------------------------ needs
def place_of(need: Need) -> Path | None:
    """The first place of a need that exists; None where there is none."""
    for place in need.places:
        path = os.path.expanduser(os.path.expandvars(place))
        if "$" not in path and (found := sorted(glob.glob(path))):
            return Path(found[0])
    return None


def missing(measurement: Measurement) -> list[str]:
    """Names of what a measurement needs and does not find."""
    return [name for name in measurement.needs if place_of(NEEDS[name]) is None]


def command_words(measurement: Measurement, output: Path, found: bool = True) -> list[list[str]]:
    """The commands of a measurement, word by word.

    Args:
        measurement: of MEASUREMENTS.
        output: its directory.
        found: with the places that exist; else with the first place of each need, as in docs.
    """
    places = {
        name: str((place_of(NEEDS[name]) if found else None) or NEEDS[name].places[0])
        for name in measurement.needs
    }
    return [
        [word.format(output=output, **places) for word in shlex.split(command)]
        for command in measurement.commands
    ]


# ---------------------------------------------------------------------------------------- running
@dataclass(frozen=True)
class Outcome:
    """What became of a measurement: its numbers, or why there are none."""

    state: str  # for the table
    numbers: Mapping[str, Any] | None = None
    failed: bool = False


def run_table(name: str, output: Path, long: bool, flags: Sequence[str] = ()) -> dict[str, Outcome]:
    """Run every measurement of a table that can be run; by name, what came of each.

    A measurement that an equal command has written before is read, not run.

    Args:
        name: of TABLES.
        output: each measurement gets a directory in it.
        long: also what takes hours or several GPUs.
        flags: more words for commands of one step, such as `--device cpu`.
    """
    if name not in TABLES:
        raise ConfigError(f"{name!r} is no table; there are: {', '.join(TABLES)}")
    names = dict.fromkeys(cell.measurement for cell in TABLES[name].cells)
    return {one: run_measurement(one, output, long, flags) for one in names}


def run_measurement(name: str, output: Path, long: bool, flags: Sequence[str] = ()) -> Outcome:
    """One measurement: run, read, or why not."""
    measurement, folder = MEASUREMENTS[name], output / name
    if lacking := missing(measurement):
        return Outcome("missing: " + ", ".join(lacking))
    commands = command_words(measurement, folder)
    if len(commands) == 1:
        commands[0] += flags
    results = Path(measurement.results.format(output=folder))
    if _written_by(folder) == commands and (measurement.judged or results.is_file()):
        return _read(measurement, results, "measured before")
    if measurement.long and not long:
        return Outcome(f"takes {measurement.takes}: add --long")
    for command in commands:
        log.info("%s: %s", name, shlex.join(command))
        code = subprocess.run(_started(command), cwd=ROOT, check=False).returncode
        if code:
            return Outcome(f"FAILED with code {code}: {shlex.join(command)}", failed=True)
    write_json(folder / COMMANDS_FILE, commands)
    return _read(measurement, results, "measured")


def _started(command: Sequence[str]) -> list[str]:
    """With this interpreter where the command says `python`."""
    return [sys.executable, *command[1:]] if command[0] == "python" else list(command)


def _written_by(folder: Path) -> Any:
    try:
        return json.loads((folder / COMMANDS_FILE).read_text())
    except (OSError, ValueError):
        return None


def _read(measurement: Measurement, results: Path, state: str) -> Outcome:
    if measurement.judged:
        return Outcome(f"written to {results.parent}; judged by {measurement.judged}")
    try:
        return Outcome(state, json.loads(results.read_text()))
    except (OSError, ValueError) as error:
        return Outcome(f"FAILED: {results} cannot be read ({error})", failed=True)


# ---------------------------------------------------------------------------------------- showing
def number_of(cell: Cell, numbers: Mapping[str, Any] | None) -> str:
    """The number of a cell as it is printed; `–` where it was not measured."""
    value: Any = numbers
    for key in cell.key:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, (int, float)):
        return "–"
    return f"{value * cell.factor:.{cell.digits}f}"


def quoted_numbers(name: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Of a measurement's numbers those that a cell shows, and with what they were measured."""
    kept: dict[str, Any] = {}
    for cell in (cell for table in TABLES.values() for cell in table.cells):
        value: Any = numbers
        for key in cell.key if cell.measurement == name else ():
            value = value.get(key) if isinstance(value, Mapping) else None
        if cell.measurement == name and isinstance(value, (int, float)):
            place = kept
            for key in cell.key[:-1]:
                place = place.setdefault(key, {})
            place[cell.key[-1]] = value
    protocol = numbers.get("protocol", {})
    facts = {key: protocol[key] for key in ("muse", "device", "versions") if key in protocol}
    return {**kept, "protocol": facts}


def result_lines(name: str, outcomes: Mapping[str, Outcome]) -> list[str]:
    """The table for a terminal, then what is missing and where it is expected."""
    table = TABLES[name]
    rows = [("", "", "paper", "ours", "")]
    for cell in table.cells:
        outcome = outcomes[cell.measurement]
        ours = number_of(cell, outcome.numbers)
        rows.append((cell.row, cell.column, cell.paper, ours, outcome.state))
    widths = [max(len(row[place]) for row in rows) for place in range(4)]
    lines = [table.title, ""]
    for row in rows:
        padded = [text.ljust(width) for text, width in zip(row[:4], widths)]
        lines.append("  ".join([*padded, row[4]]).rstrip())
    lacking = dict.fromkeys(
        need for cell in table.cells for need in missing(MEASUREMENTS[cell.measurement])
    )
    if lacking:
        lines += ["", "missing:"]
        lines += [f"  {need}: {need_line(NEEDS[need])}" for need in lacking]
    return [*lines, "", table.note]


def need_line(need: Need) -> str:
    """What a need is, where it is looked for and how one gets it."""
    return f"{need.title}; expected at {' or '.join(need.places)}; from: {need.source}"


def page(recorded: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/reproduce.md: all tables, with the numbers that were recorded.

    recorded: measurement -> its numbers, as `--record` has written them.
    """
    lines = [PAGE_HEAD]
    for name, table in TABLES.items():
        lines += [
            f"## {table.title}",
            "",
            "*Takes minutes for what needs only the demo's pictures.*",
        ]
        lines += ["", "```bash", f"bash tools/reproduce.sh {name}", "```", ""]
        lines += [table.note, "", "| | column | paper | ours |", "|---|---|---:|---:|"]
        for cell in table.cells:
            ours = number_of(cell, recorded.get(cell.measurement))
            lines.append(f"| {cell.row} | {cell.column} | {cell.paper} | {ours} |")
        for one in dict.fromkeys(cell.measurement for cell in table.cells):
            lines += ["", *_recipe(one)]
        lines.append("")
    lines += ["## What is needed", "", "| name | what | expected at | from |", "|---|---|---|---|"]
    for name, need in NEEDS.items():
        places = ", ".join(f"`{place}`" for place in need.places)
        lines.append(f"| `{name}` | {need.title} | {places} | {need.source} |")
    return "\n".join(lines) + "\n"


def _recipe(name: str) -> list[str]:
    """The commands of one measurement, and what they need, for the page."""
    measurement = MEASUREMENTS[name]
    needs = ", ".join(f"`{need}`" for need in measurement.needs) or "nothing"
    judged = f" Judged by {measurement.judged}." if measurement.judged else ""
    commands = command_words(measurement, Path("outputs/reproduce") / name, found=False)
    return [
        f"`{name}` needs {needs}; {measurement.takes}.{judged}",
        "",
        "```text",
        *(" ".join(command) for command in commands),
        "```",
    ]


PAGE_HEAD = """# The paper's tables, and the commands that measure them

Made by `python scripts/reproduce.py --write_page` from \
[`muse/experiments/paper_tables.py`](../muse/experiments/paper_tables.py). \
`bash tools/reproduce.sh TABLE` runs the cells of a table for which weights and data are there, \
names what is missing and where it is expected, and prints the paper's number beside ours. \
`--long` also runs what takes hours; what was measured before is read again. A dash is a number \
that nobody has measured here, or that the paper does not give.
"""
