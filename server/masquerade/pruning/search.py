"""Searches for a persona's mask in several steps, with gradients at the masked model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskstore import Target
from maskstore import encode as encode_target
from masquerade.errors import BuildFailed
from masquerade.evaluate.dataset import Encoded
from masquerade.kernels import add_gains, dense_weight, differentiate, divergences, log_probabilities
from masquerade.model import Base, trim_heap
from masquerade.pruning.hooks import replaced
from masquerade.pruning.layerwise import LayerwiseModel, group_by_layer
from masquerade.pruning.responses import ResponseBatch, group
from masquerade.pruning.scores import ScoreSettings, attribution, fisher_cost
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.statistics import LinearStatistics

Pair = tuple[Encoded, Encoded]  # the persona's answer and its opposite's, mostly to the same prompt
Items = Iterator[int]
# the targets of a state -> its worth; the state with the largest is kept
Judge = Callable[[Mapping[str, Target]], Generator[None, None, float]]


@dataclass(frozen=True)
class SearchSettings:
    """The hyperparameters of a search; docs/method.md has the experiments that they come from."""

    gamma: float = 0.5  # strength at which gradients are taken
    rho: float = 0.0008  # largest share of all weights that is pruned
    steps: int = 24
    judged_from: int = 12  # step of the first judgement; before, the mask is small and its effect noise
    judged_every: int = 6  # steps
    saved_every: int = 3  # steps
    patience: int = 2  # judgements without improvement that end the search
    pairs: int = 256  # most pairs, drawn by seed
    pairs_a_batch: int = 4
    batches_a_step: int = 4  # of pairs
    neutral: int = 512  # most neutral texts
    neutral_a_batch: int = 8
    neutral_batches_a_step: int = 2
    tokens: int = 48  # most tokens of a response
    initial: float = 10.0  # weight of the statistics' gradient beside a step's
    initial_share: float = 0.05  # of rho, before the first step
    smallest_share: float = 0.02  # of rho
    concentration: float = 10.0  # largest share of a Linear's weights that is pruned, in shares of all weights
    resize: float = 0.3  # largest change of the share in a step, natural logarithm
    exchange: float = 0.2  # largest share of a Linear's pruned weights that a step exchanges
    protected: float = 0.03  # share of each Linear's weights, those of highest cost, that are never pruned
    likelihood: float = 0.5  # weight of the persona's likelihood in the loss
    sharpness: float = 2.0  # of the contrast
    pressure: float = 6.0  # weight of the KL divergence on neutral text in the loss
    divergence: float = 0.035  # target of that divergence, nats a token
    seed: int = 0


@dataclass
class _State:
    """A search after some steps."""

    gains: dict[str, Tensor]  # by how much the loss falls per unit of each weight's pruning, summed over steps; fp32
    pruned: dict[str, Tensor]  # sorted indices into each flat weight, int64
    share: float  # of rho that is pruned
    weights: dict[str, Tensor] = field(default_factory=dict)  # the masked weights
    step: int = 0
    divergence: float | None = None  # moving mean over steps, nats a token
    best: float = -math.inf
    kept: dict[str, Tensor] = field(default_factory=dict)  # `pruned` of the best state
    unimproved: int = 0  # judgements since then
    saved: int = 0  # the step that is in the scratch


@dataclass(frozen=True)
class Ranking:
    """What pruning a Linear's weights is worth, where that may matter."""

    best: Tensor  # the largest values, in descending order
    places: Tensor  # their indices into the flat weight
    current: Tensor  # the values of the weights that are pruned, in order


