"""The launchers: the exact words they run, on one machine and many; signals and Slurm's queue."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from tests.helpers import ROOT, run_config

STAGE1 = str(ROOT / "configs/muse_1b/stage1.yaml")
SCRIPT = str(ROOT / "scripts/train_stage1.py")
TORCHRUN = ["-m", "torch.distributed.run"]
AWKWARD = [
    "dataset.params.train_shards_path_or_url=/a b/{000000..000003}.tar",
    "optimizer.lr_multipliers={'^encoder\\.': 0.5}",
    'experiment.name=it\'s $HOME "quoted"',
]

# In place of Python: `-c` asks for the number of GPUs, anything else would start a run.
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then echo "$FAKE_GPUS"; exit 0; fi
exec "$REAL_PYTHON" "$FAKE_TRAINING" "$@"
"""
SCONTROL = """#!/bin/sh
echo "$@" >> "$CALLS"
[ "$1" = show ] && printf 'node-a\\nnode-b\\n'
exit 0
"""
# As srun does: runs the command once a node, and passes SIGUSR1 to the tasks it started, or
# (REACH=tree) to every process of the step.
SRUN = """#!/bin/sh
exec "$REAL_PYTHON" - "$@" <<'END'
import os, psutil, signal, subprocess, sys
words = sys.argv[1:]
nodes = next(int(word.split("=")[1]) for word in words if word.startswith("--nodes="))
while words[0].startswith("--"):
    words.pop(0)
def start(node):
    return subprocess.Popen(words, env={**os.environ, "SLURM_NODEID": str(node)})
tasks = [start(node) for node in range(nodes)]
def forward(*_):
    for task in map(lambda task: psutil.Process(task.pid), tasks):
        below = task.children(recursive=True) if os.environ.get("REACH") == "tree" else []
        for process in [task, *below]:
            process.send_signal(signal.SIGUSR1)
signal.signal(signal.SIGUSR1, forward)
sys.exit(max(abs(task.wait()) for task in tasks))
END
"""
# As torchrun does: the run is a process of a session of its own, and a launcher that gets SIGUSR1
# ends with its run unsaved. The run itself saves on SIGUSR1, as the trainer does.
TRAINING = """
import os, signal, subprocess, sys, time
if "RANK" not in os.environ:
    command, environment = [sys.executable, *sys.argv], {**os.environ, "RANK": "0"}
    sys.exit(subprocess.call(command, env=environment, start_new_session=True))
signals = []
signal.signal(signal.SIGUSR1, lambda *_: signals.append(1))
names = ("NODE_RANK", "MASTER_ADDR", "NUM_GPUS")
with open(os.environ["CALLS"], "a") as file:
    print("started", *(os.environ[name] for name in names), file=file)
end = time.time() + float(os.environ.get("LASTS", 30))
while not signals and time.time() < end:
    time.sleep(0.02)
time.sleep(0.3)  # saving takes a while
with open(os.environ["CALLS"], "a") as file:
    print("saved" if signals else "ended", os.environ["NODE_RANK"], file=file)
sys.exit(0 if signals or "LASTS" in os.environ else 3)
"""


