"""Which GPUs an agent offers: those that its environment leaves it, of those that the driver
lists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nexrl_host.machine import CPU_SLOTS
from nexrl_worker.agent.launcher import Slots

TWO_GPUS = """
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
"""
OFFERED = """
from nexrl_stack.services import default_slots
from nexrl_worker.settings import AgentSettings
print(*AgentSettings.from_env().gpus, default_slots(), sep=",")
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a driver's library that knows two GPUs: what nvidia-ml-py asks of it."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "nvml.c").write_text(TWO_GPUS)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, folder / "nvml.c"], check=True)
    return folder


def offered(folder: Path, visible: str | None) -> list[str]:
    """The GPUs that an agent offers where the driver's library lies in ``folder``, and then how
    many slots `nexrl up` counts."""
    environment = {
        name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"
    }
    environment |= {"LD_LIBRARY_PATH": str(folder), "NEXRL_DATA": str(folder)}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command = [sys.executable, "-c", OFFERED]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return said.stdout.strip().split(",")


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [(None, ["0", "1"]), ("1", ["1"]), ("GPU-b, GPU-a", ["GPU-b", "GPU-a"]), ("", []), ("-1", [])],
)
def test_an_agent_offers_the_gpus_of_its_environment(
    visible: str | None, gpus: list[str], driver: Path
) -> None:
    """CUDA_VISIBLE_DEVICES says which, by number or UUID; set to nothing it means the CPU. `nexrl
    up` counts the same."""
    assert offered(driver, visible) == [*gpus, str(len(gpus) or CPU_SLOTS)]


def test_a_machine_without_a_driver_offers_its_cpu(tmp_path: Path) -> None:
    """nvidia-ml-py finds no library, whatever the environment names."""
    assert offered(tmp_path, "0") == [str(CPU_SLOTS)]


def test_gpus_come_back_in_their_order() -> None:
    """Whatever they are called, and in whatever order groups end."""
    slots = Slots(3, ("GPU-b", "GPU-a", "GPU-c"))
    first, second = slots.take(1), slots.take(2)

    slots.give_back(2, second)
    slots.give_back(1, first)

    assert (first, second) == (("GPU-b",), ("GPU-a", "GPU-c"))
    assert slots.take(3) == ("GPU-b", "GPU-a", "GPU-c")
