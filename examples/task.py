"""What the demo's policies learn: prompts with a checkable answer, some of them never trained
on."""

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
    """The largest or smallest of some digits, "max 3 7 5 =" or "min 3 7 5 =": the answer depends on
    the operation and on every digit.

    A fifth of all combinations of digits is held out, in every order and for both operations, so a
    policy that only memorised its training prompts scores no better than a guess. The best constant
    answer is right in one case of seven with three digits.
    """

    words = ("max", "min", "=", *map(str, range(10)))

    def __init__(self, digits: int = 3) -> None:
        sets = list(combinations_with_replacement(range(10), digits))
        random.Random(0).shuffle(sets)
        cut = len(sets) // 5
        self.held_out = [prompt for chosen in sets[:cut] for prompt in self._prompts(chosen)]
        self.train = [prompt for chosen in sets[cut:] for prompt in self._prompts(chosen)]

    @staticmethod
    def _prompts(chosen: tuple[int, ...]) -> list[Prompt]:
        orders = sorted(set(permutations(chosen)))
        return [
            Prompt(f"{name} {' '.join(map(str, order))} =", str(pick(chosen)))
            for name, pick in (("max", max), ("min", min))
            for order in orders
        ]

    def reward(self, prompt: Prompt, answer: str) -> float:
        """1.0 for exactly the right digit and nothing after it, else 0.0."""
        return float(answer.strip() == prompt.answer)


class CountingLanguage:
    """Sentences that count in circles, "up 3 by 2 =" 5 7 9 1 3 5, now and then with a slip: what a
    teacher can be sure of, and what not.

    A sentence goes on from its last digit, a slip too, so its best model gives the right digit 0.91
    and each other one 0.01. A quarter of the beginnings is held out.
    """

    words = ("up", "down", "by", "=", *map(str, range(10)))
    length = 6
    slip = 0.1

    def __init__(self) -> None:
        beginnings = [
            (word, start, by) for word in ("up", "down") for start in range(10) for by in (1, 2)
        ]
        random.Random(0).shuffle(beginnings)
        self.held_out, self.train = beginnings[:10], beginnings[10:]

    @staticmethod
    def prompt(beginning: tuple[str, int, int]) -> str:
        """What stands before the digits."""
        word, start, by = beginning
        return f"{word} {start} by {by} ="

    def sentence(self, beginning: tuple[str, int, int], draw: random.Random) -> str:
        """One way to go on, drawn at random."""
        word, digit, by = beginning
        digits = []
        for _ in range(self.length):
            right = (digit + (by if word == "up" else -by)) % 10
            digit = draw.randrange(10) if draw.random() < self.slip else right
            digits.append(str(digit))
        return " ".join(digits)


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
        """Half for the right word, half for a sentence of at most eight words; silence earns
        nothing."""
        words = re.findall(r"\w+", answer.lower())
        right = prompt.answer.lower() in words
        brief = 0 < len(words) <= self.few_words
        return 0.5 * right + 0.5 * brief
