"""Which models can be tuned: Stable Diffusion 1.x and 2.x, told by names of files and configurations alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tav_opt.config import InputError
from tav_opt.files import DESCRIPTION, read_object

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHED = PARTS[:3]
"""Parts that have weights."""
SINGLE_FILES = (".safetensors", ".ckpt")
OTHER_FILES = (".pt", ".pth", ".bin", ".gguf")
"""Of weights, which are no single-file checkpoints that can be read."""

_WANTED = "Stable Diffusion 1.x and 2.x are what can be tuned"
_OTHERS = {
    "transformer": "its denoiser is a transformer (Stable Diffusion 3, Flux and their like)",
    "text_encoder_2": "it has two text encoders (Stable Diffusion XL)",
}
_CONDITIONED = {9: "is for inpainting", 8: "edits by instruction (InstructPix2Pix)", 5: "takes depth", 7: "upscales"}
"""What UNets of so many input channels are, where a latent has four."""
_SETTINGS = {
    "class_embed_type": None,
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
    "encoder_hid_dim": None,
    "num_class_embeds": None,
    "time_cond_proj_dim": None,
    "resnet_time_scale_shift": "default",
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "attention_type": "default",
}
"""Settings that put more than text and time into the UNet, and what they are in Stable Diffusion 1.x and 2.x."""
_BLOCKS = {
    "down_block_types": {"CrossAttnDownBlock2D", "DownBlock2D"},
    "up_block_types": {"CrossAttnUpBlock2D", "UpBlock2D"},
}


def check(path: Path, vae: Path | None = None) -> dict[str, dict[str, Any]]:
    """The configurations by part; raises InputError unless it is such a model and its parts belong together.

    `vae`: the folder of one that takes the place of the model's own.
    """
    found = (*path.glob("*"), *path.glob("*/*"))
    check_parts({file.relative_to(path).as_posix() for file in found}, path)
    return check_configs(path, vae)


def check_parts(names: Collection[str], model: str | Path) -> None:
    """Raises InputError unless files of these names, relative to the model, are of all the parts it needs."""
    top = {name.split("/")[0] for name in names}
    for name, kind in _OTHERS.items():
        if name in top:
            raise InputError(f"model {model} holds {name}/: {kind}; {_WANTED}")
    for part in PARTS:
        if part not in top:
            raise InputError(
                f"model {model} lacks {part}/: a Stable Diffusion directory has {', '.join(PARTS)}{_hint(names, part)}"
            )


def _hint(names: Collection[str], part: str) -> str:
    """What the directory seems to be instead."""
    top = {name.split("/")[0] for name in names}
    if other := next((name for name in top if name.casefold() == part), None):
        return f"; rename {other}/"
    if inside := next((name.split("/")[0] for name in names if part in name.split("/")[1:2]), None):
        return f"; {inside}/ in it looks like one"
    if DESCRIPTION in top:
        return "; this is the checkpoint of a tuned clip: give the model that it was tuned on"
    if "config.json" in top:
        return "; this is one part alone: give the folder that holds all of them"
    if single := next((name for name in sorted(top) if name.endswith(SINGLE_FILES)), None):
        return f"; {single} in it seems to be a single-file checkpoint: give the file itself"
    return ""


def check_configs(path: Path, other_vae: Path | None = None) -> dict[str, dict[str, Any]]:
    """The configurations by part; raises InputError when they are of another kind of model, or of several models."""
    folders = {part: path / part for part in WEIGHED} | ({} if other_vae is None else {"vae": other_vae})
    configs = {part: read_object(folder / "config.json") for part, folder in folders.items()}
    configs["scheduler"] = read_object(path / "scheduler" / "scheduler_config.json")
    unet, vae, text = (configs[part] for part in WEIGHED)
    check_unet(unet, path / "unet" / "config.json")
    _check_vae(vae, folders["vae"] / "config.json")
    kind = text.get("model_type", "clip_text_model")
    if kind not in ("clip_text_model", "clip"):
        raise InputError(f"{path / 'text_encoder'}: model_type = {kind!r} is no CLIP text encoder; {_WANTED}")
    latents, channels = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if latents != channels:
        raise InputError(
            f"{path}: UNet and VAE do not belong together: in_channels = {channels!r}, latent_channels = {latents!r}"
        )
    width, needed = text_config(text).get("hidden_size", 512), unet.get("cross_attention_dim", 1280)
    if any(each != width for each in (needed if isinstance(needed, list) else [needed])):
        raise InputError(
            f"{path}: UNet and text encoder do not belong together: cross_attention_dim = {needed!r}, "
            f"hidden_size = {width!r}"
        )
    return configs


def check_unet(config: Mapping[str, Any], where: str | Path) -> None:
    """Raises InputError, naming the setting, for the configuration of a UNet that is not of the SD 1.x/2.x kind."""
    name = config.get("_class_name", "UNet2DConditionModel")
    video = name == "UNet3DConditionModel" and "flip_sin_to_cos" not in config  # diffusers', not the reference's
    if video or name not in ("UNet2DConditionModel", "UNet3DConditionModel", "VideoUNet"):
        raise InputError(
            f"{where}: {name} is {'a text-to-video model' if video else 'another kind of UNet'}; {_WANTED}"
        )
    channels, out = config.get("in_channels", 4), config.get("out_channels", 4)
    if channels != out:
        kind = _CONDITIONED.get(channels, "takes or gives more than latents") if out == 4 else "gives more than noise"
        raise InputError(f"{where}: in_channels = {channels!r}, out_channels = {out!r}: this UNet {kind}; {_WANTED}")
    for setting, supported in _SETTINGS.items():
        if (value := config.get(setting)) not in (supported, None):
            raise InputError(
                f"{where}: {setting} = {value!r} is not supported (Stable Diffusion 1.x and 2.x have {supported!r})"
            )
    for setting, known in _BLOCKS.items():
        if others := [block for block in config.get(setting, ()) if str(block).replace("3D", "2D") not in known]:
            raise InputError(f"{where}: {setting} has {others[0]!r}; {_WANTED}, and have {' and '.join(sorted(known))}")
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if str(middle).replace("3D", "2D") != "UNetMidBlock2DCrossAttn":
        raise InputError(f"{where}: mid_block_type = {middle!r} is not supported; {_WANTED}")
    for setting in ("norm_num_groups", "cross_attention_dim"):
        if config.get(setting, 1) is None:
            raise InputError(f"{where}: {setting} = None is not supported")


def _check_vae(config: Mapping[str, Any], where: Path) -> None:
    name = config.get("_class_name", "AutoencoderKL")
    if name != "AutoencoderKL":
        raise InputError(f"{where}: {name} is another kind of VAE: an AutoencoderKL is needed")
    for setting in ("in_channels", "out_channels"):
        if config.get(setting, 3) != 3:
            raise InputError(f"{where}: {setting} = {config[setting]!r}: this VAE is of more or less than RGB pictures")
    for setting in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(setting) is not None:
            raise InputError(f"{where}: {setting} = {config[setting]!r} is not supported; {_WANTED}, and have none")
    factor = config.get("scaling_factor", 1)
    if not isinstance(factor, int | float) or not factor > 0:
        raise InputError(f"{where}: scaling_factor = {factor!r} is not a positive number")


def is_reference_unet(config: Mapping[str, Any]) -> bool:
    """Whether a UNet's configuration is of one that the reference implementation saved."""
    return config.get("_class_name") == "UNet3DConditionModel"


def image_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the image UNet that the reference inflated: block names say 2D, not 3D."""

    def flat(value: Any) -> Any:
        if isinstance(value, list):
            return [flat(item) for item in value]
        return value.replace("3D", "2D") if isinstance(value, str) else value

    return {key: flat(value) for key, value in config.items()}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The text encoder's part of its configuration, which may be that of a whole CLIP model."""
    nested = config.get("text_config")
    return nested if config.get("model_type") == "clip" and isinstance(nested, dict) else config
