"""Zero-shot classification and image-text retrieval from L2-normalised embeddings."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from muse.data.eval import EvalLoader
from muse.errors import ConfigError
from muse.evaluation.class_names import class_names, read_lines
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
from muse.evaluation.retrieval import retrieval
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
    captions: list[str]


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
            embeds = model.embed_image(batch["images"].to(device))
        rows["images"].append(embeds.float().cpu())
        rows["indices"].append(batch["indices"])
        rows["labels"].append(batch["labels"]) if "labels" in fields else None
        rows["text"] += batch["text"] if "text" in fields else []
    none, width = torch.zeros(0, dtype=torch.long), int(model.config.semantic_dim)
    order = all_rows(torch.cat([none, *rows["indices"]])).argsort()
    captions = [text for part in all_objects(rows["text"]) for text in part]
    return _Embedded(
        all_rows(torch.cat([torch.zeros(0, width), *rows["images"]]))[order],
        all_rows(torch.cat([none, *rows["labels"]]))[order],
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


def check_candidates(count: int) -> None:
    """ConfigError unless retrieval among `count` captions is none (0) or a choice."""
    if count < 0 or count == 1:
        raise ConfigError(f"--retrieval must be 0 (none) or at least 2 candidates, not {count}")


def run_zero_shot(
    setup: Setup,
    classnames: str | None = None,
    templates: str | None = None,
    candidates: int = 0,
) -> Measured | None:
    """The measurement of scripts/zero_shot.py; None in the processes that only embed.

    Args:
        setup: what is measured, on which data.
        classnames: file of names in the order of the labels, or `imagenet`; see `class_names`.
        templates: file of templates; None is open_clip's 80.
        candidates: also caption retrieval among so many; 0 is none.
    """
    check_candidates(candidates)
    fields = ("images", "labels") + (("text",) if candidates else ())
    loader = eval_data(setup, "val", fields)
    classes = class_names(loader, classnames)
    names = classes.names
    if is_main_process():
        logger.info("%d class names: %s", len(names), classes.source)
    phrases = read_lines(templates, "template") if templates else imagenet_templates()
    model = setup.load_model()
    teacher, tower = _text_tower(setup.cfg, setup.device)
    with one_line_errors("zero-shot"):
        weights = text_weights(teacher.encode, tower, names, phrases, f"{setup.output_dir}/text")
        images, labels, captions = embed_data(model, loader, setup.device, fields, setup.autocast)
        data = data_facts(setup, loader)
        check_count(loader, data, len(images))
        classes.check(labels.tolist())
        if not leave_processes():
            return None
        values = zero_shot(images, labels, weights)
        if candidates:
            texts = _caption_embeds(teacher.encode, captions)
            seed = setup.cfg.training.seed
            found = retrieval(images, texts, captions, candidates, seed=seed)
            values |= {f"retrieval_{name}": value for name, value in found.items()}
    text = json.dumps([prompts("{}", phrases), names])
    prompt_facts = {
        "classnames": classes.source,
        "classes": len(names),
        "templates": len(phrases),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    return Measured(values, {"text_tower": tower, "prompts": prompt_facts, **data})


def _caption_embeds(encode: Callable, captions: Sequence[str]) -> torch.Tensor:
    """(N, E) on the CPU; a caption that occurs often is embedded once."""
    distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    texts = encode(list(distinct)).float().cpu()
    return texts[[distinct[caption] for caption in captions]]
