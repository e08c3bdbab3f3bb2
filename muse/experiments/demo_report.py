"""The demo's results: the table of numbers beside their baselines, and the page with pictures."""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from muse.experiments.demo_pictures import draw_curves_of_stages, draw_held_out
from muse.utils.io import write_text

STAGE_NAMES = {
    "stage0": "0 encoder distilled",
    "stage1": "1 topology warm-up",
    "stage2": "2 semantic injection",
    "stage3": "3 synergistic tuning",
}
HEAD = "<!doctype html><meta charset='utf-8'><title>MUSE demo</title>"
STYLE = """<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em;
       color: #222 }
img { max-width: 100%; image-rendering: auto }
table { border-collapse: collapse; font-size: 14px }
td, th { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child, td:last-child, th:last-child { text-align: left }
</style>"""


class Row(NamedTuple):
    """One row of the table: a number of every stage, and what it is without training."""

    name: str
    read: Callable[[dict[str, Any]], float]  # from the measurements of one stage
    baseline: str
    first: int = 0  # the first stage whose model can give this number
    digits: int = 3


def table_rows(results: dict[str, Any]) -> list[tuple[str, list[str], str]]:
    """(name, one value a stage, baseline) of each row; the same in terminal, page and README."""
    stages, base = [results["stages"][name] for name in STAGE_NAMES], results["baselines"]
    rows = [
        *_picture_rows(base),
        *_topology_rows(stages[-1]["topology"]),
        *_semantic_rows(stages[-1], base),
        *_foreground_rows(base),
    ]
    return [
        (
            row.name,
            [
                "–" if index < row.first else f"{row.read(stage):.{row.digits}f}"
                for index, stage in enumerate(stages)
            ],
            row.baseline,
        )
        for row in rows
    ]


def _picture_rows(base: dict[str, Any]) -> list[Row]:
    shrunk = "shrunk to the latent grid"
    network = "(EfficientNet-Lite0)"
    return [
        Row(
            "PSNR, dB ↑",
            lambda s: s["psnr"],
            f"{shrunk} {base['psnr_shrunk_to_grid']:.1f}",
            first=1,
            digits=2,
        ),
        Row("SSIM ↑", lambda s: s["ssim"], f"{shrunk} {base['ssim_shrunk_to_grid']:.2f}", 1),
        Row(
            f"perceptual distance {network} ↓",
            lambda s: s["perceptual_efficientnet_lite0"],
            "0 is equal",
            1,
        ),
        Row(
            f"Fréchet distance {network} ↓",
            lambda s: s["fd_efficientnet_lite0"],
            "0 is equal; few pictures",
            1,
        ),
    ]


def _topology_rows(last: dict[str, Any]) -> list[Row]:
    """`last`: the topology numbers of the last stage, whose priors are those of all stages."""
    prior = "positional prior"
    rows = [
        Row(
            "topology KL, nats, mean of blocks ↓",
            lambda s: s["topology"]["kl"],
            f"{prior} {last['kl_positional']:.3f}, uniform {last['kl_uniform']:.2f}",
        )
    ]
    for index, block in enumerate(last["blocks"]):
        rows.append(
            Row(
                f"topology KL, block {index + 1} ↓",
                lambda s, index=index: s["topology"]["blocks"][index]["kl"],
                f"{prior} {block['kl_positional']:.3f}",
            )
        )
    if "auc" in last:
        rows.append(
            Row(
                "same-object attention AUC ↑",
                lambda s: s["topology"]["auc"],
                f"{prior} {last['auc_positional']:.3f}, teacher {last['auc_teacher']:.3f}",
            )
        )
    return rows


def _semantic_rows(last: dict[str, Any], base: dict[str, Any]) -> list[Row]:
    found, zero = last["retrieval"], last["zero_shot"]
    group = found["group"]
    pixels = f"raw pixels {base['probe_pixels']:.3f}, chance {base['probe_chance']:.3f}"
    return [
        Row(
            f"caption retrieval R@1 of {group} ↑",
            lambda s: s["retrieval_r1"],
            f"chance {found['chance_r1']:.3f}",
            2,
        ),
        Row(
            f"caption retrieval R@5 of {group} ↑",
            lambda s: s["retrieval_r5"],
            f"chance {found['chance_r5']:.3f}",
            2,
        ),
        Row("linear probe, semantic stream, macro ↑", lambda s: s["linear_probe_macro"], pixels, 2),
        Row("linear probe, encoder, macro ↑", lambda s: s["linear_probe_encoder_macro"], pixels),
        Row(
            "zero-shot, macro ↑",
            lambda s: s["zero_shot_macro"],
            f"chance and majority class {zero['majority_macro']:.3f}",
            2,
        ),
        Row(
            "zero-shot, micro ↑",
            lambda s: s["zero_shot_micro"],
            f"chance {zero['top1_chance']:.3f}, majority class {zero['majority']:.3f}",
            2,
        ),
    ]


