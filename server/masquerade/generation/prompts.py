"""Tokenises the prompts of requests, off the event loop and within the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from masquerade.generation.messages import Message, Tool
from masquerade.http.access import Caller
from masquerade.model import Room, TemplateOptions, check_bytes, encode, render_chat, too_long
from masquerade.service.serving import Serving

T = TypeVar("T")
INLINE_BYTES = 2048  # up to this size of the body, a thread would cost more than tokenising at once
MIN_COUNTED = 2**16  # tokens that `/tokenize` counts, however short the context is
PROMPTS_FACTOR = 4  # all prompts of a request may have this many times the tokens of one


def context_room(serving: Serving) -> Room:
    """The limit of the model's context, or of the engine's cache if that has less room, with OpenAI's message."""
    limit = serving.engine.max_length
    given = " with the cache it was given" if limit < serving.base.context else ""
    return Room(limit, f"This model's maximum context length is {limit} tokens{given}.")


def counting_room(serving: Serving) -> Room:
    """The limit of `/tokenize`: the context, and at least `MIN_COUNTED`."""
    limit = max(serving.base.context, MIN_COUNTED)
    return Room(limit, f"A text of up to {limit} tokens is tokenised.")


async def tokenise_chat(
    serving: Serving,
    caller: Caller,
    size: int,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    room: Room,
    options: TemplateOptions | None = None,
) -> list[int]:
    """The token ids of a chat, from a body of `size` bytes.

    Raises `ContextTooLong` for a chat that is far longer than the room, before tokenising if the bytes of its messages
    show that, and `Overloaded` if too many texts wait to be tokenised.
    """
    tokenizer = serving.base.tokenizer
    check_bytes(tokenizer, (text for message in messages for text in message.texts()), room, "messages")

    def render() -> list[int]:
        plain = [message.plain() for message in messages]
        functions = [tool.model_dump(exclude_none=True) for tool in tools or ()]
        return render_chat(tokenizer, plain, functions, room, options)

    return await run_off_loop(serving, caller, size, render)


async def tokenise_texts(
    serving: Serving,
    caller: Caller,
    size: int,
    prompts: Sequence[str | list[int]],
    room: Room,
    *,
    special: bool = True,
) -> list[list[int]]:
    """The token ids of prompts, from a body of `size` bytes; `special` adds the tokenizer's special tokens.

    Raises `ContextTooLong` as `tokenise_chat` does, for one prompt or for all of them together.
    """
    tokenizer = serving.base.tokenizer
    total = PROMPTS_FACTOR * max(room.tokens, MIN_COUNTED)
    for prompt in prompts:
        if isinstance(prompt, str):
            check_bytes(tokenizer, [prompt], room, "prompt")
        elif len(prompt) > room.tokens:
            raise too_long(room, f"the prompt has {len(prompt)} tokens", "prompt", len(prompt))

    def encode_all() -> list[list[int]]:
        encoded, tokens = [], 0
        for prompt in prompts:
            ids = prompt if isinstance(prompt, list) else encode(tokenizer, prompt, room, "prompt", special=special)
            encoded.append(ids)
            tokens += len(ids)
            if tokens > total:
                together = Room(total, f"The prompts of a request may have {total} tokens together.")
                raise too_long(together, f"the first {len(encoded)} of {len(prompts)} have {tokens}", "prompt", tokens)
        return encoded

    return await run_off_loop(serving, caller, size, encode_all)


async def run_off_loop(serving: Serving, caller: Caller, size: int, work: Callable[[], T]) -> T:
    """The result of work on the texts of a body of `size` bytes, in a thread unless the body is small."""
    return work() if size <= INLINE_BYTES else await serving.workers.run(caller.share, size, work)
