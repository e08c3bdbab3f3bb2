"""Zero-shot classification and image-text retrieval from L2-normalised embeddings."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from muse.data.eval import EvalLoader
from muse.errors import ConfigError
from muse.evaluation.caption_files import CaptionMaker
from muse.evaluation.class_names import ClassNames, class_names, read_lines
from muse.evaluation.frozen_features import store_key
from muse.evaluation.measurement import (
    Measured,
    Setup,
    check_count,
    data_facts,
    eval_data,
    one_line_errors,
)
from muse.evaluation.metrics.accuracy_iou import Accuracy, check_labels, hit_probability
from muse.evaluation.retrieval import ALL_RECALLS, full_retrieval, retrieval
from muse.evaluation.zero_shot_task import ALL, ZeroShotTask
from muse.models.muse_vit import MUSE_ViT
from muse.teachers import build_text_teacher, class_embeddings
from muse.teachers.prompts import Template, imagenet_templates, prompts
from muse.teachers.text import TextTeacher
from muse.utils.distributed import all_objects, all_rows, is_main_process, leave_processes
from muse.utils.weights import state_sha256

logger = logging.getLogger(__name__)


def zero_shot(
    image_embeds: torch.Tensor, labels: torch.Tensor, class_embeds: torch.Tensor
) -> dict[str, float]:
    """Top-1 and top-5 (micro and macro), beside chance and the majority class.

    The majority class is that of `labels` themselves, the best that a constant answer can do.

    Args:
        image_embeds: (N, E), L2-normalised.
        labels: (N,).
        class_embeds: (K, E), L2-normalised.
    """
    if image_embeds.shape[1] != class_embeds.shape[1]:
        raise ValueError(
            f"image embeddings have width {image_embeds.shape[1]}, text embeddings "
            f"{class_embeds.shape[1]}"
        )
    if not torch.isfinite(image_embeds).all():
        raise ValueError("image embeddings contain NaN or infinity")
    classes = check_labels(labels, len(class_embeds), "the data")
    counts = torch.bincount(labels, minlength=classes).double()
    present = counts > 0
    scores = image_embeds.float() @ class_embeds.float().T
    result: dict[str, float] = {}
    for k in (1, 5):
        hits = hit_probability(scores, labels, k)
        by_class = torch.zeros(classes, dtype=torch.float64).index_add_(0, labels, hits)
        found = Accuracy(float(hits.mean()), float((by_class[present] / counts[present]).mean()))
        result[f"top{k}"], result[f"top{k}_macro"] = found.micro, found.macro
        result[f"top{k}_chance"] = min(k / classes, 1.0)
    result["majority"] = float(counts.max() / counts.sum())
    result["majority_macro"] = 1 / int(present.sum())
    return result | {
        "classes": classes,
        "classes_present": int(present.sum()),
        "images": len(labels),
    }


def text_weights(
    encode: Callable,
    teacher_facts: dict,
    names: Sequence[str],
    templates: Sequence[Template],
    folder: str | Path,
) -> torch.Tensor:
    """`class_embeddings`, kept on disk under the hash of the text tower and of every prompt.

    Args:
        encode: the text tower, list of n strings -> (n, E).
        teacher_facts: what names it.
        names: of the classes.
        templates: as for `class_embeddings`.
        folder: where the embeddings are kept.
    """
    texts = [prompts(name, templates) for name in names]
    path = Path(folder) / f"text-{store_key({'teacher': teacher_facts, 'prompts': texts})}.pt"
    if path.exists():
        logger.info("text weights from %s", path)
        return torch.load(path, weights_only=True)
    weights = class_embeddings(encode, names, templates).cpu()
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        torch.save(weights, partial)
        partial.replace(path)
    return weights


class _Embedded(NamedTuple):
    images: torch.Tensor  # (N, E) on the CPU
    labels: torch.Tensor  # (N,), or (0,)
    captions: list  # N: a text, or all texts of a picture


@torch.no_grad()
def embed_data(
    model: MUSE_ViT,
    loader: EvalLoader,
    device,
    fields: Sequence[str],
    autocast: Callable = nullcontext,
) -> _Embedded:
    """All processes' images in data-set order, with the labels and captions among `fields`."""
    rows: dict[str, list] = {"images": [], "indices": [], "labels": [], "text": []}
    for batch in loader:
        with autocast():
            embeds = model.embed_image(batch["images"].to(device, non_blocking=True))
        rows["images"].append(embeds.float().cpu())
        rows["indices"].append(batch["indices"])
        rows["labels"].append(batch["labels"]) if "labels" in fields else None
        rows["text"] += batch.get("captions", batch["text"]) if "text" in fields else []
    none, width = torch.zeros(0, dtype=torch.long), int(model.config.semantic_dim)
    order = all_rows(torch.cat([none, *rows["indices"]])).argsort()
    captions = [text for part in all_objects(rows["text"]) for text in part]
    labels = all_rows(torch.cat([none, *rows["labels"]]))
    return _Embedded(
        all_rows(torch.cat([torch.zeros(0, width), *rows["images"]]))[order],
        labels[order] if "labels" in fields else labels,
        [captions[i] for i in order.tolist()] if captions else [],
    )


