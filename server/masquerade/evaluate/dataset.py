"""Reads JSONL files into examples, and encodes and batches them.

A file is checked to its end, and one error reports its first faults with their lines.

A line is one JSON object of at most `LINE_BYTES` with
* `messages`: OpenAI chat lines; the last one is the assistant's and is the response,
* `prompt` and `completion`,
* `question`, `answer_matching_behavior` and `answer_not_matching_behavior`: both sides of a contrast in one line,
* `text`: plain text, all of it response.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import torch
from torch import Tensor

from masquerade.errors import BadDataset, BadRequest
from masquerade.model import Base, render_chat
from masquerade.model.encoding import count_bytes, longest_token

T = TypeVar("T")
Polarity = Literal["own", "contrast"]
Message = Mapping[str, str]
REPORTED = 20  # most faults in one error
BATCH_TOKENS = 512  # most padded tokens of a micro-batch; time and memory of a forward pass grow with them
LINE_BYTES = 2**20  # most bytes of one JSON document, such as a line: it is parsed and tokenised in one go
PARTS = 2**16  # most lists and objects in it: each costs the parser far more than a character of text


class PromptTooLong(BadDataset):
    """A prompt is as long as the base's context, or longer."""


@dataclass(frozen=True)
class Example:
    """A prompt and its response."""

    messages: tuple[Message, ...]  # empty for plain text
    response: str
    where: str = field(default="an example", compare=False)  # file and line, for errors

    @property
    def shape(self) -> str:
        """What the prompt is made of: `text`, `chat` or `chat with a system prompt`."""
        if not self.messages:
            return "text"
        return "chat with a system prompt" if self.messages[0]["role"] == "system" else "chat"


@dataclass(frozen=True)
class Encoded:
    """An example as token ids; the response carries the end-of-answer token."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    messages: tuple[Message, ...] = field(default=(), compare=False, repr=False)  # of the prompt, where they are known

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    def cut(self, tokens: int | None) -> Encoded:
        """The example with at most `tokens` tokens of its response."""
        return replace(self, response=self.response[:tokens])


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch, padded on the right."""

    index: tuple[int, ...]  # which examples these are
    ids: Tensor  # int64 [examples, length]
    predicts: Tensor  # bool [examples, length]: positions whose next token is part of a response

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        return replace(self, ids=self.ids.to(device), predicts=self.predicts.to(device))


@dataclass(frozen=True)
class _Line:
    """A line of a file; if it is too long, its beginning."""

    number: int
    content: bytes
    size: int  # bytes of the whole line


def read_examples(path: Path, side: Polarity = "own") -> list[Example]:
    """All examples of a file. Raises `BadDataset` with the file and its first `REPORTED` bad lines."""
    return _read(path, lambda fields, where: _parse(fields, side, where))


def holds_both_sides(path: Path) -> bool:
    """Whether every line of a file has the opposite's answer too. Raises `BadDataset` as `read_examples` does."""

    def has_both(fields: dict[str, Any], _: str) -> bool:
        return (
            not {"messages", "prompt"} & fields.keys() and {"question", "answer_not_matching_behavior"} <= fields.keys()
        )

    return all(_read(path, has_both))


def read_questions(path: Path) -> list[tuple[Message, ...]]:
    """The prompts of a file: `prompt`, `question`, or `messages` with or without an answer at the end.

    Raises `BadDataset` as `read_examples` does.
    """
    return _read(path, _parse_question_only)


def _read(path: Path, parse: Callable[[dict[str, Any], str], T]) -> list[T]:
    def attempt(line: _Line) -> T:
        where = f"{path}, line {line.number}"
        return parse(_load(line, where), where)

    try:
        with path.open("rb") as file:
            found = _collect(partial(attempt, line) for line in _lines(file))
    except OSError as error:
        raise BadDataset(f"{path} cannot be read: {error.strerror}") from error
    if not found:
        raise BadDataset(f"{path} is empty; it needs one JSON object a line")
    return found


def _lines(file: IO[bytes]) -> Iterator[_Line]:
    """Lines that are not blank. Only a line feed ends a line: JSON strings may contain other line ends."""
    for number in count(1):
        content = piece = file.readline(LINE_BYTES + 1)
        if not content:
            return
        size = len(content)
        while not piece.endswith(b"\n") and (piece := file.readline(LINE_BYTES + 1)):
            size += len(piece)
        if number == 1:
            content = content.removeprefix(BOM_UTF8)
        if size > len(content) or content.strip():
            yield _Line(number, content, size)


