"""The pretraining term of the packaged model's encoder: classes, features, pixels."""

import numpy as np
import pytest
import torch
from torch import nn

from muse.config import load_config, shipped_config
from muse.losses.muse_loss import MuseLoss
from muse.losses.recognition import ClassDistillation
from muse.models.muse_vit import MUSE_ViT
from muse.teachers.efficientnet_lite import load_efficientnet_lite0


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_class_divergence_against_numpy():
    classifier = nn.Linear(6, 5)
    loss = ClassDistillation(4, classifier)
    tokens, pooled = torch.randn(3, 4, 2, 2), torch.randn(3, 6)
    flat = tokens.flatten(2).transpose(1, 2).numpy()
    centred = flat - flat.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + loss.norm.eps)
    with torch.no_grad():
        predicted = loss.head(torch.from_numpy(normed.mean(1)))
        mine, target = softmax(classifier(predicted).numpy()), softmax(classifier(pooled).numpy())
    expected = (target * np.log(target / mine)).sum(-1).mean()
    assert loss(tokens, pooled, classifier).item() == pytest.approx(expected, rel=1e-4)


def test_no_divergence_where_the_head_says_what_the_teacher_reads():
    classifier = nn.Linear(6, 5)
    loss = ClassDistillation(4, classifier)
    tokens = torch.randn(2, 4, 2, 2)
    mean = loss.norm(tokens.flatten(2).transpose(1, 2)).mean(1)
    pooled = loss.head(mean).detach()
    assert loss(tokens, pooled, classifier).item() == pytest.approx(0, abs=1e-6)
    assert loss(tokens, pooled + 3, classifier).item() > 1e-3


@pytest.fixture(scope="module")
def term():
    cfg = load_config(
        shipped_config("muse_tiny/pretrain_stage0.yaml"),
        ["dataset.params.train_shards_path_or_url=x", "dataset.params.eval_shards_path_or_url=x"],
    )
    torch.manual_seed(0)
    student = MUSE_ViT(cfg.model)
    return student, MuseLoss.from_config(cfg, student)


def test_the_term_teaches_the_encoder_and_its_heads_and_no_teacher(term):
    student, loss = term
    assert set(loss.terms) == {"recognition"}
    images = torch.rand(2, 3, 128, 128)
    total, numbers = loss(student(images, **loss.needs), {"images": images})
    total.backward()
    assert all(parameter.grad is not None for parameter in loss.heads().values())
    assert not any("network" in name for name in loss.heads())
    assert student.encoder.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0
    parts = [numbers[f"recognition_{name}"].item() for name in ("cosine", "pixels", "classes")]
    own = loss.terms["recognition"]
    expected = parts[0] + own.pixel_weight * parts[1] + own.class_weight * parts[2]
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_one_pass_gives_what_the_network_itself_says(term):
    _, loss = term
    network, images = load_efficientnet_lite0(), torch.rand(2, 3, 128, 128)
    maps, pooled = loss.terms["recognition"]._teach(images, (16, 16))
    torch.testing.assert_close(pooled, network.pooled(images), rtol=1e-4, atol=1e-5)
    first = network(images, (4,))[0]
    torch.testing.assert_close(
        maps[:, : first.shape[1]], nn.functional.normalize(first, dim=1), rtol=1e-4, atol=1e-5
    )
