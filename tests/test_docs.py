"""Every block of code in README, docs and docstrings runs: as it stands but for SUBSTITUTED, on a real server."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
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
import preloaded
import pytest
import supervised
import torch
from controls import maps_of, write_adapter, write_controlnet
from exported import FRAMES, SIDE
from safetensors.torch import save_file
from suites import FRAMES as SUITE_FRAMES
from suites import entry, random_video, settings, written

import tav_opt
from tav_opt import cli, client, video
from tav_opt.files import read_json
from tav_opt.suite import study as studies
from tav_opt.suite.suite_file import read_suite

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCSTRINGS = (tav_opt, client.Client, client.AsyncClient, client.Stream)

SUBSTITUTED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "{model}",
    "make demo": "make --dry-run --directory {root} demo",
    "make test": "make --dry-run --directory {root} test",
    "tav_opt/demo/": "{root}/tav_opt/demo/",
    "--steps 200": "--steps 1",
    "--steps 500": "--steps 3",
    "--preview-every 100": "--preview-every 1",
    "--frames 96 --window 24": "--frames 7 --window 4",
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
    "tav-opt api": "api_in_background tav-opt api --url localhost:{grpc} --port {api}",
    '"seed": 7': '"seed": 7, "steps": 2',
    "localhost:8080": "localhost:{api}",
    "-F steps=30": "-F steps=2",
    "tav-opt probe": "tav-opt probe --http-url http://localhost:{http} --metrics-url http://localhost:{metrics}/metrics",
    "localhost:8001": "localhost:{grpc}",
    "localhost:8000": "localhost:{http}",
}
"""What the docs say, and what runs here: a small model of few tokens, few steps, no installation, free ports."""

HELM = "no cluster is here; test_chart.py renders the chart with such values"
DAILY = "README's first block runs the same, into another folder"
REFERENCE = "a minute, of a base of its own; test_export.py exports what the reference saved"
CERTIFICATES = "another machine and its certificates; test_faults.py makes some"
PAGE = "it stays open; test_app.py and test_app_browser.py open it"
NOT_RUN = {
    "python -m tav_opt.export ckpt/ --target tensorrt-rtx --arch sm89 sm120": "minutes; test_tensorrt.py runs it",
    "helm upgrade --install edits serving/deploy/chart --set image.repository=registry.example/tav-opt "
    "--set models.existingClaim=clips": HELM,
    "helm upgrade --install edits serving/deploy/chart --set models.pull.url=s3://bucket/clips "
    "--set models.pull.secretName=bucket-keys": HELM,
    "helm template edits serving/deploy/chart --set models.existingClaim=clips | kubectl apply -f -": HELM,
    "perf_analyzer -m tune_a_video -u localhost:8001 -i grpc --input-data examples/perf_analyzer.json "
    "--concurrency-range 1:4": "its wheel needs glibc 2.38; test_operating.py sends what it would",
    "AIPERF_HTTP_VIDEO_POLL_INTERVAL=10 aiperf profile --model demo --url http://localhost:8080 "
    "--endpoint-type video_generation --tokenizer tav_opt/demo/model/tokenizer --custom-dataset-type single_turn "
    "--input-file prompts.jsonl --download-video-content --ui none --concurrency 2 --request-count 6 "
    "--extra-inputs num_inference_steps:5 --extra-inputs guidance_scale:2.5": "minutes; test_api_aiperf.py runs it",
    "python -m tav_opt.export ckpt/ --target tensorrt": "needs a GPU and TensorRT's libraries; test_tensorrt_gpu.py",
    "tav-opt study serve study/ --host 0.0.0.0": "listens until it is told to stop; test_study.py asks it",
    "pip install 'tav-opt[app]'": PAGE,
    "tav-opt app": PAGE,
    "tav-opt app --in-process --repository demo-out/model_repository": PAGE,
    "tav-opt export on-own/ --name own": "a minute, of a base of its own; test_additions.py runs it",
    "tav-opt tune --model stable-diffusion-v1-5/stable-diffusion-v1-5 --video man-skiing.mp4 "
    '--prompt "a man is skiing" --out skiing/': DAILY,
    'tav-opt edit skiing/ --prompt "a panda is skiing" --out panda.mp4': DAILY,
    'python -m tav_opt.export outputs/man-skiing --video man-skiing.mp4 --prompt "a man is skiing" --fit squash --name '
    "from-reference": REFERENCE,
    'tav-opt edit serving/model_repository/tune_a_video_stream/1/clips/from-reference --prompt "a panda is skiing" '
    "--out panda.mp4": REFERENCE,
    "tav-opt serve --host 0.0.0.0 --tls-certificate server.pem --tls-key server.key": CERTIFICATES,
    'tav-opt request --url laptop.local:8001 --root-certificates ca.pem --clip skiing --prompt "a panda is skiing" '
    "--out panda.mp4": CERTIFICATES,
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
api_in_background() {
  "$@" > api.log 2>&1 &
  echo $! > api.pid
  until grep -q ^ready api.log; do kill -0 $! || { cat api.log >&2; exit 1; }; sleep 0.1; done
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
    below = (inspect.getdoc(documented) or "").partition("\n\n")[2]
    return Block(f"{documented.__name__}.__doc__", "python", re.sub(r"^```\w*$", "", below, flags=re.MULTILINE))


BLOCKS = {block.name: block for block in [*(b for page in PAGES for b in blocks_of(page)), *map(block_of, DOCSTRINGS)]}


@dataclass
class World:
    """A user's folder, and where the server of FIRST listens."""

    folder: Path
    places: dict[str, str]
    preloaded: Path
    """Stands before what is installed."""
    shown: str = ""

    def substituted(self, block: Block) -> str:
        code = "\n".join(line for line in block.lines() if line not in NOT_RUN)
        for said, done in SUBSTITUTED.items():
            code = code.replace(said, done.format(**self.places))
        return code

    def shell(self, block: Block) -> str:
        """Runs it; README's commands are the installed ones, the others' are spared their imports."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        path = path if block.name.startswith("README") else f"{self.preloaded}:{path}"
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
def world(golden, shallow, tmp_path_factory) -> Iterator[World]:
    """The folder in which FIRST has run. Its base is there already, exported once for all tests."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(supervised.repository(golden, tmp_path_factory.getbasetemp()), folder / "serving/model_repository")
    random = np.random.default_rng(0)
    video.write(folder / "man-skiing.mp4", random.integers(0, 256, (8, 96, 64, 3), dtype=np.uint8), 12)
    video.write(folder / "other.mp4", random.integers(0, 256, (9, 64, 128, 3), dtype=np.uint8), 10)
    ports = dict(zip(("grpc", "http", "metrics", "api"), map(str, free_ports(4)), strict=True))
    with preloaded.commands(tmp_path_factory.mktemp("commands")) as commands:
        found = World(folder, {"model": str(shallow), "root": str(ROOT), **ports}, commands)
        try:
            found.shown = found.shell(BLOCKS[FIRST])
            yield found
        finally:
            for name in ("api.pid", "serve.pid"):
                if (folder / name).exists():
                    end(int((folder / name).read_text()))


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


