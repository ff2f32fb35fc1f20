"""The client against a server of grpcio's own that answers as scripted; against Triton: test_serving, test_faults."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest
import trustme
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tav_opt.client import AsyncClient, Client, Edit, Progress, Retry, ServerError, Tls
from tav_opt.config import EditConfig, InputError
from tav_opt.contract import STREAM_MODEL
from tav_opt.serving.gateway.behind import Triton
from tav_opt.serving.gateway.grpc_face import GrpcFace

FRAMES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(1, 2, 4, 4, 3)
QUICK = Retry(first_pause_s=0.01, longest_pause_s=0.02)


def answer(stage: str, step: int, steps: int, *, final: bool = False, **raw: tuple[str, list[int], bytes]):
    """A response in Triton's protocol, written byte by byte."""
    text = len(stage).to_bytes(4, "little") + stage.encode()
    tensors = {
        "stage": ("BYTES", [1], text),
        "step": ("INT32", [1], step.to_bytes(4, "little")),
        "steps": ("INT32", [1], steps.to_bytes(4, "little")),
        **raw,
    }
    response = pb.ModelInferResponse(model_name=STREAM_MODEL)
    for name, (datatype, shape, content) in tensors.items():
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(content)
    response.parameters["triton_final_response"].bool_param = final
    return pb.ModelStreamInferResponse(infer_response=response)


def failed_edit(status: bytes, message: bytes):
    """The last response of a failed edit: its one tensor has the status and the message."""
    raw = b"".join(len(text).to_bytes(4, "little") + text for text in (status, message))
    response = pb.ModelInferResponse(model_name=STREAM_MODEL, raw_output_contents=[raw])
    response.outputs.add(name="error", datatype="BYTES", shape=[2])
    response.parameters["triton_final_response"].bool_param = True
    return pb.ModelStreamInferResponse(infer_response=response)


FPS = ("FP32", [1], np.array([12.5], "<f4").tobytes())
DONE = answer("done", 2, 2, final=True, frames=("UINT8", list(FRAMES.shape), FRAMES.tobytes()), fps=FPS)
ANSWERS = [answer("sample", 1, 2), answer("sample", 2, 2), DONE]


@dataclass
class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Each call plays the next act: a list of answers, an error's status and words, or an event to hang on."""

    acts: list[list] = field(default_factory=list)
    live: bool = True
    requests: list[pb.ModelInferRequest] = field(default_factory=list)
    metadata: list[dict] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)

    def ModelStreamInfer(self, request_iterator, context):
        context.add_callback(self.left.set)
        self.requests.append(next(request_iterator))
        self.metadata.append(dict(context.invocation_metadata()))
        for item in self.acts.pop(0):
            if item == "hang":
                self.left.wait(30)
            elif item == "until the deadline":
                time.sleep(context.time_remaining() - 0.05)
            elif isinstance(item, tuple):
                context.abort(*item)
            else:
                yield item

    def ServerLive(self, request, context):
        return pb.ServerLiveResponse(live=self.live)


