"""Small things that the speech demos stand on: digits, spelling, repeating, adding, yes and no, stop, thanks.

`SkillGenerator(seed).row(i)` is a pure function of seed and i.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from nearfar import forms
from nearfar_cloud.training import lexicon
from nearfar_cloud.training.rows import Row

THINGS = ("door", "light", "shop", "window", "meeting", "train", "store", "museum")
Exchange = list[tuple[str, str]]


def _digits(rng: random.Random) -> Exchange:
    digits = [rng.randrange(10) for _ in range(rng.randint(1, 8))]
    words = " ".join(lexicon.DIGITS[d] for d in digits)
    numbers = " ".join(map(str, digits))
    if rng.random() < 0.5:
        return [(words, numbers)]
    return [(f"{rng.choice(('read', 'say', 'spell out'))} {numbers}", words)]


def _spell(rng: random.Random) -> Exchange:
    word = rng.choice(lexicon.WORDS) if rng.random() < 0.5 else lexicon.invented_word(rng, rng.choice((2, 2, 3)))
    return [(rng.choice((f"spell {word}", f"how do you spell {word}?", f"spell the word {word}")), " ".join(word))]


def _repeat(rng: random.Random) -> Exchange:
    words = rng.sample(lexicon.WORDS, rng.randint(1, 6))
    if rng.random() < 0.3:
        words.append(lexicon.invented_name(rng))
    text = " ".join(words)
    return [(rng.choice((f"repeat after me: {text}", f"say {text}", f"repeat: {text}", f"please say {text}")), text)]


def _add(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    if a + b > 99:
        a, b = a // 2, b // 2
    x, y = (str(n) if rng.random() < 0.6 else lexicon.number_words(n, rng) for n in (a, b))
    return [(rng.choice((f"what is {x} plus {y}?", f"{x} plus {y}", f"add {x} and {y}")), f"{a + b}")]


def _yes_no(rng: random.Random) -> Exchange:
    thing, yes = rng.choice(THINGS), rng.random() < 0.5
    said = rng.choice(
        ("yes", "yes please", "sure", "ok", "yeah", "go ahead") if yes else ("no", "no thanks", "nope", "not now")
    )
    first = f"{rng.choice(('Shall I check', 'Do you want me to look at'))} the {thing}?"
    asked = rng.choice((f"what about the {thing}", f"the {thing}", f"tell me about the {thing}"))
    return [(asked, first), (said, f"All right, I will check the {thing}." if yes else "All right, I will leave it.")]


def _stop(rng: random.Random) -> Exchange:
    return [
        (
            rng.choice(("stop", "stop it", "be quiet", "cancel that", "that's enough", "stop talking", "wait, stop")),
            "Stopped.",
        )
    ]


def _short(rng: random.Random) -> Exchange:
    asked, answer = rng.choice(
        (
            (("thanks", "thank you", "thank you very much", "thanks a lot", "cheers"), "You're welcome."),
            (("hello", "hi", "hey", "good morning", "hi there", "good evening"), "Hello, how can I help?"),
            (("bye", "goodbye", "good night", "see you", "see you later"), "Goodbye."),
            (("are you there", "can you hear me", "are you listening", "hello?"), "Yes, I am here."),
            (
                ("what can you do", "help", "what are you able to do"),
                "I can switch things in this home and set timers.",
            ),
            (("never mind", "forget it", "nothing"), "All right."),
        )
    )
    return [(rng.choice(asked), answer)]


SKILLS: tuple[tuple[Callable[[random.Random], Exchange], float], ...] = (
    (_digits, 3),
    (_spell, 2),
    (_repeat, 3),
    (_add, 2),
    (_yes_no, 2),
    (_stop, 0.5),
    (_short, 1),
)


@dataclass(frozen=True)
class SkillGenerator:
    """`row(i)` for every i; the same seed and i give the same row."""

    seed: int

    def row(self, i: int) -> Row:
        """The i-th row: an exchange of one or two turns."""
        rng = random.Random(f"skills {self.seed} {i}")
        make = rng.choices([skill for skill, _ in SKILLS], [weight for _, weight in SKILLS])[0]
        turns = [forms.Turn(who, text) for pair in make(rng) for who, text in zip("ua", pair, strict=True)]
        return Row("skills", (*forms.dialogue("", turns), forms.Part(forms.END, control=True, answer=True)))
