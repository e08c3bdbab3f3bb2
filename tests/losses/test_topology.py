import math

import numpy as np
import pytest
import torch

from muse.losses.topology import (
    positional_prior,
    resize_attention,
    select_blocks,
    topology_kl,
    topology_loss,
)


def attention(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)


def bilinear_matrix(before: int, after: int) -> np.ndarray:
    """(after, before) weights of bilinear resampling with half-pixel centres, written out."""
    matrix = np.zeros((after, before))
    for i in range(after):
        x = max((i + 0.5) * before / after - 0.5, 0.0)
        low = min(int(x), before - 1)
        high = min(low + 1, before - 1)
        matrix[i, low] += 1 - (x - low)
        matrix[i, high] += x - low
    return matrix


def resized_by_hand(maps: np.ndarray, from_grid, to_grid) -> np.ndarray:
    resample = np.kron(
        bilinear_matrix(from_grid[0], to_grid[0]), bilinear_matrix(from_grid[1], to_grid[1])
    )
    resized = resample @ maps @ resample.T
    return resized / (resized.sum(axis=-1, keepdims=True) + 1e-6)


# ---- Psi: the 4-D resize


def test_resize_equals_golden(golden):
    """The released function exchanges queries and keys on its way: `transpose` names it."""
    resized = resize_attention(
        golden["teacher_attention"][:, None], (14, 14), (8, 8), transpose=True
    )
    torch.testing.assert_close(resized[:, 0], golden["teacher_attention_8x8"], atol=1e-6, rtol=0)


def test_resize_keeps_queries_on_rows(golden):
    """Ours without the exchange equals golden data of the transposed teacher."""
    swapped = golden["teacher_attention"].transpose(1, 2)[:, None]
    resized = resize_attention(swapped, (14, 14), (8, 8))
    torch.testing.assert_close(resized[:, 0], golden["teacher_attention_8x8"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "from_grid, to_grid", [((3, 5), (2, 4)), ((2, 3), (4, 5)), ((4, 2), (2, 4)), ((1, 6), (3, 2))]
)
def test_resize_equals_matrices_on_any_grid(from_grid, to_grid):
    count = from_grid[0] * from_grid[1]
    maps = attention(2, 3, count, count)
    expected = resized_by_hand(maps.double().numpy(), from_grid, to_grid)
    np.testing.assert_allclose(
        resize_attention(maps, from_grid, to_grid).numpy(), expected, atol=1e-6
    )


def test_resize_follows_a_moved_point():
    """All queries look at the lower right corner before and after, on a non-square grid too."""
    maps = torch.zeros(1, 1, 24, 24)
    maps[..., -1] = 1
    resized = resize_attention(maps, (4, 6), (2, 3))
    assert (resized[0, 0].argmax(dim=-1) == 5).all()
    torch.testing.assert_close(resized.sum(dim=-1), torch.ones(1, 1, 6), atol=1e-4, rtol=0)


def test_equal_grids_change_nothing():
    maps = attention(1, 2, 6, 6)
    torch.testing.assert_close(resize_attention(maps, (2, 3), (2, 3)), maps, atol=0, rtol=0)
    # The release exchanges queries and keys only where it resizes.
    assert torch.equal(resize_attention(maps, (2, 3), (2, 3), transpose=True), maps)
    with pytest.raises(ValueError, match="does not fit the grid"):
        resize_attention(maps, (2, 4), (2, 3))


# ---- the divergence


def test_last_block_head_mean_equals_golden(golden):
    students = (attention(2, 8, 64, 64), golden["student_attention"])
    targets = (attention(2, 1, 64, 64, seed=1), golden["teacher_attention_8x8"][:, None])
    loss = topology_loss(
        select_blocks([s.log() for s in students], "last"), select_blocks(targets, "last")
    )
    assert loss.item() == pytest.approx(golden["topology_kl_last_head_mean"].item(), abs=1e-4)


def kl_by_hand(target: np.ndarray, student: np.ndarray) -> float:
    """One (N,N) pair, a sum over rows written out."""
    return float(
        np.mean(
            [
                sum(t * math.log(t / s) for t, s in zip(*rows) if t > 0)
                for rows in zip(target, student)
            ]
        )
    )


@pytest.mark.parametrize(
    "heads, target_heads", [("mean", 1), ("mean", 3), ("per_head", 1), ("per_head", 3)]
)
def test_equals_loops(heads, target_heads):
    students = [attention(2, 3, 6, 6, seed=block) for block in range(2)]
    targets = [attention(2, target_heads, 6, 6, seed=10 + block) for block in range(2)]
    targets[0][0, 0, 0] = torch.eye(6)[2]  # zeros in the target count nothing
    blocks = []
    for student, target in zip(students, targets):
        s, t = student.double().numpy(), target.double().numpy()
        if heads == "mean":
            s, t = s.mean(1, keepdims=True), t.mean(1, keepdims=True)
        t = np.broadcast_to(t, s.shape)
        blocks.append(
            np.mean([kl_by_hand(t[b, h], s[b, h]) for b in range(2) for h in range(s.shape[1])])
        )
    log_students = [student.log() for student in students]
    np.testing.assert_allclose(topology_kl(log_students, targets, heads).numpy(), blocks, rtol=1e-5)
    assert topology_loss(log_students, targets, heads).item() == pytest.approx(
        np.mean(blocks), rel=1e-5
    )


def test_zero_when_equal_and_log_n_for_a_point_against_uniform():
    maps = attention(1, 1, 6, 6)
    assert topology_loss([maps.log()], [maps]).item() == pytest.approx(0, abs=1e-6)
    uniform = torch.full((1, 2, 6, 6), -math.log(6))
    assert topology_loss([uniform], [torch.eye(6)[None, None]]).item() == pytest.approx(
        math.log(6), rel=1e-6
    )


def test_gradient_is_student_minus_target_and_never_reaches_the_target():
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)
    target = attention(1, 1, 4, 4).requires_grad_()
    topology_loss([logits.log_softmax(dim=-1)], [target], "per_head").backward()
    torch.testing.assert_close(
        logits.grad, (logits.softmax(dim=-1) - target).detach() / 4, atol=1e-6, rtol=0
    )
    assert target.grad is None


