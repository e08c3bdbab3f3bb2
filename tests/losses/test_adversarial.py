import pytest
import torch

from muse.losses.adversarial import (
    AdversarialLoss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    lecam_penalty,
)

REAL, FAKE = torch.tensor([[0.5, 2.0]]), torch.tensor([[-3.0, 1.0]])


def test_hinge_and_lecam_equal_golden(golden):
    real, fake = golden["logits_real"], golden["logits_fake"]
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(
        golden["hinge_d"].item(), abs=1e-5
    )
    lecam = lecam_penalty(real, fake, golden["lecam_ema_real"], golden["lecam_ema_fake"])
    assert lecam.item() == pytest.approx(golden["lecam"].item(), abs=1e-5)


def test_closed_forms():
    assert hinge_discriminator_loss(REAL, FAKE).item() == pytest.approx((0.5 / 2 + 2.0 / 2) / 2)
    assert hinge_generator_loss(FAKE).item() == pytest.approx(1.0)
    # mean real 1.25 above the fakes' mean 0.25 by 1; mean fake -1 below the reals' mean 0.5 by 1.5
    assert lecam_penalty(REAL, FAKE, torch.tensor(0.5), torch.tensor(0.25)).item() == pytest.approx(
        1 + 2.25
    )
    # on the far side of both means nothing is penalised
    assert lecam_penalty(REAL, FAKE, torch.tensor(-2.0), torch.tensor(3.0)).item() == 0


def test_generator_gradient():
    fake = FAKE.clone().requires_grad_()
    AdversarialLoss().generator(fake, step=0).backward()
    assert fake.grad.tolist() == [[-0.5, -0.5]]


def test_moving_means_follow_the_recursion_and_live_in_the_checkpoint():
    loss = AdversarialLoss(lecam_weight=0.1, lecam_decay=0.9)
    first = loss.discriminator(REAL, FAKE, step=0)
    assert first.lecam.item() == pytest.approx(1.25**2 + 1.0**2)  # against the zeros it starts from
    assert first.total.item() == pytest.approx(first.hinge.item() + 0.1 * first.lecam.item())
    loss.discriminator(REAL, FAKE, step=1)
    assert loss.ema_real.item() == pytest.approx(1.25 * (1 - 0.9**2))
    assert loss.ema_fake.item() == pytest.approx(-1.0 * (1 - 0.9**2))
    resumed = AdversarialLoss(lecam_weight=0.1, lecam_decay=0.9)
    resumed.load_state_dict(loss.state_dict())
    assert (
        resumed.discriminator(REAL, FAKE, 2).total.item()
        == loss.discriminator(REAL, FAKE, 2).total.item()
    )


def test_evaluation_leaves_the_moving_means():
    loss = AdversarialLoss().eval()
    loss.discriminator(REAL, FAKE, step=5)
    assert loss.ema_real.item() == 0 and loss.ema_fake.item() == 0


def test_nothing_weighs_before_the_start():
    loss = AdversarialLoss(start=10)
    assert not loss.active(9) and loss.active(10)
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    terms = loss.discriminator(real, fake, step=9)
    (terms.total + loss.generator(fake, step=9)).backward()
    assert terms.total.item() == 0 and loss.ema_real.item() == 0
    assert real.grad.abs().max() == 0 and fake.grad.abs().max() == 0
    assert (
        loss.discriminator(REAL, FAKE, step=10).hinge.item()
        == hinge_discriminator_loss(REAL, FAKE).item()
    )


def test_discriminator_gradient_is_hinge_plus_lecam():
    loss = AdversarialLoss(lecam_weight=0.1)
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    loss.discriminator(real, fake, step=0).total.backward()
    # d lecam / d real_i = 2 * (1.25 - 0) / 2; hinge pulls only at 0.5 < 1
    assert real.grad[0].tolist() == pytest.approx([-0.25 + 0.125, 0.125])
    assert fake.grad[0].tolist() == pytest.approx([0 - 0.1, 0.25 - 0.1])


def test_float32_for_bfloat16_logits():
    assert (
        AdversarialLoss().discriminator(REAL.bfloat16(), FAKE.bfloat16(), 0).total.dtype
        == torch.float32
    )
    assert AdversarialLoss().generator(FAKE.bfloat16(), 0).dtype == torch.float32
