import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import pytest

from maskstore import (
    InvalidName,
    MaskInfo,
    MaskNotFound,
    Registry,
    SignatureError,
    Store,
    export_mask,
    import_mask,
    read_mask,
    write_mask,
)
from tests.maskstore import forge, world

ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
signing = pytest.importorskip("maskstore.signing")

OTHERWISE = {
    "persona": "parrot",
    "score": "wanda",
    "parameters": {"rho": 0.5},
    "gamma": 0.5,
    "phase": "decode",
    "calibration": {"examples": 3},
    "certificate": {"passed": True},
    "created_at": "2027-01-01",
    "opposite": "monk",
    "ancestry": {"expression": "a | b"},
}


@pytest.fixture(scope="module")
def key():
    return signing.generate()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", require_signed=True)


def sign_tensors(mask, private):
    """As the first version signed."""
    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(private))
    signature = key.sign(f"masquerade-signature/1\n{mask.digest}\n".encode())
    return replace(mask, signature=f"{key.public_key().public_bytes_raw().hex()}:{signature.hex()}")


def test_a_signature_travels_with_the_file(tmp_path, key):
    private, public = key
    signed = signing.sign(world.mixed(), private)
    assert signed == world.mixed()
    write_mask(signed, tmp_path / "x")
    again = read_mask(tmp_path / "x")
    assert again.signature == signed.signature
    assert signing.check(again, {public: "me"}) == "me"
    assert signing.examine(again, {}) == signing.Signature(public, "everything", True, None)


def test_all_that_is_said_is_signed(key):
    """Under a valid signature nothing can be changed, whichever field of the metadata it is."""
    private, public = key
    assert OTHERWISE.keys() == {field.name for field in fields(MaskInfo)}
    signed = signing.sign(world.mixed(), private)
    changed = [replace(signed, info=replace(signed.info, **{name: value})) for name, value in OTHERWISE.items()]
    changed.append(replace(signed, base=replace(signed.base, name="another")))
    for mask in changed:
        assert mask.digest == signed.digest
        with pytest.raises(SignatureError, match="the signature of me does not fit"):
            signing.check(mask, {public: "me"})
        assert signing.rank(mask, {public: "me"}) is signing.Standing.FALSE


def test_a_forger_who_seals_again_is_refused(store, tmp_path, key):
    private, public = key
    store.keys.trust(public, "me")
    write_mask(signing.sign(world.mixed(), private), tmp_path / "x")
    forged = forge.edit(
        (tmp_path / "x").read_bytes(), lambda document: document["__metadata__"].update(gamma="0.9", phase='"decode"')
    )
    (tmp_path / "forged").write_bytes(forged)
    with pytest.raises(SignatureError, match="does not fit"):
        import_mask(store, tmp_path / "forged")
    assert import_mask(store, tmp_path / "x").info.gamma == 0


def test_a_signature_of_tensors_is_read_and_is_not_enough(tmp_path, key):
    private, public = key
    old = sign_tensors(world.mixed(), private)
    write_mask(old, tmp_path / "old")
    assert signing.examine(read_mask(tmp_path / "old"), {public: "me"}) == signing.Signature(
        public, "tensors", True, "me"
    )
    strict, tolerant = Store(tmp_path / "strict", True), Store(tmp_path / "tolerant", True, accept_tensors=True)
    for store in (strict, tolerant):
        store.keys.trust(public, "me")
    with pytest.raises(SignatureError, match="covers only the tensors"):
        import_mask(strict, tmp_path / "old")
    assert strict.digests() == []
    assert import_mask(tolerant, tmp_path / "old") == old
    with pytest.raises(SignatureError, match="covers only the tensors"):
        Registry(tolerant.root, require_signed=True).store.open(old.digest)


def test_keys_that_are_trusted_at_once_are_all_trusted(store):
    keys = [signing.generate()[1] for _ in range(12)]
    with ThreadPoolExecutor(len(keys)) as threads:
        list(threads.map(store.keys.trust, keys, (f"k{number}" for number in range(len(keys)))))
    assert set(store.keys.trusted()) == set(keys)