def test_head_mean_gives_gradient_to_every_head():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    topology_loss([logits.log_softmax(dim=-1)], [attention(1, 1, 4, 4)]).backward()
    assert (logits.grad.abs().amax(dim=(0, 2, 3)) > 0).all()


def test_float32_under_autocast():
    student, target = attention(1, 2, 4, 4).log(), attention(1, 1, 4, 4, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = topology_loss([student], [target])
    assert loss.dtype == torch.float32 and loss.item() == topology_loss([student], [target]).item()


def test_blocks_and_errors():
    stacked = torch.arange(6).view(3, 2)
    assert select_blocks(stacked, "last").tolist() == [[4, 5]]
    assert select_blocks((1, 2, 3), "all") == (1, 2, 3)
    with pytest.raises(ValueError, match="'first'"):
        select_blocks(stacked, "first")
    student, target = attention(1, 3, 4, 4).log(), attention(1, 2, 4, 4)
    with pytest.raises(ValueError, match="does not fit"):
        topology_loss([student], [target], "per_head")
    with pytest.raises(ValueError, match="does not fit"):
        topology_loss([student], [attention(1, 1, 9, 9)])
    with pytest.raises(ValueError, match="1 topology targets for 2 blocks"):
        topology_loss([student, student], [target])
    with pytest.raises(ValueError, match="'median'"):
        topology_loss([student], [target], "median")


def test_positional_prior_against_loops():
    targets = attention(3, 1, 5, 5)
    mean_map = targets.mean(dim=(0, 1))
    prior = positional_prior(targets, mean_map)
    t, m = targets.double().numpy(), mean_map.double().numpy()
    assert prior.position.item() == pytest.approx(
        np.mean([kl_by_hand(t[b, 0], m) for b in range(3)]), rel=1e-4
    )
    uniform = np.full((5, 5), 0.2)
    assert prior.uniform.item() == pytest.approx(
        np.mean([kl_by_hand(t[b, 0], uniform) for b in range(3)]), rel=1e-4
    )
    assert prior.position < prior.uniform
    assert positional_prior(mean_map[None, None], mean_map).position.item() == pytest.approx(
        0, abs=1e-6
    )
