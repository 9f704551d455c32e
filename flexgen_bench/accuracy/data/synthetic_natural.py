"""HELM's ``synthetic_reasoning_natural``: rules in plain English, a fact, and what follows from it."""

from __future__ import annotations

import random

from flexgen_bench.accuracy.data.rows import Row, Rows
from flexgen_bench.accuracy.data.synthetic import generated

_PEOPLE = ("Alice", "Bob", "Carol", "Dan", "Erin", "Frank")
_ANIMALS = ("the dog", "the cat", "the cow", "the bear", "the lion", "the mouse")
_ATTRIBUTES = (
    "young",
    "small",
    "big",
    "quiet",
    "rough",
    "kind",
    "round",
    "cold",
    "hot",
    "red",
    "blue",
    "green",
    "sad",
    "rich",
    "smart",
    "weak",
    "strong",
    "tall",
)


def reasoning(*, difficulty: str, items: int, examples: int, seed: int) -> Rows:
    """``easy``: one rule applies once. ``hard``: rules apply to what others have given, and not all of them apply.

    Follows the published description (Liang et al. 2022): five rules "If X is a and b, then X is c", of one or two
    conditions, one fact of one subject, and every new attribute of it asked for. answer: what follows, in order, as one
    sentence.
    """
    hard = difficulty == "hard"
    return generated(lambda c: _one(c, hard), items=items, examples=examples, seed=seed)


def _one(chance: random.Random, hard: bool) -> Row:
    while True:
        subject = chance.choice([*_PEOPLE, *_ANIMALS])
        rules = [_rule(chance) for _ in range(5)]
        known = sorted(chance.sample(_ATTRIBUTES, 3 if hard else 2), key=lambda _: chance.random())
        derived = follow(rules, known)
        if len(derived) == 1 and not hard:
            break
        if hard and 2 <= len(derived) <= 4 and _one_step(rules, known) < len(derived):
            break
    rule_lines = "\n".join(
        f"If {subject} is {' and '.join(conditions)}, then {subject} is {result}." for conditions, result in rules
    )
    return {
        "question": f"Rules:\n{rule_lines}\nFact:\n{_capital(subject)} is {_listed(known)}.\n"
        f"The following can be determined about {subject}:",
        "answer": f"{_capital(subject)} is {_listed(derived)}.",
    }


def follow(rules: list[tuple[tuple[str, ...], str]], known: list[str]) -> list[str]:
    """Attributes that the rules give and that were not known, in the order in which they follow."""
    have, derived = set(known), []
    changed = True
    while changed:
        changed = False
        for conditions, result in rules:
            if result not in have and have.issuperset(conditions):
                have.add(result)
                derived.append(result)
                changed = True
    return derived


def _one_step(rules: list[tuple[tuple[str, ...], str]], known: list[str]) -> int:
    have = set(known)
    return len({r for conditions, r in rules if have.issuperset(conditions)} - have)


def _rule(chance: random.Random) -> tuple[tuple[str, ...], str]:
    *conditions, result = chance.sample(_ATTRIBUTES, chance.randint(2, 3))
    return tuple(conditions), result


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
