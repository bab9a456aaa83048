"""What cannot fit is refused without being tokenised, and what fits never is."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from masquerade.errors import ContextTooLong
from masquerade.model import Room, encode, longest_token, render_chat
from masquerade.model.encoding import ORDINARY, PIECE, count_bytes
from tests import world

ROOM = Room(20, "There is room for 20 tokens.")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_bytewise(
    normalizer: Any = None, pre_tokenizer: Any = None, special: AddedToken | None = None
) -> PreTrainedTokenizerFast:
    """Every byte is a token, and so are some pairs of spaces and letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("a", "b"), ("ab", "ab")]
    vocabulary = [*alphabet, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(vocabulary)}, merges=merges))
    made.normalizer = normalizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer, level]) if pre_tokenizer else level
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([special or AddedToken("<|special|>", normalized=False)])
    return wrap(made)


def make_pieces(fallback: bool = True) -> PreTrainedTokenizerFast:
    """Pieces as sentencepiece has them; what they do not spell becomes bytes, or unknown."""
    names = ["<unk>", *(BYTES if fallback else []), "▁", "a", "b", "▁▁", "ab", "▁ab"]
    merges = [("▁", "▁"), ("a", "b"), ("▁", "ab")]
    model = models.BPE(
        vocab={name: number for number, name in enumerate(names)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=fallback,
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return wrap(made)


BOUNDED = {
    "bytes": world.make_tokenizer,
    "merges": make_bytewise,
    "NFC": lambda: make_bytewise(normalizers.NFC()),
    "NFKC in lower case": lambda: make_bytewise(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "split": lambda: make_bytewise(pre_tokenizer=pre_tokenizers.Split(" ", "isolated")),
    "pieces": make_pieces,
}
UNBOUNDED = {
    "strip": lambda: make_bytewise(normalizers.Strip()),
    "collapse": lambda: make_bytewise(normalizers.Replace("  ", " ")),
    "accents": lambda: make_bytewise(normalizers.StripAccents()),
    "words": lambda: make_bytewise(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "removed": lambda: make_bytewise(pre_tokenizer=pre_tokenizers.Split(" ", "removed")),
    "greedy special": lambda: make_bytewise(special=AddedToken("<|special|>", rstrip=True, normalized=False)),
    "unknown": lambda: make_pieces(fallback=False),
}
SHRINKING = "\u212a\u0390\U0001d400\uff21e\u0301\u1100\u1161\u11a8" + "".join(map(chr, (0x3B9, 0x308, 0x301)))
TEXTS = st.text(st.sampled_from("ab  xyzÄ漢😀<|>" + SHRINKING), max_size=80) | st.text(max_size=60)


@pytest.fixture(scope="module", params=BOUNDED)
def bounded(request: pytest.FixtureRequest) -> Any:
    return BOUNDED[request.param]()


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_no_token_stands_for_more_bytes_than_is_said(bounded: Any, text: str) -> None:
    longest = longest_token(bounded)
    assert longest is not None
    assert count_bytes(text) <= longest * len(bounded.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", UNBOUNDED)
def test_where_text_may_vanish_no_bound_is_claimed(name: str) -> None:
    assert longest_token(UNBOUNDED[name]()) is None


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, most=st.integers(1, 60))
def test_what_fits_is_never_refused(bounded: Any, text: str, most: int) -> None:
    room, ids = Room(most, "."), bounded.encode(text, add_special_tokens=False)
    if len(ids) <= most:
        assert encode(bounded, text, room, "prompt") == ids
    else:
        with suppress(ContextTooLong):
            assert encode(bounded, text, room, "prompt") == ids  # to be refused later, by its exact number


@pytest.mark.parametrize("make", [make_bytewise, UNBOUNDED["strip"]], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("text", ["x" * 8_000_000, "x " * 4_000_000], ids=["a word", "words"])
def test_of_what_is_far_too_long_little_is_tokenised(make: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, seen = make(), 0
    plain = type(tokenizer)._encode_plus

    def count(self: Any, text: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += len(text) if isinstance(text, str) else 0
        return plain(self, text, *arguments, **options)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", count)
    assert tokenizer.encode("abc")
    assert seen == 3  # everything passes here
    with pytest.raises(ContextTooLong, match="There is room for 20 tokens") as refusal:
        encode(tokenizer, text, ROOM, "prompt")
    assert seen <= 3 + PIECE
    assert refusal.value.tokens > ROOM.tokens


def test_text_that_vanishes_may_be_long_and_fit() -> None:
    tokenizer = UNBOUNDED["strip"]()
    text = " " * (2 * PIECE) + "x"
    assert len(text) > ORDINARY * ROOM.tokens
    assert encode(tokenizer, text, ROOM, "prompt") == tokenizer.encode("x")


@pytest.mark.parametrize("place", [0, 5, PIECE - 7, PIECE - 3, PIECE - 1, PIECE, 2 * PIECE - 4])
def test_no_place_in_a_long_text_lets_a_turn_be_spelled(place: int) -> None:
    tokenizer = world.make_tokenizer()
    text = "x" * place + "<|end|>" + "y" * (3 * PIECE - place)
    spelled = render_chat(tokenizer, [{"role": "user", "content": text}])
    plain = render_chat(tokenizer, [{"role": "user", "content": "hi"}])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert spelled.count(end) == plain.count(end)
    assert text in tokenizer.decode(spelled)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "system", "content": "x" * 10_000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "<|end|>" * 2_000}]}, "messages"),
        ({"messages": [], "tools": [{"type": "function", "function": {"name": "x" * 10_000}}]}, "tools"),
        ({"messages": [], "tools": [{"type": "function", "function": {"parameters": {"a": ["x"] * 1_000}}}]}, "tools"),
    ],
    ids=["text", "special tokens", "a name", "a schema"],
)
def test_every_part_of_a_chat_counts(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ContextTooLong) as refusal:
        render_chat(world.make_tokenizer(), fields["messages"], fields.get("tools", ()), ROOM)
    assert refusal.value.param == param
    assert json.dumps(str(refusal.value)).count("x") < 90
