"""k nearest neighbours against scikit-learn, on tensors and on memory-mapped arrays."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from muse.evaluation.knn import KnnScore, class_votes, knn_scores, nearest_neighbours

CLASSES = 12


def features(count, seed, classes=CLASSES, dim=16, spread=1.6):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (count,), generator=generator)
    length = 0.2 + 5 * torch.rand(count, 1, generator=generator)  # which a cosine does not see
    return length * (
        centres[labels] + spread * torch.randn(count, dim, generator=generator)
    ), labels


TRAIN, TRAIN_LABELS = features(700, 1)
VAL, VAL_LABELS = features(333, 2)


@pytest.mark.parametrize("blocks", [(16384, 1024), (64, 50), (7, 400)])
def test_neighbours_are_sklearns_for_any_block(blocks):
    got, places = nearest_neighbours(TRAIN, VAL, 20, "cpu", *blocks)
    reference = NearestNeighbors(n_neighbors=20, metric="cosine", algorithm="brute")
    distances, want = reference.fit(TRAIN.double().numpy()).kneighbors(VAL.double().numpy())
    assert np.array_equal(places.numpy(), want)
    np.testing.assert_allclose(got.numpy(), 1 - distances, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_votes_and_accuracy_are_sklearns(temperature):
    scores = knn_scores(
        TRAIN, TRAIN_LABELS, VAL, VAL_LABELS, ks=(1, 10, 20, 200), temperature=temperature
    )
    assert list(scores) == [1, 10, 20, 200]
    for k, score in scores.items():
        classifier = KNeighborsClassifier(
            k,
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: np.exp((1 - distance) / temperature),
        ).fit(TRAIN.double().numpy(), TRAIN_LABELS.numpy())
        shares = classifier.predict_proba(VAL.double().numpy())
        cosines, places = nearest_neighbours(TRAIN, VAL, k)
        votes = class_votes(cosines, TRAIN_LABELS[places], CLASSES, temperature)
        np.testing.assert_allclose(votes.numpy(), shares, atol=2e-5)
        guesses = shares.argmax(1)
        assert score.top1 == pytest.approx((guesses == VAL_LABELS.numpy()).mean())
        assert score.top1_macro == pytest.approx(balanced_accuracy_score(VAL_LABELS, guesses))
        # sklearn counts classes without a vote by their order; here they never count
        truth = np.take_along_axis(shares, VAL_LABELS.numpy()[:, None], 1)[:, 0]
        best = top_k_accuracy_score(VAL_LABELS, shares, k=5, labels=range(CLASSES))
        without = ((truth == 0) & ((shares > 0).sum(1) < 5)).mean()
        assert best - without <= score.top5 <= best + 1e-12


def test_a_memory_mapped_array_is_read_like_a_tensor(tmp_path):
    np.save(tmp_path / "rows.npy", TRAIN.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert knn_scores(mapped, TRAIN_LABELS, VAL.numpy(), VAL_LABELS, ks=(10, 20)) == knn_scores(
        TRAIN, TRAIN_LABELS, VAL, VAL_LABELS, ks=(10, 20)
    )


def test_by_hand():
    """Cosines 1, 0 and -1 to three points: with T = 1 the weights are e, 1 and 1/e."""
    train = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    cosines, places = nearest_neighbours(train, torch.tensor([[5.0, 0.0]]), 3)
    assert places.tolist() == [[0, 1, 2]]
    votes = class_votes(cosines, torch.tensor([[1, 0, 0]]), 3, 1.0)
    e = np.e
    assert votes[0].tolist() == pytest.approx(
        [(1 + 1 / e) / (e + 1 + 1 / e), e / (e + 1 + 1 / e), 0]
    )


def test_a_class_without_votes_is_not_among_the_five():
    """Two neighbours of class 0 and six classes: class 3 ties with four others at no vote."""
    train = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    scores = knn_scores(
        train, torch.tensor([0, 0]), train, torch.tensor([0, 3]), num_classes=6, ks=(2,)
    )
    assert scores == {2: KnnScore(0.5, 0.5, 0.5)}


def test_a_k_above_the_training_set_is_left_out():
    few, labels = TRAIN[:15], TRAIN_LABELS[:15]
    assert list(knn_scores(few, labels, VAL, VAL_LABELS, CLASSES)) == [10]
    with pytest.raises(ValueError, match="10 neighbours among 5 training samples"):
        knn_scores(TRAIN[:5], TRAIN_LABELS[:5], VAL, VAL_LABELS, CLASSES)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"val": VAL[:, :5]}, "features differ"),
        ({"val": VAL.index_fill(0, torch.tensor([4]), torch.nan)}, "NaN or infinity"),
        ({"val_labels": VAL_LABELS + 1}, "validation labels 1..12 do not fit 12 classes"),
        ({"train_labels": TRAIN_LABELS - 1}, "training labels -1..10 do not fit"),
        ({"train_labels": TRAIN_LABELS[:9]}, "700 and 333 features, 9 and 333 labels"),
    ],
)
def test_wrong_input_is_named(change, says):
    given = {"train": TRAIN, "train_labels": TRAIN_LABELS, "val": VAL, "val_labels": VAL_LABELS}
    with pytest.raises(ValueError, match=says):
        knn_scores(**(given | change))
