"""The demo's results: table.md, and the page with pictures, answers and numbers."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muse.evaluation.suite import Yardstick
from muse.experiments.demo_answers import Answer, answer_pictures, answers_line, draw_answers
from muse.experiments.demo_pictures import draw_curves_of_stages, draw_held_out
from muse.experiments.demo_tables import (
    SETS,
    STAGE_NAMES,
    STAGE_SETS,
    Table,
    markdown_table,
    tables_of,
)
from muse.utils.io import write_text

HEAD = "<!doctype html><meta charset='utf-8'><title>MUSE demo</title>"
STYLE = """<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em;
       color: #222 }
img { max-width: 100%; image-rendering: auto }
table { border-collapse: collapse; font-size: 14px }
td, th { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child, td:last-child, th:last-child { text-align: left }
</style>"""


def routing_line(results: dict[str, Any]) -> str:
    """One sentence about the gradient check."""
    if results["routing"]["agrees"]:
        return "gradient routing: zero exactly where the table of docs/fidelity.md says"
    return "gradient routing: DIFFERS from the table of docs/fidelity.md, see metrics.json"


def write_report(
    output: Path,
    results: dict[str, Any],
    model: Any,
    yardsticks: Mapping[str, Yardstick],
    teacher: Any,
) -> dict[str, list[dict[str, Any]]]:
    """Write pictures, `table.md` and `report.html`.

    Args:
        output: the directory, which holds the runs of all stages.
        results: what `run_demo` returns.
        model: the last stage's.
        yardsticks: by the name of their set; `val` and `seen` are drawn.
        teacher: the topology teacher.

    Returns:
        The answers of single pictures, by set.
    """
    shown = {name: yardsticks[name] for name in STAGE_SETS if name in yardsticks}
    seen = shown["seen"].val if "seen" in shown else None
    pictures = draw_held_out(output, model, shown["val"].val, teacher, seen)
    pictures.append(draw_curves_of_stages(output, results["stages"]))
    parts = [HEAD, f"{STYLE}<h1>MUSE, trained on this machine</h1>", f"<p>{_intro(results)}</p>"]
    for path, caption in pictures:
        caption = html.escape(caption)
        parts.append(f"<h2>{caption}</h2><img src='{path.name}' alt='{caption}'>")
    answers = {name: answer_pictures(model, one) for name, one in shown.items()}
    for name, found in answers.items():
        path = draw_answers(found, shown[name], output / f"answers-{name}.png")
        parts += _answers_of(name, found, path)
    tables = tables_of(results)
    parts.append("<h2>Numbers</h2>" + "<p></p>".join(map(_page_table, tables)))
    parts.append(f"<p>{html.escape(routing_line(results))}.</p>")
    parts += _samples(output)
    write_text(output / "table.md", "\n".join(map(markdown_table, tables)))
    write_text(output / "report.html", "\n".join(parts) + "\n")
    return {name: [one._asdict() for one in found] for name, found in answers.items()}


def _page_table(table: Table) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in table.head) + "</tr>"]
    for row in table.rows:
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"


def _answers_of(name: str, answers: list[Answer], sheet: Path) -> list[str]:
    """The sheet of answers, and the same as text."""
    title = html.escape(f"What it answers: {SETS[name]} objects")
    table = Table(
        ["its caption", "chosen", "place of its own", "its class", "zero-shot answer"],
        [
            [
                one.caption,
                one.chosen,
                f"{one.rank} of {one.group}",
                one.truth,
                f"{one.answer}, {one.probability:.2f}",
            ]
            for one in answers
        ],
    )
    return [
        f"<h2>{title}</h2><p>Which caption of {answers[0].group} is nearest to each picture, and "
        "which class, with its probability. The pictures were chosen before the answers were "
        f"known; {html.escape(answers_line(answers))}.</p><img src='{sheet.name}' alt='{title}'>",
        f"<details><summary>as text</summary>{_page_table(table)}</details>",
    ]


def _samples(output: Path) -> list[str]:
    """What tools/demo_generation.sh has left beside this demo's directory, if it has run."""
    file = output.resolve().parent / "demo-generation" / "guided.png"
    if not file.is_file():
        return []
    place = f"../{file.parent.name}/{file.name}"
    return [
        "<h2>Samples of tools/demo_generation.sh, with guidance</h2>",
        f"<a href='{place}'><img src='{place}' alt='generated pictures'></a>",
    ]


def _intro(results: dict[str, Any]) -> str:
    protocol = results["protocol"]
    counts = ", ".join(
        f"{count} of {SETS[name]}" for name, count in protocol["images"]["validation"].items()
    )
    steps = ", ".join(
        f"{STAGE_NAMES[name]}: {count} steps" for name, count in results["steps"].items()
    )
    start = (
        "Stage 1 starts from the encoder of the packaged model muse_tiny, as the paper's starts "
        "from a pretrained one; it has not seen the unseen objects either."
        if results["encoder"] == "muse_tiny"
        else "A stage 0 that distils an EfficientNet replaces the encoder's pretraining."
    )
    return html.escape(
        f"Data: {results['kind']}; validation pictures: {counts}. {steps}. "
        f"{results['seconds']:.0f} seconds in all, seed {protocol['seed']}. {start} The topology "
        "teacher is an EfficientNet's feature affinity, the text tower a sentence encoder. "
        "Unseen: objects and backgrounds that no stage saw. Seen: objects of the training in new "
        "pictures, on backgrounds that no stage saw. Compare each stage with the one before it: "
        "it adds the difference."
    )
