"""Short ways to ask an engine, and to hear what it says."""

from __future__ import annotations

import threading

from masquerade.engine import Engine, Event, Finished, Request, SamplingParams, ScoredPrompt, Token


class Listener:
    """Collects a request's events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished):
            self.ended.set()

    @property
    def end(self) -> Finished:
        """The last event; there must be one, and nothing after."""
        (end,) = (event for event in self.events if isinstance(event, Finished))
        assert self.events[-1] is end
        return end

    @property
    def tokens(self) -> list[Token]:
        """The events before it."""
        return [event for event in self.events if isinstance(event, Token)]

    @property
    def text(self) -> str:
        """What all events say together."""
        return "".join(event.text for event in self.events if not isinstance(event, ScoredPrompt))


def ask(prompt: list[int] | None = None, count: int = 8, **more: object) -> tuple[Request, Listener]:
    """A greedy request, unless told otherwise, and its listener."""
    listener = Listener()
    more = {"sampling": SamplingParams(temperature=0), **more}
    return Request(prompt or [1, 20, 30], count, listener, **more), listener  # type: ignore[arg-type]


def finish(engine: Engine) -> None:
    """Step until there is nothing to do."""
    while engine.step():
        pass


def is_whole(engine: Engine) -> bool:
    """Whether all blocks and batch indices are free and no request is left."""
    scheduler = engine._scheduler
    idle = not scheduler.running and not len(scheduler.waiting) and not engine._unfinished
    return (
        idle
        and engine._block_manager.num_free == engine._block_manager.num_blocks
        and len(scheduler._free_indices) == engine.config.max_running
    )