@pytest.fixture
def triton():
    """A scripted server and its address."""
    scripted = Scripted()
    server = grpc.server(futures.ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(scripted, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield scripted, f"127.0.0.1:{port}"
    server.stop(None).wait()


def edited(face: str, url: str, *, retry: Retry = QUICK, tls: Tls | None = None, **options) -> tuple[list, Edit]:
    """An edit by one of the two clients: its progress and its result."""
    told: list[tuple[str, int, int]] = []

    def tell(*progress) -> None:
        told.append(progress)

    async def by_asyncio() -> Edit:
        async with AsyncClient(url, retry=retry, tls=tls) as client:
            return await client.edit("toy", ["a panda"], on_progress=tell, **options)

    if face == "asyncio":
        return told, asyncio.run(by_asyncio())
    with Client(url, retry=retry, tls=tls) as client:
        return told, client.edit("toy", ["a panda"], on_progress=tell, **options)


both = pytest.mark.parametrize("face", ["threads", "asyncio"])


@both
def test_progress_then_the_result(triton, face):
    scripted, url = triton
    scripted.acts = [ANSWERS]
    told, edit = edited(face, url)
    assert told == [("sample", 1, 2), ("sample", 2, 2)]
    np.testing.assert_array_equal(edit.frames, FRAMES)
    assert (edit.fps, edit.videos) == (12.5, ())
    assert "triton_grpc_error" not in scripted.metadata[0], "Triton 2.51 dies of it"


def test_the_request_is_what_the_contract_says(triton):
    scripted, url = triton
    scripted.acts = [ANSWERS]
    with Client(url) as client:
        client.edit("toy", EditConfig(prompts=("ä", "b"), steps=7, seed=2**63 - 1), deadline_s=30)
    sent = scripted.requests[0]
    raw = {tensor.name: (tensor.datatype, list(tensor.shape), content) for tensor, content in zip_tensors(sent)}
    assert sent.model_name == "tune_a_video_stream"
    assert raw["prompt"] == ("BYTES", [2], b"\x02\x00\x00\x00\xc3\xa4\x01\x00\x00\x00b")
    assert raw["steps"] == ("INT32", [1], b"\x07\x00\x00\x00")
    assert raw["seed"] == ("UINT64", [1], b"\xff" * 7 + b"\x7f")
    assert 25e6 < sent.parameters["timeout"].int64_param <= 30e6, "microseconds in Triton's queue"


@both
def test_every_attempt_has_the_id_that_the_result_and_the_error_name(triton, face):
    scripted, url = triton
    full = (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
    scripted.acts = [[full], ANSWERS, [failed_edit(b"INTERNAL", b"KeyError: 'x'")]]
    _, edit = edited(face, url)
    with pytest.raises(ServerError) as caught:
        edited(face, url)
    ids = [request.id for request in scripted.requests]
    assert ids == [edit.request_id, edit.request_id, caught.value.request_id]
    assert len(set(ids)) == 2 and all(ids)
    assert str(caught.value) == f"KeyError: 'x' (INTERNAL, request {ids[2]})"


def zip_tensors(message):
    return zip(message.inputs, message.raw_input_contents, strict=True)


def test_no_prompt_is_for_the_server_to_refuse(triton):
    scripted, url = triton
    scripted.acts = [[(grpc.StatusCode.INVALID_ARGUMENT, "0 prompts")]]
    with Client(url) as client, pytest.raises(InputError, match="0 prompts"):
        client.edit("toy", [])
    (prompt,) = [content for tensor, content in zip_tensors(scripted.requests[0]) if tensor.name == "prompt"]
    assert prompt == b""


def test_previews_and_files_are_typed(triton):
    scripted, url = triton
    preview = np.full((1, 2, 2, 2, 3), 9, np.uint8)
    step = answer("sample", 1, 1, preview=("UINT8", list(preview.shape), preview.tobytes()))
    files = answer("done", 1, 1, final=True, video=("BYTES", [1], b"\x04\x00\x00\x00\xff\x00mp"), fps=FPS)
    scripted.acts = [[step, files]]
    with Client(url) as client, client.stream("toy", ["x"]) as stream:
        (told,) = list(stream)
        edit = stream.result()
    assert isinstance(told, Progress)
    np.testing.assert_array_equal(told.preview, preview)
    assert edit.videos == (b"\xff\x00mp",)
    assert len(edit.frames) == 0


@both
@pytest.mark.parametrize(
    "refusal",
    [
        (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size"),
        (grpc.StatusCode.INTERNAL, "Stub process 'tune_a_video_stream_0_0' is not healthy."),
        pb.ModelStreamInferResponse(error_message="[request id: <id_unknown>] Exceeds maximum queue size"),
        pb.ModelStreamInferResponse(error_message="Stub process 'tune_a_video_stream_0_0' is not healthy."),
        failed_edit(b"UNAVAILABLE", b"memory is short"),
    ],
    ids=["unavailable", "internal", "queue full, as Triton says it", "worker gone, as Triton says it", "memory short"],
)
def test_what_no_worker_began_is_sent_again(triton, face, refusal):
    scripted, url = triton
    scripted.acts = [[refusal], [refusal], ANSWERS]
    told, edit = edited(face, url)
    np.testing.assert_array_equal(edit.frames, FRAMES)
    assert told == [("sample", 1, 2), ("sample", 2, 2)]
    assert len(scripted.requests) == 3
    assert scripted.requests[0] == scripted.requests[2]


@both
@pytest.mark.parametrize(
    ("act", "status"),
    [
        ([ANSWERS[0], (grpc.StatusCode.UNAVAILABLE, "server shutting down")], "UNAVAILABLE"),
        ([(grpc.StatusCode.INTERNAL, "KeyError: 'x'")], "INTERNAL"),
        ([ANSWERS[0]], "INTERNAL"),
        ([pb.ModelStreamInferResponse(error_message="unexpected inference input")], "UNKNOWN"),
        ([answer("done", 2, 2, final=True)], "INTERNAL"),
        ([failed_edit(b"INTERNAL", b"KeyError: 'x'")], "INTERNAL"),
        ([ANSWERS[0], failed_edit(b"UNAVAILABLE", b"memory is short")], "UNAVAILABLE"),
    ],
    ids=["after an answer", "internal", "no result", "no status", "empty result", "worker's failure", "too late"],
)
def test_what_may_have_begun_is_not_sent_again(triton, face, act, status):
    scripted, url = triton
    scripted.acts = [act]
    with pytest.raises(ServerError) as caught:
        edited(face, url)
    assert caught.value.status == status
    assert len(scripted.requests) == 1


@both
@pytest.mark.parametrize(
    "refusal",
    [
        failed_edit(b"INVALID_ARGUMENT", b"clip 'toy' is unknown"),
        failed_edit(b"NOT_FOUND", b"clip 'toy' is unknown"),
        (grpc.StatusCode.NOT_FOUND, "clip 'toy' is unknown"),
    ],
    ids=["invalid", "not found", "a proxy's not found"],
)
def test_what_the_request_is_to_blame_for_is_an_input_error(triton, face, refusal):
    scripted, url = triton
    scripted.acts = [[refusal]]
    with pytest.raises(InputError, match="clip 'toy' is unknown"):
        edited(face, url)
    assert len(scripted.requests) == 1


@both
def test_attempts_end(triton, face):
    scripted, url = triton
    scripted.acts = [[(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")]] * 3
    with pytest.raises(ServerError, match="Exceeds maximum queue size") as caught:
        edited(face, url, retry=Retry(attempts=3, first_pause_s=0.01))
    assert caught.value.status == "UNAVAILABLE"
    assert len(scripted.requests) == 3


def test_each_pause_is_told_of(triton):
    scripted, url = triton
    scripted.acts = [[(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")], ANSWERS]
    told: list[tuple[str, float]] = []
    edited("threads", url, retry=Retry(first_pause_s=0.01, on_pause=lambda *what: told.append(what)))
    ((reason, pause),) = told
    assert reason == "Exceeds maximum queue size (UNAVAILABLE)"
    assert 0.005 <= pause <= 0.01


def test_pauses_double_up_to_the_longest_and_differ():
    pauses = [list(Retry(attempts=7, first_pause_s=1, longest_pause_s=5).pauses()) for _ in range(50)]
    for number, most in enumerate([1, 2, 4, 5, 5, 5]):
        column = [drawn[number] for drawn in pauses]
        assert most / 2 <= min(column) < max(column) <= most
    assert list(Retry(attempts=1).pauses()) == []


@both
def test_a_deadline_ends_the_edit_here_and_there(triton, face):
    scripted, url = triton
    scripted.acts = [[ANSWERS[0], "hang"]]
    with pytest.raises(ServerError) as caught:
        edited(face, url, deadline_s=0.5)
    assert caught.value.status == "DEADLINE_EXCEEDED"
    assert scripted.left.wait(10), "the server never learned of it"


@both
@pytest.mark.parametrize("last", [[], [answer("done", 2, 2, final=True)]], ids=["nothing", "an empty result"])
def test_a_server_that_notices_the_deadline_first_is_not_to_blame(triton, face, last):
    scripted, url = triton
    scripted.acts = [[ANSWERS[0], "until the deadline", *last]]
    with pytest.raises(ServerError) as caught:
        edited(face, url, deadline_s=0.5)
    assert caught.value.status == "DEADLINE_EXCEEDED"


@both
def test_no_pause_outlasts_the_deadline(triton, face):
    scripted, url = triton
    scripted.acts = [[(grpc.StatusCode.UNAVAILABLE, "full")]]
    with pytest.raises(ServerError, match="full"):
        edited(face, url, retry=Retry(first_pause_s=3600, longest_pause_s=3600), deadline_s=5)


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan"), float("inf")])
def test_a_deadline_is_a_time_to_come(deadline_s):
    with Client("127.0.0.1:1") as client, pytest.raises(InputError, match="is not above 0"):
        client.edit("toy", ["x"], deadline_s=deadline_s)


def test_leaving_the_block_cancels(triton):
    scripted, url = triton
    scripted.acts = [[ANSWERS[0], "hang"]]
    with Client(url) as client, client.stream("toy", ["x"]) as stream:
        assert next(stream).step == 1
    assert scripted.left.wait(10)


def test_closing_cancels_what_is_in_flight(triton):
    scripted, url = triton
    scripted.acts = [[ANSWERS[0], "hang"]]
    client = Client(url)
    stream = client.stream("toy", ["x"])
    assert next(stream).step == 1
    began = time.monotonic()
    client.close()
    assert scripted.left.wait(10) and time.monotonic() - began < 10


def test_another_thread_cancels_while_this_one_waits(triton):
    scripted, url = triton
    scripted.acts = [["hang"]]
    with Client(url) as client, client.stream("toy", ["x"]) as stream:
        threading.Timer(0.3, stream.cancel).start()
        with pytest.raises(ServerError) as caught:
            stream.result()
    assert caught.value.status == "CANCELLED"
    assert scripted.left.wait(10)


def test_cancelling_ends_the_pause_between_attempts(triton):
    scripted, url = triton
    scripted.acts = [[(grpc.StatusCode.UNAVAILABLE, "full")]]
    patient = Retry(first_pause_s=3600, longest_pause_s=3600)
    with Client(url, retry=patient) as client, client.stream("toy", ["x"]) as stream:
        threading.Timer(0.3, stream.cancel).start()
        with pytest.raises(ServerError) as caught:
            stream.result()
    assert caught.value.status == "CANCELLED"


def test_cancelling_the_task_cancels_the_edit(triton):
    scripted, url = triton
    scripted.acts = [[ANSWERS[0], "hang"]]

    async def leave() -> None:
        async with AsyncClient(url) as client:
            begun = asyncio.Event()
            task = asyncio.create_task(client.edit("toy", ["x"], on_progress=lambda *_: begun.set()))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(leave())
    assert scripted.left.wait(10)


def test_an_async_stream_is_cancelled_by_hand(triton):
    scripted, url = triton
    scripted.acts = [[ANSWERS[0], "hang"]]

    async def cancel() -> None:
        async with AsyncClient(url) as client, client.stream("toy", ["x"]) as stream:
            assert (await anext(stream)).step == 1
            asyncio.get_running_loop().call_later(0.2, stream.cancel)
            await stream.result()

    with pytest.raises(ServerError) as caught:
        asyncio.run(cancel())
    assert caught.value.status == "CANCELLED"
    assert scripted.left.wait(10)


@pytest.mark.parametrize(
    "act",
    [[ANSWERS[0], "hang"], [ANSWERS[0], (grpc.StatusCode.DEADLINE_EXCEEDED, "too late")]],
    ids=["cancelled", "failed"],
)
def test_an_async_stream_leaves_no_task_behind(triton, act):
    scripted, url = triton
    scripted.acts = [act]

    async def leave() -> set[asyncio.Task]:
        async with AsyncClient(url) as client:
            with suppress(ServerError):
                async with client.stream("toy", ["x"]) as stream:
                    await anext(stream)
                    if act[-1] != "hang":
                        await stream.result()
            await asyncio.sleep(0.5)
            return asyncio.all_tasks() - {asyncio.current_task()}

    assert not [task for task in asyncio.run(leave()) if "_consume_request_iterator" in repr(task)]


def test_many_edits_at_a_time_share_a_client(triton):
    scripted, url = triton
    scripted.acts = [ANSWERS] * 8
    with Client(url) as client, futures.ThreadPoolExecutor(8) as pool:
        edits = list(pool.map(lambda _: client.edit("toy", ["x"]), range(8)))
    assert all(np.array_equal(edit.frames, FRAMES) for edit in edits)


def test_a_server_that_starts_late_is_waited_for(triton):
    """It is not there at first: what no server was reached with is sent again."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    scripted = Scripted(acts=[ANSWERS])
    server = grpc.server(futures.ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(scripted, server)

    def start() -> None:
        assert server.add_insecure_port(f"127.0.0.1:{port}") == port
        server.start()

    timer = threading.Timer(0.5, start)
    timer.start()
    try:
        _, edit = edited("threads", f"127.0.0.1:{port}", retry=Retry(attempts=20, first_pause_s=0.2))
        np.testing.assert_array_equal(edit.frames, FRAMES)
    finally:
        timer.join()
        server.stop(None).wait()


@pytest.mark.parametrize("url", ["", "localhost", "http://localhost:8001", "localhost:", "localhost:grpc"])
def test_a_url_is_host_and_port(url):
    with pytest.raises(InputError, match=r"is not host:port, e\.g\. localhost:8001"):
        Client(url)


@both
def test_an_absent_server_is_named_with_what_to_do(face):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, not listening: nothing answers there
        url = f"127.0.0.1:{s.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"no server answers at {url}.*tav-opt serve"):
            edited(face, url)


@both
def test_a_gateway_without_a_server_behind_it_is_no_absent_server(face):
    """What it says is that the server comes back."""

    async def run() -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))  # bound, not listening
            gateway = grpc.aio.server()
            gateway.add_generic_rpc_handlers((GrpcFace(Triton(nobody.getsockname()[1], "key")),))
            port = gateway.add_insecure_port("127.0.0.1:0")
            await gateway.start()
            with pytest.raises(ServerError, match="being started anew") as caught:
                await asyncio.to_thread(edited, face, f"127.0.0.1:{port}", retry=Retry(attempts=1))
            assert caught.value.status == "UNAVAILABLE"
            await gateway.stop(None)

    asyncio.run(run())


def test_settings_that_do_not_fit_the_wire_leave_the_client_usable():
    with Client("127.0.0.1:1") as client:
        for seed in (-1, 2**64):
            with pytest.raises(InputError, match=f"seed {seed} does not fit UINT64"):
                client.edit("toy", EditConfig(prompts=("x",), seed=seed))


def test_an_option_that_is_none_of_the_contracts_is_named():
    with Client("127.0.0.1:1") as client, pytest.raises(InputError, match="no option 'frobnicate'; there are"):
        client.edit("toy", ["x"], frobnicate=1)


# TLS.


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def secured(authority, tmp_path):
    """A scripted server that shows a certificate and asks for one; the files of a client that it trusts."""
    own = authority.issue_cert("localhost")
    scripted = Scripted(acts=[ANSWERS] * 4)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(scripted, server)
    credentials = grpc.ssl_server_credentials(
        [(own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())], authority.cert_pem.bytes(), True
    )
    port = server.add_secure_port("localhost:0", credentials)
    server.start()
    client = authority.issue_cert("client@example.org")
    files = {"root_certificates": tmp_path / "ca.pem", "certificate": tmp_path / "c.pem", "key": tmp_path / "k.pem"}
    authority.cert_pem.write_to_path(files["root_certificates"])
    client.cert_chain_pems[0].write_to_path(files["certificate"])
    client.private_key_pem.write_to_path(files["key"])
    yield f"localhost:{port}", files
    server.stop(None).wait()


@both
def test_both_sides_prove_who_they_are(secured, face):
    url, files = secured
    _, edit = edited(face, url, tls=Tls(**files))
    np.testing.assert_array_equal(edit.frames, FRAMES)


@both
def test_a_client_without_a_certificate_is_told_that_one_may_be_asked_for(secured, face):
    url, files = secured
    tls = Tls(root_certificates=files["root_certificates"])
    with pytest.raises(InputError, match=rf"no server answers at {url}: .*--certificate, --key"):
        edited(face, url, tls=tls, retry=Retry(attempts=1))


AT_ONCE = Retry(on_pause=lambda why, _seconds: pytest.fail(why))
"""What trying again would not mend is told without trying."""


@both
def test_a_server_of_another_authority_is_not_trusted(secured, face, tmp_path):
    url, files = secured
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    with pytest.raises(InputError, match=rf"certificate of {url} is not trusted .*--root-certificates"):
        edited(face, url, tls=Tls(**{**files, "root_certificates": tmp_path / "other.pem"}), retry=AT_ONCE)


@both
def test_a_server_of_another_name_is_not_trusted(secured, face):
    url, files = secured
    other = url.replace("localhost", "127.0.0.1")
    with pytest.raises(InputError, match=rf"certificate of {other} is for another name"):
        edited(face, other, tls=Tls(**files), retry=AT_ONCE)


@both
def test_a_client_without_tls_is_told_to_try_it(secured, face):
    url, _ = secured
    with pytest.raises(InputError, match=rf"the server at {url} speaks TLS: try --tls"):
        edited(face, url, retry=AT_ONCE)


@both
def test_a_client_with_tls_is_told_that_the_server_has_none(triton, face):
    _, url = triton
    with pytest.raises(InputError, match=rf"the server at {url} speaks no TLS: try without --tls"):
        edited(face, url, tls=Tls(), retry=AT_ONCE)


@both
@pytest.mark.parametrize("tls", [None, Tls()], ids=["plain", "TLS"])
def test_a_port_that_only_closes_connections_may_yet_become_a_server(face, tls):
    """So does a proxy whose server has not started: tried again, and in the end no more is claimed than is known."""
    with socket.create_server(("127.0.0.1", 0)) as s, futures.ThreadPoolExecutor(1) as pool:
        pool.submit(close_all, s)
        url = f"127.0.0.1:{s.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"no server answers at {url}: is it running"):
            edited(face, url, tls=tls, retry=Retry(attempts=2, first_pause_s=0.01))
        s.shutdown(socket.SHUT_RDWR)


def close_all(listening: socket.socket) -> None:
    with suppress(OSError):
        while True:
            listening.accept()[0].close()


def test_files_that_are_none_are_named(tmp_path):
    (tmp_path / "text.pem").write_text("hello")
    for tls, words in (
        (Tls(root_certificates=tmp_path / "nowhere.pem"), r"nowhere\.pem cannot be read: No such file"),
        (Tls(root_certificates=tmp_path / "text.pem"), r"text\.pem is not in PEM format"),
        (Tls(certificate=tmp_path / "text.pem"), "go together"),
    ):
        with pytest.raises(InputError, match=words):
            Client("localhost:1", tls=tls)
