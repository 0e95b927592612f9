"""The worker's mathematics: a sharded model, its losses and its optimizer, without any queue or web
framework."""

from nexrl_worker.training.batch import Rows
from nexrl_worker.training.engine import Engine
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.fingerprint import fingerprint_of
from nexrl_worker.training.plan import Plan
from nexrl_worker.training.weights import Reader, Shard

__all__ = ["Engine", "InvalidValue", "Plan", "Reader", "Rows", "Shard", "fingerprint_of"]
