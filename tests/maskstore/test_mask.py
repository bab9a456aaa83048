import dataclasses

import numpy as np
import pytest

from maskstore import BaseRef, InvalidMaskValue, InvalidName, Mask, MaskInfo, encode
from tests.maskstore import world


def test_identity_is_base_and_pruned_sets_only():
    one, two = world.mask(), world.mask(persona="other", gamma=0.5, certificate={"flip": 1.0})
    assert one == two
    assert hash(one) == hash(two)
    assert one.digest == two.digest
    assert one != world.mask(seed=1)
    assert one != world.mask(base=world.OTHER)
    assert one != "text"


def test_order_of_modules_does_not_matter_but_names_do():
    mask = world.mask()
    turned = Mask(mask.base, dict(reversed(mask.targets.items())), mask.info)
    assert turned.digest == mask.digest
    assert list(turned.targets) == sorted(mask.targets)
    renamed = {f"x.{name}": target for name, target in mask.targets.items()}
    assert Mask(mask.base, renamed, mask.info) != mask


def test_counts():
    flags = {"a": np.eye(64, dtype=bool), "b": np.ones((2, 64), bool)}
    mask = Mask(world.BASE, {name: encode(flag) for name, flag in flags.items()}, world.info())
    assert (mask.size, mask.pruned) == (64 * 64 + 128, 64 + 128)
    assert mask.density == 1 - (64 + 128) / (64 * 64 + 128)
    assert mask.nbytes == sum(target.nbytes for target in mask.targets.values())
    assert repr(mask) == "Mask(pirate, 2 modules, 192 of 4224 pruned)"


def test_encodings_differ_and_compact_masks_do_not():
    mask = world.mixed()
    for change in ("to_bitmap", "to_sparse"):
        targets = {name: getattr(target, change)() for name, target in mask.targets.items()}
        other = Mask(mask.base, targets, mask.info)
        assert other != mask
        assert other.pruned == mask.pruned
        assert other.compact() == mask


def test_is_immutable():
    mask = world.mask()
    with pytest.raises(TypeError):
        mask.targets["x"] = mask.targets["model.layers.1.x"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.base = world.OTHER


@pytest.mark.parametrize("name", ["", "a b", "a..b", "../a", "a/b", "ä", ".a", "a\n", "a" * 257])
def test_module_names_are_checked(name):
    with pytest.raises(InvalidName, match="module name"):
        Mask(world.BASE, {name: encode(np.ones((1, 1), bool))}, world.info())


def test_info_is_a_copy_of_plain_json():
    given = {"layers": (1, 2), "deep": {"x": None}}
    info = world.info(parameters=given)
    given["deep"]["x"] = 3
    assert info.parameters == {"layers": [1, 2], "deep": {"x": None}}
    assert MaskInfo("a", "wanda").created_at.endswith("+00:00")


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"gamma": 1.5}, "gamma 1.5 is not within 0..1"),
        ({"gamma": float("nan")}, "gamma nan"),
        ({"gamma": True}, "gamma True"),
        ({"phase": "prefill"}, "phase 'prefill' is not one of all, decode"),
        ({"score": "a\nb"}, "score"),
        ({"created_at": "yesterday"}, "created_at"),
        ({"created_at": "2026-01-01\ud80000:00:00"}, "created_at"),
        ({"created_at": "2026-01-01\x1b00:00:00"}, "created_at"),
        ({"certificate": {"x": float("inf")}}, "certificate is not JSON"),
        ({"certificate": {"x": object()}}, "certificate is not JSON"),
        ({"parameters": [1]}, "parameters is a list"),
    ],
)
def test_info_refuses_what_a_file_cannot_hold(values, error):
    with pytest.raises(InvalidMaskValue, match=error):
        world.info(**values)


def test_persona_and_opposite_are_names():
    with pytest.raises(InvalidName):
        world.info(persona="../x")
    with pytest.raises(InvalidName):
        world.info(opposite="Ä")


def test_base_is_a_sha256():
    with pytest.raises(InvalidName, match="base fingerprint"):
        BaseRef("abc", "x")
    with pytest.raises(InvalidMaskValue, match="base name"):
        BaseRef("a" * 64, "x\x00")


def test_parameters_no_reader_would_take():
    deep: list = []
    for _ in range(20):
        deep = [deep]
    with pytest.raises(InvalidMaskValue, match="nested deeper than 16"):
        world.info(parameters={"deep": deep})
