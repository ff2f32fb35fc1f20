"""The metrics on clips whose figures are known: equal, orthogonal, moved, masked; SSIM, PSNR against scikit-image."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torch.nn import functional
from torchmetrics.functional.image import lpips as theirs
from transformers import ViTConfig, ViTModel

from tav_opt.config import InputError
from tav_opt.metrics import background, clip_scores, left_out
from tav_opt.metrics.edited import Edited
from tav_opt.metrics.left_out import LeftOut
from tav_opt.metrics.motion_fidelity import displacements, motion_fidelity
from tav_opt.metrics.optical_flow import optical_flow, visible, warp
from tav_opt.metrics.structure_distance import Vit, structure_distance
from tav_opt.metrics.warping_error import warping_error

RANDOM = np.random.default_rng(5)
BEGINNING = RANDOM.bit_generator.state


@pytest.fixture(autouse=True)
def the_same_pictures_whichever_tests_run() -> None:
    RANDOM.bit_generator.state = BEGINNING


def texture(height: int, width: int) -> np.ndarray:
    """Smooth noise uint8 (H, W, 3): something to hold on to everywhere."""
    noise = cv2.GaussianBlur(RANDOM.random((height, width, 3), dtype=np.float32), (0, 0), 2)
    return ((noise - noise.min()) / (noise.max() - noise.min()) * 255).astype(np.uint8)


def moving(step: tuple[int, int], count: int = 5, side: int = 64) -> np.ndarray:
    """A picture that moves by so many pixels, x and y, from frame to frame."""
    room = count * max(map(abs, step))
    picture = texture(side + 2 * room, side + 2 * room)
    places = [(room - number * step[1], room - number * step[0]) for number in range(count)]
    return np.stack([picture[top : top + side, left : left + side] for top, left in places])


# Cosines of embeddings.


def unit(*rows: list[float]) -> torch.Tensor:
    return functional.normalize(torch.tensor(rows), dim=-1)


def test_frame_consistency_of_equal_and_orthogonal_frames() -> None:
    assert clip_scores.frame_consistency(unit([3.0, 4.0], [3.0, 4.0], [3.0, 4.0])) == pytest.approx(1)
    assert clip_scores.frame_consistency(torch.eye(3)) == 0
    two_of_three = unit([1.0, 0.0], [1.0, 0.0], [0.0, 1.0])
    assert clip_scores.frame_consistency(two_of_three) == pytest.approx(1 / 3), "all pairs, not neighbours: 1/2"
    with pytest.raises(LeftOut, match="two frames or more, not 1"):
        clip_scores.frame_consistency(torch.eye(3)[:1])


def test_textual_alignment_is_a_hundred_times_the_cosine() -> None:
    images, text = unit([1.0, 0.0], [1.0, 1.0]), unit([1.0, 0.0])[0]
    assert clip_scores.textual_alignment(images, text) == pytest.approx(100 * (1 + math.sqrt(0.5)) / 2)
    assert clip_scores.pick_score(images, text, 50.0) == pytest.approx(50 * (1 + math.sqrt(0.5)) / 2)


def test_frame_accuracy_counts_frames_nearer_to_the_edit() -> None:
    edited, source = torch.eye(2)
    images = unit([2.0, 1.0], [1.0, 2.0], [3.0, 1.0], [1.0, 1.0])
    assert clip_scores.frame_accuracy(images, edited, source) == 0.5, "a tie is not nearer"


# Flow and what is made of it.


@pytest.mark.parametrize("step", [(2, 0), (0, -3), (1, 2)])
def test_flow_of_a_moving_texture(step: tuple[int, int]) -> None:
    first, second = moving(step, 2)
    forward, backward = optical_flow(first, second), optical_flow(second, first)
    inside = (slice(8, -8), slice(8, -8))
    assert np.abs(forward[inside] - step).max() < 0.3 and np.abs(backward[inside] + step).max() < 0.3
    assert visible(forward, backward)[inside].all()
    assert np.abs(warp(second.astype(np.float32), forward)[inside] - first[inside]).mean() < 2


def test_what_is_covered_or_leaves_the_picture_is_not_visible() -> None:
    forward, backward = np.zeros((2, 20, 20, 2), np.float32)
    forward[:, 15:, 0] = 8  # out of the picture
    forward[5:9, 5:9] = (3, 0)  # to where nothing comes back from
    expected = np.ones((20, 20), bool)
    expected[:, 15:] = expected[5:9, 5:9] = False
    assert (visible(forward, backward) == expected).all()


def test_warping_error_of_what_moves_with_its_source_is_near_zero() -> None:
    source, other = moving((2, 1)), moving((2, 1))
    assert warping_error(source, source) < 1e-4
    assert warping_error(other, source) < 1e-4, "another look, the same motion"
    still = np.repeat(other[:1], 5, 0)
    assert warping_error(still, source) > 20 * warping_error(other, source)


def test_warping_error_of_flicker_is_its_square() -> None:
    source = np.repeat(texture(48, 48)[None], 4, 0)
    edit = np.full_like(source, 100)
    edit[1::2] += 51
    assert warping_error(edit, source) == pytest.approx(0.2**2, rel=1e-5)


def test_warping_error_counts_what_both_frames_show_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a flow that is known: still, but for a square that goes to where nothing comes back from."""
    forward, backward = np.zeros((2, 20, 20, 2), np.float32)
    forward[5:9, 5:9] = (3, 0)
    source = np.stack([np.zeros((20, 20, 3), np.uint8), np.ones((20, 20, 3), np.uint8)])
    flows = {0: forward, 1: backward}
    monkeypatch.setattr("tav_opt.metrics.warping_error.optical_flow", lambda first, _second: flows[int(first.flat[0])])
    edit = np.full_like(source, 100)
    edit[1, 5:9, 8:12] = 255  # seen from the square alone, and from the pixels to its right
    expected = 4 * 3 * (155 / 255) ** 2 / (400 - 16)
    assert warping_error(edit, source) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("frames", "words"),
    [(np.zeros((1, 32, 32, 3), np.uint8), "two neighbouring frames"), (np.zeros((2, 8, 9, 3), np.uint8), "not 9×8")],
)
def test_warping_error_has_no_figure(frames: np.ndarray, words: str) -> None:
    with pytest.raises(LeftOut, match=words):
        warping_error(frames, frames)


