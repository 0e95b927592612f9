"""What a configuration may say, and what a user reads when it says something else."""

from __future__ import annotations

from typing import Any

import pytest
from nexrl_contract.config import GroupConfig, completed, differing_keys, effective, parse_config
from nexrl_contract.errors import ServiceError
from nexrl_contract.sections import ActorConfig

_MIXED = "actor.fsdp_config.mixed_precision"


def parse(actor: dict[str, Any]) -> GroupConfig:
    return parse_config({"actor": {"model": {"path": "/models/tiny"}, **actor}})


def test_a_model_path_is_enough_and_the_rest_has_the_documented_defaults() -> None:
    actor = parse({}).entry.actor

    assert (actor.policy_loss, actor.loss_agg_mode, actor.clip_ratio) == ("ppo", "token-mean", 0.2)
    assert (actor.optim.lr, actor.optim.betas, actor.optim.weight_decay) == (
        1e-6,
        (0.9, 0.999),
        0.01,
    )
    assert (actor.grad_clip, actor.fsdp_config.model_dtype, actor.ppo_epochs) == (1.0, "float32", 1)


@pytest.mark.parametrize(
    ("actor", "key", "nearest"),
    [
        ({"optim": {"learning_rate": 1}}, "actor.optim.learning_rate", "actor.optim.lr"),
        ({"zebra": 1}, "actor.zebra", None),
        ({"clip_ration": 0.1}, "actor.clip_ration", "actor.clip_ratio"),
        ({"lr": 1e-4}, "actor.lr", "actor.optim.lr"),
        ({"learning_rate": 1e-4}, "actor.learning_rate", "actor.optim.lr"),
        ({"optim": {"grad_clip": 1.0}}, "actor.optim.grad_clip", "actor.grad_clip"),
        ({"temperatur": 1.0}, "actor.temperatur", "actor.rollout.temperature"),
        (
            {"fsdp_config": {"param_dtype": "float32"}},
            "actor.fsdp_config.param_dtype",
            f"{_MIXED}.param_dtype",
        ),
        ({"world_size": 2}, "actor.world_size", "resource.world_size"),
        ({"optim": {"name": "adamw"}}, "actor.optim.name", None),
        (
            {"fsdp_config": {"mixed_precison": {}}},
            "actor.fsdp_config.mixed_precison",
            "actor.fsdp_config.mixed_precision",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(
    actor: dict[str, Any], key: str, nearest: str | None
) -> None:
    with pytest.raises(ServiceError) as caught:
        parse(actor)

    assert caught.value.code == "INVALID_CONFIG"
    assert caught.value.details["key"] == key
    assert caught.value.details.get("nearest") == nearest
    assert key in caught.value.message


@pytest.mark.parametrize(
    "actor",
    [
        {"optim": {"lr": -1}},
        {"optim": {"lr": "fast"}},
        {"clip_ratio_low": 2.0},
        {"policy_loss": "dpo"},
        {"optim": {"lr_scheduler": "cosine"}},
        {"optim": {"lr_scheduler": "cosine", "total_training_steps": 10, "lr_warmup_steps": 10}},
        {"optim": {"lr_warmup_steps": 10**400}},
        {"optim": {"betas": [0.9, 1.0]}},
        {"optim": {"betas": [-0.1, 0.9]}},
        {"optim": {"lr": float("nan")}},
        {"model": None},
        {"model": {"path": None}},
        {"rollout_correction": {"mode": None}},
        {"seed": -1},
        {"ppo_epochs": 10**9},
        {"optim": {"lr": "${oc.env:LR}"}},
        {"fsdp_config": {"model_dtype": "float8"}},
        {"loss_agg_mode": "seq-mean-token-sum-norm"},
        {"loss_scale_factor": 8.0},
        {"policy_loss": "gspo", "loss_agg_mode": "token-mean"},
        {"rollout_correction": {"mode": "token_mask", "lower": 3.0}},
        {"rollout_correction": {"upper": 3.0}},
        {"fsdp_config": {"param_offload": True}},
        {"fsdp_config": {"optimizer_offload": True}},
        {
            "optim": {
                "lr_scheduler": "cosine",
                "total_training_steps": 10,
                "lr_warmup_steps_ratio": 1.0,
            }
        },
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_its_key(actor: dict[str, Any]) -> None:
    with pytest.raises(ServiceError) as caught:
        parse(actor)

    assert caught.value.code == "INVALID_CONFIG"
    assert caught.value.details["key"].startswith("actor.")


@pytest.mark.parametrize("role", ["actor", "critic", "teacher"])
@pytest.mark.parametrize(
    "nulls",
    [
        {
            "optim": None,
            "fsdp_config": None,
            "rollout": None,
            "ref": None,
            "rollout_correction": None,
        },
        {"fsdp_config": {"mixed_precision": None, "param_offload": None}, "ref": {"model": None}},
        {
            "optim": {"lr": None, "betas": None, "lr_scheduler": None},
            "seed": None,
            "shuffle": None,
            "clip_ratio": None,
        },
        {"policy_loss": None, "loss_func_type": None, "loss_agg_mode": None},
        {"policy_loss": None, "loss_func_type": "ppo"},
        {"loss_func_type": "NX_20241031", "loss_agg_mode": None},
    ],
)
def test_a_key_without_a_value_is_as_if_it_were_not_there(role: str, nulls: dict[str, Any]) -> None:
    """YAML reads `optim:` as null: that is the section's defaults, not an error and not another
    setting."""
    found = parse_config(
        {"actor": {"model": {"path": "/m"}, **nulls}, "resource": None, "url": None}, role
    )
    plain = parse_config({"actor": {"model": {"path": "/m"}}}, role)

    assert found.settings() == plain.settings()
    assert found.ignored == ()


def test_a_null_that_says_something_is_kept() -> None:
    """No clipping is not the default clipping; an unknown key is unknown without a value, too."""
    unclipped = parse({"grad_clip": None})
    assert unclipped.settings()["grad_clip"] is None
    assert differing_keys(unclipped.settings(), parse({}).settings()) == ["grad_clip"]
    assert completed(unclipped.settings()) == unclipped.settings()
    assert (
        parse({"policy_loss": "gspo", "loss_agg_mode": None}).settings()["loss_agg_mode"]
        == "seq-mean-token-mean"
    )
    warmed = parse(
        {
            "optim": {
                "lr_warmup_steps": None,
                "lr_warmup_steps_ratio": 0.1,
                "total_training_steps": 50,
            }
        }
    )
    assert warmed.settings()["optim"]["lr_warmup_steps"] == 5
    with pytest.raises(ServiceError) as caught:
        parse({"optm": None})
    assert caught.value.details["nearest"] == "actor.optim"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"loss_func_type": "NX_20250515"}, {"policy_loss": "ppo", "clip_ratio_c": None}),
        (
            {"loss_func_type": "NX_20250515", "clip_ratio_c": 3.0},
            {"policy_loss": "ppo", "clip_ratio_c": None},
        ),
        (
            {"loss_func_type": "NX_20241031", "clip_ratio_c": 3.0},
            {"policy_loss": "ppo", "clip_ratio_c": None},
        ),
        (
            {"policy_loss": "NX_20241031", "clip_ratio_c": 3.0},
            {"policy_loss": "ppo", "clip_ratio_c": None},
        ),
        ({"loss_func_type": "NX_20250515_v2"}, {"policy_loss": "ppo", "clip_ratio_c": 3.0}),
        (
            {"loss_func_type": "NX_20250515_v2", "clip_ratio_c": 5.0},
            {"policy_loss": "ppo", "clip_ratio_c": 5.0},
        ),
        (
            {"loss_func_type": "NX_20241031", "clip_ratio": 0.1},
            {"policy_loss": "ppo", "clip_ratio": 0.1},
        ),
        ({"loss_func_type": "importance_sampling"}, {"policy_loss": "importance_sampling"}),
        ({"policy_loss": "gspo"}, {"loss_agg_mode": "seq-mean-token-mean", "clip_ratio_low": None}),
        (
            {"policy_loss": "gspo", "clip_ratio": 0.2},
            {"clip_ratio_low": None, "clip_ratio_high": None},
        ),
        (
            {"policy_loss": "gspo", "clip_ratio": 0.01},
            {"clip_ratio_low": 0.01, "clip_ratio_high": 0.01},
        ),
        (
            {
                "policy_loss": "gspo",
                "clip_ratio": 0.1,
                "clip_ratio_low": None,
                "clip_ratio_high": None,
            },
            {"clip_ratio_low": 0.1, "clip_ratio_high": 0.1},
        ),
        (
            {
                "policy_loss": "gspo",
                "clip_ratio": 0.1,
                "clip_ratio_low": 0.05,
                "clip_ratio_high": None,
            },
            {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1},
        ),
    ],
)
def test_names_of_existing_configurations_mean_ours(
    given: dict[str, Any], meant: dict[str, Any]
) -> None:
    settings = parse(given).settings()

    assert {name: settings[name] for name in meant} == meant
    ranks = ActorConfig.model_validate(settings)
    assert effective(ranks) == settings  # what the ranks read is what was checked


def test_no_number_of_steps_may_be_written_as_zero() -> None:
    """NexRL 1.x's own default of `total_training_steps`: what it says is that nobody knows."""
    assert parse({"optim": {"total_training_steps": 0}}).settings() == parse({}).settings()


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"loss_func_type": "NX_20990101"}, "actor.loss_func_type"),
        (
            {"loss_func_type": "NX_20241031", "clip_ratio": 0.2, "clip_ratio_high": 0.3},
            "actor.clip_ratio_high",
        ),
        (
            {"loss_func_type": "NX_20241031", "loss_agg_mode": "seq-mean-token-sum"},
            "actor.loss_agg_mode",
        ),
        ({"loss_func_type": "NX_20250515", "policy_loss": "cispo"}, "actor.loss_func_type"),
    ],
)
def test_a_name_whose_meaning_cannot_be_had_is_refused(given: dict[str, Any], key: str) -> None:
    with pytest.raises(ServiceError, match=given["loss_func_type"]) as caught:
        parse(given)

    assert caught.value.details["key"] == key


