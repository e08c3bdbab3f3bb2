"""Mixtures: one kind a batch, the same kind on every process, shares by weight, exact resumes."""

import pytest

from muse.errors import CheckpointError, ConfigError, DataError
from muse.multimodal.umm_loader import (
    build_kinds_eval_loaders,
    build_kinds_loader,
    sources_by_kind,
)
from muse.multimodal.umm_run_config import load_umm_config
from muse.multimodal.umm_samples import kind_of_batch
from tests.data.helpers import encode, picture, same, take, write_tar
from tests.multimodal.runs import mixture, write_kinds, write_umm_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    write_kinds(folder)
    return folder


@pytest.fixture
def config(data, tmp_path):
    def make(kinds, *changes):
        own = {
            "train_shards_path_or_url": mixture(data, kinds),
            "eval_shards_path_or_url": mixture(data, kinds, "val"),
        }
        path = write_umm_config(
            tmp_path / "c.yaml",
            data,
            tmp_path / "run",
            tmp_path,
            {"dataset": {"params": own}},
            *changes,
        )
        return load_umm_config(path)

    return make


def test_a_batch_holds_one_kind_and_kinds_come_by_their_weights(config):
    cfg = config({"image": 1.0, "edit": 0.5, "question": 0.5})
    batches = take(build_kinds_loader(cfg), 40)
    kinds = [kind_of_batch(batch) for batch in batches]
    shares = {kind: kinds.count(kind) for kind in ("image", "edit", "question")}
    assert shares == pytest.approx({"image": 20, "edit": 10, "question": 10}, abs=1)
    assert {len(batch["keys"]) for batch in batches} == {3}


def test_all_processes_take_the_same_kind_with_samples_of_their_own(config):
    cfg = config({"image": 1.0, "edit": 1.0})
    both = [take(build_kinds_loader(cfg, rank=rank, world=2), 12) for rank in range(2)]
    kinds = [[kind_of_batch(batch) for batch in batches] for batches in both]
    assert kinds[0] == kinds[1] and set(kinds[0]) == {"image", "edit"}
    # An epoch is a shard for each: of either kind the first batch.
    texts = [{text for batch in batches[:2] for text in batch["text"]} for batches in both]
    assert len(texts[0]) == 6 and not texts[0] & texts[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resume_goes_on_with_the_same_batches(config, workers):
    cfg = config(
        {"image": 1.0, "edit": 0.7}, {"dataset": {"params": {"num_workers_per_gpu": workers}}}
    )
    whole = take(build_kinds_loader(cfg), 9)
    first = build_kinds_loader(cfg)
    take(first, 4)
    second = build_kinds_loader(cfg)
    second.load_state_dict(first.state_dict())
    assert same(take(second, 5), whole[4:])


def test_a_kind_that_was_added_starts_at_its_beginning(config):
    state = build_kinds_loader(config({"image": 1.0})).state_dict()
    loader = build_kinds_loader(config({"image": 1.0, "edit": 1.0}))
    loader.load_state_dict(state)
    assert {kind_of_batch(batch) for batch in take(loader, 6)} == {"image", "edit"}
    with pytest.raises(CheckpointError, match="not a position"):
        loader.load_state_dict({"batches": 3})


def test_faults_of_all_kinds_are_counted(config, data, tmp_path):
    bad = {f"{n}": {"png": encode(picture(n)), "json": b"{"} for n in range(2)}
    good = {f"{n}": {"png": encode(picture(n)), "txt": b"x"} for n in range(2, 5)}
    write_tar(tmp_path / "bad.tar", {**bad, **good})
    sources = [
        {"urls": f"{tmp_path}/bad.tar", "kind": "image"},
        {"urls": f"{tmp_path}/bad.tar", "kind": "question"},
    ]
    cfg = config({"image": 1.0}, {"dataset": {"params": {"train_shards_path_or_url": sources}}})
    loader = build_kinds_loader(cfg)
    with pytest.raises(DataError, match="not one of the 5 samples"):
        take(loader, 10)
    assert loader.bad.counts == {"bad_json": 2, "missing_question": 3}
    assert loader.bad.summary().startswith("5 of 5 samples") and loader.retries == 0


def test_evaluation_sees_each_sample_once(config):
    for world in (1, 2):
        seen = []
        for rank in range(world):
            loaders = build_kinds_eval_loaders(
                config({"image": 1.0, "edit": 1.0, "question": 1.0}), rank=rank, world=world
            )
            seen += [(k, key) for k, (one,) in loaders.items() for b in one for key in b["keys"]]
        assert len(seen) == len(set(seen)) == 15


def test_forms_of_a_source():
    assert sources_by_kind("a.tar") == {"image": [("a.tar", 1.0)]}
    assert sources_by_kind(["a.tar", "b.tar"]) == {"image": [(["a.tar", "b.tar"], 1.0)]}
    edit = {"urls": "a.tar", "kind": "edit"}
    assert sources_by_kind(edit) == {"edit": [(edit, 1.0)]}
    with pytest.raises(ConfigError, match="must be one of image, edit, question, got 'edits'"):
        sources_by_kind([{"urls": "a.tar", "kind": "edits"}])
