"""LoRAs, textual inversions and VAEs: what diffusers makes of them, fused before inflation; and those that fit not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import owned
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from served import serving
from torch import Tensor

import tav_opt
from tav_opt import checkpoint, cli, models, video
from tav_opt.base.directory import Base
from tav_opt.base.image_model import ImageModel
from tav_opt.base.textual_inversion import spelt_out
from tav_opt.config import Additions, BaseConfig, InputError, TrainConfig, WorkerConfig
from tav_opt.engines import registry
from tav_opt.export import exporting
from tav_opt.files import read_json, write_json
from tav_opt.repository import clips

KINDS = ("diffusers", "kohya", "peft")


@pytest.fixture(scope="module")
def sd(golden: Path) -> Path:
    return golden / "reference_checkpoint" / "sd"


@pytest.fixture(scope="module")
def networks(sd: Path) -> dict[str, torch.nn.Module]:
    """The UNet and text encoder with LoRAs of rank 3 and alpha 6 that PEFT computes beside the weights."""
    pipeline = owned.pipeline(sd)
    return {part: owned.lora_network(pipeline, part, seed=seed) for seed, part in enumerate(("unet", "text_encoder"))}


@pytest.fixture(scope="module")
def files(networks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """The same LoRAs in each layout."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        "diffusers": (str(owned.of_diffusers(networks, folder / "diffusers")),),
        "kohya": (str(owned.of_kohya(networks, folder / "kohya.safetensors")),),
        "peft": tuple(str(owned.of_peft(networks[part], folder / part)) for part in networks),
    }


def image_model(sd: Path, **added: object) -> ImageModel:
    return ImageModel.load(Base.at(BaseConfig(model=str(sd), **added)))


def rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


INPUTS = {
    "unet": lambda g: (rand(g, 2, 4, 8, 8), torch.tensor([3, 700]), rand(g, 2, 16, 32)),
    "text_encoder": lambda g: (torch.randint(0, 500, (2, 16), generator=g),),
}


