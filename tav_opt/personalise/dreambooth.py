"""DreamBooth: a word for a subject, and the pictures of its class that keep the model from forgetting the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tav_opt import ddim, models, plots, tuning_loop, tuning_state, video
from tav_opt.base.directory import Base
from tav_opt.base.image_model import ImageModel
from tav_opt.config import BaseConfig, InputError, PathLike, PersonaliseConfig, check_text, texts
from tav_opt.ddim import Schedule
from tav_opt.device import dtype_on, usable_device
from tav_opt.files import check_place, read_object, write_json
from tav_opt.personalise import pictures, written
from tav_opt.tuning_step import Training, begin_with, compute_dtype, denoising_loss, optimise, seeded_draw
from tav_opt.video import contact_sheet

TARGETS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"]}
"""The layers that a LoRA is of: those of attention, as diffusers' own scripts have them."""
ClassPrompt = str | Sequence[str] | None
"""One, or several that are drawn in turn; None: there is no class."""
OnStep = Callable[[str, int, int, float | None], object]
"""Called with the stage, the steps done, the steps of the stage, and the last loss."""


def check(config: PersonaliseConfig, prompt: str, class_prompt: ClassPrompt) -> None:
    """Raises InputError for settings that no run can follow, naming the value."""
    tuning_loop.check(config, prompt, "the pictures show, with a word of its own: a photo of sks creature")
    prompts = _several(class_prompt)
    for one in prompts:
        check_text("class prompt", one)
        if not one.strip() or one.strip() == prompt.strip():
            raise InputError(f"class prompt {one!r} should be the prompt without the word of its own")
        if prompts.count(one) > 1:
            raise InputError(f"class prompt {one!r} is given twice")
    _check_used(config, prompts)
    if config.lora_rank:
        try:
            import peft  # noqa: F401
        except ImportError:
            raise InputError(f"lora rank {config.lora_rank} needs peft: pip install 'tav-opt[lora]'") from None


def _several(class_prompt: ClassPrompt) -> tuple[str, ...]:
    return () if class_prompt is None else texts("class prompt", class_prompt)


def _check_used(config: PersonaliseConfig, class_prompts: Sequence[str]) -> None:
    """Raises InputError for a setting of pictures that are not drawn."""
    if class_prompts and config.class_images < len(class_prompts):
        raise InputError(
            f"class images {config.class_images} are fewer than the {len(class_prompts)} class prompts: each is drawn"
        )
    unused = [] if class_prompts else ["class_images", "prior_weight"]
    if not class_prompts and not config.preview_every:
        unused += ["draw_steps", "draw_guidance"]
    for name in unused:
        if (value := getattr(config, name)) != getattr(PersonaliseConfig, name):
            previews = " or preview_every" if name.startswith("draw") else ""
            raise InputError(f"{name.replace('_', ' ')} {value} has no effect: it needs a class prompt{previews}")


def check_out(out: Path) -> None:
    """Raises InputError where no run can write: a place without rights, or a finished run that cannot go on."""
    check_place(out / tuning_state.STATE)
    if (out / written.DESCRIPTION).is_file() and not (out / tuning_state.STATE).exists():
        raise InputError(
            f"{out} holds a personalised model: choose another --out (it could go on to more --steps only with "
            f"--keep-state)"
        )


