"""The published sizes, built on the meta device: no memory, no download, exact parameter counts."""

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from muse.config import load_config, plain
from muse.multimodal import MUSE_UMM
from tests.helpers import ROOT

# Fields of OpenGVLab/InternVL3-1B-hf and -2B-hf (Qwen2.5 0.5B and 1.5B, head not tied).
TEXT_1B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151674,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
TEXT_2B = {
    **TEXT_1B,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
}
# Fields of Efficient-Large-Model's SANA 0.6B; the 1.6B's are diffusers' defaults.
SANA_06B = {
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "num_layers": 28,
}


@pytest.mark.parametrize(
    ("tokenizer", "text", "sana", "internvl_total", "sana_total"),
    [
        ("muse_1b", TEXT_1B, SANA_06B, 938_193_024, 591_747_872),
        ("muse_3b", TEXT_2B, {}, 2_088_957_440, 1_604_462_752),
    ],
)
def test_parameter_counts(tokenizer, text, sana, internvl_total, sana_total):
    cfg = load_config(ROOT / "configs" / tokenizer / "model.yaml")
    config = {
        "tokenizer": {"source": "random", "config": plain(cfg.model)},
        "language_model": {
            "source": "random",
            "config": {"text_config": text, "tie_word_embeddings": False},
        },
        "generator": {"source": "random", "config": {"sample_size": 16, **sana}},
    }
    with torch.device("meta"):
        umm = MUSE_UMM(config, load_sources=False)
    count = {
        name: sum(p.numel() for p in module.parameters()) for name, module in umm.named_children()
    }
    assert all(p.is_meta for p in umm.parameters())
    assert count["tokenizer"] == 486_459_556
    assert count["generator"] == sana_total
    # Language model and projector: what transformers' whole InternVL has beside its tower.
    with torch.device("meta"):
        fields = {**config["language_model"]["config"], "vision_config": {"attention_bias": True}}
        whole = InternVLForConditionalGeneration(InternVLConfig(**fields))
    tower = sum(p.numel() for p in whole.model.vision_tower.parameters())
    assert sum(p.numel() for p in whole.parameters()) == internvl_total
    assert count["internvl"] == internvl_total - tower
    # The tower that is replaced is as large as the one that replaces it.
    assert sum(p.numel() for p in umm.tokenizer.encoder.parameters()) == tower

    width = text["hidden_size"]
    hidden = int(8 * width / 3)
    # W_Q, W_K, W_V, W_ITC and W_O; SwiGLU; two norms of the width, two of a head's.
    block = 5 * width**2 + 3 * width * hidden + 2 * width + 2 * 64
    assert count["connector"] == 6 * block
    assert count["to_caption"] == width * 2304 + 2304
    assert umm.queries.shape == (256, width)
    assert umm._picture_side() ** 2 == 256  # InternVL's own 256 tokens of a 448 px picture
    assert umm.config["image_size"] // umm.tokenizer.cell == 16  # latents of 16x16
