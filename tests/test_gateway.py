"""What killed Triton, and its neighbours, against the real server: each is refused, and the server serves as before."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import socket
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import numpy as np
import psutil
import pytest
from exported import export_once
from served import Raw, Wire, processes, raw, request, serving
from tritonclient.grpc import service_pb2

from tav_opt.config import EditConfig, WorkerConfig
from tav_opt.contract import CLIPS_MODEL, STREAM_MODEL, UNARY_MODEL, to_tensors
from tav_opt.serving.gateway.behind import Refusal, Triton
from tav_opt.serving.gateway.rules import MAX_REQUEST_BYTES, Message, checked
from tav_opt.serving.host.server import Server

ONE = EditConfig(prompts=("a panda is skiing",), steps=1, guidance_scale=1.0)
GOOD = raw(to_tensors("first", ONE))
JSON = {"clip": "first", "prompt": "a panda is skiing", "steps": 1, "guidance_scale": 1.0}
INFER = {
    "inputs": [
        {"name": "clip", "datatype": "BYTES", "shape": [1], "data": ["first"]},
        {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a panda is skiing"]},
    ]
}
WRAPPING = [
    (2**31, 2**31, 4, 3),
    (2**32, 2**32, 1, 3),
    (2**62, 4, 1, 3),
    (2**63 - 1, 2**63 - 1, 2**63 - 1, 3),
    (2**21, 2**21, 2**22, 3),
    (3, 6148914691236517206, 1, 3),
]
"""Their products are 0 or small in 64 bits."""


@pytest.fixture(scope="module")
def server(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    exported = export_once(golden, tmp_path_factory.getbasetemp())
    cache = tmp_path_factory.mktemp("gateway")
    with serving(exported.repository, WorkerConfig(cache=cache)) as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(server: Server) -> Iterator[None]:
    """Every process lives on, an edit is made, and what a request took in memory is given back."""
    everyone = [psutil.Process(server.process.pid), psutil.Process(server.front.process.pid)]
    before, held = processes(server), [one.memory_info().rss for one in everyone]
    yield
    with Wire(server.grpc_url) as wire:
        assert wire.ask(GOOD).status == "OK"
    assert processes(server) == before
    grown = [one.memory_info().rss - was for one, was in zip(everyone, held, strict=True)]
    assert max(grown) < 64 << 20, [f"{bytes_ / 2**20:.0f} MiB" for bytes_ in grown]


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    with Wire(server.grpc_url) as connected:
        yield connected


def post(server: Server, path: str, body: bytes | Iterator[bytes], **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(server.http_url).netloc, timeout=60)
    try:
        named = {"Content-Type": "application/json"} | {key.replace("_", "-"): value for key, value in headers.items()}
        connection.request("POST", f"/v2/models/{path}", body, named)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


@pytest.mark.parametrize("shape", WRAPPING, ids=str)
@pytest.mark.parametrize("size", [0, 12])
def test_sizes_that_wrap(server, wire, shape, size):
    """Without bytes, each lost a bare Triton 2.51 its worker, over every protocol."""
    sent = GOOD | {"source_frames": Raw("UINT8", shape, bytes(size))}
    for answer in (wire.ask(sent), wire.infer(UNARY_MODEL, sent)):
        assert (answer.status, "source_frames" in answer.message) == ("INVALID_ARGUMENT", True)
    frames = {"name": "source_frames", "datatype": "UINT8", "shape": shape, "data": [0] * size}
    body = json.dumps({"inputs": [*INFER["inputs"], frames]}).encode()
    assert post(server, f"{UNARY_MODEL}/infer", body)[0] == 400
    frames = {"name": "source_frames", "datatype": "UINT8", "shape": shape, "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [*INFER["inputs"], frames]}).encode()
    status, _ = post(server, f"{UNARY_MODEL}/infer", text + bytes(size), Inference_Header_Content_Length=str(len(text)))
    assert status == 400


@pytest.mark.parametrize("name", ["prompt", "clip", "steps"])
def test_other_sizes_that_wrap(wire, name):
    own = GOOD[name]
    for shape in ((2**32, 2**32), (2**63 - 1,), (2**62, 4), (2,) * 63):
        sent = GOOD | {name: Raw(own.datatype, shape, own.content)}
        for answer in (wire.ask(sent), wire.infer(UNARY_MODEL, sent)):
            assert answer.status == "INVALID_ARGUMENT" and name in answer.message


PATHS = (f"{UNARY_MODEL}/infer", f"{UNARY_MODEL}/generate", f"{STREAM_MODEL}/generate_stream")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("begin", ["[", '{"a":', '{"inputs":[{"name":"clip","shape":[1],"datatype":"BYTES","data":['])
def test_json_nested_without_end(server, path, begin):
    status, text = post(server, path, (begin * 100_000).encode())
    assert status == 400 and "error" in json.loads(text)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a":', "}")])
def test_json_nested_deep_and_closed(server, path, begin, end):
    """As a value, where a bare Triton 2.51 dies of lists with a SIGSEGV, and as the body itself."""
    deep = begin * 100_000 + "1" + end * 100_000
    tensor = json.dumps({"inputs": [{"name": "clip", "shape": [1], "datatype": "BYTES", "data": "deep"}]})
    for body in (deep, f'{{"clip":{deep}}}', tensor.replace('"deep"', deep)):
        status, text = post(server, path, body.encode())
        assert status == 400 and "error" in json.loads(text)


@pytest.mark.parametrize("path", PATHS)
def test_bodies_in_many_small_chunks(server, path):
    """A good one is answered; one that goes on and on is not."""
    good = json.dumps(INFER if path.endswith("infer") else JSON).encode()
    status, _ = post(server, path, (bytes([byte]) for byte in good))
    assert status == 200
    status, _ = post(server, path, (b"[" for _ in range(20_000)))
    assert status == 400


@pytest.mark.parametrize(("encoding", "windows"), [("gzip", 31), ("deflate", 15)])
def test_a_packed_body_that_grows_without_end(server, encoding, windows):
    packing = zlib.compressobj(1, wbits=windows)
    million = b"\0" * 10**6
    body = b"".join([*(packing.compress(million) for _ in range(700)), packing.flush()])
    assert len(body) < 4 * 10**6 and MAX_REQUEST_BYTES < 700 * 10**6
    for path in PATHS:
        status, text = post(server, path, body, Content_Encoding=encoding)
        assert status == 400 and "when it is unpacked" in text


def test_a_packed_body_that_is_honest(server):
    body = gzip.compress(json.dumps(JSON).encode())
    assert post(server, f"{UNARY_MODEL}/generate", body, Content_Encoding="gzip")[0] == 200
    for damaged in (body[:-4], b"no gzip"):
        assert post(server, f"{UNARY_MODEL}/generate", damaged, Content_Encoding="gzip")[0] == 400


def test_packed_grpc_messages_are_refused_unpacked(server):
    """gRPC would unpack 700 MB before it looks at the size."""
    sent = request(UNARY_MODEL, GOOD | {"video": Raw("BYTES", (1,), b"\0" * (200 << 20))})
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.grpc_url, options, compression=grpc.Compression.Gzip) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            call(sent.SerializeToString(), timeout=60)
    assert caught.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_a_status_on_the_stream_where_the_client_wants_it(server, wire):
    """Triton 2.51 dies of some ten of them."""
    for _ in range(30):
        for change in ({"steps": np.array([0], np.int32)}, {"nonsense": np.array([0], np.int32)}):
            sent = request(STREAM_MODEL, GOOD | raw(change))
            call = wire.stub.ModelStreamInfer(iter([sent]), metadata=(("triton_grpc_error", "true"),), timeout=60)
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_refusal_on_a_stream_harms_no_other_request_of_it(wire):
    bad = request(STREAM_MODEL, GOOD | {"stepz": GOOD["steps"]})
    sent = [request(STREAM_MODEL, GOOD), bad, request(STREAM_MODEL, GOOD)]
    for number, message in enumerate(sent):
        message.id = f"number-{number}"
    last: dict[str, list[str]] = {}
    for reply in wire.stub.ModelStreamInfer(iter(sent), timeout=60):
        response = reply.infer_response
        if response.parameters["triton_final_response"].bool_param:
            last[response.id] = [output.name for output in response.outputs]
    assert set(last) == {"number-0", "number-1", "number-2"}
    assert "error" in last["number-1"] and "frames" in last["number-0"] and "frames" in last["number-2"]


def test_shared_memory_is_off(wire):
    sent = request(UNARY_MODEL, GOOD)
    sent.inputs[0].parameters["shared_memory_region"].string_param = "x"
    with pytest.raises(grpc.RpcError, match="shared memory is off"):
        wire.stub.ModelInfer(sent, timeout=60)


def test_values_may_come_typed(wire):
    """KServe has two ways for them; a mixture is neither."""
    sent = service_pb2.ModelInferRequest(model_name=CLIPS_MODEL)
    sent.inputs.add(name="clip", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"first")
    assert wire.stub.ModelInfer(sent, timeout=60).outputs
    sent.raw_input_contents.append(b"\5\0\0\0first")
    with pytest.raises(grpc.RpcError, match="partly"):
        wire.stub.ModelInfer(sent, timeout=60)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'"text"',
        b'{"clip": "first", "clip": "first", "prompt": "x"}',
        b'{"clip": "first", "prompt": "x", "guidance_scale": NaN}',
        b'{"clip": "first", "prompt": "x", "steps": 1e400}',
        b'{"clip": "first", "prompt": "x", "steps": ' + b"9" * 5000 + b"}",
        b'{"clip": "first", "prompt": "x", "steps": 3.5}',
        b'{"clip": "first", "prompt": "x", "steps": true}',
        b'{"clip": ["first", "first"], "prompt": "x"}',
        b'{"clip": "first", "prompt": ["x", ["y"]]}',
        b'{"clip": "first", "prompt": []}',
        b'{"clip": null, "prompt": "x"}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_json_that_is_wrong(server, body):
    for path in PATHS[1:]:
        status, text = post(server, path, body)
        assert status == 400 and len(json.loads(text)["error"]) < 400, text


def test_what_is_no_request_at_all(server):
    """On both ports: the other protocol, a TLS handshake, a header without an end, half a connection."""
    for url in (server.http_url, f"http://{server.grpc_url}"):
        place = urlsplit(url).netloc.split(":")
        for sent in (
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 99,
            b"GET /" + b"x" * 10**6,
        ):
            with socket.create_connection((place[0], int(place[1])), timeout=10) as connection:
                try:
                    connection.sendall(sent)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(4096):
                        pass
                except OSError:
                    pass


def test_triton_is_behind_a_lock(server):
    """Whoever finds its port has not the key."""
    (port,) = [
        c.laddr.port
        for c in psutil.Process(server.process.pid).net_connections()
        if c.status == "LISTEN" and c.laddr.port == server.front.place.grpc_port
    ]
    with Wire(f"127.0.0.1:{port}") as inside:
        for answer in (inside.ask(GOOD), inside.infer(UNARY_MODEL, GOOD)):
            assert answer.status != "OK" and "restricted" in answer.message
        with pytest.raises(grpc.RpcError, match="restricted"):
            inside.stub.SystemSharedMemoryStatus(service_pb2.SystemSharedMemoryStatusRequest(), timeout=60)


# What the server died over.

DIES = """
import sys, os
from concurrent import futures
import grpc

