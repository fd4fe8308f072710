"""Accuracies of answers by question type, and what seeing nothing can reach."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence


def chance(facts: Sequence[tuple[str, str, int | None]]) -> list[tuple[str, float]]:
    """Returns the score that seeing nothing can reach, per question type.

    That is always giving the commonest answer, or guessing among those that the questions name.

    Args:
        facts: type, answer and named answers of each question.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    guesses: dict[str, list[float]] = defaultdict(list)
    for kind, right, named in facts:
        answers[kind][right] += 1
        guesses[kind].append(1 / named if named else 0.0)
    return [
        (kind, max(max(counts.values()) / counts.total(), statistics.fmean(guesses[kind])))
        for kind, counts in answers.items()
    ]


def scores(right: Sequence[tuple[str, float]], simple: Sequence[str], prefix: str) -> dict[str, float]:
    """Returns the mean per type, and the average of the simple types' means."""
    by_type: dict[str, list[float]] = defaultdict(list)
    for kind, value in right:
        by_type[kind].append(value)
    means = {kind: sum(values) / len(values) for kind, values in sorted(by_type.items())}
    known = [means[kind] for kind in simple if kind in means]
    overall = {f"{prefix}/simple": sum(known) / len(known)} if known else {}
    return {f"{prefix}/{kind}": mean for kind, mean in means.items()} | overall
