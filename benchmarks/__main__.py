"""``python -m benchmarks``: measure, print, keep, and say by the exit status whether the targets
hold."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import data, machine, mathematics, memory, report, step, tiny
from benchmarks.results import Findings

REPETITIONS = 5
PARTS: dict[str, Callable[..., Findings]] = {
    "data": data.run,
    "memory": memory.run,
    "tiny": tiny.run,
    "step": step.run,
    "mathematics": mathematics.run,
}


def main() -> int:
    """Exit status 1 where a measurement misses its target by more than a third."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="measure this part alone; may be repeated"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer repetitions and smaller batches, to try it out"
    )
    options = parser.parse_args()
    chosen = options.only or list(PARTS)
    with tempfile.TemporaryDirectory(prefix="nexrl-bench-") as name:
        folder = Path(name)
        described = machine.describe(folder)
        findings = []
        for part in chosen:
            report.announce(part)
            (folder / part).mkdir()
            found = PARTS[part](
                folder / part, 2 if options.quick else REPETITIONS, quick=options.quick
            )
            report.show(found)
            findings.append(found)
    if not options.quick and options.only is None:
        report.keep(described, findings)
    return int(any(measure.failed for found in findings for measure in found.measures))


if __name__ == "__main__":
    sys.exit(main())
