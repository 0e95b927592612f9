"""What a group at full speed leaves behind stays within its bounds; here with bounds of seconds."""

from __future__ import annotations

import pytest

from benchmarks.soak import soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_files_and_keys_stop_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bounds there would be two files and four keys a step."""
    for name in ("RESULT_KEPT_S", "UPLOAD_KEPT_S", "JOBS_KEPT_S"):
        monkeypatch.setenv(f"NEXRL_{name}", "2")
    monkeypatch.setenv("NEXRL_JOBS_KEPT", "10")

    first, *_, last = soak(0.3, every_s=5)

    assert last.steps > first.steps + 20
    assert last.files < last.steps
    assert last.keys < 2 * last.steps