def test_offloading_that_is_not_asked_for_is_no_error() -> None:
    """Recipes spell out false; it changes nothing and is not reported as ignored."""
    config = parse({"fsdp_config": {"param_offload": False, "fsdp_size": -1}})

    assert config.ignored == ("actor.fsdp_config.fsdp_size",)


@pytest.mark.parametrize("role", ["actor", "critic", "ref", "teacher", "reward"])
def test_code_of_a_models_own_is_never_trusted_in_silence(role: str) -> None:
    """Asked for, it is refused with the reason whatever the role; false is what every group
    does."""
    for asked in (True, "true", 1):
        with pytest.raises(ServiceError, match="not run by this service") as caught:
            parse_config(
                {"role": role, "actor": {"model": {"path": "/m", "trust_remote_code": asked}}}
            )
        assert (caught.value.code, caught.value.details["key"]) == (
            "INVALID_CONFIG",
            "actor.model.trust_remote_code",
        )
    assert parse({"model": {"path": "/m", "trust_remote_code": False}}).ignored == ()


def test_a_configuration_may_be_nested_as_deep_as_it_likes() -> None:
    """A key without effect can hold anything; a variable is found in it all the same."""
    deep: Any = "${HOME}"
    for _ in range(5000):
        deep = {"a": deep}

    with pytest.raises(ServiceError, match="interpolation"):
        parse({"debug": deep})


def test_known_keys_without_effect_are_accepted_and_listed() -> None:
    config = parse(
        {
            "ulysses_sequence_parallel_size": 2,
            "model": {"path": "/m", "use_liger": True},
            "checkpoint_manager": "dcp",
        }
    )

    assert sorted(config.ignored) == [
        "actor.checkpoint_manager",
        "actor.model.use_liger",
        "actor.ulysses_sequence_parallel_size",
    ]


def test_names_of_the_field_mean_the_same_configuration() -> None:
    ours = parse(
        {
            "policy_loss": "importance_sampling",
            "fsdp_config": {"mixed_precision": {"param_dtype": "bfloat16"}},
        }
    )
    theirs = parse(
        {
            "loss_func_type": "importance_sampling",
            "fsdp_config": {"mixed_precision": {"param_dtype": "bf16"}},
        }
    )

    assert ours.settings() == theirs.settings()


def test_two_configurations_are_compared_by_their_effective_keys() -> None:
    one, other = (
        parse({"optim": {"lr": 1e-6}}).settings(),
        parse({"optim": {"lr": 2e-6}, "debug": {"x": 1}}).settings(),
    )

    assert differing_keys(one, other) == ["optim.lr"]
