import json
import pickle

import pytest
import torch
from omegaconf import OmegaConf

from muse.data import records, samples
from muse.data.dataloader import train_loader
from muse.errors import CheckpointError, ConfigError, DataError
from tests.data.helpers import (
    FAULTS,
    key,
    keys_of,
    same,
    sample,
    take,
    write_faulty,
    write_shards,
    write_tar,
)

SIZE = {"resize_shorter_edge": 16, "crop_size": 12}


def test_a_batch_holds_what_the_shards_hold(tmp_path):
    urls = write_shards(tmp_path, 2, 6)
    loader = train_loader(urls, batch_size=4, fields=("images", "text", "labels", "masks"), **SIZE)
    for batch in take(loader, 3):
        assert batch["images"].dtype == torch.float32 and batch["images"].shape == (4, 3, 12, 12)
        assert 0 <= batch["images"].min() and batch["images"].max() <= 1
        numbers = [int(name) for name in batch["keys"]]
        assert batch["text"] == [f"picture {n}" for n in numbers]
        assert (
            batch["labels"].tolist() == [n % 5 for n in numbers]
            and batch["labels"].dtype == torch.int64
        )
        assert [mask.unique().tolist() for mask in batch["masks"]] == [[n % 7] for n in numbers]
        assert set(batch) == {"images", "text", "keys", "labels", "masks"}


def test_an_epoch_over_all_ranks_and_workers_is_the_set(tmp_path):
    urls = write_shards(tmp_path, 8, 5)
    epochs = {0: [], 1: []}
    for rank in range(2):
        loader = train_loader(
            urls, batch_size=1, num_workers=2, rank=rank, world=2, shuffle_buffer=7, **SIZE
        )
        names = keys_of(
            take(loader, 40)
        )  # 4 readers with 10 samples each an epoch: 20 of this rank
        epochs[0].append(names[:20])
        epochs[1].append(names[20:])
    everything = [key(n) for n in range(40)]
    for parts in epochs.values():
        assert sorted(parts[0] + parts[1]) == everything  # complete, and no sample twice
    assert epochs[0] != epochs[1]
    assert set(epochs[0][0]) != set(epochs[1][0])  # shards change hands between epochs


def test_order_depends_on_the_seed_and_on_nothing_global(tmp_path):
    urls = write_shards(tmp_path, 4, 5)
    state = torch.get_rng_state()
    runs = [
        keys_of(take(train_loader(urls, batch_size=5, num_workers=n, seed=s, **SIZE), 8))
        for n, s in ((0, 0), (1, 0), (0, 1), (2, 0))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0] == runs[1]  # one worker process is the same stream as none
    assert runs[0] != runs[2] and runs[0] != runs[3]
    assert runs[0][:20] != sorted(runs[0][:20])


@pytest.mark.parametrize("workers, stop", [(0, 1), (0, 7), (0, 16), (1, 7), (2, 1), (2, 16)])
def test_resume_gives_the_batches_of_an_unbroken_run(tmp_path, workers, stop):
    """Through a mixture, epochs (35 and 10 samples of its sources), bad samples, random crops and
    flips.
    """
    first = write_shards(tmp_path / "a", 5, 7)
    second = write_shards(tmp_path / "b", 2, 5, first=100)
    write_tar(
        tmp_path / "a" / "t-002.tar",
        {key(n): sample(n) if n != 16 else {"png": b""} for n in range(14, 21)},
    )
    mixture = [{"urls": first, "weight": 3}, {"urls": second, "weight": 1}]
    options = dict(
        batch_size=4, num_workers=workers, shuffle_buffer=6, seed=3, max_bad_fraction=1.0, **SIZE
    )
    whole_loader = train_loader(mixture, **options)
    whole = take(whole_loader, 28)
    loader = train_loader(mixture, **options)
    head = take(loader, stop)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = train_loader(mixture, **options)
    resumed.load_state_dict(state)
    tail = take(resumed, 28 - stop)
    assert same(head + tail, whole)
    assert len(set(keys_of(whole))) == 44
    assert resumed.state_dict() == whole_loader.state_dict()
    assert same(take(loader, 28 - stop), tail)  # iterating again goes on too


def test_what_is_skipped_is_neither_decoded_nor_read(tmp_path, monkeypatch):
    urls = write_shards(tmp_path, 2, 50)
    options = dict(batch_size=5, shuffle_buffer=10, **SIZE)
    loader = train_loader(urls, **options)
    take(loader, 16)
    decoded, read = [], []
    decode, read_at = samples.decode_picture, records._read_at
    monkeypatch.setattr(samples, "decode_picture", lambda *args: decoded.append(1) or decode(*args))
    monkeypatch.setattr(records, "_read_at", lambda *args: read.append(args) or read_at(*args))
    resumed = train_loader(urls, **options)
    resumed.load_state_dict(loader.state_dict())
    take(resumed, 2)
    assert len(decoded) == 10
    assert len(read) <= 10 + 10 + 1  # two batches and the buffer


