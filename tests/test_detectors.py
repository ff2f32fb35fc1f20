"""Detectors: known pictures, published constants, other people's layers with the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tav_opt import cli, video
from tav_opt.conditions.detectors import depth, detecting, openpose, softedge
from tav_opt.conditions.maps import read_maps
from tav_opt.config import InputError

cv2 = pytest.importorskip("cv2")
SIDE = 64


def square(count: int = 2) -> np.ndarray:
    """A white square that goes to the right."""
    frames = np.zeros((count, SIDE, SIDE, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[16:48, 16 + 8 * number : 40 + 8 * number] = 255
    return frames


def test_canny_sees_the_outline_and_nothing_else() -> None:
    found = detecting.detect("canny", square())
    assert found.shape == (2, SIDE, SIDE, 3) and set(np.unique(found)) == {0, 255}
    for number, edges in enumerate(found[..., 0]):
        rows, columns = np.nonzero(edges)
        left = 16 + 8 * number
        assert rows.min() in (15, 16) and rows.max() in (47, 48)
        assert columns.min() in (left - 1, left) and columns.max() in (left + 23, left + 24)
        assert not edges[20:44, left + 4 : left + 20].any()


def test_a_person_is_drawn_with_openposes_points_colours_and_widths() -> None:
    """The hues go round in steps of 20°, as OpenPose publishes them; limbs are at 0.6 of the points' brightness."""
    import colorsys

    hues = [colorsys.rgb_to_hsv(*(value / 255 for value in colour))[0] * 360 for colour in openpose.COLOURS]
    np.testing.assert_allclose(hues, np.arange(18) * 20, atol=6)
    assert len(openpose.POINTS) == 18 and len(openpose.LIMBS) == 17
    points = np.full((1, 18, 2), np.nan)
    scores = np.zeros((1, 18))
    points[0, 2], points[0, 3] = (20, 30), (80, 30)  # right shoulder, right elbow: the third limb
    scores[0, [2, 3]] = 1
    drawn = openpose.draw(np.nan_to_num(points), scores, 60, 100)
    limb = openpose.LIMBS.index((2, 3))
    assert tuple(drawn[30, 50]) == tuple(int(0.6 * value) for value in openpose.COLOURS[limb])
    assert tuple(drawn[30, 20]) == openpose.COLOURS[2] and tuple(drawn[30, 80]) == openpose.COLOURS[3]
    thickness = np.nonzero(drawn[:, 50].any(-1))[0]
    assert 2 * openpose.HALF_WIDTH - 1 <= len(thickness) <= 2 * openpose.HALF_WIDTH + 1
    assert not drawn[:, 90:].any() and not drawn[:20].any()
    scores[0, 3] = 0.1
    assert not openpose.draw(np.nan_to_num(points), scores, 60, 100)[30, 40:].any()


def test_coco_points_become_openposes_with_a_neck_between_the_shoulders() -> None:
    points = np.arange(34, dtype=float).reshape(1, 17, 2)
    found, scores = openpose.of_coco(points, np.linspace(0.1, 0.9, 17)[None])
    names = dict(zip(openpose.POINTS, found[0], strict=True))
    assert tuple(names["nose"]) == (0, 1) and tuple(names["left eye"]) == (2, 3) and tuple(names["right eye"]) == (4, 5)
    assert tuple(names["left shoulder"]) == (10, 11) and tuple(names["right ankle"]) == (32, 33)
    assert tuple(names["neck"]) == (11, 12) and scores[0, 1] == pytest.approx(0.35)


def test_poses_are_those_that_rtmlib_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    class Body:
        def __init__(self, **given: object) -> None:
            seen.append(given)

        def __call__(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            seen.append(frame)
            return np.full((1, 17, 2), 32.0), np.ones((1, 17))

    module = ModuleType("rtmlib")
    module.Body = Body  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rtmlib", module)
    for name in ("det.onnx", "pose.onnx"):
        (tmp_path / name).touch()
    frames = square(1)
    frames[..., 2] = 7
    found = detecting.detect("pose", frames, tmp_path)
    assert found[0, 32, 32].any() and seen[0]["det"] == str(tmp_path / "det.onnx")
    assert np.array_equal(seen[1][..., 0], frames[0, ..., 2]), "it takes BGR"
    with pytest.raises(InputError, match=r"holds no det\.onnx"):
        detecting.detect("pose", frames, tmp_path / "elsewhere")


def test_soft_edges_are_hed_by_torchs_own_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = softedge.Hed()
    with torch.no_grad():
        for value in net.parameters():
            value *= 0.5
        net.norm += 100
    save_file(net.state_dict(), tmp_path / "hed.safetensors")
    picture = torch.randint(0, 256, (1, 3, 32, 48)).float()
    x, sides = picture - net.norm, []
    for number in range(1, 6):
        block = net.get_submodule(f"block{number}")
        layers = [nn.MaxPool2d(2)] if number > 1 else []
        for conv in block.convs:  # type: ignore[union-attr]
            layers += [conv, nn.ReLU()]
        x = nn.Sequential(*layers)(x)
        sides.append(nn.Upsample((32, 48), mode="bilinear")(block.projection(x)))  # type: ignore[operator]
    expected = (255 * torch.sigmoid(sum(sides) / 5)).detach().round()[0, 0].numpy()
    frames = picture.permute(0, 2, 3, 1).numpy().astype(np.uint8)
    found = detecting.detect("softedge", frames, tmp_path / "hed.safetensors")
    assert np.abs(found[0, ..., 0].astype(int) - expected).max() <= 1 and expected.std() > 0
    with pytest.raises(InputError, match="too small"):
        detecting.detect("softedge", frames[:, :8], tmp_path / "hed.safetensors")


def test_depth_is_a_network_of_transformers_at_one_scale(tmp_path: Path) -> None:
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
    )  # fmt: skip
    torch.manual_seed(0)
    net = DPTForDepthEstimation(config).eval()
    for value in net.parameters():
        value.data += 0.1 * torch.randn(value.shape)
    net.head.head[4].bias.data.fill_(20)  # behind it is a ReLU
    net.save_pretrained(tmp_path)
    told = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    found = detecting.detect("depth", frames, tmp_path)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = net(pixels).predicted_depth
    expected = 255 * (expected - expected.min()) / (expected.max() - expected.min())
    assert found.shape == frames.shape and found.min() == 0 and found.max() == 255
    assert np.abs(found[..., 0] - expected.numpy()).max() <= 1.5
    with pytest.raises(InputError, match=r"preprocessor_config\.json|no depth network"):
        (tmp_path / "config.json").write_text("{}")
        depth.detect(frames, tmp_path)


