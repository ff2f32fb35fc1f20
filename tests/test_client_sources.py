"""A video in a clip's place is fitted by the client as `tune` fits it; what is sent already fitted is not touched."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from concurrent import futures
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest
from test_client import ANSWERS, FRAMES, QUICK, Scripted, zip_tensors
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tav_opt import cli, video
from tav_opt.client import AsyncClient, Client, ServerError
from tav_opt.config import InputError
from tav_opt.contract import ServedClip

TOLD = ServedClip(frames=3, height=4, width=8, fps=12.5, prompt="a pända", inversion_steps=50)


@dataclass
class Knowing(Scripted):
    """Tells of a clip of 3 frames of 8×4, byte by byte; `refusals` come first."""

    refusals: list[tuple[grpc.StatusCode, str]] = field(default_factory=list)
    asked: list[pb.ModelInferRequest] = field(default_factory=list)

    def ModelInfer(self, request, context):
        self.asked.append(request)
        if self.refusals:
            context.abort(*self.refusals.pop(0))
        answer = pb.ModelInferResponse(model_name=request.model_name)
        for name, value in (("frames", 3), ("height", 4), ("width", 8), ("inversion_steps", 50)):
            answer.outputs.add(name=name, datatype="INT32", shape=[1])
            answer.raw_output_contents.append(value.to_bytes(4, "little"))
        answer.outputs.add(name="fps", datatype="FP32", shape=[1])
        answer.raw_output_contents.append(np.array([12.5], "<f4").tobytes())
        answer.outputs.add(name="prompt", datatype="BYTES", shape=[1])
        answer.raw_output_contents.append(b"\x08\x00\x00\x00a p\xc3\xa4nda")
        return answer


@pytest.fixture
def triton():
    """The scripted server and its address."""
    scripted = Knowing(acts=[ANSWERS] * 2)
    server = grpc.server(futures.ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(scripted, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield scripted, f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven pictures of 10×10, each of its number: what is taken can be told."""
    path = tmp_path_factory.mktemp("other") / "frames"
    video.write(path, np.arange(11, dtype=np.uint8)[:, None, None, None] * np.ones((1, 10, 10, 3), np.uint8), 8)
    return path


def edited(face: str, url: str, **options):
    async def by_asyncio():
        async with AsyncClient(url, retry=QUICK) as client:
            return await client.edit("toy", "a panda", **options)

    if face == "asyncio":
        return asyncio.run(by_asyncio())
    with Client(url, retry=QUICK) as client:
        return client.edit("toy", "a panda", **options)


both = pytest.mark.parametrize("face", ["threads", "asyncio"])


def sent(scripted: Knowing) -> dict[str, tuple[list[int], bytes]]:
    return {tensor.name: (list(tensor.shape), content) for tensor, content in zip_tensors(scripted.requests[0])}


def numbers(scripted: Knowing) -> list[int]:
    """Of the frames that were sent, which are flat."""
    shape, content = sent(scripted)["source_frames"]
    assert shape == [3, 4, 8, 3]
    return np.frombuffer(content, np.uint8).reshape(shape)[:, 0, 0, 0].tolist()


@both
@pytest.mark.parametrize(
    "options, taken",
    [
        ({}, [0, 2, 4]),  # tune's own stride
        ({"start": 1, "stride": 4}, [1, 5, 9]),
        ({"uniform": True}, [0, 5, 10]),
        ({"fit": "squash", "stride": 1}, [0, 1, 2]),
    ],
)
def test_frames_are_taken_as_tune_takes_them(triton, folder, face, options, taken):
    scripted, url = triton
    edit = edited(face, url, video=folder if face == "threads" else str(folder), **options)
    np.testing.assert_array_equal(edit.frames, FRAMES)
    assert numbers(scripted) == taken
    assert scripted.asked[0].model_name == "tune_a_video_clips"
    assert "video" not in sent(scripted)


