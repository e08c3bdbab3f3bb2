"""SynergisticBlock: one attention layer with three streams, each trained by its own loss.

MUSE, Fig. 2 and Sec. Method. [stop] is a detach: values pass, gradients do not.

    x ─┬─ RMSNorm ─ u ─┬─ [stop] ─ W_Q, W_K ─ A = softmax(QKᵀ/√d) ─ topology loss
       │               │                      │
       │               │                    [stop]
       │               └─ W_V ─ V ─ (+) ─── A·(V + S) ─ W_O ─ (+) ─ SwiGLU ─ (+) ─ pixel losses
       │                             │                         │
       ├─ [stop] ─ W_ITC ─ S ─── [stop]                        │
       │                   └─ mean over tokens ─ projector ─ contrast with text
       └───────────────────────────────────────────────────────┘

With every stop the topology loss alone trains W_Q and W_K, the contrast alone trains W_ITC, and the
pixel losses train the rest. Which stops stand, per routing (rows in docs/fidelity.md):

| stop                       | key                | paper                      | release | shared |
|----------------------------|--------------------|----------------------------|---------|--------|
| inputs of W_Q, W_K, W_ITC  | `isolate_streams`  | stages 1-2 yes, stage 3 no | no      | no     |
| A, where it weighs values  | `shield_attention` | yes                        | yes     | no     |
| S joins the values         | `join_semantics`   | yes                        | no      | S is V |
| S, where it joins values   | `shield_semantics` | yes                        | –       | –      |

Shapes: B images, N tokens, D width, heads x d = D.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.models.layers import RMSNorm, SwiGLU, apply_rotary


class BlockOutput(NamedTuple):
    """What a block gives."""

    tokens: Tensor  # (B, N, D)
    semantic: Tensor  # S, (B, N, D)
    log_attention: Tensor | None  # log A, (B, heads, N, N), float32; None unless asked for


class SynergisticBlock(nn.Module):
    """The paper's block, or with `shared` the baseline of Fig. 3: one set of values for everything.

    Args:
        dim: D, a multiple of num_heads.
        num_heads: attention heads.
        isolate_streams: detach the inputs of W_Q, W_K and W_ITC.
        shield_attention: detach A where it weighs the values.
        join_semantics: add S to the values.
        shield_semantics: detach S where it joins the values.
        shared: S is V, and there is no W_ITC.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        isolate_streams: bool = True,
        shield_attention: bool = True,
        join_semantics: bool = True,
        shield_semantics: bool = True,
        shared: bool = False,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.isolate_streams, self.shield_attention = isolate_streams, shield_attention
        self.join_semantics, self.shield_semantics = join_semantics and not shared, shield_semantics
        self.shared = shared

        self.norm1 = RMSNorm(dim)
        self.q_topo = nn.Linear(dim, dim, bias=False)  # W_Q
        self.k_topo = nn.Linear(dim, dim, bias=False)  # W_K
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)
        # The release's name for W_V, though it carries texture and `v_itc` carries semantics.
        self.v_sem = nn.Linear(dim, dim, bias=False)
        if not shared:
            self.v_itc = nn.Linear(dim, dim, bias=False)  # W_ITC
        self.proj = nn.Linear(dim, dim, bias=False)  # W_O
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], return_attention: bool = False
    ) -> BlockOutput:
        """One layer: x (B, N, D) -> `BlockOutput`.

        Args:
            x: tokens.
            rotary: tables of cosines and sines, (N, d) each.
            return_attention: also give log A; without it A is never held in memory.
        """
        u = self.norm1(x)
        query, key = self._topology_stream(u.detach() if self.isolate_streams else u, rotary)
        values = self.v_sem(u)  # V, (B, N, D)
        # S, (B, N, D)
        semantic = values if self.shared else self.v_itc(x.detach() if self.isolate_streams else x)
        if self.join_semantics:
            values = values + (semantic.detach() if self.shield_semantics else semantic)

        log_attention = None
        if return_attention:
            log_attention = self._log_attention(query, key)  # (B, heads, N, N)
            attention = log_attention.detach() if self.shield_attention else log_attention
            mixed = attention.exp().to(values.dtype) @ self._split(values)
        else:
            if self.shield_attention:
                query, key = query.detach(), key.detach()
            mixed = F.scaled_dot_product_attention(query, key, self._split(values))
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))  # (B, heads, N, d) -> (B, N, D)
        return BlockOutput(x + self.mlp(self.norm2(x)), semantic, log_attention)

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, d)"""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _topology_stream(self, u: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """u (B, N, D) -> normalised, rotated queries and keys (B, heads, N, d)."""
        query = apply_rotary(self.q_norm(self._split(self.q_topo(u))), rotary)
        key = apply_rotary(self.k_norm(self._split(self.k_topo(u))), rotary)
        return query, key

    def _log_attention(self, query: Tensor, key: Tensor) -> Tensor:
        """log A in float32 whatever autocast says: the topology loss reads small probabilities."""
        with torch.autocast(query.device.type, enabled=False):
            logits = query.float() @ key.float().transpose(-1, -2) * self.head_dim**-0.5
            return logits.log_softmax(dim=-1)
