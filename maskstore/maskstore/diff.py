"""Overlap of two masks: per module, per layer, attention against MLP (Table 2 of the paper)."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from maskstore import algebra
from maskstore.mask import Mask, aligned

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_PARTS = {
    "self_attn": "attention",
    "attn": "attention",
    "attention": "attention",
    "mlp": "mlp",
    "feed_forward": "mlp",
    "shared_mlp": "mlp",
}


@dataclass(frozen=True)
class Overlap:
    """Counts over some weights: how many there are, pruned by a, by b, by both."""

    size: int
    a: int
    b: int
    both: int

    @property
    def either(self) -> int:
        """Pruned by a or b."""
        return self.a + self.b - self.both

    @property
    def jaccard(self) -> float:
        """both / either; two empty sets are equal."""
        return self.both / self.either if self.either else 1.0

    @property
    def differing(self) -> float:
        """Share of the weights on which a and b disagree."""
        return (self.either - self.both) / self.size if self.size else 0.0

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(self.size + other.size, self.a + other.a, self.b + other.b, self.both + other.both)

    def to_json(self) -> dict[str, Any]:
        """The counts with what follows from them."""
        return {**asdict(self), "jaccard": self.jaccard, "differing": self.differing}


NOTHING = Overlap(0, 0, 0, 0)


@dataclass(frozen=True)
class Diff:
    """Two masks compared: module -> overlap, and sums of it."""

    a: str
    b: str
    modules: dict[str, Overlap]

    @property
    def total(self) -> Overlap:
        """Over all modules."""
        return sum(self.modules.values(), NOTHING)

    @property
    def layers(self) -> dict[str, Overlap]:
        """Layer number (as text, "-" for modules outside of layers) -> overlap, in numeric order."""
        return self._sums(layer_of, lambda layer: (layer == "-", int(layer) if layer != "-" else 0))

    @property
    def parts(self) -> dict[str, Overlap]:
        """attention, mlp, other -> overlap."""
        return self._sums(part_of, str)

    @property
    def kinds(self) -> dict[str, Overlap]:
        """The last word of the modules' names (q_proj, down_proj, ...) -> overlap."""
        return self._sums(kind_of, str)

    def _sums(self, group: Callable[[str], str], key: Callable[[str], Any]) -> dict[str, Overlap]:
        groups: dict[str, Overlap] = {}
        for name, overlap in self.modules.items():
            groups[group(name)] = groups.get(group(name), NOTHING) + overlap
        return {name: groups[name] for name in sorted(groups, key=key)}

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json.dumps."""
        groups = {"layers": self.layers, "parts": self.parts, "modules": self.modules}
        sums = {name: {key: each.to_json() for key, each in group.items()} for name, group in groups.items()}
        return {"a": self.a, "b": self.b, "total": self.total.to_json(), **sums}

    def text(self) -> str:
        """A table: total, attention and MLP, then the layers."""
        rows = [
            ("total", self.total),
            *self.parts.items(),
            *((f"layer {name}", each) for name, each in self.layers.items()),
        ]
        return "\n".join([_HEAD, *(_row(name, overlap) for name, overlap in rows)])


def diff(a: Mask, b: Mask) -> Diff:
    """Compare two masks of one base; a module that one does not cover counts as unpruned there."""
    modules = {}
    for name, (left, right) in aligned(a, b).items():
        out, columns = left.shape
        modules[name] = Overlap(out * columns, left.pruned, right.pruned, algebra.overlap(left, right))
    return Diff(a.digest, b.digest, modules)


def layer_of(module: str) -> str:
    """The first number in a module's name, "-" if there is none."""
    match = _LAYER.search(module)
    return match[1] if match else "-"


def part_of(module: str) -> str:
    """attention, mlp or other, by the words of a module's name."""
    return next((_PARTS[word] for word in module.split(".") if word in _PARTS), "other")


def kind_of(module: str) -> str:
    """The last word of a module's name."""
    return module.rpartition(".")[2]


def table(diff: Diff) -> tuple[list[str], list[str], dict[tuple[str, str], Overlap]]:
    """Layers, kinds and the overlap of each pair: what a heat map shows."""
    cells: dict[tuple[str, str], Overlap] = {}
    for name, overlap in diff.modules.items():
        place = layer_of(name), kind_of(name)
        cells[place] = cells.get(place, NOTHING) + overlap
    return list(diff.layers), sorted(set(map(kind_of, diff.modules))), cells


_HEAD = f"{'':<12} {'weights':>13} {'pruned a':>11} {'pruned b':>11} {'both':>11} {'jaccard':>8} {'differing':>10}"


def _row(name: str, overlap: Overlap) -> str:
    counts = f"{overlap.size:>13,} {overlap.a:>11,} {overlap.b:>11,} {overlap.both:>11,}"
    return f"{name:<12} {counts} {overlap.jaccard:>8.3f} {overlap.differing:>10.4%}"