def test_a_stream_of_threads_fits_too_and_that_of_asyncio_says_who_does(triton, folder):
    scripted, url = triton
    with Client(url) as client, client.stream("toy", "a panda", video=folder, stride=1) as stream:
        stream.result()
    assert numbers(scripted) == [0, 1, 2]

    async def streamed():
        async with AsyncClient(url) as client:
            client.stream("toy", "a panda", video=folder)

    with pytest.raises(InputError, match="`edit` fits a file"):
        asyncio.run(streamed())


@both
def test_bytes_are_sent_as_they_are_and_nothing_is_asked(triton, face):
    scripted, url = triton
    edited(face, url, video=b"mp4")
    assert sent(scripted)["video"] == ([1], b"\x03\x00\x00\x00mp4") and not scripted.asked


@both
def test_what_a_clip_takes_is_told(triton, face):
    scripted, url = triton
    scripted.refusals = [(grpc.StatusCode.UNAVAILABLE, "too busy")]  # asked again

    async def by_asyncio():
        async with AsyncClient(url, retry=QUICK) as client:
            return await client.clip("toy")

    with Client(url, retry=QUICK) as client:
        assert (asyncio.run(by_asyncio()) if face == "asyncio" else client.clip("toy")) == TOLD
    assert [question.raw_input_contents[0][4:] for question in scripted.asked] == [b"toy", b"toy"]


@both
@pytest.mark.parametrize(
    "status, kind, words",
    [("NOT_FOUND", InputError, "^clip 'toy' is unknown$"), ("INTERNAL", ServerError, r"unknown \(INTERNAL")],
)
def test_a_clip_that_is_not_there_is_named_before_the_file_is_read(triton, folder, face, status, kind, words):
    scripted, url = triton
    scripted.refusals = [(grpc.StatusCode[status], "clip 'toy' is unknown")]
    with pytest.raises(kind, match=words):
        edited(face, url, video=folder, start=10_000)
    assert not scripted.requests


@both
@pytest.mark.parametrize(
    "options, words",
    [
        ({"video": "nowhere.mp4"}, "nowhere.mp4 does not exist"),
        ({"stride": 1}, "stride chooses frames of a video that is given as a path"),
        ({"video": b"mp4", "fit": "squash"}, "fit chooses frames of a video that is given as a path"),
        ({"video": np.zeros(3)}, "video is ndarray: must be a path, or the bytes of a file"),
    ],
)
def test_what_cannot_be_fitted_is_said_without_asking(triton, face, options, words):
    scripted, url = triton
    with pytest.raises(InputError, match=words):
        edited(face, url, **options)
    assert not scripted.asked and not scripted.requests


@both
def test_too_short_a_video_says_what_it_has(triton, folder, face):
    _, url = triton
    with pytest.raises(InputError, match="start 5, stride 4 need 14; it has 11; stride 2 would do"):
        edited(face, url, video=folder, start=5, stride=4)


@both
def test_the_deadline_holds_for_the_question_too(triton, folder, face):
    scripted, url = triton
    scripted.refusals = [(grpc.StatusCode.UNAVAILABLE, "too busy")] * 9
    with pytest.raises(ServerError, match=r"too busy|Deadline Exceeded"):
        edited(face, url, video=folder, deadline_s=0.015)
    assert not scripted.requests


def test_an_absent_server_is_named(folder):
    with pytest.raises(InputError, match=r"no server answers at 127\.0\.0\.1:1"):
        edited("threads", "127.0.0.1:1", video=folder)


def test_on_the_command_line(triton, folder, tmp_path, capsys):
    scripted, url = triton
    options = ["--clip", "toy", "--prompt", "a panda", "--url", url, "--out", str(tmp_path / "edit.gif")]
    assert cli.main(["request", *options, "--video", str(folder), "--start", "2", "--stride", "3"]) == 0
    assert numbers(scripted) == [2, 5, 8]
    assert capsys.readouterr().out == f"{tmp_path / 'edit.gif'}\n"


def test_the_client_needs_neither_torch_nor_decoders():
    code = "import sys, tav_opt.client; sys.exit(bool({'torch', 'av', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
