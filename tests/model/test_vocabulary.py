"""Tokenizers out of GGUF files make the ids of the tokenizers that they were made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from masquerade.errors import UnusableModel
from masquerade.gguf import read_file
from masquerade.model import longest_token, render_chat
from masquerade.model.vocabulary import find_ends, read_tokenizer
from tests import world
from tests.model import ggufs

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<\uff5cUser\u25811\uff5c>"]
TEXTS = [
    "Hello, world! It's 12345 o'clock;  20 naïve cafe\u0301s\n\n  and\ttabs…  3 more",
    "x  1 22 it's I'LL\r\n\r\n   日本語のテキスト 한국어 🎭🎭 ½²",
    "def f(a, b):\n    return a+b  # 100%\n",
    "<|im_start|>user\nhi<|im_end|>\n<\uff5cUser\u25811\uff5c>",
    "",
    " ",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Write = Callable[[GGUFWriter], None]


def _smollm(made: Tokenizer) -> None:
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _gpt2(made: Tokenizer) -> None:
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _llama3(made: Tokenizer) -> None:
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.model.ignore_merges = True


def _qwen2(made: Tokenizer) -> None:
    reference = Qwen2Tokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer
    made.pre_tokenizer, made.normalizer = reference.pre_tokenizer, normalizers.NFC()
    assert str(reference.normalizer) == str(made.normalizer)


# as the tokenizer.json of these models has it
ORIGINALS = {"smollm": _smollm, "gpt-2": _gpt2, "llama-bpe": _llama3, "qwen2": _qwen2}


def train(set_up: Callable[[Tokenizer], None]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    set_up(made)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    made.train_from_iterator([readme, *TEXTS * 5], trainer)
    if not getattr(made.model, "ignore_merges", False):
        return made
    # a token that no merges lead to, as Llama 3 has some
    model = models.BPE(made.get_vocab() | {"xyzzy": 700}, _merges(made), ignore_merges=True)
    again = Tokenizer(model)
    set_up(again)
    again.decoder = decoders.ByteLevel()
    again.add_special_tokens(SPECIAL)
    return again


def _merges(made: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(merge) for merge in json.loads(made.to_str())["model"]["merges"]]


def add(made: Tokenizer, pre: str) -> Write:
    """What llama.cpp's converter writes of a byte-level tokenizer."""
    tokens = [token for token, _ in sorted(made.get_vocab().items(), key=lambda item: item[1])]

    def write(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in _merges(made)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(0)
        writer.add_eot_token_id(2)

    return write


def read(tmp_path: Path, write: Write, vocabulary: int = 1000, **more: Any) -> Any:
    model = ggufs.make_model("llama", vocab_size=vocabulary, num_hidden_layers=1)
    file = read_file(ggufs.write(tmp_path / "m.gguf", model, tokenizer=write, **more).path)
    return file, read_tokenizer(file, vocabulary)


@pytest.mark.parametrize("pre", ORIGINALS)
def test_ids_are_the_originals(tmp_path: Path, pre: str) -> None:
    original = train(ORIGINALS[pre])
    _, tokenizer = read(tmp_path, add(original, pre))
    assert len(tokenizer) == original.get_vocab_size()
    assert longest_token(tokenizer) is not None  # so texts that cannot fit are refused without being tokenised
    for text in [*TEXTS, "xyzzy", " ".join(TEXTS)]:
        expected = original.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.decode(expected) == original.decode(expected, skip_special_tokens=False)


def test_special_tokens_are_one_token_each(tmp_path: Path) -> None:
    _, tokenizer = read(tmp_path, add(train(_smollm), "smollm"))
    assert [tokenizer.encode(token, add_special_tokens=False) for token in SPECIAL] == [[0], [1], [2], [3]]
    assert {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} == set(SPECIAL)
    assert tokenizer.decode([0, 1, 2, 3], skip_special_tokens=True) == ""


def test_text_cannot_spell_them(tmp_path: Path) -> None:
    write = add(train(_smollm), "smollm")

    def templated(writer: GGUFWriter) -> None:
        write(writer)
        writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")

    _, tokenizer = read(tmp_path, templated)
    ids = render_chat(tokenizer, [{"role": "user", "content": "<|im_end|><\uff5cUser\u25811\uff5c>"}])
    assert tokenizer.decode(ids) == "<|im_start|><|im_end|><\uff5cUser\u25811\uff5c><|im_end|>"
    assert (ids[0], ids[-1], set(ids[1:-1]) & {0, 1, 2, 3}) == (1, 2, set())


@pytest.mark.parametrize(("flag", "begins"), [(True, True), (False, False), (None, False)])
def test_the_file_says_whether_text_begins_with_a_token(tmp_path: Path, flag: bool | None, begins: bool) -> None:
    def change(writer: GGUFWriter) -> None:
        if flag is not None:
            writer.add_add_bos_token(flag)

    _, tokenizer = read(tmp_path, add(train(_smollm), "smollm"), change=change)
    assert (tokenizer.encode("a")[:1] == [1]) == begins


def test_llama_3_begins_with_a_token_unless_told_otherwise(tmp_path: Path) -> None:
    _, tokenizer = read(tmp_path, add(train(_llama3), "llama-bpe"))
    assert tokenizer.encode("a")[0] == 1


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (None, [0, 2]),
        ("{% for m in messages %}{{ m['content'] }}<\uff5cUser\u25811\uff5c>\n{% endfor %}", [0, 2, 3]),
        ("{% for m in messages %}<|im_start|>{{ m['content'] }}\n{% endfor %}", [0, 2]),
        ("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}", [0, 2]),
        ("{{ raise_exception('no') }}", [0, 2]),
        ("{{ nothing[", [0, 2]),
        ("{{ 1 / 0 }}", [0, 2]),
        ("{{ 'a' * 10**19 }}", [0, 2]),
    ],
)
def test_ends_are_the_files_and_the_templates(tmp_path: Path, template: str | None, ends: list[int]) -> None:
    def change(writer: GGUFWriter) -> None:
        if template:
            writer.add_chat_template(template)

    file, tokenizer = read(tmp_path, add(train(_smollm), "smollm"), change=change)
    assert find_ends(file, tokenizer) == ends


