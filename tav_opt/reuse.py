"""Feature reuse (DeepCache, Ma et al. 2023, arXiv 2312.00858): what comes to the UNet's outermost layers from below
changes little from step to step, so that it is computed now and then, and kept in between."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tav_opt.ddim import Guided, Predict, Text, Timestep

FEATURES = "features"
"""What `predict` is told beside `text` where the outermost layers alone shall run: what came to them at some step."""

WithFeatures = Callable[[Tensor, Timestep, Tensor], tuple[Tensor, Tensor]]
"""As `predict`, for text (b,tokens,width) → noise or v, and the features (b,f,c',h,w)."""


class Reused:
    """`predict` of one run of so many steps, of which the first fifth and then each k-th one run the whole network.

    A step may make several calls, those of its windows, each with features of its own. A guided step's features of the
    text's half serve a step that asks for that half alone; where those of the other are missing, all is computed.
    """

    def __init__(self, predict: Predict, with_features: WithFeatures, interval: int, steps: int) -> None:
        self._predict, self._with_features = predict, with_features
        self._interval, self._early = interval, Guided.EARLY * steps
        self._number, self._rows, self._call = -1, 0, 0
        self._kept: dict[int, tuple[int, Tensor]] = {}

    def stepwise(self, predict: Predict) -> Predict:
        """A `predict` of whole steps that is made of calls of this one."""

        def step(latents: Tensor, timestep: Timestep, text: Text) -> Tensor:
            self._number, self._rows, self._call = self._number + 1, len(latents), 0
            return predict(latents, timestep, text)

        return step

    def __call__(self, latents: Tensor, timestep: Timestep, text: Text) -> Tensor:
        assert isinstance(text, Tensor), "nothing else is told beside the text: editing refuses it"
        call, self._call = self._call, self._call + 1
        kept = self._of(call)
        if kept is not None:
            return self._predict(latents, timestep, {"text": text, FEATURES: kept})
        noise, features = self._with_features(latents, timestep, text)
        self._kept[call] = self._rows, features
        return noise

    def _of(self, call: int) -> Tensor | None:
        """Features for all rows of a call; None where the whole network is to run."""
        if self._number < self._early or self._number % self._interval == 0 or call not in self._kept:
            return None
        rows, features = self._kept[call]
        if rows == self._rows:
            return features
        if rows < self._rows:
            return None
        # The windows of a call stand one behind the other, each with the rows of its step, the text's last.
        return features.unflatten(0, (-1, rows))[:, -self._rows :].flatten(0, 1)
