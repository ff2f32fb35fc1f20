"""The demo's dual encoder of pictures and captions: a small CLIP, its training stage, and classification with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from tav_opt.demo import world
from tav_opt.demo.emoji import JUDGED
from tav_opt.demo.places import PLACES
from tav_opt.demo.text import TOKENS, WIDTH, new_tokenizer, text_config
from tav_opt.demo.training import grid, mixed_precision, to_unit

BATCH = 64
PARTS = ("subject", "place", "style")


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP for 64×64 pictures and the world's captions."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=world.SIZE,
        patch_size=8,
        projection_dim=WIDTH,
    )
    return CLIPModel(CLIPConfig(text_config=text_config(tokenizer), vision_config=vision, projection_dim=WIDTH))


def phrase_of(part: str, name: str) -> str:
    """The words for one subject, place or style."""
    match part:
        case "subject":
            return world.subject_phrase(name)
        case "place":
            return PLACES[name][0]
        case _:
            return world.STYLES[name][0]


def phrase(scene: world.Scene, parts: Sequence[str]) -> str:
    """A caption that names only some parts of a scene."""
    text = " ".join(phrase_of(part, getattr(scene, part)) for part in ("subject", "place") if part in parts)
    style = phrase_of("style", scene.style) if "style" in parts else ""
    return f"{text}, {style}" if text and style else text or style


class DualEncoderStage:
    """Contrast of pictures and captions; a caption fits every picture that has the parts it names."""

    name = "dual-encoder"
    lr = 1e-3

    def __init__(self, sprites: Mapping[str, Sequence[Image.Image]], *, test: int = 600) -> None:
        self.subjects, self.sprites = list(sprites), sprites
        self.names = {"subject": self.subjects, "place": list(PLACES), "style": list(world.STYLES)[1:]}
        """Of each part; plain pictures have no style to name."""
        self.tokenizer = new_tokenizer(self.subjects)
        self.clip = new_clip(self.tokenizer)
        self.modules = nn.ModuleDict({"clip": self.clip})
        self.test_scenes, self.test = self._pictures(np.random.default_rng(3), test, kept_out=True)

    def _pictures(
        self, rng: np.random.Generator, count: int, *, kept_out: bool
    ) -> tuple[list[world.Scene], np.ndarray]:
        scenes = [world.draw_scene(rng, self.subjects, kept_out=kept_out) for _ in range(count)]
        return scenes, np.stack([world.compose(scene, self.sprites, rng) for scene in scenes])

    def loss(self, rng: np.random.Generator) -> Tensor:
        """Contrast of pictures and captions, and of pictures and the names of each part."""
        scenes, images = self._pictures(rng, BATCH, kept_out=False)
        named = [[part for part in PARTS if rng.random() < 0.6] or ["subject"] for _ in scenes]
        captions = [phrase(scene, parts) for scene, parts in zip(scenes, named, strict=True)]
        fits = torch.tensor(
            [[_fits(image, scene, parts) for image in scenes] for scene, parts in zip(scenes, named, strict=True)]
        )
        with mixed_precision():
            pictures = self._embed_images(to_unit(images)).float()
        logits = self.clip.logit_scale.exp() * self.embed_texts(captions) @ pictures.T  # captions × pictures
        contrast = (_soft_cross_entropy(logits, fits) + _soft_cross_entropy(logits.T, fits.T)) / 2
        return contrast + sum(self._naming(pictures, scenes, part) for part in PARTS)

    def _naming(self, pictures: Tensor, scenes: Sequence[world.Scene], part: str) -> Tensor:
        """Cross-entropy against all names of a part: a batch alone holds few subjects to tell apart."""
        names = self.names[part]
        truth = [getattr(scene, part) for scene in scenes]
        shown = [index for index, name in enumerate(truth) if name in names]
        texts = self.embed_texts([phrase_of(part, name) for name in names])
        logits = self.clip.logit_scale.exp() * pictures[shown] @ texts.T
        return functional.cross_entropy(logits, torch.tensor([names.index(truth[index]) for index in shown]))

    def _embed_images(self, pixels: Tensor) -> Tensor:
        return functional.normalize(self.clip.visual_projection(self.clip.vision_model(pixels)[1]), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Captions → unit vectors (captions, width)."""
        options = {"padding": True, "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer(list(texts), **options).input_ids  # nothing looks beyond the end of a text
        return functional.normalize(self.clip.text_projection(self.clip.text_model(ids)[1]), dim=-1)

    @torch.no_grad()
    def classify(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """For each uint8 picture (n, H, W, 3) the position of the text nearest to it."""
        return (self._embed_images(to_unit(images)) @ self.embed_texts(texts).T).argmax(1).numpy()

    def accuracies(self) -> dict[str, float]:
        """Part of the held-out pictures whose subject (of those that are judged), place and style are recognised."""
        judged = [name for name in self.subjects if name in JUDGED] or self.subjects
        return {part: self._accuracy(part, names) for part, names in (self.names | {"subject": judged}).items()}

    def _accuracy(self, part: str, names: Sequence[str]) -> float:
        truth = [getattr(scene, part) for scene in self.test_scenes]
        shown = [index for index, name in enumerate(truth) if name in names]
        found = self.classify(self.test[shown], [phrase_of(part, name) for name in names])
        return float(np.mean([names[answer] == truth[index] for answer, index in zip(found, shown, strict=True)]))

    def sheet(self) -> np.ndarray:
        """The held-out pictures that are tested on; prints how many are recognised."""
        print(f"recognised on held-out pictures: {self.accuracies()}", flush=True)
        return grid(self.test[:12], 12)


def _fits(image: world.Scene, scene: world.Scene, parts: Sequence[str]) -> bool:
    named = [part for part in parts if part != "style" or scene.style != "plain"]
    return all(getattr(image, part) == getattr(scene, part) for part in named)


def _soft_cross_entropy(logits: Tensor, fits: Tensor) -> Tensor:
    target = fits / fits.sum(1, keepdim=True)
    return -(target * logits.log_softmax(1)).sum(1).mean()
