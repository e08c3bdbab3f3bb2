"""Download and unpack Debian packages into a cache folder, without root; each completely or not."""

import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from muse.errors import DataError

logger = logging.getLogger(__name__)

TIMEOUT_S = 900
FALLBACK = "use `--kind shapes`, which needs no download"
_SOUNDS = (".ogg", ".wav")  # 130 of the 160 MB of the stamps


def cache_dir() -> Path:
    """`$MUSE_CACHE`, else `~/.cache/muse`."""
    return Path(os.environ.get("MUSE_CACHE") or Path.home() / ".cache" / "muse").expanduser()


def fetch(packages: tuple[str, ...]) -> dict[str, Path]:
    """Root folder of every unpacked package. A `.deb` in `CACHE/debs` is used before a download.

    Raises:
        DataError: Debian's tools are missing, the cache cannot be written, or a download failed.
    """
    cache = cache_dir()
    roots = {name: cache / "debian" / name for name in packages}
    missing = [name for name in packages if not roots[name].is_dir()]
    if not missing:
        return roots
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise DataError(
                f"stamps come from Debian packages, but `{tool}` is not on this machine; {FALLBACK}"
            )
    try:
        (cache / "debian").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
            for name in missing:
                _unpack(_deb(name, cache, Path(scratch)), roots[name], Path(scratch))
    except OSError as error:
        raise DataError(
            f"cannot write the package cache {cache} ({error.strerror or error}); "
            "set MUSE_CACHE to a writable folder with 400 MB"
        ) from error
    return roots


def _deb(name: str, cache: Path, scratch: Path) -> Path:
    own = sorted((cache / "debs").glob(f"{name}_*.deb"))
    if own:
        return own[-1]
    logger.info("downloading the Debian package %s", name)
    if not _download(name, scratch, []):
        # The package lists are empty or stale. Fresh ones in our own cache need no root.
        options = _private_lists(cache)
        logger.info("package lists are empty or stale: running apt-get update in %s", cache)
        update = _run(["apt-get", *options, "update"], scratch)
        if update.returncode or not _download(name, scratch, options):
            raise DataError(
                f"cannot download the Debian package {name}: run `apt-get update` and check the "
                f"network, or {FALLBACK}"
            )
    return next(scratch.glob(f"{name}_*.deb"))


def _private_lists(cache: Path) -> list[str]:
    for sub in ("lists/partial", "archives/partial"):
        (cache / "apt" / sub).mkdir(parents=True, exist_ok=True)
    return ["-o", f"Dir::State::lists={cache}/apt/lists", "-o", f"Dir::Cache={cache}/apt"]


def _download(name: str, folder: Path, options: list[str]) -> bool:
    result = _run(["apt-get", *options, "download", name], folder)
    if result.returncode:
        logger.debug("apt-get download %s: %s", name, result.stderr.strip())
    return result.returncode == 0 and any(folder.glob(f"{name}_*.deb"))


def _unpack(deb: Path, target: Path, scratch: Path) -> None:
    tree = scratch / f"{target.name}.tree"
    result = _run(["dpkg", "-x", str(deb), str(tree)], scratch)
    if result.returncode:
        raise DataError(
            f"{deb} is not a readable Debian package; delete it and run again, or {FALLBACK}"
        )
    for path in tree.rglob("*"):
        if path.suffix in _SOUNDS:
            path.unlink()
    try:
        tree.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster, with the same files
            raise


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    try:
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"`{' '.join(command)}` took more than {TIMEOUT_S} s; check the network, or {FALLBACK}"
        ) from error