def _text_tower(cfg: DictConfig, device: str) -> tuple[TextTeacher, dict]:
    """The configuration's text tower, and the facts that name it."""
    teacher = build_text_teacher(cfg.teacher.text)
    if teacher is None:
        raise ConfigError("zero-shot needs a text tower: teacher.text.kind is none")
    if teacher.dim != cfg.model.semantic_dim:
        raise ConfigError(
            f"the text tower gives width {teacher.dim}, model.semantic_dim is "
            f"{cfg.model.semantic_dim}"
        )
    facts = {"kind": cfg.teacher.text.kind, "source": cfg.teacher.text.source}
    return teacher.to(device), facts | {"weights_sha256": state_sha256(teacher)}


def run_zero_shot(setup: Setup, task: ZeroShotTask | None = None) -> Measured | None:
    """The measurement of scripts/zero_shot.py; None in the processes that only embed.

    Args:
        setup: what is measured, on which data.
        task: classification, retrieval, or both.
    """
    task = task or ZeroShotTask()
    source = task.source(setup)
    classifies = task.classifies(setup, source)
    fields = ("images", *(["labels"] if classifies else []), *(["text"] if task.retrieval else []))
    maker = {"maker": CaptionMaker} if task.retrieval == ALL else {}
    setup = replace(setup, val_url=source)
    loader = eval_data(setup, "val", fields, **maker)
    classes = class_names(loader, task.classnames) if classifies else None
    if classes and is_main_process():
        logger.info("%d class names: %s", len(classes.names), classes.source)
    phrases = read_lines(task.templates, "template") if task.templates else imagenet_templates()
    model = setup.load_model()
    teacher, tower = _text_tower(setup.cfg, setup.device)
    with one_line_errors("zero-shot"):
        if classes:
            folder = f"{setup.output_dir}/text"
            weights = text_weights(teacher.encode, tower, classes.names, phrases, folder)
        found = embed_data(model, loader, setup.device, fields, setup.autocast)
        data = data_facts(setup, loader) | {"images": len(found.images)}
        check_count(loader, data, len(found.images))
        if classes:
            classes.check(found.labels.tolist())
        if not leave_processes():
            return None
        values, facts = {}, {"text_tower": tower, **data}
        if classes:
            values |= zero_shot(found.images, found.labels, weights)
            facts["prompts"] = _prompt_facts(classes, phrases, task.templates)
        if task.retrieval:
            recalls, facts["retrieval"] = _retrieval(setup, task, teacher.encode, found)
            values |= {f"retrieval_{name}": value for name, value in recalls.items()}
    return Measured(values, facts)


def _prompt_facts(classes: ClassNames, phrases: Sequence[Template], file: str | None) -> dict:
    text = json.dumps([prompts("{}", phrases), classes.names])
    return {
        "classnames": classes.source,
        "classes": len(classes.names),
        "templates": len(phrases),
        "templates_from": file or "open_clip's 80",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _retrieval(
    setup: Setup, task: ZeroShotTask, encode: Callable, found: _Embedded
) -> tuple[dict[str, float], dict]:
    """The recalls, and for the protocol what was retrieved among what."""
    if task.retrieval != ALL:
        texts = _caption_embeds(encode, found.captions)
        seed = setup.cfg.training.seed
        values = retrieval(found.images, texts, found.captions, task.retrieval, seed=seed)
        return values, {"candidates": task.retrieval, "captions_per_image": "the first"}
    recipe = setup.protocol.recipe if setup.protocol else None
    most = recipe.captions_per_image if recipe else None
    kept = [captions[:most] for captions in found.captions]
    counts = torch.tensor([len(captions) for captions in kept])
    texts = _caption_embeds(encode, [caption for captions in kept for caption in captions])
    image_of = torch.repeat_interleave(torch.arange(len(kept)), counts)
    values = full_retrieval(found.images, texts, image_of, ALL_RECALLS)
    return values, {
        "candidates": ALL,
        "captions_per_image": {"least": int(counts.min()), "most": int(counts.max())},
        "captions_counted": "all" if most is None else f"the first {most} of a picture",
    }


def _caption_embeds(encode: Callable, captions: Sequence[str]) -> torch.Tensor:
    """(N, E) on the CPU; a caption that occurs often is embedded once."""
    distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    texts = encode(list(distinct)).float().cpu()
    return texts[[distinct[caption] for caption in captions]]
