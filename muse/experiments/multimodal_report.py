"""What the multimodal demo leaves to look at: its table, sheets of pictures, answers in words."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from muse.multimodal.benchmarks import Question
from muse.utils.io import write_text
from muse.utils.viz_utils import save_image, tile

MULTIMODAL_SHEETS = ("prompts.png", "edits.png")
_COLUMNS, _EXAMPLES = 8, 10
_PROMPT_ROWS = {
    "generated": "pictures from prompts",
    "shuffled": "the same, each held to another's prompt",
    "chance": "chance",
    "reconstructions": "real pictures of the prompts, there and back",
    "real": "real pictures of the prompts",
}
_EDIT_ROWS = {
    "edited": "edited",
    "copy": "the source as it is",
    "no_source": "made from the instruction alone",
    "reconstruction": "the exact result, there and back",
    "real": "the exact result",
    "chance": "chance",
}
_EDIT_COLUMNS = {
    "stays": "PSNR of what stays, dB",
    "changes": "PSNR of what changes, dB",
    "asked": "shows what was asked",
    "replace": "replace",
    "background": "background",
    "remove": "remove",
}
_QUESTION_ROWS = {
    "before": "before the projector's stage",
    "after": "after it (the finished model)",
    "text_only": "the same, without the picture",
    "others_picture": "the same, with another's picture",
    "with_language": "projector trained with the language model",
    "majority": "always the commonest letter",
    "chance": "chance",
}


def multimodal_tables(results: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, heads, rows) of the three tables; the first cell of a row is its name."""
    prompts, edits, asked = (results[name] for name in ("prompts", "edits", "questions"))
    return [
        (
            "(a) prompts to pictures",
            ["class accuracy"],
            [[text, _cell(prompts.get(row), 3)] for row, text in _PROMPT_ROWS.items()],
        ),
        (
            "(b) edits",
            list(_EDIT_COLUMNS.values()),
            [
                [text]
                + [
                    _cell(edits[row].get(column), 2 if column in ("stays", "changes") else 3)
                    for column in _EDIT_COLUMNS
                ]
                for row, text in _EDIT_ROWS.items()
            ],
        ),
        (
            "(c) questions with four choices",
            ["right", "no choice named"],
            [[text, *_question_cells(asked[row])] for row, text in _QUESTION_ROWS.items()],
        ),
    ]


def _question_cells(found: float | Mapping[str, float]) -> list[str]:
    if isinstance(found, Mapping):
        return [_cell(found["accuracy"], 3), _cell(found["unmatched"], 3)]
    return [_cell(found, 3), "–"]


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def multimodal_text(results: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    lines = []
    for title, heads, rows in multimodal_tables(results):
        table = [[title, *heads], *rows]
        widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))]
        for row in table:
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
            lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
        lines.append("")
    return "\n".join(lines)


def write_report_files(output: Path, results: Mapping[str, Any]) -> None:
    """`table.md`, and `report.md` with prompts, instructions and answers in words."""
    lines: list[str] = []
    for title, heads, rows in multimodal_tables(results):
        lines += ["", "| " + " | ".join([f"**{title}**", *heads]) + " |"]
        lines.append("|---|" + "---:|" * len(heads))
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    table = "\n".join(lines[1:]) + "\n"
    write_text(output / "table.md", table)
    report = ["# The multimodal demo", "", table]
    titles = {
        "prompts": ("Prompts, and what the classifier sees in the picture", "prompts.png"),
        "edits": ("Instructions, in the order of the columns", "edits.png"),
        "questions": ("Answers", None),
    }
    for name, (title, sheet) in titles.items():
        report += [f"## {title}", ""]
        report += [f"![{title}]({sheet})", ""] if sheet else []
        report += [f"{n}. {line}" for n, line in enumerate(results[name]["examples"], start=1)]
        report.append("")
    write_text(output / "report.md", "\n".join(report))


def answer_lines(
    questions: Sequence[Question], said: Sequence[str], blind: Sequence[str]
) -> list[str]:
    """Each question in one line: its options, the truth, the answers with and without a picture."""
    lines = []
    for question, answer, without in zip(questions, said, blind, strict=True):
        options = ", ".join(f"{letter} {words}" for letter, words in question.options.items())
        lines.append(
            f"{question.text} {options} – right: {question.answer}; said: {answer or 'nothing'}; "
            f"without the picture: {without or 'nothing'}"
        )
    return lines


def draw_prompts(output: Path, made: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """`prompts.png`: a row of generated pictures for each class of their prompts.

    Args:
        output: the directory.
        made: (n, 3, H, W) uint8.
        labels: (n,) of the prompts.
        classes: names.
    """
    rows = {
        name[:14]: list(made[labels == number][:_COLUMNS] / 255)
        for number, name in enumerate(classes)
        if (labels == number).any()
    }
    save_image(tile(list(rows.values()), list(rows)), output / "prompts.png")


def draw_edits(output: Path, rows: Mapping[str, Tensor], sources: Tensor) -> None:
    """`edits.png`: source, exact result, edit, and picture without the source below each other.

    Args:
        output: the directory.
        rows: real, edited and no_source, (n, 3, H, W) uint8.
        sources: (n, 3, H, W) uint8.
    """
    shown = {
        "source": sources,
        "exact result": rows["real"],
        "edited": rows["edited"],
        "without\nthe source": rows["no_source"],
    }
    pictures = [list(images[:_EXAMPLES] / 255) for images in shown.values()]
    save_image(tile(pictures, list(shown)), output / "edits.png")
