"""What every section of `muse report`'s page is made of: tables, folds, numbers."""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

from muse.experiments.run_report_config import PaperComparison
from muse.experiments.run_report_model import ModelView
from muse.experiments.run_report_sources import ReportedRun, finite


class ReportedModel(NamedTuple):
    """A run, its comparison with the paper, and what its model does (or why that is not shown)."""

    run: ReportedRun
    paper: PaperComparison | None
    view: ModelView | str


class PageSection(NamedTuple):
    """A part of the page with its heading."""

    anchor: str
    title: str
    html: str


def escape(text: Any) -> str:
    """For HTML, attributes included."""
    return html.escape(str(text))


def number(value: float | None) -> str:
    """A number for a table: five significant digits, a dash where there is none."""
    if value is None or finite(value) is None:
        return "–"
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else f"{value:.5g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML; the first one of a row is its heading."""
    cells = "".join(f'<th scope="col">{name}</th>' for name in head)
    lines = [
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{c}</td>" for c in row[1:]) + "</tr>"
        for row in rows
    ]
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table">'
        f'<table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{"".join(lines)}</tbody>'
        "</table></div>"
    )


def folded(summary: str, content: str) -> str:
    """What is there on request."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def section_by_run(
    models: Sequence[ReportedModel],
    parts: Sequence[str],
    key: str,
    title: str,
    words: str = "",
) -> PageSection | None:
    """A section of one part a run below its words; None where no run has a part.

    Args:
        models: all of the page.
        parts: HTML of each; "" where a run has nothing to show.
        key: of the section.
        title: its heading.
        words: HTML above the parts.
    """
    return PageSection(key, title, words + by_run(models, parts)) if any(parts) else None


def by_run(models: Sequence[ReportedModel], parts: Sequence[str]) -> str:
    """The parts one after another, each below its run's name where there are several."""
    if len(models) == 1:
        return parts[0]
    return "".join(
        f"<h3>{escape(one.run.name)}</h3>{part}" for one, part in zip(models, parts) if part
    )


def looked_at_models(models: Sequence[ReportedModel]) -> list[tuple[int, ReportedModel]]:
    """Place and model of those that pictures were put through."""
    return [(i, one) for i, one in enumerate(models) if isinstance(one.view, ModelView)]
