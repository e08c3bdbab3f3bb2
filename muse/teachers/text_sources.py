"""What text teachers ask of their libraries: names of weights, lengths, and tokens of strings.

The functions that make tokens do not hold a network, so that a loader's workers can run them.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from muse.errors import ConfigError
from muse.utils.weights import copy_of

Tokens = Sequence[Sequence[int]]
Tokenize = Callable[[list[str]], list[list[int]]]
OPEN_CLIP_SCHEMES = ("hf-hub:", "local-dir:")
OPEN_CLIP_ADVICE = (
    "Set teacher.text.source to MODEL/TAG (ViT-L-14/laion2b_s32b_b82k), hf-hub:OWNER/NAME, or a "
    "directory with open_clip_config.json and weights; or use teacher.text.kind=sentence."
)


def open_clip_tokens(tokenizer: Callable, texts: list[str]) -> list[list[int]]:
    """Rows of the context's length."""
    return tokenizer(texts).tolist()


def sentence_tokens(tokenizer: Callable, limit: int, texts: list[str]) -> list[list[int]]:
    """Rows as long as their strings, of `limit` tokens at most."""
    return tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]


def open_clip_name(source: str, config: dict[str, Any], pretrained: bool) -> tuple[str, str | None]:
    """What open_clip calls the model, and its pretrained tag (taken out of `config`)."""
    tag = config.pop("pretrained", None)
    if Path(source).is_dir():
        return f"local-dir:{source}", None
    if source.startswith(OPEN_CLIP_SCHEMES):
        return source, None
    name, _, named = source.partition("/")
    if pretrained and not (tag or named):
        raise ConfigError(f"teacher.text.source {source!r} names no weights. {OPEN_CLIP_ADVICE}")
    if pretrained and (repository := _hub_id(name, tag or named)):
        if copy := copy_of(repository, "open_clip_config.json"):
            return f"local-dir:{copy}", None
    return name, tag or named


def _hub_id(name: str, tag: str) -> str:
    """The repository that open_clip reads MODEL/TAG from; empty where it is from elsewhere."""
    import open_clip  # noqa: PLC0415 - heavy

    return open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "").rstrip("/")


def stored_max_tokens(path: str, tokenizer: Any, config: Any) -> int:
    """The length a sentence encoder cuts its input at: as stored, and no more than it can take."""
    stored = Path(path) / "sentence_bert_config.json"
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 512]
    if stored.is_file():
        limits.append(json.loads(stored.read_text()).get("max_seq_length") or limits[0])
    return int(min(limits))
