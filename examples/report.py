"""What a training run shows and keeps: progress bar, log, summary table and curve."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from task import Prompt

SHOWN = (
    "{task.fields[name]} {task.fields[measured]}  loss {task.fields[loss]:+.3f}  "
    "{task.fields[speed]:,.0f} tokens/s"
)


@dataclass(frozen=True)
class Goal:
    """What a run is judged by: a number measured on held-out prompts, and where it has to end.

    A reward has to rise to `target`; with `falls` the number has to fall to that share of where it
    started.
    """

    title: str
    target: float
    name: str = "reward"
    falls: bool = False
    sampled: str = "sampled answers to training prompts"
    held_out: str = "greedy answers to held-out prompts"
    verdicts: tuple[str, str] = (
        "The policy learned its task.",
        "The policy did not learn its task.",
    )

    def level(self, first: float) -> float:
        """What the last measurement is compared with."""
        return self.target * first if self.falls else self.target

    def reached(self, first: float, last: float) -> bool:
        """Whether a run from `first` to `last` did what it had to."""
        return last <= self.level(first) if self.falls else last >= self.level(first)


class RunReport:
    """Collects a run's numbers in `folder`: `log.jsonl` while it runs, a curve (`reward.png`) at
    its end."""

    def __init__(self, folder: Path, goal: Goal, steps: int, supervised_steps: int = 0) -> None:
        self.folder = folder
        self._goal = goal
        self._supervised_steps = supervised_steps
        self._console = Console()
        self._held_out: list[tuple[int, float]] = []
        self._sampled: list[tuple[int, float]] = []
        self._more: dict[str, list[tuple[int, float]]] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._started = self._step_started = time.perf_counter()
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(SHOWN),
        )
        self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console)
        fields = {"name": goal.name, "measured": "-", "loss": 0.0, "speed": 0.0}
        self._bar = self._progress.add_task("start", total=supervised_steps + steps, **fields)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Count the time of the block towards `part` in the summary."""
        start = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - start

    def step(
        self,
        phase: str,
        step: int,
        loss: float,
        tokens: int,
        sampled: float | None = None,
        **more: float,
    ) -> None:
        """Record one optimizer step on `tokens` tokens; `sampled` is the goal's number over the
        sampled answers."""
        now = time.perf_counter()
        speed = tokens / (now - self._step_started)
        self._step_started = now
        measured = {self._goal.name: sampled}
        self._write(
            phase=phase, step=step, **measured, loss=loss, tokens_per_second=round(speed), **more
        )
        self._progress.update(self._bar, description=phase, advance=1, loss=loss, speed=speed)
        for name, value in more.items():
            self._more.setdefault(name.replace("_", " "), []).append((step, value))
        if sampled is not None:
            self._sampled.append((step, sampled))
            self._progress.update(self._bar, measured=f"{sampled:.2f}")

    def evaluated(self, step: int, value: float) -> None:
        """Record the goal's number on the held-out prompts after `step` steps."""
        self._held_out.append((step, value))
        self._write(phase="held-out", step=step, **{self._goal.name: value})
        more = "".join(f", {name} {values[-1][1]:.2f}" for name, values in self._more.items())
        self._console.print(f"step {step:>3}: held-out {self._goal.name} {value:.2f}{more}")
        self._step_started = time.perf_counter()

    def show_answers(
        self, prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str]
    ) -> None:
        """Print sampled answers to held-out prompts, before and after training."""
        table = Table("held-out prompt", "before", "after", title="Sampled answers")
        for prompt, *answers in zip(prompts, before, after, strict=True):
            table.add_row(prompt.text, *(escape(answer.strip()) for answer in answers))
        self._console.print(table)

    def finish(self) -> bool:
        """Print the summary and draw the curve; returns whether the run reached its goal."""
        self._draw()
        reached = self._goal.reached(self._held_out[0][1], self._held_out[-1][1])
        self._console.print(self._summary())
        self._console.print(self._goal.verdicts[0 if reached else 1])
        self._console.print(f"Log and curve: {self.folder}", soft_wrap=True)
        return reached

    def _summary(self) -> Table:
        goal, (_, first), (steps, last) = self._goal, self._held_out[0], self._held_out[-1]
        table = Table(title=f"{goal.title} run", show_header=False)
        table.add_row(f"held-out {goal.name}, start", f"{first:.2f}")
        if self._supervised_steps:
            value = dict(self._held_out)[self._supervised_steps]
            table.add_row(f"after {self._supervised_steps} supervised steps", f"{value:.2f}")
        table.add_row(f"held-out {goal.name}, end", f"{last:.2f} (target {goal.level(first):.2f})")
        for name, values in self._more.items():
            table.add_row(f"{name}, end", f"{values[-1][1]:.2f}")
        table.add_row("optimizer steps", str(steps))
        table.add_section()
        total = time.perf_counter() - self._started
        for part, seconds in {
            **self._seconds,
            "other": total - sum(self._seconds.values()),
        }.items():
            table.add_row(part, f"{seconds:6.1f} s  {seconds / total:4.0%}")
        table.add_row("total", f"{total:6.1f} s")
        return table

    def _write(self, **values: object) -> None:
        line = json.dumps({"seconds": round(time.perf_counter() - self._started, 2), **values})
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def _draw(self) -> None:
        goal = self._goal
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*self._sampled, strict=True), alpha=0.4, label=goal.sampled)
        axes.plot(*zip(*self._held_out, strict=True), "o-", label=goal.held_out)
        for name, values in self._more.items():
            axes.plot(*zip(*values, strict=True), ":", label=name)
        level = goal.level(self._held_out[0][1])
        axes.axhline(level, color="grey", linestyle="--", linewidth=1, label="target")
        if self._supervised_steps:
            axes.axvspan(
                0, self._supervised_steps, color="grey", alpha=0.15, label="supervised steps"
            )
        axes.set(
            title=f"{goal.title} through the training service",
            xlabel="optimizer step",
            ylabel=f"mean {goal.name}",
        )
        axes.set_ylim(bottom=-0.02, top=None if goal.falls else 1.02)
        axes.legend(loc="upper right" if goal.falls else "lower right")
        figure.savefig(self.folder / f"{goal.name.split()[0].lower()}.png", dpi=120)
