"""The command `muse`: each sub-command is the script of that name and takes the same flags.

Nothing heavy is imported here and a script only when it is asked for, so `muse --help` answers at
once. In an installed package the scripts are `muse.scripts` (setup.py), in a clone the folder
`scripts` beside the package.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from muse import __version__

# Sub-command -> the script that it is, and what it does.
COMMANDS = {
    "reconstruct": ("inference", "encode and decode pictures; PSNR and SSIM of each"),
    "embed": ("embed", "image embeddings as CSV or npy; how well texts fit them"),
    "encode": ("encode", "pictures to latents on disk"),
    "decode": ("decode", "latents on disk to pictures"),
    "evaluate": ("evaluate", "rFID, IS, PSNR, SSIM, LPIPS of a checkpoint"),
    "train": ("train", "train the stage that a configuration names"),
    "generate": ("generate", "sample pictures from a trained generator"),
    "report": ("report", "one page about training runs and models"),
    "app": ("app", "a live page: drop a picture, see what the model makes of it"),
    "convert": ("convert", "the authors' checkpoint to a directory of ours, and back"),
    "info": ("info", "what a checkpoint is and what it can do"),
    "download": ("download", "fetch the weights that a configuration needs"),
}
# They start other files of a clone.
CLONE_ONLY = {"benchmark", "pretrain_tiny"}
# In an installed package, in a clone.
SCRIPTS = (Path(__file__).parent / "scripts", Path(__file__).parents[1] / "scripts")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; exit code 2 and one line on stderr for a user's mistake."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"muse {__version__}")
        return 0
    others = other_scripts()
    if name not in COMMANDS and name not in others:
        near = difflib.get_close_matches(name, [*COMMANDS, *others], n=1)
        return _refuse(
            f"muse {name}: no such command"
            + (f"; did you mean {near[0]}?" if near else " (see muse --help)")
        )
    script = COMMANDS[name][0] if name in COMMANDS else name
    if script_file(script) is None:
        return _refuse(f"muse {name}: this version of muse has no scripts/{script}.py")
    sys.argv[0] = f"muse {name}"  # what argparse calls the program
    try:
        module = import_script(script)
    except ModuleNotFoundError as error:
        if (error.name or "muse").split(".")[0] in ("muse", "scripts"):
            raise  # a bug keeps its traceback
        return _refuse(f"muse {name}: {missing_package(error)}")
    return module.main(rest)


def help_text() -> str:
    """What `muse --help` prints."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: muse COMMAND [flags]     (muse COMMAND --help: its flags)",
            "",
            "MUSE: a unified visual tokenizer. The first picture: muse reconstruct photo.jpg",
            "",
            *(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()),
            "",
            "also, each the script of that name: " + ", ".join(other_scripts()),
        ]
    )


def other_scripts() -> list[str]:
    """Scripts that have no sub-command of their own; each runs by its name too."""
    mine = {script for script, _ in COMMANDS.values()} | CLONE_ONLY
    found = {file.stem for folder in SCRIPTS for file in folder.glob("[a-z]*.py")}
    return sorted(found - mine)


def script_file(name: str) -> Path | None:
    """The file of a script, or None where this version has none."""
    files = (folder / f"{name}.py" for folder in SCRIPTS)
    return next((file for file in files if file.is_file()), None)


def import_script(name: str) -> ModuleType:
    """The module of a script that exists."""
    if script_file(name).parent == SCRIPTS[0]:
        return importlib.import_module(f"muse.scripts.{name}")
    root = str(SCRIPTS[1].parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    return importlib.import_module(f"scripts.{name}")


def missing_package(error: ModuleNotFoundError) -> str:
    """One line about a package that is not installed, and the extras that may bring it."""
    return (
        f"the Python package {(error.name or '').split('.')[0]!r} is not installed "
        "(pip install 'muse-tokenizer[train,eval,demo]' brings what the commands need)"
    )


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
