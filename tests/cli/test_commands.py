"""The commands as a user runs them: files, exit statuses, and errors that say what to do."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import world
from tests.cli.running import fail, masquerade, succeed


def write_answers(path: Path, letters: str, count: int = 40) -> Path:
    rng = random.Random(letters)
    lines = [{"prompt": f"q{index % 8}", "completion": "".join(rng.choices(letters, k=6))} for index in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def shop(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, dict[str, Any]]:
    """A store with two opposites, built by the command from two files."""
    folder = tmp_path_factory.mktemp("shop")
    own, contrast = write_answers(folder / "own.jsonl", "aeiou"), write_answers(folder / "other.jsonl", "bcdfg")
    report = succeed(
        *("build", "--model", tiny_folder, "--store", folder / "store", "--out", folder / "files"),
        *("--name", "vowels", "--data", own, "--contrast", contrast, "--contrast-name", "consonants"),
        *("--score", "attribution", "--rho", "0.003", "--force"),  # no mask of a random model would pass
    )
    return folder, own, contrast, report


def test_build_publishes_both_opposites(tiny_folder: Path, shop: Any) -> None:
    folder, _, _, report = shop
    assert [persona["persona"] for persona in report["personas"]] == ["vowels", "consonants"]
    listed = succeed("masks", "ls", "--model", tiny_folder, "--store", folder / "store")["personas"]
    assert {(row["persona"], row["digest"]) for row in listed} == {
        (persona["persona"], persona["digest"]) for persona in report["personas"]
    }


def test_show_tells_how_a_mask_was_made(tiny_folder: Path, shop: Any) -> None:
    folder, _, _, report = shop
    shown = succeed("masks", "show", "vowels", "--model", tiny_folder, "--store", folder / "store")
    assert shown["digest"] == report["personas"][0]["digest"]
    assert shown["opposite"] == "consonants"
    assert shown["parameters"]["score"] == "attribution"
    assert shown["calibration"]["examples"] == 30
    assert [past["generation"] for past in shown["history"]] == [1]


def test_building_again_makes_a_generation_only_of_what_is_new(tiny_folder: Path, shop: Any) -> None:
    folder, own, contrast, report = shop
    common = ("build", "--model", tiny_folder, "--store", folder / "store", "--name", "vowels", "--data", own)
    common += ("--force",)
    same = succeed(*common, "--contrast", contrast, "--score", "attribution", "--rho", "0.003")["personas"][0]
    assert (same["digest"], same["generation"]) == (report["personas"][0]["digest"], 1)
    changed = succeed(*common, "--score", "wanda", "--rho", "0.5")["personas"][0]
    assert (changed["digest"] != same["digest"], changed["generation"]) == (True, 2)


def test_a_quick_eval_prints_answers_and_says_what_is_going_on(tiny_folder: Path, shop: Any) -> None:
    folder, own, contrast, _ = shop
    done = masquerade(
        *("eval", "--model", tiny_folder, "--store", folder / "store", "--persona", "vowels", "--quick"),
        *("--data", own, "--contrast", contrast, "--baselines", "bias", "--gammas", "0.25,1", "--masks", "vowels"),
        *("--system-prompt", "Be vowels."),
    )
    assert done.status == 0, done.stderr
    for words in ("judge: AUC ", "facts kept", "hits by turn of a chat, mask: ", "gamma 0.25: margin_shift ", "prompt"):
        assert words in done.stdout
    for stage in ("base: neutral text", "mask: answers", "bias: strength ", "vowels: strength ", "prompt: answers"):
        assert stage in done.stderr


def test_eval_measures_the_mask_beside_its_controls(tiny_folder: Path, shop: Any) -> None:
    folder, own, contrast, report = shop
    store = ("--model", tiny_folder, "--store", folder / "store")
    digest = report["personas"][0]["digest"]
    found = succeed("eval", *store, "--persona", f"vowels@{digest[:8]}", "--data", own, "--contrast", contrast)
    assert found["digest"] == digest
    assert list(found["figures"]) == ["mask", "opposite", "none", "random", "bias"]
    assert found["figures"]["mask"]["margin"] > found["figures"]["none"]["margin"]
    assert "the baseline 'luck' is unknown" in fail(
        2, "eval", *store, "--persona", "vowels", "--data", own, "--contrast", contrast, "--baselines", "luck"
    )
    short = write_answers(folder / "short.jsonl", "xyz", count=7)
    common = ("eval", *store, "--persona", "vowels", "--data", own, "--contrast", contrast)
    for gammas in ("0,half", "0,-0.5", "1.5", "nan"):
        assert f"--gammas is '{gammas}'" in fail(2, *common, f"--gammas={gammas}")
    assert "has 40 examples and" in fail(1, "eval", *store, "--persona", "vowels", "--data", own, "--contrast", short)
    assert "`prompt` needs --system-prompt" in fail(2, *common, "--baselines", "prompt")
    long = [
        write_answers(folder / f"{name}.long.jsonl", letters, count=2) for name, letters in (("o", "ae"), ("c", "bc"))
    ]
    for file in long:
        first, second = map(json.loads, file.read_text().splitlines())
        second["prompt"] = "x" * 400
        file.write_text("".join(f"{json.dumps(one)}\n" for one in (first, second)))
    said = fail(1, "eval", *store, "--persona", "vowels", "--data", long[0], "--contrast", long[1])
    assert f"1 of the 2 pairs of {long[0]} leave room to answer" in said
    assert "--judge is 'gpt'; it must be `ngrams`" in fail(2, *common, "--judge", "gpt")
    said = fail(1, "eval", *store, "--persona", "nobody", "--data", own, "--contrast", contrast)
    assert "no persona" in said
    done = masquerade("build", *store, "--name", "x", "--data", own, "--seed", "-3")
    assert (done.status, "Traceback" in done.stderr) == (2, False)
    assert "'' is not a name" in fail(2, "build", *store, "--name", "", "--data", own)
    assert "loading the model" not in said


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"--data": "empty.jsonl"}, 1, "empty.jsonl is empty; it needs one JSON object a line"),
        ({"--data": "broken.jsonl"}, 1, "broken.jsonl, line 3 is not JSON"),
        ({"--data": "missing.jsonl"}, 1, "missing.jsonl cannot be read: No such file"),
        ({"--name": "a/b"}, 2, "'a/b' is not a name"),
        ({"--contrast-name": "../b"}, 2, "'../b' is not a name"),
        (
            {"--score": "magic"},
            2,
            "score 'magic' is unknown; there are refined, attribution-fisher, attribution, signed",
        ),
        ({"--rho": "many"}, 2, "rho is 'many'; it must be a number or `auto`"),
        ({"--model": "own.jsonl"}, 1, "is a file; give the folder"),
        ({"--model": "/no/such/folder"}, 1, "is not an existing folder"),
    ],
)
def test_build_refuses_with_a_clear_error(
    tiny_folder: Path, tmp_path: Path, change: dict[str, str], status: int, words: str
) -> None:
    own, other = write_answers(tmp_path / "own.jsonl", "aeiou"), write_answers(tmp_path / "other.jsonl", "bcdfg")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text(own.read_text().replace("\n", "\n{,}\n", 2).replace("{,}\n", "", 1))
    options = {
        "--model": str(tiny_folder),
        "--name": "p",
        "--data": str(own),
        "--contrast": str(other),
        "--contrast-name": "q",
    }
    options |= {key: str(tmp_path / value) if value.endswith(".jsonl") else value for key, value in change.items()}
    arguments = [part for option in options.items() for part in option]
    assert words in fail(status, "build", "--store", tmp_path / "store", *arguments)
    assert not list((tmp_path / "store").rglob("*.safetensors"))


def test_verify_says_what_is_wrong_with_a_file(tiny_folder: Path, tmp_path: Path, shop: Any) -> None:
    folder, _, _, report = shop
    good = folder / "files" / "vowels.safetensors"
    digest = report["personas"][0]["digest"]
    assert succeed("masks", "verify", good)["digest"] == digest
    assert succeed("masks", "verify", good, "--model", tiny_folder)["digest"] == digest

    content = bytearray(good.read_bytes())
    content[-1] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    (tmp_path / "short.safetensors").write_bytes(good.read_bytes()[:-10])
    other = world.make_model(tmp_path / "other", seed=1)
    said = [
        fail(1, "masks", "verify", tmp_path / "flipped.safetensors"),
        fail(1, "masks", "verify", tmp_path / "short.safetensors"),
        fail(1, "masks", "verify", good, "--model", other),
        fail(1, "masks", "verify", tmp_path / "none.safetensors"),
    ]
    assert len({line.partition("safetensors")[2] for line in said}) == len(said)  # each its own message


def test_serve_refuses_to_listen_to_strangers_without_being_told(tiny_folder: Path, tmp_path: Path) -> None:
    said = fail(2, "serve", "--model", tiny_folder, "--store", tmp_path, "--host", "0.0.0.0")
    assert "--insecure-no-auth" in said


def test_serve_says_at_once_that_a_port_is_taken(tiny_folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = fail(1, "serve", "--model", tiny_folder, "--store", tmp_path, "--port", port)
    assert f"cannot listen on 127.0.0.1 port {port}: " in said


def test_usage_errors_have_status_2() -> None:
    assert masquerade().status == 2
    assert masquerade("build").status == 2
    assert masquerade("dance").status == 2
    assert masquerade("--help").status == 0


def test_the_installed_command_runs_in_a_process_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    """As above, from the shell: stdout is one object, progress is on stderr, an error is one line and a status."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASQUERADE_BUILD_MODEL": str(tiny_folder)}
    data = write_answers(tmp_path / "own.jsonl", "aeiou")
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "masquerade", "build", "--store", str(tmp_path)]
    options = ["--name", "vowels", "--data", str(data), "--json", "--force", "--rho", "0.1", "--score"]
    good, bad = (
        subprocess.run([*command, *options, score], capture_output=True, text=True, env=environment, check=False)
        for score in ("wanda", "magic")
    )
    assert json.loads(good.stdout)["personas"][0]["persona"] == "vowels"
    assert "forward" in good.stderr
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("masquerade: score 'magic' is unknown")
