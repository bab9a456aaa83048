"""Text that is given out piece by piece is the text of the whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from masquerade.engine import AnswerText, Detokenizer, token_bytes
from tests import world

TEXTS = [
    "plain words",
    "naïve café",
    "日本語のテキスト",
    "🎭🎪 masks",
    "a\N{COMBINING ACUTE ACCENT}b",
    "  spaces  inside ",
    "\n\ttabs\n",
]
SENTENCEPIECE = Path(__file__).parents[3] / "shared" / "models" / "stories260K"


def make_sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with a mark instead of a space, and what has no piece is written in bytes."""
    words = [
        "\u2581",
        "a",
        "b",
        "c",
        "ab",
        "\u2581a",
        "\u2581ab",
        "\u2581cab",
        "bc",
        "\u65e5",
        "\u2581\u65e5",
        "\ufffd",
    ]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("a", "b"), ("\u2581", "a"), ("\u2581", "ab"), ("b", "c"), ("\u2581", "日")]
    bpe = models.BPE(
        {name: place for place, name in enumerate(names)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    piecewise = Tokenizer(bpe)
    piecewise.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    piecewise.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=piecewise, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_wordy() -> PreTrainedTokenizerFast:
    """Byte-level, with pieces of several characters and some that end inside of one."""
    tokenizer = world.make_tokenizer()
    alphabet = tokenizer.get_vocab()
    wordy = ["ab", "ba", "abab", "\u0120a", "\u00f0\u0141", "\u0130\u0143a"]  # the last two: parts of a mask's bytes
    vocabulary = alphabet | {name: len(alphabet) + place for place, name in enumerate(wordy)}
    bytewise = Tokenizer(models.BPE(vocabulary, []))
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(world.SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=bytewise)


def pieces(tokenizer: object, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_become_characters_only_when_whole(text: str) -> None:
    tokenizer = world.make_tokenizer()
    given = pieces(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(given) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in given)


def test_an_unfinished_character_is_marked_at_the_end() -> None:
    tokenizer = world.make_tokenizer()
    given = pieces(tokenizer, tokenizer.encode("a🎭", add_special_tokens=False)[:-1])
    assert given[0] == "a"
    assert "".join(given).startswith("a\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("make", [make_sentencepiece, make_wordy])
@pytest.mark.parametrize("seed", range(60))
def test_random_pieces_say_what_they_say_together(make: Callable[[], PreTrainedTokenizerFast], seed: int) -> None:
    """Runs of bytes, whole and broken; words with and without a space; special tokens."""
    rng, tokenizer = random.Random(seed), make()
    runs = [
        tokenizer.convert_tokens_to_ids([f"<0x{b:02X}>" for b in word.encode()]) for word in ("\u00e9", "\U0001f3ad")
    ]
    for _ in range(5):
        ids: list[int] = []
        while len(ids) < 40:
            some = [rng.randrange(len(tokenizer)), rng.randrange(len(tokenizer) - 12, len(tokenizer))]
            ids += rng.choice([runs[0], runs[1], some, some]) if make is make_sentencepiece else some
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True), ids


def test_what_is_certain_is_not_held_back() -> None:
    tokenizer = make_sentencepiece()
    names = ["\u2581a", "\u2581cab", "<0xC3>", "<0xA9>", "b", "\u2581ab"]
    given = pieces(tokenizer, tokenizer.convert_tokens_to_ids(names))
    assert given == ["a", " cab", "", "", "éb", " ab", ""]


@pytest.mark.skipif(not SENTENCEPIECE.is_dir(), reason="needs the stories260K model")
@pytest.mark.parametrize("text", ["Once upon a time, there was a cat.", "naïve 🎭 day", "two  spaces"])
def test_sentencepiece_joins_words_as_in_the_whole(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SENTENCEPIECE)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("seed", range(300))
def test_random_tokens_say_what_they_say_together(seed: int) -> None:
    """Broken characters and special tokens included, as a model at a high temperature writes them."""
    rng, tokenizer = random.Random(seed), world.make_tokenizer()
    high = tokenizer.encode("日本🎭é", add_special_tokens=False)
    ids = [rng.choice([rng.randrange(262), *high]) for _ in range(rng.randint(1, 40))]
    given = pieces(tokenizer, ids)
    assert "".join(given) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.skipif(not SENTENCEPIECE.is_dir(), reason="needs the stories260K model")
def test_random_pieces_of_sentencepiece_say_what_they_say_together() -> None:
    """Half of its vocabulary are bytes; a run of them is text only when it is whole."""
    tokenizer, rng = AutoTokenizer.from_pretrained(SENTENCEPIECE), random.Random(0)
    for _ in range(300):
        ids = [rng.choice([rng.randrange(512), rng.randrange(260, 512)]) for _ in range(rng.randint(1, 40))]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True), ids


def cut(tokenizer: object, ids: list[int], stops: list[str]) -> tuple[str, list[str], str | None]:
    """The text up to a stop, in pieces, and the stop."""
    text = AnswerText(tokenizer, stops)
    given = []
    for token in ids:
        given.append(text.push(token))
        if text.stopped:
            break
    given.append(text.flush())
    return "".join(given), given, text.stop


@pytest.mark.parametrize("seed", range(200))
def test_stops_cut_where_the_whole_text_has_the_first_of_them(seed: int) -> None:
    """Short alphabets make stops overlap with themselves, with each other and with the ends of pieces."""
    rng, tokenizer = random.Random(seed), world.make_tokenizer()
    whole = "".join(rng.choice("ab🎭") for _ in range(30))
    stops = ["".join(rng.choice("ab🎭") for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
    text, given, stop = cut(tokenizer, tokenizer.encode(whole, add_special_tokens=False), stops)
    # The stop that is complete first counts; of several that are complete at once, the one that begins first.
    ends = [whole.index(stop) + len(stop) for stop in stops if stop in whole]
    if not ends:
        assert (text, stop) == (whole, None)
        return
    seen = whole[: min(ends)]
    start, first = min((seen.index(stop), stop) for stop in stops if stop in seen)
    assert (text, stop) == (seen[:start], first)
    assert all("".join(given[:count]) == text[: len("".join(given[:count]))] for count in range(len(given)))


@pytest.mark.parametrize("seed", range(100))
def test_of_several_stops_in_a_piece_the_one_that_is_complete_first_counts(seed: int) -> None:
    rng, tokenizer = random.Random(seed), make_wordy()
    words = [tokenizer.convert_tokens_to_ids(name) for name in ("a", "b", "ab", "ba", "abab", "\u0120a")]
    ids = [rng.choice(words) for _ in range(12)]
    whole = tokenizer.decode(ids)
    stops = ["".join(rng.choice("aab ") for _ in range(rng.randint(1, 6))) for _ in range(3)]
    text, _, stop = cut(tokenizer, ids, stops)
    found = [(whole.index(one) + len(one), whole.index(one), one) for one in stops if one in whole]
    assert (text, stop) == ((whole[: min(found)[1]], min(found)[2]) if found else (whole, None))


def test_a_stop_that_was_complete_before_any_counted_does_not_count_later() -> None:
    tokenizer = world.make_tokenizer()
    text = AnswerText(tokenizer, ["b", "abc"])
    first, second, third = tokenizer.encode("abx", add_special_tokens=False)
    given = [text.push(first, stoppable=False), text.push(second, stoppable=False), text.push(third), text.flush()]
    assert "".join(given) == "abx"
    assert not text.stopped


def test_text_that_cannot_begin_a_stop_is_not_held_back() -> None:
    tokenizer = world.make_tokenizer()
    text = AnswerText(tokenizer, ["END"])
    given = [text.push(token) for token in tokenizer.encode("axEbENc", add_special_tokens=False)]
    assert given == ["a", "x", "", "Eb", "", "", "ENc"]


def test_a_stop_before_the_least_length_does_not_count() -> None:
    tokenizer = world.make_tokenizer()
    text = AnswerText(tokenizer, ["b"])
    given = [
        text.push(token, stoppable=place >= 3)
        for place, token in enumerate(tokenizer.encode("abaab", add_special_tokens=False))
    ]
    assert "".join(given) == "abaa"
    assert text.stopped


@pytest.mark.parametrize("least", range(4))
def test_a_stop_in_a_run_of_bytes_ends_the_answer_at_once(least: int) -> None:
    """The tokens of Llama 2 for line ends: their text may change as long as bytes follow, but none will."""
    tokenizer = make_sentencepiece()
    word, line = tokenizer.convert_tokens_to_ids(["\u2581ab", "<0x0A>"])
    text = AnswerText(tokenizer, ["\n"])
    given = []
    for place, token in enumerate([word, line, line, line, line, word]):
        given.append(text.push(token, stoppable=place >= least))
        if text.stopped:
            break
    assert len(given) == max(2, least + 1)
    assert "".join([*given, text.flush()]) == "ab" + "\n" * (len(given) - 2)


def test_a_stop_before_a_character_that_breaks_off_is_no_stop_of_a_broken_run() -> None:
    """A run with half of a character is replaced as a whole, so it has no line end."""
    tokenizer = make_sentencepiece()
    text, given, stop = cut(tokenizer, tokenizer.convert_tokens_to_ids(["a", "<0xC3>", "<0x0A>", "b"]), ["\n"])
    assert (text, stop) == ("a\ufffd\ufffdb", None)
    assert given[:3] == ["a", "", ""]


def test_a_token_is_spelled_in_bytes() -> None:
    tokenizer = world.make_tokenizer()
    ids = tokenizer.encode("a 🎭", add_special_tokens=False)
    assert b"".join(token_bytes(tokenizer, token) for token in ids) == "a 🎭".encode()
    assert token_bytes(tokenizer, 2) == b"<|end|>"


@pytest.mark.skipif(not SENTENCEPIECE.is_dir(), reason="needs the stories260K model")
def test_a_piece_of_sentencepiece_is_spelled_in_bytes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SENTENCEPIECE)
    ids = tokenizer.encode("once 🎭 more", add_special_tokens=False)
    assert b"".join(token_bytes(tokenizer, token) for token in ids).decode().strip() == "once 🎭 more"
