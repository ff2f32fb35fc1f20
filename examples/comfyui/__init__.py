"""A ComfyUI node that edits a clip on a running `tav-opt serve`: put this folder into `ComfyUI/custom_nodes/tav_opt`.

It needs `pip install tav-opt` in ComfyUI's environment; the model is the server's, on whatever machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tav_opt import Client, EditConfig
from tav_opt.config import PRESETS


class TuneAVideoEdit:
    """An edit of an exported clip by a prompt, from the clip itself or from other images in its place."""

    CATEGORY = "video/Tune-A-Video"
    FUNCTION = "edit"
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("images", "fps")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "clip_name": ("STRING", {"default": "man-skiing"}),
                "prompt": ("STRING", {"multiline": True, "default": "a panda is skiing"}),
                "preset": (list(PRESETS), {"default": "exact"}),
                "server": ("STRING", {"default": "localhost:8001"}),
            },
            "optional": {
                "images": ("IMAGE", {"tooltip": "As many as the clip has frames, and of its size."}),
                "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
                "guidance": ("FLOAT", {"default": EditConfig.guidance_scale, "min": 0.0, "max": 100.0, "step": 0.5}),
                "seed": ("INT", {"default": EditConfig.seed, "min": 0, "max": 2**63 - 1}),
                "inversion": ("BOOLEAN", {"default": True, "tooltip": "Off: from seeded noise."}),
            },
        }

    def edit(
        self,
        clip_name: str,
        prompt: str,
        preset: str,
        server: str,
        images: torch.Tensor | None = None,
        negative_prompt: str = "",
        guidance: float = EditConfig.guidance_scale,
        seed: int = EditConfig.seed,
        inversion: bool = True,
    ) -> tuple[torch.Tensor, float]:
        """Images are float (f, H, W, 3) in 0…1, as everywhere in ComfyUI; its cancel button cancels on the server."""
        config = EditConfig(
            prompts=(prompt,),
            negative_prompt=negative_prompt,
            guidance_scale=guidance,
            seed=seed,
            inversion=inversion,
        )
        options: dict[str, Any] = {"preset": preset, "left_out": {"steps", "guidance_interval"}}
        if images is not None:
            options["source_frames"] = np.rint(images.cpu().numpy() * 255).clip(0, 255).astype(np.uint8)
        with Client(server) as client, client.stream(clip_name, config, **options) as stream:
            bar: Any = None
            for progress in stream:
                _raise_if_interrupted()
                if progress.stage == "sample":
                    bar = bar or _progress_bar(progress.steps)
                    bar.update_absolute(progress.step, progress.steps)
            edit = stream.result()
        return torch.tensor(edit.frames[0]).float() / 255, edit.fps


def _progress_bar(steps: int) -> Any:
    from comfy.utils import ProgressBar  # ComfyUI's own

    return ProgressBar(steps)


def _raise_if_interrupted() -> None:
    from comfy.model_management import throw_exception_if_processing_interrupted

    throw_exception_if_processing_interrupted()


NODE_CLASS_MAPPINGS = {"TuneAVideoEdit": TuneAVideoEdit}
NODE_DISPLAY_NAME_MAPPINGS = {"TuneAVideoEdit": "Tune-A-Video edit (tav-opt)"}
