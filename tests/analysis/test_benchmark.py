"""The benchmark: its parts on tiny networks give rows whose figures hang together."""

import json

import pytest
import torch

from muse.analysis import benchmark_parts
from muse.analysis.benchmark_clock import count_flops, matrix_peak, peak_bytes, time_ways
from muse.analysis.benchmark_loader import bench_loader
from muse.analysis.benchmark_parts import (
    Bench,
    bench_growth,
    in_16_bits,
    require_same,
    written_out_attention,
)
from muse.analysis.benchmark_startup import bench_startup
from muse.config import load_config
from muse.errors import ConfigError
from muse.teachers import build_topology_teacher
from scripts import benchmark
from tests.helpers import MIXED_DECODER, random_images, run_config, tiny_model


@pytest.fixture
def config(tmp_path, shapes_data):
    """A stage 2 of tiny networks with every kind of block in the decoder."""
    changes = {"model": {"decoder": {"config": MIXED_DECODER}}}
    path = tmp_path / "c.yaml"
    return run_config(path, shapes_data, tmp_path / "run", "semantic_injection", changes)


def test_every_part_gives_figures_that_hang_together(config, tmp_path, capsys):
    file = tmp_path / "bench.json"
    parts = ["encode", "decode", "reconstruct", "teacher", "losses", "train_step"]
    words = ["--config", str(config), "--batch", "2", "--repeats", "2", "--output", str(file)]
    assert benchmark.main([*words, "--parts", ",".join(parts)]) == 0
    found = json.loads(file.read_text())
    assert list(found["parts"]) == parts
    assert found["machine"]["versions"]["torch"] and found["machine"]["threads"] >= 1
    for name, row in found["parts"].items():
        seconds = row["ours"]["seconds"]
        assert row["ratio"] == pytest.approx(row["plain"]["seconds"] / seconds), name
        assert row["images_per_second"] == pytest.approx(2 / seconds)
        assert 0 <= row["difference"] <= benchmark_parts.SAME["cpu"] and row["flops"] > 0
        assert 0 < row["share_of_peak"] < 2 and row["ours"]["fastest"] <= seconds
    rows = found["parts"]
    both = rows["encode"]["flops"] + rows["decode"]["flops"]
    assert rows["reconstruct"]["flops"] == both
    assert rows["train_step"]["flops"] > rows["losses"]["flops"]
    assert rows["teacher"]["over_forward"] > 0
    capsys.readouterr()
    again = [*words, "--parts", "encode", "--against", str(file)]
    assert benchmark.main(again) == 0
    assert "x the time in --against" in capsys.readouterr().out


def test_growth_is_against_operations_and_pixels(config, monkeypatch):
    bench = Bench(load_config(config, ["training.mixed_precision=no"]), repeats=2)
    rows = bench_growth(bench, (32, 64))
    small, large = rows["32"], rows["64"]
    assert small["time_over_flops"] == pytest.approx(1)
    times, flops = large["seconds"] / small["seconds"], large["flops"] / small["flops"]
    assert large["time_over_flops"] == pytest.approx(times / flops) and 3.9 < flops < 5
    if large["peak_bytes"] is not None:
        assert large["bytes_per_pixel"] == pytest.approx(large["peak_bytes"] / 64**2)


def test_in_16_bits_reports_its_own_peak(config):
    bench = Bench(load_config(config), batch=1, repeats=1)
    bench.peaks["bf16"] = 1e9
    a = torch.randn(64, 64)
    row = in_16_bits(bench, lambda: a @ a, 2 * 64**3)
    assert row["share_of_peak"] == pytest.approx(2 * 64**3 / row["seconds"] / 1e9)


def test_the_peak_is_the_best_that_was_measured(config, monkeypatch):
    bench, found = Bench(load_config(config), batch=1, repeats=1), iter([3e9, 5e9, 4e9])
    monkeypatch.setattr(benchmark_parts, "matrix_peak", lambda *_: next(found))
    assert bench.peak("float32") == 3e9
    a = torch.randn(64, 64)
    row = bench.row("product", lambda: a @ a, lambda: a @ a)  # before and after: 5 and 4
    assert bench.peak("float32") == 5e9
    assert row["share_of_peak"] == pytest.approx(2 * 64**3 / row["ours"]["seconds"] / 5e9)


