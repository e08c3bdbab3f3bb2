"""The demo's page and pictures: what a stranger sees first, then every number with its baseline beside it."""

import html
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muse.evaluation.attention_quality import object_cells, teacher_maps
from muse.utils.curves import METRICS, draw_curves, read_run
from muse.utils.viz_utils import attention_sheet, save_image, tile

COLUMNS = 8
CURVES = ("distillation_cosine", "reconstruction", "perceptual", "topology", "itc")
STAGE_NAMES = {
    "stage0": "0 encoder distilled",
    "stage1": "1 topology warm-up",
    "stage2": "2 semantic injection",
    "stage3": "3 synergistic tuning",
}


def rows(results: dict[str, Any]) -> list[tuple[str, list[str], str]]:
    """(name, one value a stage, baseline) of the table; the same for terminal, page and README."""
    stages, base = [results["stages"][name] for name in STAGE_NAMES], results["baselines"]

    def line(
        name: str, get, baseline: str, skip: int = 0, form: str = "{:.3f}"
    ) -> tuple[str, list[str], str]:
        return (
            name,
            ["–" if i < skip else form.format(get(s)) for i, s in enumerate(stages)],
            baseline,
        )

    last = stages[-1]
    blocks = last["topology"]["blocks"]
    table = [
        line(
            "PSNR, dB ↑",
            lambda s: s["psnr"],
            f"shrunk to the latent grid {base['psnr_shrunk_to_grid']:.1f}",
            1,
            "{:.2f}",
        ),
        line(
            "SSIM ↑",
            lambda s: s["ssim"],
            f"shrunk to the latent grid {base['ssim_shrunk_to_grid']:.2f}",
            1,
        ),
        line(
            "perceptual distance (EfficientNet-Lite0) ↓",
            lambda s: s["perceptual_efficientnet_lite0"],
            "0 is equal",
            1,
        ),
        line(
            "Fréchet distance (EfficientNet-Lite0) ↓",
            lambda s: s["fd_efficientnet_lite0"],
            "0 is equal; few pictures",
            1,
        ),
        line(
            "topology KL, nats, mean of blocks ↓",
            lambda s: s["topology"]["kl"],
            f"positional prior {last['topology']['kl_positional']:.3f}, uniform {last['topology']['kl_uniform']:.2f}",
        ),
    ]
    for index, block in enumerate(blocks):
        table.append(
            line(
                f"topology KL, block {index + 1} ↓",
                lambda s, i=index: s["topology"]["blocks"][i]["kl"],
                f"positional prior {block['kl_positional']:.3f}",
            )
        )
    if "auc" in last["topology"]:
        table.append(
            line(
                "same-object attention AUC ↑",
                lambda s: s["topology"]["auc"],
                f"positional prior {last['topology']['auc_positional']:.3f}, teacher {last['topology']['auc_teacher']:.3f}",
            )
        )
    found, zero = last["retrieval"], last["zero_shot"]
    group = found["group"]
    return [
        *table,
        line(
            f"caption retrieval R@1 of {group} ↑",
            lambda s: s["retrieval_r1"],
            f"chance {found['chance_r1']:.3f}",
            2,
        ),
        line(
            f"caption retrieval R@5 of {group} ↑",
            lambda s: s["retrieval_r5"],
            f"chance {found['chance_r5']:.3f}",
            2,
        ),
        line(
            "linear probe, semantic stream, macro ↑",
            lambda s: s["linear_probe_macro"],
            f"raw pixels {base['probe_pixels']:.3f}, chance {base['probe_chance']:.3f}",
            2,
        ),
        line(
            "linear probe, encoder, macro ↑",
            lambda s: s["linear_probe_encoder_macro"],
            f"raw pixels {base['probe_pixels']:.3f}, chance {base['probe_chance']:.3f}",
        ),
        line(
            "zero-shot, macro ↑",
            lambda s: s["zero_shot_macro"],
            f"chance and majority class {zero['majority_macro']:.3f}",
            2,
        ),
        line(
            "zero-shot, micro ↑",
            lambda s: s["zero_shot_micro"],
            f"chance {zero['top1_chance']:.3f}, majority class {zero['majority']:.3f}",
            2,
        ),
        line(
            "foreground IoU, block features ↑",
            lambda s: s["foreground_iou"],
            f"everything {base['foreground_everywhere_iou']:.3f}",
        ),
        line(
            "foreground IoU, encoder features ↑",
            lambda s: s["foreground_iou_encoder"],
            f"everything {base['foreground_everywhere_iou']:.3f}",
        ),
    ]


def text_table(results: dict[str, Any]) -> str:
    """The table for a terminal."""
    table = [
        (
            "after stage",
            [name.split(" ", 1)[0] for name in STAGE_NAMES.values()],
            "without training",
        ),
        *rows(results),
    ]
    width = max(len(row[0]) for row in table)
    lines = [
        f"{name:<{width}}  " + "  ".join(f"{value:>7}" for value in values) + f"  {baseline}"
        for name, values, baseline in table
    ]
    return "\n".join(lines)


