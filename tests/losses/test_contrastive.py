import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from muse.losses.contrastive import caption_positives, itc_loss, passive_distillation_loss
from tests.training.processes import Forked

SCALE = torch.tensor(10.0)


def embeds(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def itc_by_hand(image: np.ndarray, text: np.ndarray, scale: float, positives: np.ndarray) -> float:
    """Both directions, row by row."""
    total = 0.0
    for ours, theirs, allowed in ((image, text, positives), (text, image, positives.T)):
        for i, row in enumerate(ours):
            logits = scale * theirs @ row
            log_p = logits - np.log(np.exp(logits).sum())
            total -= log_p[allowed[i]].mean() / len(ours)
    return total / 2


def test_equals_golden(golden):
    loss = itc_loss(golden["image_embeds"], golden["text_embeds"], golden["logit_scale"])
    assert loss.item() == pytest.approx(golden["itc"].item(), abs=1e-5)


def test_perfect_and_orthogonal_pairs():
    basis = torch.eye(4)
    assert itc_loss(basis, basis, SCALE).item() == pytest.approx(
        math.log(1 + 3 * math.exp(-10)), rel=1e-3
    )
    assert itc_loss(basis, basis, torch.tensor(0.0)).item() == pytest.approx(math.log(4), rel=1e-6)


def test_blocks_are_averaged():
    image, text = embeds(3, 4, 8), embeds(4, 8, seed=1)
    single = [itc_loss(block, text, SCALE).item() for block in image]
    assert itc_loss(image, text, SCALE).item() == pytest.approx(np.mean(single), rel=1e-6)


def test_equal_captions_are_positives_of_each_other():
    captions = ["a cat.", "a dog.", "a cat.", "a mug."]
    positives = caption_positives(captions)
    assert positives.tolist() == [[a == b for b in captions] for a in captions]
    image, text = embeds(4, 8), embeds(4, 8, seed=1)
    text[2] = text[0]
    expected = itc_by_hand(image.double().numpy(), text.double().numpy(), 10.0, positives.numpy())
    assert itc_loss(image, text, SCALE, positives).item() == pytest.approx(expected, rel=1e-5)
    one_to_one = itc_loss(image, text, SCALE, torch.eye(4, dtype=torch.bool))
    assert one_to_one.item() == pytest.approx(itc_loss(image, text, SCALE).item(), rel=1e-6)


def test_gradient_reaches_image_and_scale_but_not_text():
    image, text = embeds(4, 8).requires_grad_(), embeds(4, 8, seed=1).requires_grad_()
    scale = SCALE.clone().requires_grad_()
    itc_loss(image, text, scale).backward()
    assert text.grad is None and scale.grad.abs() > 0
    p_rows = (10 * image @ text.T).softmax(dim=1).detach()
    p_columns = (10 * image @ text.T).softmax(dim=0).detach()
    expected = 10 * ((p_rows + p_columns) / 2 - torch.eye(4)) @ text.detach() / 4
    torch.testing.assert_close(image.grad, expected, atol=1e-5, rtol=1e-5)


def test_float32_under_autocast():
    image, text = embeds(4, 8), embeds(4, 8, seed=1)
    plain = itc_loss(image, text, SCALE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = itc_loss(image, text, SCALE)
    assert cast.dtype == torch.float32 and cast.item() == plain.item()


def test_passive_distillation_is_one_minus_cosine():
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    image = torch.tensor([[2.0, 0.0], [3.0, 4.0]], requires_grad=True)
    loss = passive_distillation_loss(image, text.requires_grad_())
    assert loss.item() == pytest.approx((0 + (1 - 0.8)) / 2, rel=1e-6)
    loss.backward()
    assert text.grad is None and image.grad[0].abs().max() == 0  # already aligned
    both = passive_distillation_loss(torch.stack([image, -image]), text)
    assert both.item() == pytest.approx((0.0 + 0.2 + 2.0 + 1.8) / 4, rel=1e-6)


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="do not fit text"):
        itc_loss(embeds(4, 8), embeds(5, 8), SCALE)
    with pytest.raises(ValueError, match="do not fit text"):
        passive_distillation_loss(embeds(4, 8), embeds(4, 6))
    with pytest.raises(ValueError, match="batch of 4"):
        itc_loss(embeds(4, 8), embeds(4, 8), SCALE, torch.eye(3, dtype=torch.bool))


CAPTIONS = ["a cat.", "a dog.", "a cat.", "a mug.", "a cat.", "a hat.", "a mug.", "a pen."]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        for value in given if isinstance(given, (tuple, list)) else (given,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return given


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of 3 blocks and 8 captions, so few numbers each that logits are the largest."""
    return embeds(3, 8, 2), embeds(8, 2, seed=1)


def _rank(rank: int, folder: str, world: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    part = slice(8 // world * rank, 8 // world * (rank + 1))
    image, text = _batch()
    image, text = image[:, part].clone().requires_grad_(), text[part]
    result = {}
    for name, positives in (
        ("equal", caption_positives(CAPTIONS[part])),
        ("own", None),
    ):
        image.grad, scale = None, SCALE.clone().requires_grad_()
        with LargestTensor() as largest:
            loss = itc_loss(image, text, scale, positives)
            loss.backward()
        result[name] = {
            "loss": loss.detach(),
            "grad": image.grad,
            "scale": scale.grad,
            "largest": largest.elements,
        }
    result["local"] = itc_loss(image.detach(), text, SCALE, gather=False)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_gradient_of_the_global_batch_each_with_its_rows(world, tmp_path):
    """Also where positives cross the ranks; no rank holds more logits than its own rows."""
    ranks = [Forked(_rank, rank, str(tmp_path), world) for rank in range(world)]
    assert [rank.wait() for rank in ranks] == [0] * world
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    image, text = _batch()
    for name, positives in (("equal", caption_positives(CAPTIONS)), ("own", None)):
        whole, scale = image.clone().requires_grad_(), SCALE.clone().requires_grad_()
        loss = itc_loss(whole, text, scale, positives)
        loss.backward()
        parts = [result[name] for result in results]
        assert len({part["loss"].item() for part in parts}) == 1  # bit for bit
        assert parts[0]["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
        # DistributedDataParallel divides by the number of ranks.
        grads = torch.cat([part["grad"] for part in parts], dim=1) / world
        torch.testing.assert_close(grads, whole.grad, atol=1e-6, rtol=1e-5)
        mean = torch.stack([part["scale"] for part in parts]).mean()
        torch.testing.assert_close(mean, scale.grad, atol=1e-6, rtol=1e-5)
        assert {part["largest"] for part in parts} == {3 * 8 * 8 // world}
    for rank, result in enumerate(results):
        part = slice(8 // world * rank, 8 // world * (rank + 1))
        alone = itc_loss(image[:, part], text[part], SCALE)
        assert result["local"].item() == pytest.approx(alone.item(), rel=1e-6)
