"""Every block of code in README, docs and docstrings runs: as it stands but for SUBSTITUTED, on a real server."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import owned
import pytest
import supervised
import torch
from controls import maps_of, write_adapter, write_controlnet
from exported import FRAMES, SIDE
from safetensors.torch import save_file
from suites import entry, settings, written

import tav_opt
from tav_opt import cli, client, video
from tav_opt.files import read_json
from tav_opt.suite.suite_file import read_suite

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCSTRINGS = (tav_opt, client.Client, client.AsyncClient, client.Stream)

SUBSTITUTED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "{model}",
    "make demo": "make --dry-run --directory {root} demo",
    "make test": "make --dry-run --directory {root} test",
    "tav-opt tune": "tav-opt tune --frames 4 --height 64 --width 64 --steps 2 --inversion-steps 4",
    "TrainConfig(steps=500)": "TrainConfig(steps=1, inversion_steps=2)",
    'prompts=("a panda is skiing",))': 'prompts=("a panda is skiing",), steps=2)',
    'edit(engine, "a panda is skiing")': 'edit(engine, EditConfig(prompts="a panda is skiing", steps=2))',
    "count=24, height=512, width=512": "count=4, height=64, width=64",
    "tav-opt personalise": "tav-opt personalise --steps 2 --device cpu",
    "--class-prompt": "--class-images 2 --draw-steps 2 --class-prompt",
    "a photo of": "a",
    "tav-opt edit": "tav-opt edit --steps 2",
    "spider man is skiing on the beach": "a man is skiing",
    "tav-opt request": "tav-opt request --url localhost:{grpc} --steps 2",
    "tav-opt serve": "in_background tav-opt serve --grpc-port {grpc} --http-port {http} --metrics-port {metrics}",
    "tav-opt probe": "tav-opt probe --http-url http://localhost:{http} --metrics-url http://localhost:{metrics}/metrics",
    "localhost:8001": "localhost:{grpc}",
    "localhost:8000": "localhost:{http}",
}
"""What the docs say, and what runs here: a small model of few tokens, few steps, no installation, free ports."""

HELM = "no cluster is here; test_chart.py renders the chart with such values"
NOT_RUN = {
    "python -m tav_opt.export ckpt/ --target tensorrt-rtx --arch sm89 sm120": "minutes; test_tensorrt.py runs it",
    "helm upgrade --install edits serving/deploy/chart --set image.repository=registry.example/tav-opt "
    "--set models.existingClaim=clips": HELM,
    "helm upgrade --install edits serving/deploy/chart --set models.pull.url=s3://bucket/clips "
    "--set models.pull.secretName=bucket-keys": HELM,
    "helm template edits serving/deploy/chart --set models.existingClaim=clips | kubectl apply -f -": HELM,
    "perf_analyzer -m tune_a_video -u localhost:8001 -i grpc --input-data examples/perf_analyzer.json "
    "--concurrency-range 1:4": "its wheel needs glibc 2.38; test_operating.py sends what it would",
    "python -m tav_opt.export ckpt/ --target tensorrt": "needs a GPU and TensorRT's libraries; test_tensorrt_gpu.py",
    "tav-opt export on-own/ --name own": "a minute, of a base of its own; test_additions.py runs it",
}
"""Lines that cannot run here, and why."""

FIRST = "README.md: Daily use, sh 1"
"""The block that makes the checkpoint, exports it, and starts the server that the others ask."""

IN_BACKGROUND = """
in_background() {
  "$@" > serve.log 2>&1 &
  echo $! > serve.pid
  until grep -q ^metrics serve.log; do kill -0 $! || { cat serve.log >&2; exit 1; }; sleep 0.1; done
}
"""


@dataclass(frozen=True)
class Block:
    """Some code, and where it stands."""

    name: str
    language: str
    code: str

    def lines(self) -> list[str]:
        """Its commands without the remarks behind them."""
        return [re.sub(r"\s+#.*", "", line) for line in self.code.splitlines()]


def blocks_of(page: Path) -> Iterator[Block]:
    counts: dict[tuple[str, str], int] = {}
    for chapter in re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE):
        for language, code in re.findall(r"^```(\w*)\n(.*?)^```", chapter, re.DOTALL | re.MULTILINE):
            place = (chapter.partition("\n")[0], language or "sh")
            counts[place] = counts.get(place, 0) + 1
            yield Block(f"{page.name}: {', '.join(place)} {counts[place]}", place[1], code)


def block_of(documented: Any) -> Block:
    """The code of a docstring, which is all below its first sentence."""
    return Block(f"{documented.__name__}.__doc__", "python", inspect.getdoc(documented).partition("\n\n")[2])


BLOCKS = {block.name: block for block in [*(b for page in PAGES for b in blocks_of(page)), *map(block_of, DOCSTRINGS)]}


@dataclass
class World:
    """A user's folder, and where the server of FIRST listens."""

    folder: Path
    places: dict[str, str]
    shown: str = ""

    def substituted(self, block: Block) -> str:
        code = "\n".join(line for line in block.lines() if line not in NOT_RUN)
        for said, done in SUBSTITUTED.items():
            code = code.replace(said, done.format(**self.places))
        return code

    def shell(self, block: Block) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        command = ["bash", "-ec", IN_BACKGROUND + self.substituted(block)]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, "PATH": path, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def python(self, block: Block) -> dict[str, Any]:
        """Runs code, which may await, and gives its names."""
        names: dict[str, Any] = {name: getattr(tav_opt, name) for name in tav_opt.__all__}
        with pytest.MonkeyPatch.context() as patch, tav_opt.Client(f"localhost:{self.places['grpc']}") as connected:
            patch.chdir(self.folder)
            names["client"] = connected
            code = compile(self.substituted(block), block.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            if (waiting := eval(code, names)) is not None:
                asyncio.run(waiting)
        return names


@pytest.fixture(scope="module")
def world(golden, tmp_path_factory) -> Iterator[World]:
    """The folder in which FIRST has run. Its base is there already, exported once for all tests."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(supervised.repository(golden, tmp_path_factory.getbasetemp()), folder / "serving/model_repository")
    random = np.random.default_rng(0)
    video.write(folder / "man-skiing.mp4", random.integers(0, 256, (8, 96, 64, 3), dtype=np.uint8), 12)
    video.write(folder / "other.mp4", random.integers(0, 256, (9, 64, 128, 3), dtype=np.uint8), 10)
    ports = dict(zip(("grpc", "http", "metrics"), map(str, free_ports(3)), strict=True))
    model = str(golden / "reference_checkpoint" / "sd")
    found = World(folder, {"model": model, "root": str(ROOT), **ports})
    try:
        found.shown = found.shell(BLOCKS[FIRST])
        yield found
    finally:
        if (folder / "serve.pid").exists():
            end(int((folder / "serve.pid").read_text()))


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


def end(server: int) -> None:
    """Waits until a process that is no child of ours has gone."""
    os.kill(server, signal.SIGTERM)
    for _ in range(600):
        try:
            os.kill(server, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(server, signal.SIGKILL)


# What each block must have done.


def frames_of(path: Path) -> tuple[int, ...]:
    return video.read(path).frames.shape


def daily_use(world: World) -> None:
    assert frames_of(world.folder / "edit.mp4") == (FRAMES, SIDE, SIDE, 3)
    shown = world.shown.splitlines()
    assert shown.count("edit.mp4") == 3 and "checkpoint: ckpt" in shown
    assert (world.folder / "serving/model_repository/tune_a_video_stream/1/clips/man-skiing/manifest.json").is_file()


def made(world: World) -> None:
    assert "tav-opt demo" in (shown := world.shell(BLOCKS["README.md: tav-opt, sh 1"])) and "pytest" in shown


def edited(name: str, variable: str = "edit.frames") -> Any:
    def check(world: World) -> None:
        frames = eval(variable, world.python(BLOCKS[name]))
        assert frames.shape == (1, FRAMES, SIDE, SIDE, 3) and frames.dtype == np.uint8

    return check


def streamed(world: World) -> None:
    events = re.findall(r"^data: (.*)$", world.shell(BLOCKS["serving.md: Over HTTP, sh 1"]), re.MULTILINE)
    assert '"stage":"sample","step":1,"steps":30' in events[0]
    assert '"frames":[' in events[-1]


def fetched(world: World) -> None:
    (world.folder / "edit.mp4").unlink()
    world.shell(BLOCKS["serving.md: Over HTTP, sh 2"])
    assert frames_of(world.folder / "edit.mp4") == (FRAMES, SIDE, SIDE, 3)


def probed(world: World) -> None:
    # Busy while an edit of a block before ends, whose client has gone.
    assert world.shell(BLOCKS["serving.md: Health, sh 1"]).startswith(("alive: ", "busy: "))


def measured(world: World) -> None:
    """The edit that FIRST made last; the demo's encoder where OpenAI's is not to be had, and either way named."""
    shown = world.shell(BLOCKS["metrics.md: Metrics, sh 1"])
    told = read_json(world.folder / "edit.json")
    assert told["networks"]["encoder"] in shown and -1 <= told["metrics"]["frame consistency"] <= 1
    assert told["left_out"]["background PSNR"] == "no mask is given" and "left out: no mask is given" in shown


def prepared(world: World) -> None:
    world.python(BLOCKS["metrics.md: Metrics, python 1"])
    assert frames_of(world.folder / "source.mp4") == (FRAMES, SIDE, SIDE, 3)


def measured_in_python(world: World) -> None:
    found = world.python(BLOCKS["metrics.md: Metrics, python 2"])["measured"]
    assert "frame consistency" in found.values and "frame accuracy" in found.left_out


def edited_cheaply(world: World) -> None:
    world.shell(BLOCKS["presets.md: Cheaper edits, sh 1"])
    for name in ("quick.mp4", "draft.mp4"):
        assert frames_of(world.folder / name) == (FRAMES, SIDE, SIDE, 3)


def told(world: World) -> None:
    """The checkpoint, and the edit that FIRST made last."""
    shown = world.shell(BLOCKS["sharing.md: Sharing a clip, sh 1"])
    assert re.search(r"^caption +a man is skiing$", shown, re.MULTILINE) and "memory:" in shown
    assert '"clip": "man-skiing"' in shown and '"kind": "edit"' in shown


def nothing(name: str) -> Any:
    def check(world: World) -> None:
        assert not world.shell(BLOCKS[name])

    return check


def edited_from_a_refined_inversion(world: World) -> None:
    world.shell(BLOCKS["inversion.md: Inversion that comes back, sh 1"])
    assert frames_of(world.folder / "refined.mp4") == (FRAMES, SIDE, SIDE, 3)


def edited_at_another_speed(world: World) -> None:
    world.shell(BLOCKS["sound.md: Sound and speed, sh 1"])
    assert video.read(world.folder / "slow.mp4").fps == 4


def evaluated(world: World) -> None:
    suite = settings(world.places["model"], videos=[entry("man-skiing.mp4")])
    written(world.folder, suite)
    shown = world.shell(BLOCKS["suite.md: Suites: many clips, compared, sh 1"])
    page = world.folder / "runs/first/report/index.html"
    assert page.is_file() and "runs/first/report/index.html" in shown and "ESTIMATE, not a measurement" in shown


def read_as_a_suite(world: World) -> None:
    found = read_suite(written(world.folder, BLOCKS["suite.md: The file, yaml 1"].code, "documented.yaml"))
    assert len(found.methods) == 7 and found.videos[0].clip.stride == 1 and found.methods[2].edit.guidance_scale == 7.5


def of_ones_own(world: World) -> None:
    """What the page takes for granted is written first, by the programs of those who have it."""
    sd, folder = Path(world.places["model"]), world.folder
    pipeline = owned.pipeline(sd)
    for name in ("sd15", "vae"):
        shutil.copytree(sd if name == "sd15" else sd / "vae", folder / name, dirs_exist_ok=True)
    save_file(owned.single_file(pipeline), folder / "own.safetensors")
    torch.save({"*": torch.ones(2, 32)}, folder / "cat.pt")
    networks = {part: owned.lora_network(owned.pipeline(sd), part) for part in ("unet", "text_encoder")}
    owned.of_kohya(networks, folder / "style.safetensors")
    owned.of_peft(networks["unet"], folder / "hat")
    world.shell(BLOCKS["bases.md: Bases of your own, sh 1"])
    assert frames_of(folder / "own.mp4") == (FRAMES, SIDE, SIDE, 3)


def followed(world: World) -> None:
    """The video to follow, and networks for the clip's base, are written first."""
    pytest.importorskip("cv2")
    sd, folder = Path(world.places["model"]), world.folder
    write_controlnet(sd, folder / "controlnet-canny", 1)
    write_adapter(sd, folder / "adapter-canny", 2)
    video.write(folder / "dance.mp4", maps_of(FRAMES, SIDE, SIDE, 3), 8)
    world.shell(BLOCKS["conditions.md: Edits that follow maps, sh 1"])
    for name in ("edges.mp4", "followed.mp4", "kept.mp4", "served.mp4"):
        assert frames_of(folder / name) == (FRAMES, SIDE, SIDE, 3)


def personalised(world: World) -> None:
    for number in range(3):
        picture = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        video.write_png(world.folder / "pictures" / f"{number}.png", picture)
    world.shell(BLOCKS["bases.md: A subject of your own, sh 1"])
    assert (world.folder / "sks" / "model_index.json").is_file()
    assert tav_opt.load(world.folder / "on-sks").info.additions["loras"]


CHECKS = {
    FIRST: daily_use,
    "README.md: tav-opt, sh 1": made,
    "README.md: Daily use, python 1": edited("README.md: Daily use, python 1", "frames"),
    "inversion.md: Inversion that comes back, sh 1": edited_from_a_refined_inversion,
    "bases.md: Bases of your own, sh 1": of_ones_own,
    "bases.md: Bases of your own, python 1": edited("bases.md: Bases of your own, python 1", "frames"),
    "bases.md: A subject of your own, sh 1": personalised,
    "conditions.md: Edits that follow maps, sh 1": followed,
    "conditions.md: Edits that follow maps, python 1": edited(
        "conditions.md: Edits that follow maps, python 1", "frames"
    ),
    "metrics.md: Metrics, python 1": prepared,
    "metrics.md: Metrics, sh 1": measured,
    "metrics.md: Metrics, python 2": measured_in_python,
    "presets.md: Cheaper edits, sh 1": edited_cheaply,
    "presets.md: Cheaper edits, python 1": edited("presets.md: Cheaper edits, python 1", "frames"),
    "serving.md: From Python, with this package, python 1": edited(
        "serving.md: From Python, with this package, python 1"
    ),
    "serving.md: Over HTTP, sh 1": streamed,
    "serving.md: Over HTTP, sh 2": fetched,
    "serving.md: Health, sh 1": probed,
    "kubernetes.md: On Kubernetes, sh 1": nothing("kubernetes.md: On Kubernetes, sh 1"),
    "operating.md: Load, sh 1": nothing("operating.md: Load, sh 1"),
    "sharing.md: Sharing a clip, sh 1": told,
    "sound.md: Sound and speed, sh 1": edited_at_another_speed,
    "suite.md: Suites: many clips, compared, sh 1": evaluated,
    "suite.md: The file, yaml 1": read_as_a_suite,
    "tensorrt.md: TensorRT, sh 1": nothing("tensorrt.md: TensorRT, sh 1"),
    "tav_opt.__doc__": edited("tav_opt.__doc__"),
    "Client.__doc__": edited("Client.__doc__"),
    "AsyncClient.__doc__": edited("AsyncClient.__doc__"),
    "Stream.__doc__": edited("Stream.__doc__"),
}


def test_no_block_is_left_out_and_none_is_listed_that_is_gone():
    assert set(CHECKS) == set(BLOCKS)
    lines = [line for block in BLOCKS.values() for line in block.lines()]
    assert not [line for line in NOT_RUN if line not in lines]
    assert not [said for said in SUBSTITUTED if not any(said in line for line in lines)]


@pytest.mark.parametrize("name", CHECKS)
def test_it_runs_as_it_stands(world, name):
    if "curl" in BLOCKS[name].code and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    CHECKS[name](world)


def test_the_example_runs(world):
    command = [sys.executable, ROOT / "examples" / "plain_client.py", f"localhost:{world.places['grpc']}"]
    subprocess.run([*command, "man-skiing", "a panda", "frames.npy"], cwd=world.folder, check=True, capture_output=True)
    assert np.load(world.folder / "frames.npy").shape == (1, FRAMES, SIDE, SIDE, 3)


# What stands between the blocks.


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_named_exist(page):
    assert not set(re.findall(r"tav-opt ([a-z]+)", page.read_text())) - set(cli.COMMANDS)


def test_no_hub_id_is_one_that_is_gone():
    for path in (p for kind in ("*.py", "*.md", "*.yaml") for p in ROOT.rglob(kind) if ".venv" not in p.parts):
        assert "runwayml" + "/" not in path.read_text(), path
