"""The pony's prompts: a small grammar, and the text tokens the model reads.

    a <large|medium|small> <colour> ball bounces <once|twice|three times> [on the left|in the middle|on the right]

Text tokens carry no position (coordinates of style ``v2`` do not rotate them), so a token is a whole word: its letters
as one-hot vectors side by side. A word then means the same wherever it stands, as it does in this grammar.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import torch

from happyhorse_fast import ambient

SIZES = ("large", "medium", "small")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
COUNTS = ("once", "twice", "three times")
PLACES = ("on the left", "in the middle", "on the right")

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
WORD_LETTERS = 8
"""Letters of a word that are read; the grammar's longest word has 7."""
TEXT_TOKENS = 10
"""Words of the longest prompt; shorter ones are padded with zeros."""
TEXT_CHANNELS = WORD_LETTERS * len(ALPHABET)


class Prompt(NamedTuple):
    """Content of a prompt.

    Attributes:
        size: One of :data:`SIZES`.
        colour: One of :data:`COLOURS`.
        count: Number of bounces, 1 to 3.
        place: One of :data:`PLACES`, or None where the prompt leaves it open.
    """

    size: str
    colour: str
    count: int  # type: ignore[assignment]  # hides tuple.count, of no use on a prompt
    place: str | None = None

    def __str__(self) -> str:
        text = f"a {self.size} {self.colour} ball bounces {COUNTS[self.count - 1]}"
        return text if self.place is None else f"{text} {self.place}"


def all_prompts() -> list[Prompt]:
    """List every prompt of the grammar, in a fixed order."""
    combinations = itertools.product(SIZES, COLOURS, range(1, len(COUNTS) + 1), (None, *PLACES))
    return [Prompt(*combination) for combination in combinations]


HELD_OUT = 64
"""Number of prompts that the pony never saw."""


def held_out_prompts() -> list[Prompt]:
    """Choose the 64 of the 216 prompts that are never trained on; the same on every machine."""
    return random.Random(20).sample(all_prompts(), HELD_OUT)


_BY_TEXT = {str(prompt): prompt for prompt in all_prompts()}


def parse(text: str) -> Prompt:
    """Parse a prompt, whatever its case and spacing.

    Raises:
        ValueError: Not in the grammar; the message gives it.
    """
    found = _BY_TEXT.get(" ".join(text.lower().split()))
    if found is None:
        raise ValueError(
            f"prompt must read 'a <{'|'.join(SIZES)}> <{'|'.join(COLOURS)}> ball bounces <{'|'.join(COUNTS)}>' with "
            f"one of <{'|'.join(PLACES)}> after it or nothing, as in 'a large red ball bounces twice'; got {text!r}"
        )
    return found


@ambient.independent
def encode_text(text: str) -> torch.Tensor:
    """[1, TEXT_TOKENS, TEXT_CHANNELS] float32: per word its letters as one-hot vectors, zeros after the last.

    Raises:
        ValueError: More words than :data:`TEXT_TOKENS`, a longer word than :data:`WORD_LETTERS`, or another character.
    """
    words = text.lower().split()
    if not 1 <= len(words) <= TEXT_TOKENS:
        raise ValueError(f"prompt must have 1 to {TEXT_TOKENS} words, got {len(words)} in {text!r}")
    tokens = torch.zeros(1, TEXT_TOKENS, WORD_LETTERS, len(ALPHABET))
    for i, word in enumerate(words):
        if len(word) > WORD_LETTERS or not set(word) <= set(ALPHABET):
            raise ValueError(f"words of a prompt must have at most {WORD_LETTERS} letters of a-z, got {word!r}")
        for j, letter in enumerate(word):
            tokens[0, i, j, ALPHABET.index(letter)] = 1.0
    return tokens.flatten(2)
