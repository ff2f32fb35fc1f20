"""What no client of ours sends: a generated sweep over every input, and hostile videos, against the real server."""

from __future__ import annotations

import io
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from encoded import SOURCES, lossless, mutated
from exported import FRAMES, SIDE, Exported, export_once
from served import Answer, Raw, Wire, metrics, processes, raw, serving

from tav_opt import editing
from tav_opt.config import EditConfig, WorkerConfig
from tav_opt.contract import NUMPY, STREAM_INPUTS, STREAM_MODEL, UNARY_INPUTS, UNARY_MODEL, ServedTensor, to_tensors
from tav_opt.engines.registry import open_clip
from tav_opt.serving.host.server import Server

ONE = EditConfig(prompts=("a panda is skiing",), steps=1, guidance_scale=7.5)
WIRE = {"STRING": "BYTES"}
"""Data types whose names differ on the wire."""


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def server(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hostile")
    repository = Path(shutil.copytree(exported.repository, folder / "repository"))
    with serving(repository, WorkerConfig(cache=folder / "cache", decode_seconds=10)) as running:
        yield running


@pytest.fixture(scope="module")
def expected(exported: Exported) -> np.ndarray:
    return editing.edit(open_clip(exported.repository, "first", threads=1), ONE)


@pytest.fixture
def wire(server: Server, expected: np.ndarray) -> Iterator[Wire]:
    """Afterwards the server's processes are those from before, and a good request gets the right answer."""
    before = processes(server)
    with Wire(server.grpc_url) as connected:
        yield connected
        assert_right(connected, expected)
    assert processes(server) == before, "a process of the server was lost"


def assert_right(wire: Wire, expected: np.ndarray) -> None:
    good = wire.ask(raw(to_tensors("first", ONE)))
    assert good.status == "OK", good.message
    difference = np.abs(good.last["frames"].astype(int) - expected)
    assert difference.mean() <= 0.05 and difference.max() <= 2


# Malformed: no reading of it makes sense.


def sizes(tensor: ServedTensor) -> tuple[int, ...]:
    """A shape that the clip takes."""
    return (FRAMES, SIDE, SIDE, 3) if len(tensor.shape) == 4 else (1,)


def item(datatype: str) -> bytes:
    widths = {"BOOL": 1, "UINT8": 1, "INT8": 1, "FP16": 2, "FP32": 4, "INT32": 4, "FP64": 8, "INT64": 8, "UINT64": 8}
    return struct.pack("<I", 1) + b"a" if datatype == "BYTES" else b"\1" + b"\0" * (widths[datatype] - 1)


def malformed(tensor: ServedTensor) -> Iterator[tuple[str, Raw]]:
    """Another dtype, rank, size; a content that is shorter or longer than it says."""
    own, shape = WIRE.get(tensor.dtype, tensor.dtype), sizes(tensor)
    count = int(np.prod(shape))
    for other in ("BYTES", "BOOL", "UINT8", "FP16", "FP32", "INT32", "FP64", "INT64", "UINT64", "NONSENSE", ""):
        if other != own:
            data = item(other) if other in ("BYTES", "BOOL", "UINT8", "FP16") else b"\1" * 8
            yield f"dtype {other}", Raw(other, shape, data * (count if other == "BYTES" else 1))
    whole = item(own) * count
    for wrong in ((), (1, *shape), (*shape, 1), (0,), (0, *shape[1:]), (-1, *shape[1:]), (-(2**62), *shape[1:])):
        if not (wrong == (0,) and len(shape) == 1 and tensor.name == "prompt"):
            yield f"shape {wrong}", Raw(own, wrong, whole)
    for huge in (2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1):
        yield f"shape {huge}", Raw(own, (huge, *shape[1:]), whole)
    if tensor.shape == (1,):
        yield "two", Raw(own, (2,), whole * 2)
    for label, data in (("no content", b""), ("short", whole[:-1]), ("long", whole + b"\0"), ("twice", whole * 2)):
        yield label, Raw(own, shape, data)
    yield "no dimension, no content", Raw(own, (0,) * len(shape), b"")


def lying_strings(tensor: ServedTensor) -> Iterator[tuple[str, Raw]]:
    """The length before a string is not its length."""
    for length in (0, 2, 2**31 - 1, 2**31, 2**32 - 1):
        yield f"length {length}", Raw("BYTES", (1,), struct.pack("<I", length) + b"a")
    yield "half a length", Raw("BYTES", (1,), b"\1\0")


BAD_MASKS = [
    lossless(np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8)),  # nothing may change
    lossless(np.full((FRAMES - 1, SIDE, SIDE, 3), 255, np.uint8)),
    lossless(np.full((FRAMES, SIDE, SIDE // 2, 3), 255, np.uint8)),
    lossless(np.full((FRAMES, SIDE, SIDE, 3), 255, np.uint8))[:-300],
]

BAD_VALUES: dict[str, list[object]] = {
    "clip": [b"", b"../first", b"/etc/passwd", b"first\0", b"FIRST", b"\xff\xfe", b"x" * 5000, b"%s%n", b"."],
    "prompt": [b"", b" \t\n", b"\xff", b"\xc3", b"a" * 5000, b"skiing " * 100, "skiing\u0000 ".encode() * 99],
    "negative_prompt": [b"\xff\xfe", b"a" * 5000, b"skiing " * 100],
    "steps": [0, -1, 1001, 2**31 - 1, -(2**31)],
    "guidance_scale": [np.nan, np.inf, -np.inf, -1, 101, 3e38],
    "eta": [np.nan, np.inf, -np.inf, -0.1, 1.1, -3e38],
    "seed": [2**63, 2**64 - 1],
    "inversion_steps": [0, -1, 1001, 2**31 - 1, -(2**31)],
    "inversion_iterations": [-1, 101, 2**31 - 1, -(2**31)],
    "preset": [b"", b"quick", b"FAST", b"\xff", b"fast\0", b"f" * 5000],
    "solver": [b"", b"euler", b"DDIM", b"\xff", b"ddim\0", b"u" * 5000],
    "guidance_interval": [0, -1, 1001, 2**31 - 1, -(2**31)],
    "reuse_interval": [0, -1, 1001, 2**31 - 1, -(2**31), 2],  # without the graphs for it
    "keep": [b"", b"sound", b"MOTION", b"\xff", b"motion\0", b"m" * 5000],
    "source_prompt": [b"", b" \t\n", b"a cat", b"\xff", b"a" * 5000],  # without what looks at the source
    "replace_cross": [np.nan, np.inf, -np.inf, -0.1, 1.1],
    "replace_self": [np.nan, np.inf, -np.inf, -0.1, 1.1],
    "blend_words": [b"", b"lion", b"lion#2", b"\xff", b"l" * 5000],
    "word_weights": [b"", b"lion", b"lion:2", b"panda:nan", b"panda:-1", b"panda:101", b"\xff:1", b"l" * 5000],
    "direct_inversion": [],  # false is as absent, true without what looks at the source is refused
    "preview_interval": [-1, -(2**31)],
    "output": [b"", b"gif", b"MP4", b"\xff", b"frames\0", b"f" * 5000],
    "fps": [np.nan, np.inf, -np.inf, -1, 0, 1001],
    "video": [b"", b"\0", b"nonsense", b"\xff" * 10_000, b"<svg/>", b"#EXTM3U\nfile:///etc/passwd\n"],
    "mask": [b"", b"\0", b"nonsense", b"\xff" * 10_000, b"<svg/>", b"#EXTM3U\nfile:///etc/passwd\n", *BAD_MASKS],
    "inversion": [],  # every byte is read as true or false
    "prompt_metadata": [],
    # Without the others, or of a base that has no networks.
    "control": [b"", b"pose", b"../pose", b"\xff", b"p" * 5000],
    "control_video": [b"", b"nonsense"],
    "control_scale": [np.nan, 1, -1],
    "control_start": [np.nan, 0],
    "control_end": [np.nan, 1],
    "control_inversion": [True],
    "source_frames": [],  # every byte is a colour
}


def values(tensor: ServedTensor) -> Iterator[tuple[str, Raw]]:
    for value in BAD_VALUES[tensor.name]:
        array = np.array([value], NUMPY[tensor.dtype])
        yield f"value {value!r}"[:60], raw({tensor.name: array})[tensor.name]
    if tensor.name == "prompt":
        yield "nine", raw({"prompt": np.array([b"x"] * 9, np.object_)})["prompt"]
    if len(tensor.shape) == 4:
        for shape in ((FRAMES - 1, SIDE, SIDE, 3), (FRAMES, SIDE, SIDE, 4), (FRAMES, 1, SIDE * SIDE, 3), (1, 1, 1, 3)):
            yield f"size {shape}", Raw("UINT8", shape, bytes(int(np.prod(shape))))


def sweep(tensor: ServedTensor) -> Iterator[tuple[str, Raw]]:
    yield from malformed(tensor)
    if tensor.dtype == "STRING":
        yield from lying_strings(tensor)
    yield from values(tensor)


def refusals(wire: Wire, model: str, tensor: ServedTensor) -> dict[str, Answer]:
    base = raw(to_tensors("first", ONE))
    ask = wire.ask if model == STREAM_MODEL else lambda inputs: wire.infer(UNARY_MODEL, inputs)
    return {label: ask({**base, tensor.name: bad}) for label, bad in sweep(tensor)}


def check(found: dict[str, Answer]) -> None:
    accepted = {label for label, answer in found.items() if answer.status == "OK"}
    assert not accepted, f"accepted: {sorted(accepted)}"
    # A refusal by Triton itself, before the model sees the request, may be called otherwise.
    strange = {
        label: answer for label, answer in found.items() if answer.status in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
    }
    assert not strange, strange
    print(f"{len(found)} refused:", dict(Counter(answer.status for answer in found.values())))


@pytest.mark.parametrize("tensor", STREAM_INPUTS, ids=lambda tensor: tensor.name)
def test_every_malformed_input_of_the_stream_is_refused(wire, tensor):
    check(refusals(wire, STREAM_MODEL, tensor))


@pytest.mark.full
@pytest.mark.parametrize("tensor", UNARY_INPUTS, ids=lambda tensor: tensor.name)
def test_every_malformed_input_of_the_unary_model_is_refused(wire, tensor):
    check(refusals(wire, UNARY_MODEL, tensor))


def test_inputs_that_are_missing_unknown_or_twice(wire):
    base = raw(to_tensors("first", ONE))
    found = {f"without {name}": wire.ask({k: v for k, v in base.items() if k != name}) for name in ("clip", "prompt")}
    found["nothing"] = wire.ask({})
    found["unknown"] = wire.ask({**base, "frobnicate": base["clip"]})
    found["both sources"] = wire.ask({**base, **raw(to_tensors("first", ONE, video=b"a")), **raw(FRAMES_INPUT)})
    check(found)


FRAMES_INPUT = {"source_frames": np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8)}


@pytest.mark.parametrize(
    "parameters",
    [{"caller": "0" * 32}, {"caller": "../../etc/passwd"}, {"caller": 7}, {"timeout": -1}],
)
def test_parameters_that_are_not_a_clients_are_refused(wire, parameters):
    """The name of a caller is for models."""
    answer = wire.ask(raw(to_tensors("first", ONE)), parameters=parameters)
    assert answer.status == "INVALID_ARGUMENT" and next(iter(parameters)) in answer.message


def test_a_long_parameter_is_refused_in_a_short_line(wire):
    answer = wire.ask(raw(to_tensors("first", ONE)), parameters={"x" * 9999: "y" * 9999})
    ours = ", ".join(tensor.name for tensor in STREAM_INPUTS)  # named, so that the right one is found
    assert answer.status == "INVALID_ARGUMENT" and len(answer.message) < 150 + len(ours), answer


# Hostile videos.


def bomb_of_zeros() -> bytes:
    """A GIF of 16 KB that unpacks to a picture of 65,535 × 65,535."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    picture = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2" + (b"\xff" + b"\0" * 255) * 64 + b"\0;"
    return screen + picture


def bomb_of_frames() -> bytes:
    """Ten thousand frames of one colour in a few hundred KB."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=1000, options={"preset": "ultrafast", "crf": "51"})
        stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((SIDE, SIDE, 3), np.uint8), format="rgb24")
        for _ in range(10_000):
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    return file.getvalue()


def large_picture() -> bytes:
    """A WebP of a few KB that unpacks to 16,383 × 16,383."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16383, 2048)).save(file, "WEBP", lossless=True)
    data = bytearray(file.getvalue())
    data[21 : 21 + 4] = struct.pack("<I", (16382) | (16382 << 14))  # VP8L: 14 bits each of width and height, less one
    return bytes(data)


BOMBS = {"zeros": bomb_of_zeros, "frames": bomb_of_frames, "picture": large_picture}


@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
def test_decompression_bombs_are_refused(server, wire, make):
    answer = wire.ask(raw(to_tensors("first", ONE, video=make())))
    assert answer.status == "INVALID_ARGUMENT", answer
    assert f"the clip takes {FRAMES} to 1024 frames of {SIDE}×{SIDE}" in answer.message


def hostile(count: int, seed: int) -> Iterator[bytes]:
    """Good files, cut and changed at random."""
    random = np.random.default_rng(seed)
    for number in range(count):
        kind = sorted(SOURCES)[number % len(SOURCES)]
        changes = [
            (random.random(), int(random.integers(256)), "setidcl"[random.integers(7)])
            for _ in range(random.integers(1, 5))
        ]
        yield mutated(SOURCES[kind], changes)


def ask_all(wire: Wire, files: Iterator[bytes]) -> None:
    found = Counter()
    for data in files:
        answer = wire.ask(raw(to_tensors("first", ONE, video=data)))
        found[answer.status] += 1
        assert answer.status in ("OK", "INVALID_ARGUMENT"), answer
        if answer.status == "OK":
            shape = answer.last["frames"].shape
            assert shape[1] >= FRAMES and (shape[0], *shape[2:]) == (1, SIDE, SIDE, 3)
    print(dict(found))


def test_hostile_videos_are_refused_or_edited(wire):
    ask_all(wire, hostile(12, seed=1))


@pytest.mark.full
def test_many_hostile_videos_are_refused_or_edited(wire):
    ask_all(wire, hostile(400, seed=2))


def test_what_was_sent_leaves_no_memory_behind(server, wire):
    """Refused videos and frames are not kept: the metrics of what is kept stand still."""
    names = [name for name in metrics(server) if name.startswith("tav_opt_inversions")]
    before = [metrics(server)[name] for name in names]
    wire.ask(raw(to_tensors("first", ONE, video=lossless(np.zeros((FRAMES - 1, SIDE, SIDE, 3), np.uint8)))))
    wire.ask(raw(to_tensors("first", ONE, source_frames=np.zeros((1, 1, 1, 3), np.uint8))))
    assert names and [metrics(server)[name] for name in names] == before
