import sqlite3
from itertools import count

import pytest

from maskstore import (
    ANY,
    InvalidMaskValue,
    InvalidName,
    MaskConflict,
    MaskCorrupt,
    MaskExists,
    MaskInfo,
    MaskNotFound,
    Persona,
    Registry,
    UnknownVersion,
    database,
)
from maskstore.mirror import name_folder
from tests import s3
from tests.maskstore import world


@pytest.fixture(scope="module", params=["folder", "bucket"])
def make_url(request):
    """How the store of a test is named; None for a folder."""
    if request.param == "folder":
        yield None
        return
    numbers = count()
    with s3.serving() as service:
        yield lambda: service.make_bucket(f"bucket-{next(numbers)}")


@pytest.fixture
def registry(tmp_path, make_url):
    return Registry(tmp_path / name_folder(make_url()) if make_url else tmp_path)


@pytest.fixture
def digests(registry):
    return [registry.store.add(world.mask(seed)) for seed in range(4)]


def test_publish_and_resolve(registry, digests):
    first = registry.publish("pirate", digests[0])
    assert (first.name, first.digest, first.number) == ("pirate", digests[0], 1)
    second = registry.publish("pirate", digests[1])
    assert second.number == 2
    assert registry.resolve("pirate") == second
    assert registry.resolve(f"pirate@{digests[0][:8]}") == first
    assert registry.resolve(f"pirate@{digests[1]}") == second
    assert registry.history("pirate") == [second, first]
    assert Registry(registry.path.parent).names() == [second]


def test_publishing_the_current_again_is_harmless(registry, digests):
    first = registry.publish("pirate", digests[0], expected=None)
    assert registry.publish("pirate", digests[0], expected=None) == first
    assert len(registry.history("pirate")) == 1


def test_compare_and_swap(registry, digests):
    registry.publish("pirate", digests[0], expected=None)
    registry.publish("pirate", digests[1], expected=digests[0])
    for expected in (None, digests[0]):
        with pytest.raises(MaskConflict) as caught:
            registry.publish("pirate", digests[2], expected)
        assert caught.value.actual == digests[1]
    with pytest.raises(MaskConflict, match="it is nothing"):
        registry.publish("new", digests[2], digests[0])
    assert registry.publish("pirate", digests[2], ANY).number == 3


def test_only_kept_masks_are_published(registry):
    with pytest.raises(MaskNotFound, match="no mask aaaaaaaa"):
        registry.publish("pirate", "a" * 64)
    assert registry.names() == []


def test_unknown_names_and_generations(registry, digests):
    registry.publish("pirate", digests[0])
    for reference in ("nobody", f"pirate@{digests[1][:8]}"):
        with pytest.raises(MaskNotFound):
            registry.resolve(reference)
    for reference in ("pirate@", "pirate@12", f"pirate@{digests[0].upper()}"):
        with pytest.raises((InvalidName, MaskNotFound)):
            registry.resolve(reference)


def test_rollback_moves_the_name_and_numbers_go_on(registry, digests):
    made = [registry.publish("pirate", digest) for digest in digests[:3]]
    assert registry.rollback("pirate") == made[1]
    assert registry.rollback("pirate") == made[0]
    with pytest.raises(MaskNotFound, match="before 1"):
        registry.rollback("pirate")
    assert registry.rollback("pirate", to=3) == made[2]
    assert registry.rollback("pirate", to=digests[0][:8]) == made[0]
    assert registry.publish("pirate", digests[3]).number == 4
    assert registry.resolve("pirate").number == 4
    with pytest.raises(MaskNotFound, match="no generation 9"):
        registry.rollback("pirate", to=9)


def test_aliases(registry, digests):
    registry.publish("pirate", digests[0])
    registry.publish("monk", digests[1])
    registry.alias("bold", "pirate")
    assert registry.resolve("bold").name == "pirate"
    assert registry.resolve(f"bold@{digests[0][:8]}").digest == digests[0]
    registry.alias("calm", "bold")
    registry.alias("bold", "monk")
    assert registry.aliases() == {"bold": "monk", "calm": "pirate"}
    with pytest.raises(MaskExists, match="is an alias of monk"):
        registry.publish("bold", digests[2])
    with pytest.raises(MaskExists, match="is a persona"):
        registry.alias("monk", "pirate")
    with pytest.raises(MaskNotFound):
        registry.alias("x", "nobody")