@torch.no_grad()
def outputs(model: object) -> dict[str, Tensor]:
    """Of both networks, on seeded inputs."""
    return {part: getattr(model, part)(*given(torch.Generator().manual_seed(1)))[0] for part, given in INPUTS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_loras_of_every_layout_are_what_peft_computes(kind, files, networks, sd):
    expected = {part: networks[part](*INPUTS[part](torch.Generator().manual_seed(1)))[0] for part in networks}
    plain, found = outputs(image_model(sd)), outputs(image_model(sd, loras=files[kind]))
    for part in expected:
        assert (found[part] - expected[part]).abs().max() < 1e-5, part
        assert (plain[part] - expected[part]).abs().max() > 0.1, "the LoRA does something"


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_weights_and_several_loras_are_what_diffusers_pipeline_computes(kind, files, sd, tmp_path):
    """Not fused there, at 0.7 and -0.4."""
    other = {"unet": owned.lora_network(owned.pipeline(sd), "unet", rank=2, alpha=1, seed=7)}
    second = str(owned.of_kohya(other, tmp_path / "other.safetensors"))
    theirs = owned.pipeline(sd)
    theirs.load_lora_weights(files[kind][0], adapter_name="a")
    theirs.load_lora_weights(second, adapter_name="b")
    theirs.set_adapters(["a", "b"], [0.7, -0.4])
    found = outputs(image_model(sd, loras=(f"{files[kind][0]}:0.7", f"{second}:-0.4")))
    expected = outputs(theirs)
    for part in INPUTS:
        assert (found[part] - expected[part]).abs().max() < 1e-5, part


def test_fused_models_have_the_names_of_plain_ones(files, sd):
    plain, fused = image_model(sd), image_model(sd, loras=files["kohya"])
    for part in ("unet", "text_encoder"):
        assert getattr(plain, part).state_dict().keys() == getattr(fused, part).state_dict().keys()


def kohya(change):
    return lambda files: change(load_file(files["kohya"][0]))


def diffusers(change):
    return lambda files: change(load_file(files["diffusers"][0]))


def renamed(old: str, new: str, of: str = ""):
    return lambda found: {name.replace(old, new): x.clone() for name, x in found.items() if name.startswith(of)}


def both(change):
    return lambda found: {**found, **change(found)}


FAR = "lora_unet_down_blocks_9_attentions_0_proj_in"
BAD_LORAS = {
    "of SDXL, kohya": (kohya(both(renamed("lora_te_", "lora_te2_", "lora_te_"))), "is for Stable Diffusion XL"),
    "of SDXL, its UNet": (
        diffusers(renamed("transformer_blocks.0", "transformer_blocks.5", "unet")),
        r"does not fit this model: .*not found.*unet\.down_blocks\.0",
    ),
    "of SDXL, its text encoder": (
        diffusers(both(renamed("text_encoder", "text_encoder_2", "text"))),
        "is for Stable Diffusion XL",
    ),
    "of Flux": (
        lambda _: {"transformer.x.lora_A.weight": torch.ones(3, 3)},
        r"match nothing in Stable Diffusion 1.x and 2.x: transformer\.x",
    ),
    "of a deeper UNet": (
        kohya(
            both(lambda _: {f"{FAR}.lora_down.weight": torch.ones(3, 16), f"{FAR}.lora_up.weight": torch.ones(16, 3)})
        ),
        r"2 of its keys match nothing in this model's unet: unet\.down_blocks\.9",
    ),
    "of another width": (
        diffusers(
            lambda found: {n: torch.ones(2 * len(x), x.shape[1]) if "lora_B" in n else x for n, x in found.items()}
        ),
        "does not fit this model: size mismatch",
    ),
    "in half": (
        diffusers(lambda found: {n: x for n, x in found.items() if "lora_B" not in n or "mid_block" not in n}),
        "is not whole: 8 of the halves",
    ),
    "DoRA": (kohya(both(lambda _: {"lora_unet_x.dora_scale": torch.ones(3)})), "is a DoRA"),
    "LoHa": (lambda _: {"lora_unet_x.hada_w1_a": torch.ones(3)}, "does not fit this model: .*hada_w1_a"),
    "a model": (lambda _: {"model.diffusion_model.out.0.weight": torch.ones(3)}, "keys that match nothing"),
    "NaN": (diffusers(lambda found: {n: x * torch.nan for n, x in found.items()}), "NaN or infinite"),
}


@pytest.mark.parametrize("name", BAD_LORAS)
def test_loras_that_do_not_fit(name, files, sd, tmp_path, capfd):
    make, message = BAD_LORAS[name]
    save_file(make(files), tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message) as error:
        image_model(sd, loras=(str(tmp_path / "x.safetensors"),))
    assert "\n" not in str(error.value) and "x.safetensors" in str(error.value)
    assert capfd.readouterr().err.count("\n") == 0, "it is said once"


def test_loras_that_are_not_there(files, sd, tmp_path, golden):
    alone = shutil.copytree(files["peft"][0], tmp_path / "alone")
    (alone / "adapter_config.json").unlink()
    for text, message in {
        "nowhere.safetensors": "does not exist",
        "nowhere:0.5": "lora nowhere does not exist",
        f"{files['kohya'][0]}:much": "'much' is no number",
        f"{files['kohya'][0]}:inf": "weight inf is not within",
        str(sd): r"neither pytorch_lora_weights\.safetensors nor adapter_model\.safetensors",
        str(alone): "its strength is in adapter_config.json, which is not beside it",
    }.items():
        with pytest.raises(InputError, match=message):
            image_model(sd, loras=(text,))
    with pytest.raises(InputError, match="was tuned on a clip by the reference: nothing can be added"):
        image_model(golden / "reference_checkpoint" / "tuned", loras=files["kohya"])


# Textual inversion.


def vectors(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of diffusers, and of web UIs in both their kinds."""
    folder = tmp_path_factory.mktemp("words")
    torch.save({"<cat>": vectors(3)}, folder / "learned_embeds.bin")
    web = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(2, 1)}, "name": "<web>", "step": 5}
    torch.save(web, folder / "web.pt")
    save_file({"emb_params": vectors(1, 2)}, folder / "moody.safetensors")
    return {
        "<cat>": str(folder / "learned_embeds.bin"),
        "<web>": str(folder / "web.pt"),
        "moody": str(folder / "moody.safetensors"),
    }


PROMPTS = ("<cat> is skiing", "a <web>, moody", "A <CAT> and a <cat>", "moody", "a panda", "")


def test_words_are_what_diffusers_makes_of_them(words, sd):
    theirs, ours = owned.pipeline(sd), models.load(BaseConfig(model=str(sd), embeddings=tuple(words.values())))
    for token, file in words.items():
        theirs.load_textual_inversion(file, token=token)
    for prompt in (text.lower() for text in PROMPTS):  # in capitals diffusers takes the first vector alone
        ids = theirs.tokenizer(
            theirs.maybe_convert_prompt(prompt, theirs.tokenizer),
            padding="max_length",
            max_length=16,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            expected = theirs.text_encoder(ids)[0]
        assert models.tokenize(ours.tokenizer, prompt).equal(ids), prompt
        assert (models.encode_prompt(ours, prompt) - expected).abs().max() < 1e-6, prompt
    assert models.tokenize(ours.tokenizer, "A <CAT>").equal(models.tokenize(ours.tokenizer, "a <cat>"))


def test_the_exported_tokenizer_knows_the_words(words, sd):
    ours = models.load(BaseConfig(model=str(sd), embeddings=tuple(words.values())))
    alone = exporting._tokenizer(ours)
    for prompt in PROMPTS:
        assert alone.encode(spelt_out(alone, prompt)).ids == models.tokenize(ours.tokenizer, prompt)[0].tolist(), prompt


@pytest.mark.parametrize(
    "name, tensors, suffix, message",
    [
        ("wide", {"<x>": torch.ones(768)}, "", "vectors of width 768: this text encoder's have 32"),
        ("xl", {"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 32)}, "", "is for Stable Diffusion XL"),
        ("two", {"a": torch.ones(32), "b": torch.ones(32)}, "", "holds a, b, not the vectors of one word"),
        ("known", {"panda": torch.ones(32)}, "", r"token 'panda' exists already: .* known\.safetensors:<panda-1>"),
        ("renamed", {"<x>": torch.ones(32)}, ":panda", "token 'panda' exists already"),
        ("two words", {"emb_params": torch.ones(2, 32)}, "", "token 'two words' is not one word"),
        ("empty", {"<x>": torch.ones(0, 32)}, "", r"\(0, 32\), not \(n, width\)"),
        ("deep", {"<x>": torch.ones(2, 2, 32)}, "", r"\(2, 2, 32\), not \(n, width\)"),
        ("nan", {"<x>": torch.full((2, 32), torch.nan)}, "", "NaN or infinite"),
        ("colon", {"<x>": torch.ones(32)}, ":", "no token stands behind the colon"),
    ],
)
def test_words_that_cannot_be_taken(name, tensors, suffix, message, sd, tmp_path):
    save_file(tensors, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match=message) as error:
        image_model(sd, embeddings=(f"{tmp_path / name}.safetensors{suffix}",))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_one_word_of_two_files_is_refused(words, sd):
    with pytest.raises(InputError, match="token '<web>' exists already"):
        image_model(sd, embeddings=(words["<web>"], f"{words['moody']}:<web>"))


# VAEs, and the identity.


def test_another_vae_takes_the_place_of_the_model_s_own(sd, tmp_path):
    other = shutil.copytree(sd / "vae", tmp_path / "other")
    file = next(other.glob("*.bin"))
    torch.save({name: x + 0.01 for name, x in torch.load(file, weights_only=True).items()}, file)
    loaded = models.load(BaseConfig(model=str(sd), vae=str(other)))
    assert torch.equal(loaded.vae.decoder.conv_in.weight, models.load(sd).vae.decoder.conv_in.weight + 0.01)
    whole = shutil.copytree(sd, tmp_path / "whole")
    shutil.rmtree(whole / "vae")
    shutil.copytree(other, whole / "vae")
    assert loaded.base.hash == Base.at(whole).hash != Base.at(sd).hash
    assert Base.at(BaseConfig(model=str(sd), vae=str(sd))).hash == Base.at(sd).hash
    demo = Path(tav_opt.__file__).parent / "demo" / "model"
    for vae, message in {
        str(demo): "do not belong together: in_channels = 4, latent_channels = 6",
        "nowhere": "neither a directory nor a hub id",
        str(sd / "unet"): "UNet2DConditionModel is another kind of VAE",
        str(sd / "tokenizer"): "holds no config.json",
    }.items():
        with pytest.raises(InputError, match=message):
            Base.at(BaseConfig(model=str(sd), vae=vae))


def test_the_identity_is_of_contents_weights_and_words(files, words, sd, tmp_path):
    lora, word = files["kohya"][0], words["<cat>"]
    copy = shutil.copy(lora, tmp_path / "copy.safetensors")
    of = lambda **added: Base.at(BaseConfig(model=str(sd), **added)).hash  # noqa: E731
    assert of(loras=(lora,)) == of(loras=(f"{copy}:1",)) and of() == Base.at(sd).hash
    different = [
        of(),
        of(loras=(lora,)),
        of(loras=(f"{lora}:0.5",)),
        of(loras=(lora, lora)),
        of(loras=files["diffusers"]),
        of(embeddings=(word,)),
        of(embeddings=(f"{word}:<dog>",)),
        of(embeddings=(words["<web>"],)),
        of(loras=(lora,), embeddings=(word,)),
    ]
    assert len(set(different)) == len(different)


def test_the_identity_has_peft_s_strength_whatever_the_file_is_called(files, sd, tmp_path):
    folder = shutil.copytree(files["peft"][0], tmp_path / "peft")
    lora = (folder / "adapter_model.safetensors").rename(folder / "own.safetensors")
    of = lambda: Base.at(BaseConfig(model=str(sd), loras=(str(lora),))).hash  # noqa: E731
    told = read_json(folder / "adapter_config.json")
    before = of()
    write_json(folder / "adapter_config.json", told | {"lora_alpha": 1})
    assert of() != before
    shutil.copy(files["diffusers"][0], lora)  # has its own
    before = of()
    write_json(folder / "adapter_config.json", told)
    assert of() == before


def test_the_identity_has_the_words_of_a_tokenizer(sd, tmp_path):
    base = shutil.copytree(sd, tmp_path / "sd", copy_function=shutil.copyfile)
    shutil.rmtree(base / "tokenizer")
    ImageModel.load(Base.at(sd)).tokenizer.save_pretrained(base / "tokenizer")
    plain = Base.at(base).hash
    assert plain == Base.at(sd).hash, "of an ordinary tokenizer, in whichever files"
    (base / "tokenizer" / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(sd / "tokenizer" / name, base / "tokenizer" / name)
    assert Base.at(base).hash == plain
    write_json(base / "tokenizer" / "added_tokens.json", {"<cat>": 535})
    cat = Base.at(base).hash
    write_json(base / "tokenizer" / "added_tokens.json", {"<dog>": 535})
    assert len({plain, cat, Base.at(base).hash}) == 3
    write_json(base / "tokenizer" / "added_tokens.json", {"<dog>": "x"})
    with pytest.raises(InputError, match="holds no CLIP tokenizer"):
        _ = Base.at(base).hash


def test_the_identity_of_a_single_file_has_all_of_its_tokenizer(sd, tmp_path):
    save_file(owned.single_file(owned.pipeline(sd)), tmp_path / "own.safetensors")
    folder = shutil.copytree(sd, tmp_path / "sd", copy_function=shutil.copyfile)
    of = lambda: Base.at(BaseConfig(model=str(tmp_path / "own.safetensors"), model_config=str(folder))).hash  # noqa: E731
    before = of()
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"model_max_length": 16', '"model_max_length": 12'))
    assert of() != before


# From the command line to the server.


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    video.write(path, frames, 8)
    return path


@pytest.fixture(scope="module")
def tuned(sd, files, words, clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip that `tav-opt tune` tuned on a single file with a LoRA, a word of three vectors and a VAE."""
    folder = tmp_path_factory.mktemp("tuned")
    save_file(owned.single_file(owned.pipeline(sd)), folder / "own.safetensors")
    command = (
        f"tune --model {folder}/own.safetensors --model-config {sd} --lora {files['kohya'][0]}:0.6 --vae {sd}/vae "
        f"--embedding {words['<cat>']} --video {clip} --stride 1 --frames 2 --height 64 --width 64 --steps 2 "
        f"--lr 1e-3 --inversion-steps 2 --out {folder}/ckpt --device cpu"
    )
    assert cli.main([*command.split(), "--prompt", "<cat> is skiing"]) == 0
    return folder / "ckpt"


def test_a_checkpoint_keeps_what_it_was_tuned_on(tuned, sd, files, words):
    info = checkpoint.load(tuned).info
    lora, word = files["kohya"][0], words["<cat>"]
    assert info.additions == {
        "model_config": str(sd.resolve()),
        "loras": [f"{lora}:0.6"],
        "embeddings": [f"{word}:<cat>"],
        "vae": str((sd / "vae").resolve()),
    }
    assert info.base_hash == tav_opt.load(tuned).sd.base.hash
    assert models.load_video_unet(tuned).state_dict().keys() == tav_opt.load(tuned).sd.unet.state_dict().keys()


def test_a_checkpoint_refuses_another_base(tuned, sd, files, tmp_path, capsys):
    out = tmp_path / "e.mp4"
    for option in (f"--lora {files['kohya'][0]}:0.5", f"--lora {files['diffusers'][0]}:0.6", f"--base {sd}"):
        status = cli.main(f"edit {tuned} --prompt x --steps 2 --out {out} {option}".split())
        error = capsys.readouterr().err
        assert status == 2 and error.count("\n") == 1 and not out.exists(), error
        assert "the clip was tuned on" in error or "is for single files" in error, error


def test_edits_after_a_move_are_told_where(tuned, files, tmp_path, capsys):
    moved = shutil.copy(files["kohya"][0], tmp_path / "moved.safetensors")
    out = tmp_path / "e.mp4"
    edit = ["edit", str(tuned), "--prompt", "a <cat>", "--steps", "2", "--out", str(out)]
    assert cli.main([*edit, "--lora", f"{moved}:0.6"]) == 0 and out.exists()
    assert tav_opt.load(tuned, base=Additions(loras=f"{moved}:0.6")).info == checkpoint.load(tuned).info
    with pytest.raises(InputError, match="lora nowhere does not exist"):
        tav_opt.load(tuned, base=Additions(loras=("nowhere:0.6",)))


@pytest.fixture(scope="module")
def repository(tuned, clip, files, words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "repository"
    assert cli.main(["export", str(tuned), "--repository", str(folder), "--name", "personal"]) == 0
    return folder


@pytest.mark.full
def test_exported_clips_share_graphs_exactly_when_all_of_it_is_the_same(repository, tuned, sd, files, words, tmp_path):
    again = shutil.copytree(repository, tmp_path / "repository")
    assert not exporting.add(tuned, again, name="second").graphs
    assert len({clip.info.exported_base for clip in clips.clips(again)}) == 1
    info = checkpoint.load(tuned).info
    same = {"model": info.base, **info.additions}
    for change in ({"loras": (f"{files['kohya'][0]}:0.5",)}, {"embeddings": ()}, {"vae": None}):
        other = replace(info, base_hash=Base.at(BaseConfig(**{**same, **change})).hash)
        assert other.exported_base != info.exported_base, change


@pytest.fixture(scope="module")
def edits(tuned) -> np.ndarray:
    return tav_opt.edit(tav_opt.load(tuned), tav_opt.EditConfig(prompts=("a <cat>", "a panda"), steps=2))


@pytest.mark.full
def test_the_exported_clip_edits_as_the_checkpoint_does(repository, edits):
    engine = registry.open_clip(repository, "personal", threads=1)
    found = tav_opt.edit(engine, tav_opt.EditConfig(prompts=("a <cat>", "a panda"), steps=2))
    assert abs(found.astype(int) - edits).max() <= 1 and (edits[0] != edits[1]).mean() > 0.1


@pytest.fixture
def server(repository, tmp_path) -> Iterator[object]:
    with serving(repository, WorkerConfig(cache=tmp_path / "cache")) as running:
        yield running


@pytest.mark.full
def test_the_server_knows_the_word(server, edits):
    with tav_opt.Client(server.grpc_url) as client:
        found = client.edit("personal", tav_opt.EditConfig(prompts=("a <cat>", "a panda"), steps=2))
        with pytest.raises(InputError, match=r"tokens long, 16 at most; too much"):
            client.edit("personal", " ".join(["<cat>"] * 6))  # of three tokens each
    assert abs(found.frames.astype(int) - edits).max() <= 1


def test_tuning_goes_on_under_the_same_additions_alone(sd, files, clip, tmp_path):
    frames = video.read(clip).frames
    config = TrainConfig(steps=1, inversion_steps=2, keep_state=True)
    tune = lambda *loras, steps=1: tav_opt.tune(  # noqa: E731
        BaseConfig(model=str(sd), loras=loras),
        video.Clip(frames=frames, fps=8),
        "a panda",
        TrainConfig(**{**vars(config), "steps": steps}),
        tmp_path / "ckpt",
    )
    tune(files["kohya"][0])
    with pytest.raises(InputError, match="holds the state of a run with base"):
        tune(f"{files['kohya'][0]}:0.5", steps=2)
    assert len(tune(files["kohya"][0], steps=2).values)


def test_without_peft_it_says_what_to_install(files, sd, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    monkeypatch.setattr("diffusers.utils.import_utils._peft_available", False)
    with pytest.raises(InputError, match=r"needs peft: pip install 'tav-opt\[lora\]'"):
        image_model(sd, loras=files["kohya"])
    assert isinstance(image_model(sd).pipeline(Base.at(sd)), StableDiffusionPipeline)
