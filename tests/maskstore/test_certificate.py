"""A certificate is measured here, or claimed by the maker of the file; a file cannot say which."""

import pytest

from maskstore import Measurement, Registry, Revision, Store, export_mask, import_mask
from maskstore.mask import now
from tests.maskstore import world

FALSE = {"passed": True, "flip": 1.0}
TRUE = {"passed": True, "flip": 0.25}


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "store")


def told(registry: Registry, digest: str, name: str = "pirate", quantization: str | None = None):
    revision = Revision(name, digest, 1, now())
    revision = next((one for one in registry.names() if one.name == name), revision)
    return registry.certificate(revision, registry.store.summary(digest).info, quantization)


def bring(registry: Registry, tmp_path, **said) -> str:
    """Import a mask that was made elsewhere."""
    away = Store(tmp_path / "away")
    export_mask(away, away.replace(world.mixed(**said)), tmp_path / "x")
    return import_mask(registry.store, tmp_path / "x").digest


def test_a_certificate_that_came_with_a_file_is_claimed(registry, tmp_path):
    digest = bring(registry, tmp_path, certificate=FALSE)
    found = told(registry, digest)
    assert (found.source, found.measurement) == ("claimed", None)
    assert found.figures == {"passed": None, "flip": 1.0, "claimed": {"passed": True}}


def test_no_certificate_has_no_source(registry, tmp_path):
    assert told(registry, bring(registry, tmp_path)).source is None


def test_a_build_here_replaces_what_was_claimed(registry, tmp_path):
    digest = bring(registry, tmp_path, certificate=FALSE, gamma=0.5)
    (made,) = registry.publish_built(world.mixed(certificate=TRUE, calibration={"examples": 7}))
    assert (made.digest, made.name) == (digest, "pirate")
    found = told(registry, digest)
    assert (found.source, found.figures) == ("measured", TRUE)
    assert found.measurement.data == {"examples": 7}
    info = registry.store.open(digest).info
    assert (info.certificate, info.gamma) == (TRUE, 0.0)


def test_of_two_builds_the_first_file_stays_and_the_last_measurement_counts(registry):
    """The file of a persona is that of the job which made it, also when another job finds the same mask."""
    digest = registry.publish_built(world.mixed(certificate=TRUE))[0].digest
    before = registry.store.path(digest).read_bytes()
    later = TRUE | {"seconds": 7.0}
    assert registry.publish_built(world.mixed(persona="monk", certificate=later))[0].name == "monk"
    assert registry.store.path(digest).read_bytes() == before
    assert told(registry, digest).figures == later
    registry.publish_built(world.mixed(certificate=TRUE))
    registry.record(Measurement(digest, {"passed": False}, 0.0, "all", {}, now()))
    registry.publish_built(world.mixed(persona="nun", certificate=TRUE))
    assert registry.store.path(digest).read_bytes() == before


def test_what_comes_later_does_not_replace_what_was_measured(registry, tmp_path):
    digest = registry.publish_built(world.mixed(certificate=TRUE))[0].digest
    assert bring(registry, tmp_path, certificate=FALSE, gamma=0.5) == digest
    assert (told(registry, digest).source, told(registry, digest).figures) == ("measured", TRUE)
    assert registry.store.open(digest).info.gamma == 0


def test_a_measurement_stands_beside_a_signed_file(registry, tmp_path):
    """Nothing that is measured here is written into a file: its signature would not fit any more."""
    signing = pytest.importorskip("maskstore.signing")
    pytest.importorskip("cryptography")
    private, public = signing.generate()
    registry.store.keys.trust(public, "me")
    digest = registry.store.add(signing.sign(world.mixed(certificate=FALSE), private))
    registry.publish_built(world.mixed(certificate=TRUE))
    assert (told(registry, digest).source, told(registry, digest).figures) == ("measured", TRUE)
    assert Registry(registry.store.root, require_signed=True).store.open(digest).info.certificate == FALSE


def test_the_last_measurement_counts(registry):
    digest = registry.publish_built(world.mixed(certificate=TRUE))[0].digest
    later = Measurement(digest, {"passed": False}, 0.0, "all", {"own": {"examples": 3}}, now())
    registry.record(later)
    found = told(Registry(registry.store.root), digest)
    assert (found.figures, found.measurement) == ({"passed": False}, later)


def test_equal_masks_of_different_gammas_have_their_own_certificates(registry):
    """The gamma of a build is no part of the digest."""
    digest = registry.publish_built(world.mixed(certificate=FALSE))[0].digest
    assert registry.publish_built(world.mixed(persona="monk", gamma=0.5, certificate=TRUE))[0].digest == digest
    assert (told(registry, digest).figures, told(registry, digest, "monk").figures) == (FALSE, TRUE)
    registry.change("pirate", gamma=0.5)
    assert told(registry, digest).figures == TRUE
    registry.change("pirate", gamma=0.75)  # at which nothing was measured
    assert told(registry, digest).figures == FALSE


def test_each_quantisation_of_the_base_has_a_measurement_of_its_own(registry):
    digest = registry.publish_built(world.mixed(certificate=TRUE))[0].digest
    quantised = Measurement(digest, {"passed": False}, 0.0, "all", {}, now(), "nf4")
    registry.record(quantised)
    assert told(registry, digest, quantization="nf4").measurement == quantised
    assert told(registry, digest).figures == TRUE
    assert told(registry, digest, quantization="int8").source == "claimed"
    assert {one.quantization: one.certificate["passed"] for one in registry.measurements(digest)} == {
        None: True,
        "nf4": False,
    }
    registry.record(Measurement(digest, {"passed": True}, 0.0, "all", {}, now(), "nf4"))
    assert told(registry, digest, quantization="nf4").figures == {"passed": True}


def test_a_build_on_a_quantised_base_is_measured_there(registry):
    digest = registry.publish_built(world.mixed(certificate=TRUE | {"quantization": "int8"}))[0].digest
    assert registry.store.summary(digest).info.quantization == "int8"
    assert [one.quantization for one in registry.measurements(digest)] == ["int8"]
    assert told(registry, digest).source == "claimed"