class MaskSearch:
    """Finds the masks of one or both sides of a contrast.

    Call `add_layer` for every layer of statistics, then `prepare`, then `run` for a side. Each generates work items of
    at most one layer of a micro-batch, or one Linear's ranking. The base's weights are not changed: masked copies of
    the targets' weights exist while a side is searched. Memory beside the base: those copies, four bytes a target's
    weight for the gains, four a side for gradients and costs, and what `scratch` has in memory of the prompts' keys
    and values.

    A step takes the gradient at the masked model of

        likelihood NLL(own) + softplus(-sharpness (margin - the base's margin)) + pressure KL(base || masked)

    over a few pairs and neutral texts; margin is NLL(contrast) - NLL(own), nats a token. The contrast is bounded, as in
    DPO (Rafailov et al. 2023); otherwise the search makes both answers unlikely. Each weight's product with its
    gradient is added to its gain. The weights of largest gain²/cost in all Linears are pruned, which is what the best
    step along one weight wins of a quadratic loss; the cost is that of `attribution-fisher`. Their number follows the
    divergence to its target: it grows while the divergence is below.
    """

    def __init__(
        self,
        base: Base,
        targets: Mapping[str, nn.Linear],
        sides: Sequence[int],
        settings: SearchSettings,
        scratch: Scratch,
    ) -> None:
        self._base, self._targets, self._sides, self._settings = base, targets, sides, settings
        self._scratch = scratch
        self._model = LayerwiseModel(base)
        self._layers = group_by_layer(targets, len(self._model.layers))
        self._pairs: list[ResponseBatch] = []
        self._neutral: list[ResponseBatch] = []
        self._likelihoods: list[Tensor] = []  # the base's mean NLL of each row of each batch of pairs
        self._answers: list[Tensor] = []  # the base's last hidden states of each neutral batch, [counted, hidden]

    @property
    def items(self) -> int:
        """Number of work items of `run` for a side, without those of its judge."""
        batches = self._settings.batches_a_step + self._settings.neutral_batches_a_step
        step = batches * (2 * len(self._layers) + 1) + len(self._targets)
        return len(self._targets) + self._settings.steps * step

    def add_layer(self, linears: Mapping[str, nn.Linear], statistics: Mapping[str, LinearStatistics]) -> Iterator[int]:
        """Keep the initial gains and the costs of a layer's Linears; a work item is one of them."""
        for name, linear in linears.items():
            weight = dense_weight(linear).float()
            for side in self._sides:
                of_side = statistics[name] if side == 1 else statistics[name].swapped()
                gains = attribution(weight, of_side, ScoreSettings()).mul_(-self._settings.initial)
                costs = fisher_cost(weight, of_side)
                if not bool(gains.isfinite().all() and costs.isfinite().all()):
                    raise BuildFailed(f"the statistics of {name} are not finite; are there NaN among its weights?")
                self._scratch.put(
                    f"start/{side}/{name}", {"gains": gains.bfloat16(), "worth": self._weigh(costs).bfloat16()}
                )
            yield 1

    def prepare(self, pairs: Sequence[Pair], neutral: Sequence[Encoded]) -> Generator[None, None, None]:
        """Store the prompts' keys and values and what the base makes of the responses."""
        drawn = random.Random(self._settings.seed).sample(list(pairs), min(self._settings.pairs, len(pairs)))
        for number, members in enumerate(group(drawn, self._settings.pairs_a_batch, self._settings.tokens)):
            rows = [drawn[index][side] for side in (0, 1) for index in members]
            self._pairs.append(self._batch(f"pairs-{number}", rows))
            yield
        texts = [(one,) for one in neutral[: self._settings.neutral]]
        for number, members in enumerate(group(texts, self._settings.neutral_a_batch, self._settings.tokens)):
            self._neutral.append(self._batch(f"neutral-{number}", [texts[index][0] for index in members]))
            yield
        for batch in (*self._pairs, *self._neutral):
            yield from batch.store_prompts()
            states = yield from self._read(batch)
            if len(self._likelihoods) < len(self._pairs):
                with torch.no_grad():
                    self._likelihoods.append(_row_means(batch, self._model.predict(states)))
            else:
                self._answers.append(states)
            yield

    def run(self, side: int, judge: Judge) -> Generator[int | None, None, dict[str, Target]]:
        """The targets of the best state that `judge` saw; continues from the last step that `scratch` has.

        Its own work items yield 1, or 0 where they only convert or keep a Linear, and those of the judge None.
        """
        state = yield from self._start(side)
        while state.step < self._settings.steps and state.unimproved < self._settings.patience:
            yield from self._accumulate(side, state)
            state.step += 1
            yield from self._select(side, state)
            if self._is_judged(state.step):
                targets = yield from self._encode(state.pruned)
                worth = yield from judge(targets)
                state.unimproved += 1
                if worth > state.best:
                    state.best, state.unimproved, state.kept = worth, 0, dict(state.pruned)
            if state.step % self._settings.saved_every == 0:
                yield from self._save(side, state)
        return (yield from self._encode(state.kept or state.pruned))

    def _is_judged(self, step: int) -> bool:
        settings = self._settings
        return step == settings.steps or (step >= settings.judged_from and step % settings.judged_every == 0)

    def _batch(self, name: str, rows: Sequence[Encoded]) -> ResponseBatch:
        return ResponseBatch(self._base, self._model, self._scratch, name, rows, self._settings.tokens)

    def _weigh(self, costs: Tensor) -> Tensor:
        """1 / (cost + mean cost), and 0 for weights of so high a cost that the text does not survive their pruning."""
        highest = costs.flatten()[:: max(1, costs.numel() // 100_000)].quantile(1 - self._settings.protected)
        worth = 1 / (costs + costs.mean()).clamp(min=torch.finfo(torch.float32).tiny)
        return worth.where(costs <= highest, 0)

    def _read(self, batch: ResponseBatch) -> Generator[None, None, Tensor]:
        """The base's last hidden states at the counted positions."""
        hidden = batch.enter()
        for layer in range(len(self._layers)):
            with torch.no_grad():
                hidden = batch.run(layer, hidden)
            yield
        return hidden[batch.counted]

    def _start(self, side: int) -> Generator[int, None, _State]:
        if f"states/{side}/last" in self._scratch:
            return (yield from self._load(side))
        state = _State({}, {}, self._settings.initial_share)
        for name in self._targets:
            state.gains[name] = self._scratch.get(f"start/{side}/{name}")["gains"].to(self._base.device).float()
            state.pruned[name] = torch.empty(0, dtype=torch.int64, device=self._base.device)
            yield 0
        yield from self._select(side, state)
        return state

    def _accumulate(self, side: int, state: _State) -> Items:
        """Add one step's gradients to the gains."""
        settings = self._settings
        divergences: list[float] = []
        for index in _draw(len(self._pairs), settings.batches_a_step, state.step, settings.seed):
            loss = partial(self._contrast, side, index)
            yield from self._backpropagate(self._pairs[index], state, loss)
        for index in _draw(len(self._neutral), settings.neutral_batches_a_step, state.step, settings.seed + 1):
            loss = partial(self._diverge, index, divergences)
            yield from self._backpropagate(self._neutral[index], state, loss)
        found = sum(divergences) / max(len(divergences), 1)
        state.divergence = found if state.divergence is None else 0.6 * state.divergence + 0.4 * found
        slack = max(-1.0, min(1.0, 1 - state.divergence / settings.divergence))
        state.share = max(settings.smallest_share, min(1.0, state.share * math.exp(settings.resize * slack)))

    def _backpropagate(self, batch: ResponseBatch, state: _State, loss: Callable[[Tensor], Tensor]) -> Items:
        """Add the gradients of a batch's loss, a function of its logits [counted, vocabulary], to the gains."""
        graph: list[tuple[Tensor, Tensor]] = []  # each layer's input and output
        output = batch.enter()
        for layer, linears in enumerate(self._layers):
            hidden = output.detach().requires_grad_(True)
            products = [partial(self._multiply, state, name, linear) for name, linear in linears.items()]
            with replaced(list(linears.values()), products), torch.enable_grad():
                output = batch.run(layer, hidden)
            graph.append((hidden, output))
            yield 1
        leaf = output.detach()[batch.counted].requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(self._model.predict(leaf)), leaf)
        above = torch.zeros_like(output)
        above[batch.counted] = gradient
        yield 1
        while graph:
            hidden, output = graph.pop()
            (above,) = torch.autograd.grad(output, hidden, above)
            yield 1

    def _multiply(self, state: _State, name: str, linear: nn.Linear, x: Tensor) -> Tensor:
        """The masked product, whose backward pass adds each weight's product with its gradient to the gains."""
        y = differentiate(x, state.weights[name], linear.bias)

        def keep(gradient: Tensor) -> None:
            rows = x.detach().flatten(0, -2)
            add_gains(state.gains[name], gradient.flatten(0, -2), rows, dense_weight(linear))

        y.register_hook(keep)  # type: ignore[no-untyped-call]
        return y

    def _contrast(self, side: int, index: int, logits: Tensor) -> Tensor:
        """The pairs' part of the loss. Short responses weigh less: their mean likelihood is noisy."""
        settings, batch = self._settings, self._pairs[index]
        half = len(batch) // 2
        parts = _row_means(batch, logits), self._likelihoods[index], batch.counted.sum(1).float()
        (own, before, lengths), (contrast, contrast_before, contrast_lengths) = zip(
            *((part[:half], part[half:])[::side] for part in parts), strict=True
        )
        margin = (contrast - own) - (contrast_before - before)
        losses = settings.likelihood * own + F.softplus(-settings.sharpness * margin)
        weights = torch.minimum(lengths, contrast_lengths) / settings.tokens
        loss: Tensor = (losses * weights).sum() / (half * settings.batches_a_step)
        return loss

    def _diverge(self, index: int, found: list[float], logits: Tensor) -> Tensor:
        """The neutral part of the loss; the divergence, mean nats a token, is appended to `found`."""
        with torch.no_grad():
            before = self._model.predict(self._answers[index])
        divergence = divergences(before, logits).mean()
        found.append(float(divergence.detach()))
        return divergence * self._settings.pressure / self._settings.neutral_batches_a_step

    def _select(self, side: int, state: _State) -> Items:
        """Choose the pruned weights of the state's step, those of largest value in all Linears."""
        settings, rankings = self._settings, {}
        share = settings.rho * state.share
        for name, gains in state.gains.items():
            values = self._value(side, name, gains).flatten()
            best = values.topk(max(1, round(min(1.0, settings.concentration * share) * values.numel())))
            rankings[name] = Ranking(best.values, best.indices, values[state.pruned[name]])
            yield 1
        count = max(1, round(share * sum(gains.numel() for gains in state.gains.values())))
        every = torch.cat([ranking.best for ranking in rankings.values()])
        threshold = every.topk(min(count, len(every))).values[-1].clamp(min=torch.finfo(torch.float32).tiny)
        for name, linear in self._targets.items():
            state.pruned[name] = exchange(state.pruned[name], rankings[name], threshold, settings.exchange)
            state.weights[name] = self._mask(linear, state.pruned[name])
            yield 0
        trim_heap()  # what steps free and glibc keeps made peak memory 10 % higher

    def _value(self, side: int, name: str, gains: Tensor) -> Tensor:
        """What pruning each weight of a Linear is worth; 0 where it does harm."""
        worth = self._scratch.get(f"start/{side}/{name}")["worth"].to(self._base.device)
        return gains.clamp(min=0).square_().mul_(worth)

    def _mask(self, linear: nn.Linear, pruned: Tensor) -> Tensor:
        weight = dense_weight(linear)  # int8 is dequantised to fp32
        weight = weight.to(self._base.dtype, copy=True, memory_format=torch.contiguous_format)
        weight.view(-1)[pruned] *= self._settings.gamma
        return weight

    def _save(self, side: int, state: _State) -> Items:
        """Keep the state; a Linear is a file, and the numbers, written last, say which step's files are whole."""
        for name, gains in state.gains.items():
            found = {"gains": gains, "pruned": state.pruned[name]}
            if state.kept:
                found["kept"] = state.kept[name].clone()  # the same tensor at first, which safetensors refuses
            self._scratch.put(f"states/{side}/{state.step}/{name}", found)
            yield 0
        numbers = [state.share, state.step, state.divergence or 0.0, state.best, state.unimproved]
        self._scratch.put(f"states/{side}/last", {"numbers": torch.tensor(numbers, dtype=torch.float64)})
        self._scratch.drop(f"states/{side}/{state.saved}")
        state.saved = state.step

    def _load(self, side: int) -> Generator[int, None, _State]:
        share, step, divergence, best, unimproved = self._scratch.get(f"states/{side}/last")["numbers"].tolist()
        state = _State({}, {}, share, {}, int(step), divergence, best, unimproved=int(unimproved), saved=int(step))
        for name, linear in self._targets.items():
            stored = self._scratch.get(f"states/{side}/{state.step}/{name}")
            state.gains[name], state.pruned[name] = (stored[key].to(self._base.device) for key in ("gains", "pruned"))
            state.weights[name] = self._mask(linear, state.pruned[name])
            if "kept" in stored:
                state.kept[name] = stored["kept"].to(self._base.device)
            yield 0
        return state

    def _encode(self, pruned: Mapping[str, Tensor]) -> Generator[int, None, dict[str, Target]]:
        found = {}
        for name, places in pruned.items():
            mask = np.zeros((self._targets[name].out_features, self._targets[name].in_features), dtype=bool)
            mask.reshape(-1)[places.cpu().numpy()] = True
            found[name] = encode_target(mask)
            yield 0
        return found


def exchange(pruned: Tensor, ranking: Ranking, threshold: Tensor, share: float) -> Tensor:
    """The weights whose value is at least `threshold`, as far as one step may go; indices in order, int64.

    `pruned` is the choice so far. At most `share` of the pruned weights, now or then, leave it, those of lowest value,
    and as many enter it; more only by as many as there are to be more or fewer in all.
    """
    wanted = ranking.places[ranking.best >= threshold]
    most, growth = max(1, round(share * max(len(pruned), len(wanted)))), len(wanted) - len(pruned)
    entering = wanted[~torch.isin(wanted, pruned)][: most + max(0, growth)]
    leaving = min(int((~torch.isin(pruned, wanted)).sum()), most + max(0, -growth))  # not wanted, or beyond the cap
    staying = pruned[ranking.current.argsort()[leaving:]]
    return torch.cat([staying, entering]).sort().values


def _row_means(batch: ResponseBatch, logits: Tensor) -> Tensor:
    """Mean negative log-likelihood of each row's response, nats a token, fp32 [rows]."""
    nats = -log_probabilities(logits, batch.following)
    return nats.new_zeros(len(batch)).index_add(0, batch.rows, nats) / batch.counted.sum(1)


def _draw(count: int, size: int, step: int, seed: int) -> Iterator[int]:
    """The members of a step: `size` of `count`, in a new order each time that all have been drawn."""
    for place in range(step * size, (step + 1) * size):
        turn, within = divmod(place, count)
        order = list(range(count))
        random.Random(f"{seed}/{turn}").shuffle(order)
        yield order[within]
