"""Progress where stderr is no terminal: plain lines, few of them, with the time that a stage still takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from masquerade import demo
from masquerade.cli.progress import StageLines
from masquerade.pruning.progress import Progress
from tests.cli.running import masquerade


def write_lines(steps: list[tuple[float, Progress]]) -> list[str]:
    """The lines about steps, each with the seconds since the start at which it is done."""
    lines: list[str] = []
    times: Iterator[float] = iter([0.0, *(seconds for seconds, _ in steps)])
    display = StageLines(lines.append, lambda: next(times))
    for _, step in steps:
        display.show(step)
    display.end()
    return lines


def test_a_long_stage_has_a_line_each_ten_seconds_and_one_at_its_end() -> None:
    steps = [(float(done), Progress("forward", done, 40)) for done in range(1, 41)]
    assert write_lines(steps) == [
        "forward: 10 of 40, this stage takes about 30 s more",
        "forward: 20 of 40, this stage takes about 20 s more",
        "forward: 30 of 40, this stage takes about 10 s more",
        "forward: done, 40 in 40 s",
    ]


def test_short_stages_have_one_line_each() -> None:
    steps = [(1.0, Progress("encode", 1, 2)), (2.0, Progress("encode", 2, 2)), (3.0, Progress("pad", 1, 1))]
    assert write_lines(steps) == ["encode: done, 2 in 2 s", "pad: done, 1 in 1 s"]


def test_a_stage_of_unknown_length_promises_no_end() -> None:
    steps = [(200.0 * done, Progress("tune", done, None)) for done in (1, 2)]
    assert write_lines(steps) == ["tune: 1", "tune: 2", "tune: done, 2 in 7 min"]


def test_the_time_left_is_that_of_this_stage_alone() -> None:
    steps = [(100.0, Progress("encode", 1, 1)), (110.0, Progress("forward", 1, 3))]
    assert write_lines(steps)[1] == "forward: 1 of 3, this stage takes about 20 s more"


def test_a_build_without_a_terminal_writes_lines_and_no_bars(tiny_folder: Path, tmp_path: Path) -> None:
    pair = [flag for side in ("data", "contrast") for flag in (f"--{side}", demo.DATA / f"{FILES[side]}.train.jsonl")]
    quick = ("--samples", "16", "--score", "magnitude", "--rho", "0.01", "--force")
    done = masquerade("build", "--model", tiny_folder, "--store", tmp_path, "--name", "a", *pair, *quick)
    assert done.status == 0, done.stderr
    assert "encode: done, " in done.stderr
    assert not set("\r\x1b━█") & set(done.stderr)


FILES = {"data": "formal", "contrast": "casual"}
