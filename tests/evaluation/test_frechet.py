"""Fréchet distance and running moments against closed forms, numpy and torch-fidelity."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from muse.evaluation.metrics.frechet import RunningMoments, frechet_distance, semidefinite_factor


def gaussian_features(count, dim, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return scale * torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + shift


def test_commuting_gaussians_closed_form():
    """Covariances with the same eigenvectors: d² = |Δμ|² + Σ (√a − √b)²."""
    basis = torch.linalg.qr(gaussian_features(40, 40, 0)).Q
    a, b = (
        torch.linspace(0.1, 5, 40, dtype=torch.float64),
        torch.linspace(3, 0.2, 40, dtype=torch.float64),
    )
    delta = torch.linspace(-1, 1, 40, dtype=torch.float64)
    got = frechet_distance(
        torch.zeros(40), basis @ a.diag() @ basis.T, delta, basis @ b.diag() @ basis.T
    )
    want = float(delta.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert got == pytest.approx(want, rel=1e-12)


def test_singular_covariances_closed_form():
    a, b = torch.tensor([4.0, 1, 0, 0, 0]).double(), torch.tensor([1.0, 0, 9, 0, 0]).double()
    got = frechet_distance(torch.zeros(5), a.diag(), torch.zeros(5), b.diag())
    assert got == pytest.approx((2 - 1) ** 2 + 1 + 9, rel=1e-12)
    zero = torch.zeros(5, 5)
    assert frechet_distance(torch.ones(5), zero, torch.zeros(5), zero) == pytest.approx(5)
    assert frechet_distance(torch.zeros(5), zero, torch.zeros(5), a.diag()) == pytest.approx(5)


@pytest.mark.parametrize("count, dim", [(500, 32), (20, 64)])
def test_agrees_with_torch_fidelity(count, dim):
    x, y = gaussian_features(count, dim, 1, shift=3.0), gaussian_features(count, dim, 2, scale=1.5)
    stats = [fid_features_to_statistics(rows) for rows in (x, y)]
    want = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    got = frechet_distance(*(part for s in stats for part in (s["mu"], s["sigma"])))
    assert got == pytest.approx(want, rel=1e-6)


def test_fewer_samples_than_dimensions_against_singular_values():
    """tr(Σ₁Σ₂)^½ is the nuclear norm of X₁X₂ᵀ for centred rows: no root of a rounded zero."""
    x, y = gaussian_features(20, 64, 1), gaussian_features(30, 64, 2)
    moments = []
    for rows in (x, y):
        running = RunningMoments()
        running.update(rows)
        moments += running.compute()[1:]
    centred = [(rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (x, y)]
    nuclear = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    want = (
        (x.mean(0) - y.mean(0)).square().sum()
        + sum(c.square().sum() for c in centred)
        - 2 * nuclear
    )
    assert frechet_distance(*moments) == pytest.approx(float(want), rel=1e-9)


@pytest.mark.parametrize("counts", [(20, 300), (300, 20), (200, 300)])
def test_either_or_none_singular_is_symmetric_and_torch_fidelitys(counts):
    """The three ways to the root's trace: factors of the first, of the second, of both."""
    stats = []
    for seed, count in enumerate(counts):
        stats.append(fid_features_to_statistics(gaussian_features(count, 64, seed, shift=seed)))
    moments = [[s["mu"], s["sigma"]] for s in stats]
    want = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    got = frechet_distance(*moments[0], *moments[1])
    assert got == pytest.approx(want, rel=1e-6)
    assert frechet_distance(*moments[1], *moments[0]) == pytest.approx(got, rel=1e-9)


def test_equal_sets_have_distance_zero():
    mean, cov = (
        torch.zeros(64),
        torch.from_numpy(np.cov(gaussian_features(20, 64, 3).numpy(), rowvar=False)),
    )
    assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-9 * float(cov.trace())


def test_factor_has_the_rank_of_the_matrix():
    rows = gaussian_features(6, 30, 4)
    factor = semidefinite_factor(rows.T @ rows)
    assert factor.shape == (30, 6)
    torch.testing.assert_close(factor @ factor.T, rows.T @ rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 7, 64, 300])
def test_running_moments_equal_numpy_for_any_batch(batch):
    rows = gaussian_features(
        300, 12, 5, shift=1e4
    )  # a mean that would cost plain sums seven digits
    running = RunningMoments(block=50)
    for part in rows.split(batch):
        running.update(part)
    count, mean, cov = running.compute()
    assert count == 300
    np.testing.assert_allclose(mean, rows.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(rows.numpy(), rowvar=False), rtol=1e-6, atol=1e-9)


def test_refuses_what_does_not_fit():
    running = RunningMoments()
    running.update(torch.zeros(4, 8))
    with pytest.raises(ValueError, match=r"\(n, 8\)"):
        running.update(torch.zeros(4, 9))
    with pytest.raises(ValueError, match="NaN"):
        running.update(torch.full((4, 8), torch.nan))
    with pytest.raises(ValueError, match="widths differ"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(
            torch.zeros(3), torch.full((3, 3), torch.nan), torch.zeros(3), torch.eye(3)
        )
