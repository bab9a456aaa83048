"""Micro-batches of responses after stored prompts, run layer by layer with masked weights.

A mask in phase `decode` applies from the last prompt token on, so the keys and values of a prompt are the base's
whatever the mask is. They are computed once, and each later pass runs the response alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from masquerade.evaluate.dataset import BATCH_TOKENS, Encoded
from masquerade.model import Base
from masquerade.pruning.layerwise import Arguments, LayerwiseModel
from masquerade.pruning.scratch import Scratch


class ResponseBatch:
    """Some examples' responses, cut to `tokens` tokens and padded on the right.

    Attributes:
        counted: bool [rows, length], whether a position predicts a token of its response.
        following: int64 [counted], the response's tokens, row by row.
        rows: int64 [counted], the row of each of them.
    """

    def __init__(
        self, base: Base, model: LayerwiseModel, scratch: Scratch, name: str, examples: Sequence[Encoded], tokens: int
    ) -> None:
        self._base, self._model, self._scratch, self._name = base, model, scratch, f"prefix/{name}"
        prompts = [one.prompt for one in examples]
        responses = [one.response[:tokens] for one in examples]
        self._prompts = list(dict.fromkeys(prompts))  # both answers to a prompt share its keys and values
        self._index = torch.tensor([self._prompts.index(prompt) for prompt in prompts], device=base.device)
        self._lengths = torch.tensor([len(prompt) - 1 for prompt in prompts])  # stored positions, by row
        length = max(map(len, responses))
        self._ids, following = (torch.zeros(len(examples), length, dtype=torch.long) for _ in range(2))
        counted = torch.zeros(len(examples), length, dtype=torch.bool)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            self._ids[row, : len(response)] = torch.tensor((prompt[-1], *response[:-1]))
            following[row, : len(response)] = torch.tensor(response)
            counted[row, : len(response)] = True
        self.counted = counted.to(base.device)
        self.following = following[counted].to(base.device)
        self.rows = counted.nonzero()[:, 0].to(base.device)
        self._arguments: list[Arguments] = []

    def __len__(self) -> int:
        return len(self._ids)

    def store_prompts(self) -> Iterator[None]:
        """Compute the keys and values of all prompts but their last tokens; a work item is a layer."""
        longest = int(self._lengths.max())
        if not longest or f"{self._name}/{len(self._model.layers) - 1}" in self._scratch:
            return
        ids = torch.zeros(len(self._prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(self._prompts):
            ids[row, : len(prompt) - 1] = torch.tensor(prompt[:-1])
        hidden, arguments = self._model.enter(input_ids=ids.to(self._base.device), use_cache=False)
        for layer, of_layer in enumerate(arguments):
            seen = _Recorder()
            with torch.no_grad():
                hidden = self._model.run(layer, hidden, of_layer | {"past_key_values": seen})
            keys, values = (self._align(states, longest) for states in seen.states)
            self._scratch.put(f"{self._name}/{layer}", {"keys": keys, "values": values})
            yield

    def enter(self) -> Tensor:
        """The first layer's input [rows, length, hidden]."""
        longest = int(self._lengths.max())
        visible = torch.arange(longest) >= (longest - self._lengths)[:, None]
        inputs: dict[str, Any] = {"input_ids": self._ids.to(self._base.device), "use_cache": False}
        if longest:
            positions = self._lengths[:, None] + torch.arange(self._ids.shape[1])
            mask = torch.cat([visible, torch.ones_like(self._ids, dtype=torch.bool)], dim=1).long()
            inputs |= {"attention_mask": mask.to(self._base.device), "position_ids": positions.to(self._base.device)}
            inputs |= {"past_key_values": self._outline(longest), "use_cache": True}
        hidden, self._arguments = self._model.enter(**inputs)
        return hidden

    def run(self, layer: int, hidden: Tensor) -> Tensor:
        """The output of a layer, after `enter`."""
        arguments = self._arguments[layer]
        if arguments.get("past_key_values") is not None:
            stored = self._scratch.get(f"{self._name}/{layer}")
            mask = arguments.get("attention_mask")
            seen = None if mask is None else mask.shape[-1] - hidden.shape[1]  # fewer in a sliding window
            arguments = arguments | {"past_key_values": _Prefix(stored, self._index, seen)}
        return self._model.run(layer, hidden, arguments)

    def _align(self, states: Tensor, longest: int) -> Tensor:
        """States [prompts, heads, longest, size], padded on the left instead of on the right."""
        aligned = torch.zeros_like(states)
        for row, prompt in enumerate(self._prompts):
            length = len(prompt) - 1
            aligned[row, :, longest - length :] = states[row, :, :length]
        return aligned

    def _outline(self, longest: int) -> DynamicCache:
        """A cache of the stored positions' number and no content, which attention masks are made from."""
        cache = DynamicCache(config=self._base.model.config)
        for layer in range(len(self._model.layers)):
            cache.update(*(torch.zeros(len(self), 1, longest, 1, device=self._base.device) for _ in range(2)), layer)
        return cache


def group(examples: Sequence[Sequence[Encoded]], size: int, tokens: int, most: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices of groups of similar lengths, of at most `size` each; a group is a tuple's examples on rows.

    Neither the prompts of a micro-batch nor its responses, cut to `tokens` tokens, have more than `most` padded tokens,
    unless it is a single group.
    """

    def lengths(index: int) -> tuple[int, int]:
        rows = examples[index]
        return max(len(one.prompt) for one in rows), max(len(one.response[:tokens]) for one in rows)

    found: list[list[int]] = []
    for index in sorted(range(len(examples)), key=lengths):
        batch = [*found[-1], index] if found else []
        rows = sum(len(examples[one]) for one in batch)
        fits = all(rows * max(length) <= most for length in zip(*map(lengths, batch), strict=True))
        if batch and len(batch) <= size and fits:
            found[-1] = batch
        else:
            found.append([index])
    return found


class _Recorder:
    """Stands in for a cache and keeps what one layer adds to it."""

    states: tuple[Tensor, Tensor]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.states = keys, values
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0


class _Prefix:
    """Stands in for a cache that has stored keys and values and keeps no others."""

    def __init__(self, stored: dict[str, Tensor], index: Tensor, seen: int | None) -> None:
        self._stored, self._index, self._seen = stored, index, seen

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._extend("keys", keys), self._extend("values", values)

    def get_seq_length(self, *_: Any) -> int:
        return self._stored["keys"].shape[2]

    def _extend(self, name: str, states: Tensor) -> Tensor:
        stored = self._stored[name].to(states.device)[self._index]
        cut = stored if self._seen is None else stored[:, :, stored.shape[2] - self._seen :]
        return torch.cat([cut.to(states.dtype), states], dim=2)