def test_motion_fidelity_of_the_same_and_the_opposite_motion() -> None:
    source = moving((2, 1))
    assert motion_fidelity(source, source) == pytest.approx(1)
    assert motion_fidelity(moving((2, 1)), source) == pytest.approx(1, abs=0.02), "another look"
    assert motion_fidelity(moving((-2, -1)), source) == pytest.approx(-1, abs=0.02)
    assert motion_fidelity(moving((-1, 2)), source) == pytest.approx(0, abs=0.1), "at right angles"
    assert motion_fidelity(np.repeat(texture(64, 64)[None], 5, 0), source) == pytest.approx(0, abs=0.1)


def test_points_are_followed_until_they_leave() -> None:
    moved = displacements(moving((6, 0), count=6))
    seen = np.isfinite(moved).all(-1)
    off = np.abs(moved[seen] - (6, 0))
    assert moved.shape == (256, 5, 2) and np.quantile(off, 0.9) < 0.1 and off.max() < 2
    left, right = seen.reshape(16, 16, 5)[:, 2], seen.reshape(16, 16, 5)[:, 13]
    assert left[:, :5].mean() > 0.8 and not right[:, -1].any(), "30 pixels to the right the right end is gone"
    assert not (seen[:, 1:] & ~seen[:, :-1]).any(), "lost is lost"


def test_motion_fidelity_has_no_figure() -> None:
    still = np.repeat(texture(64, 64)[None], 3, 0)
    with pytest.raises(LeftOut, match="a source that moves"):
        motion_fidelity(moving((2, 1), 3), still)
    with pytest.raises(LeftOut, match="two frames or more"):
        motion_fidelity(still[:1], still[:1])
    with pytest.raises(LeftOut, match="a point that can be tracked"):
        motion_fidelity(np.zeros_like(still), moving((2, 1), 3))


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LeftOut, match="needs Nothing, which is not installed: pip install nothing-of-it"):
        left_out.library("nothing_of_that_name", "Nothing", "nothing-of-it")
    frames = moving((1, 0), 2)
    monkeypatch.setitem(sys.modules, "cv2", None)
    for metric in (warping_error, motion_fidelity):
        with pytest.raises(LeftOut, match=r"needs OpenCV, .*pip install 'tav-opt\[metrics\]'"):
            metric(frames, frames)


