"""What a file or directory is that somebody calls a checkpoint, without building the network.

Sizes are read from the headers of safetensors files; a pickle is opened with `weights_only=True` on
the meta device, so that its numbers are not read.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from muse.commands.embed_pictures import find_text_config
from muse.config import load_config
from muse.errors import CheckpointError, ConfigError
from muse.models.loading import EMA_FILE, RELEASE_FILES, latest_checkpoint, local_checkpoint
from muse.models.pretrained import CONFIG_FILE, WEIGHTS_FILE
from muse.models.release_weights import PICKLES, WRAPPERS, is_release_file
from muse.utils.io import file_sha256
from muse.utils.weights import packaged, read_mapping

RUN_CONFIG = "config.yaml"
KINDS = {
    "muse": "tokenizer",
    "muse_generator": "generator of latents",
    "muse_umm": "multimodal model",
}
MODULES_SHOWN = 12


class CheckpointInfo(NamedTuple):
    """What `muse info` says."""

    kind: str  # such as "tokenizer (save_pretrained directory)"
    weights: Path
    sha256: str
    parameters: int  # numbers in the weights file (and beside it, where running means are partial)
    dtypes: dict[str, int]  # type -> tensors
    modules: dict[str, int]  # first part of the names -> numbers
    config: dict[str, Any]
    abilities: tuple[tuple[str, bool, str], ...]  # what, whether, how or why not


def describe_checkpoint(checkpoint: str | Path, config: str | None = None) -> CheckpointInfo:
    """What a checkpoint is and can do.

    Args:
        checkpoint: a packaged model's name, a directory, a file, or a hub id.
        config: names the text tower, where the checkpoint's surroundings do not.

    Raises:
        CheckpointError: it is none, with what it seems to be instead.
    """
    source = local_checkpoint(checkpoint)
    path = packaged(source) or Path(source).expanduser()
    run = path
    if path.is_dir() and not _weights(path) and (path / RUN_CONFIG).is_file():
        path = path / "final" if (path / "final").is_dir() else latest_checkpoint(path) or path
    file = path if path.is_file() else _weights(path)
    if file is None:
        _refuse_path(checkpoint, path)
    if path.is_file():
        _refuse_suffix(file)
    facts = file.parent / CONFIG_FILE
    about = read_mapping(facts) if facts.is_file() else {}
    sizes = _sizes(file)
    if file.name == EMA_FILE and (file.parent / WEIGHTS_FILE).is_file():
        sizes = {**_sizes(file.parent / WEIGHTS_FILE), **sizes}
    authors = is_release_file(file)
    what = "the authors' weights" if authors else KINDS.get(about.get("model_type", ""), "")
    what = what or ("tokenizer" if "model" in about else "weights without a configuration")
    form = _form(checkpoint, run, path)
    modules: Counter[str] = Counter()
    for name, (count, _) in sizes.items():
        modules[_module(name)] += count
    return CheckpointInfo(
        f"{what} ({form})",
        file,
        file_sha256(file),
        sum(count for count, _ in sizes.values()),
        dict(Counter(kind for _, kind in sizes.values())),
        dict(modules),
        about,
        tuple(_abilities(what, about, path, checkpoint, config)),
    )


def _weights(path: Path) -> Path | None:
    """The file that `load_model` would read of a directory."""
    found = (path / name for name in (EMA_FILE, WEIGHTS_FILE, *RELEASE_FILES))
    return next((file for file in found if file.is_file()), None)


def _refuse_path(checkpoint: str | Path, path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"{checkpoint}: no such checkpoint")
    held = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
    raise CheckpointError(f"{checkpoint}: a directory without weights of MUSE (it holds {held})")


def _refuse_suffix(file: Path) -> None:
    suffix = file.suffix.lower()
    if suffix == ".safetensors" or suffix in PICKLES:
        return
    if suffix in (".json", ".yaml", ".yml"):
        raise CheckpointError(
            f"{file}: a configuration, no weights; name the directory that has it"
        )
    raise CheckpointError(f"{file}: no file of weights (.safetensors, {', '.join(PICKLES)})")


def _form(checkpoint: str | Path, run: Path, path: Path) -> str:
    if packaged(checkpoint):
        return "comes with the package"
    if run != path:
        return f"training run, its {path.name}"
    if path.is_file():
        return "one file of weights"
    return "training checkpoint" if (path / EMA_FILE).is_file() else "directory"


def _sizes(file: Path) -> dict[str, tuple[int, str]]:
    """Name -> (numbers, type) of every tensor of a file."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}
                return {
                    name: (torch.Size(one.get_shape()).numel(), one.get_dtype())
                    for name, one in slices.items()
                }
        except (SafetensorError, OSError) as error:
            said = " ".join(str(error).split())
            raise CheckpointError(f"{file}: not a readable safetensors file ({said})") from None
    try:
        state = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # a foreign file read as a pickle can stumble over nearly anything
        raise CheckpointError(
            f"{file}: not a file that loads with weights_only=True ({type(error).__name__})"
        ) from None
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: holds no mapping of names to tensors")
    return {
        name: (one.numel(), str(one.dtype).removeprefix("torch."))
        for name, one in state.items()
        if isinstance(one, torch.Tensor)
    }


