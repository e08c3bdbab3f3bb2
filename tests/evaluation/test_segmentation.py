"""mIoU against torchmetrics, cell targets against pixel-wise cross-entropy, and the probe."""

import pytest
import torch
import torch.nn.functional as F
from torchmetrics import JaccardIndex

from muse.data.masks import IGNORE_INDEX
from muse.evaluation.mask_cells import cell_targets, covered_size
from muse.evaluation.metrics.accuracy_iou import ConfusionMatrix
from muse.evaluation.segmentation import (
    SegmentationProbe,
    evaluate_segmentation,
    foreground_iou,
    train_segmentation_probe,
)


def random_labels(seed, shape=(6, 20, 24), classes=5):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_miou_is_torchmetrics(batch):
    truth, guess = random_labels(0), random_labels(1)
    guess = torch.where(
        torch.rand(truth.shape, generator=torch.Generator().manual_seed(2)) < 0.6, truth, guess
    )
    truth[:, :3] = IGNORE_INDEX
    confusion = ConfusionMatrix(5)
    for a, b in zip(guess.split(batch), truth.split(batch)):
        confusion.update(a, b)
    got = confusion.compute()
    reference = JaccardIndex(
        task="multiclass", num_classes=5, ignore_index=IGNORE_INDEX, average="none"
    )
    torch.testing.assert_close(got.per_class.float(), reference(guess, truth))
    assert (
        got.mean == pytest.approx(float(reference(guess, truth).mean()), rel=1e-6)
        and got.absent == 0
    )
    assert got.pixel_accuracy == pytest.approx(
        float((guess == truth)[truth != IGNORE_INDEX].double().mean())
    )


def test_absent_classes_are_left_out_and_counted():
    confusion = ConfusionMatrix(6)
    confusion.update(torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 1, IGNORE_INDEX]))
    got = confusion.compute()
    assert got.absent == 4 and got.mean == pytest.approx(0.5)  # 1/2 for both classes that occur


def test_confusion_refuses():
    confusion = ConfusionMatrix(3)
    with pytest.raises(ValueError, match="mask labels 0..7 do not fit 3 classes"):
        confusion.update(torch.zeros(2, dtype=torch.long), torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="differ in size"):
        confusion.update(torch.zeros(1, 4, 4), torch.zeros(1, 4, 5))
    with pytest.raises(ValueError, match="no labelled pixel"):
        confusion.compute()


