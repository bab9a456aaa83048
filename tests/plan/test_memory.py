"""Amounts of memory as text, and the machine's own."""

from __future__ import annotations

import pytest

from masquerade.errors import InvalidValue
from masquerade.plan.memory import MachineMemory, format_bytes, parse_bytes, read_host_memory


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24g", 24 * 2**30),
        (" 1.5 MiB", 3 * 2**19),
        ("4096", 4096),
        ("2kb", 2000),
    ],
)
def test_units(text: str, nbytes: int) -> None:
    assert parse_bytes(text, "--memory") == nbytes


@pytest.mark.parametrize("text", ["", "lots", "GiB", "0", "-1GiB", "24 pages", "1e9", "0.1", "24GiB 3"])
def test_what_is_no_amount_is_refused_by_the_option(text: str) -> None:
    with pytest.raises(InvalidValue, match=r"--memory is .*; give bytes, such as 24GiB"):
        parse_bytes(text, "--memory")


def test_more_than_any_machine_has_is_a_number() -> None:
    assert parse_bytes("9" * 400, "--memory") == int("9" * 400)


def test_a_container_has_what_its_limit_allows() -> None:
    assert MachineMemory(100, 50).usable == 100
    assert MachineMemory(100, 50, limit=30).usable == 30
    assert MachineMemory(100, 50, limit=2**63).usable == 100


def test_the_machine_has_memory() -> None:
    found = read_host_memory()
    assert found is not None
    assert 0 < found.available <= found.total


def test_bytes_in_the_fitting_unit() -> None:
    texts = [format_bytes(count) for count in (1, 1536, 3 * 2**20, 2**40)]
    assert texts == ["1 bytes", "1.5 KiB", "3.0 MiB", "1.0 TiB"]