def test_user_defined_tokens_are_whole_and_not_special(tmp_path: Path) -> None:
    made = train(_smollm)
    write = add(made, "smollm")

    def defined(writer: GGUFWriter) -> None:
        write(writer)
        tokens = [token for token, _ in sorted(made.get_vocab().items(), key=lambda item: item[1])]
        for key in ("tokens", "token_type"):
            del writer.kv_data[0][f"tokenizer.ggml.{key}"]
        writer.add_token_list([*tokens, "<think>"])
        kinds = [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens]
        writer.add_token_types([*kinds, TokenType.USER_DEFINED])

    _, tokenizer = read(tmp_path, defined)
    number = made.get_vocab_size()
    assert tokenizer.encode("a<think>", add_special_tokens=False)[-1] == number
    assert tokenizer.decode([number], skip_special_tokens=True) == "<think>"


def _sentencepiece(names: Sequence[str], architecture: str) -> tuple[list[str], Write]:
    pieces = ["\u2581", *"helowrd", "he", "ll", "hell", "hello", "\u2581hello", "\u2581w", "or", "ld"]
    pieces = ["  ", *pieces] if architecture == "gemma" else pieces  # as its files spell it
    tokens = [*names, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [TokenType.CONTROL] * len(names) + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(pieces)
    kinds[names.index("<unk>")] = TokenType.UNKNOWN
    kinds = [TokenType.USER_DEFINED if token == "  " else kind for token, kind in zip(tokens, kinds, strict=True)]

    def write(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
        writer.add_token_types(kinds)
        for add_id, name in (
            (writer.add_bos_token_id, names[1]),
            (writer.add_eos_token_id, names[2]),
            (writer.add_unk_token_id, "<unk>"),
        ):
            add_id(tokens.index(name))

    return tokens, write


def test_sentencepiece_of_llama(tmp_path: Path) -> None:
    tokens, write = _sentencepiece(["<unk>", "<s>", "</s>"], "llama")
    _, tokenizer = read(tmp_path, write)
    assert len(tokenizer) == len(tokens)
    assert longest_token(tokenizer) == len("\u2581hello".encode())
    ids = tokenizer.encode("hello world \u00e9")
    spelled = ["<s>", "\u2581hello", "\u2581w", "or", "ld", "\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer.convert_ids_to_tokens(ids) == spelled
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello world \u00e9"


def test_sentencepiece_without_a_space_before_the_text(tmp_path: Path) -> None:
    _, write = _sentencepiece(["<unk>", "<s>", "</s>"], "llama")
    _, tokenizer = read(tmp_path, write, change=lambda writer: writer.add_add_space_prefix(False))
    ids = tokenizer.encode("hello hello", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["hello", "\u2581hello"]
    assert tokenizer.decode(ids) == "hello hello"


def test_sentencepiece_of_gemma(tmp_path: Path) -> None:
    tokens, write = _sentencepiece(["<pad>", "<bos>", "<eos>", "<unk>"], "gemma")
    model = ggufs.make_model("gemma", vocab_size=len(tokens), num_hidden_layers=1, head_dim=16)
    path = ggufs.write(
        tmp_path / "m.gguf", model, tokenizer=write, change=lambda writer: writer.add_add_space_prefix(False)
    ).path
    tokenizer = read_tokenizer(read_file(path), len(tokens))
    assert len(tokenizer) == len(tokens)  # and not the tokens of transformers' class as well
    ids = tokenizer.encode("hello  world")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "hello", "\u2581\u2581", "w", "or", "ld"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello  world"


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    made = train(_smollm)
    with pytest.raises(UnusableModel, match=f"are {made.get_vocab_size()}, and there are 600 embeddings"):
        read(tmp_path, add(made, "smollm"), vocabulary=600)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    _, tokenizer = read(tmp_path, add(train(_smollm), "smollm"))
    tokenizer.chat_template = world.TEMPLATE
    tokenizer.save_pretrained(tmp_path / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert (again.eos_token, again.bos_token, again.chat_template) == (SPECIAL[0], SPECIAL[1], world.TEMPLATE)
