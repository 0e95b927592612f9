"""The worker's mathematics: a sharded model, its losses and its optimizer, without any queue or web
framework."""

from nexrl_worker.training.batch.layout import Rows
from nexrl_worker.training.batch.plan import Plan
from nexrl_worker.training.engine import Engine
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.fingerprint import fingerprint_of
from nexrl_worker.training.model.weights import Reader, Shard

__all__ = ["Engine", "InvalidValue", "Plan", "Reader", "Rows", "Shard", "fingerprint_of"]
