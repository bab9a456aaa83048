"""Collects statistics one decoder layer at a time.

Knows how to run a transformers decoder layer by layer, forwards for activations and Hessians, backwards for gradients
and Fisher information. Refuses to know how weights are ranked. Nothing here changes a weight: gradients are taken and
never followed. Padding is never counted.

Work is ordered by layer, then by micro-batch: the hidden states of all micro-batches wait at a layer's border, in
`Scratch`. So a Hessian or a gradient lives while its layer is visited, and peak memory is

    the base + the statistics of one layer's targets + the activations of one micro-batch in one layer (and its logits),

and beside that, in memory or on disk as `Scratch` has it, tokens x hidden size of hidden states: one layer's for
forward statistics, every layer's for gradients. Gradients are products of a Linear's input and the gradient of its
output, so weights never require gradients. On the way back a layer is computed again, but for products that are only
added to its output (down_proj's, in a Llama).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from masquerade.errors import BuildFailed
from masquerade.evaluate.dataset import Padded
from masquerade.evaluate.layers import find_layers
from masquerade.evaluate.metrics import log_probabilities
from masquerade.kernels import dense_weight
from masquerade.model import Base, find_targets
from masquerade.pruning.evidence import NOTHING, Channels, Evidence, Kind, Seen
from masquerade.pruning.moments import Moments
from masquerade.pruning.scratch import Scratch

Role = Literal["own", "contrast", "neutral"]
BLOCK = 256  # columns of a Hessian that are added at once
Visit = Callable[[int, Mapping[str, Evidence]], Iterator[int]]  # layer, evidence by target -> targets done by an item


@dataclass(frozen=True)
class CalibrationText:
    """What one role says, in micro-batches, and which statistics are wanted of it."""

    batches: Sequence[Padded]
    needs: frozenset[Kind]

    @property
    def tokens(self) -> int:
        """Counted positions."""
        return sum(int(batch.predicts.sum()) for batch in self.batches)


@dataclass(frozen=True)
class _Item:
    """A micro-batch of a role."""

    role: Role
    index: int
    batch: Padded

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"


@dataclass
class _Sums:
    """What one layer's Linears have shown of one role so far."""

    channels: dict[str, Channels] = field(default_factory=dict)  # of the first Linear of each input
    hessians: dict[str, Tensor] = field(default_factory=dict)  # likewise; blocks below the diagonal, until `settle`
    gradients: dict[str, Tensor] = field(default_factory=dict)
    fishers: dict[str, Tensor] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)  # by Linear, the first one that has the same input

    def settle(self, tokens: int) -> None:
        """Make means over counted tokens. Raises `BuildFailed` for a Linear that met NaN or infinity."""
        for sums in (self.hessians, self.gradients, self.fishers):
            for name, value in sums.items():
                if not bool(value.div_(tokens).isfinite().all()):
                    raise BuildFailed(f"{name} has statistics that are not finite; do the base's activations overflow?")
        for hessian in self.hessians.values():
            _mirror(hessian)

    def seen(self, name: str) -> Seen:
        """Of one Linear."""
        first = self.first.get(name, name)
        return Seen(
            self.channels.get(first), self.hessians.get(first), self.gradients.get(name), self.fishers.get(name)
        )


