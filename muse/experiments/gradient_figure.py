"""The paper's Fig. 3 from measured gradients.

(a, b) cosines over training, (c) energy by matrix, (d) |cosine| in the two subspaces.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from muse.analysis.gradients import MATRICES, conflict
from muse.utils.curves import save_figure

PAIR_STYLES = {
    "structure~semantics": ("tab:red", "structure, semantics"),
    "reconstruction~semantics": ("tab:blue", "pixels, semantics"),
    "reconstruction~structure": ("tab:green", "pixels, structure"),
}
ARMS = {"baseline": "shared weights, objectives summed", "muse": "MUSE"}
NOTHING = "no shared gradient"

Records = Sequence[Mapping[str, Any]]


def draw_gradients(arms: Mapping[str, Sequence[Records]], path: Path) -> Path:
    """Draw `baseline` and `muse`, each one sequence of records (`gradient_records`) a seed.

    Returns:
        `path`, which holds the PNG.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - heavy, and only drawing needs it

    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    both = [record for seeds in arms.values() for records in seeds for record in records]
    limit = max(
        (
            abs(spaces["blocks"])
            for record in both
            for spaces in record["cosine"].values()
            if spaces["blocks"] is not None
        ),
        default=1,
    )
    for letter, axis, arm in zip("ab", axes[0], ARMS):
        _cosines(axis, arms[arm])
        axis.set_title(f"({letter}) {ARMS[arm]}: cosine on all weights of the blocks", fontsize=10)
        axis.set_xlim(0, max(record["total_step"] for record in both))
        axis.set_ylim(-1.15 * limit, 1.15 * limit)
    _energy(axes[1, 0], arms["baseline"])
    _subspaces(axes[1, 1], arms)
    return save_figure(figure, path)


def _cosines(axis: Any, seeds: Sequence[Records]) -> None:
    """A thin line for each seed and pair, a thick one for the mean of a pair.

    Steps without a shared gradient are gaps, and labelled.
    """
    axis.axhline(0, color="black", linewidth=0.8)
    never = []
    for pair, (color, label) in PAIR_STYLES.items():
        curves = [_curve(records, pair) for records in seeds]
        for curve in curves:
            axis.plot(
                list(curve),
                [_nan(value) for value in curve.values()],
                color=color,
                alpha=0.3,
                linewidth=0.8,
            )
        steps = sorted(set().union(*curves))
        means = [_mean([curve.get(step) for curve in curves]) for step in steps]
        if all(value is None for value in means):
            never.append(label)
        else:
            axis.plot(
                steps,
                [_nan(value) for value in means],
                color=color,
                linewidth=2,
                label=label,
                marker=".",
                markersize=4,
            )
    for step in _stage_starts(seeds[0]):
        axis.axvline(step, color="gray", linewidth=0.8, linestyle=":")
    for left, right in _silent(seeds[0]):
        axis.axvspan(left, right, color="0.93", linewidth=0)
        axis.text(
            (left + right) / 2,
            0.03,
            NOTHING,
            transform=axis.get_xaxis_transform(),
            ha="center",
            fontsize=9,
            color="0.35",
        )
    if never:
        axis.plot([], [], " ", label=f"{NOTHING}: {'; '.join(never)}")
    axis.set_xlabel("optimizer step (dotted: next stage)", fontsize=8)
    axis.legend(fontsize=8, loc="best")


def _curve(records: Records, pair: str) -> dict[int, float | None]:
    return {
        record["total_step"]: record["cosine"].get(pair, {}).get("blocks") for record in records
    }


def _silent(records: Records) -> list[tuple[int, int]]:
    """Spans of steps in which no pair shares a gradient on the blocks."""
    spans, before = [], 0
    for record in records:
        if all(spaces["blocks"] is None for spaces in record["cosine"].values()):
            if spans and spans[-1][1] == before:
                spans[-1] = (spans[-1][0], record["total_step"])
            else:
                spans.append((before, record["total_step"]))
        before = record["total_step"]
    return spans


def _stage_starts(records: Records) -> list[int]:
    """Steps after which the next record belongs to another run."""
    return [
        before["total_step"]
        for before, after in zip(records, records[1:])
        if after["step"] <= before["step"]
    ]


def _energy(axis: Any, seeds: Sequence[Records]) -> None:
    """(c): how much of each objective's gradient lies on W_Q, W_K and W_V, in the baseline."""
    names = [name for name in MATRICES if name != "W_ITC"]
    for offset, (objective, color) in enumerate(
        (("semantics", "tab:orange"), ("structure", "tab:purple"))
    ):
        shares = [
            record["energy"][objective]
            for records in seeds
            for record in records
            if record["energy"].get(objective)
        ]
        if not shares:
            continue
        values = [sum(share[name] for share in shares) / len(shares) for name in names]
        bars = axis.bar(
            [place + (offset - 0.5) * 0.38 for place in range(len(names))],
            values,
            0.36,
            color=color,
            label=objective,
        )
        axis.bar_label(bars, fmt="%.3f", fontsize=8)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylim(0, 1.1)
    axis.set_title(
        f"(c) {ARMS['baseline']}: share of each objective's squared gradient", fontsize=10
    )
    axis.legend(fontsize=8)


def _subspaces(axis: Any, arms: Mapping[str, Sequence[Records]]) -> None:
    """(d): mean |cosine| on W_QK and on the values; a pair that shares no gradient gets no bar."""
    groups = [(space, pair) for space in ("W_QK", "W_V") for pair in PAIR_STYLES]
    for offset, (arm, hatch) in enumerate((("baseline", ""), ("muse", "//"))):
        found = [conflict(records) for records in arms[arm]]
        for place, (space, pair) in enumerate(groups):
            each = [
                summary[pair][space]["abs"] for summary in found if summary.get(pair, {}).get(space)
            ]
            left = place + (offset - 0.5) * 0.4
            color, _ = PAIR_STYLES[pair]
            if each:
                mean = sum(each) / len(each)
                axis.bar(
                    left,
                    mean,
                    0.36,
                    color=color,
                    hatch=hatch,
                    alpha=0.9 if arm == "muse" else 0.6,
                    edgecolor="black",
                    linewidth=0.5,
                )
                axis.errorbar(
                    left,
                    mean,
                    yerr=[[mean - min(each)], [max(each) - mean]],
                    color="black",
                    linewidth=0.8,
                    capsize=2,
                )
                axis.text(
                    left, max(each) + 0.002, f"{mean:.3f}", fontsize=8, ha="center", va="bottom"
                )
            else:
                axis.text(left, 0.005, NOTHING, rotation=90, fontsize=7, ha="center", va="bottom")
    labels = ["\n".join((space, *PAIR_STYLES[pair][1].split(", "))) for space, pair in groups]
    axis.set_xticks(range(len(groups)), labels, fontsize=8)
    axis.set_ylim(0, 1.12 * axis.get_ylim()[1])
    axis.set_title(
        "(d) mean |cosine| (bars: range of seeds): plain baseline, hatched MUSE", fontsize=10
    )


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
