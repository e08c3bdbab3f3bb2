"""Linear probe and zero-shot against scikit-learn, open_clip and counting by hand."""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler
from torch.utils._python_dispatch import TorchDispatchMode

from muse.errors import ConfigError, DataError
from muse.evaluation import retrieval as retrieval_module
from muse.evaluation.class_names import read_class_names, read_lines
from muse.evaluation.held_out import split_training_set
from muse.evaluation.linear_probe import pixel_features, train_linear_probe
from muse.evaluation.metrics.accuracy_iou import accuracy, hit_probability
from muse.evaluation.retrieval import retrieval
from muse.evaluation.zero_shot import zero_shot
from muse.teachers.prompts import class_embeddings, prompts


def overlapping_classes(count, seed, classes=5, dim=16):
    centres = 0.45 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(
        torch.tensor([5.0, 1, 1, 2, 1]), count, replacement=True, generator=generator
    )
    scales = torch.logspace(-2, 2, dim)  # the batch norm has to undo this
    return (centres[labels] + torch.randn(count, dim, generator=generator)) * scales + 7, labels


def test_probe_is_within_a_point_of_logistic_regression():
    (x, y), (xv, yv) = overlapping_classes(3000, 0), overlapping_classes(2000, 1)
    result = train_linear_probe(x, y, xv, yv, epochs=20, batch_size=256)
    scaler = StandardScaler().fit(x)
    answers = (
        LogisticRegression(C=100, max_iter=1000)
        .fit(scaler.transform(x), y)
        .predict(scaler.transform(xv))
    )
    assert 0.7 < (answers == yv.numpy()).mean() < 0.97  # the classes do overlap
    assert result.last.micro == pytest.approx((answers == yv.numpy()).mean(), abs=0.01)
    assert result.last.macro == pytest.approx(balanced_accuracy_score(yv, answers), abs=0.02)
    assert result.best_on_validation.micro >= max(result.best.micro, result.last.micro)
    assert result.majority.macro == pytest.approx(0.2) and result.majority.micro == pytest.approx(
        float((yv == 0).float().mean())
    )
    assert result.chance == 0.2 and result.classes == 5


def test_heads_side_by_side_equal_heads_alone():
    """Learning rates trained at once give what each gives alone, and arrays what tensors give."""
    (x, y), (xv, yv) = overlapping_classes(600, 2), overlapping_classes(300, 3)
    together = train_linear_probe(x, y, xv, yv, rates=(0.01, 0.3), epochs=4, batch_size=100).by_rate
    for rate in (0.01, 0.3):
        alone = train_linear_probe(
            x.numpy(), y, xv.numpy(), yv, rates=(rate,), epochs=4, batch_size=100
        ).by_rate[f"{rate:g}"]
        assert alone.micro == pytest.approx(together[f"{rate:g}"].micro, abs=1 / 300)


def test_rate_and_epoch_are_not_chosen_on_what_is_reported():
    """Validation labels that are the training's turned by one class.

    A choice on them would take the rate that learns least. The fitted heads are the same whatever
    the validation set says, so their scores on either set follow from each other.
    """
    (x, y), (xv, yv) = overlapping_classes(1000, 4), overlapping_classes(500, 5)
    options = dict(rates=(1e-6, 0.1), epochs=6, batch_size=50)
    honest = train_linear_probe(x, y, xv, yv, **options)
    turned = train_linear_probe(x, y, xv, (yv + 1) % 5, **options)
    assert honest.learning_rate == turned.learning_rate == 0.1
    assert honest.best_epoch == turned.best_epoch
    assert turned.last == turned.by_rate["0.1"] and turned.last.micro < 0.2
    assert turned.best_on_validation.learning_rate == 1e-6
    assert turned.best_on_validation.micro > 2 * turned.last.micro
    assert (honest.train_samples, honest.held_out) == (1000, 100)


