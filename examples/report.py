"""What a training run shows and keeps: progress bar, log, summary table and reward curve."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from task import Prompt

SHOWN = "reward {task.fields[reward]}  loss {task.fields[loss]:+.3f}  {task.fields[speed]:,.0f} tokens/s"


class RunReport:
    """Collects a run's numbers in `folder`: `log.jsonl` while it runs, `reward.png` at its end."""

    def __init__(self, folder: Path, supervised_steps: int, grpo_steps: int, target: float) -> None:
        self.folder = folder
        self._supervised_steps = supervised_steps
        self._target = target
        self._console = Console()
        self._held_out: list[tuple[int, float]] = []
        self._sampled: list[tuple[int, float]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._started = self._step_started = time.perf_counter()
        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn(SHOWN))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console)
        total = supervised_steps + grpo_steps
        self._bar = self._progress.add_task("start", total=total, reward="-", loss=0.0, speed=0.0)

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

    def step(self, phase: str, step: int, loss: float, tokens: int, reward: float | None = None) -> None:
        """Record one optimizer step on `tokens` tokens; `reward` is the mean over the sampled answers."""
        now = time.perf_counter()
        speed = tokens / (now - self._step_started)
        self._step_started = now
        self._write(phase=phase, step=step, reward=reward, loss=loss, tokens_per_second=round(speed))
        self._progress.update(self._bar, description=phase, advance=1, loss=loss, speed=speed)
        if reward is not None:
            self._sampled.append((step, reward))
            self._progress.update(self._bar, reward=f"{reward:.2f}")

    def evaluated(self, step: int, reward: float) -> None:
        """Record the mean reward on the held-out prompts after `step` steps."""
        self._held_out.append((step, reward))
        self._write(phase="held-out", step=step, reward=reward)
        self._console.print(f"step {step:>3}: held-out reward {reward:.2f}")
        self._step_started = time.perf_counter()

    def show_answers(self, prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str]) -> None:
        """Print sampled answers to held-out prompts, before and after training."""
        table = Table("held-out prompt", "before", "after", title="Sampled answers")
        for prompt, *answers in zip(prompts, before, after, strict=True):
            table.add_row(prompt.text, *(escape(answer.strip()) for answer in answers))
        self._console.print(table)

    def finish(self) -> bool:
        """Print the summary and draw the curve; returns whether the policy learned what it had to."""
        self._draw()
        (_, first), (steps, last) = self._held_out[0], self._held_out[-1]
        learned = last >= self._target
        table = Table(title="GRPO run", show_header=False)
        table.add_row("held-out reward, start", f"{first:.2f}")
        if self._supervised_steps:
            reward = dict(self._held_out)[self._supervised_steps]
            table.add_row(f"after {self._supervised_steps} supervised steps", f"{reward:.2f}")
        table.add_row("held-out reward, end", f"{last:.2f} (target {self._target:.2f})")
        table.add_row("optimizer steps", str(steps))
        table.add_section()
        total = time.perf_counter() - self._started
        for part, seconds in {**self._seconds, "other": total - sum(self._seconds.values())}.items():
            table.add_row(part, f"{seconds:6.1f} s  {seconds / total:4.0%}")
        table.add_row("total", f"{total:6.1f} s")
        self._console.print(table)
        self._console.print("The policy learned its task." if learned else "The policy did not learn its task.")
        self._console.print(f"Log and reward curve: {self.folder}", soft_wrap=True)
        return learned

    def _write(self, **values: object) -> None:
        line = json.dumps({"seconds": round(time.perf_counter() - self._started, 2), **values})
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def _draw(self) -> None:
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*self._sampled, strict=True), alpha=0.4, label="sampled answers to training prompts")
        axes.plot(*zip(*self._held_out, strict=True), "o-", label="greedy answers to held-out prompts")
        axes.axhline(self._target, color="grey", linestyle="--", linewidth=1, label="target")
        if self._supervised_steps:
            axes.axvspan(0, self._supervised_steps, color="grey", alpha=0.15, label="supervised steps")
        axes.set(title="GRPO through the training service", xlabel="optimizer step", ylabel="mean reward")
        axes.set_ylim(-0.02, 1.02)
        axes.legend(loc="lower right")
        figure.savefig(self.folder / "reward.png", dpi=120)
