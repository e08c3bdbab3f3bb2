"""What the demo of generation leaves to look at: the table, grids of samples, nearest pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muse.experiments.generation_judge import ClassifiedSet, Judge
from muse.experiments.latent_spaces import TITLES
from muse.utils.io import write_text
from muse.utils.viz_utils import save_image, tile

COLUMNS = 8
HEADS = ("Fréchet distance ↓", "class accuracy ↑", "nearest training picture")
ROWS = {
    "reconstructions": "real pictures there and back (the tokenizer's floor)",
    "samples": "samples, no guidance",
    "guided": "samples, guidance {guidance:g}",
    "noise": "decoded noise",
    "mean": "the decoded mean",
}


def generation_rows(results: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(name, one cell for each of HEADS) of the table; a name without cells is a heading."""
    real, held_out = results["real"], results["held_out"]
    guidance = results["protocol"]["plan"]["guidance"]
    rows = [
        ("real pictures (distance: the other half; rest: held out)", _cells({**real, **held_out})),
        ("chance", _cells({"accuracy": results["chance"]})),
    ]
    for space, title in TITLES.items():
        if space in results:
            shape = "x".join(map(str, results[space]["shape"]))
            rows.append((f"{title}, {shape}", []))
            rows += [
                (text.format(guidance=guidance), _cells(results[space][row]))
                for row, text in ROWS.items()
            ]
    return rows


def _cells(values: dict[str, float | None]) -> list[str]:
    digits = {"fd": 1, "accuracy": 3, "nearest": 3}
    return [
        "–" if values.get(name) is None else f"{values[name]:.{places}f}"
        for name, places in digits.items()
    ]


def generation_table(results: dict[str, Any]) -> str:
    """The table for a terminal."""
    rows = generation_rows(results)
    width = max(len(name) for name, _ in rows) + 4
    lines = [" " * width + "".join(f"{head:>28}" for head in HEADS)]
    for name, cells in rows:
        indent = "  " if cells else ""
        lines.append(f"{indent + name:<{width}}" + "".join(f"{cell:>28}" for cell in cells))
    return "\n".join(lines)


def write_tables(output: Path, results: dict[str, Any]) -> None:
    """`table.md`, for a document."""
    lines = ["| | " + " | ".join(HEADS) + " |", "|---|" + "---:|" * len(HEADS)]
    for name, cells in generation_rows(results):
        lines.append(
            f"| {name} | " + " | ".join(cells) + " |" if cells else f"| **{name}** | | | |"
        )
    write_text(output / "table.md", "\n".join(lines) + "\n")


def draw_samples(
    output: Path,
    made: dict[str, dict[str, ClassifiedSet]],
    judge: Judge,
    classes: Sequence[str],
) -> None:
    """`samples.png`, `guided.png` (a row a class), `spaces.png`, `neighbours.png`.

    Args:
        output: the directory.
        made: space -> row of the table -> pictures, their labels going round the classes.
        judge: has the training pictures.
        classes: names.
    """
    own = made["muse"]
    names = [name[:14] for name in classes]
    for row in ("samples", "guided"):
        pictures = [
            own[row].images[index :: len(classes)][:COLUMNS] for index in range(len(classes))
        ]
        save_image(tile(_floats(pictures), names), output / f"{row}.png")
    spaces = [made[space]["guided"].images[:COLUMNS] for space in made]
    save_image(tile(_floats(spaces), list(made)), output / "spaces.png")
    for row in ("samples", "guided"):
        chosen = own[row].first(COLUMNS)
        _, index = judge.nearest(chosen.features)
        rows = [chosen.images, judge.train.images[index]]
        save_image(
            tile(_floats(rows), ["sample", "nearest\ntraining\npicture"]),
            output / f"neighbours-{row}.png",
        )


def _floats(rows: Sequence[Tensor]) -> list[list[Tensor]]:
    return [list(row.to(torch.float32) / 255) for row in rows]
