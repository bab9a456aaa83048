"""`masquerade build` from prompts, cards and pools, on the demo and on the tiny model."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from masquerade import demo
from tests.cli.test_commands import fail, masquerade, succeed, write_answers
from tests.pruning.test_prompts import CARD

DATA = str(demo.DATA / "formal.train.jsonl")  # of one side


def write_questions(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"question {index}"}) + "\n" for index in range(count)))
    return path


def test_a_prompt_of_the_demo_becomes_a_mask(tmp_path: Path) -> None:
    """The mask has the prompt in its metadata, the certificate the effect, and `eval` the tokens that are saved."""
    held = []
    for side in ("casual", "formal"):
        lines = (demo.DATA / f"{side}.heldout.jsonl").read_text().splitlines()[:16]
        held.append(tmp_path / f"{side}.jsonl")
        held[-1].write_text("\n".join(lines))
    built = succeed(
        *("build", "--store", tmp_path, "--name", "chill", "--system-prompt", "You are casual.", "--samples", "32"),
        *("--prompts", demo.DATA / "casual.train.jsonl", "--neutral", demo.DATA / "facts.jsonl"),
        *("--score", "attribution", "--rho", "0.003"),
    )["personas"][0]
    assert (built["certificate"]["verdict"], built["certificate"]["reasons"]) == ("too few to tell", [])
    assert built["certificate"]["changed_answers"]["changed"] > 0
    assert built["certificate"]["preferred"]["masked"] > built["certificate"]["preferred"]["base"]
    found = succeed(
        *("eval", "--store", tmp_path, "--persona", "chill", "--data", held[0], "--baselines", "none"),
        *("--contrast", held[1], "--train", demo.DATA / "casual.train.jsonl"),
        *("--contrast-train", demo.DATA / "formal.train.jsonl", "--quick"),
    )
    assert found["prompt_tokens_saved"] > 3
    assert found["judge"]["auc"] >= 0.9
    answers = {name: found["figures"][name]["answers"] for name in ("mask", "none")}
    assert answers["mask"]["hit"] >= 0.9 > answers["none"]["hit"]


def test_a_card_becomes_a_mask_and_what_is_ignored_is_said(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps(CARD))
    done = masquerade(
        *("build", "--model", tiny_folder, "--store", tmp_path / "s", "--name", "mira", "--force", "--json"),
        *("--character-card", tmp_path / "card.json", "--prompts", write_questions(tmp_path / "q.jsonl", 12)),
        *("--score", "attribution", "--rho", "0.01"),
    )
    assert done.status == 0, done.stderr
    assert "of the card of 'Mira', scenario, first_mes, character_book, extensions are ignored" in done.stderr
    shown = succeed("masks", "show", "mira", "--model", tiny_folder, "--store", tmp_path / "s")
    assert shown["calibration"]["system_prompt"]["text"].startswith("Write as Mira.")
    assert not (tmp_path / "s" / "builds").exists() or not any((tmp_path / "s" / "builds").iterdir())


def test_one_against_a_pool(tiny_folder: Path, tmp_path: Path) -> None:
    files = [write_answers(tmp_path / f"{letters}.jsonl", letters) for letters in ("aei", "bcd", "xyz")]
    built = succeed(
        *("build", "--model", tiny_folder, "--store", tmp_path / "s", "--name", "vowels", "--data", files[0]),
        *("--contrast", "pool", "--pool", files[1], "--pool", files[2], "--force", "--score", "signed", "--rho", "0.1"),
    )["personas"][0]
    shown = succeed("masks", "show", "vowels", "--model", tiny_folder, "--store", tmp_path / "s")
    assert shown["calibration"]["contrast"]["examples"] == 60
    assert "flip" in built["certificate"]


def test_a_file_with_both_sides_needs_no_second_one(tiny_folder: Path, tmp_path: Path) -> None:
    """To build both opposites, and to measure one."""
    own, other = (write_answers(tmp_path / f"{letters}.jsonl", letters) for letters in ("aei", "bcd"))
    answers = [[json.loads(line) for line in path.read_text().splitlines()] for path in (own, other)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps(
                {
                    "question": a["prompt"],
                    "answer_matching_behavior": a["completion"],
                    "answer_not_matching_behavior": b["completion"],
                }
            )
            + "\n"
            for a, b in zip(*answers, strict=True)
        )
    )
    recipe = ("--force", "--score", "signed", "--rho", "0.1")
    common = ("--model", tiny_folder, "--store", tmp_path / "s")
    built = succeed("build", *common, "--name", "p", "--contrast-name", "q", "--data", pairs, *recipe)["personas"]
    assert [one["persona"] for one in built] == ["p", "q"]
    same = succeed("build", *common, "--name", "r", "--data", own, "--contrast", other, *recipe)["personas"]
    assert same[0]["digest"] == built[0]["digest"]
    found = succeed("eval", *common, "--persona", "p", "--data", pairs, "--baselines", "none")
    assert found["examples"] == len(answers[0])
    assert "--contrast is missing" in fail(2, "eval", *common, "--persona", "p", "--data", own)


def test_a_mask_that_is_refused_is_not_published_and_says_why(tiny_folder: Path, tmp_path: Path) -> None:
    data = write_answers(tmp_path / "own.jsonl", "aeiou")
    common = ("build", "--model", tiny_folder, "--store", tmp_path / "s", "--name", "vowels", "--data", data)
    costly = ("--score", "magnitude", "--rho", "0.9")
    assert "too costly: own perplexity x" in fail(1, *common, *costly)
    assert succeed("masks", "ls", "--model", tiny_folder, "--store", tmp_path / "s") == {"personas": []}
    forced = succeed(*common, *costly, "--force")["personas"][0]
    assert (forced["certificate"]["passed"], forced["certificate"]["forced"]) == (False, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give one of --data, --system-prompt and --character-card"),
        (["--data", "d", "--system-prompt", "s"], "give one of --data"),
        (["--system-prompt", "s"], "needs --prompts"),
        (["--system-prompt", "s", "--prompts", "p", "--contrast", "c"], "has its contrast in --contrast-prompt"),
        (["--data", "d", "--contrast", "pool"], "--contrast pool and --pool FILE"),
        (["--data", "d", "--pool", "p"], "--contrast pool and --pool FILE"),
        (["--data", "d", "--prompts", "p"], "--prompts and --contrast-prompt need --system-prompt"),
        (["--data", "d", "--contrast-prompt", "c"], "--prompts and --contrast-prompt need --system-prompt"),
        (["--data", DATA, "--contrast-name", "q"], "--contrast-name needs --contrast or --contrast-prompt"),
        (["--data", DATA, "--contrast-validation", "v"], "--contrast-validation needs --contrast"),
        (["--data", "d", "--phi", "cube"], "phi 'cube' is unknown"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(options: list[str], words: str) -> None:
    assert words in fail(2, "build", "--name", "p", *options)


def test_both_prompts_can_have_a_name_and_eval_says_what_the_prompt_cost(tiny_folder: Path, tmp_path: Path) -> None:
    common = ("--model", tiny_folder, "--store", tmp_path / "s")
    built = succeed(
        *("build", *common, "--name", "cat", "--system-prompt", "Be a cat.", "--contrast-prompt", "Be a dog."),
        *("--contrast-name", "dog", "--prompts", write_questions(tmp_path / "q.jsonl", 12)),
        *("--score", "attribution", "--rho", "0.01", "--force"),
    )["personas"]
    assert [one["persona"] for one in built] == ["cat", "dog"]
    files = [write_answers(tmp_path / f"{letters}.jsonl", letters, 8) for letters in ("aei", "bcd")]
    result = masquerade(
        *("eval", *common, "--persona", "cat", "--data", files[0], "--contrast", files[1], "--layers"),
        *("--baselines", "bias"),
    )
    assert result.status == 0, result.stderr
    for words in ("prompt tokens saved in every request: 11", "phase all: ", "phase decode: ", "CKA with opposite"):
        assert words in result.stdout


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that is full for files of more bytes, pytest's own among them."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_refused_build_is_kept_and_force_goes_on_from_it(tiny_folder: Path, tmp_path: Path) -> None:
    data, other = write_answers(tmp_path / "own.jsonl", "aeiou"), write_answers(tmp_path / "other.jsonl", "bcdfg")
    build = (
        *("build", "--model", tiny_folder, "--store", tmp_path / "s", "--scratch", tmp_path / "work", "--name", "v"),
        *("--data", data, "--contrast", other, "--score", "wanda", "--rho", "0.9", "--neutral", data),
    )
    said = fail(1, *build)
    (kept,) = (tmp_path / "work").iterdir()
    assert f"the same command with --force goes on from what is kept of this build in {kept}" in said
    assert "is refused: " in said
    (persona,) = succeed(*build, "--force")["personas"]
    assert persona["persona"] == "v"
    assert list((tmp_path / "work").iterdir()) == []


def test_a_full_disk_is_said_during_the_build_and_nothing_stays(tiny_folder: Path, tmp_path: Path) -> None:
    data, other = write_answers(tmp_path / "own.jsonl", "aeiou"), write_answers(tmp_path / "other.jsonl", "bcdfg")
    with largest_file(60_000):  # less than hidden states need
        result = fail(
            *(1, "build", "--model", tiny_folder, "--store", tmp_path / "s", "--scratch", tmp_path / "work"),
            *("--name", "v", "--data", data, "--contrast", other, "--score", "attribution", "--rho", "0.01"),
        )
    assert "cannot keep the build's intermediate results in" in result
    assert "File too large" in result
    assert list((tmp_path / "work").iterdir()) == []


def test_a_full_disk_is_said_when_masks_are_written_and_nothing_stays(tmp_path: Path) -> None:
    """A score that reads no text keeps a layer's pruned sets only; the mask is four times as large."""
    data = write_answers(tmp_path / "own.jsonl", "aeiou")
    shipped = succeed("masks", "ls", "--store", tmp_path / "s")
    files = sorted((tmp_path / "s" / "masks").rglob("*"))
    with largest_file(100_000):
        result = fail(
            *(1, "build", "--store", tmp_path / "s", "--name", "v", "--data", data, "--neutral", data),
            *("--force", "--score", "magnitude", "--rho", "0.5", "--scope", "outputs"),
        )
    assert f"the masks were found but cannot be written to {tmp_path / 's'}: File too large" in result
    assert succeed("masks", "ls", "--store", tmp_path / "s") == shipped
    assert [path for path in sorted((tmp_path / "s" / "masks").rglob("*")) if path.is_file()] == [
        path for path in files if path.is_file()
    ]