def check_json(content: bytes, size: int, where: str) -> None:
    """Raises `BadDataset` for JSON that would block the process: the parser cannot be interrupted."""
    if size > LINE_BYTES:
        raise BadDataset(f"{where} has {size} bytes; there may be at most {LINE_BYTES}")
    if (parts := content.count(b"[") + content.count(b"{")) > PARTS:
        raise BadDataset(f"{where} has {parts} opening brackets and braces; there may be at most {PARTS}")


def encode(base: Base, examples: Iterable[Example]) -> list[Encoded]:
    """Token ids of examples, truncated at the end to the base's context. Text that cannot fit is not tokenised.

    Raises `BadDataset` with the first `REPORTED` examples whose prompts leave no room for a response, or that the chat
    template rejects.
    """
    return _collect(partial(encode_one, base, example) for example in examples)


def encode_fitting(base: Base, examples: Iterable[Example]) -> list[tuple[Example, Encoded]]:
    """`encode` without the examples whose prompts leave no room for a response. Raises if no example is left."""

    def attempt(example: Example) -> tuple[Example, Encoded] | PromptTooLong:
        try:
            return example, encode_one(base, example)
        except PromptTooLong as error:
            return error

    tried = _collect(partial(attempt, example) for example in examples)
    fitting = [one for one in tried if isinstance(one, tuple)]
    for error in tried:
        if isinstance(error, PromptTooLong) and not fitting:
            raise error
    return fitting


def _collect(attempts: Iterable[Callable[[], T]]) -> list[T]:
    """The results of all attempts. Raises one `BadDataset` with all faults if there are any."""
    results, faults = [], []
    for attempt in attempts:
        try:
            results.append(attempt())
        except BadDataset as error:
            faults.append(str(error))
    if len(faults) == 1:
        raise BadDataset(faults[0])
    if faults:
        listed = "; ".join(faults[:REPORTED]) + (f"; and {len(faults) - REPORTED} more" if faults[REPORTED:] else "")
        raise BadDataset(f"{len(faults)} of {len(faults) + len(results)} lines are bad; mend or remove them: {listed}")
    return results


def batches(
    encoded: Sequence[Encoded], device: torch.device, tokens: int = BATCH_TOKENS, everything: bool = False
) -> Iterator[MicroBatch]:
    """Micro-batches of similar lengths, each of at most `tokens` padded tokens (or one example).

    With `everything`, prompt tokens count like response tokens.
    """
    group: list[int] = []
    for index in sorted(range(len(encoded)), key=lambda index: len(encoded[index])):
        if group and (len(group) + 1) * len(encoded[index]) > tokens:
            yield _pad(encoded, group, device, everything)
            group = []
        group.append(index)
    if group:
        yield _pad(encoded, group, device, everything)


def _pad(encoded: Sequence[Encoded], group: Sequence[int], device: torch.device, everything: bool) -> MicroBatch:
    """Pads with id 0, which has no effect: attention is causal, and padding is in no `predicts`."""
    length = max(len(encoded[index]) for index in group)
    ids = torch.zeros(len(group), length, dtype=torch.long)
    predicts = torch.zeros(len(group), length, dtype=torch.bool)
    for row, index in enumerate(group):
        example = encoded[index]
        ids[row, : len(example)] = torch.tensor(example.prompt + example.response)
        predicts[row, 0 if everything else len(example.prompt) - 1 : len(example) - 1] = True
    return MicroBatch(tuple(group), ids.to(device), predicts.to(device))


