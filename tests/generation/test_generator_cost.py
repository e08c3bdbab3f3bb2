"""The cost of a generator against a formula of its matrix products."""

import pytest

from muse.generation.generator_config import load_generator_config
from muse.generation.generator_cost import generator_cost
from scripts import cost as script
from tests.helpers import ROOT, one_error


def forward_flops(depth, width, tokens, channels):
    """Two operations a multiply-add: attention and MLP a token, conditions once an image."""
    hidden = int(2 / 3 * 4 * width)
    block = tokens * (4 * width**2 + 3 * width * hidden) + 2 * tokens**2 * width + 6 * width**2
    outside = tokens * 2 * channels * width + 2 * width**2 + 256 * width + width**2
    return 2 * (depth * block + outside)


@pytest.mark.parametrize("name, size", [("xl", (28, 1152)), ("b", (12, 768))])
def test_operations_are_those_of_the_formula(name, size):
    cfg = load_generator_config(f"generation/imagenet256_{name}")
    cost = generator_cost(cfg, utilisation=0.5, peak=1000.0)
    assert cost["parameters"] == {"xl": 675_035_552, "b": 130_408_736}[name]
    wanted = forward_flops(*size, 64, 32)
    assert cost["flops_forward"] == pytest.approx(wanted, rel=1e-9)
    assert cost["flops_training"] == pytest.approx(3 * wanted, rel=0.01)
    assert cost["images"] == 1024 * 100_000
    seconds = cost["flops_training"] * cost["images"] / 0.5e15
    assert cost["training_gpu_hours"] == pytest.approx(seconds / 3600)
    seconds = cost["flops_forward"] * 250 * 50_000 / 0.5e15
    assert cost["sampling_gpu_hours"] == pytest.approx(seconds / 3600)


def test_guidance_and_heun_double_the_samples_cost():
    costs = [
        generator_cost(load_generator_config("generation/tiny", ["latents.shape=[8,4,4]", word]))
        for word in ("sampling.steps=50", "sampling.cfg_scale=2.0", "sampling.method=heun")
    ]
    plain, guided, heun = (cost["sampling_gpu_hours"] for cost in costs)
    assert guided == pytest.approx(2 * plain) and heun == pytest.approx(2 * plain)


def test_the_command_prints_what_the_headers_say(capsys):
    assert script.main(["--generator", "generation/imagenet256_xl"]) == 0
    printed = capsys.readouterr().out
    assert "675,035,552 parameters" in printed and "12.5 GPU-hours" in printed
    header = (ROOT / "configs/generation/imagenet256_xl.yaml").read_text()
    assert "675,035,552 parameters" in header and "12.5 GPU-hours" in header
    code = script.main(["--generator", "generation/tiny"])
    assert "the cost needs latents.shape" in one_error(capsys, code)
