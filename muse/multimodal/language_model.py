"""The language side: InternVL's language model and projector (transformers' own classes), and text.

MUSE's encoder takes the place of InternVL's vision tower, so the tower is neither built nor read.
A source is a hub id, a directory in transformers' layout, or `random` (from `config`, no network).
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from muse.config_fields import nearest
from muse.errors import CheckpointError, ConfigError
from muse.utils.weights import TensorFiles, load_into, locate, read_config, read_mapping

# Names in files (left) of tensors that transformers calls otherwise in memory.
_FILE_NAMES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)
_FIELDS = (  # of `InternVLConfig`: those that the language model and the projector depend on
    "text_config",
    "vision_config",
    "image_token_id",
    "image_seq_length",
    "downsample_ratio",
    "projector_hidden_act",
    "tie_word_embeddings",
)
_NOT_OF_THE_TEXT = (
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_name_or_path",
)
_VISION = ("vision_tower.", "model.vision_tower.")
_HEAD, _EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"


def build_language_model(source: str, config: dict[str, Any], load_weights: bool = True):
    """`InternVLForConditionalGeneration` without a vision tower (its `model.vision_tower` is None).

    Args:
        source: hub id, directory in transformers' layout, or "random".
        config: fields of `InternVLConfig`; empty: the source's own. Of its vision_config only
            hidden_size counts: the width that the projector reads.
        load_weights: False builds it from `config` alone, for a checkpoint that brings weights.

    Raises:
        ConfigError: fields that make no InternVL.
        CheckpointError: a source that is missing, of another layout, or does not fit the fields.
    """
    from transformers import InternVLForConditionalGeneration  # noqa: PLC0415 (slow to import)

    directory = None
    if source != "random" and (load_weights or not config):
        directory = locate(source, ["*.json", "*.jinja", "*.safetensors"])
    if not config and directory is None:
        raise ConfigError("model.language_model.config must be given where source is random")
    fields = _given_fields(config) if config else _published_fields(read_config(directory))
    state = None
    if directory is not None and load_weights:
        state = _language_tensors(TensorFiles(directory), source)
        # What the file holds decides, as in transformers, whether the head is the embeddings.
        fields["tie_word_embeddings"] = _HEAD not in state
    internvl = InternVLForConditionalGeneration(_internvl_config(fields))
    internvl.model.vision_tower = None
    if state is not None:
        if tied(internvl):
            state[_HEAD] = state.get(_EMBEDDINGS, state.get(_HEAD))
        load_into(internvl, state, source, "the language model and projector of InternVL")
    return internvl.eval()


def language_fields(internvl: nn.Module) -> dict[str, Any]:
    """Fields that build the same language model and projector again, as plain JSON values."""
    config = internvl.config
    text = config.text_config.to_diff_dict() | {"model_type": config.text_config.model_type}
    return {
        "text_config": {n: v for n, v in text.items() if n not in _NOT_OF_THE_TEXT},
        "vision_config": {"hidden_size": config.vision_config.hidden_size},
        "image_token_id": config.image_token_id,
        "downsample_ratio": config.downsample_ratio,
        "projector_hidden_act": config.projector_hidden_act,
        "tie_word_embeddings": tied(internvl),
    }


def tied(internvl: nn.Module) -> bool:
    """Whether the head's weights are the embeddings' (one tensor under two names)."""
    return internvl.lm_head.weight is internvl.model.language_model.embed_tokens.weight


def _given_fields(config: dict[str, Any]) -> dict[str, Any]:
    for name in config:
        if name not in _FIELDS:
            where = "model.language_model.config"
            raise ConfigError(f"unknown key {where}.{name}{nearest(name, _FIELDS)}")
    return dict(config)


def _published_fields(config: dict[str, Any]) -> dict[str, Any]:
    """What counts of a config.json; the rest describes the tower, the file, or a release."""
    if "llm_config" in config:
        raise CheckpointError(
            "model.language_model.source is in InternVL's original layout (llm_config); take the "
            "directory or hub id that ends in -hf"
        )
    fields = {name: value for name, value in config.items() if name in _FIELDS}
    # A precision here would make this part alone in it.
    text = {n: v for n, v in config.get("text_config", {}).items() if n not in _NOT_OF_THE_TEXT}
    return {**fields, "text_config": text}


def _internvl_config(fields: dict[str, Any]) -> Any:
    from transformers import InternVLConfig  # noqa: PLC0415 (slow to import)

    text = fields.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError("model.language_model.config.text_config must hold the model's fields")
    is_tied = bool(fields.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    width = fields.get("vision_config", {}).get("hidden_size", 1024)
    try:
        return InternVLConfig(
            **{
                **fields,
                "text_config": {**text, "tie_word_embeddings": is_tied},
                # The tower is replaced: no layer of it is made.
                "vision_config": {
                    "hidden_size": width,
                    "num_attention_heads": 1,
                    "num_hidden_layers": 0,
                },
                "tie_word_embeddings": is_tied,
            }
        )
    except Exception as error:  # transformers' strict dataclasses raise a class of their own
        said = " ".join(str(error).split())
        raise ConfigError(f"model.language_model.config makes no InternVL: {said}") from None


def _language_tensors(files: TensorFiles, source: str) -> dict[str, Tensor]:
    """All but the vision tower, in float32, under transformers' names in memory."""
    if any(name.startswith(("mlp1.", "vision_model.")) for name in files.keys()):
        raise CheckpointError(
            f"{source}: weights in InternVL's original layout; take the directory or hub id that "
            "ends in -hf"
        )
    state = {}
    for name in files.keys():
        if name.startswith(_VISION):
            continue
        new = name
        for pattern, replacement in _FILE_NAMES:
            new = re.sub(pattern, replacement, new)
        state[new] = files[name].float()
    return state


# ------------------------------------------------------------------------------------------- text
def load_text_tokenizer(source: str):
    """The fast tokenizer of a directory or hub id, with the chat template that lies beside it."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 (slow to import)

    if source == "random":
        raise ConfigError(
            "model.text_tokenizer must name a directory with tokenizer.json where "
            "model.language_model.source is random"
        )
    directory = locate(source, ["*.json", "*.jinja", "*.txt"])
    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(f"{source}: holds no tokenizer.json")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # tokenizers raises plain Exception on a file that is no tokenizer
        said = " ".join(str(error).split())
        raise CheckpointError(f"{source}: its tokenizer cannot be read ({said})") from None
    tokenizer.chat_template = _template_beside(directory) or tokenizer.chat_template
    if not isinstance(tokenizer.chat_template, str):
        raise CheckpointError(f"{source}: holds no chat template (chat_template.jinja)")
    return tokenizer


def _template_beside(directory: Path) -> str | None:
    """The processor's template, which knows pictures; the tokenizer's own may be Qwen's."""
    if (file := directory / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    if (file := directory / "chat_template.json").is_file():
        return read_mapping(file).get("chat_template")
    return None
