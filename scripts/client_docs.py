"""docs/client-api.md from the client's docstrings and signatures, and the contract's tables.

`make docs` writes the page, `make lint` refuses one that is not current. Every public name of
nexrl_client stands on it, or this fails.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import nexrl_client
from nexrl_client import TrainServiceClient, errors, testing
from nexrl_contract.errors import ERRORS
from nexrl_contract.operations import OPERATIONS, ROLES
from nexrl_contract.tensors import TENSORS

TARGET = Path(__file__).parents[1] / "docs" / "client-api.md"
WIDTH = 100
HEAD = """# The client's API

Every public name of `nexrl_client`: what it takes, with shapes, what it answers and what it raises.
[client.md](client.md) is the guide to read first, [troubleshooting.md](troubleshooting.md) says
what to do about errors. This page is generated from the docstrings by `scripts/client_docs.py`.

Shapes: B rows; S columns of `input_ids`; R columns of `responses`, the last R of the S; K tokens of
the vocabulary at each of the R.

Types: `TensorLike` is a torch tensor, a NumPy array or nested lists; `Tensor` is a torch tensor or
a NumPy array, whichever was given; `BatchLike` is any form of a batch; `Entry` is one group's
configuration as a dict; `Estimator` is `"grpo"`, `"rloo"` or `"dr_grpo"`.
"""
METHODS = {
    "Setting up": ("initialize_worker", "init_model", "barrier", "destroy"),
    "Training": (
        "update_actor",
        "update_actor_with_distillation",
        "update_critic",
        "forward_backward",
        "optim_step",
    ),
    "Scoring": ("compute_log_prob", "compute_ref_log_prob", "compute_values", "compute_rewards"),
    "Checkpoints": ("save_checkpoint", "load_checkpoint", "convert_checkpoint_to_huggingface"),
    "Asking the service": ("health_check", "get_models", "worker_info"),
    "Many calls at once": ("submit", "submit_async", "actor_context"),
}
"""The operations and other methods of TrainServiceClient, in the order of the page."""
NAMES = {
    "Making clients": (
        "create_train_service_client",
        "create_train_service_clients",
        "load_service_config",
        "TrainServiceClients",
    ),
    "TrainServiceClient": ("TrainServiceClient",),
    "Its two kinds": ("HTTPTrainServiceClient", "MockTrainServiceClient"),
    "A job": ("JobHandle",),
    "A batch of trajectories": ("Batch",),
    "Advantages": ("group_relative_advantages", "gae", "whiten"),
    "Padding, masks and positions": (
        "left_pad",
        "right_pad",
        "position_ids",
        "response_mask",
        "loss_mask_after_prompts",
        "scoring_mask",
    ),
    "Tensors in JSON, frames in parts": (
        "tensor_to_data",
        "data_to_tensor",
        "split_for_requests",
        "Part",
    ),
    "The transport": ("Transport", "HTTPTransport", "Request", "Response"),
}
INNER = {"job_view", "job_result", "cancel_job", "result_within", "forget_connections"}
"""Public among the client's own modules only."""
CODE = re.compile(
    r"""(?x)
    \w+\["[^"]+"\]                                       # batch["values"]
    | \{"[^{}]*(?:\{[^{}]*\}[^{}]*)*\}                   # {"batch": {...}}
    | "[\w.:/-]+"                                        # "grpo"
    | \[(?:B|S|R|K|n|width)(?:,\ ?(?:B|S|R|K|width))*\]  # [B, R]
    | [\w.]+\([^()]*\)                                   # destroy(), clients.by_role("teacher")
    | \b\w+=[\w."]+                                      # top_k=K
    | \b(?:nexrl|tensor)_\w+\.\w+                          # nexrl_client.testing
    | (?<!\w)\.?[a-z]+(?:[_.][a-z0-9]+)*_[a-z0-9]+\b     # input_ids, .train_service
    | \bNone\b | \bTrue\b | \bFalse\b
    """
)


def document() -> str:
    """The page; raises SystemExit where a public name is not on it."""
    written = {name for names in NAMES.values() for name in names} | {*errors.__all__}
    _same(written, {*nexrl_client.__all__})
    _same({name for names in METHODS.values() for name in names}, {*_methods(TrainServiceClient)})
    parts = [HEAD]
    for title, names in NAMES.items():
        parts.append(f"## {title}\n")
        for name in names:
            parts += _client() if name == "TrainServiceClient" else _entry(name)
    parts += ["## Tests of trainers: nexrl_client.testing\n", _prose(testing)]
    for name in testing.__all__:
        if callable(thing := getattr(testing, name)) and thing.__module__ == testing.__name__:
            parts += [f"### {name}\n", *_described(name, thing)]
    return "\n".join([*parts, "## Tensors\n", *_tensors(), "## Errors\n", *_errors()])


def _same(on_page: set[str], public: set[str]) -> None:
    if on_page != public:
        raise SystemExit(f"on the page or public, and not both: {sorted(on_page ^ public)}")


