"""Textual inversions: words of one's own, of one vector or several (Gal et al. 2022, arXiv 2208.01618)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from tav_opt.base import weights
from tav_opt.config import InputError, first_line
from tav_opt.files import sha256

_UNNAMED = "emb_params"
"""What web UIs call the vectors in a safetensors file, whose name is the word."""


@dataclass(frozen=True)
class Embedding:
    """A file of vectors, and the word that stands for them."""

    file: Path
    token: str

    @classmethod
    def of(cls, text: str) -> Embedding:
        """`FILE[:token]`; raises InputError for what is none, and where neither says the token."""
        name, token = text, ""
        if not Path(text).expanduser().exists() and ":" in text:
            name, _, token = text.rpartition(":")
            if not token:
                raise InputError(f"embedding {text!r}: no token stands behind the colon")
        file = Path(name).expanduser()
        if not file.is_file():
            raise InputError(f"embedding {name} does not exist, or is no file")
        token = token or _read(file)[0]
        if not token or token != "".join(token.split()):
            raise InputError(f"embedding {file}: token {token!r} is not one word: give another, {file.name}:<word>")
        return cls(file, token)

    def __str__(self) -> str:
        return f"{self.file.resolve()}:{self.token}"

    @property
    def identity(self) -> str:
        """Another for every other content or token."""
        return f"embedding {sha256(self.file)} {self.token}"


def _read(file: Path) -> tuple[str, Tensor]:
    """The token and vectors (n, width) of a file of diffusers or of web UIs; raises InputError for another one."""
    found = weights.load_any(file)
    match found:
        case {"clip_l": _, "clip_g": _}:
            raise InputError(f"embedding {file} is for Stable Diffusion XL (clip_l, clip_g)")
        case {"string_to_param": {"*": Tensor() as vectors}}:
            token = str(found.get("name") or "")
        case dict() if len(found) == 1 and isinstance(one := next(iter(found.values())), Tensor):
            token, vectors = str(next(iter(found))), one
        case _:
            names = ", ".join(map(str, list(found)[:3])) if isinstance(found, dict) else type(found).__name__
            raise InputError(f"embedding {file} is no textual inversion: it holds {names}, not the vectors of one word")
    if token == _UNNAMED:
        token = file.stem
    if vectors.ndim not in (1, 2) or not vectors.is_floating_point() or not vectors.numel():
        raise InputError(f"embedding {file} is no textual inversion: {token} is {tuple(vectors.shape)}, not (n, width)")
    weights.check_finite({token: vectors}, file)
    return token, vectors.detach().float().reshape(-1, vectors.shape[-1])


def add(pipeline: Any, embeddings: tuple[Embedding, ...]) -> None:
    """Puts the words into the tokenizer and text encoder of a diffusers pipeline.

    Raises InputError for vectors of another width, and for a token that the tokenizer has already.
    """
    for embedding in embeddings:
        vectors, token = _read(embedding.file)[1], embedding.token
        width = pipeline.text_encoder.get_input_embeddings().weight.shape[-1]
        if vectors.shape[-1] != width:
            raise InputError(
                f"embedding {embedding.file} has vectors of width {vectors.shape[-1]}: this text encoder's have {width}"
            )
        known = {one.lower() for one in pipeline.tokenizer.get_vocab()}
        for one in (token, *(f"{token}_{number}" for number in range(1, len(vectors)))):
            if {one.lower(), f"{one.lower()}</w>"} & known:
                other = f"{embedding.file.name}:<{token.strip('<>')}-1>"
                raise InputError(f"embedding {embedding.file}: token {one!r} exists already: choose another, {other}")
        try:
            pipeline.load_textual_inversion({token: vectors})
        except (ValueError, RuntimeError) as error:
            raise InputError(f"embedding {embedding.file} does not fit this model: {first_line(error)}") from None


def spelt_out(tokenizer: Tokenizer, prompt: str) -> str:
    """The prompt with every vector of a word named: `<cat>` of three is `<cat> <cat>_1 <cat>_2`.

    As diffusers' `maybe_convert_prompt`, for servers that do without diffusers, and in capitals too.
    """
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if not any(f"{token}_1" in added for token in added):
        return prompt
    found = tokenizer.encode(prompt, add_special_tokens=False)
    for token, (start, end) in reversed([*zip(found.tokens, found.offsets, strict=True)]):
        if token in added and f"{token}_1" in added:
            names = [token, *takewhile(added.__contains__, (f"{token}_{number}" for number in count(1)))]
            prompt = prompt[:start] + " ".join(names) + prompt[end:]
    return prompt