def test_the_held_out_part_is_of_all_classes_and_no_part_of_what_is_fitted():
    labels = torch.arange(10).repeat_interleave(torch.arange(10, 110, 10))  # 10, 20, ... 100
    labels = labels[torch.randperm(550)]
    fitted, held = split_training_set(labels, seed=7)
    assert sorted([*fitted.tolist(), *held.tolist()]) == list(range(550)) and len(held) == 55
    counts = torch.bincount(labels[held], minlength=10)
    assert (counts - torch.arange(1, 11)).abs().max() <= 1  # a tenth of each class
    assert torch.equal(split_training_set(labels, seed=7)[1], held)
    assert not torch.equal(split_training_set(labels, seed=8)[1], held)
    assert len(split_training_set(torch.arange(200_000) % 1000, seed=0)[1]) == 10_000
    # one sample of a class is needed to fit it
    assert split_training_set(torch.tensor([0, 1, 1]), seed=0)[1].tolist() in ([1], [2])
    assert split_training_set(torch.tensor([0, 1, 2]), seed=0)[1].tolist() == []


def test_macro_accuracy_is_sklearns_and_skips_absent_classes():
    labels, guesses = torch.tensor([0, 0, 0, 2, 2, 3]), torch.tensor([0, 0, 1, 2, 0, 3])
    score = accuracy(guesses, labels, 6)
    assert score.micro == pytest.approx(4 / 6)
    assert score.macro == pytest.approx(balanced_accuracy_score(labels, guesses))


def test_probe_refuses_bad_labels_and_widths():
    x, y = overlapping_classes(50, 0)
    with pytest.raises(ValueError, match="labels 0..9 do not fit 5 classes"):
        train_linear_probe(
            x, y, x, torch.full((50,), 9).index_fill_(0, torch.tensor([0]), 0), num_classes=5
        )
    with pytest.raises(ValueError, match="two widths: 16 and 15"):
        train_linear_probe(x, y, x[:, :15], y)


def test_pixel_baseline_is_an_area_mean():
    images = torch.rand(2, 3, 32, 64)
    want = images.unfold(2, 2, 2).unfold(3, 4, 4).mean((4, 5)).flatten(1)
    torch.testing.assert_close(pixel_features(images), want)


def test_class_embeddings_are_open_clips():
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    names, templates = (
        ["tench", "great white shark", "hen"],
        open_clip.OPENAI_IMAGENET_TEMPLATES[:7],
    )
    want = build_zero_shot_classifier(model, tokenizer, names, templates)
    got = class_embeddings(
        lambda texts: model.encode_text(tokenizer(texts), normalize=True), names, templates
    )
    torch.testing.assert_close(got.T, want)


def test_prompts():
    assert prompts("cat", ["a {}.", "one {c}", str.upper]) == ["a cat.", "one cat", "CAT"]
    with pytest.raises(ConfigError, match="template without"):
        prompts("cat", ["a photo"])


def test_zero_shot_counts_by_hand():
    classes = torch.eye(6)
    images = torch.tensor(
        [[9.0, 1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5], [0, 9, 2, 3, 4, 5], [1, 2, 3, 4, 5, 9]]
    )
    got = zero_shot(images, torch.tensor([0, 1, 1, 5]), classes)
    assert got["top1"] == 3 / 4 and got["top1_macro"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert got["top5"] == 3 / 4  # class 1 is the last of six for the second image
    assert got["majority"] == 0.5 and got["majority_macro"] == pytest.approx(1 / 3)
    assert got["top1_chance"] == pytest.approx(1 / 6) and got["classes_present"] == 3
    with pytest.raises(ValueError, match="width 6.*7"):
        zero_shot(images, torch.tensor([0, 1, 1, 5]), torch.eye(7))
    with pytest.raises(ValueError, match="do not fit 6 classes"):
        zero_shot(images, torch.tensor([0, 1, 1, 6]), classes)


def test_ties_score_chance():
    assert zero_shot(torch.ones(8, 3), torch.arange(8) % 4, torch.ones(4, 3))[
        "top1"
    ] == pytest.approx(0.25)
    hits = hit_probability(torch.tensor([[3.0, 1, 1, 1, 0]]), torch.tensor([1]), 2)
    assert hits.tolist() == pytest.approx([1 / 3])


def test_retrieval_with_all_candidates_is_plain_ranking():
    """One group of everything: the hit rate of the full similarity matrix."""
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(40, 8, generator=generator), dim=-1)
    images = F.normalize(text + 0.35 * torch.randn(40, 8, generator=generator), dim=-1)
    got = retrieval(images, text, [f"c{i}" for i in range(40)], group=40, groups=3)
    ranks = (images @ text.T).argsort(1, descending=True)
    for k in (1, 5):
        want = np.mean([i in ranks[i, :k] for i in range(40)])
        assert got[f"image_to_text_r{k}"] == pytest.approx(want)
    assert 0.1 < got["image_to_text_r1"] < 0.9


