"""The small parts, each against its formula or a plain loop."""

import math

import pytest
import torch
import torch.nn.functional as F

from muse.models.layers import (
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
    apply_rotary,
    check_images,
    padding_to_multiple,
    pixel_unshuffle,
    scale_gradient,
)


# ------------------------------------------------------------------------------- the pixel contract
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (
            torch.full((1, 3, 4, 4), 1.02),
            r"must be RGB in \[0, 1\], got values in \[1\.02, 1\.02\]",
        ),
        (torch.full((1, 3, 4, 4), -1.0), r"got values in \[-1, -1\]"),
        (torch.full((1, 3, 4, 4), 255.0), r"got values in \[255, 255\]"),
        (torch.full((1, 3, 4, 4), math.nan), "got values in .*nan"),
        (torch.full((1, 3, 4, 4), math.inf), "inf"),
        (
            torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
            r"floating point RGB in \[0, 1\], got torch\.uint8",
        ),
        (torch.zeros(3, 4, 4), r"shape \(B, 3, H, W\), got \(3, 4, 4\)"),
        (torch.zeros(1, 4, 4, 3), r"got \(1, 4, 4, 3\)"),
        (torch.zeros(1, 1, 4, 4), r"got \(1, 1, 4, 4\)"),
        (torch.zeros(0, 3, 4, 4), "must not be empty"),
        (torch.zeros(1, 3, 0, 4), "must not be empty"),
    ],
)
def test_what_breaks_the_pixel_contract_is_said(images, words):
    with pytest.raises(ValueError, match=words):
        check_images(images)


def test_one_bad_pixel_is_enough_and_the_margin_is_allowed():
    images = torch.rand(2, 3, 8, 8)
    check_images(images)
    check_images(torch.tensor([-0.01, 1.01, 0.0]).view(1, 3, 1, 1))
    images[1, 2, 3, 4] = math.nan
    with pytest.raises(ValueError, match="nan"):
        check_images(images)


# ---------------------------------------------------------------------------------- pixel-unshuffle
@pytest.mark.parametrize(("grid", "side"), [((4, 6), 2), ((6, 3), 3), ((2, 2), 2)])
def test_pixel_unshuffle_equals_a_loop(grid, side):
    (h, w), channels = grid, 5
    tokens = torch.randn(2, h * w, channels)
    folded, small = pixel_unshuffle(tokens, grid, side)
    assert small == (h // side, w // side) and folded.shape == (
        2,
        h * w // side**2,
        channels * side**2,
    )
    for image in range(2):
        for row in range(small[0]):
            for column in range(small[1]):
                expected = torch.cat(
                    [
                        tokens[image, (row * side + i) * w + column * side + j]
                        for i in range(side)
                        for j in range(side)
                    ]
                )
                assert torch.equal(folded[image, row * small[1] + column], expected)


def test_pixel_unshuffle_of_one_is_nothing_and_odd_grids_are_refused():
    tokens = torch.randn(1, 15, 2)
    same, grid = pixel_unshuffle(tokens, (3, 5), 1)
    assert same is tokens and grid == (3, 5)
    with pytest.raises(ValueError, match="3x5 cannot be folded by 2"):
        pixel_unshuffle(tokens, (3, 5), 2)


# --------------------------------------------------------------------------------- rotary positions
def test_rotary_is_a_rotation_of_pairs_by_the_angle_of_the_formula():
    width, length = 8, 50
    x = torch.randn(1, 1, length, width, dtype=torch.float64)
    pairs = torch.complex(x[..., : width // 2], x[..., width // 2 :])
    frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    rotated = pairs * torch.polar(torch.ones_like(angle), angle)
    ours = apply_rotary(x.float(), RotaryEmbedding(width)(length, torch.device("cpu")))
    assert torch.allclose(ours.double(), torch.cat([rotated.real, rotated.imag], dim=-1), atol=1e-5)


def test_rotary_products_depend_on_the_distance_alone():
    tables = RotaryEmbedding(16)(64, torch.device("cpu"))
    query, key = torch.randn(16), torch.randn(16)
    q = apply_rotary(query.expand(1, 1, 64, 16), tables)[0, 0]
    k = apply_rotary(key.expand(1, 1, 64, 16), tables)[0, 0]
    products = q @ k.T
    for distance in (-20, -1, 0, 3, 40):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)
    assert abs(float(products[0, 0] - query @ key)) < 1e-5
    assert torch.allclose(q.norm(dim=-1), query.norm().expand(64), atol=1e-5)


def test_rotary_table_does_not_depend_on_the_length_asked_for():
    rotary = RotaryEmbedding(16)
    short, long = rotary(10, torch.device("cpu")), rotary(5000, torch.device("cpu"))
    assert all(torch.equal(a, b[:10]) for a, b in zip(short, long))
    with pytest.raises(ValueError, match="even head width"):
        RotaryEmbedding(7)


# ------------------------------------------------------------------------------ norm, MLP, gradient
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_the_formula_in_float32(dtype):
    norm = RMSNorm(12)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    x = (100 * torch.randn(3, 5, 12)).to(dtype)
    exact = x.double()
    exact = (
        exact
        / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        * norm.weight.detach().double()
    )
    ours = norm(x)
    assert ours.dtype == dtype
    assert torch.allclose(
        ours.double(), exact, rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=1e-6
    )
    assert torch.equal(norm(torch.zeros(1, 12)), torch.zeros(1, 12))


def test_swiglu_is_the_formula_and_has_the_release_width():
    mlp = SwiGLU(6)
    assert mlp.w1.weight.shape == (16, 6) and mlp.w3.weight.shape == (6, 16)
    assert SwiGLU(512).w2.weight.shape == (1365, 512)
    assert not [name for name, _ in mlp.named_parameters() if name.endswith("bias")]
    x = torch.randn(4, 6)
    gate = x @ mlp.w1.weight.T
    expected = (gate / (1 + torch.exp(-gate)) * (x @ mlp.w2.weight.T)) @ mlp.w3.weight.T
    assert torch.allclose(mlp(x), expected, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_scale_gradient_changes_the_gradient_alone(scale):
    x = torch.randn(3, 4, requires_grad=True)
    y = scale_gradient(x, scale)
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad((y**2).sum(), x)
    assert torch.allclose(gradient, scale * 2 * x.detach())


def test_padding_to_multiple():
    assert padding_to_multiple((37, 53), 16) == (11, 11)
    assert padding_to_multiple((32, 48), 16) == (0, 0)
    assert padding_to_multiple((1, 17), 16) == (15, 15)
    assert F.pad(torch.zeros(1, 3, 37, 53), (0, 11, 0, 11)).shape[-2:] == (48, 64)
