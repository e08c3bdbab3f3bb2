"""Statistics: against plain means, over parts and processes, through files, and their inverse."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import save_file

from muse.errors import CheckpointError, DataError, MuseError
from muse.generation import LatentStatistics

SHA, OTHER = "a" * 64, "b" * 64
OVER = {"channel": (0, 2, 3), "position": (0,)}


@pytest.fixture
def latents():
    """(50, 3, 2, 4), far from zero, where a sum of squares would lose its digits."""
    scale = torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1)
    return (1000 + scale * torch.randn(50, 3, 2, 4)).float()


def statistics_of(*batches, kind="channel", sha=SHA):
    statistics = LatentStatistics(kind, sha)
    for batch in batches:
        statistics.update(batch)
    return statistics


@pytest.mark.parametrize("kind", OVER)
def test_mean_and_deviation_are_those_of_all_latents(latents, kind):
    statistics = statistics_of(*latents.split(7), kind=kind)
    values = latents.double()
    mean = values.mean(OVER[kind], keepdim=True)[0]
    std = values.std(OVER[kind], correction=0, keepdim=True)[0]
    assert statistics.count == 50 and statistics.shape == (3, 2, 4)
    assert torch.allclose(statistics.mean, mean, rtol=1e-14, atol=0)
    assert torch.allclose(statistics.std, std, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", OVER)
def test_two_halves_merged_are_the_whole(latents, kind):
    whole = statistics_of(latents, kind=kind)
    merged = statistics_of(latents[:19], kind=kind)
    merged.merge(statistics_of(latents[19:], kind=kind))
    merged.merge(LatentStatistics(kind, SHA))  # a process that saw nothing
    assert merged.count == 50
    assert torch.allclose(merged.mean, whole.mean, rtol=1e-14, atol=0)
    assert torch.allclose(merged.std, whole.std, rtol=1e-10, atol=0)


def gather_in_one_of_two(rank: int, folder: Path, latents: torch.Tensor) -> None:
    """What this process gathers goes to a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = statistics_of(*(latents[:20], latents[20:])[rank : rank + 1])
    mine.gathered().save(folder / f"{rank}.safetensors")
    dist.destroy_process_group()


def test_statistics_over_processes(latents, tmp_path):
    """Both processes get the statistics of all."""
    mp.spawn(gather_in_one_of_two, (tmp_path, latents), nprocs=2)
    totals = [LatentStatistics.load(tmp_path / f"{rank}.safetensors", SHA) for rank in range(2)]
    whole = statistics_of(latents)
    assert [total.count for total in totals] == [50] * 2
    assert all(torch.equal(total.mean, totals[0].mean) for total in totals)
    assert torch.allclose(totals[0].std, whole.std, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", OVER)
def test_normalised_latents_have_mean_0_and_deviation_1_and_come_back(latents, kind):
    statistics = statistics_of(latents, kind=kind)
    normal = statistics.normalise(latents)
    assert normal.dtype == torch.float32
    assert normal.double().mean(OVER[kind]).abs().max() < 1e-3
    assert (normal.double().std(OVER[kind], correction=0) - 1).abs().max() < 1e-3
    assert torch.allclose(statistics.denormalise(normal), latents, rtol=1e-6)
    assert statistics.normalise(latents.half()).dtype == torch.float32


def test_a_channel_that_never_changes_becomes_zero_and_comes_back():
    latents = torch.full((4, 1, 2, 2), 3.0)
    statistics = statistics_of(latents)
    assert torch.equal(statistics.normalise(latents), torch.zeros(4, 1, 2, 2))
    assert torch.equal(statistics.denormalise(torch.zeros(4, 1, 2, 2)), latents)


@pytest.mark.parametrize("kind", OVER)
def test_a_file_holds_everything(latents, kind, tmp_path):
    file = tmp_path / "made" / "statistics.safetensors"
    first = statistics_of(latents[:30], kind=kind)
    first.save(file)
    with safe_open(file, framework="pt") as content:
        facts = content.metadata()
    assert (facts["kind"], facts["count"], facts["tokenizer_sha256"]) == (kind, "30", SHA)
    loaded = LatentStatistics.load(file, SHA)
    assert torch.equal(loaded.mean, first.mean) and torch.allclose(
        loaded.std, first.std, rtol=1e-14
    )
    loaded.update(latents[30:])
    assert torch.allclose(loaded.std, statistics_of(latents, kind=kind).std, rtol=1e-10, atol=0)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_statistics_of_another_tokenizer_are_refused(latents, tmp_path):
    file = tmp_path / "statistics.safetensors"
    statistics_of(latents).save(file)
    with pytest.raises(CheckpointError, match=f"{file}.*another tokenizer.*aaaaaaaaaaaa,.*bbbb"):
        LatentStatistics.load(file, OTHER)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        statistics_of(latents).merge(statistics_of(latents, sha=OTHER))


def test_a_file_of_another_kind_is_one_line(tmp_path):
    text, tensors = tmp_path / "text.safetensors", tmp_path / "weights.safetensors"
    text.write_text("no tensors here")
    save_file({"mean": torch.zeros(1), "std": torch.ones(1)}, tensors)
    for file in (text, tensors, tmp_path / "missing.safetensors"):
        with pytest.raises(CheckpointError, match=f"{file}: not statistics of latents") as caught:
            LatentStatistics.load(file)
        assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_one_line(latents, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MuseError, match="cannot be written"):
        statistics_of(latents).save(tmp_path / "file" / "statistics.safetensors")


def test_what_cannot_be_counted_is_named(latents, tmp_path):
    statistics = statistics_of(latents)
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        statistics.update(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"\(3, 4, 2\) after latents of \(3, 2, 4\)"):
        statistics.update(torch.zeros(1, 3, 4, 2))
    with pytest.raises(DataError, match="NaN"):
        statistics.update(torch.full((1, 3, 2, 4), float("nan")))
    with pytest.raises(ValueError, match="by channel .* by position"):
        statistics.merge(LatentStatistics("position", SHA))
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 4\), statistics of \(3, 2, 4\)"):
        statistics.normalise(torch.zeros(1, 4, 2, 4))
    with pytest.raises(ValueError, match="kind must be one of channel, position, got 'token'"):
        LatentStatistics("token")
    with pytest.raises(ValueError, match="no latents"):
        LatentStatistics().save(tmp_path / "empty.safetensors")
    assert statistics.count == 50 and not list(tmp_path.iterdir())