@pytest.fixture
def machine(tmp_path):
    """Environment with stand-ins for Python, Slurm and nvidia-smi first on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "training.py").write_text(TRAINING)
    (tmp_path / "calls").touch()
    for name, text in {
        "python": PYTHON,
        "scontrol": SCONTROL,
        "srun": SRUN,
        "nvidia-smi": "#!/bin/sh\nexit 9\n",
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    outer = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "NUM_", "MASTER", "NODE_RANK", "BATCH"))
    }
    return {
        **outer,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "MUSE_PYTHON": str(folder / "python"),
        "REAL_PYTHON": sys.executable,
        "FAKE_GPUS": "0",
        "FAKE_TRAINING": str(tmp_path / "training.py"),
        "CALLS": str(tmp_path / "calls"),
        "OMP_NUM_THREADS": "1",
    }


def dry_run(environment, *words, script="train_stage1.sh", **more):
    """The command lines a launcher prints, as lists of words without the Python in front."""
    done = subprocess.run(
        ["bash", ROOT / "tools" / script, *words],
        env={**environment, **more, "DRY_RUN": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [
        [word for word in shlex.split(line) if word != environment["MUSE_PYTHON"]]
        for line in done.stdout.splitlines()
    ]


def refusal(environment, *words, script="train_stage1.sh", **more):
    done = subprocess.run(
        ["bash", ROOT / "tools" / script, *words],
        env={**environment, **more},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and done.stderr.startswith("error: ")
    ), done.stderr
    return done.stderr


# --- one machine
def test_one_process_needs_no_launcher(machine):
    assert dry_run(machine, "muse_1b", *AWKWARD) == [[SCRIPT, "--config", STAGE1, *AWKWARD]]
    assert dry_run(machine, "muse_1b", FAKE_GPUS="1") == [[SCRIPT, "--config", STAGE1]]


def test_every_stage_has_its_launcher(machine):
    for stage in "0123":
        (line,) = dry_run(machine, "muse_tiny", script=f"train_stage{stage}.sh")
        assert line == [
            str(ROOT / f"scripts/train_stage{stage}.py"),
            "--config",
            str(ROOT / f"configs/muse_tiny/stage{stage}.yaml"),
        ]


def test_a_training_launcher_without_a_variant_means_muse_1b(machine):
    recipe = ["--recipe", "release", "training.seed=3"]
    assert dry_run(machine) == [[SCRIPT, "--config", STAGE1]]
    assert dry_run(machine, *recipe) == [[SCRIPT, "--config", STAGE1, *recipe]]
    assert dry_run(machine, "training.seed=3") == [[SCRIPT, "--config", STAGE1, "training.seed=3"]]
    (tiny,) = dry_run(machine, "muse_tiny", *recipe)
    assert tiny[1:] == ["--config", str(ROOT / "configs/muse_tiny/stage1.yaml"), *recipe]
    assert "usage: tools/train_stage1.sh" in refusal(machine, "muse_9b")


def test_a_configuration_s_name_may_hold_an_equals_sign(machine, tmp_path):
    own = tmp_path / "run=1.yaml"
    own.write_text("{}")
    assert dry_run(machine, str(own), "a=b") == [[SCRIPT, "--config", str(own), "a=b"]]


@pytest.mark.parametrize(
    "words",
    [
        ["--num-gpus", "4", "--master-port", "4321"],
        ["--num_gpus=4", "--master_port=4321"],
    ],
)
def test_flags_of_the_authors_launchers_win_over_the_environment(words, machine):
    (line,) = dry_run(machine, *words, "muse_1b", "a=b", FAKE_GPUS="8", NUM_GPUS="2")
    assert line[line.index("--num_processes") + 1] == "4"
    assert line[line.index("--main_process_port") + 1] == "4321"
    assert line[-4:] == [SCRIPT, "--config", STAGE1, "a=b"]
    probe = ["muse", *words, "--config", "c.yaml", "--train-url", "a b/{0..3}.tar"]
    (line,) = dry_run(machine, *probe, script="segment_probe.sh")
    meet = ["--master_addr", "127.0.0.1", "--master_port", "4321", "--nproc_per_node", "4"]
    script = [str(ROOT / "scripts/segment_probe.py"), "--mode", "muse", "--config", "c.yaml"]
    assert line == [*TORCHRUN, *meet, *script, "--train-url", "a b/{0..3}.tar"]
    evaluate = [str(ROOT / "scripts/evaluate.py"), "--config", "c.yaml", "--checkpoint", "k"]
    evaluate += ["--output_dir", "outputs/evaluate"]
    (line,) = dry_run(machine, "c.yaml", "k", *words, script="evaluate.sh")
    assert line == [*TORCHRUN, *meet, *evaluate]
    (line,) = dry_run(machine, "c.yaml", "k", "--num-gpus", "4", script="evaluate.sh")
    assert line == [*TORCHRUN, "--standalone", "--nproc_per_node", "4", *evaluate]


def test_flags_of_the_authors_launchers_that_are_no_numbers(machine):
    assert "--num-gpus needs a number, got 'all'" in refusal(machine, "--num-gpus", "all")
    assert "--master-port needs a number" in refusal(machine, "muse_1b", "--master-port")


def test_a_stage_without_a_script_of_its_own(machine, tmp_path):
    """A new stage is a line of `STAGES` and a configuration; `scripts/train.py` trains it."""
    (line,) = dry_run(machine, "4", str(tmp_path / "stage4.yaml"), "a=b", script="train_stage.sh")
    script = str(ROOT / "scripts/train.py")
    assert line == [script, "--config", str(tmp_path / "stage4.yaml"), "a=b"]


def test_launchers_give_a_save_its_time(machine, tmp_path):
    """torchrun kills what has not ended 30 seconds after SIGTERM, unless this says more."""
    spy = tmp_path / "bin/python"
    spy.write_text(f"{PYTHON}".replace('exec "$REAL_PYTHON"', 'env >> "$CALLS" #'))
    for more in ({}, {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "45"}):
        subprocess.run(
            ["bash", ROOT / "tools/train_stage1.sh", "muse_1b"],
            env={**machine, **more, "NUM_GPUS": "2"},
            check=True,
            timeout=60,
        )
    found = [line for line in open(machine["CALLS"]) if line.startswith("TORCH_ELASTIC_SHUTDOWN")]
    assert [line.strip().split("=")[1] for line in found] == ["600", "45"]


def test_settings_of_the_environment_come_before_the_user_s_overrides(machine):
    (line,) = dry_run(
        machine,
        "own.yaml",
        "training.seed=3",
        BATCH_SIZE="7",
        NUM_WORKERS="0",
        MIXED_PRECISION="fp16",
    )
    assert line == [
        SCRIPT,
        "--config",
        "own.yaml",
        "training.per_gpu_batch_size=7",
        "dataset.params.num_workers_per_gpu=0",
        "training.mixed_precision=fp16",
        "training.seed=3",
    ]


def test_gpus_of_one_machine_go_through_accelerate(machine):
    wanted = [
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "8",
        "--num_machines",
        "1",
        "--machine_rank",
        "0",
        "--main_process_port",
        "29500",
        "--multi_gpu",
        "--dynamo_backend",
        "no",
        "--mixed_precision",
        "no",
        SCRIPT,
        "--config",
        STAGE1,
        *AWKWARD,
    ]
    assert dry_run(machine, "muse_1b", *AWKWARD, FAKE_GPUS="8") == [wanted]
    (line,) = dry_run(machine, "muse_1b", FAKE_GPUS="8", NUM_GPUS="2", MASTER_PORT="4321")
    assert line[3] == "2" and line[line.index("--main_process_port") + 1] == "4321"


def test_a_configuration_of_accelerate_is_handed_on(machine, tmp_path):
    (tmp_path / "fsdp.yaml").write_text("distributed_type: FSDP\n")
    (line,) = dry_run(
        machine, "muse_1b", "a={b}", FAKE_GPUS="4", ACCELERATE_CONFIG=str(tmp_path / "fsdp.yaml")
    )
    assert line == [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(tmp_path / "fsdp.yaml"),
        "--num_processes",
        "4",
        "--num_machines",
        "1",
        "--machine_rank",
        "0",
        "--main_process_port",
        "29500",
        SCRIPT,
        "--config",
        STAGE1,
        "a={b}",
    ]
    assert "none.yaml: no such file" in refusal(machine, "muse_1b", ACCELERATE_CONFIG="none.yaml")
    assert "accelerate alone" in refusal(
        machine, "muse_1b", ACCELERATE_CONFIG=str(tmp_path / "fsdp.yaml"), LAUNCHER="torchrun"
    )


# --- many machines
def test_the_torchrun_line_of_each_machine(machine):
    for rank in (0, 1, 2):
        (line,) = dry_run(
            machine,
            "muse_1b",
            *AWKWARD,
            FAKE_GPUS="8",
            NUM_NODES="3",
            NODE_RANK=str(rank),
            MASTER_ADDR="10.0.0.7",
            LAUNCHER="torchrun",
        )
        assert line == [
            *TORCHRUN,
            "--nproc_per_node",
            "8",
            "--nnodes",
            "3",
            "--node_rank",
            str(rank),
            "--master_addr",
            "10.0.0.7",
            "--master_port",
            "29500",
            SCRIPT,
            "--config",
            STAGE1,
            *AWKWARD,
        ]


def test_the_accelerate_line_of_each_machine(machine):
    (line,) = dry_run(
        machine,
        "muse_1b",
        FAKE_GPUS="8",
        NUM_NODES="2",
        NODE_RANK="1",
        MASTER_ADDR="first",
        MASTER_PORT="7000",
    )
    assert line[2:10] == [
        "--num_processes",
        "16",
        "--num_machines",
        "2",
        "--machine_rank",
        "1",
        "--main_process_port",
        "7000",
    ]
    assert line[line.index("--main_process_ip") + 1] == "first"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"NUM_NODES": "2"}, "needs MASTER_ADDR"),
        ({"NUM_NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "ranks run from 0"),
        ({"NUM_GPUS": "two"}, "whole numbers, got 'two'"),
        ({"NUM_GPUS": "0"}, "at least 1"),
        ({"NUM_GPUS": "2", "LAUNCHER": "mpi"}, "'mpi'"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings, words, machine):
    assert words in refusal(machine, "muse_1b", **settings)


# --- Slurm
JOB = {
    "SLURM_JOB_ID": "31234",
    "SLURM_JOB_NODELIST": "node-[a-b]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_PER_TASK": "64",
    "FAKE_GPUS": "4",
    "MUSE_ROOT": str(ROOT),
}


def test_slurm_runs_one_launcher_a_node_and_asks_slurm_for_the_first(machine):
    srun, *nodes = dry_run({**machine, **JOB}, "1", "muse_1b", *AWKWARD, script="slurm_train.sh")
    assert srun[:6] == [
        "srun",
        "--kill-on-bad-exit=1",
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=64",  # srun takes nothing over from sbatch here
    ]
    assert srun[6:] == ["bash", str(ROOT / "tools/slurm_node.sh"), "1", "muse_1b", *AWKWARD]
    for rank, line in enumerate(nodes):
        assert line == [
            "-m",
            "accelerate.commands.launch",
            "--num_processes",
            "8",
            "--num_machines",
            "2",
            "--machine_rank",
            str(rank),
            "--main_process_port",
            str(20000 + 31234 % 20000),
            "--multi_gpu",
            "--dynamo_backend",
            "no",
            "--mixed_precision",
            "no",
            "--main_process_ip",
            "node-a",
            SCRIPT,
            "--config",
            STAGE1,
            *AWKWARD,
        ]
    assert len(nodes) == 2 and open(machine["CALLS"]).read() == "show hostnames node-[a-b]\n"


def test_slurm_options_ask_for_the_warning_and_the_queue():
    lines = (ROOT / "tools/slurm_train.sh").read_text().splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert {
        "--requeue",
        "--signal=B:USR1@120",
        "--ntasks-per-node=1",
        "--open-mode=append",
    } <= options


def test_slurm_mistakes_are_one_line(machine, tmp_path):
    assert "usage: sbatch" in refusal(machine, script="slurm_train.sh")
    assert "usage: sbatch" in refusal(machine, "muse_1b", "1", script="slurm_train.sh")
    assert "submit this script with sbatch" in refusal(
        machine, "1", "muse_1b", script="slurm_train.sh"
    )
    assert "set MUSE_ROOT" in refusal(
        {**machine, **JOB}, "1", "muse_1b", script="slurm_train.sh", MUSE_ROOT=str(tmp_path)
    )


def started(calls, count):
    """Wait until `count` stand-ins for the training run."""
    end = time.time() + 30
    while (text := open(calls).read()).count("started") < count:
        assert time.time() < end, text
        time.sleep(0.02)
    return text


@pytest.mark.parametrize("reach", ["tasks", "tree"])
def test_slurm_signal_saves_and_queues_again(reach, machine):
    batch = subprocess.Popen(
        ["bash", ROOT / "tools/slurm_train.sh", "1", "muse_1b"],
        env={**machine, **JOB, "REACH": reach},
        stderr=subprocess.PIPE,
        text=True,
    )
    text = started(machine["CALLS"], 2)
    assert {line for line in text.splitlines() if line.startswith("started")} == {
        "started 0 node-a 4",
        "started 1 node-a 4",
    }
    batch.send_signal(signal.SIGUSR1)
    errors = batch.communicate(timeout=60)[1]
    assert batch.returncode == 0, errors
    lines = open(machine["CALLS"]).read().splitlines()
    assert (
        {"saved 0", "saved 1"} <= set(lines)
        and lines[-1] == "requeue 31234"
        and "queued again" in errors
    )


@pytest.mark.parametrize(
    ("ending", "code"), [({"LASTS": "0.1"}, 0), ({"FAKE_TRAINING": "/nowhere.py"}, 2)]
)
def test_slurm_queues_nothing_after_the_end_or_a_fault(ending, code, machine):
    done = subprocess.run(
        ["bash", ROOT / "tools/slurm_train.sh", "1", "muse_1b"],
        env={**machine, **JOB, **ending},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code and "requeue" not in open(machine["CALLS"]).read(), done.stderr


# --- for real
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_machines_of_one_process_each_train_together(shapes_data, tmp_path, machine):
    """Real torchrun and training: two launchers meet at MASTER_ADDR and share each step."""
    config = run_config(tmp_path / "c.yaml", shapes_data, tmp_path / "run")
    environment = {
        **machine,
        "MUSE_PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "NUM_NODES": "2",
        "NUM_GPUS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes = []
    for rank in range(2):
        with open(tmp_path / f"{rank}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    ["bash", ROOT / "tools/train_stage1.sh", config],
                    env={**environment, "NODE_RANK": str(rank)},
                    stdout=log,
                    stderr=log,
                )
            )
    codes = [process.wait(timeout=500) for process in processes]
    assert codes == [0, 0], [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["images"]) for line in lines] == [
        (1, 8),
        (2, 16),
    ]
    assert {path.name for path in (tmp_path / "run/checkpoint-2").glob("rank-*.json")} == {
        "rank-0.json",
        "rank-1.json",
    }
    assert load_file(tmp_path / "run/final/model.safetensors")


# --- the test command
@pytest.mark.parametrize(("fault", "steps"), [("format", 1), ("check", 2), ("none", 3)])
def test_the_test_command_checks_the_style_first(fault, steps, tmp_path):
    """A stand-in for Python notes what it is asked to do, and fails at one step of ruff's."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$2 $3" >> {tmp_path / "calls"}\n[ "$3" != {fault} ] || exit 1\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "tools/test.sh", "-k", "name"],
        env={**os.environ, "MUSE_PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["ruff format", "ruff check", "pytest -q"][:steps]
    errors = done.stderr.splitlines()
    assert (done.returncode, len(errors)) == ((0, 0) if fault == "none" else (2, 1)), done.stderr
    assert all(line.startswith("error: ") for line in errors)
