"""The learning rate against a table worked out by hand, and against torch's own cosine."""

import pytest
import torch

from muse.training.optim import lr_at

# base 1, end 0.1, 4 warm-up steps of 10: (1 + cos(k π / 5)) / 2 = 1, .904508, .654508, .345492,
# .095492, 0 for k = 0 … 5
COSINE = [0.25, 0.5, 0.75, 1.0, 1.0, 0.914058, 0.689058, 0.410942, 0.185942, 0.1]
TABLE = [
    ({}, COSINE),
    ({"hold_fraction": 0.5}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 0.55, 0.1]),
    ({"schedule": "constant"}, [0.25, 0.5, 0.75, 1.0] + [1.0] * 6),
    ({"hold_fraction": 1.0}, [0.25, 0.5, 0.75, 1.0] + [1.0] * 6),
]


@pytest.mark.parametrize(("options", "expected"), TABLE)
def test_rate_by_step(options, expected):
    rates = [lr_at(step, base=1.0, end=0.1, warmup=4, total=10, **options) for step in range(10)]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_rates_scale_with_the_base_and_the_release_recipe():
    """Stage 1 of MUSE-1B: 4e-4, 2000 warm-up steps, 50k in all, down to 1e-5 (FIDELITY)."""
    recipe = {"base": 4e-4, "end": 1e-5, "warmup": 2000, "total": 50_000}
    assert lr_at(0, **recipe) == pytest.approx(2e-7)
    assert lr_at(999, **recipe) == pytest.approx(2e-4)
    assert lr_at(1999, **recipe) == lr_at(2000, **recipe) == pytest.approx(4e-4)
    assert lr_at(25_999, **recipe) == pytest.approx((4e-4 + 1e-5) / 2, rel=1e-3)
    assert lr_at(49_999, **recipe) == pytest.approx(1e-5)
    assert lr_at(60_000, **recipe) == pytest.approx(1e-5)  # a longer run stays at the end


def test_without_warmup_it_is_torch_s_cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=19, eta_min=0.01)
    for step in range(20):
        assert lr_at(step, base=0.3, end=0.01, warmup=0, total=20) == pytest.approx(
            scheduler.get_last_lr()[0], rel=1e-9
        )
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ("cosine", "constant"))
def test_runs_shorter_than_their_warmup(schedule):
    rates = [
        lr_at(step, base=1.0, end=0.1, warmup=10, total=3, schedule=schedule) for step in range(3)
    ]
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    assert lr_at(0, base=1.0, end=0.1, warmup=0, total=1, schedule=schedule) == 1.0
