"""Runs the ablations: the order of the work, several processes at once, and the resulting page."""

import functools
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

import muse
from muse import cli
from muse.analysis.gradients import PAIRS, gradient_records
from muse.config import resolved
from muse.evaluation.suite import Yardstick, latent_grid
from muse.experiments.ablation import VARIANTS, Study, measure_variant, train_base, train_run
from muse.experiments.gradient_figure import draw_gradients
from muse.experiments.spreads import spread_cell, spread_of
from muse.teachers.build import shared_text_teacher, shared_topology_teacher
from muse.utils.io import versions, write_json, write_text

log = logging.getLogger(__name__)

# Column -> (how to read it from a measurement, digits). The arrow says which way is better.
COLUMNS: dict[str, tuple[Callable[[dict[str, Any]], float | None], int]] = {
    "PSNR, dB ↑": (lambda m: m["psnr"], 2),
    "perceptual ↓": (lambda m: m["perceptual_efficientnet_lite0"], 3),
    "zero-shot ↑": (lambda m: m["zero_shot_macro"], 3),
    "R@5 of 32 ↑": (lambda m: m["retrieval_r5"], 3),
    "linear probe ↑": (lambda m: m["linear_probe_macro"], 3),
    "mIoU ↑": (lambda m: m["miou"], 3),
    "topology KL ↓": (lambda m: m["topology"]["kl"], 3),
    "conflict ↓": (lambda m: _gradient(m, "reconstruction~semantics", "blocks", "conflict"), 3),
    "abs. cosine W_QK": (lambda m: _gradient(m, "structure~semantics", "W_QK", "abs"), 3),
    "abs. cosine W_V": (lambda m: _gradient(m, "structure~semantics", "W_V", "abs"), 3),
    "abs. cosine encoder": (
        lambda m: _gradient(m, "reconstruction~semantics", "encoder", "abs"),
        3,
    ),
}


def _gradient(measured: dict[str, Any], pair: str, space: str, number: str) -> float | None:
    found = (measured["gradients"].get(pair) or {}).get(space)
    return found[number] if found else None


class Task(NamedTuple):
    """Work for one process, and the names of the tasks that must be done before it."""

    name: str
    work: Callable[..., None]
    arguments: tuple[Any, ...]
    after: tuple[str, ...]


def run_study(
    study: Study, variants: Sequence[str], seeds: Sequence[int], jobs: int
) -> dict[str, Any]:
    """Train and measure what has not been done yet, then write `ablation.json` and `ablation.md`.

    With `paper` and `baseline` among the variants, `gradients.png` is drawn too.

    Args:
        study: directories, data and plan.
        variants: names of VARIANTS.
        seeds: every variant is trained with each of them.
        jobs: processes at once.
    """
    tasks = plan_tasks(study, variants, seeds)
    log.info("%d trainings and measurements, %d at once", len(tasks), jobs)
    spawn = multiprocessing.get_context("spawn")  # a fork can hang once threads have run
    with ProcessPoolExecutor(1, spawn, _prepare, (1,)) as pool:
        pool.submit(train_base, study).result()  # first, and with all cores: the others need it
    with ProcessPoolExecutor(jobs, spawn, _prepare, (jobs,)) as pool:
        work_through(tasks, pool, jobs)
    results = collect(study, variants, seeds)
    write_json(study.output / "ablation.json", results)
    write_text(study.output / "ablation.md", markdown(results))
    if {"paper", "baseline"} <= set(variants):
        arms = {"baseline": "baseline", "muse": "paper"}
        draw_gradients(
            {arm: _gradients(study, name, seeds) for arm, name in arms.items()},
            study.output / "gradients.png",
        )
    return results


def _gradients(study: Study, name: str, seeds: Sequence[int]) -> list[list[dict[str, Any]]]:
    """One list of gradient records a seed, over all stages of a variant."""
    return [
        list(gradient_records([run.folder for run in study.runs(name, seed)])) for seed in seeds
    ]


