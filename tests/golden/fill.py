"""Fill a key list with reproducible weights: the rule behind the golden data beside this file."""

import json
import zlib
from pathlib import Path

import torch

GOLDEN = Path(__file__).parent
KEPT = {
    "logit_scale": torch.tensor(2.6592),
    "dino_mean": torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1),
    "dino_std": torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1),
}


def filled_state_dict(
    keys_json: str | Path, prefix: str = "", scale: float = 0.05
) -> dict[str, torch.Tensor]:
    """Name -> float32 tensor for every entry of `keys_json`; `prefix` changes the seeds alone.

    Tables that a formula gives (LightningDiT's `pos_embed` and `freqs_*`) are left out.
    """
    state = {}
    for name, shape in json.loads(Path(keys_json).read_text()).items():
        if name == "pos_embed" or "freqs_" in name:
            continue
        if name in KEPT:
            state[name] = KEPT[name].clone()
            continue
        generator = torch.Generator().manual_seed(zlib.crc32((prefix + name).encode()))
        values = scale * torch.randn(shape, generator=generator)
        state[name] = 1 + values if len(shape) == 1 and name.endswith(".weight") else values
    return state
