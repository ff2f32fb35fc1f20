"""The source beside its edit: a row of the batch whose attention the edit takes, at the noise of the same step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tav_opt.ddim import Known, Predict, Schedule, Solver, Timestep, clean_and_noise, noised

LOOK_FIRST = 0.2
"""The share of the steps in which it settles where an edit changes its source, and nothing is blended yet."""
LOOKS = 0.3
"""Of the most that a word looks, or an edit changes, anywhere: what counts (Prompt-to-Prompt's threshold)."""
BlendBy = Literal["words", "changes"]
"""Where an edit may change its source: where the blend words look (Prompt-to-Prompt's local blend), or where what the
network predicts for the two prompts differs (DiffEdit, Couairon et al. 2022, arXiv 2210.11427)."""


class Source(Protocol):
    """The source's latents (1, c, f, h, w) at the steps of sampling, which are numbered from 0."""

    def noisy(self, number: int) -> Tensor:
        """At a step's noisy end."""

    def clean_end(self, number: int) -> Tensor:
        """At its clean end, once it is answered."""

    def answered(self, number: int, predicted: Tensor) -> None:
        """Told of what the network predicts of it, once a step."""


@dataclass(frozen=True)
class Kept:
    """A source that is put back on the trajectory of its inversion at every step, whatever the network predicts.

    Direct inversion (Ju et al. 2023, arXiv 2310.01506), whose kept differences lead to just that.
    """

    trajectory: Tensor
    """(steps + 1, c, f, h, w): the source, and where each step of its inversion led."""

    def noisy(self, number: int) -> Tensor:
        return self.trajectory[len(self.trajectory) - 1 - number, None]

    def clean_end(self, number: int) -> Tensor:
        return self.noisy(number + 1)

    def answered(self, number: int, predicted: Tensor) -> None:
        pass


class Sampled:
    """A source that is sampled from its inverted latents (1, c, f, h, w), as Prompt-to-Prompt does."""

    def __init__(self, start: Tensor, schedule: Schedule, steps: int) -> None:
        self._latents, self._schedule = start, schedule
        self._timesteps, self._steps = schedule.timesteps(steps), steps

    def noisy(self, number: int) -> Tensor:
        return self._latents

    def clean_end(self, number: int) -> Tensor:
        return self._latents

    def answered(self, number: int, predicted: Tensor) -> None:
        alpha = self._schedule.alpha(self._timesteps[number])
        clean, noise = clean_and_noise(self._latents, predicted, alpha, self._schedule.prediction_type)
        self._latents = noised(clean, noise, self._schedule.alpha_before(self._timesteps[number], self._steps))


@dataclass(frozen=True, kw_only=True)
class Words:
    """What the words of one edit take of the source's, and where they may change it."""

    source_text: Tensor
    """(1, tokens, width)."""
    token_map: Tensor
    """(tokens, tokens), from the source's to the edit's."""
    weights: Tensor
    """(tokens,), of the edit's."""
    source_blend: Tensor
    """(tokens,): 1 at the source's words that may change, 0 elsewhere."""
    edit_blend: Tensor
    """(tokens,): the same of the edit's."""
    same: bool = False
    """The edit's are the source's own, and none has a weight: guidance alone tells the two apart."""


class Beside:
    """`predict` of one edit, its source in the batch while something is taken from it; asked once a step.

    The rows are the source's, then those asked for, of which the last is the edit's own: without guidance it is alone.
    """

    def __init__(
        self,
        predict: Predict,
        source: Source,
        words: Words,
        schedule: Schedule,
        steps: int,
        *,
        replace_cross: float,
        replace_self: float,
        blend: BlendBy | None,
    ) -> None:
        self._predict, self._source, self._words, self._steps = predict, source, words, steps
        self._schedule, self._timesteps = schedule, schedule.timesteps(steps)
        self._cross, self._self, self._blend = replace_cross * steps, replace_self * steps, blend
        self._done = 0
        self._looks: Tensor | None = None

    def __call__(self, latents: Tensor, timestep: Timestep, text: Tensor) -> Tensor:
        number, self._done = self._done, self._done + 1
        cross, within = number < self._cross, number < self._self
        if not (cross or within or self._blend):
            return self._alone(latents, timestep, text)
        told = self._told(text, cross=cross, within=within)
        source = self._source.noisy(number)
        answer = self._predict(torch.cat([source.to(latents), latents]), timestep, told)
        predicted, looks = answer[:, :-1], answer[:, -1:]
        self._source.answered(number, predicted[:1])
        if self._blend:
            if self._blend == "words":
                found = torch.cat([looks[:1], looks[-1:]])
            elif self._words.same:
                found = torch.zeros_like(looks[:1])
            else:
                found = self._changed(number, source.to(latents), latents, predicted)
            self._looks = found if self._looks is None else self._looks + found
        return predicted[1:]

    def _changed(self, number: int, source: Tensor, latents: Tensor, predicted: Tensor) -> Tensor:
        """How far apart the clean latents are that the network predicts of source and edit, of a step (1,1,f,h,w)."""
        alpha, kind = self._schedule.alpha(self._timesteps[number]), self._schedule.prediction_type
        before, _ = clean_and_noise(source, predicted[:1], alpha, kind)
        after, _ = clean_and_noise(latents[-1:], predicted[-1:], alpha, kind)
        return (after - before).float().norm(dim=1, keepdim=True)

    def _alone(self, latents: Tensor, timestep: Timestep, text: Tensor) -> Tensor:
        """Without the source; where no word has a weight, as if there were no control."""
        if (self._words.weights == 1).all():
            return self._predict(latents, timestep, text)
        rows, tokens = text.shape[:2]
        own = torch.zeros(rows, dtype=torch.int64, device=text.device)
        weights = torch.ones(rows, tokens, device=text.device)
        weights[-1] = self._words.weights
        nothing = weights.new_zeros(rows, tokens)
        told = {"text": text, "self_source": own, "cross_source": own, "word_weights": weights}
        told |= {"token_map": nothing.new_zeros(rows, tokens, tokens), "blend_words": nothing}
        return self._predict(latents, timestep, told)[:, :-1]

    def _told(self, text: Tensor, *, cross: bool, within: bool) -> dict[str, Tensor]:
        """What `predict` is told of all rows; text (rows, tokens, width) is of those below the source's."""
        words, rows, tokens = self._words, len(text) + 1, text.shape[1]
        above = torch.zeros(rows, dtype=torch.int64)
        above[-1] = rows - 1
        mapped, blend = torch.zeros(rows, tokens, tokens), torch.zeros(rows, tokens)
        weights = torch.ones(rows, tokens)
        blend[0], blend[-1], weights[-1] = words.source_blend, words.edit_blend, words.weights
        if cross:
            mapped[-1] = words.token_map * words.weights
            weights[-1] = words.weights * (words.token_map.sum(0) == 0)
        told = {
            "self_source": above * within,
            "cross_source": above * cross,
            "token_map": mapped,
            "word_weights": weights,
            "blend_words": blend,
        }
        both = torch.cat([words.source_text.to(text), text])
        return {"text": both, **{name: tensor.to(text.device) for name, tensor in told.items()}}

    def solver(self, step: Solver | None) -> Solver | None:
        """A step, DDIM's own unless given, after which the source stands where the edit may not change it."""
        return self._blended(step or (lambda known, after: noised(known.clean, known.noise, after)))

    def _blended(self, step: Solver) -> Solver:
        def blended(known: Known, after: float) -> Tensor:
            latents = step(known, after)
            if self._looks is None or self._done <= LOOK_FIRST * self._steps:
                return latents
            source = self._source.clean_end(self._done - 1).to(latents)
            return torch.where(where_to_change(self._looks), latents, source)

        return blended


def where_to_change(looks: Tensor) -> Tensor:
    """Maps (maps, 1, f, h, w) → bool (1, 1, f, h, w): where one of them is LOOKS of its own most, or more.

    As Prompt-to-Prompt's local blend, the largest of 3 × 3 neighbours; smoothed over frames, by 1 2 1, for videos.
    """
    maps = F.max_pool3d(looks.float(), (1, 3, 3), stride=1, padding=(0, 1, 1))
    if looks.shape[2] > 1:
        padded = F.pad(maps, (0, 0, 0, 0, 1, 1), mode="replicate")
        maps = (padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]) / 4
    most = maps.amax((2, 3, 4), keepdim=True)
    return ((maps >= LOOKS * most) & (most > 0)).any(0, keepdim=True)
