"""The demo measures learning, not luck or memory."""

from __future__ import annotations

import random

import pytest
from task import CountingLanguage, MinMaxTask, Prompt, ShortAnswerTask


@pytest.mark.parametrize(
    "task", [MinMaxTask(), ShortAnswerTask()], ids=["min-max", "short answers"]
)
def test_held_out_prompts_are_never_trained_on(task: MinMaxTask | ShortAnswerTask) -> None:
    asked = {prompt.text for prompt in task.train}
    assert task.held_out
    assert asked.isdisjoint(prompt.text for prompt in task.held_out)


def test_held_out_digits_stay_held_out_in_every_order_and_for_both_operations() -> None:
    def digits(prompts: list[Prompt]) -> set[tuple[str, ...]]:
        return {tuple(sorted(prompt.text.split()[1:4])) for prompt in prompts}

    task = MinMaxTask()
    assert digits(task.train).isdisjoint(digits(task.held_out))


def test_every_answer_of_the_tiny_task_is_right() -> None:
    pick = {"max": max, "min": min}
    task = MinMaxTask()
    assert len(task.train) + len(task.held_out) == 2 * 10**3
    for prompt in task.train + task.held_out:
        operation, *digits, _ = prompt.text.split()
        assert prompt.answer == pick[operation](digits)


def test_a_constant_answer_stays_far_below_the_target() -> None:
    task = MinMaxTask()
    best = max(sum(task.reward(prompt, word) for prompt in task.held_out) for word in task.words)
    assert best / len(task.held_out) < 0.25


def test_an_answer_that_ignores_the_operation_stays_below_the_target() -> None:
    task = MinMaxTask()
    always_largest = sum(
        task.reward(prompt, max(prompt.text.split()[1:4])) for prompt in task.held_out
    )
    assert always_largest / len(task.held_out) < 0.6


def test_the_tiny_task_rewards_the_right_digit_alone() -> None:
    prompt = Prompt("max 3 7 5 =", "7")
    assert [MinMaxTask().reward(prompt, answer) for answer in ("7", " 7 ", "7 3", "3", "")] == [
        1,
        1,
        0,
        0,
        0,
    ]


def test_short_answers_earn_half_for_the_word_and_half_for_brevity() -> None:
    prompt = Prompt("What is the capital of France?", "Paris")
    ramble = "Well, the capital of that lovely country is Paris."
    answers = ("Paris.", "It is PARIS.", ramble, "Parisians know.", "")
    assert [ShortAnswerTask().reward(prompt, answer) for answer in answers] == [1, 1, 0.5, 0.5, 0]


def test_two_digits_are_a_smaller_task_of_the_same_kind() -> None:
    task = MinMaxTask(digits=2)
    assert len(task.train) + len(task.held_out) == 2 * 10**2
    assert all(len(prompt.text.split()) == 4 for prompt in task.train)


def test_sentences_go_on_from_their_last_digit_and_slip_now_and_then() -> None:
    """What the teacher is to learn: nine digits in ten are the next one, counted from the one
    before."""
    language, draw = CountingLanguage(), random.Random(0)
    assert not set(language.held_out) & set(language.train)
    right = total = 0
    for word, start, by in language.train * 20:
        last = start
        for digit in map(int, language.sentence((word, start, by), draw).split()):
            right += digit == (last + (by if word == "up" else -by)) % 10
            last, total = digit, total + 1
    assert total == 30 * 20 * language.length
    assert right / total == pytest.approx(0.91, abs=0.02)
