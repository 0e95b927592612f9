"""The trainer's own copy of the policy: it answers prompts, and takes the service's weights after
every step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Rollout:
    """Answers to prompts. Shapes: `tensors` as `update_actor` takes them, B rows, S = P + R
    columns."""

    tensors: dict[str, torch.Tensor]
    texts: list[str]

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int(self.tensors["attention_mask"].sum())


class LocalPolicy:
    """A Hugging Face causal LM in this process, for sampling only."""

    def __init__(self, folder: Path, max_new_tokens: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.max_new_tokens = max_new_tokens

    def refresh(self, sync_folder: Path) -> None:
        """Take the weights that the service published last."""
        version = (
            sync_folder.resolve()
        )  # a link to one version: resolve it once, and every file is of that version
        state: dict[str, torch.Tensor] = {}
        for file in sorted(version.glob("*.safetensors")):
            state |= load_file(file)
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        if unexpected or set(missing) - tied:
            raise ValueError(
                f"{version} holds another model: missing {missing}, unexpected {unexpected}"
            )

    @torch.no_grad()
    def answer(self, prompts: Sequence[str], samples: int = 1, greedy: bool = False) -> Rollout:
        """Answer every prompt `samples` times in a row, at temperature 1 or greedily. B =
        len(prompts) * samples."""
        inputs = self._encode(prompts)
        sampling = (
            {"do_sample": False}
            if greedy
            else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        )
        ids = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            num_return_sequences=samples,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling,
        )
        width = inputs["input_ids"].shape[1]
        prompt_mask = inputs["attention_mask"].repeat_interleave(samples, dim=0)
        return self._rollout(ids[:, :width], prompt_mask, ids[:, width:])

    def demonstrate(self, prompts: Sequence[str], answers: Sequence[str]) -> Rollout:
        """The same tensors for given answers, each followed by the end token: what supervised steps
        train on."""
        inputs = self._encode(prompts)
        ended = [answer + self.tokenizer.eos_token for answer in answers]
        options = {"return_tensors": "pt", "padding": True, "add_special_tokens": False}
        responses = self.tokenizer(ended, padding_side="right", **options)
        return self._rollout(inputs["input_ids"], inputs["attention_mask"], responses["input_ids"])

    def _encode(self, prompts: Sequence[str]) -> Any:
        texts: Any = list(prompts)
        if self.tokenizer.chat_template:
            chats = [[{"role": "user", "content": text}] for text in texts]
            texts = self.tokenizer.apply_chat_template(
                chats, tokenize=False, add_generation_prompt=True
            )
        return self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)

    def _rollout(
        self, prompts: torch.Tensor, prompt_mask: torch.Tensor, responses: torch.Tensor
    ) -> Rollout:
        is_end = (responses == self.tokenizer.eos_token_id).long()
        response_mask = (
            is_end.cumsum(dim=1) - is_end == 0
        ).long()  # up to the first end token, which counts
        mask = torch.cat([prompt_mask, response_mask], dim=1)
        tensors = {
            "input_ids": torch.cat([prompts, responses], dim=1),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
            "responses": responses.contiguous(),
            "loss_mask": torch.cat([torch.zeros_like(prompt_mask), response_mask], dim=1),
        }
        return Rollout(tensors, self.tokenizer.batch_decode(responses, skip_special_tokens=True))
