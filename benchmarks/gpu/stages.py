"""The table of the GPU run: each stage with its limit in seconds and its goals, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass

BUDGET_SECONDS = 560
"""What the limits of the stages of one call may add up to: machines are lent for ten minutes a command."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a figure of a row should be: at most, or at least, so much."""

    row: str
    figure: str
    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        return f"≤ {self.at_most:g}" if self.at_most is not None else f"≥ {self.at_least:g}"

    def met(self, value: float) -> bool:
        """False for NaN too."""
        return value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0.0)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the run, in a process of its own."""

    name: str
    where: str
    """`module:function`, which takes a `report.Report`."""
    seconds: int
    """Its limit: then it is ended with all that it started."""
    says: str
    goals: tuple[Goal, ...] = ()
    interpreted: bool = False
    """A dry run of it launches the kernels in Triton's interpreter; the others take the naive twins."""


def _attention_goals() -> tuple[Goal, ...]:
    """At f = 24, b = 2 in fp16: Stable Diffusion 1.5 at 512²."""
    at_4096 = (("× concatenation + flash", 1.5), ("× concatenation + cuDNN", 1.15))
    goals = [Goal(row="f 24, n 4096: ours", figure=figure, at_least=least) for figure, least in at_4096]
    goals += [Goal(row=f"f 24, n {n}: ours", figure="× the best peer", at_least=1.5) for n in (1024, 256)]
    return tuple(goals)


STAGES = (
    Stage(
        name="smoke",
        where="smoke:smoke",
        seconds=90,
        says="the device, versions, and one launch of each kernel, forward and backward, against float64",
        interpreted=True,
    ),
    Stage(
        name="tests",
        where="kernel_tests:kernel_tests",
        seconds=300,
        says="the tests that need a GPU: kernels, compiled programs, TensorRT where it is",
    ),
    Stage(
        name="sanitizer",
        where="sanitizer:sanitizer",
        seconds=170,
        says="compute-sanitizer over one launch of each kernel, forward and backward: memory, races in shared memory",
        interpreted=True,
    ),
    Stage(
        name="attention",
        where="attention:attention",
        seconds=240,
        says="attention's forward against every peer that one could call",
        goals=_attention_goals(),
    ),
    Stage(
        name="tiles",
        where="tile_search:tile_search",
        seconds=300,
        says="every tile of the sparse-causal kernel, compiled and checked in a process of its own, then timed",
        interpreted=True,
    ),
    Stage(
        name="backward",
        where="backward:backward",
        seconds=200,
        says="the gradients of sparse-causal attention by our kernels, and by two calls of PyTorch's flash backward",
        interpreted=True,
    ),
    Stage(
        name="autotune",
        where="backward:autotune",
        seconds=540,
        says="every tile of the forward's and the backward's kernels → tiles.json beside the results, to be committed",
        interpreted=True,
    ),
    Stage(
        name="groupnorm",
        where="norms:norms",
        seconds=240,
        says="group norms over clips with SiLU, forward and backward, against PyTorch's on transposed copies",
    ),
    Stage(
        name="step",
        where="editing_speed:guided_step",
        seconds=320,
        says="a guided step of Stable Diffusion 1.5, 24 frames of 512² in fp16, and its peers",
        goals=(Goal(row="the best of ours", figure="ms", at_most=110),),
    ),
    Stage(
        name="edit",
        where="editing_speed:whole_edit",
        seconds=400,
        says="whole edits of 24 frames of 512² in fp16 from the kept inversion, by each preset",
        goals=(
            Goal(row="exact: the best of ours", figure="seconds", at_most=6),
            Goal(row="fast: the best of ours", figure="seconds", at_most=2.5),
        ),
    ),
    Stage(
        name="tuning",
        where="tuning_speed:tuning_speed",
        seconds=540,
        says="steps of tuning on 24 frames of 512², then 500 of them by the best way, or what they would take",
        goals=(Goal(row="the best of ours", figure="seconds for 500 steps", at_most=150),),
    ),
    Stage(
        name="repeat",
        where="tuning_speed:repeat",
        seconds=160,
        says="30 steps of tuning twice, in processes of their own, compared bit for bit",
        goals=(Goal(row="as tuning does it", figure="losses or weights that differ", at_most=0),),
    ),
    Stage(
        name="demo-vae",
        where="demo_training:vae",
        seconds=540,
        says="the VAE of the demo's model of 128×128, seven minutes more at each call",
        goals=(Goal(row="vae", figure="PSNR dB", at_least=28.4),),
    ),
    Stage(
        name="demo-pictures",
        where="demo_training:pictures",
        seconds=540,
        says="that model's pictures from text, seven minutes more at each call → demo128.zip beside the results",
        goals=(
            Goal(row="pictures of held-out prompts", figure="right subject %", at_least=94),
            Goal(row="pictures of held-out prompts", figure="right place %", at_least=95.6),
            Goal(row="the model", figure="MB", at_most=40),
        ),
    ),
)
