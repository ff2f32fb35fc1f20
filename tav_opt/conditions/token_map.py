"""Which token of a source's prompt stands for which of an edit's, and what is said of single words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tav_opt.base.textual_inversion import spelt_out
from tav_opt.config import InputError, Within

WEIGHT = Within(0, 100)
"""Of a word."""


@dataclass(frozen=True)
class Word:
    """A word of a prompt, in lower case, and the positions of its tokens."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt as its tokenizer splits it."""

    text: str
    words: tuple[Word, ...]
    tokens: int
    """As many as the text encoder takes."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str, tokens: int) -> Prompt:
        """Of a text that is within the tokenizer's length."""
        spelt = spelt_out(tokenizer, text)
        encoded = tokenizer.encode(spelt)
        numbered = [(word, position) for position, word in enumerate(encoded.word_ids) if word is not None]
        words = []
        for _, found in groupby(numbered, key=lambda pair: pair[0]):
            positions = tuple(position for _, position in found)
            first, last = encoded.offsets[positions[0]], encoded.offsets[positions[-1]]
            words.append(Word(spelt[first[0] : last[1]].strip().lower(), positions))
        return cls(text, tuple(words), tokens)

    @property
    def end(self) -> int:
        """Where the words end, and the token of the end stands."""
        return self.words[-1].tokens[-1] + 1 if self.words else 1

    def named(self, name: str) -> Word | None:
        """The word so named, `name#2` being the second of its kind; None where there is none.

        Raises InputError where several are meant, with the choices.
        """
        word, _, number = name.strip().lower().partition("#")
        found = [one for one in self.words if one.text == word]
        if number.isdecimal() and 0 < int(number) <= len(found):
            return found[int(number) - 1]
        if number or not found:
            return None
        if len(found) > 1:
            choices = ", ".join(f"{word}#{number}" for number in range(1, len(found) + 1))
            raise InputError(f"word {word!r} stands {len(found)} times in {self.text!r}: say which, {choices}")
        return found[0]

    def marked(self, words: Sequence[Word]) -> Tensor:
        """(tokens,): 1 at the tokens of words, 0 elsewhere."""
        marks = torch.zeros(self.tokens)
        marks[[position for word in words for position in word.tokens]] = 1
        return marks


def token_map(source: Prompt, edit: Prompt) -> Tensor:
    """How much of each of the source's tokens goes to each of the edit's (tokens, tokens).

    Words that both have, and the tokens of begin and end, are handed on one to one (Prompt-to-Prompt's refinement);
    words that stand for others share the probability of those (its replacement). What was added takes nothing.
    """
    found = torch.zeros(source.tokens, edit.tokens)
    found[0, 0] = 1
    tail = min(source.tokens - source.end, edit.tokens - edit.end)
    for offset in range(tail):
        found[source.end + offset, edit.end + offset] = 1
    for before, after in _aligned(source, edit):
        pairs = zip(before, after, strict=True) if len(before) == len(after) else [(before, after)]
        for old, new in pairs:
            _hand_on(found, _positions(old), _positions(new))
    return found


def _hand_on(found: Tensor, old: Sequence[int], new: Sequence[int]) -> None:
    if len(old) == len(new):
        found[list(old), list(new)] = 1
        return
    for position in new:
        found[list(old), position] = 1 / len(new)


def _positions(words: Word | Sequence[Word]) -> tuple[int, ...]:
    return words.tokens if isinstance(words, Word) else tuple(token for word in words for token in word.tokens)


def _aligned(source: Prompt, edit: Prompt) -> list[tuple[tuple[Word, ...], tuple[Word, ...]]]:
    """The two prompts in parts, the source's words and the edit's: the same, or some in the place of others."""
    before, after = ([word.text for word in prompt.words] for prompt in (source, edit))
    found = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return [(source.words[a:b], edit.words[c:d]) for _, a, b, c, d in found]


def blend_words(source: Prompt, edit: Prompt, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The named words of the source's prompt and of the edit's: twice (tokens,), 1 at their tokens.

    Raises InputError where neither prompt has any of them, or a name means several.
    """
    before, after = ([found for name in names if (found := prompt.named(name))] for prompt in (source, edit))
    if names and not before and not after:
        given = ", ".join(names)
        raise InputError(f"blend words {given}: neither {source.text!r} nor {edit.text!r} has one of them")
    return source.marked(before), edit.marked(after)


def check_names(names: Sequence[str], prompts: Sequence[Prompt], what: str) -> None:
    """Raises InputError for a name that is no word of any of the prompts, and for one that is several of one's."""
    for name in names:
        if not any(prompt.named(name) for prompt in prompts):
            words = ", ".join(dict.fromkeys(word.text for prompt in prompts for word in prompt.words))
            raise InputError(f"{what} {name!r} is no word of the prompts; there are {words}")


def weight_of(given: str) -> tuple[str, float]:
    """`word:2.5` → the word and its weight; raises InputError for anything else."""
    word, _, number = given.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = float("nan")
    if not word.strip() or weight not in WEIGHT:
        raise InputError(f"word weight {given!r} is not WORD:WEIGHT, its weight within {WEIGHT}")
    return word, weight


def word_weights(edit: Prompt, given: Sequence[str]) -> Tensor:
    """(tokens,): what the probability of each token is multiplied by, 1 unless given as `word:weight`."""
    weights = torch.ones(edit.tokens)
    for word, weight in map(weight_of, given):
        if found := edit.named(word):
            weights[list(found.tokens)] = weight
    return weights
