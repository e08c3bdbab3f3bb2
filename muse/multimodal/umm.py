"""MUSE_UMM: one model that makes pictures from text, edits them, and answers questions about them.

    prompt ──┐                                ┌─ outputs at the queries ─┐
    picture ─┼─ language model, frozen ───────┤                          ├─ connector ─ linear ─┐
    queries ─┘                                └─ the picture's tokens ───┘                      │
                                                                                       captions │
    noise ─────────────────────────────────── SANA ◄────────────────────────────────────────────┘
                                               └─ latents ─ MUSE's decoder ─ picture

How the language model reads a picture is ours to choose, for the paper does not say: the tokens of
MUSE's retrained InternViT, before MUSE's own blocks, go where those of InternVL's tower went:
through InternVL's 2x2 pixel shuffle and its projector.

Shapes: B samples, n tokens of a prompt, P of them a picture's, Q queries, W the language model's
width. What the model does for its user is in umm_inference.py, saving in umm_checkpoint.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from muse.errors import ConfigError
from muse.generation.embeddings import sine_table
from muse.generation.latents import LatentStatistics, check_tokenizer
from muse.models.loading import weights_file
from muse.multimodal.chat_prompts import ChatPrompts
from muse.multimodal.connector import LanguageLayersConnector, SynergisticConnector
from muse.multimodal.language_model import build_language_model, load_text_tokenizer
from muse.multimodal.latent_scale import LatentScale
from muse.multimodal.sampling import sana_loss
from muse.multimodal.sana import build_sana
from muse.multimodal.umm_checkpoint import UMMCheckpointMixin, build_tokenizer
from muse.multimodal.umm_config import umm_config
from muse.multimodal.umm_inference import UMMInferenceMixin
from muse.utils.io import file_sha256


class MUSE_UMM(UMMInferenceMixin, UMMCheckpointMixin, nn.Module):
    """The multimodal model. Tokenizer, language model and projector start frozen.

    Args:
        config: section `model` (umm_config.py): dict, dataclass, or node of a configuration.
        load_sources: read weights, statistics and the text tokenizer from their sources. False
            builds everything from `config` alone, for a checkpoint that brings them, or to count
            parameters on the meta device.
        text_tokenizer: transformers' fast tokenizer instead of the configured one.
    """

    def __init__(self, config: Any, load_sources: bool = True, text_tokenizer: Any = None):
        super().__init__()
        self.config = cfg = umm_config(config)
        self.tokenizer = build_tokenizer(**cfg["tokenizer"], load_weights=load_sources)
        self.internvl = build_language_model(**cfg["language_model"], load_weights=load_sources)
        self.tokenizer.requires_grad_(False)
        self.internvl.requires_grad_(False)
        latent_dim = self.tokenizer.config.latent_dim
        self.generator = build_sana(
            **cfg["generator"], latent_dim=latent_dim, load_weights=load_sources
        )

        language_model = self.internvl.model.language_model
        width = language_model.config.hidden_size
        self.queries = nn.Parameter(0.02 * torch.randn(cfg["num_queries"], width))
        if cfg["connector"] == "llm_layers":
            self.connector = LanguageLayersConnector(language_model, cfg["connector_layers"])
        else:
            self.connector = SynergisticConnector(
                width, cfg["connector_layers"], cfg["connector_dim"], cfg["connector_heads"]
            )
        self.to_caption = nn.Linear(self.connector.width, self.generator.config.caption_channels)
        if "latent" in cfg["source_tokens"]:
            self.latent_tokens = nn.Linear(latent_dim, width)
        self.latent_scale = LatentScale(latent_dim, cfg["latent_factor"])
        if cfg["latent_statistics"] is not None and load_sources:
            self.latent_scale.set_statistics(self._statistics())

        picture_tokens = self._picture_side() ** 2
        if text_tokenizer is None and load_sources:
            source = cfg["text_tokenizer"] or cfg["language_model"]["source"]
            text_tokenizer = load_text_tokenizer(source)
        self.chat = None
        if text_tokenizer is not None:
            vocabulary = language_model.config.vocab_size
            self.chat = ChatPrompts(text_tokenizer, picture_tokens, vocabulary)
        if cfg["gradient_checkpointing"]:
            self.internvl.gradient_checkpointing_enable({"use_reentrant": False})
            self.generator.enable_gradient_checkpointing()
            self.connector.gradient_checkpointing = True
        self._remember_sources(load_sources)

    def forward(
        self,
        texts: Sequence[str],
        images: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        answers: Sequence[str] | None = None,
        level: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Loss of each sample (B,), for training. All samples of a batch have a picture, or none.

        Args:
            texts: prompts, instructions, or questions.
            images: source pictures (B, 3, H, W) in [0, 1].
            targets: pictures to make (B, 3, H, W), sides multiples of the tokenizer's cell: the
                loss is `sana_loss`.
            answers: what to say instead: the loss is the mean cross-entropy of the answer's tokens.
            level, noise: of `sana_loss`; drawn when None.
        """
        if (targets is None) == (answers is None):
            raise ValueError("training needs either targets (pictures) or answers (texts)")
        if answers is not None:
            return self._answer_loss(images, texts, answers)
        with torch.no_grad():
            latents = self.latent_scale.normalise(self.tokenizer.encode(targets).latent)
        return sana_loss(self.generator, latents, self.captions(texts, images), level, noise)

    # ----------------------------------------------------------------------------------- captions
    def captions(self, texts: Sequence[str], images: Tensor | None = None) -> Tensor:
        """What SANA attends to, (B, T, caption_channels), for prompts or for edits of images."""
        chat = self.require_chat()
        make = chat.generation if images is None else chat.editing
        prompts = [make(text) for text in texts]
        pictures = None if images is None else self.read_pictures(images)  # (B, P, W)
        rows = [torch.cat([row, self.queries]) for row in self.embed(prompts, pictures)]
        hidden = self.hidden_states(rows)  # (B, longest n + Q, W)
        count = len(self.queries)
        x = torch.stack([h[len(ids) : len(ids) + count] for h, ids in zip(hidden, prompts)])
        if images is not None:
            places = [(ids == chat.context_id).nonzero().flatten() for ids in prompts]
            outputs = torch.stack([h[at.to(h.device)] for h, at in zip(hidden, places)])
            x = torch.cat([*self._source_tokens(images, pictures, outputs), x], dim=1)
        x = self.connector(x)  # (B, T, connector's width)
        if self.config["generator_reads"] == "queries":
            x = x[:, -count:]
        return self.to_caption(x)

    def hidden_states(self, rows: list[Tensor]) -> Tensor:
        """The language model's outputs (B, longest n, W) on rows of embeddings (n, W).

        Shorter rows are padded behind, where a causal model's tokens do not look. So no mask is
        needed, and no sample depends on its neighbours' lengths.
        """
        language_model = self.internvl.model.language_model
        embeds = pad_sequence(rows, batch_first=True)
        return language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state

    def embed(self, prompts: list[Tensor], pictures: Tensor | None) -> list[Tensor]:
        """Rows (n, W) of the ids of prompts (n,), with pictures (B, P, W) in their places."""
        table = self.internvl.get_input_embeddings()
        rows = []
        for index, ids in enumerate(prompts):
            ids = ids.to(self.queries.device)
            row = table(ids)  # (n, W)
            if pictures is not None:
                places = (ids == self.require_chat().context_id)[:, None]
                row = row.masked_scatter(places, pictures[index].to(row.dtype))
            rows.append(row)
        return rows

    def read_pictures(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> what the language model reads of them, (B, P, W)."""
        tokens = self.tokenizer.encoder_features(self._resized(images))  # (B, C, he, we)
        shuffled = self.internvl.model.pixel_shuffle(
            tokens.permute(0, 2, 3, 1), self.internvl.config.downsample_ratio
        )  # (B, he/2, we/2, 4C)
        return self.internvl.model.multi_modal_projector(shuffled.flatten(1, 2))

    def resize(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] in the size in which they are read."""
        side = self.config["image_size"]
        if tuple(images.shape[-2:]) == (side, side):
            return images
        resized = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
        return resized.clamp(0, 1)

    def _resized(self, images: Tensor) -> Tensor:
        """Images as the tokenizer reads them, in the precision of its weights."""
        return self.resize(images).to(self.tokenizer.to_latent.weight.dtype)

    def require_chat(self) -> ChatPrompts:
        """The chat template; `ConfigError` where the model has no text tokenizer."""
        if self.chat is None:
            raise ConfigError("this model was built without a text tokenizer")
        return self.chat

    # ------------------------------------------------------------------------------------- inside
    def _statistics(self) -> LatentStatistics:
        """The configured file's; `CheckpointError` where another tokenizer's latents made it."""
        file, source = self.config["latent_statistics"], self.config["tokenizer"]["source"]
        statistics = LatentStatistics.load(file)
        if statistics.tokenizer_sha256 and Path(source).expanduser().exists():
            check_tokenizer(file, statistics.tokenizer_sha256, file_sha256(weights_file(source)))
        return statistics

    def _source_tokens(self, images: Tensor, pictures: Tensor, outputs: Tensor) -> list[Tensor]:
        """The source picture for the connector: one (B, n, W) for each kind in its order."""
        tokens = {"language": outputs, "encoder": pictures}
        if "latent" in self.config["source_tokens"]:
            with torch.no_grad():
                latent = self.tokenizer.encode(self._resized(images)).latent  # (B, C, h, w)
                latent = self.latent_scale.normalise(latent)
            # A latent says what is there, not where; the encoder's tokens know their places.
            places = sine_table(latent.shape[-2:], pictures.shape[-1]).to(pictures)  # (h*w, W)
            latent = latent.flatten(2).transpose(1, 2).to(pictures.dtype)  # (B, h*w, C)
            tokens["latent"] = self.latent_tokens(latent) + places
        return [tokens[kind] for kind in self.config["source_tokens"]]

    def _answer_loss(
        self, images: Tensor | None, questions: Sequence[str], answers: Sequence[str]
    ) -> Tensor:
        chat = self.require_chat()
        asked = [chat.question(text, images is not None) for text in questions]
        said = [chat.answer(text) for text in answers]
        pictures = None if images is None else self.read_pictures(images)
        rows = self.embed([torch.cat(pair) for pair in zip(asked, said)], pictures)
        losses = []
        for hidden, before, answer in zip(self.hidden_states(rows), asked, said):
            # Each token is predicted where the one before it stands. The head, as wide as the
            # vocabulary, runs on the answer alone.
            first = len(before) - 1
            logits = self.internvl.lm_head(hidden[first : first + len(answer)])
            losses.append(F.cross_entropy(logits.float(), answer.to(logits.device)))
        return torch.stack(losses)

    def _picture_side(self) -> int:
        """Side of a picture's grid of tokens in the prompt; `ConfigError` on sizes that clash."""
        side, ratio = self.config["image_size"], self.internvl.config.downsample_ratio
        cell = round(self.tokenizer.patch_size / ratio)
        for multiple in (cell, self.tokenizer.cell):
            if side % multiple:
                raise ConfigError(f"model.image_size={side} must be a multiple of {multiple}")
        width = self.tokenizer.encoder.config.hidden_size
        reads = self.internvl.config.vision_config.hidden_size
        if width != reads:
            raise ConfigError(
                f"the tokenizer's encoder is {width} wide, but the language model's projector "
                f"reads {reads} (model.language_model.config.vision_config.hidden_size)"
            )
        return side // cell
