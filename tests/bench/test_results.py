"""When a benchmark's target is met, missed or failed, and what the page of a run says."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from tensor_codec import wrap

from benchmarks import machine, report
from benchmarks.batches import Size, blank_frame, make_batch
from benchmarks.results import Findings, Measure, Table


@pytest.mark.parametrize(
    ("value", "at_least", "verdict"),
    [
        *[(15, True, "met"), (14, True, "missed"), (9.9, True, "failed")],
        *[(15, False, "met"), (19, False, "missed"), (20.1, False, "failed")],
    ],
)
def test_a_target_fails_when_it_is_missed_by_more_than_a_third(
    value: float, at_least: bool, verdict: str
) -> None:
    """15 at least: 10 is a third below; 15 at most: 20 is a third above."""
    assert Measure("x", value, 15, at_least).verdict == verdict


def test_the_page_names_the_machine_but_not_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has processor, versions, every measure and table, and no host name."""
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    found = Findings("Part", "How.", [Measure.of("speed", [3, 1, 2], 2, at_least=True)])
    found.tables.append(Table("Details", ("a", "b"), [("left", "right")]))
    report.keep(machine.describe(tmp_path), [found])
    (page,) = tmp_path.iterdir()
    text = page.read_text()
    assert "| speed | 2 x | 1 to 3 | ≥ 2 x | met |" in text
    assert "| left | right |" in text
    assert "torch 2" in text
    assert socket.gethostname() not in text


def test_a_blank_frame_is_a_frame_of_the_batch_it_stands_for() -> None:
    """As long as it says, with the names, shapes and dtypes of a real batch."""
    nbytes, pieces = blank_frame(Size(3, 8))
    data = b"".join(pieces)
    assert len(data) == nbytes
    frame = wrap(data)
    for name, tensor in make_batch(Size(3, 8)).items():
        assert frame.torch(name).shape == tensor.shape
        assert frame.torch(name).dtype == tensor.dtype
