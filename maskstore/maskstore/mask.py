"""A mask: a base, the pruned set of every target module, and metadata.

Base and pruned sets are its identity; the metadata (persona, certificate, time) is not part of it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

from maskstore import algebra
from maskstore.errors import InvalidMaskValue, MaskMismatch
from maskstore.metadata import OBJECTS, check_object
from maskstore.names import check_digest, check_module, check_name
from maskstore.target import Target, nothing, smaller

FORMAT = "masquerade-mask/1"
TEXT_LIMIT = 256
Phase = Literal["all", "decode"]


@dataclass(frozen=True)
class BaseRef:
    """The model a mask is valid for: `fingerprint` decides (64 hex digits), `name` is for people."""

    fingerprint: str
    name: str

    def __post_init__(self) -> None:
        check_digest(self.fingerprint, "base fingerprint")
        _check_text("base name", self.name)


def now() -> str:
    """The time as masks and revisions record it: ISO 8601, UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class MaskInfo:
    """The metadata of a mask; gamma and phase are defaults that a request may override.

    Mappings hold JSON; the keys in `metadata.OBJECTS` have the types given there. Raises InvalidMaskValue and
    InvalidName.
    """

    persona: str
    score: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    gamma: float = 0.0
    phase: Phase = "all"
    calibration: Mapping[str, Any] = field(default_factory=dict)
    certificate: Mapping[str, Any] = field(default_factory=dict)
    created_at: str = field(default_factory=now)
    opposite: str | None = None
    ancestry: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.persona)
        _check_text("score", self.score)
        if self.opposite is not None:
            check_name(self.opposite)
        if type(self.gamma) not in (int, float) or not 0 <= self.gamma <= 1:
            raise InvalidMaskValue(f"gamma {self.gamma!r:.40} is not within 0..1")
        if self.phase not in get_args(Phase):
            raise InvalidMaskValue(f"phase {self.phase!r:.40} is not one of {', '.join(get_args(Phase))}")
        object.__setattr__(self, "gamma", float(self.gamma))
        _check_time(self.created_at)
        for name in OBJECTS:
            object.__setattr__(self, name, check_object(name, getattr(self, name)))

    @property
    def quantization(self) -> str | None:
        """How the base's weights were quantised when its maker certified the mask; None are those of its files."""
        found: str | None = self.certificate.get("quantization")
        return found


@dataclass(frozen=True, eq=False)
class Mask:
    """Immutable; equal and hashed by digest. `signature` is made by `signing.sign`; None if it is not signed."""

    base: BaseRef
    targets: Mapping[str, Target]
    info: MaskInfo
    signature: str | None = None

    def __post_init__(self) -> None:
        ordered = {check_module(name): self.targets[name] for name in sorted(self.targets)}
        object.__setattr__(self, "targets", MappingProxyType(ordered))

    @cached_property
    def leaves(self) -> Mapping[str, str]:
        """Module -> sha256 of its tensors' bytes."""
        return {name: leaf(target) for name, target in self.targets.items()}

    @cached_property
    def digest(self) -> str:
        """The identity: 64 hex digits, the same for every mask of this base with these encoded pruned sets."""
        modules = {name: (target.kind, *target.shape, self.leaves[name]) for name, target in self.targets.items()}
        return identify(self.base.fingerprint, modules)

    @property
    def size(self) -> int:
        """Weights the mask covers."""
        return sum(out * columns for out, columns in (target.shape for target in self.targets.values()))

    @property
    def pruned(self) -> int:
        """Weights the mask prunes."""
        return sum(target.pruned for target in self.targets.values())

    @property
    def density(self) -> float:
        """Share kept of the weights covered; 1.0 for a mask without modules."""
        return 1 - self.pruned / self.size if self.size else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(target.nbytes for target in self.targets.values())

    def compact(self) -> Self:
        """The same pruned sets, every one in its smaller encoding: of equal sets, the masks are then equal."""
        return replace(self, targets={name: smaller(target) for name, target in self.targets.items()}, signature=None)

    @classmethod
    def known(
        cls,
        base: BaseRef,
        targets: Mapping[str, Target],
        info: MaskInfo,
        signature: str | None,
        leaves: Mapping[str, str],
    ) -> Self:
        """A mask whose module digests the caller has already computed: nothing is hashed again."""
        mask = cls(base, targets, info, signature)
        mask.__dict__["leaves"] = leaves
        return mask

    def __or__(self, other: Self) -> Self:
        """Prune what either prunes."""
        return self._merge(other, "|", algebra.union)

    def __and__(self, other: Self) -> Self:
        """Prune what both prune."""
        return self._merge(other, "&", algebra.intersection)

    def __sub__(self, other: Self) -> Self:
        """Prune what this one prunes and the other does not."""
        return self._merge(other, "-", algebra.difference)

    def __invert__(self) -> Self:
        """Prune what this one keeps, within the modules it covers."""
        targets = {name: algebra.complement(target) for name, target in self.targets.items()}
        return replace(self, targets=targets, signature=None, info=derived(f"~{self.digest[:8]}", self))

    def _merge(self, other: Self, sign: str, operation: Callable[[Target, Target], Target]) -> Self:
        targets = {name: operation(a, b) for name, (a, b) in aligned(self, other).items()}
        info = derived(f"{self.digest[:8]} {sign} {other.digest[:8]}", self, other)
        return replace(self, targets=targets, signature=None, info=info)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Mask({self.info.persona}, {len(self.targets)} modules, {self.pruned} of {self.size} pruned)"