class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda data, _: os._exit(1) if b"deadly" in data else b"")

server = grpc.server(futures.ThreadPoolExecutor(1))
server.add_generic_rpc_handlers((Handler(),))
server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
server.start()
print("up", flush=True)
server.wait_for_termination()
"""


def test_a_request_over_which_the_server_died_twice_is_refused():
    """And no other; while nobody listens all are told to come again."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]

    def start() -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", DIES, str(port)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "up\n"
        return process

    deadly, good = (checked(request(UNARY_MODEL, raw(to_tensors(name, ONE)))) for name in ("deadly", "first"))

    async def told(triton: Triton, message: Message) -> str:
        for _ in range(100):
            try:
                return (await triton.infer(message)).decode()
            except Refusal as refusal:
                if "started anew" not in refusal.message or "died" in refusal.message:
                    return f"{refusal.status} {refusal.message}"
            await asyncio.sleep(0.1)
        raise AssertionError("it was never reached")

    async def run() -> None:
        triton = Triton(port, "key")
        for expected in ("UNAVAILABLE the server died while", "UNAVAILABLE the server died while"):
            process = start()
            assert await told(triton, good) == ""
            assert (await told(triton, deadly)).startswith(expected)
            assert process.wait(10) == 1
        process = start()
        assert (await told(triton, deadly)).startswith("INVALID_ARGUMENT the server died 2 times")
        assert await told(triton, good) == ""
        assert "tav_opt_gateway_deaths_total 2\n" in triton.metrics()
        process.kill()
        process.wait()
        await triton.close()

    asyncio.run(run())