def test_resume_under_another_layout_is_approximate_and_says_so(tmp_path, caplog):
    urls = write_shards(tmp_path, 4, 5)
    loader = train_loader(urls, batch_size=2, num_workers=2, **SIZE)
    take(loader, 3)
    other = train_loader(urls, batch_size=2, num_workers=0, **SIZE)
    other.load_state_dict(loader.state_dict())
    assert "workers 2 -> 1" in caplog.text and other.epoch == 1
    take(other, 1)
    bigger = train_loader(
        urls, batch_size=3, num_workers=2, **SIZE
    )  # another batch size is no other order
    caplog.clear()
    bigger.load_state_dict(loader.state_dict())
    assert not caplog.text
    with pytest.raises(CheckpointError, match="not a data position"):
        other.load_state_dict({"batches": 3})


def test_resampled_shards_need_not_suffice(tmp_path):
    urls = write_shards(tmp_path, 1, 5)
    with pytest.raises(DataError, match="has 1 shards for 2 ranks"):
        train_loader(urls, batch_size=2, rank=0, world=2, **SIZE)
    runs = []
    for rank in (0, 1):
        loader = train_loader(urls, batch_size=2, rank=rank, world=2, resampled=True, **SIZE)
        runs.append(keys_of(take(loader, 6)))
        resumed = train_loader(urls, batch_size=2, rank=rank, world=2, resampled=True, **SIZE)
        resumed.load_state_dict(loader.state_dict())
        assert resumed.epoch == loader.epoch + 1
    assert runs[0] != runs[1] and set(runs[0]) == {key(n) for n in range(5)}


@pytest.mark.parametrize("workers", [0, 2])
def test_mixture_ratios_over_ten_thousand_samples(tmp_path, workers):
    """Three sources of very different size in the proportion 5 : 3 : 2, one of them with bad
    samples.
    """
    names = {}
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    for name, shards, per_shard in (("a", 2, 3), ("b", 4, 10), ("c", 3, 2)):
        names[name] = write_shards(tmp_path / name, shards, per_shard, name=name)
        for shard in (tmp_path / name).glob("*.tar"):
            members = {f"{name}{shard.stem}{i}": sample(i) for i in range(per_shard)}
            if name == "b":
                members["bad"] = {"txt": b"no picture"}
            write_tar(shard, members)
    mixture = OmegaConf.create(
        [{"urls": names[name], "weight": weight} for name, weight in weights.items()]
    )
    loader = train_loader(
        mixture,
        batch_size=100,
        num_workers=workers,
        cache_in_memory=True,
        max_bad_fraction=0.2,
        **SIZE,
    )
    keys = keys_of(take(loader, 100))
    assert len(keys) == 10_000
    for name, weight in weights.items():
        share = sum(one[0] == name for one in keys) / 10_000
        assert abs(share - weight) < 0.02 * weight, (name, share)


