"""`masquerade plan`, and what `serve` says before it loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from masquerade.cli import plan
from masquerade.kernels import quantised
from masquerade.plan.memory import MachineMemory
from tests.cli.running import fail, masquerade, succeed
from tests.model import ggufs
from tests.serving import serve

KEYS = {"model", "weights", "kv", "personas", "memory", "fit", "build"}


def test_the_demo_fits(tmp_path: Path) -> None:
    found = succeed("plan", "--model", "demo", "--memory", "4GiB", "--personas", "1000")
    assert found.keys() == KEYS
    assert (found["model"]["parameters"], found["model"]["linears"]) == (3_475_712, 28)
    assert found["fit"]["fits"]
    assert found["fit"]["mask_bytes"] == 1000 * found["personas"][1]["bytes"]
    assert found["kv"]["context"] == found["model"]["context"] == 512
    assert sorted(found["personas"][0]["fit_beside_requests"], key=int) == ["1", "4", "16", "32"]


def test_the_text_has_the_figures_of_the_json(tiny_folder: Path) -> None:
    done = masquerade("plan", "--model", tiny_folder, "--memory", "2GiB", "--context", "100")
    found = succeed("plan", "--model", tiny_folder, "--memory", "2GiB", "--context", "100")
    assert done.status == 0
    assert f"parameters: {found['model']['parameters']:,}, of which" in done.stdout
    assert "a request of 100 tokens" in done.stdout
    assert f"--cache-bytes {found['fit']['cache_bytes']} --mask-bytes {found['fit']['mask_bytes']}" in done.stdout
    for row in found["personas"]:
        assert f"{row['pruned']:,}" in done.stdout


@pytest.mark.parametrize(("dtype", "how"), [("float16", None), ("bfloat16", None), ("bfloat16", "int8")])
def test_it_marks_what_is_served(tiny_folder: Path, dtype: str, how: str | None) -> None:
    arguments = ("plan", "--model", tiny_folder, "--dtype", dtype, *(("--quantization", how) if how else ()))
    marked = [line for line in masquerade(*arguments).stdout.splitlines() if line.endswith("; served")]
    assert [line.split(":")[0].strip() for line in marked] == [how or dtype]
    weights = succeed(*arguments)["weights"]
    assert weights["served"] == weights[how or dtype]


def test_without_memory_it_is_that_of_the_machine(tiny_folder: Path) -> None:
    found = succeed("plan", "--model", tiny_folder)
    assert found["memory"]["source"] == "this machine"
    assert found["memory"]["bytes"] > 2**28


def test_what_does_not_fit_is_refused_with_the_arithmetic(tiny_folder: Path) -> None:
    arguments = ("plan", "--model", tiny_folder, "--memory", "541MiB", "--personas", "5000")
    done = masquerade(*arguments)
    assert done.status == 1
    assert done.stderr.startswith("masquerade: tiny")
    assert "are missing" in done.stderr
    for line in ("does not fit into 541.0 MiB", "masks of 5000 personas", "needed", "missing", "--personas"):
        assert line in done.stdout
    as_json = masquerade(*arguments, "--json")
    assert as_json.status == 1
    found = json.loads(as_json.stdout)["fit"]
    assert found["missing"] == found["needed"] - 541 * 2**20
    assert sum(line["nbytes"] for line in found["lines"]) == found["needed"]
    assert found["remedies"][0]["saves"] >= found["missing"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--memory", "some"), 2, "--memory is 'some'; give bytes"),
        (("--context", "100000"), 2, "--context is 100000;"),
        (("--device", "cpu", "--split-layers", "2"), 2, "divides the layers among GPUs; add --device cuda"),
        (("--model", "/nowhere"), 1, "is not an existing folder"),
        (("--model", "some/model-that-is-not-here"), 1, "`hf download some/model-that-is-not-here config.json`"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], status: int, message: str) -> None:
    assert message in fail(status, "plan", *arguments)


def test_rows_that_nf4_cannot_keep(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 10}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = fail(1, "plan", "--model", tmp_path, "--quantization", "nf4")
    assert "rows of 48 weights cannot be kept in 4 bits" in said
    assert succeed("plan", "--model", tmp_path)["weights"]["nf4"] is None
    assert "nf4: not possible" in masquerade("plan", "--model", tmp_path).stdout


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, masquerade.cli.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_serve_says_what_it_takes_before_it_loads(tiny_folder: Path) -> None:
    with serve("--model", str(tiny_folder), "--cache-bytes", str(2**50)) as server:
        log = server.said()
    assert log.index("takes up to") < log.index("listening on")
    assert "KV cache" in log


def test_serve_refuses_weights_that_cannot_be_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "read_memory", lambda *_: MachineMemory(1000, 1000))
    said = fail(1, "serve", "--model", tiny_folder, "--store", tmp_path, "--port", "0", "--dtype", "bfloat16")
    assert "does not fit: its weights in bfloat16 take" in said


def test_the_form_that_is_served_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a GGUF file, where the processor multiplies them as fast, are no dtype of the list."""
    path = ggufs.write(tmp_path / "m.gguf", ggufs.make_model("llama"), ggufs.quantise(ggufs.Kind.Q8_0)).path

    def list_served(*arguments: str) -> list[str]:
        said = masquerade("plan", "--model", path, *arguments).stdout
        return [line.split(":")[0].strip() for line in said.splitlines() if line.endswith("; served")]

    monkeypatch.setattr(quantised, "pays", lambda: True)
    assert list_served() == ["in the file's blocks"]
    assert list_served("--dtype", "bfloat16") == ["bfloat16"]
    monkeypatch.setattr(quantised, "pays", lambda: False)
    assert list_served() == ["bfloat16"]
    assert list_served("--quantization", "a8") == ["a8"]


def test_another_device_is_planned_for(tiny_folder: Path) -> None:
    done = masquerade("plan", "--model", tiny_folder, "--device", "cuda", "--memory", "1GiB")
    assert done.status == 0
    assert "not counted: CUDA's context" in done.stdout
    assert "Python" not in done.stdout


def test_the_memory_of_several_gpus_is_added(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = [(2**30, 2**31), (2**29, 2**32)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory.__getitem__)
    found = succeed("plan", "--model", tiny_folder, "--device", "cuda", "--split-layers", "2")["memory"]
    assert found == {"bytes": 2**31 + 2**32, "source": "2 GPUs together"}


def test_serve_warns_of_what_is_not_there_and_serves(tiny_folder: Path) -> None:
    with serve("--model", str(tiny_folder), "--mask-bytes", str(2**50)) as server:
        log = server.said()
    assert "of that are not available now; lower --cache-bytes or --mask-bytes" in log
