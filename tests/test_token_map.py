"""Words matched to tokens, and tokens to tokens, against maps written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import tav_opt
from tav_opt.conditions import token_map as maps
from tav_opt.conditions.token_map import Prompt
from tav_opt.config import InputError

TOKENIZER = Tokenizer.from_file(str(Path(tav_opt.__file__).parent / "demo" / "model" / "tokenizer" / "tokenizer.json"))
TOKENS = 24
SOURCE = "a leopard on the beach"


def prompt(text: str) -> Prompt:
    return Prompt.of(TOKENIZER, text, TOKENS)


def hands_on(edit: str) -> dict[int, dict[int, float]]:
    """What each of the edit's tokens takes of which of the source's."""
    found = maps.token_map(prompt(SOURCE), prompt(edit))
    taken: dict[int, dict[int, float]] = {}
    for i, j in found.nonzero().tolist():
        taken.setdefault(j, {})[i] = float(found[i, j])
    return taken


def one_to_one(pairs: dict[int, int]) -> dict[int, dict[int, float]]:
    return {j: {i: 1.0} for j, i in pairs.items()}


def test_words_have_the_tokens_that_spell_them():
    found = prompt("An Owl, in hippopotamuskin  at NIGHT")
    assert [word.text for word in found.words] == ["an", "owl", ",", "in", "hippopotamuskin", "at", "night"]
    positions = [token for word in found.words for token in word.tokens]
    assert positions == list(range(1, found.end)) and len(found.words[4].tokens) > 1


def test_the_same_prompt_is_the_identity():
    assert torch.equal(maps.token_map(prompt(SOURCE), prompt(SOURCE)), torch.eye(TOKENS))


def test_a_word_for_a_word_is_replaced_and_the_rest_handed_on():
    assert hands_on("a tiger on the beach") == one_to_one({token: token for token in range(TOKENS)})


def test_what_was_added_takes_nothing_and_what_follows_moves():
    """`, pencil sketch` are tokens 6, 7 and 8; the end was token 6 and is 9, and after it the padding."""
    pairs = {token: token for token in range(6)} | {token: token - 3 for token in range(9, TOKENS)}
    assert hands_on(f"{SOURCE}, pencil sketch") == one_to_one(pairs)


def test_what_was_left_out_is_handed_on_to_nothing():
    """Without `on the beach`, tokens 3 to 5; the padding that the source lacks takes nothing."""
    pairs = {token: token for token in range(3)} | {token: token + 3 for token in range(3, TOKENS - 3)}
    assert hands_on("a leopard") == one_to_one(pairs)


def test_several_words_share_what_one_had():
    """Prompt-to-Prompt's replacement: each of n tokens takes an n-th."""
    found = hands_on("a black and white cow on the beach")
    assert [found[token] for token in range(2, 6)] == [{2: 0.25}] * 4
    assert found[6] == {3: 1.0}


def test_one_word_takes_what_all_tokens_of_another_had():
    found = maps.token_map(prompt("a hippopotamuskin on the beach"), prompt("a cat on the beach"))
    several = prompt("a hippopotamuskin on the beach").words[1].tokens
    assert found[:, 2].nonzero().flatten().tolist() == list(several)


def test_named_words_are_marked_in_both_prompts():
    before, after = maps.blend_words(prompt(SOURCE), prompt("a tiger on the beach"), ("beach", "Tiger"))
    assert (before.nonzero().flatten().tolist(), after.nonzero().flatten().tolist()) == ([5], [2, 5])
    before, after = maps.blend_words(prompt(SOURCE), prompt("a tiger on the beach"), ())
    assert not before.any() and not after.any()


@pytest.mark.parametrize(
    ("edit", "names", "words"),
    [
        ("a dog on the beach", ("cat",), "blend words cat: neither"),
        ("a dog and a dog", ("dog",), r"stands 2 times in 'a dog and a dog': say which, dog#1, dog#2"),
    ],
)
def test_what_is_absent_or_ambiguous_is_named(edit, names, words):
    with pytest.raises(InputError, match=words):
        maps.blend_words(prompt(SOURCE), prompt(edit), names)


def test_a_number_says_which():
    edit = prompt("a dog and a dog")
    assert [edit.named(f"dog#{number}").tokens for number in (1, 2)] == [(2,), (5,)]
    assert edit.named("dog#3") is edit.named("dog#0") is edit.named("cat") is None


def test_weights_are_of_all_tokens_of_their_words():
    edit = prompt("a hippopotamuskin in the snow")
    found = maps.word_weights(edit, ("snow:3", "hippopotamuskin:0.5", "leopard:9"))
    several = list(edit.words[1].tokens)
    assert found[several].tolist() == [0.5] * len(several) and found[edit.words[-1].tokens[0]] == 3
    assert found.sum() == TOKENS - len(several) - 1 + 3 + 0.5 * len(several)


@pytest.mark.parametrize("given", ["snow", "snow:", ":3", "snow:x", "snow:nan", "snow:-1", "snow:101", ""])
def test_a_weight_that_is_none_is_named(given):
    with pytest.raises(InputError, match="WORD:WEIGHT"):
        maps.weight_of(given)


def test_a_name_of_no_word_is_refused_with_those_that_there_are():
    with pytest.raises(
        InputError, match="'lion' is no word of the prompts; there are a, leopard, on, the, beach, tiger"
    ):
        maps.check_names(["lion"], [prompt(SOURCE), prompt("a tiger")], "blend word")
