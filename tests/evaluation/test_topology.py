"""Topology quality against scikit-learn's AUC and plain loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics import roc_auc_score

from muse.data.masks import IGNORE_INDEX
from muse.evaluation.attention_quality import (
    TopologyQuality,
    mean_teacher_maps,
    object_cells,
    same_object_auc,
    teacher_maps,
)
from muse.losses.topology import resize_attention
from muse.teachers.base import TopologyTarget


def random_maps(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_auc_is_scikit_learns_with_ties_and_without_the_query():
    maps = (random_maps((3, 12, 12), 0) * 40).round() / 40  # many ties
    cells = torch.randint(0, 3, (3, 12), generator=torch.Generator().manual_seed(1))
    got = same_object_auc(maps, cells)
    for image in range(3):
        values = []
        for query in range(12):
            others = [key for key in range(12) if key != query]
            same = [bool(cells[image, key] == cells[image, query]) for key in others]
            if cells[image, query] > 0 and any(same):
                values.append(roc_auc_score(same, maps[image, query, others]))
        assert float(got[image]) == pytest.approx(np.mean(values), abs=1e-12)


def test_auc_of_images_without_an_object_is_nan():
    maps = random_maps((2, 4, 4), 0)
    assert torch.isnan(same_object_auc(maps, torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))).all()


def test_object_cells_need_more_than_half_the_area():
    mask = torch.zeros(1, 8, 8, dtype=torch.long)
    mask[0, :4, :4] = 2  # a whole cell
    mask[0, 4:, :2] = 3  # half a cell: not more
    mask[0, 4:, 4:7] = 1
    mask[0, 0, 4:] = IGNORE_INDEX
    assert object_cells(mask, (2, 2)).tolist() == [[2, 0, 0, 1]]


class FixedTeacher:
    """Maps that depend on the image's mean: 4×4 grid, two blocks, three heads."""

    grid = (4, 4)

    def __call__(self, images):
        base = torch.linspace(-1, 1, 3 * 16 * 16).sin().view(1, 3, 16, 16)
        strength = images.mean((1, 2, 3)).view(-1, 1, 1, 1)
        maps = tuple((k * base + strength * base.flip(-1) * 5).softmax(-1) for k in (2.0, 3.0))
        return TopologyTarget(maps, self.grid)


class FixedModel:
    """encode() with two blocks and two heads on a 2×4 grid."""

    def encode(self, images, return_attention=False):
        strength = images.mean((1, 2, 3)).view(-1, 1, 1, 1)
        logits = torch.linspace(0, 9, 2 * 8 * 8).cos().view(1, 2, 8, 8) * strength * 4
        return SimpleNamespace(topology=(logits.softmax(-1), (2 * logits).softmax(-1)), grid=(2, 4))


def topology_quality(model, teacher, batches, prior):
    """`TopologyQuality` of a model over batches with `images` and perhaps `masks`."""
    quality = TopologyQuality(prior)
    for batch in batches:
        encoding = model.encode(batch["images"], return_attention=True)
        cells = object_cells(batch["masks"], encoding.grid) if "masks" in batch else None
        targets = teacher_maps(teacher, batch["images"], encoding.grid)
        quality.update(encoding.topology, targets, cells)
    return quality.compute()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(7, 1, 1, 1, generator=generator).expand(7, 3, 8, 16).contiguous()
    masks = torch.zeros(7, 8, 16, dtype=torch.long)
    masks[:, :, 4:12] = 1
    return [{"images": images[:4], "masks": masks[:4]}, {"images": images[4:], "masks": masks[4:]}]


def test_divergences_equal_scipys(batches):
    model, teacher = FixedModel(), FixedTeacher()
    prior = mean_teacher_maps(teacher, batches, (2, 4))
    got = topology_quality(model, teacher, batches, prior)
    images = torch.cat([batch["images"] for batch in batches])
    encoding = model.encode(images)
    for block, maps in enumerate(teacher(images).maps):
        target = resize_attention(maps.mean(1, keepdim=True), (4, 4), (2, 4))[:, 0].double().numpy()
        student = encoding.topology[block].double().mean(1).numpy()
        np.testing.assert_allclose(prior[block], target.mean(0), rtol=1e-5)
        for key, other in (
            ("kl", student),
            ("kl_positional", np.broadcast_to(target.mean(0), target.shape)),
            ("kl_uniform", np.full_like(target, 1 / 8)),
        ):
            want = np.mean([entropy(target[i, q], other[i, q]) for i in range(7) for q in range(8)])
            assert got["blocks"][block][key] == pytest.approx(want, rel=1e-4, abs=3e-6), (
                key
            )  # resized rows sum to 1 − 1e-6
        cells = object_cells(torch.cat([b["masks"] for b in batches]), (2, 4))
        want = float(same_object_auc(torch.from_numpy(student), cells).mean())
        assert got["blocks"][block]["auc"] == pytest.approx(want, rel=1e-9)
    assert got["kl"] == pytest.approx(np.mean([block["kl"] for block in got["blocks"]]))
    assert got["images"] == 7 and 0 < got["kl_positional"] < got["kl_uniform"]


def test_without_masks_there_is_no_auc(batches):
    teacher = FixedTeacher()
    prior = mean_teacher_maps(teacher, batches, (2, 4))
    got = topology_quality(FixedModel(), teacher, [{"images": b["images"]} for b in batches], prior)
    assert set(got["blocks"][0]) == {"kl", "kl_positional", "kl_uniform"}


def test_a_perfect_student_scores_zero_and_the_teachers_auc(batches):
    teacher = FixedTeacher()
    images, masks = batches[0]["images"], batches[0]["masks"]
    targets = [m.mean(1, keepdim=True) for m in teacher(images).maps]
    quality = TopologyQuality(torch.stack([t.mean((0, 1)) for t in targets]))
    quality.update(targets, targets, object_cells(masks, (4, 4)))
    got = quality.compute()
    assert got["kl"] == pytest.approx(0, abs=1e-6) and got["auc"] == got["auc_teacher"]
    with pytest.raises(ValueError, match="no images"):
        TopologyQuality(torch.zeros(2, 4, 4)).compute()
