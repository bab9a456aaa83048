import sys
from dataclasses import replace

import pytest

from maskstore import InvalidName, MaskNotFound, SignatureError, Store, export_mask, import_mask, read_mask, write_mask
from tests.maskstore import world

pytest.importorskip("cryptography")
signing = pytest.importorskip("maskstore.signing")


@pytest.fixture(scope="module")
def key():
    return signing.generate()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", require_signed=True)


def test_a_signature_travels_with_the_file(tmp_path, key):
    private, public = key
    signed = signing.sign(world.mixed(), private)
    assert signed == world.mixed()
    write_mask(signed, tmp_path / "x")
    again = read_mask(tmp_path / "x")
    assert again.signature == signed.signature
    assert signing.check(again.digest, again.signature, {public: "me"}) == "me"


def test_a_store_that_requires_signatures(store, tmp_path, key):
    private, public = key
    digest = store.add(world.mixed())
    with pytest.raises(SignatureError, match="is not signed"):
        store.open(digest)
    assert store.add(signing.sign(world.mixed(), private)) == digest  # the signature replaces the unsigned file
    with pytest.raises(SignatureError, match="none of 0 keys"):
        store.open(digest)
    store.keys.trust(public, "me")
    assert store.open(digest).signature
    store.add(world.mixed())
    assert store.open(digest).signature
    store.keys.distrust("me")
    with pytest.raises(SignatureError):
        store.open(digest)


def test_import_checks_before_it_keeps(store, tmp_path, key):
    private, public = key
    source = Store(tmp_path / "source")
    export_mask(source, source.add(world.mixed()), tmp_path / "plain")
    with pytest.raises(SignatureError):
        import_mask(store, tmp_path / "plain")
    assert store.digests() == []
    store.keys.trust(public, "me")
    source.add(signing.sign(world.mixed(), private))
    export_mask(source, world.mixed().digest, tmp_path / "signed")
    assert import_mask(store, tmp_path / "signed") == world.mixed()


def test_a_signature_of_something_else(key):
    private, public = key
    other = signing.sign(world.mixed(seed=9), private)
    with pytest.raises(SignatureError, match="does not fit"):
        signing.check(world.mixed().digest, other.signature, {public: "me"})
    assert replace(other, signature=None) == other
    assert (other | other).signature is None


def test_the_list_of_keys(store, key):
    _, public = key
    store.keys.trust(public, "me")
    store.keys.trust(public, "myself")
    assert store.keys.trusted() == {public: "myself"}
    with pytest.raises(InvalidName):
        store.keys.trust("short", "me")
    with pytest.raises(MaskNotFound):
        store.keys.distrust("nobody")
    store.keys.path.write_text("nonsense\n")
    with pytest.raises(SignatureError, match="'nonsense' is not a key and a label"):
        store.keys.trusted()


def test_without_the_package_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(SignatureError, match="need the package `cryptography`"):
        signing.generate()