def plan_tasks(study: Study, variants: Sequence[str], seeds: Sequence[int]) -> list[Task]:
    """In working order: every training once, also where variants share it; a measurement of each
    variant and seed."""
    tasks: dict[str, Task] = {}
    for seed in seeds:
        runs = {name: study.runs(name, seed) for name in variants}
        for depth in range(max(map(len, runs.values()))):
            for own in runs.values():
                for run in own[depth : depth + 1]:
                    task = str(run.folder)
                    after = (str(run.before.folder),) if run.before else ()
                    tasks.setdefault(task, Task(task, train_run, (run,), after))
        for name, own in runs.items():
            task, after = str(study.record(name, seed)), (str(own[-1].folder),)
            tasks[task] = Task(task, _measure, (study, name, seed), after)
    return list(tasks.values())


def work_through(tasks: Sequence[Task], pool: ProcessPoolExecutor, jobs: int) -> None:
    """Start each task when what it needs is done, in order; the first failure ends the study."""
    waiting, running, done = list(tasks), {}, set()
    while waiting or running:
        ready = [task for task in waiting if done.issuperset(task.after)][: jobs - len(running)]
        for task in ready:
            waiting.remove(task)
            running[pool.submit(task.work, *task.arguments)] = task
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task = running.pop(future)
            try:
                future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                log.error("%s failed; the same command goes on from here", task.name)
                raise
            done.add(task.name)
            log.info("%d of %d: %s", len(done), len(tasks), Path(task.name).name)


def _prepare(jobs: int) -> None:
    """Set up a worker process: its share of the cores, and only warnings in the log."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["MUSE_LOG"] = "WARNING"
    cli.setup_logging()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def _measure(study: Study, name: str, seed: int) -> None:
    if not study.record(name, seed).is_file():
        measure_variant(study, name, seed, _yardstick(study))


@functools.lru_cache(maxsize=1)
def _yardstick(study: Study) -> Yardstick:
    """Pictures and teachers of all measurements, loaded once in each process."""
    cfg = study.runs("paper", 0)[-1].cfg
    return Yardstick(
        cfg,
        shared_topology_teacher(cfg, latent_grid(cfg)),
        shared_text_teacher(cfg),
        study.plan.probe_images,
        study.plan.val_images,
    )


def collect(study: Study, variants: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """All measurements; of every column the mean and standard deviation (n - 1) over seeds."""
    rows = {}
    for name in variants:
        measured = {
            seed: json.loads(study.record(name, seed).read_text())["measured"] for seed in seeds
        }
        columns = {
            column: spread_of([read(one) for one in measured.values()])
            for column, (read, _) in COLUMNS.items()
        }
        rows[name] = {
            "label": VARIANTS[name].label,
            "columns": columns,
            "seeds": measured,
            "runs": {
                seed: [str(run.folder.relative_to(study.output)) for run in study.runs(name, seed)]
                for seed in seeds
            },
        }
    return {
        "variants": rows,
        "protocol": {
            "muse": muse.__version__,
            "versions": versions(),
            "seeds": list(seeds),
            "plan": asdict(study.plan),
            "encoder": study.pretrained,
            "pairs": list(PAIRS),
            "config": resolved(study.runs(variants[0], seeds[0])[-1].cfg),
        },
    }


def markdown(results: dict[str, Any]) -> str:
    """The table, and what its columns mean."""
    lines = ["| variant | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for row in results["variants"].values():
        cells = [
            spread_cell(row["columns"][column], digits) for column, (_, digits) in COLUMNS.items()
        ]
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    plan, seeds = results["protocol"]["plan"], results["protocol"]["seeds"]
    encoder = results["protocol"]["encoder"]
    start = (
        f"the encoder of `{encoder}`"
        if encoder
        else f"one encoder distilled for {plan['base_steps']} steps"
    )
    note = (
        f"Mean ± standard deviation over {len(seeds)} seeds; "
        f"{' + '.join(map(str, plan['steps']))} steps of {plan['batch_size']} pictures after "
        f"{start}. Zero-shot, linear probe: macro means; "
        "R@5: caption retrieval. conflict: mean max(0, −cosine) of the reconstruction's and the "
        "semantics' gradients on the blocks; abs. cosine: between the gradients of structure and "
        "semantics, in the encoder (with the adapter) between those of pixels and semantics. "
        "Over the steps in which both reach a tensor there; none: they never share one."
    )
    return "\n".join(lines) + f"\n\n{note}\n"
