"""The LM head's peak memory: a subprocess measures one forward and backward over a vocabulary of
50,000."""

from __future__ import annotations

import mmap
import subprocess
import sys

import pytest
import torch
from nexrl_worker.training.observe.costs import peak_memory

TOKENS, VOCABULARY, WIDTH = 2048, 50_000, 64
MIB = 1024 * 1024
FEWER = 512  # enough to show what the plain way takes
ONE = TOKENS * VOCABULARY * 4 / MIB
GRADIENTS = (TOKENS * WIDTH + VOCABULARY * WIDTH) * 4 / MIB
CHUNKED = """
length = lm_head.chunk_length(V, hidden.device)
active = lm_head.active_chunks(torch.ones(T, dtype=torch.bool), length)
call = lm_head.HeadCall(labels, 0.9, length, active, True)
log_probs, entropies = lm_head.head_log_probs(hidden, weight, None, call)
"""
PLAIN = """
logs = torch.log_softmax(hidden @ weight.t() / 0.9, dim=-1)
log_probs, entropies = logs.gather(1, labels[:, None])[:, 0], -(logs.exp() * logs).sum(dim=-1)
"""
PROGRAM = """
import sys, torch
from nexrl_worker.training.model import lm_head
T, V, H = {tokens}, {vocabulary}, {width}
torch.set_num_threads(1)
hidden, weight = torch.randn(T, H).requires_grad_(), (0.1 * torch.randn(V, H)).requires_grad_()
labels = torch.randint(0, V, (T,))
def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
{way}
(log_probs.sum() + 0.1 * entropies.sum()).backward()
sys.stdout.write(str(status("VmHWM") - before))
"""


def growth(way: str, tokens: int) -> float:
    """MiB that the peak of resident memory lies above what the process held before."""
    program = PROGRAM.format(tokens=tokens, vocabulary=VOCABULARY, width=WIDTH, way=way)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100
    )
    return float(done.stdout)


@pytest.mark.slow
def test_chunks_take_half_of_one_copy_of_the_logits() -> None:
    """Log-probabilities, entropies and their backward: at most half of one float32 [tokens,V]
    beside the gradients."""
    assert growth(CHUNKED, TOKENS) <= ONE / 2 + GRADIENTS


@pytest.mark.slow
def test_the_plain_way_takes_more() -> None:
    """The bound can be missed: a log-softmax over all logits holds several copies of them."""
    assert growth(PLAIN, FEWER) > 2 * ONE * FEWER / TOKENS + GRADIENTS


def test_peak_of_a_block() -> None:
    """The peak counts what was held for a moment inside, not what an earlier block took."""
    cpu = torch.device("cpu")
    with peak_memory(cpu) as large:
        hold_for_a_moment(200)
    with peak_memory(cpu) as small:
        hold_for_a_moment(60)
    if large.since_start:
        pytest.skip("this kernel does not allow a process to reset its peak")
    assert 195 <= large.mib - large.before <= 260
    assert 55 <= small.mib - small.before <= 120


def hold_for_a_moment(mib: int) -> None:
    """Memory mapped anew and unmapped again: what malloc hands out may be pages that the process
    holds already."""
    with mmap.mmap(-1, mib * MIB) as memory:
        for _ in range(mib):
            memory.write(bytes(MIB))
