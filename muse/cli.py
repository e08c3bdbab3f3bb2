"""What every command shares: flags, one-line errors, device, configuration, model, protocol.

No torch at the top of this file: `--help` and a wrong flag must answer at once.
"""

import argparse
import functools
import logging
import os
import platform
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from muse import __version__
from muse.command_line import missing_package
from muse.errors import ConfigError, MuseError

try:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import InterpolationResolutionError

    from muse.config import load_config, model_config, resolved, unset_variable
    from muse.utils.io import file_sha256, versions
    from muse.utils.threads import wait_without_spinning
except ModuleNotFoundError as error:  # a Python without the requirements: no traceback
    print(f"error: {missing_package(error)}", file=sys.stderr)
    raise SystemExit(2) from None

logger = logging.getLogger(__name__)
wait_without_spinning()  # before torch is imported, which no command does above this line


def entry(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate `main(argv=None)`: a user's mistake becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        setup_logging()
        try:
            code = main(argv) or 0
            sys.stdout.flush()  # what could not be written is said here, not at exit
            return code
        except InterpolationResolutionError as error:
            message = unset_variable(error)
        except MuseError as error:
            message = str(error)
        except ModuleNotFoundError as error:
            if (error.name or "muse").split(".")[0] in ("muse", "scripts"):
                raise  # a bug
            message = missing_package(error)
        except (PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except BrokenPipeError:
            if _stdout_is_read():
                raise  # another pipe: a bug
            return 128 + signal.SIGPIPE  # as of any command before `| head`
        except OSError as error:
            if error.errno is None:  # not from the system: a bug, which keeps its traceback
                raise
            message = f"{error.filename or 'input/output'}: {error.strerror}"
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 2

    return wrapped


def _stdout_is_read() -> bool:
    """Whether someone reads stdout; else what is left to print goes nowhere, silently."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # asks for errors only
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return not gone


class _Stderr(logging.StreamHandler):
    """Writes to whatever stderr is now: a caller of `main` may have redirected it since."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


class _Parser(argparse.ArgumentParser):
    """Its complaints are a user's mistakes like all others: one line, exit code 2."""

    def error(self, message: str):
        raise ConfigError(f"{message} (see {self.prog} --help)")


def setup_logging() -> None:
    """Log lines of the package on stderr, once."""
    root = logging.getLogger("muse")
    if not root.handlers:
        handler = _Stderr()
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
        )
        root.addHandler(handler)
        root.setLevel(os.environ.get("MUSE_LOG", "INFO").upper())


def plain_parser(description: str) -> argparse.ArgumentParser:
    """A parser without flags, whose errors are one line."""
    return _Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def parser(
    description: str, checkpoint: bool = False, recipe: bool = False
) -> argparse.ArgumentParser:
    """A parser with the flags that every command takes.

    Args:
        description: the command's own.
        checkpoint: add --checkpoint.
        recipe: add --recipe, for a command that trains.
    """
    made = plain_parser(description)
    made.add_argument(
        "--config", required=True, help="YAML configuration, such as configs/muse_tiny/stage3.yaml"
    )
    if checkpoint:
        made.add_argument(
            "--checkpoint",
            required=True,
            help="save_pretrained directory, training checkpoint-N, .safetensors, "
            "or the authors' .bin",
        )
    if recipe:
        made.add_argument(
            "--recipe",
            default=None,
            help="paper or release: all keys of configs/recipes/NAME.yaml, between the "
            "configuration and the overrides",
        )
    made.add_argument(
        "--device", default=None, help="cuda, mps or cpu; the first that exists when not given"
    )
    made.add_argument("overrides", nargs="*", metavar="key=value", help="configuration overrides")
    return made


# Words of the release's scripts, and the flag that each one is here.
BARE_WORDS = {"config": "--config", "checkpoint_path": "--checkpoint", "img_path": "--image_path"}


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse. `config=C` (the release's form) means `--config C`; overrides may stand anywhere."""
    words = list(sys.argv[1:] if argv is None else argv)
    known = {option for action in made._actions for option in action.option_strings}
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if equals and BARE_WORDS.get(name) in known:
            words[index] = f"{BARE_WORDS[name]}={value}"
    return made.parse_intermixed_args(words)


# Flags of the release's launchers, which the launchers of tools/ take too.
LAUNCHER_FLAGS = ("--num-gpus", "--num_gpus", "--master-port", "--master_port")
ONE_PROCESS = (
    "this script is one process; a launcher of tools/ starts several (NUM_GPUS=N, MASTER_PORT=P), "
    "or torchrun"
)


def refuse(made: argparse.ArgumentParser, reason: str, *flags: str) -> None:
    """Flags of the release that have no meaning in this command: naming one is a `ConfigError`."""

    class Refused(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            raise ConfigError(f"{option_string}: {reason}")

    made.add_argument(
        *flags, action=Refused, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def load_cfg(args: argparse.Namespace) -> DictConfig:
    """The configuration that the flags name.

    The authors' weights run under their own routing: where the checkpoint holds them and no
    override names `model.routing`, `args.overrides` gets it, and so does the protocol.

    Without --config (picture commands) it is the checkpoint's own section `model`, alone.
    """
    if args.config is None:
        return _own_cfg(args)
    cfg = load_config(args.config, args.overrides, getattr(args, "recipe", None))
    named = any(word.startswith(("model.routing=", "model=")) for word in args.overrides)
    if getattr(args, "checkpoint", None) is None or named or _runs_release(cfg.model):
        return cfg
    from muse.models.loading import holds_release_weights  # noqa: PLC0415 (imports torch)

    if not holds_release_weights(args.checkpoint):
        return cfg
    logger.info("%s: the authors' weights, so model.routing=release", args.checkpoint)
    # A user's own override comes later and wins.
    args.overrides = ["model.routing=release", "model.join_semantics=null", *args.overrides]
    return load_config(args.config, args.overrides)


def _own_cfg(args: argparse.Namespace) -> DictConfig:
    """The `model` section beside the checkpoint's weights; a hub id becomes its local directory."""
    from muse.models.loading import local_checkpoint, own_config  # noqa: PLC0415 (imports torch)

    args.checkpoint = local_checkpoint(args.checkpoint)
    own = OmegaConf.create({"model": own_config(args.checkpoint)})
    if wrong := next((w for w in args.overrides if not w.startswith("model.")), None):
        raise ConfigError(f"{wrong}: without --config only keys of model can be overridden")
    own.merge_with_dotlist(list(args.overrides))
    return OmegaConf.create({"model": model_config(own.model)})


def _runs_release(model: DictConfig) -> bool:
    return model.routing == "release" and not model.join_semantics


def device(name: str | None) -> str:
    """`name`, or the best device there is; `ConfigError` when the named one does not exist."""
    import torch  # noqa: PLC0415 (takes seconds to import)

    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name is None:
        return next(kind for kind, there in available.items() if there)
    kind = name.split(":")[0]
    if not available.get(kind, False):
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise ConfigError(f"--device {name}: not available here (there is: {there})")
    return name


def choose_training_device(name: str | None) -> None:
    """Make accelerate use `name`; without one it takes the best there is."""
    if name is not None and device(name) == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"


def open_model(args: argparse.Namespace, cfg: DictConfig, precision: str = "float32"):
    """The checkpoint's model on the wanted device, in eval mode; puts the device into `args`."""
    from muse.models.loading import load_model  # noqa: PLC0415 (imports torch)

    args.device = device(args.device)
    return load_model(args.checkpoint, cfg.model, args.device, precision)


def protocol(args: argparse.Namespace, cfg: DictConfig, **extra: Any) -> dict[str, Any]:
    """What was measured with what, for `metrics.json`.

    Args:
        args: flags; the checkpoint, where there is one, is named with its hash.
        cfg: the configuration, recorded in full.
        extra: the command's own facts.
    """
    facts: dict[str, Any] = {
        "muse": __version__,
        "python": platform.python_version(),
        "versions": versions(),
    }
    if getattr(args, "checkpoint", None):
        from muse.models.loading import weights_file  # noqa: PLC0415 (imports torch)

        file = weights_file(args.checkpoint)
        facts["checkpoint"] = {
            "path": str(args.checkpoint),
            "file": file.name,
            "sha256": file_sha256(file),
        }
    return {
        **facts,
        "seed": cfg.training.seed,
        "device": args.device,
        **extra,
        "config": resolved(cfg),
    }
