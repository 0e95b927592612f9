"""One endpoint for each operation of a worker group."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Query, Request
from nexrl_contract.operations import OPERATIONS, Operation
from starlette.responses import Response

from nexrl_gateway.answers import answer
from nexrl_gateway.docs import errors, operation_answers
from nexrl_gateway.examples import request_body
from nexrl_gateway.placement import destroy_idle
from nexrl_gateway.services import services_of
from nexrl_gateway.submit import submit_operation
from nexrl_gateway.wishes import Wishes, read_wishes

Identifier = Annotated[str | None, Query(description="The worker group; may be left out while there is only one.")]
router = APIRouter(tags=["operations"])

_SUMMARIES = {
    "init_model": "Load the model; nothing happens if it is loaded",
    "update_actor": "One policy update on a batch: forward, backward, optimizer steps",
    "update_actor_with_distillation": "One update towards a teacher's log-probabilities",
    "forward_backward": "Accumulate gradients of a batch",
    "optim_step": "Apply the accumulated gradients, or discard them",
    "compute_log_prob": "Log-probabilities of the responses under the current weights",
    "compute_ref_log_prob": "Log-probabilities of the responses under the reference weights",
    "compute_values": "A critic's values of the response positions",
    "update_critic": "One update of a critic towards returns",
    "compute_rewards": "A reward model's score of every row",
    "save_checkpoint": "Save a resumable checkpoint, or a Hugging Face folder for inference engines",
    "load_checkpoint": "Load a published checkpoint",
    "convert_checkpoint_to_huggingface": "A Hugging Face folder from a checkpoint, or of the current weights",
    "barrier": "Wait until everything submitted before has ended",
    "destroy": "End the group and free its slots",
}


def _endpoint(operation: Operation) -> Callable[..., Awaitable[Response]]:
    async def handle(
        request: Request, wishes: Annotated[Wishes, Depends(read_wishes)], identifier: Identifier = None
    ) -> Response:
        services = services_of(request)
        job = await submit_operation(services, operation, request, identifier, wishes.key)
        if operation.name == "destroy":
            await run_sync(destroy_idle, services, job)
        return await answer(services, job, wishes)

    return handle


for _operation in OPERATIONS.values():
    router.add_api_route(
        f"/{_operation.name}",
        _endpoint(_operation),
        methods=["POST"],
        name=_operation.name,
        operation_id=_operation.name,
        summary=_SUMMARIES[_operation.name],
        responses={
            **operation_answers(_operation),
            **errors(400, 404, 409, 410, 413, 415, 422, 429, 500, 504, 507),
        },
        openapi_extra={"requestBody": request_body(_operation)},
    )
