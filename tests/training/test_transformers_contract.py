"""What transformers_parts.py takes for granted of transformers beyond its documented interface, and
that nobody else does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from nexrl_worker.training import transformers_parts as parts
from nexrl_worker.training.errors import InvalidValue
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    T5Config,
)

from tests.helpers.engines import SMALL

PRIVATE = re.compile(
    r"_model_mapping|\._from_config|_attn_implementation|_no_split_modules|_keys_to_ignore|"
    r"_tied_weights_keys|_weight_conversions|core_model_loading|conversion_mapping import|"
    r"transformers\.integrations"
)


@pytest.fixture(scope="module")
def hf() -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True)).eval()


def test_nobody_else_knows_the_private_parts() -> None:
    folder = Path(parts.__file__).parents[1]
    files = [path for path in folder.rglob("*.py") if path.name != "transformers_parts.py"]
    assert [path.name for path in files if PRIVATE.search(path.read_text())] == []


def test_an_auto_class_knows_a_class_for_a_configuration_or_none() -> None:
    assert parts.class_of(AutoModelForCausalLM, Qwen2Config()) is Qwen2ForCausalLM
    assert parts.class_of(AutoModelForCausalLM, T5Config()) is None
    rewards = parts.class_of(AutoModelForSequenceClassification, BertConfig())
    assert rewards is not None and rewards.__name__ == "BertForSequenceClassification"


def test_a_class_makes_a_model_in_a_dtype() -> None:
    made = parts.from_class(Qwen2ForCausalLM, Qwen2Config(**SMALL), dtype=torch.bfloat16)
    assert {param.dtype for param in made.parameters()} == {torch.bfloat16}


def test_a_family_names_its_blocks(hf: Any) -> None:
    assert parts.unsplittable(hf) == {"Qwen2DecoderLayer"}
    assert parts.unsplittable(nn.Linear(1, 1)) == set()


def test_attention_is_exchanged_by_name_or_refused(hf: Any) -> None:
    """The function gets what a layer hands down, and answers [1,T,A,D]."""
    seen: list[Any] = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        seen.append(more["mark"])
        return torch.zeros_like(query).transpose(1, 2), None

    before = parts.attention_of(hf)
    parts.register_attention("nexrl_test", attend)
    parts.use_attention(hf, "nexrl_test")
    hf(input_ids=torch.ones(1, 3).long(), mark="handed down")
    parts.use_attention(hf, before)
    assert parts.attention_of(hf) == before and seen == ["handed down"] * 2
    bloom = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(InvalidValue, match="exchanged"):
        parts.use_attention(bloom, "nexrl_test")


def test_ties_are_known_by_name(hf: Any) -> None:
    assert parts.tied_keys(hf) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" in parts.tied_keys_of(Qwen2ForCausalLM)
    assert parts.tied_keys_of(None) == {}
    assert parts.ignored_if_missing(hf) == [] and parts.ignored_if_unexpected(hf) == []


def test_what_a_load_converted_an_export_undoes() -> None:
    """The experts of a layer are one tensor in the model and many in its folder."""
    made = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    config = Qwen2MoeConfig(**SMALL, **made, shared_expert_intermediate_size=8)
    model = AutoModelForCausalLM.from_config(config)
    mapping = parts.get_model_conversion_mapping(model)
    assert any(isinstance(one, parts.WeightConverter) for one in mapping)
    parts.set_conversions(model, mapping)
    assert parts.conversions_of(model) == mapping
    experts = {
        name: value for name, value in model.state_dict().items() if "layers.0.mlp.experts." in name
    }
    written = parts.revert_weight_conversion(model, experts)
    assert "model.layers.0.mlp.experts.1.down_proj.weight" in written


def test_a_class_without_an_output_head_has_nothing_tied() -> None:
    def build(self: Any, config: Any) -> None:
        Qwen2ForCausalLM.__init__(self, config)
        del self.lm_head

    family = parts.untied("Headless", Qwen2ForCausalLM, build)
    model = parts.from_class(family, Qwen2Config(**SMALL, tie_word_embeddings=True))
    assert parts.tied_keys(model) == {} and family.__module__ == Qwen2ForCausalLM.__module__
