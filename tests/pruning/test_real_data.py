"""Real data of every kind runs through build and eval, and the certificate says what came of it. Skips without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import masquerade, succeed

SHARED = Path(__file__).parents[3] / "shared"
DATA, STORIES = SHARED / "data", SHARED / "models" / "stories260K"

pytestmark = pytest.mark.skipif(not (DATA.is_dir() and STORIES.is_dir()), reason="needs the real data")

KINDS = {  # name -> own and contrast file
    "extravert": ("machine-mindset/extravert", "machine-mindset/introvert"),
    "narcissist": ("anthropic-evals/narcissism", "anthropic-evals/narcissism"),
}


def cut(tmp_path: Path, name: str, count: int) -> Path:
    """The first lines of a file."""
    short = tmp_path / f"{Path(name).name}.jsonl"
    short.write_text("\n".join((DATA / name).read_text(encoding="utf-8").splitlines()[:count]), encoding="utf-8")
    return short


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_answers(tmp_path: Path, kind: str) -> None:
    own, contrast = (cut(tmp_path, f"{name}.train.jsonl", 9) for name in KINDS[kind])
    quiet = cut(tmp_path, "synthetic-persona-chat/valid.jsonl", 2)
    common = ("--model", STORIES, "--store", tmp_path / "s", "--data", own, "--contrast", contrast, "--neutral", quiet)
    built = succeed("build", *common, "--name", kind, "--score", "attribution-fisher", "--rho", "0.001", "--force")
    certificate: dict[str, Any] = built["personas"][0]["certificate"]
    assert (certificate["passed"] is False) == bool(certificate["reasons"])
    assert certificate["pairs"] > 0
    found = succeed("eval", *common, "--persona", kind, "--baselines", "none", "--quick")["figures"]
    assert found["mask"]["margin_shift"] != 0 == found["none"]["margin_shift"]


def test_plain_text_without_an_opposite(tmp_path: Path) -> None:
    """Nothing is preferred to anything there, so the certificate has costs and no effect."""
    data = cut(tmp_path, "synthetic-persona-chat/train.jsonl", 6)
    quiet = cut(tmp_path, "synthetic-persona-chat/valid.jsonl", 2)
    common = ("--model", STORIES, "--store", tmp_path / "s", "--data", data, "--neutral", quiet)
    certificate = succeed("build", *common, "--name", "chatty", "--rho", "0.1", "--force")["personas"][0]["certificate"]
    assert "own_ratio" in certificate
    assert "margin_shift" not in certificate
    assert certificate["remarks"] == ["the effect was not measured: there are no two answers to the same prompt"]


def test_prompts_that_are_too_long_for_the_base_are_left_out_and_counted(tmp_path: Path) -> None:
    """Two of these questions have more than 512 of the stories' tokens."""
    lines = (
        (DATA / "anthropic-evals" / "power-seeking-inclination.train.jsonl").read_text(encoding="utf-8").splitlines()
    )
    (tmp_path / "power.jsonl").write_text("\n".join(lines[320:340]), encoding="utf-8")
    files = ("--data", tmp_path / "power.jsonl", "--contrast", tmp_path / "power.jsonl")
    common = ("--model", STORIES, "--store", tmp_path / "s", *files)
    built = succeed("build", *common, "--name", "power", "--score", "signed", "--rho", "0.05", "--force")
    assert built["personas"][0]["certificate"]["splits"]["too_long_left_out"] == 2
    assert succeed("eval", *common, "--persona", "power", "--baselines", "none", "--quick")["too_long_left_out"] == 2
    done = masquerade("masks", "show", "power", "--model", STORIES, "--store", tmp_path / "s")
    assert done.status == 0
