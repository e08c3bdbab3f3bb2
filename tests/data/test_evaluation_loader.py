import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from muse.config import load_config
from muse.data.dataloader import build_eval_loader, eval_loader
from muse.data.decode import decode_image
from muse.data.eval import SHARD_STRIDE, spread_sample
from muse.data.tar import TarSource
from muse.errors import ConfigError, DataError
from tests.data.helpers import (
    FAULTS,
    encode,
    key,
    keys_of,
    sample,
    write_faulty,
    write_shards,
    write_tar,
)

SIZE = {"resize_shorter_edge": 16, "crop_size": 12}


@pytest.mark.parametrize("workers, world", [(0, 1), (2, 1), (0, 3), (2, 2)])
def test_evaluation_sees_each_sample_once_in_order(tmp_path, workers, world):
    """23 samples in 2 shards, more readers than shards."""
    write_shards(tmp_path, 1, 20)
    write_shards(tmp_path, 1, 3, first=20, name="u")
    whole = list(eval_loader(str(tmp_path), batch_size=4, fields=("images", "labels"), **SIZE))
    ranks = []
    for rank in range(world):
        loader = eval_loader(
            str(tmp_path),
            batch_size=4,
            fields=("images", "labels"),
            num_workers=workers,
            rank=rank,
            world=world,
            **SIZE,
        )
        batches = list(loader)
        assert len(batches) == len(loader) and loader.num_samples == 23
        ranks += batches
    indices = torch.cat([batch["indices"] for batch in ranks])
    assert indices.tolist() == list(range(23))
    assert keys_of(ranks) == [key(n) for n in range(23)]
    images = torch.cat([batch["images"] for batch in ranks])
    assert torch.equal(images, torch.cat([batch["images"] for batch in whole]))
    assert torch.cat([batch["labels"] for batch in ranks]).tolist() == [n % 5 for n in range(23)]
    assert len(whole[-1]["keys"]) == 3


@pytest.mark.parametrize("workers, world", [(0, 1), (2, 2)])
def test_evaluation_of_streams(tmp_path, workers, world):
    """`pipe:` shards: too few to share out (one) or enough (four)."""
    write_shards(tmp_path, 4, 5)
    few = f"pipe:cat {tmp_path}/t-000.tar"
    many = [f"pipe:cat {tmp_path}/t-00{i}.tar" for i in range(4)]
    for urls, count in ((few, 5), (many, 20)):
        found = {}
        for rank in range(world):
            loader = eval_loader(
                urls, batch_size=2, num_workers=workers, rank=rank, world=world, **SIZE
            )
            assert loader.num_samples is None
            for batch in loader:
                for index, name in zip(batch["indices"].tolist(), batch["keys"], strict=True):
                    assert name not in found
                    found[name] = index
        assert sorted(found, key=found.get) == [key(n) for n in range(count)]
    if world * max(1, workers) > 1:
        assert found[key(5)] == SHARD_STRIDE, spread_sample


def test_max_images_and_whole_pictures(tmp_path):
    urls = write_shards(tmp_path, 3, 4)
    parts = [
        eval_loader(urls, batch_size=2, max_images=7, rank=r, world=2, **SIZE) for r in range(2)
    ]
    assert [i for loader in parts for batch in loader for i in batch["indices"].tolist()] == list(
        range(7)
    )
    assert parts[0].num_samples == 7
    streamed = eval_loader(f"pipe:cat {tmp_path}/t-000.tar", batch_size=2, max_images=3, **SIZE)
    assert keys_of(streamed) == [key(n) for n in range(3)]
    whole = next(iter(eval_loader(urls, batch_size=1, resize_shorter_edge=None, crop_size=None)))
    assert whole["images"].shape == (1, 3, 16, 20)
    for wrong in ({"max_images": 0}, {"crop_size": None}):
        with pytest.raises(ConfigError):
            eval_loader(urls, **{"batch_size": 2, **SIZE, **wrong})


