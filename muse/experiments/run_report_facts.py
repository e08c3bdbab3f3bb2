"""Sections of `muse report`'s page about facts: what a run is, its curves, numbers, differences."""

from collections.abc import Sequence
from typing import Any

from muse.experiments.run_report_config import NOTHING, SECTIONS, PaperComparison
from muse.experiments.run_report_html import (
    PageSection,
    ReportedModel,
    by_run,
    escape,
    folded,
    number,
    table,
)
from muse.experiments.run_report_model import ModelView
from muse.experiments.run_report_sources import ReportedRun, flat_numbers

ROWS_SHOWN = 16  # of a metrics table; the others are folded


# ----------------------------------------------------------------------------------------- overview
def run_title(models: Sequence[ReportedModel]) -> str:
    """What the page is about, for the tab and the top."""
    return (
        " and ".join(_what(one.run) for one in models)
        if len(models) < 3
        else (f"{len(models)} runs: " + ", ".join(one.run.name for one in models))
    )


def _what(run: ReportedRun) -> str:
    stage = run.config.training.stage.replace("_", " ") if run.config is not None else ""
    steps = f" to step {run.records[-1]['step']}" if run.records else ""
    return f"{run.name}{': ' + stage if stage else ''}{steps}"


def overview_section(models: Sequence[ReportedModel], demo_page: str | None) -> PageSection:
    """A card a run: what it is, from what, how far, how large."""
    cards = []
    for one in models:
        facts = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _facts(one)
        )
        note = f"<p>{escape(one.view)}</p>" if isinstance(one.view, str) else ""
        if isinstance(one.view, ModelView) and one.view.notes:
            items = "".join(f"<li>{escape(line)}</li>" for line in one.view.notes)
            note = folded("What is not shown, and why", f"<ul>{items}</ul>")
        cards.append(f"<article><h3>{escape(one.run.name)}</h3><dl>{facts}</dl>{note}</article>")
    link = (
        f'<p><a href="{escape(demo_page)}">The demo\'s own page</a> has the measurements after '
        "every stage.</p>"
        if demo_page
        else ""
    )
    return PageSection(
        "overview", "What this is", f'<div class="cards">{"".join(cards)}</div>{link}'
    )


def _facts(one: ReportedModel) -> list[tuple[str, str]]:
    run, facts = one.run, []
    if run.model is not None:
        model = run.model
        facts.append(
            (
                "model",
                f"{model['num_blocks']} blocks of width {model['dim']}, "
                f"latent of {model['latent_dim']} channels, routing {model['routing']}",
            )
        )
    else:
        facts.append(
            ("kind", run.kind if run.recorded_config else "records without a configuration")
        )
    if run.config is not None:
        cfg = run.config
        facts.append(("stage", cfg.training.stage.replace("_", " ")))
        facts.append(("picture side", f"{cfg.dataset.preprocessing.crop_size} px"))
        facts.append(("started from", str(cfg.experiment.init_from or "its backbones")))
    if run.records:
        last = run.records[-1]
        facts.append(("last record", f"step {last['step']}"))
        if "images" in last:
            facts.append(("pictures seen", number(last["images"])))
        if run.replaced:
            facts.append(("resumed", f"{run.replaced} records were written again; the later hold"))
    if run.checkpoint is not None:
        facts.append(("weights", str(run.checkpoint)))
    if one.paper is not None:
        facts.append(
            (
                "against the paper",
                f"{len(one.paper.differences)} keys differ, {one.paper.equal} are the same",
            )
        )
    if isinstance(one.view, ModelView):
        facts.append(("shown", one.view.origin))
    return facts


# -------------------------------------------------------------------------------------- differences
def config_section(models: Sequence[ReportedModel]) -> PageSection | None:
    """Who learns from which loss, then the keys that differ, section by section."""
    parts = [_comparison(one.paper) if one.paper else "" for one in models]
    if not any(parts):
        return None
    return PageSection("paper", "Where it differs from the paper", by_run(models, parts))


def _comparison(paper: PaperComparison) -> str:
    groups = list(dict.fromkeys(group for _, group, _, _ in paper.routing))
    rows: dict[str, list[str]] = {}
    for loss, _, here, there in paper.routing:
        text = f'<span class="{"no" if here == NOTHING else "yes"}">{here}</span>'
        if here != there:
            text += f' <strong class="differs">paper: {there}</strong>'
        rows.setdefault(loss, [escape(loss)]).append(text)
    routing = table(["loss", *map(escape, groups)], list(rows.values()), "routing")
    folds = []
    for section, title in SECTIONS.items():
        own = [one for one in paper.differences if one.key.split(".")[0] == section]
        if own:
            cells = [
                [f"<code>{escape(one.key)}</code>", _value(one.ours), _value(one.paper)]
                for one in own
            ]
            folds.append(
                folded(f"{title}: {len(own)} keys", table(["key", "here", "paper"], cells))
            )
    keys = "".join(folds) or "<p>No key differs.</p>"
    return (
        f"<p>Which weights learn from which loss:</p>{routing}"
        f"<p>Keys against <code>{escape(paper.against)}</code>; where files lie and how often "
        f"something is written is left out.</p>{keys}"
    )