def majority(masks: Sequence[Mask], least: int | None = None) -> Mask:
    """Prune what at least so many of the masks prune, by default more than half of them."""
    least = len(masks) // 2 + 1 if least is None else least
    if not 1 <= least <= len(masks):
        raise InvalidMaskValue(f"a majority of {least} among {len(masks)} masks")
    targets = {name: algebra.majority(each, least) for name, each in aligned(*masks).items()}
    expression = f"majority of {least}: {', '.join(mask.digest[:8] for mask in masks)}"
    return Mask(masks[0].base, targets, derived(expression, *masks))


def aligned(*masks: Mask) -> dict[str, list[Target]]:
    """Module -> its target in every mask; a mask without the module prunes nothing there."""
    first = masks[0]
    for mask in masks[1:]:
        if mask.base.fingerprint != first.base.fingerprint:
            pair = " and ".join(f"{each.base.fingerprint[:16]} ({each.base.name})" for each in (first, mask))
            raise MaskMismatch(f"masks of different bases cannot be combined: {pair}")
    shapes: dict[str, tuple[int, int]] = {}
    for mask in masks:
        for name, target in mask.targets.items():
            if shapes.setdefault(name, target.shape) != target.shape:
                (out, columns), (other, wide) = shapes[name], target.shape
                raise MaskMismatch(f"{out} x {columns} and {other} x {wide} cannot be combined", tensor=name)
    return {
        name: [mask.targets[name] if name in mask.targets else nothing(*shape) for mask in masks]
        for name, shape in sorted(shapes.items())
    }


def derived(expression: str, *parents: Mask) -> MaskInfo:
    """The metadata of a mask computed from others: the first one's persona, gamma and phase, and its ancestry."""
    ancestry = {"expression": expression, "parents": {mask.digest: mask.info.persona for mask in parents}}
    first = parents[0].info
    return MaskInfo(first.persona, "algebra", gamma=first.gamma, phase=first.phase, ancestry=ancestry)


def leaf(target: Target) -> str:
    """sha256 over the bytes of a module's tensors, in order."""
    state = hashlib.sha256()
    for array in target.tensors.values():
        state.update(array.data if array.size else b"")
    return state.hexdigest()


def identify(fingerprint: str, modules: Mapping[str, tuple[str, int, int, str]]) -> str:
    """The identity from (kind, out, in, sha256) of every module: one ASCII line for format, base and each module."""
    state = hashlib.sha256(f"{FORMAT}\n{fingerprint}\n".encode())
    for name in sorted(modules):
        state.update(f"{' '.join(map(str, (name, *modules[name])))}\n".encode())
    return state.hexdigest()


def _check_text(what: str, text: Any) -> None:
    if not isinstance(text, str) or len(text) > TEXT_LIMIT or not text.isprintable():
        raise InvalidMaskValue(f"{what} {text!r:.80} is not printable text of at most {TEXT_LIMIT} characters")


def _check_time(text: Any) -> None:
    try:
        datetime.fromisoformat(text)
        if text.isascii() and text.isprintable():  # any character may separate date and time
            return
    except (TypeError, ValueError):
        pass
    raise InvalidMaskValue(f"created_at {text!r:.80} is not an ISO 8601 time")
