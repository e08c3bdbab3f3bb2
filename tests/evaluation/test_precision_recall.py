"""Precision and recall against torch-fidelity, against loops, and against closed forms."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from muse.evaluation.metrics.precision_recall import precision_recall


def clouds(real=300, fake=260, dim=24, shift=0.6, scale=0.8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator) / dim**0.5
    return (
        torch.randn(real, dim, generator=generator) @ mix,
        scale * torch.randn(fake, dim, generator=generator) @ mix + shift,
    )


def by_loops(real, fake, k):
    """The definition, one picture at a time, numpy float64."""
    real, fake = real.double().numpy(), fake.double().numpy()

    def share(points, centres):
        inside = 0
        radii = [np.sort(np.linalg.norm(centres - c, axis=1))[k] for c in centres]
        for point in points:
            inside += any(np.linalg.norm(centres - point, axis=1) <= radii)
        return inside / len(points)

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [37, 64, 4096])
def test_it_is_the_definition_for_any_block(k, block):
    real, fake = clouds(90, 70)
    want = by_loops(real, fake, k)
    assert 0.02 < min(want) and max(want) < 0.98  # neither is trivial
    assert precision_recall(real, fake, k, block=block) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("scale", [0.5, 0.8, 1.3])
def test_agrees_with_torch_fidelity(low_memory, scale):
    real, fake = clouds(scale=scale)
    want = prc_features_to_metric(  # generated first
        fake,
        real,
        prc_neighborhood=3,
        prc_batch_size=100,
        save_cpu_ram=low_memory,
        verbose=False,
    )
    for dtype in (torch.float64, torch.float32):
        got = precision_recall(real, fake, dtype=dtype, block=128)
        assert got == pytest.approx((want["precision"], want["recall"]), abs=1e-6)


def test_features_far_from_zero_keep_their_distances():
    """Inception's features have means far above their spread; a shift changes no distance."""
    real, fake = clouds(90, 70)
    want = by_loops(real, fake, 3)
    got = precision_recall(real + 300, fake + 300, dtype=torch.float32)
    assert got == pytest.approx(want, abs=0.03)
    assert precision_recall(real.double() + 300, fake.double() + 300) == pytest.approx(want)


def test_the_same_set_covers_itself_and_a_far_one_nothing():
    real, fake = clouds()
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, fake + 1000) == (0.0, 0.0)


def test_a_line_by_hand():
    """Points 0, 1, 3 and 6, k = 1: radii 1, 1, 2, 3, so that [-1, 2] and [1, 9] are inside."""
    real = torch.tensor([[0.0], [1], [3], [6]])
    fake = torch.tensor([[-2.0], [-1], [9], [9.5], [100]])  # radii 1, 1, .5, .5, 90.5
    precision, recall = precision_recall(real, fake, 1)
    assert precision == pytest.approx(2 / 5)  # -1 and 9, both on the border of a ball
    # 0 is in the ball of -1; the others are not within 90.5 of 100
    assert recall == pytest.approx(1 / 4)


def by_halves(real, fake, k):
    """ADM's distances in numpy: squares, sums and products rounded to halves."""
    real, fake = (rows.numpy().astype(np.float16) for rows in (real, fake))

    def squares(a, b):
        na, nb = (np.square(r).astype(np.float32).sum(1).astype(np.float16) for r in (a, b))
        product = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float16)
        return np.maximum(na[:, None] - np.float16(2) * product + nb[None], np.float16(0))

    def inside(points, centres):
        radii = np.sort(squares(centres, centres), axis=1)[:, k]
        return (squares(points, centres) <= radii).any(1).mean()

    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("seed", range(3))
def test_halves_are_adms(seed):
    real, fake = clouds(120, 90, seed=seed)
    got = precision_recall(real, fake, dtype=torch.float16, block=50)
    assert got == pytest.approx(by_halves(real, fake, 3), abs=1e-12)


def test_halves_that_overflow_are_done_in_float32():
    """Squared norms above 65504 are no halves: ADM's evaluator falls back, and so does this."""
    real, fake = clouds(120, 90)
    real, fake = ((rows * 100).half().float() for rows in (real, fake))
    assert real.square().sum(1).max() > 65504
    got = precision_recall(real, fake, dtype=torch.float16)
    assert got == pytest.approx(by_loops(real, fake, 3), abs=1e-12)


@pytest.mark.parametrize(
    "real, fake, says",
    [
        (torch.rand(3, 4), torch.rand(9, 4), r"more than 3 real features .* got \(3, 4\)"),
        (torch.rand(9, 4), torch.rand(9, 5), "features of two widths: 4 and 5"),
        (torch.rand(9, 4), torch.full((9, 4), torch.nan), "fake features contain NaN"),
        (torch.rand(9), torch.rand(9, 4), "real features"),
    ],
)
def test_wrong_features_are_named(real, fake, says):
    with pytest.raises(ValueError, match=says):
        precision_recall(real, fake)
