"""`Evaluator`: agreement with torch-fidelity, invariance to batch size, refusals."""

import hashlib
import logging
from importlib.metadata import version
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from muse.errors import ConfigError, DataError
from muse.evaluation.evaluator import Evaluator
from muse.evaluation.metrics.frechet import FrechetDistance
from muse.evaluation.metrics.inception import InceptionScores
from muse.evaluation.metrics.networks import rounded_bytes


def image_pairs(count, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    real = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return real, (0.8 * real + 0.2 * torch.rand(real.shape, generator=generator)).clamp(0, 1)


def feed(evaluator, real, fake, batch):
    for a, b in zip(real.split(batch), fake.split(batch)):
        evaluator.update(a, b)
    return evaluator.compute()


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Inception with random weights of sensible size, in a file such as torch-fidelity reads."""
    torch.manual_seed(0)
    with (
        mock.patch.object(fidelity, "load_state_dict_from_url", return_value={}),
        mock.patch.object(fidelity.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        network = fidelity.FeatureExtractorInceptionV3("random", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_rfid_is_torch_fidelitys(inception_file):
    real, fake = image_pairs(6)
    evaluator = Evaluator(("rfid", "is"), inception_weights=inception_file)
    got = feed(evaluator, real, fake, 4)
    facts = evaluator.protocol()["feature_networks"]["rfid+is"]
    assert facts["weights_sha256"] == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert facts["library"] == f"torch-fidelity {version('torch-fidelity')}"
    network = fidelity.FeatureExtractorInceptionV3(
        "f", ["2048", "logits_unbiased"], str(inception_file)
    )
    parts = [network((images * 255).round().byte()) for images in (real, fake)]
    # few rows: the trace of the root is the nuclear norm of X₁X₂ᵀ, far cheaper than
    # torch-fidelity's 2048 eigenvalues
    means = [features.double().mean(0) for features, _ in parts]
    centred = [(features.double() - mean) / 5**0.5 for (features, _), mean in zip(parts, means)]
    nuclear = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    want = (
        (means[0] - means[1]).square().sum() + sum(c.square().sum() for c in centred) - 2 * nuclear
    )
    assert got["rfid"] == pytest.approx(float(want), rel=1e-5)
    assert set(got) == {"rfid", "is", "is_std"}


def small_network(features=24):
    """A stand-in for Inception's: images -> (B, features) and logits (B, 10), not linear."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(3 * 8 * 8, 64, generator=generator) / 10
    second = torch.randn(64, features + 10, generator=generator)

    def network(images):
        hidden = torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1) @ first
        return (torch.tanh(hidden) @ second).split([features, 10], dim=1)

    return network


@pytest.mark.parametrize("count", [64, 300])
def test_rfid_of_more_samples_than_features(count):
    """Covariances of full rank: torch-fidelity's distance, and SciPy's root of the matrix."""
    real, fake = image_pairs(count, seed=3)
    network = small_network()
    scores = InceptionScores(("rfid", "is"), network)
    for a, b, index in zip(real.split(50), fake.split(50), torch.arange(count).split(50)):
        scores.update(a, b, index)
    got = scores.compute()
    rows = [network(images)[0].double() for images in (real, fake)]
    stats = [fid_features_to_statistics(one) for one in rows]
    assert all(np.linalg.matrix_rank(one["sigma"]) == 24 for one in stats)
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    means, covs = zip(*[(one.mean(0).numpy(), np.cov(one.numpy().T)) for one in rows])
    root = scipy.linalg.sqrtm(covs[0] @ covs[1]).real
    scipys = ((means[0] - means[1]) ** 2).sum() + np.trace(covs[0] + covs[1] - 2 * root)
    assert got["rfid"] == pytest.approx(theirs, rel=1e-6)
    assert got["rfid"] == pytest.approx(scipys, rel=1e-6) and got["rfid"] > 0.1
    logits = network(fake)[1]
    want = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    assert got["is"] == pytest.approx(want["inception_score_mean"], rel=1e-6)


def test_distances_see_bytes_as_rfid_does():
    """What a PNG would not keep changes neither; fd_ can be asked for pictures as they are."""
    real, fake = image_pairs(40)
    stored = (fake * 255).round() / 255
    network = small_network()

    def distance(images, rounded):
        metric = FrechetDistance("fd", lambda x: network(x)[0], rounded=rounded)
        metric.update(real, images, None)
        return metric.compute()["fd"]

    assert distance(fake, True) == distance(stored, True)
    assert distance(fake, False) != distance(stored, False)
    inception = InceptionScores(("rfid",), lambda x: network(rounded_bytes(x) / 255))
    inception.update(real, fake, None)
    assert distance(fake, True) == pytest.approx(inception.compute()["rfid"], rel=1e-9)


