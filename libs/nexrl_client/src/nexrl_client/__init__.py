"""Client of the NexRL training service.

    client = create_train_service_client(
        backend="self-hosted", url="http://127.0.0.1:8000", identifier="student"
    )
    result = client.update_actor(batch)              # result["metrics"]["actor/grad_norm"]
    job = client.submit("compute_log_prob", batch)
    job.result(timeout=60)["batch"]["old_log_probs"]

Batch makes a batch of trajectories; advantages and layout hold the arithmetic around one.
load_service_config and create_train_service_clients give the clients of a whole service's YAML.

Importing this imports no torch. nexrl_client.errors draws the tree of errors; nexrl_client.testing
is for tests.
"""

from . import errors
from ._api import TrainServiceClient
from ._batch import Batch
from ._call import Part, split_for_requests
from ._clients import TrainServiceClients, create_train_service_client, create_train_service_clients
from ._config import load_service_config
from ._handle import JobHandle
from ._http import HTTPTrainServiceClient
from ._mock import MockTrainServiceClient
from ._tensors import data_to_tensor, tensor_to_data
from ._transport import HTTPTransport, Request, Response, Transport
from .advantages import gae, group_relative_advantages, whiten
from .errors import *  # noqa: F403 - every error, by its __all__
from .layout import (
    left_pad,
    loss_mask_after_prompts,
    position_ids,
    response_mask,
    right_pad,
    scoring_mask,
)

__all__ = [
    "Batch", "HTTPTrainServiceClient", "HTTPTransport", "JobHandle", "MockTrainServiceClient",
    "Part", "Request", "Response", "TrainServiceClient", "TrainServiceClients", "Transport",
    "create_train_service_client", "create_train_service_clients", "data_to_tensor", "gae",
    "group_relative_advantages", "left_pad", "load_service_config", "loss_mask_after_prompts",
    "position_ids", "response_mask", "right_pad", "scoring_mask", "split_for_requests",
    "tensor_to_data", "whiten",
]  # fmt: skip
__all__ += errors.__all__