def test_cell_shares_give_pixelwise_cross_entropy():
    masks = random_labels(3, (2, 12, 16), 4)
    masks[0, :5, :7] = IGNORE_INDEX
    logits = torch.randn(
        2, 4, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    targets = cell_targets(masks, (3, 4), 4).double()
    log_shares = logits.log_softmax(1).flatten(2).transpose(1, 2)
    got = -(targets * log_shares).sum() / targets.sum()
    pixels = logits.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(
        got, F.cross_entropy(pixels, masks, ignore_index=IGNORE_INDEX), rtol=1e-6, atol=0
    )


# pictures of 20x22 and cells of 8: the model pads them to 24x24, a grid of 3x3
SIZE, CELL, GRID = (20, 22), 8, (3, 3)


def test_cells_cover_the_padded_picture():
    assert covered_size((256, 256), 28) == (280, 280)
    assert covered_size((512, 448), 28) == (532, 448)
    assert covered_size(SIZE, CELL) == (24, 24)
    assert covered_size(SIZE, None) == SIZE


def test_padded_cells_count_the_pictures_pixels_alone():
    masks = random_labels(3, (2, *SIZE), 4)
    masks[0, :5, :7] = IGNORE_INDEX
    targets = cell_targets(masks, GRID, 4, cell=CELL).double()
    for row in range(3):
        for column in range(3):
            tile = masks[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten(1)
            want = [[(one == label).sum() / 64 for label in range(4)] for one in tile]
            assert targets[:, 3 * row + column].tolist() == want
    logits = torch.randn(
        2, 4, *GRID, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    log_shares = logits.log_softmax(1).flatten(2).transpose(1, 2)
    got = -(targets * log_shares).sum() / targets.sum()
    pixels = logits.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :20, :22]
    torch.testing.assert_close(
        got, F.cross_entropy(pixels, masks, ignore_index=IGNORE_INDEX), rtol=1e-6, atol=0
    )


def test_padding_is_cut_off_before_a_mask_is_compared():
    """Nine cells of nine classes: each pixel gets its own cell's, in pictures of any size."""
    masks = torch.arange(9).view(1, 3, 3).repeat_interleave(8, 1).repeat_interleave(8, 2)
    masks = masks[:, :20, :22].contiguous()
    features = F.one_hot(torch.arange(9)).float().view(9, 1, 3, 3).transpose(0, 1)
    probe = SegmentationProbe(9, 9).eval()
    with torch.no_grad():
        probe.classify.weight.copy_(torch.eye(9).view(9, 9, 1, 1))
    assert torch.equal(probe.predict(features, SIZE, CELL), masks)
    assert evaluate_segmentation(probe, features, masks, cell=CELL).mean == 1
    # laid over the picture alone, as if they did not cover the padding, they miss
    assert evaluate_segmentation(probe, features, masks).mean < 0.95


def test_the_probe_trains_on_padded_pictures():
    """Features and masks of whole cells, of which each picture shows a part."""
    (x, y), (xv, yv) = blocky_scene(60, 4, 0), blocky_scene(20, 4, 1)
    y, yv = y[:, :27, :45], yv[:, :27, :45]  # of 32x48
    probe = train_segmentation_probe(x, y, 4, steps=150, cell=8)
    coarse = probe.predict(xv, (32, 48), 8)[:, 4::8, 4::8]
    assert float((coarse == blocky_scene(20, 4, 1)[1][:, ::8, ::8]).float().mean()) > 0.99
    shown = evaluate_segmentation(probe, xv, yv, cell=8).mean
    assert shown > evaluate_segmentation(probe, xv, yv).mean + 0.02


def blocky_scene(count, classes, seed):
    """Features that code the class of their cell, linearly and with noise; masks of whole cells."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, classes, (count, 4, 6), generator=generator)
    codes = torch.randn(classes, 12, generator=torch.Generator().manual_seed(7))
    features = (
        codes[cells].permute(0, 3, 1, 2) * 30
        + torch.randn(count, 12, 4, 6, generator=generator) * 3
        + 100
    )
    return features, cells.repeat_interleave(8, 1).repeat_interleave(8, 2)


def test_probe_learns_what_is_linear():
    (x, y), (xv, yv) = blocky_scene(60, 4, 0), blocky_scene(20, 4, 1)
    probe = train_segmentation_probe(x, y, 4, steps=150)
    coarse = probe.predict(xv, (4, 6))
    assert float((coarse == yv[:, ::8, ::8]).float().mean()) > 0.99
    result = evaluate_segmentation(probe, xv, yv)
    assert 0.4 < result.mean < 1  # bilinear borders between blocks cost something
    assert evaluate_segmentation(probe, xv, yv, batch_size=3).mean == result.mean


def test_foreground_iou_of_known_maps():
    """A feature that is the mask itself: IoU 1; noise: at best the IoU of one class everywhere."""
    masks = random_labels(4, (40, 8, 8), 3)
    noise = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (
        foreground_iou(
            (masks > 0).float()[:, None], masks, (masks > 0).float()[:, None], masks, steps=200
        )
        == 1
    )
    assert (
        foreground_iou(noise, masks, noise, masks, steps=50)
        <= float((masks > 0).float().mean()) + 0.02
    )


def test_more_than_255_classes_are_counted_as_torchmetrics_does():
    """ADE20K's full set has 847: label 255 is a class like all others, IGNORE_INDEX is not."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(200, 300, (2, 16, 16), generator=generator)
    guess = torch.where(
        torch.rand(truth.shape, generator=generator) < 0.5, truth, torch.full_like(truth, 846)
    )
    truth[0, :4] = IGNORE_INDEX
    confusion = ConfusionMatrix(847)
    confusion.update(guess, truth)
    per_class = JaccardIndex(
        task="multiclass", num_classes=847, ignore_index=IGNORE_INDEX, average="none"
    )(guess, truth)
    got = confusion.compute()
    assert got.per_class[255] == pytest.approx(float(per_class[255])) and 0 < got.per_class[255] < 1
    labelled = truth != IGNORE_INDEX
    assert got.absent == 847 - len(set(truth[labelled].tolist()) | set(guess[labelled].tolist()))