def _client() -> Iterator[str]:
    yield _prose(TrainServiceClient)
    for title, names in METHODS.items():
        yield f"### {title}\n"
        for name in names:
            yield f"#### {name}\n"
            yield from _described(name, getattr(TrainServiceClient, name))
            if name in OPERATIONS and OPERATIONS[name].takes_batch:
                yield _reads_and_answers(name)


def _entry(name: str) -> Iterator[str]:
    thing = getattr(nexrl_client, name)
    yield f"### {name}\n"
    yield from _described(name, thing)
    if inspect.isclass(thing):
        for method, function in _methods(thing).items():
            yield f"#### {name}.{method}\n"
            yield from _described(method, function)


def _methods(kind: type) -> dict[str, Callable[..., object]]:
    """What a class itself adds; what it has from a base, or from a Protocol, stands there."""
    inherited = {name for base in kind.__mro__[1:] for name in vars(base)}
    return {
        name: getattr(kind, name)
        for name, member in vars(kind).items()
        if name[0] != "_" and name not in inherited | INNER
        if callable(member) or isinstance(member, classmethod)
    }


def _described(name: str, thing: Callable[..., object]) -> Iterator[str]:
    """Signature and docstring, that of a constructor too."""
    if not getattr(thing, "_is_protocol", False):
        yield f"```python\n{_signature(name, thing)}\n```\n"
    yield _prose(thing)
    if inspect.isclass(thing) and inspect.isfunction(thing.__init__) and thing.__init__.__doc__:
        yield _prose(thing.__init__)


def _signature(name: str, thing: Callable[..., object]) -> str:
    signature, parts = inspect.signature(thing), []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        if parameter.name != "self":
            stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
            parts.append(f"{stars}{parameter.name}: {parameter.annotation}{_default(parameter)}")
    answer = "" if inspect.isclass(thing) else f" -> {signature.return_annotation}"
    line = f"{name}({', '.join(parts)}){answer}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){answer}"


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return ""
    value = parameter.default
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return " = ..." if text.startswith("<") else f" = {text}"


def _prose(thing: object) -> str:
    """The docstring at the width of the page: paragraphs, and what is indented as it stands."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", inspect.getdoc(thing) or ""):
        if paragraph.startswith("    "):
            paragraphs.append(f"```\n{textwrap.dedent(paragraph)}\n```")
            continue
        text = " ".join(paragraph.split())
        for sentences in re.split(r"(?<=\.) (?=Returns |Raises )", text):
            paragraphs.append(_filled(_marked(sentences)))
    return "\n\n".join(paragraphs) + "\n"


def _marked(text: str) -> str:
    return CODE.sub(r"`\g<0>`", text)


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _reads_and_answers(name: str) -> str:
    """What an operation on a batch reads and answers, by the contract's row."""
    row = OPERATIONS[name]
    reads = [f"`{key}`{' (required)' if key in row.required else ''}" for key in row.reads]
    answers = [f"`{key}` `{TENSORS[key].answered}`" for key in row.answers]
    lines = [
        f"- Roles: {', '.join(row.roles if row.roles != ROLES else ('all',))}.",
        f"- Reads: {', '.join(reads)}.",
        f"- Answers: {', '.join(answers) or 'no tensors'}.",
    ]
    return "\n".join(_filled(line, "  ") for line in lines) + "\n"


def _tensors() -> Iterator[str]:
    yield "An operation reads those of its list, and names every other tensor under `ignored`.\n"
    yield "| tensor | shapes | elements | meaning |\n|---|---|---|---|"
    for spec in TENSORS.values():
        shapes = " or ".join(f"`{shape}`" for shape in spec.shapes)
        yield f"| `{spec.name}` | {shapes} | {spec.values} | {spec.meaning} |"
    yield ""


def _errors() -> Iterator[str]:
    drawing = inspect.getdoc(errors) or ""
    yield f"```\n{drawing[drawing.index('NexRLError') :].strip()}\n```\n"
    yield from _entry("NexRLError")
    yield "### The classes that have no code of the service\n"
    for name in errors.__all__:
        kind = getattr(errors, name)
        if kind not in errors.BY_CODE.values() and kind is not errors.NexRLError:
            yield _filled(f"- `{name}`: {_marked(_line(kind))}", "  ")
    yield "\n### The service's codes\n"
    yield "Again: the same call may succeed later. [client.md](client.md) has what is repeated.\n"
    yield "| class | code | HTTP | again | meaning |\n|---|---|---|---|---|"
    for code, row in ERRORS.items():
        kind, again = errors.BY_CODE[code], "yes" if row.retryable else ""
        yield f"| `{kind.__name__}` | `{code}` | {row.status} | {again} | {_line(kind)} |"
    yield ""


def _line(thing: object) -> str:
    return " ".join((inspect.getdoc(thing) or "").split())


if __name__ == "__main__":
    if "--check" in sys.argv:
        current = TARGET.exists() and TARGET.read_text() == document()
        sys.exit(0 if current else f"{TARGET.name} is not current: run make docs")
    TARGET.write_text(document())
