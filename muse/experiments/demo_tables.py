"""The demo's tables: numbers of every stage beside what they are without training."""

from collections.abc import Callable
from typing import Any, NamedTuple

# Names of shards -> what they show, in a head of a column.
SETS = {
    "val": "unseen",
    "seen": "seen",
    "drawn": "unseen drawings",
    "seendrawn": "seen drawings",
}
STAGE_SETS = ("val", "seen")  # measured after every stage
STAGE_NAMES = {
    "stage0": "0 encoder distilled",
    "stage1": "1 topology warm-up",
    "stage2": "2 semantic injection",
    "stage3": "3 synergistic tuning",
}


class Row(NamedTuple):
    """One row of the table: a number of every stage, and what it is without training."""

    name: str
    read: Callable[[dict[str, Any]], float]  # from the measurements of one set of pictures
    baseline: str
    first: int = 0  # the first stage whose model can give this number
    digits: int = 3


class Table(NamedTuple):
    """Cells as they are printed; the first column names the number, the last is the baseline."""

    head: list[str]
    rows: list[list[str]]


def stage_table(results: dict[str, Any]) -> Table:
    """Every number after every stage: of unseen objects, and of new pictures of seen objects."""
    columns = [
        (stage, name)
        for stage, sets in results["stages"].items()
        for name in STAGE_SETS
        if name in sets
    ]
    heads = [f"{stage[-1]} {SETS[name]}" for stage, name in columns]
    rows = [
        [
            row.name,
            *(
                "–"
                if int(stage[-1]) < row.first
                else f"{row.read(results['stages'][stage][name]):.{row.digits}f}"
                for stage, name in columns
            ),
            row.baseline,
        ]
        for row in _rows(_last(results)["val"], results["baselines"]["val"])
    ]
    return Table(["after stage", *heads, "without training (unseen)"], rows)


def set_table(results: dict[str, Any]) -> Table:
    """The last stage on every set of validation pictures, each with its own baselines below."""
    last, base = _last(results), results["baselines"]
    names = [name for name in SETS if name in last]
    lines = [
        ("PSNR, dB ↑", lambda s, b: s["psnr"], 2),
        ("shrunk to the latent grid", lambda s, b: b["psnr_shrunk_to_grid"], 2),
        ("topology KL, nats ↓", lambda s, b: s["topology"]["kl"], 3),
        ("positional prior", lambda s, b: s["topology"]["kl_positional"], 3),
        ("caption retrieval R@5 ↑", lambda s, b: s["retrieval_r5"], 3),
        ("chance", lambda s, b: s["retrieval"]["chance_r5"], 3),
        ("zero-shot, macro ↑", lambda s, b: s["zero_shot_macro"], 3),
        ("chance", lambda s, b: s["zero_shot"]["majority_macro"], 3),
        ("linear probe, semantic stream, macro ↑", lambda s, b: s["linear_probe_macro"], 3),
        ("raw pixels", lambda s, b: b["probe_pixels"], 3),
        ("foreground IoU, block features ↑", lambda s, b: s["foreground_iou"], 3),
        ("everything", lambda s, b: b["foreground_everywhere_iou"], 3),
    ]
    rows = [
        [text, *(f"{read(last[name], base[name]):.{digits}f}" for name in names)]
        for text, read, digits in lines
    ]
    return Table(["after the last stage", *(SETS[name] for name in names)], rows)


def _last(results: dict[str, Any]) -> dict[str, Any]:
    """The measurements of the last stage, by set."""
    return list(results["stages"].values())[-1]


def _rows(last: dict[str, Any], base: dict[str, Any]) -> list[Row]:
    return [
        *_picture_rows(base),
        *_topology_rows(last["topology"]),
        *_semantic_rows(last, base),
        *_foreground_rows(base),
    ]


def _picture_rows(base: dict[str, Any]) -> list[Row]:
    shrunk = "shrunk to the latent grid"
    network = "(EfficientNet-Lite0)"
    return [
        Row(
            "PSNR, dB ↑",
            lambda s: s["psnr"],
            f"{shrunk} {base['psnr_shrunk_to_grid']:.1f}",
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
    """The tables for a terminal."""
    return "\n\n".join(map(_aligned, tables_of(results)))


def _aligned(table: Table) -> str:
    lines = [table.head, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.head))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def tables_of(results: dict[str, Any]) -> list[Table]:
    """The table of the stages and, where there are more sets than it has columns for, theirs."""
    more = any(name not in STAGE_SETS for name in _last(results))
    return [stage_table(results), *([set_table(results)] if more else [])]


def markdown_table(table: Table) -> str:
    """The table in Markdown, with a line's end."""
    words = table.head[-1].startswith("without")  # the last column holds words
    count = len(table.head) - (2 if words else 1)
    rule = "|---|" + "---:|" * count + ("---|" if words else "")
    lines = [table.head, *table.rows]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], rule, *text[1:]]) + "\n"