# Structure.


@pytest.fixture(scope="module")
def vit() -> Vit:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    model = ViTModel(config).eval()
    layer = next(m for name, m in reversed(list(model.named_modules())) if name.endswith(("key", "k_proj")))

    def processed(images: list[np.ndarray], **_options: str) -> dict[str, torch.Tensor]:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        return {"pixel_values": functional.interpolate(pixels, 32)}

    return Vit(name="small", model=model, processor=processed, layer=layer, batch=2)


def test_structure_distance_is_that_of_the_last_layers_keys(vit: Vit) -> None:
    edit, source = moving((1, 0), 3, 32), moving((1, 0), 3, 32)
    assert structure_distance(source, source, vit) == 0
    similar = []
    for frames in (edit, source):  # by hand, from the input of the last block
        with torch.no_grad():
            seen = vit.model(vit.processor(list(frames))["pixel_values"], output_hidden_states=True).hidden_states[1]
            block = [m for m in vit.model.modules() if type(m).__name__ == "ViTLayer"][-1]
            keys = vit.layer(block.layernorm_before(seen))
        norms = keys.norm(dim=-1)
        similar.append((keys @ keys.mT) / (norms[:, :, None] * norms[:, None]))
    expected = float(((similar[0] - similar[1]) ** 2).mean())
    assert expected > 1e-6 and structure_distance(edit, source, vit) == pytest.approx(expected, rel=1e-4)


# Backgrounds.


