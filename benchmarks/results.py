"""What was measured, held against what was promised."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

SLACK = 1 / 3
"""How far a measurement may miss its target before the run fails: neighbours on the machine are
noise."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One number and its target; ``low`` and ``high`` are the extremes of the repetitions."""

    name: str
    value: float
    target: float
    at_least: bool
    unit: str = "x"
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(
        cls, name: str, values: Sequence[float], target: float, *, at_least: bool, unit: str = "x"
    ) -> Self:
        """The median of repetitions."""
        return cls(
            name, statistics.median(values), target, at_least, unit, min(values), max(values)
        )

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.value >= self.target if self.at_least else self.value <= self.target

    @property
    def failed(self) -> bool:
        """Whether it is missed by more than a third."""
        bound = self.target * (1 - SLACK if self.at_least else 1 + SLACK)
        return self.value < bound if self.at_least else self.value > bound

    @property
    def verdict(self) -> str:
        """One word for the table."""
        return "met" if self.met else "failed" if self.failed else "missed"

    def cells(self) -> tuple[str, ...]:
        """Name, measured, spread, target, verdict."""
        spread = (
            ""
            if self.low is None or self.high is None
            else f"{number(self.low)} to {number(self.high)}"
        )
        sign = "≥" if self.at_least else "≤"
        shown, wanted = (
            f"{number(self.value)} {self.unit}",
            f"{sign} {number(self.target)} {self.unit}",
        )
        return self.name, shown, spread, wanted, self.verdict


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers behind the measures; cells are text."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(slots=True)
class Findings:
    """What one part of the run found; ``method`` says what was timed."""

    title: str
    method: str
    measures: list[Measure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Repetition by repetition, so that what disturbs both falls out."""
    return [one / other for one, other in zip(above, below, strict=True)]


def spread(values: Sequence[float], scale: float = 1.0) -> tuple[str, str]:
    """Median, and lowest to highest, as text."""
    low, high = min(values) * scale, max(values) * scale
    return number(statistics.median(values) * scale), f"{number(low)} to {number(high)}"
