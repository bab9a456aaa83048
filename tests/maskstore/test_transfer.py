import os

import pytest

from maskstore import MaskMismatch, MaskNotFound, Registry, Store, export_mask, fsck, import_mask, read_mask
from maskstore.errors import GapsCorrupt, NotAMask, PadBits
from tests.maskstore import forge, world
from tests.maskstore.test_delta import relative


@pytest.fixture
def home(tmp_path):
    return Store(tmp_path / "home")


@pytest.fixture
def away(tmp_path):
    return Store(tmp_path / "away")


def test_one_file_out_and_in(home, away, tmp_path):
    mask = world.mixed(gamma=0.5)
    exported = export_mask(home, home.add(mask), tmp_path / "x")
    assert (exported.digest, exported.parent, exported.nbytes) == (mask.digest, None, (tmp_path / "x").stat().st_size)
    got = import_mask(away, tmp_path / "x", base=world.BASE.fingerprint)
    assert got == mask
    assert got.info == mask.info
    assert away.digests() == [mask.digest]
    assert import_mask(away, tmp_path / "x") == mask
    assert list((away.root / "quarantine").iterdir()) == []
    Registry(away.root).publish("pirate", mask.digest)
    assert fsck(away.root).clean


def test_a_file_says_what_is_served_unless_it_is_signed(home, away, tmp_path):
    registry = Registry(home.root)
    registry.publish_built(world.mixed(persona="hard", gamma=0.5))
    revision = registry.publish("soft", world.mixed().digest, info=world.info("soft", gamma=0.2, phase="decode"))
    info = registry.served_info(revision, home.open(revision.digest).info)
    assert (info.persona, info.gamma, info.phase) == ("soft", 0.2, "decode")
    export_mask(home, revision.digest, tmp_path / "x", info=info)
    assert import_mask(away, tmp_path / "x").info == info
    signing = pytest.importorskip("maskstore.signing")
    home.replace(signing.sign(home.open(revision.digest), signing.generate()[0]))
    export_mask(home, revision.digest, tmp_path / "x", info=info)
    assert read_mask(tmp_path / "x").info.persona == "hard"


def test_as_a_delta_when_that_is_smaller(home, away, tmp_path):
    parent = world.mask(share=0.5, shapes={"a": (256, 512)})
    near, far = relative(parent, 1, 0.005), relative(parent, 2, 0.5)
    for mask in (parent, near, far):
        home.add(mask)
    assert export_mask(home, near.digest, tmp_path / "near", against=parent.digest).parent == parent.digest
    assert export_mask(home, far.digest, tmp_path / "far", against=parent.digest).parent is None
    with pytest.raises(MaskNotFound, match="no mask"):
        import_mask(away, tmp_path / "near")
    assert away.digests() == []
    away.add(parent)
    assert import_mask(away, tmp_path / "near") == near
    assert import_mask(away, tmp_path / "far") == far
    assert away.path(near.digest).read_bytes() == home.path(near.digest).read_bytes()


@pytest.mark.parametrize(
    ("harm", "error"),
    [
        (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), GapsCorrupt),
        (lambda raw: forge.patch(raw, "model.layers.0.mlp.down_proj.keep", lambda k: k.reverse()), PadBits),
        (lambda _: b"not a mask at all", NotAMask),
    ],
)
def test_nothing_unverified_enters(home, away, tmp_path, harm, error):
    path = tmp_path / "x"
    export_mask(home, home.add(world.mixed()), path)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(error) as caught:
        import_mask(away, path)
    assert caught.value.path == path
    assert away.digests() == []
    assert os.listdir(away.root / "quarantine") == []


def test_refuses_links_and_other_bases(home, away, tmp_path):
    export_mask(home, home.add(world.mixed()), tmp_path / "x")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    with pytest.raises(NotAMask):
        import_mask(away, tmp_path / "link")
    with pytest.raises(MaskMismatch):
        import_mask(away, tmp_path / "x", base=world.OTHER.fingerprint)
    with pytest.raises(MaskNotFound):
        import_mask(away, tmp_path / "absent")
