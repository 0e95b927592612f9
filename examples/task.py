"""What the demo's policies learn: prompts with a checkable answer, some of them never trained on."""

import random
import re
from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations
from typing import Protocol


@dataclass(frozen=True)
class Prompt:
    """One question as the user writes it and the one answer that is right."""

    text: str
    answer: str


class Task(Protocol):
    """Training prompts, held-out prompts and the rule that scores an answer between 0 and 1."""

    train: list[Prompt]
    held_out: list[Prompt]

    def reward(self, prompt: Prompt, answer: str) -> float:
        """Score one answer's text: 1.0 is perfect, 0.0 is worthless."""
        ...


class MinMaxTask:
    """The largest or smallest of three digits, "max 3 7 5 =" or "min 3 7 5 =": the answer depends on the operation and on every digit.

    A fifth of all digit triples is held out, in every order and for both operations, so a policy that only
    memorised its training prompts scores no better than a guess. The best constant answer is right in one
    case of seven.
    """

    words = ("max", "min", "=", *map(str, range(10)))

    def __init__(self) -> None:
        triples = list(combinations_with_replacement(range(10), 3))
        random.Random(0).shuffle(triples)
        cut = len(triples) // 5
        self.held_out = [prompt for triple in triples[:cut] for prompt in self._prompts(triple)]
        self.train = [prompt for triple in triples[cut:] for prompt in self._prompts(triple)]

    @staticmethod
    def _prompts(triple: tuple[int, ...]) -> list[Prompt]:
        orders = sorted(set(permutations(triple)))
        return [
            Prompt(f"{name} {a} {b} {c} =", str(pick(triple)))
            for name, pick in (("max", max), ("min", min))
            for a, b, c in orders
        ]

    def reward(self, prompt: Prompt, answer: str) -> float:
        """1.0 for exactly the right digit and nothing after it, else 0.0."""
        return float(answer.strip() == prompt.answer)


class ShortAnswerTask:
    """General knowledge for a chat model: name the right thing, and say it in a few words.

    An untrained chat model often knows the answer but rambles; every fourth question is held out.
    """

    few_words = 8
    questions = (
        ("What is the capital of France?", "Paris"),
        ("Which planet do we live on?", "Earth"),
        ("What color is the sky on a clear day?", "blue"),
        ("What do bees make?", "honey"),
        ("What is the opposite of hot?", "cold"),
        ("Which season comes after winter?", "spring"),
        ("What is frozen water called?", "ice"),
        ("Which animal barks?", "dog"),
        ("What is the capital of Japan?", "Tokyo"),
        ("What color is grass?", "green"),
        ("What do cows give us to drink?", "milk"),
        ("What is the opposite of up?", "down"),
        ("Which day comes after Monday?", "Tuesday"),
        ("What is the largest ocean on Earth?", "Pacific"),
        ("Which animal says meow?", "cat"),
        ("What is the capital of Italy?", "Rome"),
        ("What gas do we need to breathe?", "oxygen"),
        ("What is the star at the center of our solar system?", "Sun"),
        ("Which month comes after June?", "July"),
        ("What is the opposite of day?", "night"),
        ("What is the capital of Germany?", "Berlin"),
        ("What color do you get by mixing blue and yellow?", "green"),
        ("Which metal is liquid at room temperature?", "mercury"),
        ("What is the largest planet in our solar system?", "Jupiter"),
        ("What is the capital of Spain?", "Madrid"),
        ("What color is a ripe banana?", "yellow"),
        ("What is the tallest animal in the world?", "giraffe"),
        ("What is the capital of Egypt?", "Cairo"),
        ("Which meal do people eat in the morning?", "breakfast"),
        ("What is the capital of England?", "London"),
        ("What falls from the clouds when it rains?", "water"),
        ("Which language do people speak in Brazil?", "Portuguese"),
    )

    def __init__(self) -> None:
        prompts = [Prompt(question, answer) for question, answer in self.questions]
        self.held_out = prompts[::4]
        self.train = [prompt for prompt in prompts if prompt not in self.held_out]

    def reward(self, prompt: Prompt, answer: str) -> float:
        """Half for the right word, half for a sentence of at most eight words; silence earns nothing."""
        words = re.findall(r"\w+", answer.lower())
        right = prompt.answer.lower() in words
        brief = 0 < len(words) <= self.few_words
        return 0.5 * right + 0.5 * brief
