"""Types of the known keys in the JSON objects of a mask's metadata; other keys may hold any JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from maskstore import strictjson
from maskstore.errors import HeaderCorrupt, InvalidMaskValue, InvalidName
from maskstore.names import check_digest, check_name

Kind = Callable[[str, Any], str | None]  # (where, value) -> what is wrong with the value, None if nothing is


def check_object(field: str, value: Any) -> dict[str, Any]:
    """A private copy of one of the `OBJECTS`, as a file will return it; InvalidMaskValue if it cannot be one."""
    if not isinstance(value, Mapping):
        raise InvalidMaskValue(f"{field} is a {type(value).__name__}, not an object")
    try:
        plain: dict[str, Any] = strictjson.parse(strictjson.dump(dict(value)), field)
        json.dumps(plain, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidMaskValue(f"{field} holds half of a surrogate pair, which is not a character") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidMaskValue(f"{field} is not JSON: {error}") from None
    except HeaderCorrupt as error:
        raise InvalidMaskValue(error.message) from None
    if fault := OBJECTS[field](field, plain):
        raise InvalidMaskValue(fault)
    return plain


def mend(values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The same values with every faulty object replaced by an empty one, and the error of each."""
    mended, faults = dict(values), []
    for field in OBJECTS:
        try:
            check_object(field, values[field])
        except InvalidMaskValue as error:
            mended[field] = {}
            faults.append(error.message)
    return mended, tuple(faults)


def _a(expected: str, *types: type, test: Callable[[Any], bool] = lambda _: True) -> Kind:
    """A value of one of the types exactly (true is not a number), for which the test holds."""

    def check(where: str, value: Any) -> str | None:
        if type(value) in types and test(value):
            return None
        return f"{where} is {json.dumps(value):.80}, expected {expected}"

    return check


def _or_null(kind: Kind) -> Kind:
    return lambda where, value: None if value is None else kind(where, value)


def _list(kind: Kind, length: int | None = None) -> Kind:
    """An array whose items are all of one kind."""

    def check(where: str, value: Any) -> str | None:
        if type(value) is not list or length not in (None, len(value)):
            count = "" if length is None else f" of {length} items"
            return f"{where} is {json.dumps(value):.80}, expected an array{count}"
        return next((fault for at, item in enumerate(value) if (fault := kind(f"{where}[{at}]", item))), None)

    return check


def _object(
    known: Mapping[str, Kind], required: bool = False, rest: Kind | None = None, key: Kind | None = None
) -> Kind:
    """An object whose known keys are of their kinds; `rest` is the kind of other values, `key` that of all keys."""

    def check(where: str, value: Any) -> str | None:
        if type(value) is not dict:
            return f"{where} is {json.dumps(value):.80}, expected an object"
        if required and (missing := sorted(known.keys() - value.keys())):
            return f"{where} lacks {', '.join(missing)}"
        for name, item in value.items():
            kind = known.get(name, rest)
            fault = (key and key(f"a key of {where}", name)) or (kind and kind(f"{where}.{name:.80}", item))
            if fault:
                return fault
        return None

    return check


def _checked(expected: str, check: Callable[[object], str]) -> Kind:
    """What one of the checks of `names` accepts."""

    def accepts(value: Any) -> bool:
        try:
            check(value)
        except InvalidName:
            return False
        return True

    return _a(expected, str, test=accepts)


_TEXT = _a("text", str)
_NUMBER = _a("a number", int, float, test=lambda value: abs(value) <= sys.float_info.max)
_COUNT = _a("a count", int, test=lambda value: value >= 0)
_FLAG = _or_null(_a("true, false or null", bool))
_FIGURE = _or_null(_NUMBER)
_PHASE = _a('"all" or "decode"', str, test=lambda value: value in ("all", "decode"))
_GAMMA = _a("a number from 0 to 1", int, float, test=lambda value: 0 <= value <= 1)
_ANY_OBJECT = _object({})
_FIGURES: Mapping[str, Kind] = {
    **dict.fromkeys(("own_ratio", "neutral_ratio", "margin_shift", "margin_shift_median", "flip", "kl"), _FIGURE),
    "pairs": _COUNT,
    "preferred": _object({"base": _NUMBER, "masked": _NUMBER}, required=True),
}
_CERTIFICATE: Mapping[str, Kind] = {
    **_FIGURES,
    "intervals": _object({}, rest=_list(_FIGURE, length=2)),
    "phases": _object({}, rest=_object(_FIGURES)),
    "curve": _list(_object({"gamma": _GAMMA}, required=True, rest=_FIGURE)),
    "facts": _object({"of": _COUNT, "known": _COUNT, "kept": _FIGURE}, required=True),
    "changed_answers": _object({"changed": _COUNT, "of": _COUNT, "share": _NUMBER}, required=True),
    "loops": _object({"masked": _NUMBER, "base": _NUMBER, "of": _COUNT}, required=True),
    "phase": _object({"default": _PHASE, "why": _TEXT}),
    "choice": _object({"why": _TEXT, "tried": _list(_ANY_OBJECT)}),
    "quantization": _or_null(_TEXT),
    "verdict": _TEXT,
    "passed": _FLAG,
    "forced": _FLAG,
    "reasons": _list(_TEXT),
    "remarks": _list(_TEXT),
    "pruned": _COUNT,
    "pruned_share": _object({}, rest=_NUMBER),
    "overlap": _object({}, rest=_FIGURE),
    "splits": _object({}, rest=_COUNT),
    "seed": _a("an integer", int),
    "seconds": _FIGURE,
    "versions": _object({}, rest=_TEXT),
}
_SPEECH: Mapping[str, Kind] = {"examples": _COUNT, "tokens": _COUNT, "duplicates": _COUNT, "digest": _TEXT}
_RHO = lambda where, value: None if value == "auto" else _a('a number or "auto"', int, float)(where, value)  # noqa: E731
OBJECTS: Mapping[str, Kind] = {
    "parameters": _object(
        {
            "score": _TEXT,
            "rho": _RHO,
            "gamma": _NUMBER,
            "phase": _TEXT,
            "group": _or_null(_TEXT),
            "scope": _or_null(_TEXT),
        }
    ),
    "calibration": _object(
        {
            **_SPEECH,
            "contrast": _or_null(_object(_SPEECH)),
            "system_prompt": _object({"text": _TEXT, "tokens": _COUNT}, required=True),
        }
    ),
    "certificate": _object(_CERTIFICATE),
    "ancestry": _object(
        {
            "expression": _TEXT,
            "parents": _object(
                {}, rest=_checked("a persona's name", check_name), key=_checked("a digest", check_digest)
            ),
        }
    ),
}
