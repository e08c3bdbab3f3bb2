"""The section `model` of a multimodal configuration: three parts with their sources, and the rest.

Every fact about a key stands at its field (muse/config_fields.py).
"""

from dataclasses import dataclass
from typing import Any

from muse.config import read_section
from muse.config_fields import key, section
from muse.errors import ConfigError

# What can stand for a source picture's tokens before the connector, when a picture is edited.
SOURCE_TOKENS = ("language", "encoder", "latent")


@dataclass
class TokenizerPart:
    source: str = key(
        "random", "hub id | directory or file that evaluate.py takes as checkpoint | random"
    )
    config: dict[str, Any] = key(
        {}, "section `model` of a tokenizer's configuration; empty: read from the source"
    )


@dataclass
class LanguagePart:
    source: str = key(
        "OpenGVLab/InternVL3-1B-hf",
        "hub id | directory in transformers' layout (*-hf) | random; its vision tower is not read",
    )
    config: dict[str, Any] = key(
        {}, "fields of transformers' InternVLConfig; empty: read from the source"
    )


@dataclass
class GeneratorPart:
    source: str = key(
        "Efficient-Large-Model/Sana_600M_512px_diffusers",
        "hub id | directory of a pipeline or of its transformer | random",
    )
    config: dict[str, Any] = key(
        {}, "fields of diffusers' SanaTransformer2DModel; empty: read from the source"
    )


@dataclass
class UMMConfig:
    tokenizer: TokenizerPart = section(TokenizerPart)
    language_model: LanguagePart = section(LanguagePart)
    generator: GeneratorPart = section(GeneratorPart)
    text_tokenizer: str | None = key(
        None, "directory or hub id with tokenizer.json; null: language_model.source"
    )
    image_size: int = key(
        448,
        "side in pixels to which pictures are resized before they are read, and of generated "
        "pictures where no size is asked for",
        least=1,
    )
    num_queries: int = key(256, "learnable queries behind the prompt", least=1)
    connector: str = key(
        "synergistic",
        "SynergisticBlocks, or a copy of the language model's last layers that attends both ways",
        choices=("synergistic", "llm_layers"),
    )
    connector_layers: int = key(6, "blocks or layers of the connector", least=1)
    connector_dim: int | None = key(
        None, "synergistic: width of the blocks; null: the language model's", least=1
    )
    connector_heads: int | None = key(
        None, "synergistic: heads of the blocks; null: one for every 64 of width", least=1
    )
    source_tokens: list[str] = key(
        ["encoder"],
        "editing: what the connector reads of the source picture, each one token a place: "
        "language (the language model's outputs), encoder (what the language model reads there, "
        "as UniLIP), latent (MUSE's latent through a linear layer, and its place); several stand "
        "in a row",
    )
    generator_reads: str = key(
        "all",
        "what SANA attends to: all that the connector gives, or its outputs at the queries alone",
        choices=("all", "queries"),
    )
    latent_statistics: str | None = key(
        None, "statistics.safetensors of scripts/extract_latents.py, by channel"
    )
    latent_factor: float | None = key(
        None,
        "instead of statistics: latents are multiplied by this number (UniLIP: 10.6 and 9.5)",
        above=0,
    )
    solver: str = key(
        "dpm", "diffusers' multistep DPM-Solver++ or flow-match Euler", choices=("dpm", "euler")
    )
    flow_shift: float = key(
        3.0, "of the solver's noise levels, towards the noise; SANA publishes 3", above=0
    )
    gradient_checkpointing: bool = key(
        False, "recompute layers of language model, connector and SANA in the backward pass"
    )


def umm_config(values: Any) -> dict[str, Any]:
    """A complete, checked section as one plain dict; `ConfigError` names what does not fit."""
    config = read_section(values, UMMConfig, "model")
    unknown = [kind for kind in config["source_tokens"] if kind not in SOURCE_TOKENS]
    if unknown or not config["source_tokens"]:
        raise ConfigError(
            f"model.source_tokens must name some of {', '.join(SOURCE_TOKENS)}, "
            f"got {config['source_tokens']}"
        )
    if len(set(config["source_tokens"])) < len(config["source_tokens"]):
        raise ConfigError(f"model.source_tokens names one kind twice: {config['source_tokens']}")
    if config["latent_statistics"] is not None and config["latent_factor"] is not None:
        raise ConfigError("model.latent_statistics and model.latent_factor exclude each other")
    return config
