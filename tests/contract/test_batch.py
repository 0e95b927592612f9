"""The one check of a batch: what each operation and loss reads, which shapes and dtypes fit, what
does nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import pytest
from nexrl_contract.batch import answers_of, check_batch, reads_of, shortened, unread_metadata
from nexrl_contract.config import parse_config
from nexrl_contract.errors import ServiceError
from nexrl_contract.losses import LOSSES, AggregationMode, LossName
from nexrl_contract.operations import DISTILLATION, OPERATIONS, SCORED
from nexrl_contract.sections import ActorConfig
from nexrl_contract.tensors import TENSORS

B, S, R, K = 4, 6, 3, 5
SIZES = {"B": B, "S": S, "R": R, "K": K}
KL = {"use_kl_loss": True}
BIAS_CORRECTED = {**KL, "use_bias_correction_kl": True}


@dataclass(frozen=True)
class Entry:
    """A tensor as a header describes it."""

    dtype: str
    shape: tuple[int, ...]


def settings(actor: Mapping[str, Any]) -> ActorConfig:
    return parse_config({"actor": {"model": {"path": "/m"}, **actor}}).entry.actor


def header(*names: str, form: int = -1, **changes: Entry) -> dict[str, Entry]:
    """Those tensors, each in one of its shapes."""
    made = {}
    for name in ("input_ids", "responses", *names):
        forms = TENSORS[name].shapes
        letters = forms[form % len(forms)][1:-1].split(",")
        dtype = "F32" if TENSORS[name].values == "numbers" else "I64"
        made[name] = Entry(dtype, tuple(SIZES[letter] for letter in letters))
    return {**made, **changes}


def check(
    operation: str,
    tensors: Mapping[str, Entry],
    actor: Mapping[str, Any] | None = None,
    **params: Any,
) -> Any:
    return check_batch(tensors, OPERATIONS[operation], params, settings(actor or {}))


def test_the_tables_agree_with_each_other() -> None:
    """Names of losses in the configuration are the rows; what operations read and answer has a row;
    a mode is a mode."""
    assert get_args(LossName) == tuple(LOSSES)
    named = {
        name for row in OPERATIONS.values() for name in (*row.reads, *row.required, *row.answers)
    }
    assert named == TENSORS.keys()
    assert {loss.aggregation for loss in LOSSES.values()} - {None, "sum"} <= {
        *get_args(AggregationMode)
    }
    assert all(set(row.required) <= set(row.reads) for row in OPERATIONS.values())


@pytest.mark.parametrize("operation", [name for name, row in OPERATIONS.items() if row.takes_batch])
@pytest.mark.parametrize("form", [0, 1, 2])
def test_every_tensor_is_taken_in_each_of_its_shapes(operation: str, form: int) -> None:
    """And refused in others, of other rows, and of another dtype, by name."""
    row = OPERATIONS[operation]
    given = header(*row.reads, form=form)
    checked = check(operation, given)
    assert (checked.rows, checked.sequence, checked.response) == (B, S, R)
    for name in row.reads:
        shape = given[name].shape
        wider = [] if len(shape) == 3 else [(B, S + 1)]  # K is anything
        for wrong in [(B + 1, *shape[1:]), (*shape, 1, 1), *wider] if name != "input_ids" else []:
            with pytest.raises(ServiceError, match=f"{name} has shape") as caught:
                check(operation, {**given, name: Entry(given[name].dtype, wrong)})
            assert (caught.value.code, caught.value.details["tensor"]) == ("INVALID_TENSOR", name)
        with pytest.raises(ServiceError, match=f"{name} has dtype F8"):
            check(operation, {**given, name: Entry("F8", shape)})


@pytest.mark.parametrize("shape", [(B,), (0, S), (B, 1), (B, S, 1)])
def test_ids_are_rows_of_two_tokens_or_more(shape: tuple[int, ...]) -> None:
    with pytest.raises(ServiceError, match=r"expected \[B,S\]"):
        check("compute_log_prob", {"input_ids": Entry("I64", shape)})


def test_without_responses_all_tokens_but_the_first_may_be_scored() -> None:
    assert check("compute_log_prob", {"input_ids": Entry("U16", (B, S))}).response == S - 1


def test_a_teachers_tensors_have_one_k() -> None:
    given = header(
        "teacher_topk_ids", "teacher_topk_log_probs", teacher_topk_ids=Entry("I64", (B, R, K + 1))
    )
    with pytest.raises(
        ServiceError,
        match=r"teacher_topk_ids has shape \[4, 3, 6\]; expected \[4, 3, 5\], as teach",
    ):
        check(DISTILLATION, given, distillation_loss="forward_kl")


DROPPING = {"mode": "sequence_mask", "drop_rejected": True}
TRUNCATING = {"mode": "token_truncate", "drop_rejected": True}


@pytest.mark.parametrize(
    ("operation", "actor", "params", "needed"),
    [
        ("update_actor", {}, {}, {"advantages"}),
        ("update_actor", {"policy_loss": "cross_entropy"}, {}, set()),
        (
            "update_actor",
            {"rollout_correction": DROPPING},
            {},
            {"advantages", "rollout_log_probs", "old_log_probs"},
        ),
        (
            "update_actor",
            {"rollout_correction": TRUNCATING},
            {},
            {"advantages", "rollout_log_probs"},
        ),
        ("forward_backward", {}, {"loss": "linear"}, {"loss_weights"}),
        ("forward_backward", {"rollout_correction": DROPPING}, {"loss": "cross_entropy"}, set()),
        (DISTILLATION, {}, {}, {"teacher_log_probs"}),
        (
            DISTILLATION,
            {"rollout_correction": TRUNCATING},
            {},
            {"teacher_log_probs", "rollout_log_probs"},
        ),
        (
            DISTILLATION,
            {"distillation_student": "old_log_probs"},
            {},
            {"teacher_log_probs", "old_log_probs"},
        ),
        (
            DISTILLATION,
            {"distillation_student": "rollout_log_probs"},
            {},
            {"teacher_log_probs", "rollout_log_probs"},
        ),
        (
            DISTILLATION,
            {"rollout_correction": TRUNCATING},
            {"distillation_loss": "forward_kl"},
            {"teacher_topk_ids", "teacher_topk_log_probs"},
        ),
        ("update_critic", {}, {}, {"returns"}),
        ("compute_values", {}, {}, set()),
    ],
)
def test_a_batch_without_what_the_loss_needs_is_refused(
    operation: str, actor: dict[str, Any], params: dict[str, Any], needed: set[str]
) -> None:
    """Before it is stored, by the first name that is missing; with all of them it is taken."""
    row = OPERATIONS[operation]
    assert set(reads_of(row, params, settings(actor), ()).required) == needed
    assert set(check(operation, header(*needed), actor, **params).names) == needed
    for name in ("input_ids", *needed):
        given = {other: entry for other, entry in header(*needed).items() if other != name}
        with pytest.raises(
            ServiceError, match=f"{operation} needs the tensor {name}; the batch has"
        ):
            check(operation, given, actor, **params)


@pytest.mark.parametrize(
    ("operation", "params", "actor", "unread"),
    [
        ("update_actor", {}, {}, {"ref_log_prob", "loss_weights"}),
        ("update_actor", {}, KL, {"loss_weights"}),
        ("update_actor", {}, {**KL, "kl_loss_coef": 0.0}, {"ref_log_prob", "loss_weights"}),
        (
            "update_actor",
            {},
            {"policy_loss": "cross_entropy"},
            {"advantages", "old_log_probs", "ref_log_prob", "loss_weights"},
        ),
        (
            "forward_backward",
            {"loss": "cross_entropy"},
            BIAS_CORRECTED,
            {"advantages", "loss_weights"},
        ),
        (
            "forward_backward",
            {"loss": "linear"},
            {},
            {"advantages", "old_log_probs", "ref_log_prob"},
        ),
        (
            "forward_backward",
            {"loss": "reinforce"},
            {},
            {"old_log_probs", "ref_log_prob", "loss_weights"},
        ),
        (
            DISTILLATION,
            {"distillation_loss": "forward_kl"},
            {},
            {"advantages", "old_log_probs", "ref_log_prob"},
        ),
        (DISTILLATION, {}, {}, {"ref_log_prob", "teacher_topk_ids", "teacher_topk_log_probs"}),
        ("compute_log_prob", {}, {}, {"advantages", "old_log_probs", "ref_log_prob"}),
        ("compute_values", {}, {}, {"advantages", "old_log_probs", "ref_log_prob", "temperature"}),
    ],
)
def test_what_the_loss_does_not_look_at_is_named(
    operation: str, params: dict[str, Any], actor: dict[str, Any], unread: set[str]
) -> None:
    """And so is what no operation knows."""
    row = OPERATIONS[operation]
    given = header("attention_mask", "advantages", "old_log_probs", "ref_log_prob", "temperature")
    given |= {name: entry for name, entry in header("loss_weights").items() if name in row.reads}
    if operation == DISTILLATION:
        kinds = ("teacher_topk_ids", "teacher_topk_log_probs")
        given |= header(*kinds) if params else header("teacher_log_probs", *kinds)
    checked = check(operation, {**given, "prompts": Entry("I64", (1,))}, actor, **params)
    assert set(checked.ignored) == {*unread, "prompts"}
    assert given.keys() - {*checked.ignored, *checked.names} <= {*SCORED}


def test_what_a_rollout_correction_weighs_by_is_read() -> None:
    """`reinforce` itself has no ratio; its mismatch metrics and correction have."""
    given = header("advantages", "old_log_probs", "rollout_log_probs")
    assert check("update_actor", given, {"policy_loss": "reinforce"}).ignored == ()


def test_a_configuration_that_is_not_known_asks_for_what_every_loss_needs() -> None:
    """A client without one: ids and shapes, and what its own arguments say."""
    row = OPERATIONS["forward_backward"]
    assert check_batch(header(), row, {}, None).names == ()
    with pytest.raises(ServiceError, match="loss_weights"):
        check_batch(header(), row, {"loss": "linear"}, None)


@pytest.mark.parametrize(
    ("operation", "params", "actor", "answers"),
    [
        ("update_actor", {}, {}, ()),
        ("update_actor", {}, {"policy_loss": "linear"}, ("log_probs",)),
        ("forward_backward", {"loss": "linear"}, {}, ("log_probs",)),
        ("compute_log_prob", {}, {}, ("old_log_probs",)),
        (
            "compute_log_prob",
            {"top_k": 3},
            {},
            ("old_log_probs", "teacher_topk_ids", "teacher_topk_log_probs"),
        ),
        ("compute_rewards", {}, {}, ("rewards",)),
    ],
)
def test_answers(
    operation: str, params: dict[str, Any], actor: dict[str, Any], answers: tuple[str, ...]
) -> None:
    assert answers_of(OPERATIONS[operation], params, settings(actor)) == answers


def test_metadata_that_only_distillation_reads_is_known() -> None:
    """It is named for every other operation."""
    metadata = {
        "loss_agg_mode": "token-mean",
        "entropy_coeff": 0.1,
        "temperature": 1.0,
        "global_step": 3,
    }
    assert sorted(unread_metadata("update_actor", metadata)) == ["entropy_coeff", "loss_agg_mode"]
    assert unread_metadata(DISTILLATION, metadata) == []


def test_metadata_close_to_a_name_that_is_read_is_named() -> None:
    """A misspelt temperature scores at 1.0: its sender is told. What trainers send beside is
    not."""
    others = {
        "batch_size": 4,
        "model_tag": "x",
        "global_step": 3,
        "global_token_num": [9],
        "grpo_std": {},
        "eos": 1,
    }
    for name in (
        "temprature",
        "Temperature",
        "temp",
        "rollout_temperature",
        "entropy_coef",
        "loss_agg",
    ):
        assert unread_metadata(DISTILLATION, {**others, name: 0.7}) == [name]
        assert unread_metadata("compute_log_prob", {**others, "temperature": 1.0, name: 0.7}) == [
            name
        ]


def test_a_record_holds_few_and_short_names() -> None:
    names = shortened([f"{number:03}" + "x" * 100 for number in range(40)])
    assert len(names) == 33 and names[-1] == "and 8 more" and max(map(len, names)) == 64
