"""``make demo``: start the stack, run a trainer of ``examples/`` against it, stop the stack."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from nexrl_host.processes import die_with_parent

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data" / "demo"
READY = "nexrl ready "
STOP_S = 120.0
EXAMPLES = ("grpo", "ppo", "distill")


def main() -> int:
    """Exit status of the trainer of ``--example``; further arguments are passed on to it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--example", choices=EXAMPLES, default="grpo")
    chosen, arguments = parser.parse_known_args()
    stack = subprocess.Popen(
        [sys.executable, "-m", "nexrl_stack", "up", "--port", "0", "--data", str(DATA), "--fresh"],
        cwd=ROOT,
        # The example wants two ranks, which one GPU is not: what it shows is the same on the CPU.
        env={"CUDA_VISIBLE_DEVICES": "", **os.environ},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    try:
        assert stack.stdout is not None
        line = stack.stdout.readline()
        if not line.startswith(READY):
            return stack.wait(STOP_S) or 1
        url = line.removeprefix(READY).strip()
        print(
            (
                f"The stack runs at {url}; its logs are in "
                f"{(DATA / '.nexrl' / 'logs').relative_to(ROOT)}"
            ),
            flush=True,
        )
        trainer = [sys.executable, f"examples/{chosen.example}.py", "--url", url, *arguments]
        return subprocess.run(trainer, cwd=ROOT, check=False).returncode
    except KeyboardInterrupt:
        return 130
    finally:
        stack.terminate()
        stack.wait(STOP_S)


if __name__ == "__main__":
    sys.exit(main())
