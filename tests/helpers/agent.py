"""An agent in a process of its own, driven through the ledger as the gateway drives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from nexrl_contract import names
from nexrl_contract.config import parse_config
from nexrl_contract.operations import OPERATIONS
from nexrl_contract.records import GroupRecord, JobRecord, PayloadRef
from nexrl_host.processes import die_with_parent
from nexrl_ledger import Ledger, connect
from nexrl_payloads import open_store
from tensor_codec import encode
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.helpers.records import new_job
from tests.helpers.servers import wait_until

START_S = 180.0


def save_model(folder: Path, vocabulary: int = 64) -> None:
    """A tiny Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


class Agents:
    """``python -m nexrl_worker.agent`` on a data folder; :attr:`ledger` sees the same Redis without
    detours."""

    def __init__(self, data: Path, redis_url: str) -> None:
        self.data = data
        self.ledger = Ledger(connect(redis_url))
        self.log = data.parent / f"{data.name}.agent.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, redis_url: str, slots: int = 2, **settings: str) -> subprocess.Popen[bytes]:
        """Start the agent named ``here``."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("NEXRL_")
        }
        environment |= {
            "NEXRL_REDIS_URL": redis_url,
            "NEXRL_DATA": str(self.data),
            "NEXRL_SLOTS": str(slots),
            "NEXRL_AGENT_NAME": "here",
            **settings,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nexrl_worker.agent"],
                env=environment,
                stderr=log,
                preexec_fn=die_with_parent,
            )
        return self.process

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the agent; its exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    def submit(self, operation: str, identifier: str = "student", **params: Any) -> JobRecord:
        """An operation of a group, with the arguments' defaults filled in as the gateway does."""
        document = OPERATIONS[operation].params.model_validate(params).model_dump(mode="json")
        job = new_job(
            operation, identifier=identifier, queue=names.train_queue(identifier), params=document
        )
        return self.ledger.submit(job)[0]

    def submit_batch(
        self,
        operation: str,
        tensors: dict[str, torch.Tensor],
        job: JobRecord | None = None,
        before_queued: Callable[[Path], None] = lambda path: None,
    ) -> JobRecord:
        """An operation of ``student`` with a batch, whose file may be hurt before it is queued."""
        job = job or new_job(operation, identifier="student", queue=names.train_queue("student"))
        stored = open_store(f"file://{self.data}/.nexrl/payloads").put(job.id, encode(tensors, {}))
        before_queued(self.data / ".nexrl" / "payloads" / job.id)
        payload = PayloadRef(id=stored.id, nbytes=stored.nbytes, checksum=stored.checksum)
        return self.ledger.submit(job.model_copy(update={"payload": payload}))[0]

    def place(
        self, model: Path, identifier: str = "student", world_size: int = 1, **actor: Any
    ) -> JobRecord:
        """``initialize_worker``."""
        job = new_job("initialize_worker", identifier=identifier, queue=names.AGENT_QUEUE)
        group = GroupRecord(
            identifier=identifier,
            world_size=world_size,
            config=parse_config({"actor": {"model": {"path": str(model)}, **actor}}).settings(),
            placement_job=job.id,
            created_at=time.time(),
        )
        return self.ledger.submit(job, group=group)[0]

    def ended(self, job: JobRecord, timeout_s: float = START_S) -> JobRecord:
        """The job's record once it has ended."""

        def look() -> JobRecord | None:
            record = self.ledger.require_job(job.id)
            return record if record.final else None

        return wait_until(
            look, timeout_s, f"the end of {job.operation}: {self.log.read_text()[-2000:]}"
        )

    def fingerprint(self) -> str:
        """The fingerprint of the weights of ``student``, by way of a published folder."""
        path = str(self.data / "fingerprint")
        job = self.ended(
            self.submit("save_checkpoint", local_path=path, saved_fully_shared_ckpt=False)
        )
        assert job.result is not None, job.error
        return str(job.result["fingerprint"])

    def published(self, save: JobRecord) -> None:
        """End a save that was handed over, as a checkpointer would; the staged files stay."""
        handed_over = self.ledger.claim(names.CHECKPOINT_QUEUE, job_id=save.id)
        assert handed_over is not None
        self.ledger.finish(handed_over, result={})

    def ready(
        self, model: Path, identifier: str = "student", world_size: int = 1, **actor: Any
    ) -> None:
        """A group with its model."""
        for job in (
            self.place(model, identifier, world_size, **actor),
            self.submit("init_model", identifier),
        ):
            assert self.ended(job).state == "finished", self.ledger.require_job(job.id)

    def group(self, identifier: str = "student") -> GroupRecord:
        """The group's record."""
        group = self.ledger.groups.get(identifier)
        assert group is not None
        return group

    def logs(self, identifier: str = "student") -> Path:
        """Where the group's ranks write."""
        return self.data / ".nexrl" / "logs" / "groups" / identifier

    def free(self) -> int:
        """Slots that the agent says are free."""
        return self.ledger.agents.heard()[0].free

    def ranks(self) -> list[psutil.Process]:
        """The rank processes on this data folder, and their launchers."""
        return [process for process in psutil.process_iter() if self._is_rank(process)]

    def _is_rank(self, process: psutil.Process) -> bool:
        try:
            ours = (
                process.status() != psutil.STATUS_ZOMBIE
                and "nexrl_worker.rank" in process.cmdline()
            )
            return ours and f'"data": "{self.data}"' in process.environ().get("NEXRL_GROUP", "")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False