def _module(name: str) -> str:
    return name.removeprefix("module.").split(".")[0]


def _abilities(what, about, path, checkpoint, config):
    """(what, whether, how or why not) of everything that a user may want of a checkpoint."""
    model = about.get("model") if isinstance(about.get("model"), dict) else {}
    if about.get("model_type") == "muse_generator":
        yield "generate", True, "muse generate --checkpoint (its tokenizer decodes)"
        yield "reconstruct", False, "a tokenizer's work"
        return
    if about.get("model_type") == "muse_umm":
        for name in ("text_to_image", "edit", "answer"):
            yield name, True, f"muse {name} --checkpoint"
        yield "reconstruct", False, "a tokenizer's work"
        return
    known = bool(model)
    needs = "" if known else "with --config (no config.json beside the weights)"
    width = f"latent of {model['latent_dim']} channels" if known else ""
    yield "reconstruct", True, needs or "muse reconstruct"
    yield "encode, decode", True, needs or f"muse encode, muse decode: {width}"
    yield "embed", True, needs or f"muse embed: {model['semantic_dim']} numbers a picture"
    yield "texts, zero-shot", *_text_tower(checkpoint, config)
    yield "features", True, needs or f"semantic, block ({model['dim']}), latent, encoder"
    maps = f"{model['num_blocks']} blocks x {model['num_heads']} heads" if known else ""
    yield "attention", True, needs or f"muse visualize_attention: {maps}"
    resumable = path.is_dir() and path.name.startswith("checkpoint-")
    why = "the same training command goes on from it" if resumable else "no state of the optimizer"
    yield "resume training", resumable, why
    yield "generate", False, "train a generator on its latents (docs/generation.md)"


def _text_tower(checkpoint: str | Path, config: str | None) -> tuple[bool, str]:
    file = find_text_config(checkpoint, config)
    if file is None:
        return False, "which text tower it was trained with is not known: --config names it"
    try:
        text = load_config(file).teacher.text
    except ConfigError as error:
        return False, str(error)
    return text.kind != "none", f"{text.kind} {text.source}"


def info_lines(info: CheckpointInfo) -> list[str]:
    """What the command prints."""
    dtypes = ", ".join(f"{count} tensors {kind}" for kind, count in info.dtypes.items())
    lines = [
        f"what        {info.kind}",
        f"weights     {info.weights}",
        f"sha256      {info.sha256}",
        f"parameters  {info.parameters:,} ({dtypes})",
    ]
    ranked = sorted(info.modules.items(), key=lambda item: -item[1])[:MODULES_SHOWN]
    lines += [f"            {count:>14,}  {name}" for name, count in ranked]
    model = info.config.get("model") or info.config.get("generator") or {}
    plain = {key: value for key, value in model.items() if not isinstance(value, dict)}
    if plain:
        lines.append("config      " + ", ".join(f"{k}={json.dumps(v)}" for k, v in plain.items()))
    sources = info.config.get("initialised_from", {})
    lines += [f"            {part} from {source}" for part, source in sources.items()]
    lines += ["", "it can"]
    for what, can, how in info.abilities:
        lines.append(f"  {'yes' if can else 'no ':<3}  {what:<17} {how}".rstrip())
    return lines
