"""Four line formats, and an error that names the line for everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from masquerade.errors import BadDataset
from masquerade.evaluate.dataset import Encoded, Example, batches, encode, holds_both_sides, read_examples
from masquerade.model import Base

GOOD = {"prompt": "q", "completion": "a"}


def write(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_every_format_is_read(tmp_path: Path) -> None:
    user = ({"role": "user", "content": "q"},)
    both = {"question": "q", "answer_matching_behavior": " yes", "answer_not_matching_behavior": " no"}
    chat = {"messages": [{"role": "system", "content": "s"}, *user, {"role": "assistant", "content": "a"}]}
    path = write(tmp_path, GOOD, "", both, chat, {"text": "plain"})
    system = {"role": "system", "content": "s"}
    assert read_examples(path) == [
        Example(user, "a"),
        Example(user, "yes"),
        Example((system, *user), "a"),
        Example((), "plain"),
    ]
    assert read_examples(path, "contrast")[1] == Example(user, "no")


def test_a_file_holds_both_sides_if_every_line_does(tmp_path: Path) -> None:
    both = {"question": "q", "answer_matching_behavior": "yes", "answer_not_matching_behavior": "no"}
    one = {key: both[key] for key in list(both)[:2]}
    assert holds_both_sides(write(tmp_path, both, both))
    assert not any(holds_both_sides(write(tmp_path, both, other)) for other in (one, GOOD, both | GOOD))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "line 2 is not JSON: .* at column 2"),
        ("[1]", "line 2 is a JSON list"),
        ({"foo": 1}, "line 2 has none of the fields messages, prompt, question, text; it has foo"),
        ({"prompt": "q"}, "line 2: `completion` must be text"),
        ({"prompt": "q", "completion": 3}, "line 2: `completion` must be text"),
        ({"prompt": "q", "completion": "  "}, "line 2: `completion` must be text, and not empty"),
        ({"question": "q", "answer_not_matching_behavior": "n"}, "line 2: `answer_matching_behavior`"),
        ({"messages": []}, "line 2: `messages` must be a list"),
        ({"messages": [{"role": "user"}, {}]}, r"line 2: messages\[0\] must be an object with `role`"),
        ({"messages": [{"role": "cat", "content": "x"}] * 2}, r"line 2: messages\[0\] has the role 'cat'"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "line 2: the last message must be the assistant's"),
        ({"text": None}, "line 2: `text` must be text"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: object, words: str) -> None:
    with pytest.raises(BadDataset, match=words) as refusal:
        read_examples(write(tmp_path, GOOD, line, GOOD))
    assert "data.jsonl" in str(refusal.value)


def test_every_bad_line_is_reported_and_at_most_twenty_are_listed(tmp_path: Path) -> None:
    lines: list[object] = [GOOD, "{not json", GOOD, {"foo": 1}, GOOD]
    with pytest.raises(BadDataset, match=r"2 of 5 lines are bad; .*line 2 is not JSON.*; .*line 4 has none") as refusal:
        read_examples(write(tmp_path, *lines))
    assert "\n" not in str(refusal.value)
    with pytest.raises(BadDataset, match=r"33 of 34 lines are bad; .*line 20 .*line 21 .*; and 13 more$") as refusal:
        read_examples(write(tmp_path, GOOD, *["[]"] * 33))
    assert "line 22 " not in str(refusal.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[" * 50_000, "line 2 is JSON that cannot be parsed: maximum recursion"),
        ('{"text": ' + "9" * 5000 + "}", "line 2 is JSON that cannot be parsed: Exceeds the limit"),
        (json.dumps({"text": "x" * 2**20}), "line 2 has 1048588 bytes; there may be at most 1048576"),
        (" " * 2**20 + json.dumps(GOOD), "line 2 has .* bytes; there may be at most 1048576"),
        (
            '{"text": [' + "[]," * 2**16 + "0]}",
            "line 2 has 65538 opening brackets and braces; there may be at most 65536",
        ),
        ('{"text": "half \\ud83d pair"}', "line 2: `text` has half a surrogate pair at character 5"),
    ],
)
def test_hostile_lines_are_named(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(BadDataset, match=words):
        read_examples(write(tmp_path, GOOD, line))


def test_only_line_feeds_end_lines_and_a_mark_at_the_beginning_is_no_text(tmp_path: Path) -> None:
    text = "a\u2028b\x85c"
    path = tmp_path / "data.jsonl"
    path.write_text("\ufeff" + json.dumps({"text": text}, ensure_ascii=False) + "\r\n", newline="")
    assert read_examples(path) == [Example((), text)]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match=r"none\.jsonl cannot be read: No such file"):
        read_examples(tmp_path / "none.jsonl")
    for content in (b"", b"\n\n"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(BadDataset, match=r"empty\.jsonl is empty"):
            read_examples(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(BadDataset, match="not UTF-8 text: byte 10 is 0xe9"):
        read_examples(tmp_path / "latin.jsonl")


def test_a_response_ends_with_the_end_token(tiny: Base) -> None:
    encoded = encode(tiny, [Example(({"role": "user", "content": "q"},), "ab")])[0]
    assert tiny.tokenizer.decode(encoded.prompt) == "<|bos|><|user|>q<|end|><|assistant|>"
    assert tiny.tokenizer.decode(encoded.response) == "ab<|end|>"


def test_what_exceeds_the_context_is_cut_or_refused(tiny: Base) -> None:
    long = "x" * 300
    assert len(encode(tiny, [Example((), long)])[0]) == tiny.context
    bad = [Example(({"role": "user", "content": long},), "a", f"data.jsonl, line {line}") for line in (1, 2)]
    with pytest.raises(
        BadDataset, match=r"line 1: a prompt of 304 tokens leaves no room in the context of 256; .*line 2:"
    ):
        encode(tiny, bad)


def test_what_cannot_fit_is_not_tokenised(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenised = 0
    encode_text = tiny.tokenizer.encode

    def count(text: str, **options: object) -> list[int]:
        nonlocal tokenised
        tokenised += len(text)
        return list(encode_text(text, **options))

    monkeypatch.setattr(tiny.tokenizer, "encode", count)
    long, asked = "x" * 2**20, {"role": "user", "content": "q"}
    cut = encode(tiny, [Example((asked,), long)])[0]
    assert len(cut) == tiny.context
    for messages in (({"role": "user", "content": long},), ({"role": "system", "content": long}, asked)):
        with pytest.raises(BadDataset, match=r"line 3: a prompt of 104857[67] bytes leaves no room in "):
            encode(tiny, [Example(messages, "a", "data.jsonl, line 3")])
    assert tokenised < 2**14


@pytest.mark.parametrize("tokens", [1, 10, 64, 10_000])
def test_batches_hold_every_example_once_within_the_budget(tiny: Base, tokens: int) -> None:
    examples = [Encoded((1,) * (1 + index % 5), (7,) * (1 + index % 7)) for index in range(50)]
    seen: list[int] = []
    for batch in batches(examples, tiny.device, tokens):
        assert batch.ids.numel() <= tokens or len(batch.index) == 1
        for row, index in enumerate(batch.index):
            example = examples[index]
            assert batch.ids[row, : len(example)].tolist() == [*example.prompt, *example.response]
            assert int(batch.predicts[row].sum()) == len(example.response)
        seen += batch.index
    assert sorted(seen) == list(range(50))
