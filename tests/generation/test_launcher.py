"""tools/train_generator.sh and tools/demo_generation.sh: the exact words that they run."""

import os
import shlex
import subprocess

import pytest

from tests.helpers import ROOT

PYTHON = '#!/bin/sh\nif [ "$1" = -c ]; then echo 0; exit 0; fi\nexit 9\n'


def start(folder, *words, **variables):
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["bash", *words],
        env={**keep, "MUSE_PYTHON": str(python), "DRY_RUN": "1", **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def words_of(folder, *words, **variables):
    done = start(folder, *words, **variables)
    assert done.returncode == 0, done.stderr
    return [word for word in shlex.split(done.stdout) if word != str(folder / "python")]


def test_one_process(tmp_path):
    assert words_of(tmp_path, "tools/train_generator.sh", "tiny", "training.seed=1") == [
        f"{ROOT}/scripts/train_generator.py",
        "--config",
        f"{ROOT}/configs/generation/tiny.yaml",
        "training.seed=1",
    ]


def test_environment_becomes_processes_and_overrides(tmp_path):
    words = words_of(
        tmp_path,
        "tools/train_generator.sh",
        "imagenet256_xl",
        NUM_GPUS="2",
        BATCH_SIZE="7",
        NUM_WORKERS="3",
    )
    assert words[:4] == ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    script = words.index(f"{ROOT}/scripts/train_generator.py")
    assert set(words[script + 3 :]) == {
        "training.per_gpu_batch_size=7",
        "latents.num_workers_per_gpu=3",
    }


def test_sharded(tmp_path):
    config = "configs/accelerate/fsdp.yaml"
    words = words_of(
        tmp_path, "tools/train_generator.sh", "imagenet256_xl", ACCELERATE_CONFIG=config
    )
    assert words[:4] == ["-m", "accelerate.commands.launch", "--config_file", config]
    assert f"{ROOT}/scripts/train_generator.py" in words


@pytest.mark.parametrize("words", [[], ["nothing"]])
def test_an_unknown_name_is_one_line(tmp_path, words):
    done = start(tmp_path, "tools/train_generator.sh", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "imagenet256_xl|imagenet256_b|tiny|CONFIG.yaml" in done.stderr


def test_the_demo_hands_its_flags_on(tmp_path):
    words = words_of(tmp_path, "tools/demo_generation.sh", "--fast", "--output", "a b")
    assert words == ["scripts/demo_generation.py", "--fast", "--output", "a b"]
