"""Renders a chat to token ids with the base's chat template, also with tools that the template does not support.

Only the template makes special tokens: a message that spells one gets ordinary tokens.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from jinja2 import TemplateError

from masquerade.errors import BadRequest, InvalidValue, quote
from masquerade.model.encoding import PIECE, Room, check_tokens
from masquerade.model.tools import Dialect, find_dialect

_PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
)
LONGEST_SPECIAL = 1024  # characters of a special token's name
_OPEN, _CLOSE = "\ue000", "\ue001"  # private use; enclose the index of a spelled token while the template runs


_TOOL_PROMPT = """You may call functions, each described by a line of JSON:
%s
To call one, answer only with
<tool_call>
{"name": "...", "arguments": {...}}
</tool_call>
once for each call. Results come back in <tool_response>."""


@dataclass(frozen=True)
class TemplateOptions:
    """What a chat template is given beside messages and tools."""

    add_generation_prompt: bool = True  # whether the prompt begins an assistant's message
    continue_final_message: bool = False  # whether the answer continues the last message, an assistant's
    variables: Mapping[str, Any] = field(default_factory=dict)  # the template's own, such as `enable_thinking`


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    room: Room | None = None,
    options: TemplateOptions | None = None,
) -> list[int]:
    """The prompt's token ids for the assistant's next message, or as `options` say.

    `messages` and `tools` have the form of chat templates: text contents, and a call's arguments as an object. A
    template that does not support tools, or whose dialect is unknown, gets them as text. Without a chat template the
    messages' texts are joined by line feeds. Raises `BadRequest` with the template's own message if it refuses them,
    and `InvalidValue` for a variable that is not the template's own. Raises `ContextTooLong` for chats far longer than
    the room, if one is given, without tokenising all of it; what is returned may exceed the room by a factor.
    """
    options = options or TemplateOptions()
    _check_variables(tokenizer, options.variables)
    if room is not None:
        check_tokens(tokenizer, list(_texts(options.variables)), room, "chat_template_kwargs")
        check_tokens(tokenizer, list(_texts(messages)), room, "messages")
        check_tokens(tokenizer, list(_texts(tools)), room, "tools")
    if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        dialect = find_dialect(tokenizer)
        if dialect.single_call:
            messages = list(_split_calls(messages))
        if not dialect.native:
            messages, tools = _describe_tools(_render_calls(dialect, messages), tools), ()
    pattern = _special(tokenizer)
    spelled: list[str] = []

    def hide(text: str) -> Iterator[str]:
        end = 0
        for match in _find(pattern, text):
            yield f"{text[end : match.start()]}{_OPEN}{len(spelled)}{_CLOSE}"
            spelled.append(match.group())
            end = match.end()
        yield text[end:]

    def hide_in(value: Any) -> Any:
        if isinstance(value, str):
            return "".join(hide(value))
        if isinstance(value, Mapping):
            return {hide_in(key): hide_in(inner) for key, inner in value.items()}
        return [hide_in(inner) for inner in value] if isinstance(value, list | tuple) else value

    try:
        text = tokenizer.apply_chat_template(
            hide_in(messages),
            tools=hide_in(tools) or None,
            chat_template=None if tokenizer.chat_template else _PLAIN,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            tokenize=False,
            **hide_in(options.variables),
        )
    except ValueError as error:
        if not options.continue_final_message:
            raise
        raise BadRequest(
            "the model's chat template changes the last message, which can therefore not be continued", param="messages"
        ) from error
    except (TemplateError, TypeError, RecursionError) as error:
        raise BadRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error
    ids: list[int] = []
    literal = lru_cache(partial(_literal(tokenizer).encode, add_special_tokens=False, split_special_tokens=True))
    for index, part in enumerate(re.split(f"{_OPEN}(\\d+){_CLOSE}", text) if spelled else [text]):
        if index % 2:
            ids += literal(spelled[int(part)])
        else:
            ids += tokenizer.encode(part, add_special_tokens=False)
    return ids


def open_user_message(tokenizer: Any) -> list[int]:
    """The token ids of a chat up to where its first user's message begins; empty without a chat template."""
    if not tokenizer.chat_template:
        return []
    messages = [{"role": "user", "content": _OPEN}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError):
        return []
    opening: list[int] = tokenizer.encode(text.split(_OPEN)[0], add_special_tokens=False)
    return opening


def _check_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """Refuse names that the renderer sets itself."""
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    taken = {"messages", "conversations", *own, *tokenizer.special_tokens_map}
    if name := next((name for name in variables if name in taken), None):
        raise InvalidValue(
            f"`chat_template_kwargs` cannot set {quote(name)}, which the server sets", param="chat_template_kwargs"
        )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _find(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """All matches, from piece to piece of the text: other threads run between the pieces."""
    start = 0
    while start < len(text):
        end = start + PIECE
        match = pattern.search(text, start, end + LONGEST_SPECIAL)
        if match is None or match.start() >= end:  # the next piece finds it
            start = end
        else:
            yield match
            start = match.end()


def _split_calls(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Split parallel calls into consecutive ones, each followed by its own result."""
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            yield message
            continue
        count = next((place for place, other in enumerate(rest) if other["role"] != "tool"), len(rest))
        results, rest = rest[:count], rest[count:]
        for call in calls:
            yield {**message, "tool_calls": [call]}
            yield from (result for result in results if result.get("tool_call_id") == call.get("id"))


def _render_calls(dialect: Dialect, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Render calls as text of the assistant, and results as text of the user."""
    rendered: list[dict[str, Any]] = []
    answering = False  # results of parallel calls share one message
    for message in messages:
        role, text = message["role"], message["content"]
        if role == "tool":
            text = f"<tool_response>\n{text}\n</tool_response>"
            if answering:
                rendered[-1]["content"] += f"\n{text}"
                continue
            role = "user"
        for call in message.get("tool_calls") or ():
            before, after = dialect.frame(call["function"]["name"])
            written = before + json.dumps(call["function"]["arguments"], ensure_ascii=False) + after
            text = f"{text}\n{written}" if text else written
        rendered.append({"role": role, "content": text})
        answering = message["role"] == "tool"
    return rendered


def _describe_tools(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Append the tools' description to the system message, or make one."""
    if not tools:
        return messages
    text = _TOOL_PROMPT % "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


@lru_cache(maxsize=8)
def _special(tokenizer: Any) -> re.Pattern[str]:
    """Matches what must not become a special token."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted([*special, _OPEN, _CLOSE], key=len, reverse=True))))


@lru_cache(maxsize=8)
def _literal(tokenizer: Any) -> Any:
    """A tokenizer copy that never makes special tokens: the switch is state that threads would share."""
    literal = copy.deepcopy(tokenizer)
    literal.encode("", add_special_tokens=False, split_special_tokens=True)  # sets it
    return literal