def _value(text: str) -> str:
    short = text if len(text) <= 120 else text[:117] + "…"
    return f"<code>{escape(short)}</code>"


# ------------------------------------------------------------------------------------------- curves
def curves_section(models: Sequence[ReportedModel], curves: dict[str, Any]) -> PageSection | None:
    """Places for the script's drawings, and a table of first and last values."""
    if not curves["runs"]:
        return None
    legend = "".join(
        f'<li><label><input type="checkbox" checked data-toggle="{i}"> '
        f'<span class="line line-{i % 6}"></span>{escape(run["name"])}</label></li>'
        for i, run in enumerate(curves["runs"])
    )
    drawings = '<div class="charts" data-charts="first"></div>'
    if curves["more"]:
        more = '<div class="charts" data-charts="more"></div>'
        drawings += folded(f"{len(curves['more'])} more numbers", more)
    rows = []
    for name in [*curves["first"], *curves["more"]]:
        for run in curves["runs"]:
            known = [value for value in run["values"].get(name, []) if value is not None]
            if known:
                cells = [number(v) for v in (known[0], min(known), max(known), known[-1])]
                rows.append([f"<code>{escape(name)}</code>", escape(run["name"]), *cells])
    values = table(["number", "run", "first", "lowest", "highest", "last"], rows)
    controls = (
        f'<div class="controls"><ul class="legend">{legend}</ul><label class="switch">'
        '<input type="checkbox" id="logarithmic"> logarithmic</label></div>'
    )
    hint = "<p>Point at a curve, or focus it and use the arrow keys, to read its values.</p>"
    content = controls + hint + drawings + folded("The same as a table", values)
    return PageSection("curves", "Training curves", content)


# ------------------------------------------------------------------------------------------ metrics
def metrics_section(
    models: Sequence[ReportedModel], extra: Sequence[tuple[str, dict[str, Any]]]
) -> PageSection | None:
    """A column a metrics.json, a row a number; the protocols below."""
    found = [
        (one.run.name if name in ("metrics", "measured") else f"{one.run.name} / {name}", content)
        for one in models
        for name, content in one.run.measured
    ] + list(extra)
    if not found:
        return None
    columns = [
        flat_numbers({key: value for key, value in content.items() if key != "protocol"})
        for _, content in found
    ]
    names = list(dict.fromkeys(name for column in columns for name in column))
    head = ["metric", *(escape(name) for name, _ in found)]
    rows = [
        [f"<code>{escape(name)}</code>", *(number(column.get(name)) for column in columns)]
        for name in names
    ]
    known = [
        _protocol_row("protocol", found, ("name",)),
        _protocol_row("pictures", found, ("images", "num_images")),
    ]
    rows = [row for row in known if set(row[1:]) != {"–"}] + rows
    content = table(head, rows[:ROWS_SHOWN], "numbers")
    if len(rows) > ROWS_SHOWN:
        content += folded(f"{len(rows) - ROWS_SHOWN} more", table(head, rows[ROWS_SHOWN:]))
    for name, one in found:
        if isinstance(one.get("protocol"), dict):
            facts = _protocol_facts(one["protocol"])
            content += folded(f"Protocol of {name}", table(["what", "value"], facts))
    return PageSection("metrics", "Measured", content)


def _protocol_row(
    title: str, found: Sequence[tuple[str, dict[str, Any]]], keys: Sequence[str]
) -> list[str]:
    cells = [title]
    for _, content in found:
        protocol = content.get("protocol")
        protocol = protocol if isinstance(protocol, dict) else {}
        value = next((protocol[key] for key in keys if protocol.get(key) is not None), "–")
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in value.items())
        cells.append(escape(value))
    return cells


def _protocol_facts(protocol: dict[str, Any], prefix: str = "") -> list[list[str]]:
    rows: list[list[str]] = []
    for key, value in protocol.items():
        if key == "config":
            continue  # long, and above where it differs
        if isinstance(value, dict):
            rows += _protocol_facts(value, f"{prefix}{key}.")
        else:
            rows.append([f"<code>{escape(prefix + key)}</code>", _value(str(value))])
    return rows
