"""Which keys do nothing for a role, which contradict each other, and which say another one in other
words."""

from __future__ import annotations

from typing import Any

import pytest
from nexrl_contract.config import GroupConfig, completed, differing_keys, parse_config
from nexrl_contract.errors import ServiceError
from nexrl_contract.operations import ROLES
from nexrl_contract.sections import Section, ServiceEntry, roles_of, section_of

_BIAS_CORRECTED = {"use_kl_loss": True, "use_bias_correction_kl": True}


def parse(actor: dict[str, Any], role: str = "actor") -> GroupConfig:
    return parse_config({"actor": {"model": {"path": "/models/tiny"}, **actor}}, role)


@pytest.mark.parametrize(
    ("role", "given", "ignored"),
    [
        ("actor", {"cliprange_value": 0.2}, ["cliprange_value"]),
        ("actor", {"loss_func_type": "NX_20250515", "clip_ratio_c": 3.0}, ["clip_ratio_c"]),
        ("actor", {"loss_func_type": "NX_20241031", "clip_ratio_c": 3.0}, ["clip_ratio_c"]),
        ("actor", {"loss_func_type": "NX_20241031", "clip_ratio_c": None}, []),
        ("actor", {"loss_func_type": "importance_sampling", "clip_ratio_c": 3.0}, ["clip_ratio_c"]),
        ("actor", {"policy_loss": "gspo", "clip_ratio_c": 3.0}, []),
        ("actor", {"entropy_coeff": 0.1, "use_kl_loss": True, "rollout": {"temperature": 0.7}}, []),
        (
            "actor",
            {"use_dynamic_bsz": True, "ppo_micro_batch_size": 8, "ppo_micro_batch_size_per_gpu": 1},
            ["ppo_micro_batch_size_per_gpu", "ppo_micro_batch_size"],
        ),
        ("actor", {"use_bias_correction_kl": True}, ["use_bias_correction_kl"]),
        ("actor", {"use_bias_correction_kl": True, "use_kl_loss": True}, []),
        (
            "actor",
            {"rollout_correction": {"mode": "token_truncate", "drop_rejected": True}},
            ["rollout_correction.drop_rejected"],
        ),
        ("actor", {"rollout_correction": {"mode": "token_mask", "drop_rejected": True}}, []),
        ("critic", {"optim": {"no_decay": "norms and biases"}}, []),
        (
            "critic",
            {"optim": {"no_decay": "norms and biases", "weight_decay": 0.0}},
            ["optim.no_decay"],
        ),
        ("teacher", {"optim": {"no_decay": "norms and biases"}}, ["optim.no_decay"]),
        ("critic", {"distillation_student": "old_log_probs"}, ["distillation_student"]),
        (
            "critic",
            {"loss_func_type": "cispo", "clip_ratio": 0.1},
            ["loss_func_type", "clip_ratio"],
        ),
        ("critic", {"rollout_correction": {"mode": "token_mask"}}, ["rollout_correction"]),
        ("critic", {"rollout": {"temperature": 0.7, "n": 8}}, ["rollout.temperature"]),
        ("critic", {"model": {"path": "/m", "lm_head_dtype": "float32"}}, ["model.lm_head_dtype"]),
        ("critic", {"ref": {"model": {"path": "/r"}}}, ["ref.model.path"]),
        (
            "critic",
            {"cliprange_value": 0.2, "optim": {"lr": 1e-3}, "loss_agg_mode": "seq-mean-token-sum"},
            [],
        ),
        (
            "ref",
            {"optim": {"lr": 1e-3, "betas": [0.8, 0.9], "warmup_style": "x"}},
            ["optim.lr", "optim.betas"],
        ),
        (
            "teacher",
            {"grad_clip": 0.5, "ppo_epochs": 2, "kl_loss_coef": 0.1},
            ["grad_clip", "ppo_epochs", "kl_loss_coef"],
        ),
        (
            "teacher",
            {"rollout": {"temperature": 0.7}, "model": {"path": "/m", "lm_head_dtype": "float32"}},
            [],
        ),
        ("ref", {"fsdp_config": {"gradient_sync": "mini_batch"}}, ["fsdp_config.gradient_sync"]),
        ("reward", {"rollout": {"temperature": 0.7}}, ["rollout.temperature"]),
        (
            "reward",
            {
                "model": {
                    "path": "/m",
                    "lm_head_dtype": "float32",
                    "enable_gradient_checkpointing": True,
                }
            },
            ["model.lm_head_dtype", "model.enable_gradient_checkpointing"],
        ),
        ("ref", {"policy_loss": "cispo", "clip_ratio_c": 3.0}, ["policy_loss", "clip_ratio_c"]),
        ("critic", {"policy_loss": "gspo", "clip_ratio": 0.1}, ["policy_loss", "clip_ratio"]),
    ],
)
def test_what_does_nothing_for_the_role_is_named(
    role: str, given: dict[str, Any], ignored: list[str]
) -> None:
    """Each given key that this role never reads, under the name that was sent, and no other."""
    named = [name for name in parse(given, role).ignored if not name.endswith("warmup_style")]
    assert named == [f"actor.{name}" for name in ignored]


@pytest.mark.parametrize("role", ROLES)
def test_a_default_is_never_named(role: str) -> None:
    """A configuration that spells out every default, as an answer of the service does, is as good
    as a bare one."""
    assert parse(parse({}).settings() | {"ref": {}}, role).ignored == ()


def test_every_role_that_a_key_names_is_one() -> None:
    """A misspelt role in it would never be a group's."""
    sections: list[type[Section]] = [ServiceEntry]
    named = set[str]()
    while sections:
        for info in sections.pop().model_fields.values():
            named |= {*roles_of(info)}
            sections += [inner for inner in [section_of(info)] if inner is not None]

    assert named == {*ROLES} - {"reward"}


