"""The same small generator on the latents of several tokenizers, several seeds each.

What a tokenizer's latents are worth for generation is seen when everything else is equal: network,
steps, noise and the pictures it is measured on (`tools/demo_generation.sh` has what the columns
mean).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from muse import __version__
from muse.errors import ConfigError
from muse.experiments.demo_generation import GenerationYardstick, prepare_yardstick
from muse.experiments.latent_spaces import GenerationDemoPlan, LatentSpace
from muse.experiments.spreads import spread_cell, spread_of
from muse.generation.latent_tokenizer import MuseTokenizer, open_tokenizer
from muse.utils.io import versions, writable_directory, write_json, write_text
from muse.utils.weights import read_mapping

log = logging.getLogger(__name__)

# Column -> (row of the demo's table, its number, digits).
COLUMNS = {
    "there and back: distance ↓": ("reconstructions", "fd", 1),
    "class accuracy ↑": ("reconstructions", "accuracy", 3),
    "samples: distance ↓": ("samples", "fd", 1),
    "class accuracy, no guidance ↑": ("samples", "accuracy", 3),
    "guided: distance ↓": ("guided", "fd", 1),
    "class accuracy, guided ↑": ("guided", "accuracy", 3),
}


def read_tokenizer_arms(
    words: Sequence[str], study: str | None = None, variants: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Name -> checkpoints, one a seed, of `NAME=DIR,DIR` and of the variants of an ablation study.

    Args:
        words: `NAME=DIR[,DIR ...]`.
        study: the output directory of `tools/ablate.sh`; None: none.
        variants: rows of it.
    """
    arms: dict[str, list[str]] = {}
    for word in words:
        name, _, folders = word.partition("=")
        if not name or not folders or name in arms:
            raise ConfigError(f"--run {word}: not of the form NAME=DIR,DIR, each name once")
        arms[name] = folders.split(",")
    if study is not None:
        rows = read_mapping(Path(study) / "ablation.json", "variants")
        for name in variants:
            if name not in rows or name in arms:
                held = ", ".join(rows)
                raise ConfigError(f"--variants {name}: {study} has {held}, and each name is once")
            runs = rows[name]["runs"].values()
            arms[name] = [str(Path(study) / folders[-1] / "final") for folders in runs]
    if not arms:
        raise ConfigError("no tokenizers: give --run NAME=DIR,DIR or --study DIR")
    return arms


def compare_tokenizers(
    output: Path,
    plan: GenerationDemoPlan,
    arms: Mapping[str, Sequence[str]],
    data: Path | None = None,
    kind: str = "stamps",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train and measure a generator for each tokenizer; write `comparison.json` and `.md`.

    After an interruption the same call goes on.

    Args:
        output: the directory.
        plan: how much; the generator of an arm's n-th checkpoint has the seed `plan.seed` + n.
        arms: name -> checkpoints, one a seed.
        data: a directory with train-*.tar, val-*.tar and classes.txt; None makes demo data.
        kind: of demo data: stamps or shapes.
        overrides: `key=value` of the generator's configuration.
    """
    output = writable_directory(output)
    torch.set_flush_denormal(True)
    tokenizers = {name: [open_tokenizer(one) for one in paths] for name, paths in arms.items()}
    yardstick = prepare_yardstick(output, plan, data, kind)
    rows = {}
    for name, seeds in tokenizers.items():
        measured = []
        for number, tokenizer in enumerate(seeds):
            one = replace(plan, seed=plan.seed + number)
            measured.append(
                _measure(f"{name}-{number}", tokenizer, output, one, yardstick, overrides)
            )
            log.info("%s, seed %d: %s", name, one.seed, measured[-1])
        columns = {
            column: spread_of([found[row][number] for found in measured])
            for column, (row, number, _) in COLUMNS.items()
        }
        rows[name] = {"columns": columns, "seeds": measured, "checkpoints": list(arms[name])}
    protocol = {"muse": __version__, "versions": versions(), "plan": asdict(plan)}
    protocol |= {"data": str(yardstick.data), "overrides": list(overrides)}
    results = {"tokenizers": rows, "protocol": protocol}
    write_json(output / "comparison.json", results)
    write_text(output / "comparison.md", comparison_table(results))
    return results


def _measure(
    name: str,
    tokenizer: MuseTokenizer,
    output: Path,
    plan: GenerationDemoPlan,
    yardstick: GenerationYardstick,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Results of one tokenizer and seed, from its file where it was measured already."""
    settings = {"tokenizer": tokenizer.sha256, "plan": asdict(plan), "overrides": list(overrides)}
    settings = json.loads(json.dumps(settings | {"data": str(yardstick.data)}))
    file = output / "measured" / f"{name}.json"
    if file.is_file() and (kept := read_mapping(file))["settings"] == settings:
        return kept["measured"]
    space = LatentSpace(
        name, tokenizer, output, plan, yardstick.data, len(yardstick.classes), overrides
    )
    measured, _ = space.run(yardstick.judge, yardstick.other_half, yardstick.val)
    write_json(file, {"settings": settings, "measured": measured})
    return measured


def comparison_table(results: dict[str, Any]) -> str:
    """The table, for a document."""
    lines = ["| tokenizer | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name, row in results["tokenizers"].items():
        cells = [spread_cell(row["columns"][one], digits) for one, (*_, digits) in COLUMNS.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