def test_the_command_writes_what_a_detector_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video.write(tmp_path / "in", square(), 8)
    assert cli.main(["detect", str(tmp_path / "in"), str(tmp_path / "out"), "--kind", "canny"]) == 0
    assert np.array_equal(video.read(tmp_path / "out").frames, detecting.detect("canny", square()))
    assert np.array_equal(read_maps(tmp_path / "out", 2, SIDE, SIDE), video.read(tmp_path / "out").frames)
    capsys.readouterr()
    for options, said in (
        (["--kind", "hands"], "nothing detects 'hands'; there are canny, depth, softedge, pose"),
        (["--kind", "canny", "--detector", "x"], "canny has no network"),
    ):
        assert cli.main(["detect", str(tmp_path / "in"), str(tmp_path / "other"), *options]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_maps_are_fitted_as_the_source_was(tmp_path: Path) -> None:
    video.write(tmp_path / "in", square(2), 8)
    size = {"height": SIDE, "width": 2 * SIDE}
    squashed = video.read(tmp_path / "in", count=2, fit="squash", **size).frames
    assert np.array_equal(read_maps(tmp_path / "in", 2, **size, fit="squash"), squashed)
    assert not np.array_equal(read_maps(tmp_path / "in", 2, **size), squashed)


def test_maps_of_another_length_are_refused(tmp_path: Path) -> None:
    video.write(tmp_path / "in", square(4), 8)
    assert len(read_maps(tmp_path / "in", 2, SIDE, SIDE, stride=2)) == 2
    with pytest.raises(InputError, match="more than 2 frames"):
        read_maps(tmp_path / "in", 2, SIDE, SIDE)
    with pytest.raises(InputError, match="frames"):
        read_maps(tmp_path / "in", 5, SIDE, SIDE)


OPTIONS = {
    "no name": ({"control": ("dance.mp4",)}, "'dance.mp4' is not NAME=FILE"),
    "twice": ({"control": ("pose=a", "pose=b")}, "gives 'pose' twice"),
    "idle scale": ({"control_scale": ("0.5",)}, "is for --control, which is not given"),
    "another's scale": ({"control": ("pose=a",), "control_scale": ("depth=0.5",)}, "no --control has that name"),
    "no number": ({"control": ("pose=a",), "control_scale": ("much",)}, "'much' is no number"),
    "no window": ({"control": ("pose=a",), "control_steps": ("0.5",)}, "'0.5' is not START:END"),
    "idle detection": ({"detect": True}, "are for --control"),
    "idle detector": ({"control": ("pose=a",), "detector": ("pose=x",)}, "nothing is detected of that name"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_mean_nothing_are_refused(case: str) -> None:
    from tav_opt.cli import controls

    given, said = OPTIONS[case]
    with pytest.raises(InputError, match=said):
        controls.controls(controls.ControlOptions(**given))  # type: ignore[arg-type]


def test_options_are_read_by_name_or_for_all() -> None:
    from tav_opt.cli import controls

    options = controls.ControlOptions(
        control=("pose=a", "depth=source"), control_scale=("0.5", "depth=2"), control_steps=("pose=0.1:0.5",)
    )
    found = [(one.name, one.scale, one.start, one.end) for one in controls.controls(options)]
    assert found == [("pose", 0.5, 0.1, 0.5), ("depth", 2.0, 0.0, 1.0)]
    with pytest.raises(InputError, match=r"nowhere\.mp4 does not exist"):
        controls.check(controls.ControlOptions(control=("pose=nowhere.mp4",)))
