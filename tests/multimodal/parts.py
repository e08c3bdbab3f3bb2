"""Small parts of a multimodal model: a text tokenizer, configurations, and weights that differ."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from muse.multimodal import MUSE_UMM
from tests.helpers import MODEL, merged

# The template of InternVL's -hf repositories, in its essentials.
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
CONTEXT_ID = SPECIAL.index("<IMG_CONTEXT>")

INTERNVL = {
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "eos_token_id": SPECIAL.index("<|im_end|>"),
    },
    "vision_config": {"hidden_size": 16},
    "image_token_id": CONTEXT_ID,
    "tie_word_embeddings": False,
}
SANA = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 24,
    "sample_size": 2,
}
# 32 px pictures: 4x4 tokens of 8 px, 2x2 of them in a prompt; 2x2 latents of 8 channels.
UMM = {
    "tokenizer": {"source": "random", "config": MODEL},
    "language_model": {"source": "random", "config": INTERNVL},
    "generator": {"source": "random", "config": SANA},
    "image_size": 32,
    "num_queries": 5,
    "connector_layers": 2,
    "connector_heads": 2,
    "latent_factor": 1.5,
}


def make_text_tokenizer():
    """A byte-level BPE tokenizer with InternVL's special tokens, template and attributes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["user assistant Generate an image: Edit the image: a cat"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"],
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<|endoftext|>",
        },
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def filled(module: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> torch.nn.Module:
    """Every parameter random: no two alike, no branch at rest, nothing without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def tiny_umm(text_tokenizer_dir, *changes):
    """A `MUSE_UMM` of random tiny parts whose weights are all far from zero."""
    torch.manual_seed(0)
    base = merged(UMM, {"text_tokenizer": str(text_tokenizer_dir)})
    return filled(MUSE_UMM(merged(base, *changes)))
