"""A saved model: a directory with `config.json` and `model.safetensors`, as on the hub."""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import Self

from muse import __version__
from muse.config import plain
from muse.errors import CheckpointError, MuseError
from muse.models.internvit import encoder_fields
from muse.models.low_precision import fill
from muse.utils.io import atomic_directory
from muse.utils.weights import locate, read_mapping

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
CARD_KEYS = ("routing", "dim", "num_heads", "num_blocks", "unshuffle", "latent_dim", "semantic_dim")
CARD = """---
library_name: muse-tokenizer
license: apache-2.0
pipeline_tag: image-feature-extraction
tags: [muse, image-tokenizer, autoencoder]
---

# A MUSE tokenizer

A unified visual tokenizer after arXiv 2605.05646: one encoder whose latent decodes to the picture
and whose semantic stream embeds it. Written by muse {version}.

| | |
|---|---|
{table}

Every size stands in `config.json`; loading needs no other weights.

```python
from muse import MUSE_ViT

model = MUSE_ViT.from_pretrained("DIRECTORY or OWNER/NAME")
latent = model.encode(images).latent  # images (B, 3, H, W), RGB in [0, 1]
pixels = model.reconstruct(images)
embedding = model.embed_image(images)
```

Licence: the code is Apache-2.0. Weights that were initialised from other networks are bound by
theirs as well (the rows above name them), and so is what the training data allow: check both, and
write here which data it were and what was measured, before you publish.
"""


class PretrainedMixin:
    """Saving, loading and uploading, for a class built by `(config, load_backbones)`."""

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, model.safetensors and a card, or leave an old directory as it is."""
        config = self.portable_config()
        parameters = sum(parameter.numel() for parameter in self.parameters())
        with atomic_directory(directory) as folder:
            write_weights(folder, self.state_dict(), config)
            (folder / CARD_FILE).write_text(model_card(config, parameters), encoding="utf-8")

    def push_to_hub(self, repo_id: str, private: bool = False, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes, card included; gives the commit's address.

        Args:
            repo_id: OWNER/NAME; made where it does not exist.
            private: of a repository that is made.
            token: None takes the one that `hf auth login` stored.

        Raises:
            MuseError: the hub refused, or cannot be reached.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "model")
            try:
                repo = api.create_repo(repo_id, private=private, exist_ok=True)
                done = api.upload_folder(
                    repo_id=repo.repo_id,
                    folder_path=Path(folder) / "model",
                    commit_message="MUSE tokenizer",
                )
            except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
                said = " ".join(str(error).split())[:200]
                raise MuseError(f"{repo_id}: cannot be uploaded ({said})") from None
        return str(done)

    def portable_config(self) -> dict[str, Any]:
        """The configuration with encoder and decoder spelled out: loading needs no source."""
        model = plain(self.config)
        sources = {part: model[part]["source"] for part in ("encoder", "decoder")}
        fields = {
            "encoder": encoder_fields(self.encoder),
            "decoder": json.loads(json.dumps(self.decoder_fields)),  # tuples become lists
        }
        for part, config in fields.items():
            model[part] = {**model[part], "source": "random", "config": config}
        return {"model_type": "muse", "model": model, "initialised_from": sources}

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: str | torch.device = "cpu", precision: str = "float32"
    ) -> Self:
        """A model in eval mode from a directory or a hub id; `CheckpointError` where it does not
        fit.

        precision: `float32`, or for inference `bf16` or `int8` (muse/models/low_precision.py).
        """
        path = locate(str(source), [CONFIG_FILE, WEIGHTS_FILE])
        config = read_model_config(path)
        build = partial(cls, config, load_backbones=False)
        return fill(build, [path / WEIGHTS_FILE], path, precision).to(device)


def model_card(config: dict[str, Any], parameters: int) -> str:
    """README.md of a saved model, with the fields that the hub reads.

    Args:
        config: `portable_config` of the model.
        parameters: how many numbers it has.
    """
    model, sources = config["model"], config["initialised_from"]
    rows = {"parameters": f"{parameters:,}"} | {key: model[key] for key in CARD_KEYS}
    rows |= {f"{part} initialised from": source for part, source in sources.items()}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return CARD.format(table=table, version=__version__)


def read_model_config(directory: Path) -> dict[str, Any]:
    """The `model` section of a saved directory."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory}: holds no {CONFIG_FILE}")
    try:
        return read_mapping(file, "model")
    except CheckpointError:
        raise CheckpointError(f"{file}: not the {CONFIG_FILE} of a MUSE model") from None


def write_weights(
    folder: Path, state: dict[str, Tensor], config: dict[str, Any] | None = None
) -> None:
    """model.safetensors (and config.json) into a folder that `atomic_directory` has made."""
    save_tensors(folder / WEIGHTS_FILE, state)
    if config is not None:
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def save_tensors(file: Path, state: dict[str, Tensor]) -> None:
    """One safetensors file, as the hub's tools expect it."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, file, metadata={"format": "pt"})
