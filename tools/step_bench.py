"""One training step beside that of older code: time, peak memory and loss, each in its own process.

--before is a checkout of the older code. Weights, pictures, and the networks of the losses are
random and the same for both: DINOv3 ViT-H+ as the teacher, VGG-16 and ConvNeXt-S in the perceptual
loss; text is a table of random vectors. The step is forward, losses, backward and AdamW, in float32
on the CPU, without a discriminator. Weights of the full size take 2 GB on the disk.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from muse import cli  # noqa: E402
from muse.errors import ConfigError  # noqa: E402
from muse.utils.io import write_json  # noqa: E402

DINOV3 = (
    "{hidden_size: 1280, intermediate_size: 5120, num_hidden_layers: 32, num_attention_heads: 20, "
    "patch_size: 16, num_register_tokens: 4, use_gated_mlp: true, hidden_act: silu}"
)
# Only names that both checkouts have.
STEP = """
import json, sys, time
from pathlib import Path
import torch, torchvision
from safetensors.torch import load_file, save_file
from muse.config import load_config
from muse.losses.muse_loss import MuseLoss
from muse.models.muse_vit import MUSE_ViT
config, folder, batch, steps, *overrides = sys.argv[1:]
folder, batch = Path(folder), int(batch)
for part, name in (("lpips", "vgg16"), ("convnext_s", "convnext_small")):
    if not (folder / part).exists():
        torch.manual_seed(1)
        torch.save(torchvision.models.get_model(name, weights=None).state_dict(), folder / part)
    overrides.append(f"losses.perceptual.weights.{part}={folder / part}")
cfg = load_config(config, overrides)
torch.manual_seed(0)
model, weights = MUSE_ViT(cfg.model, load_backbones=False).train(), folder / "model.safetensors"
if not weights.exists():
    save_file(model.state_dict(), weights)
model.load_state_dict(load_file(weights))
loss = MuseLoss.from_config(cfg, model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
side = cfg.dataset.preprocessing.crop_size
images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(2))
names = [f"a picture of {number}" for number in range(batch)]
found = []
for _ in range(int(steps) + 1):  # the first makes the optimizer's states
    start = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    batch_of = {"images": images, "text": names, "keys": names}
    total, _ = loss(model(images, **loss.needs), batch_of)
    total.backward()
    optimizer.step()
    found.append((time.perf_counter() - start, float(total.detach())))
with open("/proc/self/status") as status:
    peak = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
seconds, losses = zip(*found)
print(json.dumps({"seconds": seconds[1:], "losses": losses, "peak_bytes": peak}))
"""


def step(code: Path, words: list[str]) -> dict:
    """What one process measured with the package in `code`."""
    environment = {**os.environ, "PYTHONPATH": str(code), "MUSE_LOG": "ERROR"}
    command = [sys.executable, "-c", STEP, *words]
    done = subprocess.run(command, env=environment, cwd=code, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ConfigError(f"{code}: the step ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


@cli.entry
def main(argv: list[str] | None = None) -> int:
    """Both codes in turns, then the ratios."""
    parser = cli.plain_parser(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the older code")
    parser.add_argument("--config", default="configs/muse_1b/stage3.yaml", help="in both checkouts")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each process")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each code")
    parser.add_argument("--output", default=None, help="also write the figures as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for the code here alone")
    args = cli.parse(parser, argv)
    if not (args.before / "muse" / "config.py").is_file():
        raise ConfigError(f"--before {args.before}: no checkout of muse")
    if min(args.batch, args.steps, args.repeats) < 1:
        raise ConfigError("--batch, --steps and --repeats must be at least 1")
    common = [
        "training.mixed_precision='no'",  # older code read the bare word as false
        "teacher.topology.source=random",
        f"teacher.topology.config={DINOV3}",
        "teacher.text.kind=random",
        "teacher.text.config={dim: 768}",
    ]
    codes = {"before": (args.before.resolve(), []), "now": (ROOT, args.overrides)}
    found: dict[str, list[dict]] = {name: [] for name in codes}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeats):
            for name, (code, own) in codes.items():
                words = [args.config, folder, str(args.batch), str(args.steps), *common, *own]
                found[name].append(step(code, words))
                print(f"{name}: {json.dumps(found[name][-1])}", flush=True)
    seconds, peak = (
        {name: pick(runs) for name, runs in found.items()}
        for pick in (
            lambda runs: statistics.median(one for run in runs for one in run["seconds"]),
            lambda runs: max(run["peak_bytes"] for run in runs),
        )
    )
    losses = zip(found["before"][0]["losses"], found["now"][0]["losses"], strict=True)
    results = {
        "time_ratio": seconds["now"] / seconds["before"],
        "memory_ratio": peak["now"] / peak["before"],
        "loss_difference": max(abs(a - b) / abs(a) for a, b in losses),
    }
    print(json.dumps(results))
    if args.output:
        write_json(args.output, {**results, "runs": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
