"""Kill, signal and starve training runs many times, and print what was lost (docs/reliability.md).

`python tools/study_faults.py --output DIR`

Each run is the real script (`scripts/train_stageN.py`) on configs/muse_tiny with very small parts
and drawn pictures, in a process of its own (forked from one that has torch imported), and each is
compared with the same run left alone: weights, averages, optimizers, generators, data position and
log, bit for bit.
"""

import argparse
import multiprocessing
import os
import random
import resource
import runpy
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from muse.experiments.demo_data import make_demo_data  # noqa: E402
from tools.killing import differences, hold_whole, kill_often, logged, wait_for  # noqa: E402

STAGES = {1: "topology_warmup", 2: "semantic_injection", 3: "synergistic_tuning"}
EVERY = 5  # steps between checkpoints of the study
# Laid over configs/muse_tiny: nothing to download, steps of some milliseconds.
SMALL = (
    "model.dim=32",
    "model.num_heads=2",
    "model.num_blocks=2",
    "model.unshuffle=1",
    "model.latent_dim=8",
    "model.semantic_dim=16",
    "model.encoder.config={hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, "
    "num_attention_heads: 2, image_size: [32, 32], patch_size: [8, 8], attention_bias: true}",
    "model.decoder.config={latent_channels: 8, decoder_block_types: ResBlock, "
    "decoder_block_out_channels: [8, 8, 8, 8], decoder_layers_per_block: [0, 1, 1, 1], "
    "decoder_qkv_multiscales: [[], [], [], []], upsample_block_type: interpolate}",
    "teacher.topology.kind=random",
    "teacher.text.kind=random",
    "teacher.text.config={dim: 16}",
    "losses.perceptual.name=random",
    "losses.perceptual.blocks=null",
    "dataset.preprocessing.resize_shorter_edge=32",
    "dataset.preprocessing.crop_size=32",
    "dataset.params.shuffle_buffer=16",
    "training.per_gpu_batch_size=4",
    "experiment.log_every=1",
)
ADVERSARY = (
    "losses.adversarial.weight=0.1",
    "losses.adversarial.base_channels=8",
    "losses.adversarial.num_stages=1",
)


