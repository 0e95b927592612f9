"""Which names may cross a process boundary."""

from __future__ import annotations

import pytest
from nexrl_contract.names import (
    is_loopback,
    valid_idempotency_key,
    valid_identifier,
    without_password,
)


@pytest.mark.parametrize("text", ["a", "student", "Student-1.b_c", "9", "x" * 63])
def test_an_identifier_is_a_plain_word(text: str) -> None:
    """The syntax that the contract gives."""
    assert valid_identifier(text)


@pytest.mark.parametrize(
    "text", ["", "stu\n", "\nstu", "stu dent", "-stu", ".stu", "stü", "stu/dent", "x" * 64]
)
def test_anything_else_is_no_identifier(text: str) -> None:
    """A trailing newline too: it would end up in Redis keys, folder names and log lines."""
    assert not valid_identifier(text)


@pytest.mark.parametrize("text", ["", "key\n", "a key", "k" * 129])
def test_a_key_is_a_plain_word_too(text: str) -> None:
    """One to 128 characters and nothing behind them."""
    assert valid_idempotency_key("step-17.try:2")
    assert not valid_idempotency_key(text)


@pytest.mark.parametrize(
    "host",
    ["localhost", "LocalHost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "0.0.0.0"],
)
def test_this_machine_has_many_names(host: str) -> None:
    """Whoever connects to them stays here."""
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "example.org", "localhost.example.org", "10.0.0.1", "::2", "128.0.0.1"]
)
def test_other_machines(host: str) -> None:
    assert not is_loopback(host)


def test_an_address_is_shown_without_its_password() -> None:
    """User and password go, the rest stays."""
    assert without_password("http://user:se@cret@proxy:3128/x") == "http://proxy:3128/x"
    assert without_password("proxy:3128") == "proxy:3128"
