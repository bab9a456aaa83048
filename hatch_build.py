"""Compiles the native kernels where there is a C++ compiler; without one the package is pure Python and runs on torch.
A wheel also gets the playground, which an installation for development finds where it is.

One object for each instruction set, each with its own flags, so that nothing above the processor's own is ever run. The
library has a C interface and links neither Python nor torch, so one wheel serves all versions of both.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path(__file__).parent / "server" / "masquerade" / "kernels"
LIBRARY = KERNELS / "libmasquerade.so"
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
]
UNITS: dict[str, list[str]] = {name: [] for name in ("dispatch", "layers", "list", "portable", "quantised", "rows")}
if platform.machine() == "x86_64":
    UNITS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    UNITS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
    UNITS["avx512bf16"] = [*UNITS["avx512"], "-mavx512bf16", "-mavx512vnni", "-mf16c"]
    UNITS["amx"] = [*UNITS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
OPTIONAL = ["amx"]  # what the library does without where the compiler is too old (GCC before 11)


class KernelsBuildHook(BuildHookInterface[Any]):
    """Puts the library beside `kernels/native.py`, which loads it, and gives the wheel its platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; say why if that fails."""
        if version != "editable":
            build_data["force_include"]["clients/web"] = "masquerade/web"
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if platform.system() != "Linux" or compiler is None:
            self.app.display_warning("no native kernels: they need Linux and a C++ compiler")
            LIBRARY.unlink(missing_ok=True)
            return
        folder = Path(self.directory).parent / "build" / "kernels"
        try:
            failed = _compile(compiler, folder)
        except subprocess.CalledProcessError as error:
            self.app.display_warning(f"no native kernels: {error}\n{error.stderr}")
            LIBRARY.unlink(missing_ok=True)
            return
        for unit, why in failed.items():
            self.app.display_warning(f"no native kernels for {unit}: {why}\n{why.stderr}")
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _compile(compiler: str, folder: Path) -> dict[str, subprocess.CalledProcessError]:
    """Compile and link; the optional units that failed, and why, are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = {unit: folder / f"{unit}.o" for unit in UNITS}

    def run(*arguments: str | Path) -> None:
        subprocess.run([compiler, *arguments], check=True, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = {
            unit: pool.submit(run, *FLAGS, *UNITS[unit], "-c", KERNELS / "cpp" / f"{unit}.cpp", "-o", target)
            for unit, target in objects.items()
        }
    failed: dict[str, subprocess.CalledProcessError] = {}
    for unit, one in compiled.items():
        try:
            one.result()
        except subprocess.CalledProcessError as error:
            if unit not in OPTIONAL:
                raise
            failed[unit] = error
    built = [target for unit, target in objects.items() if unit not in failed]
    run("-shared", "-fopenmp", *built, "-o", folder / LIBRARY.name)
    shutil.copy2(folder / LIBRARY.name, LIBRARY.with_suffix(".new"))
    LIBRARY.with_suffix(".new").replace(LIBRARY)  # a server that has the old one mapped goes on with it
    return failed
