"""Whole answers to one side or the other: what a router comes to that costs the upper side what a shared way did.

The device begins every answer alone and keeps its first tokens back.  Their mean confidence is the score: the answers
that it is least sure of are made by the upper side instead, from the prompt on, until that has cost as much as the
way that is compared.  Nothing is run for it: the answers of both sides are there, prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

from nearfar.bench.collab.measure import Answer
from nearfar.bench.collab.summary import Figures, mixed, summary

LOOK = 4  # tokens of the device that the score is made of


def score(here: Answer) -> float:
    """How sure the device is of its beginning, 0..1."""
    return mean(here.confs[:LOOK])


def route(here: Sequence[Answer], there: Sequence[Answer], sent: Sequence[int]) -> list[Answer]:
    """The answers where the prompts of those numbers go to the upper side: first tokens of the device, then one side's.

    Nobody reads anything before it is decided; what the device has computed by then is time and work in vain.
    """
    answers = []
    for number, (ours, theirs) in enumerate(zip(here, there, strict=True)):
        decided_s = ours.at_s[min(LOOK, len(ours.ids)) - 1]
        if number in sent:
            at_s = [decided_s + at for at in theirs.at_s]
            device_ms = theirs.device_ms + 1000 * decided_s
            answers.append(replace(theirs, at_s=at_s, device_ms=device_ms, energy_j=None))
        else:
            answers.append(replace(ours, at_s=[max(decided_s, at) for at in ours.at_s], energy_j=None))
    return answers


def routing(
    here: Sequence[Answer],
    there: Sequence[Answer],
    like: Sequence[Answer],
    full: Sequence[Answer],
    dollars_per_hour: float | None = None,
) -> Figures:
    """What routing comes to at the upper side's cost of `like`, all of the same prompts.

    The last prompt that goes up goes there with the chance at which costs are equal.  Where `like` costs more than
    sending everything, everything is sent.
    """
    by_score = sorted(range(len(here)), key=lambda number: score(here[number]))
    left, n = sum(a.upper_ms for a in like), 0
    while n < len(by_score) and there[by_score[n]].upper_ms <= left:
        left -= there[by_score[n]].upper_ms
        n += 1

    def figures(n_sent: int) -> Figures:
        return summary(route(here, there, by_score[:n_sent]), full, full, dollars_per_hour)

    if n == len(by_score):
        return figures(n)
    return mixed(figures(n), figures(n + 1), left / there[by_score[n]].upper_ms)