class Walk:
    """Passes over calibration text; `visit(layer, evidence)` is called when a layer's statistics are complete.

    `forward` and `backward` are generators of work items, those of the visits among them. An item is the number of
    micro-batches and targets that are done with it, of `forward_items` and `backward_items`: none, one, or all of a
    layer whose work is in `scratch` already, which is not visited again.
    """

    def __init__(
        self, base: Base, targets: Mapping[str, nn.Linear], texts: Mapping[Role, CalibrationText], scratch: Scratch
    ) -> None:
        self._base, self._texts, self._scratch = base, texts, scratch
        self._layers = find_layers(base.model)
        self._targets, self._linears = (
            _by_layer(linears, len(self._layers)) for linears in (targets, find_targets(base.model))
        )
        self._items = [_Item(role, i, batch) for role, text in texts.items() for i, batch in enumerate(text.batches)]
        self._traced = [item for item in self._items if self._is_traced(item)]
        self._tokens = {role: text.tokens for role, text in texts.items()}
        self._arguments: dict[str, list[dict[str, Any]]] = {}  # of every layer, by item
        linears = sum(map(len, self._targets))
        self.forward_items = len(self._items) * (len(self._layers) + 1) + linears
        self.backward_items = len(self._traced) * len(self._layers) + linears

    def forward(self, visit: Visit) -> Iterator[int]:
        """Embed everything and carry it through all layers, for activations and Hessians (and `backward`'s sake)."""
        for item in self._items:
            self._embed(item)
            yield 1
        for number, targets in enumerate(self._targets):
            if self._is_done("forward", number):
                yield len(self._items) + len(targets)
                continue
            sums: dict[Role, _Sums] = {role: _Sums() for role in self._texts}
            for item in self._items:
                if number < len(self._layers) - 1 or self._texts[item.role].needs & {"channels", "hessian"}:
                    self._advance(item, number, sums[item.role])
                if number and not self._is_traced(item):
                    self._scratch.drop(f"hidden/{number - 1}/{item.name}")
                yield 1
            yield from self._visit(visit, number, sums)
            self._finish("forward", number)
        for item in self._items:
            if not self._is_traced(item):
                self._scratch.drop(f"hidden/{len(self._layers) - 1}/{item.name}")

    def backward(self, visit: Visit) -> Iterator[int]:
        """Carry the gradient of the responses' log-likelihood from the last layer to the first. After `forward`."""
        for number, targets in reversed(list(enumerate(self._targets))):
            if self._is_done("backward", number):
                yield len(self._traced) + len(targets)
                continue
            sums: dict[Role, _Sums] = {role: _Sums() for role in self._texts}
            added: Sequence[nn.Linear] = ()
            for item in self._traced:
                added = self._retreat(item, number, sums[item.role], added)
                self._scratch.drop(f"hidden/{number + 1}/{item.name}")
                self._scratch.drop(f"gradient/{number + 2}/{item.name}")
                yield 1
            yield from self._visit(visit, number, sums)
            self._finish("backward", number)
        self._scratch.drop("hidden")
        self._scratch.drop("gradient")

    def _visit(self, visit: Visit, number: int, sums: Mapping[Role, _Sums]) -> Iterator[int]:
        yield from visit(number, self._conclude(number, sums))

    def _is_traced(self, item: _Item) -> bool:
        return bool(self._texts[item.role].needs & {"gradient", "fisher"})

    def _is_done(self, way: str, number: int) -> bool:
        return f"done/{way}-{number}" in self._scratch

    def _finish(self, way: str, number: int) -> None:
        self._scratch.put(f"done/{way}-{number}", {"layer": torch.tensor(number)})

    def _embed(self, item: _Item) -> None:
        """Run the model around its layers; what the first layer would get, and every layer's other arguments."""
        arguments: list[dict[str, Any]] = []

        def record(hidden: Tensor, *_: Any, **kwargs: Any) -> Tensor:
            if not arguments and not self._is_done("forward", 0):
                self._scratch.put(f"hidden/0/{item.name}", {"states": hidden})
            arguments.append(kwargs)
            if len(arguments) == len(self._layers):
                raise _Stop
            return hidden

        with _bypassed(self._layers, [record] * len(self._layers)), torch.no_grad():
            try:
                self._base.model(input_ids=item.batch.ids, use_cache=False)
            except _Stop:
                self._arguments[item.name] = arguments

    def _advance(self, item: _Item, number: int, sums: _Sums) -> None:
        hidden = self._load(f"hidden/{number}/{item.name}")
        counted = item.batch.predicts
        observer = _Observer(sums, self._texts[item.role].needs, counted)
        with _observed(self._targets[number], observer.see), torch.no_grad():
            output = self._run(number, item, hidden)
        if number < len(self._layers) - 1:
            self._scratch.put(f"hidden/{number + 1}/{item.name}", {"states": output})

    def _retreat(self, item: _Item, number: int, sums: _Sums, added: Sequence[nn.Linear]) -> Sequence[nn.Linear]:
        """Carry an item's gradient back through a layer.

        The products of the Linears `added` are not computed. Gives the Linears that are only added to the layer's
        output, which depends on how the layer computes and not on the item. The last layer's products are all computed:
        its output is what the head's gradient is taken at.
        """
        hidden = self._load(f"hidden/{number}/{item.name}").requires_grad_(True)
        tracer = _Tracer(sums, self._texts[item.role].needs)
        above = None if number == len(self._layers) - 1 else self._load(f"gradient/{number + 1}/{item.name}")
        made: dict[str, Tensor] = {}

        def keep(name: str, _: Tensor, output: Tensor) -> None:
            made[name] = output

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_observed(self._targets[number], tracer.see))
            stack.enter_context(_unmultiplied(added))
            if not added and above is not None:
                stack.enter_context(_observed(self._linears[number], keep))
            output = self._run(number, item, hidden)
            found = [self._linears[number][name] for name in _find_added(output, made)]
            given = self._head_gradient(item, output.detach()) if above is None else above
            (below,) = torch.autograd.grad(output, hidden, given)
        if number:
            self._scratch.put(f"gradient/{number}/{item.name}", {"states": below})
        return found or added

    def _head_gradient(self, item: _Item, output: Tensor) -> Tensor:
        """d (sum of the counted tokens' log-likelihoods) / d (the last layer's output).

        What follows the layers, a norm and the LM head, sees positions one by one: it gets the counted ones only.
        """
        counted = item.batch.predicts
        leaf = output[counted].unsqueeze(0).requires_grad_(True)  # [1, counted, hidden]

        def hand_over(*_: Any, **__: Any) -> Tensor:
            return leaf

        def pass_on(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden

        with _bypassed(self._layers, [pass_on] * (len(self._layers) - 1) + [hand_over]):
            logits = self._base.model(input_ids=item.batch.ids, use_cache=False).logits[0]
        following = item.batch.ids.roll(-1, 1)[counted]  # the last position of a row is never counted
        (gradient,) = torch.autograd.grad(log_probabilities(logits, following).sum(), leaf)
        above = torch.zeros_like(output)
        above[counted] = gradient[0]
        return above

    def _run(self, number: int, item: _Item, hidden: Tensor) -> Tensor:
        output = self._layers[number](hidden, **self._arguments[item.name][number])
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def _load(self, name: str) -> Tensor:
        return self._scratch.get(name)["states"].to(self._base.device).detach()

    def _conclude(self, number: int, sums: Mapping[Role, _Sums]) -> dict[str, Evidence]:
        """What sums say, as means over counted tokens. Raises `BuildFailed` for a Linear that met NaN or infinity."""
        for role, own in sums.items():
            own.settle(self._tokens[role])

        def see(name: str, role: Role) -> Seen:
            return sums[role].seen(name) if role in sums else NOTHING

        return {
            name: Evidence(see(name, "own"), see(name, "contrast"), see(name, "neutral"))
            for name in self._targets[number]
        }


def layer_number(name: str) -> int:
    """Of a target: `model.layers.3.mlp.up_proj` is in layer 3."""
    return int(name.split(".layers.")[1].split(".")[0])


class _Stop(Exception):
    """Everything that was wanted of a forward pass has been seen."""


class _Observer:
    """Adds what Linears get to a role's sums. Linears that share an input share its statistics."""

    def __init__(self, sums: _Sums, needs: frozenset[Kind], counted: Tensor) -> None:
        self._sums, self._needs, self._counted = sums, needs, counted
        self._owners = counted.nonzero()[:, 0]  # example of each counted position
        self._last: tuple[Tensor, str] | None = None  # an input, and the first Linear that got it

    def see(self, name: str, x: Tensor, _: Tensor) -> None:
        if self._last is not None and self._last[0] is x:
            self._sums.first[name] = self._last[1]
            return
        self._last = (x, name)
        rows = x[self._counted].float()  # [counted, in]
        if "channels" in self._needs:
            channels, known = self._measure(rows), self._sums.channels.get(name)
            self._sums.channels[name] = known.merge(channels) if known else channels
        if "hessian" in self._needs:
            _add_squares(self._sums.hessians, name, rows)

    def _measure(self, rows: Tensor) -> Channels:
        squares = rows.square()
        by_example = squares.new_zeros(len(self._counted), rows.shape[1]).index_add_(0, self._owners, squares)
        levels = (by_example / self._counted.sum(1, keepdim=True)).sqrt()  # [examples, in]
        magnitudes = Moments.from_sums(len(rows), rows.abs().sum(0), by_example.sum(0))
        return Channels(magnitudes, Moments.of(levels))


class _Tracer:
    """Adds the gradients of Linears' weights to a role's sums, once the gradients of their outputs are known."""

    def __init__(self, sums: _Sums, needs: frozenset[Kind]) -> None:
        self._sums, self._needs = sums, needs

    def see(self, name: str, x: Tensor, output: Tensor) -> None:
        rows = x.detach().flatten(0, -2)  # [positions, in]

        def trace(gradient: Tensor) -> None:
            above = gradient.flatten(0, -2)  # [positions, out]
            if "gradient" in self._needs:
                _add_product(self._sums.gradients, name, above, rows)
            if "fisher" in self._needs:
                _add_product(self._sums.fishers, name, above.float().square(), rows.float().square())

        output.register_hook(trace)  # type: ignore[no-untyped-call]


class _Unmultiplied(torch.autograd.Function):
    """x Wᵀ for the sake of its gradient: the value is zero, and costs nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.new_zeros(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight, None


def _find_added(output: Tensor, made: Mapping[str, Tensor]) -> list[str]:
    """Which tensors reach `output` by additions alone, and in no other way: the gradient of each is the output's own.

    Read from the graph that autograd keeps, whatever the values are. A tensor of the output's shape is not broadcast.
    """
    assert output.grad_fn is not None
    users: dict[Any, list[Any]] = {output.grad_fn: []}  # of each node: what computes with it, once for each use
    todo: list[Any] = [output.grad_fn]
    while todo:
        node = todo.pop()
        for source, _ in node.next_functions:
            if source is not None and source not in users:
                users[source] = []
                todo.append(source)
            if source is not None:
                users[source].append(node)

    def is_only_added(node: Any) -> bool:
        while node is not output.grad_fn:
            if len(users.get(node, ())) != 1:
                return False
            (node,) = users[node]
            if node.name() != "AddBackward0" or node._saved_alpha != 1:
                return False
        return True

    return [name for name, tensor in made.items() if tensor.shape == output.shape and is_only_added(tensor.grad_fn)]


def _add_product(sums: dict[str, Tensor], name: str, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right, of [positions, out] and [positions, in], to a sum in fp32."""
    if name not in sums:
        sums[name] = (left.T @ right).float()
    elif left.dtype == sums[name].dtype:
        sums[name].addmm_(left.T, right)
    else:
        sums[name] += left.T @ right


def _add_squares(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
    """Add rowsᵀ rows, of [positions, in], in blocks of columns from the diagonal down; `_mirror` makes the rest."""
    total = sums.setdefault(name, rows.new_zeros(rows.shape[1], rows.shape[1]))
    for start in range(0, len(total), BLOCK):
        total[start:, start : start + BLOCK].addmm_(rows[:, start:].T, rows[:, start : start + BLOCK])


def _mirror(total: Tensor) -> None:
    """Make what `_add_squares` added symmetric."""
    for start in range(BLOCK, len(total), BLOCK):
        total[start - BLOCK : start, start:] = total[start:, start - BLOCK : start].T


def _by_layer(linears: Mapping[str, nn.Linear], layers: int) -> list[dict[str, nn.Linear]]:
    found: list[dict[str, nn.Linear]] = [{} for _ in range(layers)]
    for name, linear in linears.items():
        found[layer_number(name)][name] = linear
    return found


@contextmanager
def _observed(targets: Mapping[str, nn.Linear], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Within, every target tells its name, input and output."""

    def listen(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            see(name, args[0], output)

        return hook

    handles = [linear.register_forward_hook(listen(name)) for name, linear in targets.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _bypassed(modules: Sequence[nn.Module], instead: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
    """Within, calling a module calls its stand-in."""
    before: list[Any] = [vars(module).get("forward") for module in modules]  # masks' hold on a Linear, for one
    for module, function in zip(modules, instead, strict=True):
        module.forward = function
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            if function is None:
                del module.forward
            else:
                module.forward = function


def _unmultiplied(linears: Sequence[nn.Linear]) -> AbstractContextManager[None]:
    """Within, the Linears' outputs have gradients and no values."""
    return _bypassed(linears, [partial(_forgo, linear) for linear in linears])


def _forgo(linear: nn.Linear, x: Tensor) -> Tensor:
    output: Tensor = _Unmultiplied.apply(x, dense_weight(linear).to(x.dtype))  # type: ignore[no-untyped-call]
    return output
