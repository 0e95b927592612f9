"""The operation ledger: the truth about every job, group and agent. RQ may lose, double or reorder its bells without harm."""

from __future__ import annotations

from nexrl_contract import names

from nexrl_ledger.groups import GroupRecords
from nexrl_ledger.jobs import JobRecords
from nexrl_ledger.presence import Presence
from nexrl_ledger.retention import Retention


class Ledger(JobRecords, GroupRecords, Presence, Retention):
    """All records, by way of one client."""

    def payloads_in_use(self) -> set[str]:
        """Ids of the payloads that jobs which have not ended still need."""
        queues = [names.AGENT_QUEUE, names.CHECKPOINT_QUEUE, *(names.train_queue(name) for name in self.identifiers())]
        return {job.payload.id for queue in queues for job in self.waiting(queue) if job.payload is not None}
