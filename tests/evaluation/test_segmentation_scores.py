"""The bound of a grid on masks made by hand, the mean over classes, and the choice of a rate."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import jaccard_score

from muse.data.masks import IGNORE_INDEX
from muse.evaluation.metrics.accuracy_iou import ConfusionMatrix
from muse.evaluation.recipes import SegmentationRecipe
from muse.evaluation.segmentation_heads import SegmentationHeads
from muse.evaluation.segmentation_scores import (
    GridBound,
    best_head,
    chosen_facts,
    hold_out,
    mean_iou,
)
from muse.evaluation.sliding_window import Inference


def bound_of(masks, grid, classes, cell=None, inference=None, sizes=None):
    bound = GridBound(classes, inference, cell)
    for number, mask in enumerate(masks):
        size = sizes[number] if sizes else tuple(mask.shape)
        bound.update(mask, size, lambda _: grid)
    return bound.as_dict()


def test_masks_of_whole_cells_are_known_exactly():
    mask = torch.tensor([[0, 1], [2, 1]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    got = bound_of([mask], (2, 2), 3)
    assert got["miou_cells"] == got["pixel_accuracy_cells"] == 1
    assert got["grid"] == [2, 2]


def test_the_majority_of_a_cell_by_hand():
    """One cell of 4 x 4: ten pixels of class 0, six of class 1, of which two are ignored."""
    mask = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]])
    mask[3, 2] = mask[3, 3] = IGNORE_INDEX
    got = bound_of([mask], (1, 1), 2)
    assert got["miou_cells"] == pytest.approx((10 / 14 + 0) / 2)
    assert got["pixel_accuracy_cells"] == pytest.approx(10 / 14)
    assert got["miou_upsampled"] == got["miou_cells"]  # one cell has nothing to go over into


def test_the_upsampled_bound_by_hand():
    """A row of two cells: shares 1 and 0 of class 1; half way between them both have .5."""
    mask = torch.zeros(4, 16, dtype=torch.long)
    mask[:, 6:8] = 1
    mask[:, 8:] = 2
    got = bound_of([mask], (1, 2), 3)
    shares = torch.tensor([[6 / 8, 2 / 8, 0], [0, 0, 1]]).T.view(1, 3, 1, 2)
    guess = F.interpolate(shares, (4, 16), mode="bilinear")[0].argmax(0)
    flat = mask.flatten().numpy(), guess.flatten().numpy()
    assert got["miou_upsampled"] == pytest.approx(jaccard_score(*flat, average="macro"))
    assert got["miou_cells"] == pytest.approx((6 / 8 + 0 + 1) / 3)


def test_the_bound_of_padded_pictures():
    """Cells of 8 cover 16 x 16 of a picture of 12 x 10, whose masks fill them exactly."""
    mask = torch.tensor([[0, 1], [2, 3]]).repeat_interleave(8, 0).repeat_interleave(8, 1)
    mask = mask[:12, :10]
    assert bound_of([mask], (2, 2), 4, cell=8)["miou_cells"] == 1
    assert bound_of([mask], (2, 2), 4)["miou_cells"] < 0.8  # stretched over the picture alone


def test_the_bound_at_the_masks_own_size():
    """A mask three times as large as its picture: the same cells, three times as large."""
    small = torch.tensor([[0, 1], [1, 2]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    large = small.repeat_interleave(3, 0).repeat_interleave(3, 1)
    got = bound_of([large], (2, 2), 3, sizes=[(8, 8)])
    assert got["pixel_accuracy_cells"] > 0.9
    (only,) = [bound_of([small], (2, 2), 3)]
    assert only["miou_cells"] == 1


def test_a_window_over_all_gives_the_bound_of_the_whole():
    torch.manual_seed(0)
    masks = [torch.randint(0, 3, (12, 12)) for _ in range(3)]
    whole = bound_of(masks, (3, 3), 3)
    assert bound_of(masks, (3, 3), 3, inference=Inference(12, 8)) == whole
    assert 1 / 3 < whole["pixel_accuracy_cells"] < 1


def test_finer_grids_bound_higher():
    """A disc on a ground."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    mask = ((y - 30).square() + (x - 37).square() < 21**2).long()
    found = [bound_of([mask], (n, n), 2)["miou_cells"] for n in (4, 8, 16, 64)]
    assert found == sorted(found) and found[-1] == 1 and found[0] < 0.9


# ------------------------------------------------------------------------------------- the choice
def test_mean_over_all_classes_counts_absent_ones_as_zero():
    confusion = ConfusionMatrix(6)
    confusion.update(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    assert mean_iou(confusion.compute()) == pytest.approx(0.5)
    assert mean_iou(confusion.compute(), "all") == pytest.approx(2 * 0.5 / 6)


def test_a_tenth_is_held_out_and_nothing_is_in_both():
    places = list(range(5, 205, 2))
    fitted, held = hold_out(places, seed=3)
    assert len(held) == 10 and sorted(fitted + held) == places
    assert hold_out(places, seed=3) == (fitted, held) != hold_out(places, seed=4)
    assert hold_out(places, None) == (places, [])
    assert len(hold_out(range(30_000), 0)[1]) == 2000
    with pytest.raises(ValueError, match="at least two training pictures"):
        hold_out([4], 0)


def test_the_best_rate_on_held_out_pictures_is_taken():
    recipe = SegmentationRecipe("here", learning_rates=(0.1, 0.2, 0.3))
    heads = SegmentationHeads(4, 2, recipe.learning_rates)
    scores = []
    for right in (5, 8, 9):
        confusion = ConfusionMatrix(2)
        truth = torch.tensor([0, 1] * 5)
        guess = truth.clone()
        guess[right:] = 1 - guess[right:]
        confusion.update(guess, truth)
        scores.append(confusion.compute())
    head, by_rate = best_head(heads, scores, "present")
    assert head == 2
    assert by_rate["held_out_miou_by_rate"]["0.2"] == pytest.approx(scores[1].mean)
    with torch.no_grad():
        heads.heads[2].classify.weight.fill_(torch.nan)  # one that diverged is not taken
    assert best_head(heads, scores, "present")[0] == 1
    said = chosen_facts(recipe, 1, 7)
    assert said["learning_rate"] == 0.2
    assert said["chosen_on"] == "7 held-out training pictures, by mIoU"