def test_a_critic_adds_up_its_loss_as_it_is_told() -> None:
    """A policy loss that fixes the sum is the actor's, also where the sections are copies."""
    assert parse({"policy_loss": "gspo"}, "critic").settings()["loss_agg_mode"] == "token-mean"


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (
            {"policy_loss": "cross_entropy", "rollout_correction": {"mode": "token_mask"}},
            "rollout_correction",
        ),
        (
            {"policy_loss": "linear", "rollout_correction": {"mode": "token_mask"}},
            "rollout_correction",
        ),
        ({"policy_loss": "linear", "loss_agg_mode": "seq-mean-token-sum"}, "loss_agg_mode"),
        (
            {
                "fsdp_config": {
                    "model_dtype": "float64",
                    "mixed_precision": {"param_dtype": "float32"},
                }
            },
            "fsdp_config.mixed_precision.param_dtype",
        ),
        (
            {"fsdp_config": {"model_dtype": "fp64", "mixed_precision": {"reduce_dtype": "fp32"}}},
            "fsdp_config.mixed_precision.reduce_dtype",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(given: dict[str, Any], key: str) -> None:
    """By the key that has to go."""
    with pytest.raises(ServiceError) as caught:
        parse(given)

    assert (caught.value.code, caught.value.details["key"]) == ("INVALID_CONFIG", f"actor.{key}")


@pytest.mark.parametrize(
    "given",
    [
        {"policy_loss": "gspo", "clip_ratio_c": 3.0},
        {
            "policy_loss": "linear",
            "loss_agg_mode": "token-mean",
            "clip_ratio_c": None,
            "rollout_correction": None,
        },
        {"policy_loss": "cispo", "rollout_correction": {"mode": "token_mask"}},
        {
            "fsdp_config": {
                "model_dtype": "float64",
                "mixed_precision": {"param_dtype": "fp64", "reduce_dtype": None},
            }
        },
    ],
)
def test_keys_that_fit_together_are_taken(given: dict[str, Any]) -> None:
    """The refusals go no further than they must."""
    assert parse(given).ignored == ()


@pytest.mark.parametrize(
    ("given", "world_size", "rows"),
    [
        ({"ppo_micro_batch_size": 16}, 4, 4),
        ({"ppo_micro_batch_size": 15}, 4, 3),
        ({"ppo_micro_batch_size": 2, "ppo_micro_batch_size_per_gpu": None}, 4, 1),
        ({"ppo_micro_batch_size": 16, "ppo_micro_batch_size_per_gpu": 3}, 4, 3),
        ({"ppo_micro_batch_size": None}, 4, None),
    ],
)
def test_a_micro_batch_of_all_ranks_is_shared_out(
    given: dict[str, Any], world_size: int, rows: int | None
) -> None:
    """The ranks' own size wins; else each takes its share of the whole, and one row at least."""
    settings = parse(given).settings(world_size)
    assert settings["ppo_micro_batch_size_per_gpu"] == rows
    assert settings == parse({"ppo_micro_batch_size_per_gpu": rows}).settings()


@pytest.mark.parametrize(
    ("optim", "steps", "ignored"),
    [
        ({"lr_warmup_steps_ratio": 0.1, "total_training_steps": 25}, 2, []),
        (
            {"lr_warmup_steps_ratio": 0.1, "total_training_steps": 25, "lr_warmup_steps": 7},
            7,
            ["lr_warmup_steps_ratio"],
        ),
        ({"lr_warmup_steps_ratio": 0.1}, 0, ["lr_warmup_steps_ratio"]),
        ({"lr_warmup_steps_ratio": 0.0}, 0, []),
    ],
)
def test_a_warm_up_may_be_a_share_of_all_steps(
    optim: dict[str, Any], steps: int, ignored: list[str]
) -> None:
    """Rounded down; where it says nothing it is named."""
    config = parse({"optim": optim})
    assert config.settings()["optim"]["lr_warmup_steps"] == steps
    assert config.ignored == tuple(f"actor.optim.{name}" for name in ignored)


def test_a_share_that_another_key_replaces_is_named() -> None:
    """Both sizes of a micro-batch: the one that has no effect."""
    config = parse({"ppo_micro_batch_size": 16, "ppo_micro_batch_size_per_gpu": 3})
    assert config.ignored == ("actor.ppo_micro_batch_size",)


def test_a_value_that_nobody_knows_is_answered_with_the_nearest() -> None:
    for given, key, meant in (
        ({"optim": {"no_decay": "norms_and_biases"}}, "optim.no_decay", "norms and biases"),
        ({"distillation_student": "old_log_prob"}, "distillation_student", "old_log_probs"),
        ({"kl_loss_type": "low_var"}, "kl_loss_type", "low_var_kl"),
    ):
        with pytest.raises(ServiceError, match=f"did you mean {meant}") as caught:
            parse(given)
        assert (caught.value.details["key"], caught.value.details["nearest"]) == (
            f"actor.{key}",
            meant,
        )


def test_a_group_of_an_older_version_is_no_other_group() -> None:
    """Keys that it did not know stand at their defaults."""
    now = parse({"rollout_correction": {"mode": "token_mask"}}).settings()
    kept = {name: value for name, value in now.items() if not name.endswith(("_kl", "_student"))}
    kept["optim"] = {name: value for name, value in now["optim"].items() if name != "no_decay"}
    kept["rollout_correction"] = {"mode": "token_mask", "lower": 0.0, "upper": 2.0}
    assert differing_keys(completed(kept), now) == []
    assert differing_keys(completed(kept), {**now, "use_bias_correction_kl": True}) == [
        "use_bias_correction_kl"
    ]
