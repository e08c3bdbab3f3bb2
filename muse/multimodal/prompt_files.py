"""Files of prompts, and where the pictures of each benchmark go.

| layout | prompts | pictures |
|---|---|---|
| plain | text, one prompt a line | `00000.png` by the prompt's number |
| geneval | `evaluation_metadata.jsonl` | `00000/samples/0000.png`, ..., `00000/metadata.jsonl` |
| wise | JSON list of objects with `Prompt`, `prompt_id` | `1.png` by `prompt_id` |
| imgedit | JSON object: key -> `id`, `prompt`, `edit_type` | `KEY.png`; sources by `id` |

The benchmarks' judges run elsewhere; they find here what they read.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from muse.errors import DataError
from muse.utils.io import write_text


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file."""

    number: int  # from 0, in the file's order: what its noise depends on
    name: str  # unique in its file: what its pictures are named after
    text: str
    source: str | None = None  # editing: the source picture, relative to a root
    record: dict[str, Any] = field(default_factory=dict)  # the benchmark's own entry
    line: str = ""  # geneval: the entry as it was written


@dataclass(frozen=True)
class PromptFile:
    """All prompts of a file, and the benchmark it belongs to."""

    layout: str
    prompts: tuple[Prompt, ...]


def read_prompts(path: str | Path, layout: str | None = None) -> PromptFile:
    """Read a file of prompts.

    Args:
        path: the file.
        layout: plain, geneval, wise or imgedit; None tells it from the file: `.jsonl` is geneval,
            `.json` is wise (a list) or imgedit (an object), anything else is plain.

    Raises:
        DataError: naming the file and the first entry that is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    content = None
    if layout in ("wise", "imgedit") or (layout is None and path.suffix == ".json"):
        content = _json(text, f"{path}")
        layout = layout or ("wise" if isinstance(content, list) else "imgedit")
    layout = layout or ("geneval" if path.suffix == ".jsonl" else "plain")
    if layout not in LAYOUTS:
        raise DataError(f"{path}: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    prompts = tuple(LAYOUTS[layout](path, text if content is None else content))
    if not prompts:
        raise DataError(f"{path}: holds no prompts")
    name, count = Counter(prompt.name for prompt in prompts).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: {count} entries are named {name}")
    return PromptFile(layout, prompts)


# ---------------------------------------------------------------------------------------- reading
def _plain(path: Path, text: str) -> list[Prompt]:
    texts = [line.strip() for line in text.split("\n") if line.strip()]
    return [Prompt(i, f"{i:05d}", text) for i, text in enumerate(texts)]


def _geneval(path: Path, text: str) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _json(line, where)
        prompt = _text(record, "prompt", where)
        i = len(prompts)
        prompts.append(Prompt(i, f"{i:05d}", prompt, record=record, line=line.strip()))
    return prompts


def _wise(path: Path, content: Any) -> list[Prompt]:
    if not isinstance(content, list):
        raise DataError(f"{path}: WISE's prompts are a JSON list, this is {_kind(content)}")
    prompts = []
    for i, record in enumerate(content):
        where = f"{path}, entry {i + 1}"
        text = _text(record, "Prompt", where)
        name = record.get("prompt_id")
        if not isinstance(name, int) or isinstance(name, bool):
            raise DataError(f"{where}: prompt_id must be a whole number, got {name!r}")
        prompts.append(Prompt(i, str(name), text, record=record))
    return prompts


def _imgedit(path: Path, content: Any) -> list[Prompt]:
    if not isinstance(content, dict):
        raise DataError(f"{path}: ImgEdit's prompts are a JSON object, this is {_kind(content)}")
    prompts = []
    for i, (name, record) in enumerate(content.items()):
        where = f"{path}, entry {name!r}"
        text, source = _text(record, "prompt", where), _text(record, "id", where)
        for what, value in (("its key", name), ("id", source)):
            parts = PurePosixPath(value.replace("\\", "/")).parts
            deep = what == "its key" and len(parts) != 1
            if deep or not parts or ".." in parts or parts[0].startswith("/"):
                raise DataError(f"{where}: {what} {value!r} would lead out of its folder")
        prompts.append(Prompt(i, name, text, source, record))
    return prompts


LAYOUTS: dict[str, Callable[[Path, Any], list[Prompt]]] = {
    "plain": _plain,
    "geneval": _geneval,
    "wise": _wise,
    "imgedit": _imgedit,
}


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error})") from None


def _text(record: Any, key: str, where: str) -> str:
    """A record's text of this key, or one clear line."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be an object with {key!r}, this is {_kind(record)}")
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: {key!r} must be a text, got {text!r}")
    return text.strip()


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a text", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


# ---------------------------------------------------------------------------------------- writing
def picture_paths(layout: str, root: str | Path, prompt: Prompt, samples: int = 1) -> list[Path]:
    """Where the `samples` pictures of a prompt go; `DataError` on several where one is read.

    Args:
        layout: of the prompt's file.
        root: the output folder.
        prompt: one of the file's.
        samples: pictures of each prompt (GenEval's protocol: 4).
    """
    root = Path(root)
    if layout == "geneval":
        folder = root / prompt.name / "samples"
        return [folder / f"{sample:04d}.png" for sample in range(samples)]
    if samples != 1:
        raise DataError(f"layout {layout} holds one picture a prompt, not {samples}")
    return [root / f"{prompt.name}.png"]


def noise_indices(prompt: Prompt, samples: int = 1) -> list[int]:
    """Numbers for the noise of a prompt's pictures: no two of a file share one."""
    return [prompt.number * samples + sample for sample in range(samples)]


def grid_path(root: str | Path, prompt: Prompt) -> Path:
    """GenEval: the picture that shows all samples of a prompt side by side."""
    return Path(root) / prompt.name / "grid.png"


def write_metadata(root: str | Path, prompt: Prompt) -> None:
    """GenEval: the prompt's own line, beside its samples."""
    write_text(Path(root) / prompt.name / "metadata.jsonl", prompt.line + "\n")


def source_path(root: str | Path, prompt: Prompt) -> Path:
    """ImgEdit: the source picture of a prompt; `DataError` where there is none."""
    path = Path(root) / str(prompt.source)
    if prompt.source is None or not path.is_file():
        raise DataError(f"{path}: the source picture of {prompt.name!r} does not exist")
    return path