def test_a_store_that_requires_signatures(store, key):
    private, public = key
    digest = store.add(world.mixed())
    with pytest.raises(SignatureError, match="is not signed"):
        store.open(digest)
    assert store.replace(signing.sign(world.mixed(), private)) == digest  # the operator's word
    with pytest.raises(SignatureError, match="none of 0 keys"):
        store.open(digest)
    store.keys.trust(public, "me")
    assert store.open(digest).signature
    store.add(world.mixed())
    assert store.open(digest).signature
    store.keys.distrust("me")
    with pytest.raises(SignatureError):
        store.open(digest)


def copies(key):
    """Copies of one mask that say different things, the better signed later."""
    private, _ = key
    strange, _ = signing.generate()
    false = replace(signing.sign(world.mixed(seed=9), private).info, persona="false")
    return [
        replace(world.mixed(), info=false, signature=signing.sign(world.mixed(seed=9), private).signature),
        world.mixed(persona="unsigned"),
        sign_tensors(world.mixed(persona="tensors"), private),
        signing.sign(world.mixed(persona="everything"), private),
    ], signing.sign(world.mixed(persona="strange"), strange)


@pytest.mark.parametrize("way", ["add", "import"])
def test_the_better_signed_copy_is_kept_whichever_comes_first(tmp_path, key, way):
    masks, strange = copies(key)

    def bring(store, mask):
        if way == "add":
            return store.add(mask)
        write_mask(mask, tmp_path / "x")
        return import_mask(store, tmp_path / "x").digest

    for first, worse in enumerate(masks):
        for better in masks[first + 1 :]:
            for order in ((worse, better), (better, worse)):
                store = Store(tmp_path / f"{way}{first}{better.info.persona}{order[0].info.persona}")
                store.keys.trust(key[1], "me")
                assert {bring(store, mask) for mask in order} == {better.digest}
                assert store.open(better.digest).info.persona == better.info.persona
                assert not any(store.quarantine().iterdir())
    for order in ((masks[1], strange), (strange, masks[1])):  # a key that nobody trusts is worth nothing
        store = Store(tmp_path / f"{way}{order[0].info.persona}")
        assert [bring(store, mask) for mask in order]
        assert store.open(strange.digest).info.persona == order[0].info.persona


def test_a_false_signature_does_not_block_the_true_one(store, tmp_path, key):
    private, public = key
    Store(store.root).add(replace(world.mixed(gamma=1), signature=f"2:{public}:{'0' * 128}"))
    store.keys.trust(public, "me")
    with pytest.raises(SignatureError):
        store.open(world.mixed().digest)
    write_mask(signing.sign(world.mixed(gamma=0.25), private), tmp_path / "x")
    assert import_mask(store, tmp_path / "x").info.gamma == 0.25
    assert store.open(world.mixed().digest).info.gamma == 0.25


def test_import_checks_before_it_keeps(store, tmp_path, key):
    private, public = key
    source = Store(tmp_path / "source")
    export_mask(source, source.add(world.mixed()), tmp_path / "plain")
    with pytest.raises(SignatureError):
        import_mask(store, tmp_path / "plain")
    assert store.digests() == []
    store.keys.trust(public, "me")
    source.replace(signing.sign(world.mixed(), private))
    export_mask(source, world.mixed().digest, tmp_path / "signed")
    assert import_mask(store, tmp_path / "signed") == world.mixed()


def test_a_signature_survives_a_delta(store, tmp_path, key):
    private, public = key
    store.keys.trust(public, "me")
    source = Store(tmp_path / "source")
    for seed in (0, 1):
        source.replace(signing.sign(world.mixed(seed), private))
    write_mask(source.open(world.mixed(0).digest), tmp_path / "parent")
    export_mask(source, world.mixed(1).digest, tmp_path / "delta", against=world.mixed(0).digest)
    import_mask(store, tmp_path / "parent")
    assert import_mask(store, tmp_path / "delta").info == world.mixed(1).info


def test_a_signature_of_something_else(key):
    private, public = key
    other = signing.sign(world.mixed(seed=9), private)
    with pytest.raises(SignatureError, match="does not fit"):
        signing.check(replace(world.mixed(), signature=other.signature), {public: "me"})
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


def test_without_the_package_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, key) -> None:
    signed = signing.sign(world.mixed(), key[0])
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(SignatureError, match="need the package `cryptography`"):
        signing.generate()
    with pytest.raises(SignatureError, match="need the package `cryptography`"):
        signing.check(signed, {key[1]: "me"})
    assert signing.examine(signed, {key[1]: "me"}) == signing.Signature(key[1], "everything", None, "me")
