"""The measurement behind scripts/zero_shot.py: prompts, text tower and images together."""

import argparse
import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from muse import cli
from muse.config import plain
from muse.errors import ConfigError
from muse.evaluation import command
from muse.evaluation.feature_store import store_key
from muse.evaluation.metrics.networks import state_sha256
from muse.evaluation.zero_shot import imagenet_prompts, read_lines, retrieval, zero_shot
from muse.teachers.prompts import Template, class_embeddings, imagenet_templates, prompts
from muse.utils.distributed import all_objects, all_rows, is_main

logger = logging.getLogger(__name__)


def class_names(args: argparse.Namespace, loader) -> tuple[list[str], str]:
    """The names and where they are from: --classnames, classes.txt beside local data, class folders, open_clip's
    ImageNet list.
    """
    if args.classnames:
        return read_lines(args.classnames, "class name"), args.classnames
    source = loader.stream.source
    beside = (
        Path(source.root) if hasattr(source, "root") else Path(source.shards[0]).parent
    ) / "classes.txt"
    if beside.is_file():
        return read_lines(beside, "class name"), str(beside)
    folders = list(loader.classes)
    if folders and not all(re.fullmatch(r"n\d{8}", name) for name in folders):
        return [name.replace("_", " ") for name in folders], "class folders"
    return imagenet_prompts()[0], "open_clip's ImageNet names"


def text_weights(
    encode: Callable,
    teacher_facts: dict,
    names: Sequence[str],
    templates: Sequence[Template],
    folder: str | Path,
) -> torch.Tensor:
    """`class_embeddings`, kept in `folder` under the hash of the text tower and of every prompt."""
    texts = [prompts(name, templates) for name in names]
    path = Path(folder) / f"text-{store_key({'teacher': teacher_facts, 'prompts': texts})}.pt"
    if path.exists():
        logger.info("text weights from %s", path)
        return torch.load(path, weights_only=True)
    weights = class_embeddings(encode, names, templates).cpu()
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        torch.save(weights, partial)
        partial.replace(path)
    return weights


@torch.no_grad()
def embed_data(model, loader, device, fields: Sequence[str]) -> dict[str, Any]:
    """This process's images: embeddings (N,E) on the CPU, and the labels and captions among `fields`, with their
    indices.
    """
    rows: dict[str, list] = {"images": [], "indices": [], "labels": [], "text": []}
    for batch in loader:
        rows["images"].append(model.embed_image(batch["images"].to(device)).float().cpu())
        rows["indices"].append(batch["indices"])
        rows["labels"].append(batch["labels"]) if "labels" in fields else None
        rows["text"] += batch["text"] if "text" in fields else []
    width = int(model.config.semantic_dim)
    return {
        "images": torch.cat([torch.zeros(0, width), *rows["images"]]),
        "indices": torch.cat([torch.zeros(0, dtype=torch.long), *rows["indices"]]),
        "labels": torch.cat([torch.zeros(0, dtype=torch.long), *rows["labels"]]),
        "text": rows["text"],
    }


def run_zero_shot(args: argparse.Namespace, cfg) -> tuple[dict, dict] | None:
    """Values and facts for the protocol; None in the processes that only embed."""
    from muse.teachers import build_text_teacher

    if args.retrieval < 0 or args.retrieval == 1:
        raise ConfigError(
            f"--retrieval must be 0 (none) or at least 2 candidates, not {args.retrieval}"
        )
    command.start(args)
    fields = ("images", "labels") + (("text",) if args.retrieval else ())
    loader = command.eval_data(args, cfg, args.val_url, "eval_shards_path_or_url", fields)
    names, names_from = class_names(args, loader)
    if is_main():
        logger.info("%d class names: %s", len(names), names_from)
    templates = read_lines(args.templates, "template") if args.templates else imagenet_templates()
    model = cli.load_model(args, cfg)
    teacher = build_text_teacher(plain(cfg.teacher.text))
    if teacher is None:
        raise ConfigError("zero-shot needs a text tower: teacher.text.kind is none")
    teacher = teacher.to(args.device)
    if teacher.dim != cfg.model.semantic_dim:
        raise ConfigError(
            f"the text tower gives width {teacher.dim}, model.semantic_dim is {cfg.model.semantic_dim}"
        )
    tower = {
        "kind": cfg.teacher.text.kind,
        "source": cfg.teacher.text.source,
        "weights_sha256": state_sha256(teacher),
    }
    with command.one_line_errors("zero-shot"):
        weights = text_weights(teacher.encode, tower, names, templates, f"{args.output_dir}/text")
        own = embed_data(model, loader, args.device, fields)
        data = command.data_facts(loader, cfg)
        order = all_rows(own["indices"]).argsort()
        command.check_count(loader, data, len(order))
        images, labels = all_rows(own["images"])[order], all_rows(own["labels"])[order]
        captions = [text for part in all_objects(own["text"]) for text in part]
        if not command.finish():
            return None
        values = zero_shot(images, labels, weights)
        if args.retrieval:
            captions = [captions[i] for i in order.tolist()]
            distinct = list(dict.fromkeys(captions))
            texts = teacher.encode(distinct).float().cpu()
            row = {caption: i for i, caption in enumerate(distinct)}
            found = retrieval(
                images,
                texts[[row[c] for c in captions]],
                captions,
                args.retrieval,
                seed=cfg.training.seed,
            )
            values |= {f"retrieval_{name}": value for name, value in found.items()}
    text = json.dumps([prompts("{}", templates), names])
    prompt_facts = {
        "classnames": names_from,
        "templates": len(templates),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    return values, {"text_tower": tower, "prompts": prompt_facts, **data}