def test_remove(registry, digests):
    registry.publish("pirate", digests[0])
    registry.alias("bold", "pirate")
    registry.alias("calm", "pirate")
    registry.remove("bold")
    assert registry.aliases() == {"calm": "pirate"}
    registry.remove("pirate")
    assert (registry.names(), registry.aliases()) == ([], {})
    with pytest.raises(MaskNotFound):
        registry.remove("pirate")
    assert registry.publish("pirate", digests[1]).number == 1


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "ä",
        "a b",
        "-a",
        ".a",
        "a/b",
        "a\\b",
        "a\n",
        "a.",
        "..",
        "a" * 65,
        "base",
        "none",
        "con",
        "nul.x",
        "com1",
        "\uff50",
        "a\x00",
        None,
    ],
)
def test_names_that_cannot_be(registry, digests, name):
    with pytest.raises(InvalidName):
        registry.publish(name, digests[0])


@pytest.mark.parametrize("name", ["a", "0", "pirate-2.1_x", "a" * 64, "console", "a..b"])
def test_names_that_can(registry, digests, name):
    assert registry.publish(name, digests[0]).name == name


def test_a_damaged_or_newer_registry(tmp_path):
    Registry(tmp_path)
    with sqlite3.connect(tmp_path / "registry.sqlite") as db:
        db.execute("pragma user_version = 99")
    db.close()
    with pytest.raises(UnknownVersion, match="schema 99"):
        Registry(tmp_path)
    (tmp_path / "registry.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(MaskCorrupt, match="the registry is damaged"):
        Registry(tmp_path)


def test_describe(registry, digests):
    made = registry.publish("pirate", digests[0])
    registry.publish("monk", digests[1])
    registry.alias("bold", "pirate")
    registry.change("bold", tags=lambda old: {*old, "rude", "sea"})
    registry.change("pirate", tags=lambda old: old - {"sea", "absent"})
    registry.change("pirate", gamma=0.25)
    registry.change("pirate", notes="Ärr\nmatey")
    registry.pin(digests[0])
    persona = registry.describe("bold")
    assert persona == Persona("pirate", made, ("bold",), ("rude",), 0.25, "Ärr\nmatey", True)
    assert [each.name for each in registry.personas()] == ["monk", "pirate"]
    assert registry.personas(tag="rude") == [persona]
    registry.change("pirate", gamma=None)
    assert registry.describe("pirate").gamma is None


def test_a_mask_published_with_other_defaults_is_another_generation(registry):
    soft = MaskInfo("pirate", "signed", gamma=0.5, phase="decode")
    digest = registry.store.add(world.mask())  # whose file says gamma 0, phase all
    info = registry.store.open(digest).info
    first = registry.publish("pirate", digest, info=info)
    assert registry.publish("pirate", digest, info=info) == first
    second = registry.publish("pirate", digest, info=soft)
    assert (second.number, second.digest, second.defaults(info)) == (2, digest, (0.5, "decode"))
    assert (
        registry.publish("pirate", digest) == registry.resolve("pirate") == second
    )  # nothing is said, nothing changes
    assert registry.rollback("pirate").defaults(info) == (0.0, "all")
    assert registry.publish("monk", digest).defaults(soft) == (0.5, "decode")  # what the file says


def test_what_is_said_about_a_persona_is_bounded(registry, digests):
    registry.publish("pirate", digests[0])
    with pytest.raises(InvalidMaskValue, match="gamma 2"):
        registry.change("pirate", gamma=2)
    with pytest.raises(InvalidMaskValue, match="10001 characters"):
        registry.change("pirate", notes="x" * 10_001)
    with pytest.raises(InvalidMaskValue, match="surrogate"):
        registry.change("pirate", notes="\ud800")
    with pytest.raises(InvalidName):
        registry.change("pirate", tags=lambda old: {*old, "Ä"})
    with pytest.raises(MaskNotFound):
        registry.change("nobody", notes="x")


def test_a_change_is_made_in_full_or_not_at_all(registry, digests):
    registry.publish("pirate", digests[0])
    before = registry.change("pirate", gamma=0.5, notes="old", tags=lambda _: ["keep"])
    for refused in (
        {"gamma": 2.0, "notes": "new", "tags": lambda _: ["new"]},
        {"gamma": 0.1, "notes": "x" * 10_001, "tags": lambda _: ["new"]},
        {"gamma": 0.1, "notes": "new", "tags": lambda _: ["new", "BAD!"]},
    ):
        with pytest.raises((InvalidMaskValue, InvalidName)):
            registry.change("pirate", **refused)
        assert registry.describe("pirate") == before


def test_a_pin_without_a_name_is_found_by_its_digest(registry, digests):
    registry.publish("pirate", digests[0])
    registry.pin(digests[0])
    registry.remove("pirate")
    assert registry.find_pin(digests[0][:8]) == digests[0]
    with pytest.raises(MaskNotFound, match="0 pinned"):
        registry.find_pin(digests[1][:8])


def test_publishing_keeps_what_is_said(registry, digests):
    registry.publish("pirate", digests[0])
    registry.change("pirate", gamma=0.5)
    registry.publish("pirate", digests[1])
    assert registry.describe("pirate").gamma == 0.5


def test_rename_takes_everything_along(registry, digests):
    made = [registry.publish("pirate", digest) for digest in digests[:2]]
    registry.publish("monk", digests[2])
    registry.alias("bold", "pirate")
    registry.change("pirate", tags=lambda old: {*old, "sea"})
    assert registry.rename("pirate", "corsair").number == 2
    assert [item.digest for item in registry.history("corsair")] == [made[1].digest, made[0].digest]
    assert registry.describe("bold").tags == ("sea",)
    with pytest.raises(MaskNotFound):
        registry.resolve("pirate")
    with pytest.raises(MaskExists, match="monk is taken"):
        registry.rename("corsair", "monk")
    with pytest.raises(MaskExists, match="is an alias"):
        registry.rename("monk", "bold")
    with pytest.raises(InvalidName):
        registry.rename("corsair", "../x")


def test_pins(registry, digests):
    registry.pin(digests[0])
    registry.pin(digests[0])
    assert registry.pins() == {digests[0]}
    registry.unpin(digests[0])
    assert registry.pins() == frozenset()
    with pytest.raises(MaskNotFound, match="is not pinned"):
        registry.unpin(digests[0])
    with pytest.raises(MaskNotFound, match="no mask"):
        registry.pin("a" * 64)


def test_trim_keeps_the_current(registry, digests):
    for digest in digests:
        registry.publish("pirate", digest)
    registry.rollback("pirate", to=1)
    assert [item.number for item in registry.trim("pirate", keep=1)] == [3, 2]
    assert [item.number for item in registry.history("pirate")] == [4, 1]
    assert registry.resolve("pirate").number == 1


def test_an_older_registry_is_brought_up_to_date(tmp_path):
    with sqlite3.connect(tmp_path / "registry.sqlite") as db:
        for statement in database.MIGRATIONS[0].split(";")[:-1]:
            db.execute(statement)
        db.execute("insert into persona values ('pirate', 1)")
        db.execute("insert into generation values ('pirate', 1, ?, '2026-01-01')", ("a" * 64,))
        db.execute("pragma user_version = 1")
    db.close()
    persona = Registry(tmp_path).describe("pirate")
    assert (persona.gamma, persona.notes, persona.current.digest) == (None, "", "a" * 64)


def test_a_prefix_that_means_two(registry, digests, monkeypatch):
    twins = ["ab" * 32, "ab" * 31 + "cd"]
    monkeypatch.setattr(type(registry.store), "__contains__", lambda *_: True)
    for digest in twins:
        registry.publish("pirate", digest)
    with pytest.raises(MaskNotFound, match="means 2 generations, give more digits"):
        registry.resolve("pirate@abababab")
    assert registry.resolve(f"pirate@{twins[0]}").number == 1


def test_of_masks_that_were_built_together_all_are_published_or_none(registry):
    pirate, monk = world.mask(1, persona="pirate"), world.mask(2, persona="monk")
    registry.publish("monk", registry.store.add(world.mask(3)))
    with pytest.raises(MaskConflict):
        registry.publish_built(pirate, monk, expected=None)
    assert [one.name for one in registry.names()] == ["monk"]
    made = registry.publish_built(pirate, monk)
    assert [(one.name, one.digest) for one in made] == [("pirate", pirate.digest), ("monk", monk.digest)]