def markdown_table(results: dict[str, Any]) -> str:
    """The table for a README."""
    head = [
        "after stage",
        *(name.split(" ", 1)[0] for name in STAGE_NAMES.values()),
        "without training",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(STAGE_NAMES) + "---|"]
    return (
        "\n".join(
            [
                *lines,
                *(
                    f"| {name} | {' | '.join(values)} | {baseline} |"
                    for name, values, baseline in rows(results)
                ),
            ]
        )
        + "\n"
    )


def routing_line(results: dict[str, Any]) -> str:
    """One sentence about the gradient check."""
    agrees = results["routing"]["agrees"]
    return (
        "gradient routing: zero exactly where the table of docs/fidelity.md says"
        if agrees
        else "gradient routing: DIFFERS from the table of docs/fidelity.md, see metrics.json"
    )


def write_report(
    output: Path, results: dict[str, Any], model: Any, yardstick: Any, teacher: Any
) -> Path:
    """Pictures and `report.html` in `output`."""
    pictures = draw(output, model, yardstick, teacher)
    curves = loss_curves(output)
    parts = [
        "<!doctype html><meta charset='utf-8'><title>MUSE demo</title>",
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}"
        "img{max-width:100%;image-rendering:auto}table{border-collapse:collapse;font-size:14px}td,th{padding:.25em .7em;"
        "border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child,td:last-child,th:last-child{text-align:left}"
        "</style><h1>MUSE, trained on this machine</h1>",
        f"<p>{_intro(results)}</p>",
    ]
    for path, caption in [*pictures, *curves]:
        parts.append(
            f"<h2>{html.escape(caption)}</h2><img src='{path.name}' alt='{html.escape(caption)}'>"
        )
    head = "".join(
        f"<th>{html.escape(name)}</th>"
        for name in ("after stage", *STAGE_NAMES.values(), "without training")
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in (name, *values, baseline))
        + "</tr>"
        for name, values, baseline in rows(results)
    )
    parts.append(
        f"<h2>Numbers</h2><table><tr>{head}</tr>{body}</table><p>{html.escape(routing_line(results))}.</p>"
    )
    (output / "table.md").write_text(markdown_table(results))
    path = output / "report.html"
    path.write_text("\n".join(parts) + "\n")
    return path


def _intro(results: dict[str, Any]) -> str:
    counts = results["protocol"]["images"]
    return (
        f"Data: {html.escape(results['kind'])}; {counts['validation']} validation pictures of objects and backgrounds that no stage saw. "
        f"{results['seconds']:.0f} seconds in all, seed {results['protocol']['seed']}. A stage 0 that distils an EfficientNet stands in for "
        "InternVL3's pretraining; the topology teacher is that network's feature affinity, the text tower a sentence encoder. "
        "A stage is credited only with what it adds to the column before it."
    )


def draw(output: Path, model: Any, yardstick: Any, teacher: Any) -> list[tuple[Path, str]]:
    """Reconstructions and attention of held-out pictures; (file, caption)."""
    val = yardstick.val
    chosen = _different(val.text, 2 * COLUMNS)
    images = val.images[chosen]
    with torch.inference_mode():
        recon = model.reconstruct(images)
        encoding = model.encode(images[:COLUMNS], return_attention=True)
        target = teacher_maps(teacher, images[:COLUMNS], encoding.grid)[-1][:, 0]
    labels = ["original", "reconstruction"] * 2
    sheet = tile(
        [
            list(images[:COLUMNS]),
            list(recon[:COLUMNS]),
            list(images[COLUMNS:]),
            list(recon[COLUMNS:]),
        ],
        labels,
    )
    save_image(sheet, output / "reconstructions.png")
    cells = object_cells(val.masks[chosen[:COLUMNS]], encoding.grid)
    queries = [_query(row, encoding.grid) for row in cells]
    save_image(
        attention_sheet(images[:COLUMNS], encoding, queries, target), output / "attention.png"
    )
    return [
        (output / "reconstructions.png", "Reconstructions of pictures it has never seen"),
        (output / "attention.png", "What each block attends to, from the framed cell"),
    ]


def _different(captions: list[str], count: int) -> Tensor:
    """Places of `count` pictures, spread over the set, with as few captions twice as can be."""
    first = list(
        {
            caption.split(",")[0]: index for index, caption in reversed(list(enumerate(captions)))
        }.values()
    )
    rest = [index for index in range(len(captions)) if index not in set(first)]
    pool = sorted(first) if len(first) >= count else sorted(first) + rest[: count - len(first)]
    return torch.tensor(pool)[
        torch.linspace(0, len(pool) - 1, min(count, len(pool))).round().long()
    ]


def _query(cells: Tensor, grid: tuple[int, int]) -> int:
    """The object's cell nearest to its own centre; the middle of the picture where no cell is the object's."""
    inside = cells.nonzero().flatten()
    if not len(inside):
        return (grid[0] // 2) * grid[1] + grid[1] // 2
    places = torch.stack([inside // grid[1], inside % grid[1]], dim=1).float()
    return int(inside[(places - places.mean(0)).square().sum(1).argmin()])


def loss_curves(output: Path) -> list[tuple[Path, str]]:
    """The losses of all stages over optimizer steps; (file, caption)."""
    runs = [
        read_run(output / stage) for stage in STAGE_NAMES if (output / stage / METRICS).is_file()
    ]
    return [(draw_curves(runs, output / "curves.png", CURVES), "Losses")]
