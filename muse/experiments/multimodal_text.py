"""The text side of the multimodal demo: a tokenizer of the demo's own words, with a chat template.

No package brings a pretrained language model, so that the demo trains a small one, and its words.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from muse.utils.io import atomic_directory

# In the order of their ids. Those of a picture are named as in InternVL's tokenizer.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
)
# Qwen's turns; a picture is announced by its placeholder, which ChatPrompts replaces.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<IMG_CONTEXT>\n' }}{%- else %}{{- part['text'] }}"
    "{%- endif %}{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def train_text_tokenizer(texts: Iterable[str], vocabulary: int):
    """A fast tokenizer of transformers: byte-level pairs learnt from `texts`.

    Args:
        texts: what it learns from; anything else is spelled in bytes.
        vocabulary: tokens at most, 262 (bytes and special tokens) at least.
    """
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pairs.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pairs,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_text_tokenizer(texts: Iterable[str], folder: Path, vocabulary: int) -> None:
    """Train one and save it in `folder`, unless it is there."""
    if folder.is_dir():
        return
    tokenizer = train_text_tokenizer(texts, vocabulary)
    with atomic_directory(folder) as partial:
        tokenizer.save_pretrained(partial)
        (partial / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
