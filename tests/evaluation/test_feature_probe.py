"""Linear probe and k-NN as commands: pooling, recipes, augmented training, resumed extraction."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from muse import load_config
from muse.data.dataloader import eval_loader
from muse.evaluation import feature_parts, frozen_features
from muse.evaluation.augmented_features import AugmentedFeatures
from muse.evaluation.frozen_features import frozen_features as extract
from muse.evaluation.measurement import Setup
from muse.evaluation.probed_network import probed_network
from muse.evaluation.protocols import find_protocol
from muse.models.loading import load_model
from scripts import knn, linear_probe
from tests.helpers import ROOT, one_error

sys.path.insert(0, str(ROOT / "tools"))
import probe_cost  # noqa: E402 (tools is no package)


@pytest.fixture
def flags(trained_run, tmp_path):
    config, run = trained_run
    out = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "features")]
    return ["--config", str(config), "--checkpoint", str(run / "final"), "--device", "cpu", *out]


@pytest.fixture
def setup(trained_run, tmp_path):
    config, run = trained_run
    return Setup(load_config(config), str(run / "final"), output_dir=str(tmp_path))


def read(tmp_path):
    return json.loads((tmp_path / "out" / "metrics.json").read_text())


def pictures(data, part="train"):
    size = {"resize_shorter_edge": 32, "crop_size": 32}
    (batch,) = eval_loader(
        f"{data}/{part}-*.tar", batch_size=64, fields=("images", "labels"), **size
    )
    return batch


@pytest.mark.parametrize("kind", ["encoder", "semantic", "block"])
def test_columns_are_class_tokens_and_means_of_the_last_blocks(kind, setup, shapes_data):
    """Against transformers' own list of hidden states, and a walk through MUSE's blocks."""
    images = pictures(shapes_data, "val")["images"]
    model = load_model(setup.checkpoint, setup.cfg.model)
    network = probed_network(setup, kind)
    with torch.no_grad():
        if kind == "encoder":
            pixels = (images - model.pixel_mean) / model.pixel_std
            states = model.encoder(pixel_values=pixels, output_hidden_states=True).hidden_states
            classes = [state[:, 0] for state in states[-2:]]
            mean = states[-1][:, 1:].mean(1)
            want = {
                "cls of 1": classes[1:],
                "cls of 2": classes,
                "cls+mean of 1": [classes[1], mean],
                "cls+mean of 2": [*classes, mean],
            }
            network = network.with_pooling(("cls", "cls+mean"), (1, 2))
        elif kind == "semantic":  # the mean semantic token of a block is its anchor
            anchors = model.encode(images).anchors.unbind(1)
            want = {"mean of 1": anchors[1:], "mean of 2": anchors}
            network = network.with_pooling(("mean",), (1, 2))
        else:
            tokens, grid = model._encode_tokens(images)
            x = model.adapter_mlp(tokens)  # unshuffle 1
            rotary, means = model.rotary(x.shape[1], x.device), []
            for block in model.muse_blocks:
                x = block(x, rotary)[0]
                means.append(x.mean(1))
            want = {"mean of 1": means[1:], "mean of 2": means}
            network = network.with_pooling(("mean",), (1, 2))
        vectors = network.vectors(images)
    assert list(network.columns) == list(want)
    for name, parts in want.items():
        torch.testing.assert_close(vectors[:, network.columns[name]], torch.cat(list(parts), 1))


def test_dinov2_chooses_among_all_heads_in_one_pass(flags, tmp_path):
    few = "--epochs 1 --epoch_steps 4 --augment no --learning_rates 0.01 1".split()
    run = [*flags, "--recipe", "dinov2", "--baseline", *few]
    assert linear_probe.main(run) == 0
    got = read(tmp_path)
    names = [f"{pool} of {n}" for pool in ("cls", "cls+mean") for n in (1, 2)]
    assert list(got["by_rate"]) == [f"{name} {rate}" for name in names for rate in ("0.01", "1")]
    assert got["last"] == got["by_rate"][f"{got['columns']} {got['learning_rate']:g}"]
    assert got["reported"] == got["last"]
    protocol = got["protocol"]
    assert protocol["probe"]["chosen_on"].startswith("6 held-out training samples")
    assert protocol["network"]["pooling"] == ["cls", "cls+mean"]
    assert protocol["name"] == "native" and protocol["source"].startswith("DINOv2")
    assert {"source", "last_blocks", "epochs"} <= set(protocol["changed"])
    # without a class token the mean stands for it
    assert linear_probe.main([*flags, "--recipe", "dinov2", *few]) == 0
    assert read(tmp_path)["protocol"]["network"]["pooling"] == ["mean"]


@pytest.mark.parametrize("name", ["release", "mae"])
def test_recipes_run_and_are_recorded(name, flags, tmp_path):
    epochs = {"release": "6", "mae": "12"}[name]
    assert linear_probe.main([*flags, "--recipe", name, "--epochs", epochs, "--pool", "mean"]) == 0
    got = read(tmp_path)
    recipe = got["protocol"]["recipe"]
    assert recipe["optimizer"] == {"release": "sgd", "mae": "lars"}[name]
    assert recipe["chosen_on"] == "held-out training pictures"
    assert got["reported"] == got["best" if name == "release" else "last"]
    assert got["protocol"]["probe"]["batch_size"] == 58
    assert ("anew" in got["protocol"]["probe"]["features"]) == (name == "mae")
    if name == "release":  # evaluated after the fifth and the last epoch
        assert got["best_epoch"] in (5, 6)


def test_augmented_batches_are_of_the_fitted_pictures(setup, shapes_data):
    """A crop that takes the whole picture and never mirrors gives the stored features."""
    network = probed_network(setup, "semantic")
    train = extract(setup, network, "labels", "train", pooled=True)
    stored = torch.tensor(np.array(train.features))
    rows = torch.arange(0, 64, 3)
    whole = replace(
        find_protocol("mae", "linear_probe").augmentation, scale=(1, 1), ratio=(1, 1), flip=0.0
    )
    batches = AugmentedFeatures(setup, network, train, whole)(rows, 11, seed=0)
    for _ in range(2):  # 22 rows are two batches of 11
        seen = []
        for _ in range(2):
            features, labels = next(batches)
            assert features.shape == (11, stored.shape[1])
            near = torch.cdist(features, stored).argmin(1)
            assert (features - stored[near]).abs().max() < 0.05 * stored.std()
            assert labels.tolist() == train.targets[near.numpy()].tolist()
            seen += near.tolist()
        assert sorted(seen) == rows.tolist()
    changed = AugmentedFeatures(setup, network, train, replace(whole, scale=(0.2, 0.3)))
    features, _ = next(changed(rows, 11, seed=0))
    assert torch.cdist(features, stored).amin() > 1e-3 * stored.std()


def test_knn_is_scikit_learns_on_the_stored_features(flags, shapes_data, tmp_path):
    assert knn.main([*flags, "--k", "5,20", "--temperature", "0.1"]) == 0
    got = read(tmp_path)
    stores = [
        {name: np.load(store / f"{name}.npy") for name in ("features", "labels")}
        for store in (tmp_path / "features").iterdir()
    ]
    val, train = sorted(stores, key=lambda store: len(store["labels"]))
    assert list(got["by_k"]) == ["5", "20"]
    for k in (5, 20):
        classifier = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.1)
        ).fit(train["features"].astype(np.float64), train["labels"])
        guesses = classifier.predict(val["features"].astype(np.float64))
        assert got["by_k"][str(k)]["top1"] == pytest.approx((guesses == val["labels"]).mean())
    assert got["protocol"]["probe"]["temperature"] == 0.1
    assert got["protocol"]["changed"] == ["ks", "temperature"]


def test_knn_leaves_out_what_the_protocol_has_too_many_of_and_reads_the_probes_store(
    flags, tmp_path
):
    assert linear_probe.main([*flags, "--epochs", "1"]) == 0
    stores = sorted((tmp_path / "features").iterdir())
    assert knn.main(flags) == 0
    got = read(tmp_path)
    assert sorted((tmp_path / "features").iterdir()) == stores
    assert list(got["by_k"]) == ["10", "20"]
    assert got["protocol"]["probe"]["k_left_out"] == [100, 200]
    assert got["protocol"]["name"] == "native"


MISTAKES = [
    (linear_probe, ["--pool", "cls"], "--pool cls: semantic features have no class token"),
    (linear_probe, ["--last_blocks", "3"], "--last_blocks 3: semantic features have 2 block(s)"),
    (linear_probe, ["--recipe", "simclr"], "unknown --recipe 'simclr'"),
    (linear_probe, ["--protocol", "adm256"], "linear_probe has no protocol 'adm256'"),
    (knn, ["--pool", "cls+mean"], "--pool cls+mean: semantic features have no class token"),
    (knn, ["--k", "65"], "--k 65 is above the 64 training samples"),
    (knn, ["--k", "0"], "--k must be at least 1, not 0"),
    (knn, ["--k", "ten"], "'ten' is not numbers joined by commas"),
    (knn, ["--temperature", "0"], "--temperature must be above 0, not 0"),
    (knn, ["--protocol", "mae"], "knn has no protocol 'mae'"),
    (knn, ["--config"], "expected one argument"),
]


@pytest.mark.parametrize(("script", "words", "says"), MISTAKES)
def test_a_mistake_is_one_line(script, words, says, flags, tmp_path, capsys):
    assert says in one_error(capsys, script.main([*flags, *words]))
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_an_extraction_goes_on_after_a_stop(flags, setup, tmp_path, monkeypatch, caplog):
    """The second start asks the network for the missing pictures alone, and says the same."""
    assert linear_probe.main([*flags, "--epochs", "1"]) == 0
    want = read(tmp_path)
    (tmp_path / "features").rename(tmp_path / "whole")
    monkeypatch.setattr(feature_parts, "PART_BYTES", 1)  # a part a batch
    seen, stop_at = [], [5]
    through = frozen_features.LoaderExtraction._features

    def counted(self, batch):
        if len(seen) == stop_at[0]:
            raise KeyboardInterrupt
        seen.append(batch["indices"].tolist())
        return through(self, batch)

    monkeypatch.setattr(frozen_features.LoaderExtraction, "_features", counted)
    assert linear_probe.main([*flags, "--epochs", "1"]) == 130
    assert not any(path.suffix != ".parts" for path in (tmp_path / "features").iterdir())
    stop_at[0] = None
    assert linear_probe.main([*flags, "--epochs", "1"]) == 0
    assert sorted(sum(seen, [])) == sorted([*range(64), *range(8)])  # each picture once
    got = read(tmp_path)
    assert got["last"] == want["last"]
    assert got["protocol"]["train"] == want["protocol"]["train"]  # of all samples
    for store in (tmp_path / "whole").iterdir():
        again = np.load(tmp_path / "features" / store.name / "features.npy")
        np.testing.assert_allclose(again, np.load(store / "features.npy"), rtol=1e-5, atol=1e-6)


def test_sixteen_bits_are_recorded_and_stored_apart(flags, tmp_path):
    for extra in ([], ["--precision", "bf16"]):
        assert knn.main([*flags, *extra]) == 0
    got = read(tmp_path)
    assert got["protocol"]["precision"] == "bf16"
    assert got["protocol"]["train"]["dtype"] == "float16"
    arrays = [np.load(store / "features.npy") for store in (tmp_path / "features").iterdir()]
    assert sorted(str(array.dtype) for array in arrays) == 2 * ["float16"] + 2 * ["float32"]
    wide, narrow = (
        next(a for a in arrays if len(a) == 64 and a.dtype == kind) for kind in ("f4", "f2")
    )
    cosines = F.cosine_similarity(torch.tensor(wide), torch.tensor(narrow).float())
    assert cosines.min() > 0.99 and not np.array_equal(wide, narrow)


def test_the_cost_is_of_equal_numbers(tmp_path):
    sizes = "--rows 256 --width 16 --classes 10 --batch 64 --steps 3 --pictures 6400 --epochs 10"
    file = tmp_path / "cost.json"
    assert probe_cost.main([*sizes.split(), "--trial_epochs", "1", "--output", str(file)]) == 0
    found = json.loads(file.read_text())
    gap = found["greatest_weight_difference"]
    assert gap["float32"] < 1e-5 and 0 < gap["float16"] < 0.02
    whole, step = found["whole"], found["step_ms"]
    assert whole["hours"]["plain"] == pytest.approx(10 * 100 * step["plain"] / 3.6e6)
    both = 1 * step["all_rates"] + 10 * step["one_rate"]
    assert whole["ratio"]["trial"] == pytest.approx(both / (10 * step["plain"]))


def test_the_cost_of_a_batch_above_the_rows_is_a_mistake(capsys):
    line = one_error(capsys, probe_cost.main(["--rows", "10", "--batch", "64"]))
    assert "--rows must be at least 64, not 10" in line