def personalise(
    model: PathLike | BaseConfig,
    images: PathLike,
    prompt: str,
    config: PersonaliseConfig,
    out: PathLike,
    *,
    class_prompt: ClassPrompt = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    on_step: OnStep | None = None,
) -> Path:
    """Teaches a Stable Diffusion the subject of a folder of pictures, and writes it to `out`: the model, or a LoRA.

    `prompt` is what the pictures show, with a word of its own; with `class_prompt`, the same without that word, the
    model also learns from pictures that it drew of the class before (prior preservation, the paper's equation 2): of
    several such prompts each is drawn in its turn, so that more than one place is preserved. What is written is a
    diffusers directory, or the folder of a LoRA, as `tune` takes them. Stopping, going on and previews are as in
    tuning. Raises InputError for bad settings, models or pictures, and for a folder with other contents.
    """
    out, images = Path(out), Path(images).expanduser()
    check(config, prompt, class_prompt)
    check_out(out)
    with tuning_loop.running(out):
        base, place = Base.at(model), usable_device(device)
        learned, dtype = pictures.read(images, base.native_size), dtype_on(place, dtype)
        settings = _settings(base, learned, prompt, _several(class_prompt), config, place, dtype)
        tuning_loop.check_state(out, settings, config)
        image = _loaded(base, place, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # of a LoRA's first half
            run = _Run.begun(base, image, learned, settings, config, out, on_step or (lambda *_: None))
        told = written.DESCRIPTION
        ended = read_object(out / told)["settings"]["steps"] if (out / told).is_file() else None
        if not tuning_loop.resume(run.training, out, run.settings, config, ended):
            run.train()
            run.finish()
        if not config.keep_state:
            tuning_state.remove(out)
    return out


def _loaded(base: Base, place: torch.device, dtype: torch.dtype) -> ImageModel:
    image = ImageModel.load(base)
    if image.unet is None:
        raise InputError(f"model {base.path} was tuned on a clip by the reference: it draws no pictures")
    for part in (image.unet, image.vae, image.text_encoder):
        models.placed(part, place, dtype)
    return image


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run: the parts, and all that is encoded once."""

    base: Base
    image: ImageModel
    schedule: Schedule
    config: PersonaliseConfig
    out: Path
    on_step: OnStep
    settings: dict[str, Any]
    training: Training
    prompts: tuple[str, ...]
    """The prompt; then those of the class."""
    latents: tuple[Tensor, ...]
    """(n, c, h, w) of the subject's pictures, then of the class's."""
    text: Tensor | None
    """(prompts, tokens, width); None where the text encoder trains."""

    @classmethod
    def begun(
        cls,
        base: Base,
        image: ImageModel,
        learned: Any,
        settings: dict[str, Any],
        config: PersonaliseConfig,
        out: Path,
        on_step: OnStep,
    ) -> _Run:
        """Encodes the pictures, draws those of the class, and makes trainable what shall train."""
        schedule = Schedule.from_config(base.configs["scheduler"])
        schedule.timesteps(config.draw_steps)  # too many are refused now
        latents = [pictures.encode(image, learned)]
        class_prompts = _several(settings["class_prompt"])
        prompts = (settings["prompt"], *class_prompts)
        pictures.embed(image, (*prompts, *config.preview_prompts))  # one that is too long is refused now
        if class_prompts:
            report: Any = lambda done, count: on_step("class pictures", done, count, None)  # noqa: E731
            drawn = pictures.of_class(image, base, schedule, class_prompts, config, out / "class_images", report)
            latents.append(pictures.encode(image, drawn))
            settings = settings | {"class_pictures": hashlib.sha256(drawn.tobytes()).hexdigest()}
        with torch.no_grad():
            text = None if config.text_encoder else pictures.embed(image, prompts).float()
        return cls(
            base=base,
            image=image,
            schedule=schedule,
            config=config,
            out=out,
            on_step=on_step,
            settings=settings,
            training=_begun(image, base, config),
            prompts=prompts,
            latents=tuple(latents),
            text=text,
        )

    def train(self) -> None:
        """The remaining steps."""
        tuning_loop.train(
            self.training,
            self.config,
            self.out,
            self.settings,
            lambda: optimise(self.training, self.config, self.loss),
            lambda step, loss: self.on_step("personalise", step, self.config.steps, loss),
            self.preview,
        )

    def loss(self, micro: int) -> Tensor:
        """Of the subject's pictures whose turn it is, and as many of the class, weighted (the paper's equation 2)."""
        config, step = self.config, self.training.step
        text = pictures.embed(self.image, self.prompts) if self.text is None else self.text
        total = torch.zeros((), device=text.device)
        for kind, (weight, latents) in enumerate(zip((1.0, config.prior_weight), self.latents, strict=False)):
            at = (step * config.accumulation + micro) * config.batch
            numbers = [(at + offset) % len(latents) for offset in range(config.batch)]
            chosen = latents[numbers]
            noise, timesteps = seeded_draw(config.seed + kind, chosen, self.schedule)(step, micro)
            of_each = text[[1 + number % (len(text) - 1) for number in numbers] if kind else [0] * config.batch]
            total = total + weight * denoising_loss(self._predict, chosen, of_each, self.schedule, noise, timesteps)
        return total

    def _predict(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        unet = self.image.unet
        assert unet is not None
        return unet(noisy.to(unet.dtype), timesteps, text.to(unet.dtype)).sample

    def preview(self, step: int, interrupted: tuning_loop.Stop) -> None:
        """What the model would draw now, as `previews/step-….png`."""

        def go_on(_: object) -> None:
            if interrupted():
                raise ddim.Stopped

        prompts, side = self.config.preview_prompts, self.latents[0].shape[-1]
        drawn = pictures.draw(self.image, self.schedule, prompts, side, self.config, on_step=go_on)
        page = contact_sheet.contact_sheet([picture[None] for picture in drawn], list(prompts))
        video.write_png(self.out / "previews" / f"step-{step:05}.png", page)

    def finish(self) -> None:
        """Writes the model or LoRA, the description last."""
        (self.out / written.DESCRIPTION).unlink(missing_ok=True)  # of a run with fewer steps
        plots.save_losses(self.training.losses, self.out)
        if self.config.lora_rank:
            for name, half in self.training.halves.items():
                half.data = self.training.trained[name].data  # what is written is float32
            written.lora(self.image, self.config.text_encoder, self.out)
        else:
            written.model(self.base, self.training.trained, self.out)
        write_json(self.out / written.DESCRIPTION, {"prompts": self.prompts, "settings": self.settings})


def _begun(image: ImageModel, base: Base, config: PersonaliseConfig) -> Training:
    """Makes trainable what shall train, in the dtype that the networks are to compute in.

    The masters of a base's own weights start as it has them, not as the halves are that it was made to.
    """
    assert image.unet is not None
    dtype = compute_dtype(image.unet, config)
    both = nn.ModuleList([image.unet, image.text_encoder])
    training = begin_with(_trained(image, config), both, dtype, config)
    if training.halves and not config.lora_rank:
        exact = ImageModel.load(base).parameters()
        for name, master in training.trained.items():
            master.data.copy_(exact[name])
        training.spread()
    return training


def _trained(image: ImageModel, config: PersonaliseConfig) -> dict[str, nn.Parameter]:
    """What trains, by name: all weights, or the LoRAs that are put beside them."""
    parts: dict[str, Any] = {"unet": image.unet} | ({"text_encoder": image.text_encoder} if config.text_encoder else {})
    for name, part in parts.items():
        if config.lora_rank:
            _add_lora(part, TARGETS[name], config.lora_rank)
        if config.gradient_checkpointing:
            part.enable_gradient_checkpointing() if name == "unet" else part.gradient_checkpointing_enable()
            part.train()
    return {
        f"{name}.{inner}": parameter
        for name, part in parts.items()
        for inner, parameter in part.named_parameters()
        if not config.lora_rank or "lora_" in inner
    }


def _add_lora(part: Any, targets: list[str], rank: int) -> None:
    from peft import LoraConfig

    part.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))


def _settings(
    base: Base,
    learned: Any,
    prompt: str,
    class_prompts: Sequence[str],
    config: PersonaliseConfig,
    place: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """All that the resulting weights depend on but the class's pictures: a stopped run goes on only under the same."""
    return {
        "base": base.hash,
        "images": hashlib.sha256(learned.tobytes()).hexdigest(),
        "prompt": prompt,
        "class_prompt": pictures.one_or_all(class_prompts),
        **{name: value for name, value in asdict(config).items() if name not in tuning_loop.PASSING},
        "gradient_checkpointing": bool(config.gradient_checkpointing),
        "device": place.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
