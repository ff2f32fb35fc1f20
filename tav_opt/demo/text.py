"""The demo's words: a byte-level BPE in CLIP's format that knows the world's captions, and a small CLIP text tower."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTokenizer

from tav_opt.demo.places import PLACES
from tav_opt.demo.world import STYLES

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 24
"""Tokens of a prompt; CLIP's 77 would mostly pad."""
WIDTH = 128


def words(subjects: Iterable[str]) -> list[str]:
    """Every word that captions are made of."""
    phrases = [*subjects, *(p for ps in PLACES.values() for p in ps), *(s for ss in STYLES.values() for s in ss)]
    return sorted({word.strip(",").lower() for phrase in [*phrases, "a", "an", "the"] for word in phrase.split()})


def new_tokenizer(subjects: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer in which each of the world's words is one token, and any other text is spelled in bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(words(subjects), alphabet)
    entries = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        names[0].write_text(json.dumps(vocabulary))
        names[1].write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
        kept = {"model_max_length": TOKENS, "pad_token": END, "unk_token": END}
        return CLIPTokenizer.from_pretrained(folder, **kept)  # nosec B615  # a folder of ours


def _merges(known: list[str], alphabet: list[str]) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=20_000,
        min_frequency=1,
        # Last letters numbered in advance: the trainer meets them in no fixed order, and settles ties by number.
        special_tokens=[letter + "</w>" for letter in alphabet],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(known, trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def text_config(tokenizer: CLIPTokenizer, *, layers: int = 2) -> CLIPTextConfig:
    """The text tower's configuration for a tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