def noisy(frames: np.ndarray, by: int) -> np.ndarray:
    return np.clip(frames + RANDOM.integers(-by, by + 1, frames.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edit, source and a mask a frame."""
    source = moving((1, 1), 10, 40)
    mask = np.zeros((10, 40, 40), bool)
    for number in range(10):
        mask[number, 5 : 15 + number, 8:20] = True
    edit = noisy(source, 20)
    edit[mask] = 255
    return edit, source, mask


def test_backgrounds_against_scikit_image(pair: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    edit, source, mask = pair
    keep = ~mask[..., None]
    pictures = list(zip(edit * keep, source * keep, strict=True))
    ratio = np.mean([peak_signal_noise_ratio(given, made) for made, given in pictures])
    assert background.background_psnr(edit, source, mask) == pytest.approx(ratio, rel=1e-5)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}
    mirrored = [[np.pad(x, [(5, 5), (5, 5), (0, 0)], mode="reflect") for x in two] for two in pictures]  # and cut off
    similar = np.mean([structural_similarity(made, given, **options) for made, given in mirrored])
    assert background.background_ssim(edit, source, mask) == pytest.approx(similar, abs=1e-5)


def test_what_may_change_does_not_count(pair: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    _, source, mask = pair
    changed = np.where(mask[..., None], 255 - source, source)
    assert background.background_psnr(changed, source, mask) == background.SAME
    assert background.background_ssim(changed, source, mask) == pytest.approx(1)
    assert background.background_psnr(changed, source, ~mask) < 30
    one_gone = mask.copy()
    one_gone[3] = True
    others = np.arange(10) != 3
    for metric in (background.background_psnr, background.background_ssim):
        made = noisy(source, 9)
        expected = metric(made[others], source[others], mask[others])
        assert metric(made, source, one_gone) == pytest.approx(expected), "a frame without background does not count"
    all_kept = np.zeros((1, 40, 40), bool)
    assert background.background_psnr(source + (source < 255), source, all_kept) == pytest.approx(48.13, abs=0.05)


def test_small_pictures_have_no_ssim() -> None:
    frames = np.zeros((2, 10, 30, 3), np.uint8)
    with pytest.raises(LeftOut, match="11×11 or more, not 30×10"):
        background.background_ssim(frames, frames, np.zeros((1, 10, 30), bool))


class SqueezeNet(nn.Module):
    """As torchvision's SqueezeNet 1.1: the features alone, of random weights."""

    def __init__(self) -> None:
        super().__init__()

        class Fire(nn.Module):
            def __init__(self, given: int, squeezed: int, out: int) -> None:
                super().__init__()
                self.squeeze, self.one = nn.Conv2d(given, squeezed, 1), nn.Conv2d(squeezed, out, 1)
                self.three = nn.Conv2d(squeezed, out, 3, padding=1)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.squeeze(x).relu()
                return torch.cat([self.one(x), self.three(x)], 1).relu()

        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        first = [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool, Fire(64, 16, 64), Fire(128, 16, 64), pool]
        second = [Fire(128, 32, 128), Fire(256, 32, 128), pool, Fire(256, 48, 192), Fire(384, 48, 192)]
        self.features = nn.Sequential(*first, *second, Fire(384, 64, 256), Fire(512, 64, 256))


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path) -> SqueezeNet:
    """A stand-in, which has no weights of the real one: what is tested is what is made of its features."""
    torch.manual_seed(3)
    network = SqueezeNet().eval()
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(url="https://example.org/models/squeezenet1_1-b8a52dc0.pth"))
    models = SimpleNamespace(SqueezeNet1_1_Weights=weights, squeezenet1_1=lambda weights: network)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(theirs, "_TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return network


def test_lpips_without_weights_says_where_they_belong(torchvision: SqueezeNet, pair, tmp_path) -> None:
    with pytest.raises(LeftOut, match=rf"needs {tmp_path}/checkpoints/squeezenet1_1-b8a52dc0.pth, which does not"):
        background.background_lpips(*pair)


def test_lpips_is_the_weighted_distance_of_unit_features(torchvision: SqueezeNet, pair, tmp_path) -> None:
    """By hand (Zhang et al. 2018, equation 1), with the linear layers that torchmetrics ships."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth").touch()
    edit, source, mask = pair
    kept = [torch.from_numpy(frames * ~mask[..., None]).permute(0, 3, 1, 2) / 127.5 - 1 for frames in (edit, source)]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    made, given = ((pixels - shift[:, None, None]) / scale[:, None, None] for pixels in kept)
    linear = torch.load(theirs.__file__.replace("lpips.py", "lpips_models/squeeze.pth"), map_location="cpu")
    expected = torch.zeros(len(edit))
    with torch.no_grad():
        for number, end in enumerate((2, 5, 8, 10, 11, 12, 13)):
            features = [torchvision.features[:end](pixels) for pixels in (made, given)]
            first, second = (functional.normalize(x, dim=1) for x in features)
            weight = linear[f"lin{number}.model.1.weight"].flatten()
            expected += ((first - second) ** 2 * weight[:, None, None]).sum(1).mean((1, 2))
    found = background.background_lpips(edit, source, mask)
    assert found > 1e-4 and found == pytest.approx(float(expected.mean()), rel=1e-3)
    assert background.background_lpips(np.where(mask[..., None], 0, source), source, mask) == 0


# What belongs together.

FRAMES = moving((1, 0), 3, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": FRAMES[:2]}, "edit of 3 frames of 32×32, source of 2 frames of 32×32"),
        ({"source": FRAMES[:, :20]}, "edit of 3 frames of 32×32, source of 3 frames of 32×20"),
        ({"frames": FRAMES / 255}, "edit: frames float64"),
        ({"prompt": " "}, "prompt ' ' is empty"),
        ({"source_prompt": ""}, "source prompt '' is empty"),
        ({"prompt": "\udce9"}, "is not UTF-8"),
        ({"mask": np.zeros((1, 32, 30), bool)}, "mask of 1 frame of 30×32, edit of 3 frames of 32×32"),
        ({"mask": np.zeros((2, 32, 32), bool)}, "mask of 2 frames .* one frame, or as many"),
        ({"mask": np.ones((1, 32, 32), bool)}, "leaves no background"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: dict, words: str) -> None:
    good = {"frames": FRAMES, "source": FRAMES, "prompt": "a cat"}
    Edited(**good, mask=np.zeros((3, 32, 32), bool))
    with pytest.raises(InputError, match=words) as caught:
        Edited(**good | change)
    assert "\n" not in str(caught.value)