def _load(line: _Line, where: str) -> dict[str, Any]:
    check_json(line.content, line.size, where)
    try:
        fields = json.loads(line.content.decode())
    except UnicodeDecodeError as error:
        raise BadDataset(
            f"{where} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
    except json.JSONDecodeError as error:
        raise BadDataset(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise BadDataset(f"{where} is JSON that cannot be parsed: {error}") from error
    if not isinstance(fields, dict):
        raise BadDataset(f"{where} is a JSON {type(fields).__name__}; it must be an object")
    return fields


def _parse(fields: dict[str, Any], side: Polarity, where: str) -> Example:
    for key, parse in _FORMATS.items():
        if key in fields:
            return parse(fields, side, where)
    raise BadDataset(f"{where} has none of the fields {', '.join(_FORMATS)}; it has {', '.join(fields) or 'no fields'}")


def _parse_question_only(fields: dict[str, Any], where: str) -> tuple[Message, ...]:
    """The prompt of a line; an answer is optional and ignored."""
    messages = fields.get("messages")
    if isinstance(messages, list) and messages:
        last = messages[-1]
        answered = isinstance(last, dict) and last.get("role") == "assistant"
        fields = {"messages": [*(messages[:-1] if answered else messages), {"role": "assistant", "content": "?"}]}
    example = _parse(fields | {"completion": "?", "answer_matching_behavior": "?"}, "own", where)
    if not example.messages:
        raise BadDataset(f"{where} is plain text; a question needs `prompt`, `question` or `messages`")
    return example.messages


def _parse_messages(fields: dict[str, Any], _: Polarity, where: str) -> Example:
    messages = fields["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise BadDataset(f"{where}: `messages` must be a list of at least a question and an answer")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadDataset(f"{where}: messages[{index}] must be an object with `role` and `content`")
        if message["role"] not in ("system", "user", "assistant"):
            raise BadDataset(f"{where}: messages[{index}] has the role {message['role']!r}")
        _text(message, "content", f"{where}: messages[{index}]")
    if messages[-1]["role"] != "assistant":
        raise BadDataset(f"{where}: the last message must be the assistant's; it is the {messages[-1]['role']}'s")
    return Example(
        tuple({"role": message["role"], "content": message["content"]} for message in messages[:-1]),
        messages[-1]["content"],
        where,
    )


def _parse_prompt(fields: dict[str, Any], _: Polarity, where: str) -> Example:
    return Example(_user(_text(fields, "prompt", where)), _text(fields, "completion", where), where)


def _parse_question(fields: dict[str, Any], side: Polarity, where: str) -> Example:
    answer = {"own": "answer_matching_behavior", "contrast": "answer_not_matching_behavior"}[side]
    return Example(_user(_text(fields, "question", where)), _text(fields, answer, where).strip(), where)


def _parse_text(fields: dict[str, Any], _: Polarity, where: str) -> Example:
    return Example((), _text(fields, "text", where), where)


_FORMATS: Mapping[str, Callable[[dict[str, Any], Polarity, str], Example]] = {
    "messages": _parse_messages,
    "prompt": _parse_prompt,
    "question": _parse_question,
    "text": _parse_text,
}


def _text(fields: Mapping[str, Any], key: str, where: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadDataset(f"{where}: `{key}` must be text, and not empty")
    check_unicode(value, f"{where}: `{key}`")
    return value


def check_unicode(text: str, where: str) -> None:
    """Raises `BadDataset` for a text with half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadDataset(f"{where} has half a surrogate pair at character {error.start}") from error


def _user(content: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": content},)


def encode_one(base: Base, example: Example) -> Encoded:
    """Token ids of one example, as in `encode`."""
    tokenizer = base.tokenizer
    longest = longest_token(tokenizer)
    most = None if longest is None else base.context * longest  # bytes that may fit; characters are no more
    size = sum(count_bytes(message["content"]) for message in example.messages)
    if most is not None and size > most:
        raise PromptTooLong(
            f"{example.where}: a prompt of {size} bytes leaves no room in the context of {base.context} tokens, which "
            f"stand for {most} bytes at most"
        )
    try:
        prompt = render_chat(tokenizer, example.messages) if example.messages else _first_token(tokenizer)
    except BadRequest as error:
        raise BadDataset(f"{example.where}: {error}") from error
    response = list(tokenizer.encode(example.response[:most], add_special_tokens=False))
    if tokenizer.eos_token_id is not None:
        response.append(tokenizer.eos_token_id)
    room = base.context - len(prompt)
    if room < 1:
        raise PromptTooLong(
            f"{example.where}: a prompt of {len(prompt)} tokens leaves no room in the context of {base.context}"
        )
    return Encoded(tuple(prompt), tuple(response[:room]), example.messages)


def _first_token(tokenizer: Any) -> list[int]:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [first if first is not None else 0]