def test_inception_score_in_data_set_order():
    """exp of the mean KL to the split's mean distribution, in torch-fidelity's ten parts."""
    logits = 3 * torch.randn(53, 7, generator=torch.Generator().manual_seed(0))
    scores = InceptionScores(("is",), lambda images: (None, logits[images.long().flatten()]))
    for index in (
        torch.arange(53).flip(0).split(8)
    ):  # batches in another order, as from several processes
        scores.update(None, index, index)
    p = logits.double().softmax(1).numpy()[np.random.RandomState(2020).permutation(53)]
    parts = [p[i * 53 // 10 : (i + 1) * 53 // 10] for i in range(10)]
    want = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in parts]
    assert scores.compute() == pytest.approx(
        {"is": np.mean(want), "is_std": np.std(want)}, rel=1e-9
    )


def test_images_are_rounded_to_bytes():
    values = (
        torch.tensor([0.0, 0.998 / 255, 127.6 / 255, 254.5001 / 255, 1.0])
        .view(1, 1, 1, 5)
        .expand(1, 3, 1, 5)
    )
    assert rounded_bytes(values)[0, 0, 0].tolist() == [0, 1, 128, 255, 255]


@pytest.mark.parametrize("batch", [1, 7])
def test_batch_size_does_not_matter(batch):
    real, fake = image_pairs(64, size=64)
    names = ("psnr", "ssim", "perceptual_random")
    whole = feed(Evaluator(names, feature_network="efficientnet_lite0"), real, fake, 64)
    parts = feed(Evaluator(names, feature_network="efficientnet_lite0"), real, fake, batch)
    assert set(whole) == {*names, "fd_efficientnet_lite0"}
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-6), name


def test_frechet_distance_of_the_pooled_features():
    """fd_<name> of a callable network equals the distance of its features' numpy moments."""
    real, fake = image_pairs(40)
    got = feed(
        Evaluator(("fd_corner",), feature_network=lambda images: images[:, :, :2, :2].flatten(1)),
        real,
        fake,
        9,
    )
    # of the pictures as bytes, as rfid's
    stats = [
        fid_features_to_statistics((images[:, :, :2, :2].flatten(1) * 255).round().double() / 255)
        for images in (real, fake)
    ]
    assert got["fd_corner"] == pytest.approx(
        fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"], rel=1e-6
    )


def test_means_over_images_and_repeated_compute():
    real, fake = image_pairs(5)
    evaluator = Evaluator(expect=5)
    feed(evaluator, real, fake, 2)
    mse = (real - fake).double().square().mean(dim=(1, 2, 3)).numpy()
    assert evaluator.compute()["psnr"] == pytest.approx(np.mean(-10 * np.log10(mse)), rel=1e-9)
    assert evaluator.compute() == evaluator.compute()


def test_small_sets_are_warned_of(caplog):
    real, fake = image_pairs(4)
    with caplog.at_level(logging.WARNING, logger="muse"):
        feed(
            Evaluator(("fd_mean",), feature_network=lambda images: images.mean((2, 3))),
            real,
            fake,
            4,
        )
    assert "fd_mean from 4 images: below 50000 a Fréchet distance is biased upwards" in caplog.text


def test_refusals(tmp_path):
    real, fake = image_pairs(2)
    evaluator = Evaluator(expect=3)
    with pytest.raises(ValueError, match="no images"):
        Evaluator().compute()
    with pytest.raises(ValueError, match=r"\[0, 1\].*\[-1,"):
        evaluator.update(real, fake.clone().fill_(-1.0))
    with pytest.raises(ValueError, match="nan"):
        evaluator.update(real * torch.nan, fake)
    assert evaluator.count == 0
    evaluator.update(real, fake)
    with pytest.raises(ValueError, match="2 images were evaluated, the data set has 3"):
        evaluator.compute()
    with pytest.raises(ConfigError, match="no metric"):
        Evaluator(())
    with pytest.raises(ConfigError, match="unknown metric 'fid'"):
        Evaluator(("fid",))
    with pytest.raises(ConfigError, match="no_such_network"):
        Evaluator(feature_network="no_such_network")
    with pytest.raises(ConfigError, match="rfid"):
        Evaluator(("fd_inception",))
    widths = Evaluator(
        ("fd_width",), feature_network=lambda images: images.mean(1).flatten(1)[:, : len(images)]
    )
    widths.update(real, fake)
    with pytest.raises(ValueError, match=r"features must be \(n, 2\), got \(1, 1\)"):
        widths.update(real[:1], fake[:1])
    with pytest.raises(ValueError, match=r"\(B, D\)"):
        Evaluator(("fd_map",), feature_network=lambda images: images).update(real, fake)


def test_inception_without_a_file_says_which_and_how(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with mock.patch.object(fidelity, "load_state_dict_from_url", side_effect=OSError("no network")):
        with pytest.raises(
            DataError, match=r"weights-inception-2015-12-05-6726825d.pth.*--inception-weights"
        ) as caught:
            Evaluator(("rfid",))
    assert "\n" not in str(caught.value)
    torch.save({"a": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(DataError, match="wrong.pth does not hold"):
        Evaluator(("is",), inception_weights=tmp_path / "wrong.pth")
