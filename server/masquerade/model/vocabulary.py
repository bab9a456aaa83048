"""The tokenizer of a GGUF file, as the one of the model that the file was made from.

Byte-level vocabularies are built here, with transformers' regular expressions where it has them: its own conversion
splits text at the wrong places for SmolLM2 (it has no rule for digits), adds tokens that the model has no embedding
for, and cuts up special tokens that are not ASCII (DeepSeek's). For SentencePiece vocabularies its conversion is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, convert_gguf_tokenizer

from masquerade.errors import UnusableModel
from masquerade.gguf import GgufFile

_KEY = "tokenizer.ggml"
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_MARK = "answer"


@dataclass(frozen=True)
class _Rules:
    """How a text is cut into the pieces that merges work within."""

    splits: tuple[str, ...]  # regular expressions, each applied to the pieces of the one before
    whole: bool = False  # a piece that is a token is not merged from smaller ones (llama.cpp's ignore_merges)
    composed: bool = False  # the text is brought into normal form C first


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TYPES = ("gpt2", "llama")  # byte-level and SentencePiece BPE


def _list_rules() -> Mapping[str, _Rules]:
    """The rules by `tokenizer.ggml.pre`. What else they say than a regular expression is llama-vocab.cpp's."""
    rules = {name: _Rules((split,)) for name, split in GGUF_PRE_TOKENIZER_SPLITS.items()}
    for name in ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"):
        rules[name] = _Rules(rules[name].splits, whole=True)
    for name in ("qwen2", "deepseek-r1-qwen", "qwen35", "megrez"):
        rules[name] = _Rules(rules[name].splits, composed=True)
    rules |= dict.fromkeys(("gpt-2", "gpt2"), _Rules((_GPT2,)))
    return rules | dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _Rules((r"\p{N}", _GPT2)))


RULES = _list_rules()


def read_tokenizer(file: GgufFile, vocabulary: int) -> Any:
    """The tokenizer of a file, with its special tokens and its chat template.

    `vocabulary` is how many embeddings there are. Raises `UnusableModel` by key for what cannot be a tokenizer of them.
    """
    model = file.text(f"{_KEY}.model")
    if model not in _TYPES:
        file.fail(f"{_KEY}.model", f"is {model!r:.80}; {', '.join(_TYPES)} can be read")
    tokens = file.strings(f"{_KEY}.tokens")
    if not 0 < len(tokens) <= vocabulary:
        file.fail(f"{_KEY}.tokens", f"are {len(tokens)}, and there are {vocabulary} embeddings")
    kinds = _read_kinds(file, len(tokens))
    try:
        made = _byte_level(file, tokens) if model == "gpt2" else _sentencepiece(file, tokens)
    except UnusableModel:
        raise
    except Exception as error:  # what the tokenizers library raises has no class of its own
        file.fail(f"{_KEY}.merges", f"make no tokenizer: {error!s:.200}")
    made = _drop_unknown(made, len(tokens))
    known = made.get_vocab()  # Gemma's tokens of several spaces are spelled in another way there
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        chosen = (token for token, its in zip(tokens, kinds, strict=True) if its == kind and token in known)
        made.add_tokens([AddedToken(token, normalized=False, special=special) for token in chosen if token])
    return _wrap(file, made, tokens)


def find_ends(file: GgufFile, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those that the file says, and what the chat template writes after one."""
    count = len(tokenizer)
    found = {token for key in _ENDS if (token := file.token(f"{_KEY}.{key}", count)) is not None}
    return sorted(found | set(_ends_of_template(tokenizer)))


def _ends_of_template(tokenizer: Any) -> list[int]:
    if not tokenizer.chat_template:
        return []
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError):
        return []  # it wants something else; a request will be told so
    after = tokenizer.encode(text.rpartition(_MARK)[2].lstrip(), add_special_tokens=False)[:1]
    known = tokenizer.added_tokens_decoder
    return [token for token in after if token in known and known[token].special]


def _read_kinds(file: GgufFile, count: int) -> Sequence[int]:
    key = f"{_KEY}.token_type"
    if key not in file.metadata:
        return [0] * count
    kinds = file.numbers(key)
    if len(kinds) != count:
        file.fail(key, f"are {len(kinds)}, and there are {count} tokens")
    listed: list[int] = kinds.tolist()
    return listed


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> Tokenizer:
    name = file.text(f"{_KEY}.pre")
    if name not in RULES:
        file.fail(f"{_KEY}.pre", f"is {name!r:.80}; {', '.join(sorted(RULES))} can be read")
    rules = RULES[name]
    merges = [_halve(merge) for merge in file.strings(f"{_KEY}.merges")]
    model = models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)
    model.ignore_merges = rules.whole
    made = Tokenizer(model)
    if rules.composed:
        made.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in rules.splits]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _halve(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece(file: GgufFile, tokens: Sequence[str]) -> Tokenizer:
    known: dict[str, Any] = {"tokenizer_type": "llama", "tokens": list(tokens), "token_type": ()}
    if f"{_KEY}.merges" in file.metadata:
        known["merges"] = file.strings(f"{_KEY}.merges")
    else:
        known["scores"] = file.numbers(f"{_KEY}.scores").tolist()
    made: Tokenizer = convert_gguf_tokenizer(file.text("general.architecture"), known)[0]
    if not file.flag(f"{_KEY}.add_space_prefix", True) and isinstance(made.pre_tokenizer, pre_tokenizers.Metaspace):
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def _drop_unknown(made: Tokenizer, count: int) -> Tokenizer:
    """Without the tokens that a class of transformers adds although the file has none of them."""
    if made.get_vocab_size() <= count:
        return made
    document = json.loads(made.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < count]
    return Tokenizer.from_str(json.dumps(document))


def _wrap(file: GgufFile, made: Tokenizer, tokens: Sequence[str]) -> Any:
    named = {
        role: tokens[number]
        for role, key in (
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        )
        if (number := file.token(f"{_KEY}.{key}", len(tokens))) is not None
    }
    begins = file.text(f"{_KEY}.model") == "llama" or RULES[file.text(f"{_KEY}.pre")].whole  # llama.cpp's default
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        add_bos_token=file.flag(f"{_KEY}.add_bos_token", begins),
        add_eos_token=file.flag(f"{_KEY}.add_eos_token", False),
        clean_up_tokenization_spaces=False,
        **{role: named.get(role) for role in ("bos_token", "eos_token", "unk_token", "pad_token")},
    )
    tokenizer.chat_template = file.text("tokenizer.chat_template", None)
    return tokenizer