def run_script(stage: int, argv: list[str], log: str, data: str, limit: int) -> None:
    """The stage's script as its command line runs it.

    Args:
        stage: its number.
        argv: the script's arguments.
        log: the file that takes what it says.
        data: the folder of the demo data.
        limit: bytes that a file may grow to; -1: any size.
    """
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    os.environ.update(MUSE_DATA=data, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    script = ROOT / f"scripts/train_stage{stage}.py"
    sys.argv = [str(script), *argv]
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    runpy.run_path(str(script), run_name="__main__")


class Script:
    """A training process with `pid`, `poll` and `wait`."""

    def __init__(self, *arguments):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            [
                "muse.training.tokenizer_task",
                "muse.training.main",
                "muse.data.dataloader",
                "transformers.models.internvl.modeling_internvl",
                "diffusers.models.autoencoders.autoencoder_dc",
            ]
        )
        self._process = context.Process(target=run_script, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


class Study:
    """Runs of one stage each, in folders below `work`."""

    def __init__(self, work: Path, seed: int):
        self.work, self.rng = work, random.Random(seed)
        self.data = work / "data"
        if not self.data.is_dir():
            make_demo_data(
                kind="shapes", output=self.data, images=64, val_images=8, size=32, workers=1
            )

    def start(
        self, stage: int, output: Path, steps: int, log: Path | None = None, limit: int = -1
    ) -> Script:
        """One start of the stage's command."""
        argv = [
            "--config",
            str(ROOT / f"configs/muse_tiny/stage{stage}.yaml"),
            "--device",
            "cpu",
            *SMALL,
            *(ADVERSARY if stage == 3 else ()),
            "experiment.init_from=null",
            f"experiment.output_dir={output}",
            f"training.max_train_steps={steps}",
            f"experiment.save_every={EVERY}",
            "experiment.keep_last=2",
        ]
        return Script(stage, argv, str(log or self.work / "log"), str(self.data), limit)

    def alone(self, stage: int, steps: int) -> Path:
        """The run that nobody disturbs."""
        output = self.work / f"alone-{stage}-{steps}"
        if not (output / "final").is_dir() and self.start(stage, output, steps).wait() != 0:
            raise RuntimeError(f"the undisturbed run failed; see {self.work / 'log'}")
        return output

    def end(self, whole: Path, output: Path, steps: int) -> str:
        """How the end compares, in words."""
        unequal = differences(whole, output)
        return (
            f"the end differs: {', '.join(unequal)}"
            if unequal
            else f"the end equals the unbroken run of {steps} steps"
        )

    def kills(self, stage: int, kills: int) -> tuple[str, int, str]:
        """SIGKILL at random instants."""
        steps = 6 * kills
        begun = time.monotonic()
        whole, output = self.alone(stage, steps), self.work / f"killed-{stage}"
        step_time = (time.monotonic() - begun) / steps
        found = kill_often(
            lambda: self.start(stage, output, steps), output, kills, self.rng, step_time
        )
        aims, lost = (
            Counter(kill.aim for kill in found),
            [max(0, kill.logged - kill.saved) for kill in found],
        )
        torn = sum(bool(kill.unfinished) for kill in found)
        aimed = ", ".join(f"{n} aimed at a {aim}" for aim, n in sorted(aims.items()))
        return (
            f"SIGKILL, stage {stage}",
            len(found),
            f"at most {max(lost)} logged steps a kill (saved every {EVERY}), {sum(lost)} in all; "
            f"{torn} left a half-written save or removal ({aimed}); "
            f"{self.end(whole, output, steps)}",
        )

    def signals(self, name: str, times: int) -> tuple[str, int, str]:
        """A cluster's warning."""
        steps, stage = 12 * max(1, times), 2
        whole, output = self.alone(stage, steps), self.work / f"signalled-{name}"
        lost, codes = [0], Counter()
        for _ in range(times):
            before = hold_whole(output)
            process = self.start(stage, output, steps)
            if not wait_for(lambda before=before: logged(output) > before, process):
                raise RuntimeError("the run ended before it was signalled")
            os.kill(process.pid, getattr(signal, name))
            codes[process.wait()] += 1
            lost.append(logged(output) - hold_whole(output))
        self.start(stage, output, steps).wait()
        return (
            name,
            times,
            f"{max(lost)} steps; exit codes {dict(codes)}; {self.end(whole, output, steps)}",
        )

    def refused_writes(self, limits: list[int]) -> tuple[str, int, str]:
        """From the second checkpoint on files may grow to so many bytes only: the system refuses as
        a full disk does.
        """
        steps, stage = 3 * EVERY, 3
        whole, output = self.alone(stage, steps), self.work / "full"
        messages, codes, kept = 0, Counter(), []
        self.start(stage, output, EVERY).wait()
        for limit in limits:
            log = self.work / f"full-{limit}.log"
            codes[self.start(stage, output, steps, log, limit).wait()] += 1
            text = log.read_text()
            messages += sum(line.startswith("error: ") for line in text.splitlines())
            if "Traceback" in text:
                raise RuntimeError(f"a traceback; see {log}")
            kept.append(hold_whole(output))
        self.start(stage, output, steps).wait()
        return (
            "the system refuses a write (RLIMIT_FSIZE)",
            len(limits),
            f"nothing before it: checkpoints of steps {min(kept)} to {max(kept)} stayed whole; "
            f"exit codes {dict(codes)}, {messages} error lines; "
            f"with room again {self.end(whole, output, steps)}",
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="an empty folder for the runs")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs for each stage")
    parser.add_argument("--signals", type=int, default=5, help="of SIGTERM and of SIGUSR1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    study = Study(args.output.resolve(), args.seed)
    print("| fault | times | what was lost |\n|---|---|---|", flush=True)
    for stage in STAGES:
        print("| {} | {} | {} |".format(*study.kills(stage, args.kills)), flush=True)
    for name in ("SIGTERM", "SIGUSR1"):
        print("| {} | {} | {} |".format(*study.signals(name, args.signals)), flush=True)
    print(
        "| {} | {} | {} |".format(
            *study.refused_writes([10_000, 30_000, 60_000, 100_000, 200_000])
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
