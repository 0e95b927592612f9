"""Which names may cross a process boundary."""

from __future__ import annotations

import pytest
from nexrl_contract.names import valid_idempotency_key, valid_identifier


@pytest.mark.parametrize("text", ["a", "student", "Student-1.b_c", "9", "x" * 63])
def test_an_identifier_is_a_plain_word(text: str) -> None:
    """The syntax that the contract gives."""
    assert valid_identifier(text)


@pytest.mark.parametrize("text", ["", "stu\n", "\nstu", "stu dent", "-stu", ".stu", "stü", "stu/dent", "x" * 64])
def test_anything_else_is_no_identifier(text: str) -> None:
    """A trailing newline too: it would end up in Redis keys, folder names and log lines."""
    assert not valid_identifier(text)


@pytest.mark.parametrize("text", ["", "key\n", "a key", "k" * 129])
def test_a_key_is_a_plain_word_too(text: str) -> None:
    """One to 128 characters and nothing behind them."""
    assert valid_idempotency_key("step-17.try:2")
    assert not valid_idempotency_key(text)