class _Largest(TorchDispatchMode):
    """The number of values in the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_retrieval_among_many_holds_one_block_of_similarities(monkeypatch):
    """4000 candidates have 16 million similarities; in memory are 65,536, and the rows."""
    monkeypatch.setattr(retrieval_module, "BLOCK", 2**16)
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(4000, 8, generator=generator), dim=-1)
    images = F.normalize(text + 0.2 * torch.randn(4000, 8, generator=generator), dim=-1)
    with _Largest() as largest:
        got = retrieval(images, text, [f"c{i}" for i in range(4000)], group=4000, groups=1)
    assert largest.numbers <= 2**16
    ranks = (images @ text.T).argsort(1, descending=True)
    for k in (1, 5):
        want = np.mean([i in ranks[i, :k] for i in range(4000)])
        assert got[f"image_to_text_r{k}"] == pytest.approx(want, abs=1e-9)
    assert got["chance_r5"] == 5 / 4000 and 0.05 < got["image_to_text_r1"] < 0.9
    # by default no more queries than for the usual 32
    assert retrieval(images, text, [f"c{i}" for i in range(4000)], group=2000)["groups"] == 16


def test_retrieval_groups_hold_distinct_captions():
    """Two images a caption with equal texts: right only if a caption is never its own rival."""
    text = torch.eye(10).repeat_interleave(3, 0)
    captions = [f"c{i // 3}" for i in range(30)]
    got = retrieval(text, text, captions, group=8, groups=50)
    assert got["image_to_text_r1"] == got["text_to_image_r1"] == 1 and got["captions"] == 10
    collapsed = retrieval(torch.ones(30, 4), torch.ones(30, 4), captions, group=8, groups=5)
    assert collapsed["image_to_text_r1"] == pytest.approx(1 / 8) and collapsed[
        "image_to_text_r5"
    ] == pytest.approx(5 / 8)
    assert retrieval(text, text, captions, group=32)["group"] == 10


def test_line_files(tmp_path):
    (tmp_path / "names.txt").write_text("zebra\n\n cow \n", encoding="utf-8")
    assert read_lines(tmp_path / "names.txt", "class name") == ["zebra", "cow"]
    with pytest.raises(DataError, match="missing.txt"):
        read_lines(tmp_path / "missing.txt", "class name")


def test_a_blank_line_never_shifts_a_label(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text(
        "zebra\n cow \n\n  \n", encoding="utf-8"
    )  # below the last name it means nothing
    assert read_class_names(file) == ["zebra", "cow"]
    file.write_text("\ufeffzebra\r\n\r\ncow\r\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2 is blank, but a label is the place of a line"):
        read_class_names(file)
    file.write_text("\nzebra\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 1 is blank"):
        read_class_names(file)
    file.write_text("\n\n", encoding="utf-8")
    with pytest.raises(DataError, match="has no lines"):
        read_class_names(file)
