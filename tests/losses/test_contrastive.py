import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from muse.losses.contrastive import caption_positives, itc_loss, passive_distillation_loss

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


CAPTIONS = ["a cat.", "a dog.", "a cat.", "a mug."]


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part = slice(2 * rank, 2 * rank + 2)
    image = embeds(2, 4, 8)[:, part].clone().requires_grad_()
    scale = SCALE.clone().requires_grad_()
    loss = itc_loss(image, embeds(4, 8, seed=1)[part], scale, caption_positives(CAPTIONS[part]))
    loss.backward()
    local = itc_loss(image.detach(), embeds(4, 8, seed=1)[part], SCALE, gather=False)
    torch.save(
        {"loss": loss.detach(), "grad": image.grad, "scale": scale.grad, "local": local},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_ranks_give_the_gradient_of_the_global_batch(tmp_path):
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    image, text, scale = (
        embeds(2, 4, 8).requires_grad_(),
        embeds(4, 8, seed=1),
        SCALE.clone().requires_grad_(),
    )
    loss = itc_loss(image, text, scale, caption_positives(CAPTIONS))
    loss.backward()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        part = slice(2 * rank, 2 * rank + 2)
        assert result["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
        # DistributedDataParallel divides by the number of ranks; the gather sums over them.
        torch.testing.assert_close(result["grad"] / 2, image.grad[:, part], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(result["scale"], scale.grad, atol=1e-6, rtol=1e-5)
        alone = itc_loss(image[:, part], text[part], SCALE)
        assert result["local"].item() == pytest.approx(alone.item(), rel=1e-6)
