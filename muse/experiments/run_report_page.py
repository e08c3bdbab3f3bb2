"""The page of `muse report`: sections in HTML, and the numbers that its script draws."""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from muse.experiments.run_report_facts import (
    config_section,
    curves_section,
    metrics_section,
    overview_section,
    run_title,
)
from muse.experiments.run_report_html import ReportedModel, escape
from muse.experiments.run_report_model import ModelView, view_facts
from muse.experiments.run_report_sources import finite, flat_numbers
from muse.experiments.run_report_views import (
    attention_section,
    captions_section,
    features_section,
    foreground_section,
    reconstruction_section,
    written_section,
)

MOST_POINTS = 1200  # of a run's curve; a longer one is thinned evenly
LOSSES_FIRST = ("loss", "reconstruction", "perceptual", "topology", "itc", "distillation_cosine")


def build_page(
    models: Sequence[ReportedModel],
    extra: Sequence[tuple[str, dict[str, Any]]] = (),
    demo_page: str | None = None,
) -> str:
    """The whole page as text.

    Args:
        models: the runs, in the order of the command.
        extra: name and content of metrics.json files that belong to no run.
        demo_page: address of the demo's own page, relative to this one.
    """
    curves = curve_facts(models)
    sections = [
        overview_section(models, demo_page),
        reconstruction_section(models),
        attention_section(models),
        features_section(models),
        captions_section(models),
        foreground_section(models),
        curves_section(models, curves),
        metrics_section(models, extra),
        config_section(models),
        written_section(models),
    ]
    shown = [section for section in sections if section]
    links = "".join(f'<li><a href="#{one.anchor}">{escape(one.title)}</a></li>' for one in shown)
    body = "\n".join(
        f'<section id="{one.anchor}" aria-labelledby="{one.anchor}-title">'
        f'<h2 id="{one.anchor}-title">{escape(one.title)}</h2>\n{one.html}</section>'
        for one in shown
    )
    views = [view_facts(one.view) if isinstance(one.view, ModelView) else None for one in models]
    facts = json.dumps({"curves": curves, "attention": views}, allow_nan=False)
    parts = {
        "TITLE": escape(run_title(models)),
        "STYLE": template("report.css"),
        "LINKS": links,
        "BODY": body,
        "FACTS": facts.replace("</", "<\\/"),
        "SCRIPT": template("report.js"),
    }
    page = template("report.html")
    for name, text in parts.items():
        page = page.replace(f"@@{name}@@", text)
    return page


def template(name: str) -> str:
    """A file of muse/experiments/page."""
    return files("muse.experiments").joinpath("page", name).read_text(encoding="utf-8")


def curve_facts(models: Sequence[ReportedModel]) -> dict[str, Any]:
    """Steps and values of all numbers that some run recorded; None is a gap.

    `first` names those that are shown at once, `more` the others.
    """
    runs, names = [], []
    for one in models:
        if not one.run.records:
            continue
        records = thinned(one.run.records)
        flat = [flat_numbers(record) for record in records]
        own = list(dict.fromkeys(name for record in flat for name in record if name != "step"))
        names += [name for name in own if name not in names]
        runs.append(
            {
                "name": one.run.name,
                "steps": [record["step"] for record in records],
                "values": {name: [finite(record.get(name)) for record in flat] for name in own},
            }
        )
    first = [name for name in LOSSES_FIRST if name in names]
    first += [name for name in names if name.startswith("eval/") and name not in first]
    first = first or names[:6]
    return {"runs": runs, "first": first, "more": [name for name in names if name not in first]}


def thinned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MOST_POINTS of the records and the last one; those with an evaluation all stay."""
    stride = -(-len(records) // MOST_POINTS)
    last = len(records) - 1
    return [
        record
        for place, record in enumerate(records)
        if place % stride == 0 or place == last or "eval" in record
    ]