@pytest.mark.parametrize("workers, stop", [(0, 5), (2, 7)])
def test_batches_of_one_source_in_proportion_and_resumed_exactly(tmp_path, workers, stop):
    """`mix=batch`, row 46 of docs/fidelity.md: every batch has one source, drawn by the weights."""
    folders = {"a": 0.2, "b": 0.6, "c": 0.2}
    mixture = [
        {"urls": write_shards(tmp_path / name, 2, 5, first=100 * i), "weight": weight}
        for i, (name, weight) in enumerate(folders.items())
    ]
    options = dict(batch_size=4, num_workers=workers, mix="batch", shuffle_buffer=6, **SIZE)
    unbroken = train_loader(mixture, **options)
    batches = take(unbroken, 200)
    sources = [{int(name) // 100 for name in batch["keys"]} for batch in batches]
    assert all(
        len(found) == 1 and len(batch["keys"]) == 4 for found, batch in zip(sources, batches)
    )
    counts = [sources.count({i}) for i in range(3)]
    assert [abs(count / 200 - share) < 0.02 for count, share in zip(counts, (0.2, 0.6, 0.2))] == [
        True
    ] * 3
    loader = train_loader(mixture, **options)
    head = take(loader, stop)
    resumed = train_loader(mixture, **options)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert same(head + take(resumed, 200 - stop), batches)
    assert resumed.state_dict() == unbroken.state_dict()


def test_a_position_from_before_there_was_a_choice_of_mix_is_exact(tmp_path, caplog):
    urls = write_shards(tmp_path, 2, 6)
    whole = take(train_loader(urls, batch_size=3, **SIZE), 6)
    loader = train_loader(urls, batch_size=3, **SIZE)
    head = take(loader, 2)
    state = loader.state_dict()
    del state["layout"]["mix"]
    resumed = train_loader(urls, batch_size=3, **SIZE)
    resumed.load_state_dict(state)
    assert same(head + take(resumed, 4), whole) and not caplog.text
    other = train_loader(urls, batch_size=3, mix="batch", **SIZE)
    other.load_state_dict(state)
    assert "mix sample -> batch" in caplog.text


def test_mixture_faults(tmp_path):
    urls = write_shards(tmp_path, 1, 2)
    for weight in (-1, "much", float("nan"), True):
        with pytest.raises(ConfigError, match="weight of data source"):
            train_loader([{"urls": urls, "weight": weight}], batch_size=1, **SIZE)
    with pytest.raises(ConfigError, match="all data sources have weight 0"):
        train_loader([{"urls": urls, "weight": 0}], batch_size=1, **SIZE)
    for wrong in (
        {"batch_size": 0},
        {"num_workers": -1},
        {"rank": 2, "world": 2},
        {"max_bad_fraction": 2},
    ):
        with pytest.raises(ConfigError):
            train_loader(urls, **{"batch_size": 1, **SIZE, **wrong})
    with pytest.raises(ConfigError, match="unknown field 'label'"):
        train_loader(urls, batch_size=1, fields=("label",), **SIZE)


def test_cached_pictures_are_the_same_and_read_once(tmp_path, monkeypatch):
    urls = write_shards(tmp_path, 2, 8)
    options = dict(batch_size=4, shuffle_buffer=5, **SIZE)
    plain = take(train_loader(urls, **options), 12)
    decoded = []
    decode = samples.decode_picture
    monkeypatch.setattr(samples, "decode_picture", lambda *args: decoded.append(1) or decode(*args))
    loader = train_loader(urls, cache_in_memory=True, **options)
    assert same(take(loader, 6), plain[:6]) and same(take(loader, 6), plain[6:])
    assert len(decoded) == 16


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_fault_is_counted_and_skipped(tmp_path, workers):
    urls = write_faulty(tmp_path, 10)
    loader = train_loader(urls, batch_size=1, num_workers=workers, max_bad_fraction=1.0, **SIZE)
    seen = set()
    for batch in loader:
        seen.update(batch["keys"])
        if loader.epoch:
            break
    assert seen == {key(n) for n in range(13)}
    assert set(loader.bad.counts) == {*FAULTS, "truncated_tar"}
    assert (
        loader.bad.keys["empty_file"][0] == "bad_empty_file"
        and "a-1.tar" in loader.bad.keys["truncated_tar"][0]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_faults_stop_training_with_one_line(tmp_path, workers):
    urls = write_faulty(tmp_path, 10)
    with pytest.raises(
        DataError, match="of [0-9]+ samples could not be used: .*empty_file .*max_bad_fraction=0.05"
    ) as caught:
        take(
            train_loader(urls, batch_size=2, num_workers=workers, max_bad_fraction=0.05, **SIZE),
            1000,
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_usable_is_an_error_not_a_hang(tmp_path, workers):
    for i in range(2):
        write_tar(
            tmp_path / f"a-{i}.tar", {key(n): {"jpg": b"text", "txt": b"x"} for n in range(5)}
        )
    with pytest.raises(DataError) as caught:
        take(
            train_loader(
                f"{tmp_path}/a-*.tar",
                batch_size=2,
                num_workers=workers,
                max_bad_fraction=1.0,
                **SIZE,
            ),
            1,
        )
    assert "not_an_image" in str(caught.value) and "\n" not in str(caught.value)


def test_resume_over_commands_and_pickling(tmp_path):
    """Streams resume exactly too; a spec survives pickle, as spawned workers need it."""
    write_shards(tmp_path, 2, 6)
    urls = f"pipe:cat {tmp_path}/t-{{000..001}}.tar"
    whole = take(train_loader(urls, batch_size=5, shuffle_buffer=4, **SIZE), 6)
    loader = train_loader(urls, batch_size=5, shuffle_buffer=4, **SIZE)
    head = take(loader, 4)
    resumed = train_loader(urls, batch_size=5, shuffle_buffer=4, **SIZE)
    resumed.load_state_dict(loader.state_dict())
    resumed.spec = pickle.loads(pickle.dumps(resumed.spec))
    assert same(head + take(resumed, 2), whole)
