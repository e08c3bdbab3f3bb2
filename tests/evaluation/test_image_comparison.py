"""Two sets against each other: torch-fidelity's numbers on the same features, and the command."""

import json
import os
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from muse.data.crops import PictureCrop
from muse.errors import ConfigError, DataError
from muse.evaluation.image_comparison import (
    ComparisonOptions,
    check_metrics,
    compare_image_sets,
)
from muse.evaluation.image_sets import open_image_set
from muse.evaluation.metrics.inception import score_in_parts
from muse.evaluation.metrics.spatial_frechet import spatial_features
from muse.evaluation.protocols import find_protocol
from muse.evaluation.recipes import ReconstructionRecipe
from scripts import evaluate_images
from tests.helpers import one_error

COUNT = 9


def pictures(seed, noise):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (COUNT, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    noisy = coarse + np.random.default_rng(seed).normal(0, noise, coarse.shape)
    return noisy.clip(0, 255).astype(np.uint8)


REAL, FAKE = pictures(1, 10), pictures(2, 40)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    np.savez(root / "real.npz", REAL)
    (root / "fake").mkdir()
    for number, picture in enumerate(FAKE):
        Image.fromarray(picture).save(root / "fake" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def features(random_inception_file):
    """Of both sets by torch-fidelity's own network: pooled, logits, spatial."""
    network = fidelity.FeatureExtractorInceptionV3(
        "f", ["2048", "logits_unbiased"], str(random_inception_file)
    )
    both = []
    for images in (REAL, FAKE):
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        both.append((*network(tensor), spatial_features(network, tensor)))
    return both


@pytest.fixture(scope="module")
def measured(sets, random_inception_file):
    real, fake = open_image_set(sets / "real.npz"), open_image_set(sets / "fake")
    recipe = ReconstructionRecipe("a test", manifold_k=2)
    options = ComparisonOptions(batch_size=4, inception_weights=str(random_inception_file))
    names = ("fid", "sfid", "is", "precision", "recall", "psnr", "ssim")
    return compare_image_sets(real, fake, names, recipe, options)


def by_singular_values(x, y):
    """Fréchet distance of few rows: the trace of the root is the nuclear norm of X₁X₂ᵀ."""
    rows = [r.double() for r in (x, y)]
    centred = [(r - r.mean(0)) / (len(r) - 1) ** 0.5 for r in rows]
    spread = sum(c.square().sum() for c in centred)
    nuclear = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    return float((rows[0].mean(0) - rows[1].mean(0)).square().sum() + spread - 2 * nuclear)


def test_distances_are_of_torch_fidelitys_features(measured, features):
    (pooled1, _, spatial1), (pooled2, _, spatial2) = features
    assert measured[0]["fid"] == pytest.approx(by_singular_values(pooled1, pooled2), rel=1e-5)
    assert measured[0]["sfid"] == pytest.approx(by_singular_values(spatial1, spatial2), rel=1e-5)


def test_precision_and_recall_are_torch_fidelitys(measured, features):
    want = prc_features_to_metric(
        features[1][0],
        features[0][0],
        prc_neighborhood=2,
        prc_batch_size=100,
        save_cpu_ram=False,
        verbose=False,
    )
    assert measured[0]["precision"] == pytest.approx(want["precision"], abs=1e-6)
    assert measured[0]["recall"] == pytest.approx(want["recall"], abs=1e-6)


def test_the_score_is_torch_fidelitys_of_the_fake_set(measured, features):
    want = isc_features_to_metric(features[1][1], splits=COUNT, shuffle=True, rng_seed=2020)
    assert measured[0]["is"] == pytest.approx(want["inception_score_mean"], rel=1e-5)


def test_pairs_are_compared_place_by_place(measured):
    want = [peak_signal_noise_ratio(a, b) for a, b in zip(REAL, FAKE)]
    assert measured[0]["psnr"] == pytest.approx(np.mean(want), rel=1e-5)
    assert 0 < measured[0]["ssim"] < 1


def test_the_facts_say_which_sets_and_networks(measured, sets, random_inception_file):
    facts = measured[1]
    assert facts["sets"]["real"] == {
        "source": str(sets / "real.npz"), "images": COUNT, "statistics_of_file": [],
    }  # fmt: skip
    assert facts["sets"]["fake"]["images"] == COUNT
    assert list(facts["feature_networks"]) == ["inception"]
    assert len(facts["feature_networks"]["inception"]["weights_sha256"]) == 64


def test_batches_change_nothing(measured, sets, random_inception_file):
    real, fake = open_image_set(sets / "real.npz"), open_image_set(sets / "fake")
    recipe = ReconstructionRecipe("a test", manifold_k=2)
    options = ComparisonOptions(batch_size=COUNT, inception_weights=str(random_inception_file))
    got, _ = compare_image_sets(real, fake, list(measured[0])[:2], recipe, options)
    for name, value in got.items():
        assert value == pytest.approx(measured[0][name], rel=1e-5)


def test_statistics_stand_for_the_pictures(sets, features, random_inception_file, tmp_path):
    """mu and sigma as ADM's evaluator writes them (numpy.cov) give the distance of the pictures."""
    parts = {}
    for suffix, rows in (("", features[0][0]), ("_s", features[0][2])):
        rows = rows.double().numpy()
        parts |= {f"mu{suffix}": rows.mean(0), f"sigma{suffix}": np.cov(rows, rowvar=False)}
    np.savez(tmp_path / "reference.npz", **parts)
    reference, fake = open_image_set(tmp_path / "reference.npz"), open_image_set(sets / "fake")
    options = ComparisonOptions(inception_weights=str(random_inception_file))
    values, facts = compare_image_sets(reference, fake, ("fid", "sfid", "is"), None, options)
    assert values["fid"] == pytest.approx(
        by_singular_values(features[0][0], features[1][0]), rel=1e-5
    )
    assert values["sfid"] == pytest.approx(
        by_singular_values(features[0][2], features[1][2]), rel=1e-5
    )
    assert facts["sets"]["real"]["statistics_of_file"] == ["fid", "sfid"]
    assert facts["sets"]["real"]["images"] == 0


def test_two_files_of_statistics_need_no_network(tmp_path):
    rng = np.random.default_rng(0)
    stats = []
    for name in "ab":
        rows = rng.normal(size=(50, 6)) * (1 + (name == "b"))
        stats.append({"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)})
        np.savez(tmp_path / f"{name}.npz", **stats[-1])
    a, b = (open_image_set(tmp_path / f"{name}.npz") for name in "ab")
    values, facts = compare_image_sets(a, b, ["fid"])
    want = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert values["fid"] == pytest.approx(want, rel=1e-6)
    assert facts["feature_networks"] == {}


def test_parts_in_order_are_adms_score():
    """exp of the mean KL in float64, numpy; torch-fidelity's splits without a shuffle agree."""
    logits = 3 * torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    shares = np.exp(logits.double().numpy())
    shares /= shares.sum(1, keepdims=True)
    scores = []
    for start in range(0, 40, 10):
        part = shares[start : start + 10]
        kl = part * (np.log(part) - np.log(part.mean(0)[None]))
        scores.append(np.exp(kl.sum(1).mean()))
    assert score_in_parts(logits, 10) == pytest.approx((np.mean(scores), np.std(scores)))
    theirs = isc_features_to_metric(logits, splits=4, shuffle=False, rng_seed=0)
    assert score_in_parts(logits, 10)[0] == pytest.approx(theirs["inception_score_mean"])
    assert score_in_parts(logits, 64) == pytest.approx(
        (isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"], 0.0)
    )


def test_adms_protocol_counts_its_reference_pictures(sets, random_inception_file, features):
    """Precision and recall of the first pictures of the reference alone."""
    recipe = ReconstructionRecipe("a test", manifold_k=2, manifold_images=5, is_part=3)
    options = ComparisonOptions(batch_size=4, inception_weights=str(random_inception_file))
    real, fake = open_image_set(sets / "real.npz"), open_image_set(sets / "fake")
    values, _ = compare_image_sets(real, fake, ("precision", "recall", "is"), recipe, options)
    want = prc_features_to_metric(
        features[1][0],
        features[0][0][:5],
        prc_neighborhood=2,
        prc_batch_size=100,
        save_cpu_ram=False,
        verbose=False,
    )
    assert (values["precision"], values["recall"]) == pytest.approx(
        (want["precision"], want["recall"]), abs=1e-6
    )
    assert values["is"] == pytest.approx(score_in_parts(features[1][1], 3)[0], rel=1e-5)
    adm = find_protocol("adm256", "evaluate_images")
    assert (adm.manifold_images, adm.is_part) == (10_000, 5000)


# ------------------------------------------------------------------------------------- refusals
def test_impossible_metrics_are_named(sets, tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "fewer.npz", REAL[:4])
    real, fake = open_image_set(sets / "real.npz"), open_image_set(sets / "fake")
    alone, fewer = (open_image_set(tmp_path / f"{n}.npz") for n in ("statistics", "fewer"))
    assert check_metrics(["fid", "is", "fid"], alone, fake) == ["fid", "is"]
    for names, one, two, says in (
        (["fid", "precision"], alone, fake, "precision needs pictures.*: give --metrics fid$"),
        (["is"], real, alone, "is needs pictures, and .*statistics.npz holds statistics alone$"),
        (["sfid", "is"], alone, fake, "sfid needs pictures.*: give --metrics is$"),
        (["psnr"], real, fewer, "psnr compares pairs, but .* holds 9 pictures and .* 4$"),
    ):
        with pytest.raises(DataError, match=says):
            check_metrics(names, one, two)
    for names, says in (
        (["kid"], "unknown metric 'kid': one of fid"),
        (["fd_"], "unknown"),
        ([], "no m"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_metrics(names, real, fake)


# -------------------------------------------------------------------------------------- the command
def test_the_command(sets, tmp_path, capsys, features, random_inception_file):
    flags = ["--real", sets / "real.npz", "--fake", sets / "fake", "--output_dir", tmp_path]
    flags += ["--device", "cpu", "--inception-weights", random_inception_file]
    assert evaluate_images.main([*map(str, flags), "--metrics", "fid,psnr"]) == 0
    written = json.loads((tmp_path / "metrics.json").read_text())
    want = by_singular_values(features[0][0], features[1][0])
    assert written["fid"] == pytest.approx(want, rel=1e-5)
    assert f"{written['fid']:.4f}" in capsys.readouterr().out
    protocol = written["protocol"]
    assert protocol["name"] == "native" and protocol["crop"] == {}
    assert protocol["sets"]["fake"]["source"] == str(sets / "fake")
    assert protocol["versions"]["torch-fidelity"]


def test_the_command_cuts_by_protocol_and_flags(sets, tmp_path, capsys):
    """Equal sets have an infinite PSNR, which is no number of JSON."""
    flags = ["--real", sets / "real.npz", "--fake", sets / "real.npz", "--output_dir", tmp_path]
    flags += ["--device", "cpu", "--metrics", "psnr,ssim", "--protocol", "adm256", "--crop", "16"]
    assert evaluate_images.main(list(map(str, flags))) == 0
    text = (tmp_path / "metrics.json").read_text()
    assert "Infinity" not in text
    written = json.loads(text)
    assert written["psnr"] is None and written["ssim"] == pytest.approx(1)
    said = written["protocol"]
    assert (said["name"], said["changed"]) == ("adm256", ["crop", "images"])
    assert said["crop"] == {"center_crop": 16} and "halved by boxes" in said["resize"]["method"]


@pytest.mark.parametrize(
    "extra, says",
    [
        (["--protocol", "mae"], "evaluate_images has no protocol 'mae': one of native, release"),
        (["--metrics", "kid"], "unknown metric 'kid'"),
        (["--real", "none.npz"], "no such file: none.npz"),
        (["--crop", "0"], "--crop must be at least 1"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--metrics", "fid", "--inception_weights", "none.pth"], "none.pth"),
    ],
)
def test_the_command_refuses_in_one_line(sets, tmp_path, capsys, extra, says):
    flags = ["--real", sets / "real.npz", "--fake", sets / "fake", "--output_dir", tmp_path / "o"]
    code = evaluate_images.main([*map(str, flags), "--device", "cpu", *extra])
    assert says in one_error(capsys, code)
    assert not (tmp_path / "o" / "metrics.json").exists()


def test_too_few_pictures_are_one_line(sets, tmp_path, capsys, random_inception_file):
    np.savez(tmp_path / "one.npz", REAL[:1])
    flags = ["--real", sets / "real.npz", "--fake", tmp_path / "one.npz", "--device", "cpu"]
    flags += ["--output_dir", tmp_path, "--inception_weights", random_inception_file]
    code = evaluate_images.main([*map(str, flags), "--metrics", "precision"])
    assert "more than 3 fake features" in one_error(capsys, code)


def command_worker(rank, port, flags):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert evaluate_images.main(flags) == 0


def test_two_processes_give_what_one_gives(sets, random_inception_file, tmp_path):
    """Nine pictures of each set: four in one process, five in the other."""
    names = "fid,sfid,is,precision,recall,fd_efficientnet_lite0,psnr,ssim"
    flags = ["--real", str(sets / "real.npz"), "--fake", str(sets / "fake"), "--metrics", names]
    flags += ["--inception_weights", str(random_inception_file), "--device", "cpu"]
    flags += ["--batch_size", "3", "--output_dir"]
    assert evaluate_images.main([*flags, str(tmp_path / "one")]) == 0
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    mp.spawn(command_worker, (port, [*flags, str(tmp_path / "two")]), nprocs=2)
    one, two = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")
    )
    facts = [result.pop("protocol") for result in (one, two)]
    assert two == pytest.approx(one, rel=1e-6) and len(one) == 9
    assert facts[0]["sets"] == facts[1]["sets"]
    assert [fact["loading"]["processes"] for fact in facts] == [1, 2]


@pytest.mark.parametrize("form", ["real.npz", "fake"])
def test_a_stretch_of_a_set_is_of_its_own_pictures(form, sets):
    whole = torch.cat(list(open_image_set(sets / form).batches(4)))
    parts = [list(open_image_set(sets / form).batches(2, 0, part, 4)) for part in range(4)]
    assert [sum(map(len, part)) for part in parts] == [2, 2, 2, 3]
    assert torch.equal(torch.cat([batch for part in parts for batch in part]), whole)
    with pytest.raises(DataError, match="read as a stream"):
        stream = open_image_set(f"pipe:cat {sets}/none.tar", PictureCrop("center", 8, 8))
        list(stream.batches(2, 0, 0, 2))
