"""The cost of the multimodal model against formulas of its matrix products."""

import json

import pytest

from muse.multimodal.umm_cost import PROMPT_TOKENS, umm_cost
from muse.multimodal.umm_run_config import load_umm_config
from scripts import cost as script
from tests.helpers import one_error


def language_forward(tokens, width=192, inner=512, layers=4, kv=96):
    """Multiply-adds of Qwen2's layers twice: projections and MLP a token, attention a pair."""
    a_token = 2 * width * width + 2 * width * kv + 3 * width * inner
    return 2 * layers * (tokens * a_token + 2 * tokens**2 * width)


@pytest.fixture(scope="module")
def tiny():
    cfg = load_umm_config("umm_tiny/stage2", ["training.mixed_precision=bf16"])
    return umm_cost(cfg, "umm_tiny", gpus=2, utilisation=0.5, peak=1000.0)


def test_parts_and_memory_add_up(tiny):
    parts = tiny["parts"]
    assert tiny["parameters"] == sum(parts.values())
    assert parts["queries"] == 16 * 192
    language = 4 * (2 * 192**2 + 2 * 192 * 96 + 3 * 192 * 512 + 2 * 192 + 192 + 2 * 96)
    projector = 2 * 640 + (640 + 1) * 192 + (192 + 1) * 192
    assert parts["internvl"] == 1024 * 192 + language + 192 + projector
    frozen = parts["internvl"] + parts["tokenizer"]
    assert tiny["trained"] == tiny["parameters"] - frozen
    assert tiny["bytes"]["weights"] == 4 * tiny["parameters"]
    assert tiny["bytes"]["optimizer"] == 2 * tiny["bytes"]["gradients"] == 8 * tiny["trained"]


def test_operations_and_hours(tiny):
    flops = tiny["flops_training"]
    # Twice through the language model (its inputs learn, its weights do not), and the generator
    # and the rest beside it; a source picture adds 64 tokens to it and the encoder's passes.
    assert flops["image"] > 2 * language_forward(PROMPT_TOKENS + 16)
    more = language_forward(PROMPT_TOKENS + 16 + 64) - language_forward(PROMPT_TOKENS + 16)
    assert flops["edit"] > flops["image"] + more
    assert tiny["samples"] == 1200 * 32 * 2
    seconds = flops["edit"] * tiny["samples"] / 0.5e15
    assert tiny["gpu_hours_most"] == pytest.approx(seconds / 3600)


def test_guidance_doubles_all_of_a_picture_but_its_decoding(tiny):
    def unguided(steps):
        words = [f"sampling.steps={steps}", "sampling.guidance_scale=1.0"]
        return umm_cost(load_umm_config("umm_tiny/stage2", words), "umm_tiny")["flops_picture"]

    steps = load_umm_config("umm_tiny/stage2").sampling.steps
    plain, longer, guided = unguided(steps), unguided(2 * steps), tiny["flops_picture"]
    # captions + all steps once more
    assert plain < guided < 2 * plain and guided - plain > longer - plain


def test_the_command_prints_and_refuses(tmp_path, capsys):
    file = tmp_path / "cost.json"
    assert script.main(["--umm", "umm_tiny/projector", "--json", str(file)]) == 0
    printed, cost = capsys.readouterr().out, json.loads(file.read_text())
    assert f"{cost['parameters']:,} parameters" in printed
    assert cost["trained"] == 2 * 640 + (640 + 1) * 192 + (192 + 1) * 192
    assert set(cost["flops_training"]) == {"question"} and cost["flops_picture"] is None
    code = script.main(["--umm", "umm_tiny/stage2", "model.generator.config=null"])
    assert code == 2
    capsys.readouterr()
    (tmp_path / "own.yaml").write_text("model: {latent_factor: 1.0}\n")
    code = script.main(["--umm", str(tmp_path / "own.yaml")])
    assert "the cost needs model.tokenizer.config" in one_error(capsys, code)
