"""One block against its formula written out with loops over heads, and its two paths against each
other.
"""

import math

import pytest
import torch

from muse.models.layers import RotaryEmbedding
from muse.models.synergistic_block import SynergisticBlock

DIM, HEADS, TOKENS = 12, 3, 7


def make_block(**switches) -> SynergisticBlock:
    torch.manual_seed(3)
    block = SynergisticBlock(DIM, HEADS, **switches)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(1 if parameter.ndim == 1 else 0, 0.4)
    return block


def rotary(length: int = TOKENS):
    return RotaryEmbedding(DIM // HEADS)(length, torch.device("cpu"))


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turn(x):
    """Rotate the rows of x (N, d) by their index."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x), dtype=x.dtype)[:, None] * 10000.0 ** (
        -torch.arange(half, dtype=x.dtype) / half
    )
    return torch.cat(
        [
            x[:, :half] * angle.cos() - x[:, half:] * angle.sin(),
            x[:, half:] * angle.cos() + x[:, :half] * angle.sin(),
        ],
        1,
    )


def by_formula(block, x):
    """FIDELITY, "The method", for one picture x (N, D): tokens, semantic stream, attention (heads,
    N, N).
    """
    weight = {name: parameter.detach().double() for name, parameter in block.named_parameters()}
    u = rms(x, weight["norm1.weight"])
    values = u @ weight["v_sem.weight"].T
    semantic = values if block.shared else x @ weight["v_itc.weight"].T
    joined = values + semantic if block.join_semantics else values
    width, maps, mixed = DIM // HEADS, [], []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        q = turn(rms(u @ weight["q_topo.weight"][part].T, weight["q_norm.weight"]))
        k = turn(rms(u @ weight["k_topo.weight"][part].T, weight["k_norm.weight"]))
        logits = (q @ k.T / math.sqrt(width)).exp()
        maps.append(logits / logits.sum(1, keepdim=True))
        mixed.append(maps[-1] @ joined[:, part])
    x = x + torch.cat(mixed, 1) @ weight["proj.weight"].T
    v = rms(x, weight["norm2.weight"])
    gate = v @ weight["mlp.w1.weight"].T
    x = (
        x
        + (gate * torch.sigmoid(gate) * (v @ weight["mlp.w2.weight"].T)) @ weight["mlp.w3.weight"].T
    )
    return x, semantic, torch.stack(maps)


@pytest.mark.parametrize(
    "switches", [{}, {"join_semantics": False}, {"shared": True}, {"shield_attention": False}]
)
@pytest.mark.parametrize("explicit", [True, False])
def test_block_is_its_formula(switches, explicit):
    block, x = make_block(**switches), torch.randn(2, TOKENS, DIM)
    with torch.no_grad():
        out = block(x, rotary(), return_attention=explicit)
    for index in range(2):
        tokens, semantic, maps = by_formula(block, x[index].double())
        assert torch.allclose(out.tokens[index].double(), tokens, atol=1e-4)
        assert torch.allclose(out.semantic[index].double(), semantic, atol=1e-5)
        if explicit:
            assert torch.allclose(out.log_attention[index].double().exp(), maps, atol=1e-5)
    assert explicit or out.log_attention is None


@pytest.mark.parametrize(
    "switches", [{}, {"isolate_streams": False}, {"shield_attention": False}, {"shared": True}]
)
def test_both_attention_paths_have_equal_outputs_and_gradients(switches):
    block, x = make_block(**switches), torch.randn(2, TOKENS, DIM, requires_grad=True)
    parameters = [x, *block.parameters()]
    given = {}
    for explicit in (True, False):
        out = block(x, rotary(), return_attention=explicit)
        loss = (out.tokens * torch.linspace(-1, 1, DIM)).sum() + out.semantic.square().sum()
        given[explicit] = [out.tokens, *torch.autograd.grad(loss, parameters, allow_unused=True)]
    for left, right in zip(*given.values()):
        assert (left is None) == (right is None)
        assert left is None or torch.allclose(left, right, atol=2e-4, rtol=1e-4)


def test_attention_rows_are_probabilities_in_float32_even_in_half_precision():
    block, x = make_block().to(torch.bfloat16), torch.randn(2, TOKENS, DIM, dtype=torch.bfloat16)
    out = block(x, rotary(), return_attention=True)
    assert out.log_attention.dtype == torch.float32 and out.log_attention.shape == (
        2,
        HEADS,
        TOKENS,
        TOKENS,
    )
    assert torch.allclose(out.log_attention.exp().sum(-1), torch.ones(2, HEADS, TOKENS), atol=1e-5)
    assert out.tokens.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            make_block()(x.float(), rotary(), return_attention=True).log_attention.dtype
            == torch.float32
        )


def test_no_biases_and_the_names_of_the_release():
    names = [name for name, _ in make_block().named_parameters()]
    assert names == [
        "norm1.weight",
        "q_topo.weight",
        "k_topo.weight",
        "q_norm.weight",
        "k_norm.weight",
        "v_sem.weight",
        "v_itc.weight",
        "proj.weight",
        "norm2.weight",
        "mlp.w1.weight",
        "mlp.w2.weight",
        "mlp.w3.weight",
    ]
    assert "v_itc.weight" not in dict(make_block(shared=True).named_parameters())


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="dim 12 is not a multiple of num_heads 5"):
        SynergisticBlock(12, 5)
