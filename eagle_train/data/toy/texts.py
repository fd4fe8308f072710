"""Questions without a picture: sums, opposites, words to repeat, colours of things."""

from __future__ import annotations

import random

from eagle_train.data.toy.pages import WORDS

OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("day", "night"),
    ("open", "closed"),
    ("up", "down"),
    ("left", "right"),
    ("first", "last"),
    ("black", "white"),
)
COLOURS_OF_THINGS = (
    ("grass", "green"),
    ("blood", "red"),
    ("the sky", "blue"),
    ("snow", "white"),
    ("coal", "black"),
    ("the sun", "yellow"),
    ("chocolate", "brown"),
    ("an elephant", "grey"),
)


def random_text_turn(rng: random.Random) -> tuple[str, str]:
    """Returns a (question, answer) that needs no picture."""
    match rng.randrange(4):
        case 0:
            a, b = rng.randint(0, 9), rng.randint(0, 9)
            if rng.random() < 0.5:
                return f"What is {a} plus {b}?", str(a + b)
            return f"What is {a + b} minus {a}?", str(b)
        case 1:
            pair = rng.choice(OPPOSITES)
            word, opposite = pair if rng.random() < 0.5 else pair[::-1]
            return f"What is the opposite of {word}?", opposite
        case 2:
            word = rng.choice(WORDS)
            return f"Repeat the word {word}.", word
        case _:
            thing, colour = rng.choice(COLOURS_OF_THINGS)
            return f"What colour is {thing}?", colour