@torch.no_grad()
def test_written_out_attention_gives_the_same_numbers_by_another_way(monkeypatch):
    model = tiny_model(decoder={"config": MIXED_DECODER})
    images, calls = random_images(1, 64, 64), []
    fused, real = model.reconstruct(images), torch.nn.functional.scaled_dot_product_attention
    with written_out_attention():
        monkeypatch.setattr(torch.Tensor, "softmax", _counted(torch.Tensor.softmax, calls))
        slow = model.reconstruct(images)
    assert torch.allclose(fused, slow, atol=1e-5) and len(calls) == 4  # encoder's and blocks' two
    assert torch.nn.functional.scaled_dot_product_attention is real


def _counted(real, calls):
    def softmax(self, *words, **options):
        calls.append(self.shape)
        return real(self, *words, **options)

    return softmax


def test_two_ways_that_differ_are_refused():
    same = torch.ones(3)
    assert require_same("x", (same, same), (same, same), 1e-3) == 0
    for other in (same * 1.01, same * float("nan")):
        with pytest.raises(AssertionError, match="x: the two ways differ"):
            require_same("x", other, same, 1e-3)


def test_ways_take_turns_and_warm_up_is_left_out():
    order = []
    times = time_ways({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 4
    assert all(row["fastest"] <= row["seconds"] and row["spread"] >= 0 for row in times.values())


def test_operations_and_memory_of_a_call():
    a = torch.randn(48, 64)
    assert count_flops(lambda: a @ a.T) == 2 * 48 * 64 * 48
    assert matrix_peak(side=64) > 0
    held = peak_bytes(lambda: torch.ones(64 << 20, dtype=torch.uint8))
    assert held is None or 60 << 20 < held < 100 << 20


def test_memory_that_was_freed_and_not_returned_counts_when_it_is_used_again():
    blocks = [bytearray(100_000) for _ in range(2000)]  # 200 MB below the size of mappings
    last = blocks[-1]  # at the top of the heap: what lies below it stays with the process
    blocks.clear()
    held = peak_bytes(lambda: torch.ones(64 << 20, dtype=torch.uint8))
    assert len(last) and (held is None or 60 << 20 < held < 100 << 20)


@pytest.mark.parametrize("options", [{"kind": "random"}])
def test_the_fused_forward_ends_in_the_same_tokens_and_leaves_the_maps(options):
    torch.manual_seed(0)
    teacher, images = build_topology_teacher(options, 2, (4, 4)), random_images(2, 32, 32)
    tokens, maps = [], teacher(images).maps
    hook = teacher.network.norm.register_forward_hook(lambda m, given, out: tokens.append(out))
    teacher(images)
    hook.remove()
    assert torch.allclose(teacher.forward_fused(images), tokens[0], atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(teacher(images).maps, maps))


def test_startup_runs_whole_processes():
    rows = bench_startup(repeats=1, precisions=())
    assert rows["ours"]["peak_bytes"] > rows["import_muse"]["peak_bytes"] > 1 << 20
    assert rows["memory_ratio"] == pytest.approx(
        rows["ours"]["peak_bytes"] / rows["plain"]["peak_bytes"]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "encode"], "part encode needs --config"),
        (["--parts", "speed"], "unknown part 'speed': one of evaluator"),
        (["--batch", "0"], "--batch must be at least 1, not 0"),
        (["--size", "0"], "--size must be at least 1, not 0"),
        (["--against", "/nowhere.json"], "--against /nowhere.json: not an output of this script"),
    ],
)
def test_mistakes(words, message, capsys):
    assert benchmark.main(words) == 2
    assert message in capsys.readouterr().err


def test_the_loader_and_the_plain_way_give_every_picture_and_a_resume_its_place():
    threads = torch.get_num_threads()
    rows = bench_loader(images=32, repeats=1, samples=5000)
    assert list(rows) == ["500x375", "1024x768", "resume"] and torch.get_num_threads() == threads
    for size in ("500x375", "1024x768"):
        row = rows[size]
        ratio = row["loader_images_per_s"] / row["plain_images_per_s"]
        assert row["loader_over_plain_processor"] == pytest.approx(ratio, rel=0.01)
    assert rows["resume"]["resumed_after"] == 5000 and rows["resume"]["seconds_clock"] > 0
    with pytest.raises(ConfigError, match="images at least 32"):
        bench_loader(images=8)