@pytest.mark.parametrize("workers, world", [(0, 1), (2, 2)])
def test_a_seeded_sample_is_of_the_whole_set(tmp_path, workers, world):
    """6 of 4 shards of 5: the same for any number of readers, from every shard."""
    urls = write_shards(tmp_path, 4, 5)

    def keys(seed, count=6):
        options = dict(batch_size=2, max_images=count, sample_seed=seed, num_workers=workers)
        loaders = [eval_loader(urls, rank=r, world=world, **options, **SIZE) for r in range(world)]
        assert {loader.num_samples for loader in loaders} == {min(count, 20)}
        return [name for loader in loaders for name in keys_of(loader)]

    wanted = [key(place) for place in spread_sample(20, 6, seed=3)]
    assert keys(3) == wanted and keys(4) != wanted
    assert {int(name) // 5 for name in wanted} == {0, 1, 2, 3}
    assert keys(3, count=99) == [key(n) for n in range(20)]


def test_a_sample_holds_each_place_alike_and_all_classes():
    """Every place has the same chance; of 10 classes in a row, 20 drawn places have two each."""
    counts = torch.zeros(100)
    for seed in range(2000):
        places = spread_sample(100, 20, seed)
        assert places == sorted(set(places)) and len(places) == 20
        assert [sum(place // 10 == label for place in places) for label in range(10)] == [2] * 10
        counts[places] += 1
    share = counts / 2000  # a fifth each, with a standard error of .009
    assert 0.155 < float(share.min()) < float(share.max()) < 0.245
    assert spread_sample(7, 7, 0) == list(range(7))
    assert spread_sample(1000, 3, 5) == spread_sample(1000, 3, 5) != spread_sample(1000, 3, 6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_turn_with_their_pictures(tmp_path, orientation):
    """A mask that repeats one channel of its picture still does so when both stand upright."""
    stored = np.random.default_rng(0).integers(0, 200, (16, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    members = {
        "png": encode(Image.fromarray(stored), "PNG", exif=exif),
        "seg.png": encode(Image.fromarray(stored[..., 1])),
    }
    write_tar(tmp_path / "a.tar", {key(0): members})
    size = {"resize_shorter_edge": None, "crop_size": None}
    (batch,) = eval_loader(str(tmp_path), batch_size=1, fields=("images", "masks"), **size)
    assert batch["images"].shape[-2:] == ((16, 20) if orientation < 5 else (20, 16))
    assert torch.equal(batch["masks"][0], (batch["images"][0, 1] * 255).round().long())
    upright = decode_image(members["png"])
    assert np.array_equal(upright, ImageOps.exif_transpose(Image.open(io.BytesIO(members["png"]))))


def test_the_configurations_limit_is_of_its_own_evaluation_set(tmp_path):
    """Data that is named besides it is measured whole."""
    write_shards(tmp_path, 2, 4)
    overrides = [
        f"dataset.params.eval_shards_path_or_url={tmp_path}/t-*.tar",
        "dataset.params.max_eval_images=3",
    ]
    cfg = load_config("configs/default.yaml", overrides)
    assert build_eval_loader(cfg).num_samples == 3
    assert build_eval_loader(cfg, max_images=5).num_samples == 5
    assert build_eval_loader(cfg, source=str(tmp_path)).num_samples == 8
    assert build_eval_loader(cfg, source=str(tmp_path), max_images=2).num_samples == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_counts_bad_samples_and_stops_above_one_percent(tmp_path, workers):
    members = {key(n): sample(n) for n in range(12)}
    members[key(5)] = FAULTS["truncated_image"]
    write_tar(tmp_path / "a.tar", members)
    options = dict(batch_size=4, num_workers=workers, **SIZE)
    loader = eval_loader(str(tmp_path), max_bad_fraction=0.1, **options)
    indices = [batch["indices"].tolist() for batch in loader]
    assert indices == [[0, 1, 2, 3], [4, 6, 7], [8, 9, 10, 11]]
    assert loader.bad.counts == {"truncated_image": 1} and loader.bad.seen == 12
    list(loader)
    assert loader.bad.seen == 12  # every pass counts anew
    with pytest.raises(
        DataError, match="1 of 12 samples could not be used: truncated_image 1 .00005."
    ):
        list(eval_loader(str(tmp_path), **options))
    with pytest.raises(DataError, match="missing_label 1 .00005.|truncated_image"):
        list(eval_loader(str(tmp_path), fields=("labels",), **options))


def test_evaluation_refuses_broken_or_empty_or_changed_shards(tmp_path):
    urls = write_faulty(tmp_path, 2)
    with pytest.raises(DataError, match=r"a-1.tar breaks off \(truncated_tar\) after 3 samples"):
        eval_loader(urls, batch_size=2, max_bad_fraction=1.0, **SIZE)
    cut = TarSource(f"pipe:head -c 3000 {tmp_path}/a-0.tar", attempts=1)
    with pytest.raises(DataError, match="breaks off"):
        list(eval_loader(cut, batch_size=2, max_bad_fraction=1.0, max_images=50, **SIZE))
    write_tar(tmp_path / "none.tar", {})
    with pytest.raises(DataError, match="holds no samples"):
        eval_loader(f"{tmp_path}/none.tar", batch_size=2, **SIZE)
    good = write_shards(tmp_path / "good", 1, 4)
    loader = eval_loader(good, batch_size=2, **SIZE)
    write_shards(tmp_path / "good", 1, 3)
    with pytest.raises(DataError, match="3 samples read where 4 were counted"):
        list(loader)
    shutil.rmtree(tmp_path / "good")


@pytest.mark.parametrize("workers", [0, 2])
def test_each_fault_is_counted_once(tmp_path, workers):
    write_faulty(tmp_path, 10)
    options = dict(
        batch_size=4, num_workers=workers, fields=("images", "text"), max_bad_fraction=1.0
    )
    evaluation = eval_loader(f"{tmp_path}/a-0.tar", **options, **SIZE)
    assert keys_of(evaluation) == [key(n) for n in range(10)]
    assert evaluation.bad.counts == dict.fromkeys(FAULTS, 1) and evaluation.bad.seen == 10 + len(
        FAULTS
    )
