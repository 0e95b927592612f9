"""Ranks that are processes of their own: `run_ranks` starts them, `be_a_rank` is what their program
does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from nexrl_host.processes import die_with_parent


def run_ranks(
    world_size: int,
    checks: str,
    folder: Path,
    *arguments: str,
    limit: float = 300,
    program: str = "engine",
    variables: Mapping[str, str] | None = None,
) -> Any:
    """Run `checks` of a program of `tests/helpers/ranks` on that many processes over gloo: rank
    0's answer.

    `variables` are added to their environment.
    """
    out = folder / f"{checks}-{world_size}.json"
    meeting = folder / f"meeting-{checks}-{world_size}"
    meeting.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(sys.path),
        **(variables or {}),
    }
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                f"tests.helpers.ranks.{program}",
                checks,
                str(rank),
                str(world_size),
                str(meeting),
                str(out),
                *arguments,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=die_with_parent,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=limit)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = [output for rank, output in zip(ranks, outputs, strict=True) if rank.returncode != 0]
    assert not failed, failed[0]
    return json.loads(out.read_text())


def be_a_rank(checks: Mapping[str, Callable[..., Any]]) -> NoReturn:
    """Run the checks that the command line names, `PROGRAM CHECKS RANK WORLD MEETING OUT
    [ARGUMENTS]`.

    They get OUT's folder and the arguments; rank 0 writes their answer as JSON. The process then
    leaves at once, as a rank of the service does: now and then torch aborts an interpreter that is
    taken down after a group of gloo.
    """
    name, rank, world, meeting, out, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(world)
    )
    answer = checks[name](Path(out).parent, *arguments)
    if rank == "0":
        Path(out).write_text(json.dumps(answer))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
