"""Which GPUs an agent offers: those that its environment leaves it, of those that the driver
lists."""

from __future__ import annotations

from pathlib import Path

import pytest
from nexrl_host.machine import CPU_SLOTS
from nexrl_stack.services import default_slots
from nexrl_worker.agent.slots import Slots
from nexrl_worker.settings import AgentSettings

TWO_GPUS = "#!/bin/sh\necho 0; echo 1\n"


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [(None, ("0", "1")), ("1", ("1",)), ("GPU-b, GPU-a", ("GPU-b", "GPU-a")), ("", ()), ("-1", ())],
)
def test_an_agent_offers_the_gpus_of_its_environment(
    visible: str | None, gpus: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA_VISIBLE_DEVICES says which, by number or UUID; set to nothing it means the CPU. `nexrl
    up` counts the same."""
    program = tmp_path / "nvidia-smi"
    program.write_text(TWO_GPUS)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("NEXRL_DATA", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert AgentSettings.from_env().gpus == gpus
    assert default_slots() == (len(gpus) or CPU_SLOTS)


def test_gpus_come_back_in_their_order() -> None:
    """Whatever they are called, and in whatever order groups end."""
    slots = Slots(3, ("GPU-b", "GPU-a", "GPU-c"))
    first, second = slots.take(1), slots.take(2)

    slots.give_back(2, second)
    slots.give_back(1, first)

    assert (first, second) == (("GPU-b",), ("GPU-a", "GPU-c"))
    assert slots.take(3) == ("GPU-b", "GPU-a", "GPU-c")
