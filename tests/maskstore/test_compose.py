import pytest

from maskstore import InvalidMaskValue, InvalidName, MaskConflict, MaskNotFound, Registry, compose, compose_persona
from maskstore.compose import tokenize
from tests.maskstore import world

MASKS = {name: world.mask(seed, share=0.3, persona=name) for seed, name in enumerate(("a", "b", "c", "b-c", "a.b"))}


def made(expression, known=("a", "b", "c")):
    return compose(expression, known, MASKS.__getitem__, "mix")


@pytest.mark.parametrize(
    "expression",
    ["a", "a|b-c", "a&b|c", "a|b&c", "a-b-c", "a-(b-c)", "~a & b", "~(a | b) - ~c", "( ( a ) )", "a|b-c&a-b"],
)
def test_expressions_mean_what_they_mean_in_python(expression):
    assert made(expression) == eval(expression, {name: MASKS[name] for name in "abc"})


def test_the_longest_known_name_wins():
    assert tokenize("a|b-c", ("a", "b", "c")) == ["a", "|", "b", "-", "c"]
    assert tokenize("a|b-c", ("a", "b", "c", "b-c")) == ["a", "|", "b-c"]
    assert tokenize("a|b - c", ("a", "b", "c", "b-c")) == ["a", "|", "b", "-", "c"]
    assert tokenize("a.b@0123abcd-b", MASKS) == ["a.b@0123abcd", "-", "b"]


def test_operands_have_the_gamma_and_phase_at_which_they_are_served(tmp_path):
    """Two personas of one mask, which share its file."""
    registry = Registry(tmp_path)
    mask, other = world.mask(1, persona="hard", gamma=0.5), world.mask(2, persona="z")
    registry.publish_built(mask)
    registry.publish_built(other)
    registry.publish("soft", mask.digest, info=world.info("soft", gamma=0.2, phase="decode"))
    served = {name: compose_persona(registry, f"c-{name}", f"{name} | z") for name in ("hard", "soft")}
    assert served["hard"].digest == served["soft"].digest
    stored = registry.store.open(served["hard"].digest).info
    assert [one.defaults(stored) for one in served.values()] == [(0.5, "all"), (0.2, "decode")]
    registry.change("soft", gamma=0.7)
    again = compose_persona(registry, "c-soft", "soft | z")
    assert (again.number, again.defaults(stored)) == (2, (0.7, "decode"))


def test_ancestry():
    mask = made("a|b-c")
    assert mask.info.persona == "mix"
    assert mask.info.ancestry == {
        "expression": "a|b-c",
        "parents": {MASKS[name].digest: name for name in ("a", "b", "c")},
    }


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("", "names no persona"),
        ("|", "names no persona"),
        ("a b", "expected an operator, found 'b'"),
        ("a |", "expected a persona, found 'the end'"),
        ("(a", r"expected \), found 'the end'"),
        ("a)", r"expected an operator, found '\)'"),
        ("a + b", r"'\+' at 2 of .* is no name and no operator"),
        ("~" * 60 + "a", "nested deeper than 50"),
        ("(" * 400 + "a" + ")" * 400, "nested deeper than 50"),
        ("a|" * 600, "an expression of 1200 characters"),
    ],
)
def test_what_is_no_expression(expression, error):
    with pytest.raises(InvalidMaskValue, match=error):
        made(expression)


@pytest.mark.parametrize("expression", ["a - a", "a & ~a", "~(a | ~a)", "a - (a | b)"])
def test_an_empty_mask_is_refused_unless_forced(tmp_path, expression):
    with pytest.raises(InvalidMaskValue, match="is an empty mask: it prunes nothing"):
        made(expression)
    assert not compose(expression, MASKS, MASKS.__getitem__, "mix", force=True).pruned
    registry = Registry(tmp_path)
    for name in "ab":
        registry.publish(name, registry.store.add(MASKS[name]))
    with pytest.raises(InvalidMaskValue, match="empty mask"):
        compose_persona(registry, "mix", expression)
    assert [one.name for one in registry.names()] == ["a", "b"]
    assert compose_persona(registry, "mix", expression, force=True).number == 1


def test_unknown_personas_and_bad_names():
    with pytest.raises(MaskNotFound, match="'zebra' at 4 of the expression"):
        made("a | zebra")
    with pytest.raises(InvalidName, match="is not a name"):
        compose("a", MASKS, MASKS.__getitem__, "Not A Name")


def test_composing_personas_of_a_registry(tmp_path):
    registry = Registry(tmp_path)
    for name in "abc":
        registry.publish(name, registry.store.add(MASKS[name]))
    registry.alias("bold", "a")
    first = registry.resolve("b")
    made = compose_persona(registry, "mix", f"bold | b@{first.digest[:8]} - c", expected=None)
    mask = registry.store.open(made.digest)
    assert mask == MASKS["a"] | (MASKS["b"] - MASKS["c"])
    assert mask.info.persona == "mix"
    assert set(mask.info.ancestry["parents"]) == {MASKS[name].digest for name in "abc"}
    with pytest.raises(MaskConflict):
        compose_persona(registry, "mix", "a", expected=None)
    assert (
        compose_persona(registry, "mix", "mix | a", expected=made.digest).number == 1
    )  # nothing new: not published again
    assert compose_persona(registry, "mix", "~mix").number == 2