def end(server: int) -> None:
    """Waits until a process that is no child of ours has gone."""
    for number in (signal.SIGTERM, *[0] * 600):
        try:
            os.kill(server, number)
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


def demo_made(world: World) -> None:
    assert "tav-opt demo" in world.shell(BLOCKS["first-edit.md: First edit in five minutes, sh 1"])


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


def kept(world: World) -> None:
    world.shell(BLOCKS["attention-control.md: What an edit keeps, sh 1"])
    for name in ("kept.mp4", "moved.mp4"):
        assert frames_of(world.folder / name) == (FRAMES, SIDE, SIDE, 3)


def kept_by_hand(world: World) -> None:
    world.shell(BLOCKS["attention-control.md: What the two are made of, sh 1"])
    assert frames_of(world.folder / "by-hand.mp4") == (FRAMES, SIDE, SIDE, 3)


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


def edited_over_windows(world: World) -> None:
    world.shell(BLOCKS["long-clips.md: Long clips, sh 1"])
    assert frames_of(world.folder / "long.mp4") == (7, SIDE, SIDE, 3)


def edited_inside_a_mask(world: World) -> None:
    picture = np.zeros((96, 64, 3), np.uint8)
    picture[:, :32] = 255
    video.write_png(world.folder / "mask.png", picture)
    world.shell(BLOCKS["long-clips.md: Masks, sh 1"])
    for name in ("masked.mp4", "served.mp4"):
        assert frames_of(world.folder / name) == (FRAMES, SIDE, SIDE, 3)
        assert video.settings_of(world.folder / name)["masked"] is True


def edited_at_the_sources_size(world: World) -> None:
    world.shell(BLOCKS["long-clips.md: The source's size, sh 1"])
    assert frames_of(world.folder / "as-large.mp4") == (FRAMES, 96, 64, 3)


def edited_at_another_speed(world: World) -> None:
    world.shell(BLOCKS["sound.md: Sound and speed, sh 1"])
    assert video.read(world.folder / "slow.mp4").fps == 4


def evaluated(world: World) -> None:
    suite = settings(world.places["model"], videos=[entry("man-skiing.mp4")])
    written(world.folder, suite)
    shown = world.shell(BLOCKS["suite.md: Suites: many clips, compared, sh 1"])
    page = world.folder / "runs/first/report/index.html"
    assert page.is_file() and "runs/first/report/index.html" in shown and "ESTIMATE, not a measurement" in shown


def asked(world: World) -> None:
    """Of two methods: finished videos stand in for the second, which takes long."""
    (world.folder / "done" / "man-skiing").mkdir(parents=True)
    random_video(world.folder / "done" / "man-skiing" / "subject.mp4", SUITE_FRAMES)
    kinds = {"ours": {}, "per-frame": {"kind": "folder", "folder": "done"}}
    suite = written(world.folder, settings(world.places["model"], videos=[entry("man-skiing.mp4")], methods=kinds))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world.folder)
        assert cli.main(["evaluate", suite.name, "--out", "runs/first/"]) == 0
    shown = world.shell(BLOCKS["suite.md: Asking people, sh 1"])
    assert "1 pair, 5 raters each" in shown and (world.folder / "study" / "page" / "index.html").is_file()


