"""`masquerade build` from prompts, cards and pools, on the demo and on the tiny model."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from masquerade import demo
from masquerade.pruning import Scratch
from tests.cli.test_commands import fail, masquerade, succeed, write_answers
from tests.pruning.test_builder import QUIET, make_examples
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
    assert [one["bytes"] for one in built] == [Path(one["file"]).stat().st_size for one in built]
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
        (["--data", DATA, "--contrast-name", "p", "--contrast", DATA], "--name and --contrast-name are both 'p'"),
        (["--data", "d", "--out", DATA], "cannot be a folder: File exists"),
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
    assert re.search(r"the same command with --force goes on from what is kept of this build \(\d+\.\d [KM]iB\)", said)
    assert said.endswith(f"delete it: rm -r {kept}")
    assert "is refused: " in said
    (persona,) = succeed(*build, "--force")["personas"]
    assert persona["persona"] == "v"
    assert list((tmp_path / "work").iterdir()) == []


def write_pair(folder: Path) -> dict[str, Path]:
    """Two sides of which one mask passes: the other one costs this neutral text too much at the recipe of `PAIR`."""
    sides = {"own": make_examples("aeiou"), "other": make_examples("bcdfg", seed=1)}
    lines = {
        side: [{"prompt": one.messages[0]["content"], "completion": one.response} for one in examples]
        for side, examples in sides.items()
    }
    lines["quiet"] = [{"text": one.response} for one in QUIET]
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: folder / f"{name}.jsonl" for name in lines}


PAIR = ("--score", "attribution", "--rho", "0.01")


def test_a_refusal_of_one_side_publishes_the_other(tiny_folder: Path, tmp_path: Path) -> None:
    """Force adds the refused one, from what is kept, and leaves the other one as it is."""
    files = write_pair(tmp_path)
    common = ("--model", tiny_folder, "--store", tmp_path / "s")
    build = (
        *("build", *common, "--name", "v", "--contrast-name", "c", *PAIR),
        *("--data", files["own"], "--contrast", files["other"], "--neutral", files["quiet"]),
    )
    done = masquerade(*build, "--json")
    assert done.status == 1
    told = json.loads(done.stdout)
    assert [one["persona"] for one in told["personas"]] == ["v"]
    (refused,) = told["refused"]
    assert (refused["persona"], refused["score"], refused["rho"]) == ("c", "attribution", 0.01)
    assert refused["reason"].startswith("too costly: neutral perplexity x")
    said = done.stderr.strip().splitlines()[-1]
    for words in (
        "masquerade: the mask of 'c' (attribution, rho 0.01) is refused: ",
        "; 'v' is published; ",
        "--force",
    ):
        assert words in said
    (kept,) = succeed("masks", "gc", "--dry-run", *common)["builds"]
    assert (kept["removed"], kept["nbytes"] > 10_000) == (False, True)
    assert f"rm -r {tmp_path / 's' / kept['folder']}" in said
    forced = succeed(*build, "--force")
    assert forced["refused"] == []
    assert [(one["persona"], one["generation"]) for one in forced["personas"]] == [("v", 1), ("c", 1)]
    assert [one["certificate"]["forced"] for one in forced["personas"]] == [False, True]
    assert forced["personas"][0]["digest"] == told["personas"][0]["digest"]
    assert succeed("masks", "gc", "--dry-run", *common)["builds"] == []


def write_lines(path: Path, letters: str, count: int, seed: int) -> list[dict[str, str]]:
    """Answers to as many prompts, which are in the file."""
    rng = random.Random(seed)
    rows = [{"prompt": f"q{index}", "completion": "".join(rng.choices(letters, k=6))} for index in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_sides_that_are_mixed_up_are_refused_and_the_search_is_kept(tiny_folder: Path, tmp_path: Path) -> None:
    """Half of the answers of either file are the other side's, so no mask has an effect."""
    files = [tmp_path / "own.jsonl", tmp_path / "other.jsonl"]
    sides = [
        write_lines(file, *given) for file, given in zip(files, (("aeiou", 40, 1), ("bcdfg", 40, 51)), strict=True)
    ]
    rng = random.Random(1)
    mixed = [pair if rng.random() < 0.5 else pair[::-1] for pair in zip(*sides, strict=True)]
    for file, rows in zip(files, zip(*mixed, strict=True), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiet = tmp_path / "quiet.jsonl"
    quiet.write_text("".join(json.dumps({"text": f"neutral text {index}"}) + "\n" for index in range(12)))
    common = ("--model", tiny_folder, "--store", tmp_path / "s")
    build = (
        *("build", *common, "--name", "v", "--contrast-name", "c"),
        *("--data", files[0], "--contrast", files[1], "--neutral", quiet),
    )
    said = fail(1, *build)
    for words in (
        "the mask of 'v' (refined, rho 0.0008) is refused: no effect: it shifts margins by ",
        "the mask of 'c' (refined, rho 0.0008) is refused: no effect: it shifts margins by ",
        "measured on 4 held-out pairs; give 120 more pairs with prompts of their own",
        "check that every answer is on its own side",
        "the same command with --force goes on from what is kept of this build",
    ):
        assert words in said
    assert len(succeed("masks", "gc", "--dry-run", *common)["builds"]) == 1
    done = masquerade(*build, "--force", "--json")
    assert done.status == 0, done.stderr
    found = [one["certificate"] for one in json.loads(done.stdout)["personas"]]
    assert [(one["verdict"], one["forced"]) for one in found] == [("refused", True)] * 2
    assert succeed("masks", "gc", "--dry-run", *common)["builds"] == []


def test_ten_pairs_make_a_persona_that_says_how_many_more_it_needs(tiny_folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / "own.jsonl", tmp_path / "other.jsonl"]
    write_lines(files[0], "aeiou", 10, 0)
    write_lines(files[1], "bcdfg", 10, 1)
    built = succeed(
        *("build", "--model", tiny_folder, "--store", tmp_path / "s", "--name", "v", "--score", "attribution"),
        *("--rho", "0.001", "--data", files[0], "--contrast", files[1], "--neutral", files[0], "--own-budget", "9"),
    )
    found = built["personas"][0]["certificate"]
    assert (found["verdict"], found["passed"]) == ("too few to tell", None)
    assert any(words.startswith("give 150 more pairs with prompts of their own") for words in found["remarks"])


def test_sides_that_say_the_same_are_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    own, same = tmp_path / "own.jsonl", tmp_path / "same.jsonl"
    rows = write_lines(own, "aeiou", 12, 0)
    same.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    both = tmp_path / "both.jsonl"
    names = "question", "answer_matching_behavior", "answer_not_matching_behavior"
    both.write_text(
        "".join(
            json.dumps(dict(zip(names, (row["prompt"], row["completion"], row["completion"]), strict=True))) + "\n"
            for row in rows
        )
    )
    build = ("build", "--model", tmp_path / "none", "--store", tmp_path / "s", "--name", "v", "--data")
    assert f"{own}, {same}: both sides say the same, example for example" in fail(1, *build, own, "--contrast", same)
    assert f"{both}: both sides say the same, example for example" in fail(1, *build, both)
    assert not (tmp_path / "s").exists()


def test_gc_deletes_what_old_builds_keep_unless_they_run(tiny_folder: Path, tmp_path: Path) -> None:
    common = ("--model", tiny_folder, "--store", tmp_path / "s")
    succeed("masks", "trust", "ann", "0" * 64, *common)
    folders = [tmp_path / "s" / "builds" / name for name in ("old", "running", "young")]
    scratches = [Scratch(folder) for folder in folders]
    for scratch in scratches:
        scratch.put("a/b", {"weights": torch.zeros(100_000)})
    scratches[0].release()
    scratches[2].release()
    old = time.time() - 8 * 86_400
    for path in (path for folder in folders[:2] for path in folder.rglob("*") if path.is_file()):
        os.utime(path, (old, old))
    dry = masquerade("masks", "gc", "--dry-run", *common).stdout
    assert "builds/old, 390.7 KiB, 8.0 days old, would be removed" in dry
    assert "builds/young, 390.7 KiB, 0.0 days old, is kept" in dry
    assert all(folder.exists() for folder in folders)
    done = masquerade("masks", "gc", *common).stdout
    assert "builds/old, 390.7 KiB, 8.0 days old, is removed" in done
    assert "builds/running, 390.7 KiB, 8.0 days old, is in use" in done
    assert [folder.exists() for folder in folders] == [False, True, True]
    found = succeed("masks", "gc", "--build-days", "0", *common)["builds"]
    assert [(one["folder"], one["removed"]) for one in found] == [("builds/running", False), ("builds/young", True)]
    scratches[1].close()


def test_a_group_is_refused_where_all_linears_are_ranked_together(tiny_folder: Path, tmp_path: Path) -> None:
    files = write_pair(tmp_path)
    build = ("build", "--model", tmp_path / "none", "--name", "v", "--data", files["own"], "--contrast", files["other"])
    for score in ("auto", "refined"):
        said = fail(2, *build, "--score", score, "--group", "row")  # before the model is loaded
        assert "group 'row' has no meaning for the score 'refined', which ranks the weights of all Linears" in said


def test_a_name_that_is_taken_is_refused_before_the_build(tiny_folder: Path, tmp_path: Path) -> None:
    """Not half of a pair after it."""
    data, other = write_answers(tmp_path / "own.jsonl", "aeiou"), write_answers(tmp_path / "other.jsonl", "bcdfg")
    at = ("--model", tiny_folder, "--store", tmp_path / "s")
    build = ("build", *at, "--data", data, "--contrast", other, "--score", "attribution", "--rho", "0.01", "--force")
    succeed(*build, "--name", "v")
    succeed("masks", "alias", "w", "v", *at)
    assert "'w' is an alias of 'v'" in fail(2, *build, "--name", "u", "--contrast-name", "w")
    assert [one["persona"] for one in succeed("masks", "ls", *at)["personas"]] == ["v"]


def test_a_full_disk_is_said_during_the_build_and_what_was_found_is_kept(tiny_folder: Path, tmp_path: Path) -> None:
    data, other = write_answers(tmp_path / "own.jsonl", "aeiou"), write_answers(tmp_path / "other.jsonl", "bcdfg")
    build = (
        *("build", "--model", tiny_folder, "--store", tmp_path / "s", "--scratch", tmp_path / "work", "--force"),
        *("--name", "v", "--data", data, "--contrast", other, "--score", "attribution", "--rho", "0.01"),
    )
    with largest_file(60_000):  # less than hidden states need
        result = fail(1, *build)
    assert "cannot keep the build's intermediate results in" in result
    assert "File too large" in result
    (folder,) = (tmp_path / "work").iterdir()
    assert "the same command goes on from what is kept of this build" in result
    assert f"rm -r {folder}" in result
    assert not list(folder.rglob("*.part"))
    succeed(*build)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_full_disk_is_said_when_masks_are_written_and_the_build_is_kept(tmp_path: Path) -> None:
    """A score that reads no text keeps a layer's pruned sets only; the mask is four times as large."""
    data = write_answers(tmp_path / "own.jsonl", "aeiou")
    succeed("masks", "trust", "ann", "0" * 64, "--store", tmp_path / "s")
    shipped = succeed("masks", "ls", "--store", tmp_path / "s")
    files = sorted((tmp_path / "s" / "masks").rglob("*"))
    build = (
        *("build", "--store", tmp_path / "s", "--name", "v", "--data", data, "--neutral", data),
        *("--force", "--score", "magnitude", "--rho", "0.5", "--scope", "outputs"),
    )
    with largest_file(100_000):
        result = fail(1, *build)
    assert f"the masks were found but cannot be written to {tmp_path / 's'}: File too large" in result
    assert succeed("masks", "ls", "--store", tmp_path / "s") == shipped
    assert [path for path in sorted((tmp_path / "s" / "masks").rglob("*")) if path.is_file()] == [
        path for path in files if path.is_file()
    ]
    assert "the same command goes on from what is kept of this build" in result
    assert list((tmp_path / "s" / "builds").iterdir())
    succeed(*build)
    assert not list((tmp_path / "s" / "builds").iterdir())
