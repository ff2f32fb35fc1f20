"""What lies under examples/, as the programs it is for load it and run it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import supervised
import torch
from diffusers import DiffusionPipeline
from exported import FRAMES, SIDE, Exported, export_once
from served import until

import tav_opt
from tav_opt.client import Client
from tav_opt.config import EditConfig, InputError
from tav_opt.serving.host.server import Server

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = EditConfig(prompts=("a panda is skiing",), steps=2, guidance_scale=7.5)


@pytest.fixture(scope="module")
def exported(golden, tmp_path_factory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


# diffusers.


PARTS = {
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
}


@pytest.fixture(scope="module")
def base(shallow, tmp_path_factory) -> Path:
    """The base of the tests' clip as diffusers saves one."""
    folder = shutil.copytree(shallow, tmp_path_factory.mktemp("base") / "sd")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.35.0", **PARTS}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def pipe(base) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(
        base, custom_pipeline=str(EXAMPLES / "diffusers"), trust_remote_code=True, safety_checker=None
    )


def test_the_pipeline_edits_as_the_package_does(pipe, exported):
    pipe.load_clip(exported.checkpoint)
    steps = []
    options = {"num_inference_steps": 2, "guidance_scale": 7.5}
    found = pipe(SHORT.prompts, **options, output_type="np", callback_on_step_end=lambda *step: steps.append(step))
    expected = tav_opt.edit(tav_opt.load(exported.checkpoint), SHORT)
    assert found.fps == 8 and found.frames.dtype == np.float32
    # The pipeline's convolutions have their channels first, the package's last: sums in another order.
    np.testing.assert_allclose(np.rint(found.frames * 255), expected, atol=1, rtol=0)
    assert steps == [("sample", 1, 2), ("sample", 2, 2)]
    (pictures,) = pipe("a panda is skiing", **options).frames
    shown = np.stack([np.asarray(picture) for picture in pictures]).astype(int)
    np.testing.assert_allclose(shown, expected[0], atol=1, rtol=0)
    own = pipe("a panda is skiing", **options, video=exported.frames[::-1].copy(), output_type="np").frames
    assert own.shape == (1, FRAMES, SIDE, SIDE, 3) and not np.array_equal(own, found.frames)


def test_a_pipeline_without_a_clip_says_so(base):
    fresh = DiffusionPipeline.from_pretrained(
        base, custom_pipeline=str(EXAMPLES / "diffusers"), trust_remote_code=True, safety_checker=None
    )
    with pytest.raises(ValueError, match=r"load_clip\(…\) comes first"):
        fresh("a panda")
    with pytest.raises(InputError, match="nowhere is not a checkpoint"):
        fresh.load_clip("nowhere")


# ComfyUI, which no index has: its documented interface stands for it.


class Interrupted(Exception):
    """What ComfyUI raises after its cancel button."""


@pytest.fixture
def comfy(monkeypatch) -> ModuleType:
    """The two modules of ComfyUI's that nodes use; `told` and `interrupted` are ours."""
    module, utils, management = (ModuleType(name) for name in ("comfy", "comfy.utils", "comfy.model_management"))
    module.told, module.interrupted = [], False

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int | None = None, preview: object = None) -> None:
            module.told.append((value, total))

    def throw_exception_if_processing_interrupted() -> None:
        if module.interrupted:
            raise Interrupted

    utils.ProgressBar = ProgressBar
    management.throw_exception_if_processing_interrupted = throw_exception_if_processing_interrupted
    for one in (module, utils, management):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    return module


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    """As ComfyUI imports a folder of custom_nodes."""
    folder = EXAMPLES / "comfyui"
    spec = importlib.util.spec_from_file_location("custom_nodes_tav_opt", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server(golden, tmp_path_factory):
    folder = supervised.repository(golden, tmp_path_factory.getbasetemp())
    with Server(supervised.on_free_ports(folder)) as running:
        yield running


def executed(nodes: ModuleType, **given) -> tuple:
    """As ComfyUI runs a node: an object of the class, its function by name, inputs by name."""
    kind = nodes.NODE_CLASS_MAPPINGS["TuneAVideoEdit"]
    inputs = kind.INPUT_TYPES()
    defaults = {name: options["default"] for name, (_, options) in inputs["required"].items()}
    found = getattr(kind(), kind.FUNCTION)(**{**defaults, **given})
    assert isinstance(found, tuple) and len(found) == len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES)
    return found


def test_the_node_is_one_to_comfyui(nodes):
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for kind in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = kind.INPUT_TYPES()
        assert isinstance(kind.CATEGORY, str) and callable(getattr(kind, kind.FUNCTION))
        for group in inputs.values():
            for type_, options in group.values():
                assert type_ in ("STRING", "IMAGE", "FLOAT", "INT", "BOOLEAN") or isinstance(type_, list)
                assert type_ == "IMAGE" or "default" in options


def test_the_node_edits_on_the_server(nodes, comfy, server, exported):
    usual = {"clip_name": supervised.CLIP, "prompt": SHORT.prompts[0], "server": server.grpc_url, "preset": "draft"}
    images, fps = executed(nodes, **usual)
    with Client(server.grpc_url) as client:
        expected = client.edit(supervised.CLIP, SHORT.prompts[0], preset="draft").frames[0]
    assert images.dtype == torch.float32 and fps == 8
    np.testing.assert_array_equal(np.rint(images.numpy() * 255), expected)
    assert comfy.told[-1] == (12, 12)
    given = torch.from_numpy(exported.frames).float() / 255
    other, _ = executed(nodes, **usual, images=given)
    assert other.shape == images.shape and not torch.equal(other, images), "from the frames, not from kept latents"
    with pytest.raises(InputError, match="source_frames"):
        executed(nodes, **usual, images=given[:-1])


def test_comfyuis_cancel_button_cancels_on_the_server(nodes, comfy, server):
    comfy.interrupted = True
    with pytest.raises(Interrupted):
        executed(nodes, clip_name=supervised.CLIP, server=server.grpc_url)
    until(lambda: any("CANCELLED" in line for line in list(server.log)))
