"""What people own beside a model, written as they have it: single files, LoRAs of three kinds, textual inversions.

The names are those of the original programs: CompVis's checkpoints, kohya's and PEFT's LoRAs, web UIs' embeddings.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "v_proj", "out_proj"],
}


def pipeline(base: Path) -> StableDiffusionPipeline:
    """diffusers' own reading of a directory, in which there may be no model_index.json."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(base / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(base / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(base / "unet"),
        scheduler=DDIMScheduler.from_pretrained(base / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def unet_name(name: str, layers: int, blocks: int) -> str:
    """A UNet's parameter as CompVis names it."""
    for ours, theirs in UNET.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    kind, index, part, number, rest = re.fullmatch(
        r"(down|mid|up)_blocks?\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name
    ).groups()  # type: ignore[union-attr]
    if part == "resnets":
        for ours, theirs in RESNET.items():
            rest = re.sub(rf"^{ours}\.", f"{theirs}.", rest)
    at, n = int(index or 0), int(number)
    if kind == "mid":
        return f"middle_block.{1 if part == 'attentions' else 2 * n}.{rest}"
    if kind == "down":
        if part == "downsamplers":
            return f"input_blocks.{(at + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{1 + at * (layers + 1) + n}.{int(part == 'attentions')}.{rest}"
    if part == "upsamplers":
        return f"output_blocks.{at * (layers + 1) + layers}.{1 if at == 0 else 2}.{rest}"
    return f"output_blocks.{at * (layers + 1) + n}.{int(part == 'attentions')}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    """A VAE's parameter as CompVis names it."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.attentions\.0\.", "mid.attn_1.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample.", name)
    if "attn_1" in name:
        for ours, theirs in VAE_ATTENTION.items():
            name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    return name


def single_file(pipe: StableDiffusionPipeline, half: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint as CompVis wrote them."""
    layers, blocks = pipe.unet.config.layers_per_block, len(pipe.unet.config.block_out_channels)
    found = {}
    for name, value in pipe.unet.state_dict().items():
        found[f"model.diffusion_model.{unet_name(name, layers, blocks)}"] = value
    for name, value in pipe.vae.state_dict().items():
        theirs = vae_name(name, len(pipe.vae.config.block_out_channels))
        found[f"first_stage_model.{theirs}"] = (
            value[:, :, None, None] if "attn_1" in theirs and value.ndim == 2 else value
        )
    for name, value in pipe.text_encoder.state_dict().items():
        found[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return {name: (value.half() if half else value).clone().contiguous() for name, value in found.items()}


def lora_network(pipe: StableDiffusionPipeline, part: str, rank: int = 3, alpha: int = 6, seed: int = 0) -> nn.Module:
    """A part with a LoRA of PEFT whose both halves are random."""
    model = get_peft_model(
        getattr(pipe, part), LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[part], init_lora_weights=False)
    )
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    return model


def of_peft(model: nn.Module, folder: Path) -> Path:
    """As PEFT saves it."""
    model.save_pretrained(folder)
    return folder


def of_diffusers(models: dict[str, nn.Module], folder: Path) -> Path:
    """As diffusers' scripts save it, with the strength in the file's head."""
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(model) for part, model in models.items()}
    layers = {
        part: {name.removeprefix("base_model.model."): value for name, value in found.items()}
        for part, found in layers.items()
    }
    told = {f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict() for part, model in models.items()}
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **told)
    return folder / "pytorch_lora_weights.safetensors"


def of_kohya(models: dict[str, nn.Module], file: Path) -> Path:
    """As kohya's scripts save it: underscores for dots, the strength as a tensor of its own."""
    found: dict[str, Tensor] = {}
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_text_model_")):
        if part not in models:
            continue
        config = models[part].peft_config["default"]
        for name, value in get_peft_model_state_dict(models[part]).items():
            module, half = name.removeprefix("base_model.model.").removeprefix("text_model.").rsplit(".lora_", 1)
            kind = "lora_down" if half.startswith("A") else "lora_up"
            key = prefix + module.replace(".", "_")
            found[f"{key}.{kind}.weight"] = value.clone().contiguous()
            found[f"{key}.alpha"] = torch.tensor(float(config.lora_alpha))
    save_file(found, file)
    return file