def counted(world: World) -> None:
    if not (world.folder / "study").exists():
        asked(world)
    study = studies.read(world.folder / "study")
    answers = [
        {"item": item.item, "question": question, "chosen": "a", "left": "a"}
        for item in study.items
        for question in studies.QUESTIONS
    ]
    for rater in range(5):
        told = {"study": study.study, "rater": f"r{rater}", "token": "0", "at": "2024-01-01", "answers": answers}
        (world.folder / "study" / "answers" / f"{rater}.json").write_text(json.dumps(told))
    shown = world.shell(BLOCKS["suite.md: Asking people, sh 2"])
    assert "| per-frame | textual alignment | 1 | " in shown and (world.folder / "study" / "tally.json").is_file()


def tuned_and_exported_together(world: World) -> None:
    (world.folder / "clips.csv").write_text("video,prompt,name\nman-skiing.mp4,a man is skiing,together\n")
    shown = world.shell(BLOCKS["suite.md: Only checkpoints, sh 1"])
    assert "ckpts/together" in shown and "serving/model_repository/tune_a_video_stream/1/clips/together" in shown


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


def first_edited(world: World) -> None:
    """The package's own model, by hand: the source and two edits side by side."""
    world.shell(BLOCKS["first-edit.md: The same by hand, sh 1"])
    frames, height, width, _ = frames_of(world.folder / "edits.gif")
    assert frames == FRAMES and width > 2.5 * height


def looked_at(world: World) -> None:
    """Tuned, looked at, tuned on: the second command goes on from the first one's last step."""
    shown = world.shell(BLOCKS["tuning-well.md: Before you tune, sh 1"])
    previews = sorted(path.name for path in (world.folder / "looked-at" / "previews").iterdir())
    assert previews == [f"step-{number:05}.png" for number in (1, 2, 3)], shown
    assert tav_opt.load(world.folder / "looked-at").info.prompt == "a man is skiing"


def served_at_home(world: World) -> None:
    world.shell(BLOCKS["laptop.md: Serving on a laptop, sh 1"])
    assert frames_of(world.folder / "panda.mp4") == (FRAMES, SIDE, SIDE, 3)


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


def made_by_openai(world: World) -> None:
    """By the API that the block before started."""
    world.python(BLOCKS["api.md: OpenAI's videos API, python 1"])
    assert frames_of(world.folder / "panda.mp4") == (FRAMES, SIDE, SIDE, 3)


def edited_over_http(world: World) -> None:
    """By the API that the block before started."""
    job = json.loads(world.shell(BLOCKS["api.md: OpenAI's videos API, sh 2"]))
    assert job["object"] == "video" and job["status"] in ("queued", "in_progress")


CHECKS = {
    FIRST: daily_use,
    "api.md: OpenAI's videos API, sh 1": nothing("api.md: OpenAI's videos API, sh 1"),
    "api.md: OpenAI's videos API, python 1": made_by_openai,
    "api.md: OpenAI's videos API, sh 2": edited_over_http,
    "api.md: Measured by NVIDIA's aiperf, sh 1": nothing("api.md: Measured by NVIDIA's aiperf, sh 1"),
    "README.md: tav-opt, sh 1": made,
    "README.md: Daily use, python 1": edited("README.md: Daily use, python 1", "frames"),
    "first-edit.md: First edit in five minutes, sh 1": demo_made,
    "first-edit.md: The same by hand, sh 1": first_edited,
    "first-edit.md: A clip of your own, sh 1": nothing("first-edit.md: A clip of your own, sh 1"),
    "tuning-well.md: Before you tune, sh 1": looked_at,
    "laptop.md: Serving on a laptop, sh 1": served_at_home,
    "laptop.md: For others in the house, sh 1": nothing("laptop.md: For others in the house, sh 1"),
    "migration.md: Your checkpoints, sh 1": nothing("migration.md: Your checkpoints, sh 1"),
    "python.md: Python, python 1": edited("python.md: Python, python 1", "frames"),
    "inversion.md: Inversion that comes back, sh 1": edited_from_a_refined_inversion,
    "long-clips.md: Long clips, sh 1": edited_over_windows,
    "long-clips.md: Masks, sh 1": edited_inside_a_mask,
    "long-clips.md: The source's size, sh 1": edited_at_the_sources_size,
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
    "page.md: The page, sh 1": nothing("page.md: The page, sh 1"),
    "attention-control.md: What an edit keeps, sh 1": kept,
    "attention-control.md: What the two are made of, sh 1": kept_by_hand,
    "attention-control.md: What an edit keeps, python 1": edited(
        "attention-control.md: What an edit keeps, python 1", "frames"
    ),
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
    "suite.md: Asking people, sh 1": asked,
    "suite.md: Asking people, sh 2": counted,
    "suite.md: Only checkpoints, sh 1": tuned_and_exported_together,
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