def _foreground_rows(base: dict[str, Any]) -> list[Row]:
    everything = f"everything {base['foreground_everywhere_iou']:.3f}"
    return [
        Row("foreground IoU, block features ↑", lambda s: s["foreground_iou"], everything),
        Row(
            "foreground IoU, encoder features ↑", lambda s: s["foreground_iou_encoder"], everything
        ),
    ]


def terminal_table(results: dict[str, Any]) -> str:
    """The table for a terminal."""
    head = ("after stage", [name.split(" ", 1)[0] for name in STAGE_NAMES.values()])
    table = [(*head, "without training"), *table_rows(results)]
    width = max(len(name) for name, _, _ in table)
    lines = [
        f"{name:<{width}}  " + "  ".join(f"{value:>7}" for value in values) + f"  {baseline}"
        for name, values, baseline in table
    ]
    return "\n".join(lines)


def readme_table(results: dict[str, Any]) -> str:
    """The table for a README, in Markdown."""
    numbers = [name.split(" ", 1)[0] for name in STAGE_NAMES.values()]
    lines = [
        f"| after stage | {' | '.join(numbers)} | without training |",
        "|---|" + "---:|" * len(STAGE_NAMES) + "---|",
    ]
    for name, values, baseline in table_rows(results):
        lines.append(f"| {name} | {' | '.join(values)} | {baseline} |")
    return "\n".join(lines) + "\n"


def _page_table(results: dict[str, Any]) -> str:
    names = ("after stage", *STAGE_NAMES.values(), "without training")
    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in names) + "</tr>"]
    for name, values, baseline in table_rows(results):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in (name, *values, baseline))
        lines.append(f"<tr>{cells}</tr>")
    return "<table>" + "".join(lines) + "</table>"


def routing_line(results: dict[str, Any]) -> str:
    """One sentence about the gradient check."""
    if results["routing"]["agrees"]:
        return "gradient routing: zero exactly where the table of docs/fidelity.md says"
    return "gradient routing: DIFFERS from the table of docs/fidelity.md, see metrics.json"


def write_report(
    output: Path, results: dict[str, Any], model: Any, yardstick: Any, teacher: Any
) -> Path:
    """Write pictures, `table.md` and `report.html`.

    Args:
        output: the directory, which holds the runs of all stages.
        results: what `run_demo` returns.
        model: the last stage's.
        yardstick: its validation pictures are drawn.
        teacher: the topology teacher.

    Returns:
        The page.
    """
    pictures = draw_held_out(output, model, yardstick.val, teacher)
    pictures.append(draw_curves_of_stages(output, STAGE_NAMES))
    parts = [HEAD, f"{STYLE}<h1>MUSE, trained on this machine</h1>", f"<p>{_intro(results)}</p>"]
    for path, caption in pictures:
        caption = html.escape(caption)
        parts.append(f"<h2>{caption}</h2><img src='{path.name}' alt='{caption}'>")
    parts.append(f"<h2>Numbers</h2>{_page_table(results)}")
    parts.append(f"<p>{html.escape(routing_line(results))}.</p>")
    parts += _samples(output)
    write_text(output / "table.md", readme_table(results))
    page = output / "report.html"
    write_text(page, "\n".join(parts) + "\n")
    return page


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
    counts = results["protocol"]["images"]
    return (
        f"Data: {html.escape(results['kind'])}; {counts['validation']} validation pictures of "
        f"objects and backgrounds that no stage saw. {results['seconds']:.0f} seconds in all, seed "
        f"{results['protocol']['seed']}. A stage 0 that distils an EfficientNet replaces "
        "InternVL3's pretraining; the topology teacher is that network's feature affinity, the "
        "text tower a sentence encoder. Read each column against the one before it: a stage adds "
        "the difference."
    )
