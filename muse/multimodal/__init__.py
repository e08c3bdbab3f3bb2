"""Text to image, editing and understanding on MUSE's tokens (paper, Sec. "Unified model").

Prompts go through a frozen language model, 256 learnable queries behind them; a connector turns
the queries' hidden states into captions for SANA, which denoises the tokenizer's latents.
"""

from muse.multimodal.umm import MUSE_UMM

__all__ = ["MUSE_UMM"]
