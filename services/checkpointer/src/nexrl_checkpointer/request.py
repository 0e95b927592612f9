"""The second half of a save, as rank 0 hands it over in the job's params."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from nexrl_contract.errors import ServiceError
from nexrl_contract.records import JobRecord
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class PublishRequest(BaseModel):
    """``staging`` and ``path`` are absolute; ``result`` is merged into what the caller of the save
    gets."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    job_id: str
    attempt: int
    order: int = 0
    identifier: str
    staging: Path
    path: Path
    step: int
    seq: int
    kind: Literal["sharded"]
    weight_only: bool
    remove_previous: bool
    world_size: int = Field(ge=1)
    config_hash: str = ""
    fingerprint: str | None = None
    result: dict[str, Any] = {}

    @classmethod
    def of(cls, job: JobRecord, staging_root: Path) -> Self:
        """Raises ``INTERNAL`` for params that no rank of ours wrote: the staging folder is deleted
        in the end."""
        try:
            request = cls.model_validate(
                {
                    **job.params,
                    "job_id": job.id,
                    "attempt": job.attempt,
                    "order": job.order,
                    "identifier": job.identifier,
                }
            )
        except ValidationError as error:
            raise ServiceError(
                "INTERNAL", f"the publish request is malformed: {error.errors()[0]['msg']}"
            ) from None
        if (
            request.staging.resolve() != (staging_root / job.id).resolve()
            or not request.path.is_absolute()
        ):
            raise ServiceError(
                "INTERNAL", f"{request.staging} is not the staging folder of job {job.id}"
            )
        return request
