"""The models in the real server: what they answer, refuse, keep, count and log."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from encoded import comments, lossless
from exported import FRAMES, SIDE, STEPS, Exported, export_once
from served import Answer, Raw, Wire, metrics, post, processes, raw, request, serving, until
from test_sound import has_sound, loud, near, recorded
from tritonclient.utils import np_to_triton_dtype

from tav_opt import cli, contract, editing, video
from tav_opt.client import Client
from tav_opt.config import EditConfig, WorkerConfig
from tav_opt.contract import CLIPS_MODEL, STREAM_MODEL, UNARY_MODEL, ServedClip, to_tensors
from tav_opt.engines.exported import ExportedEngine
from tav_opt.engines.registry import open_clip
from tav_opt.serving.host.probe import REQUEST_ID, probe
from tav_opt.serving.host.server import Server

QUEUE, CROWD = 3, 12
SHORT = EditConfig(prompts=("a panda is skiing",), steps=3, guidance_scale=7.5)
LONG = replace(SHORT, steps=1000)


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def engine(exported: Exported) -> ExportedEngine:
    """The same clip, without a server: the truth."""
    return open_clip(exported.repository, "first", threads=1)


@pytest.fixture(scope="module")
def server(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    repository = Path(shutil.copytree(exported.repository, folder / "repository"))
    with serving(repository, WorkerConfig(queue_size=QUEUE, cache=folder / "cache")) as running:
        yield running


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    with Wire(server.grpc_url) as connected:
        yield connected


def asked(wire: Wire, config: EditConfig = SHORT, **changes) -> Answer:
    return wire.ask(raw(to_tensors("first", config, **changes)))


def stages(answer: Answer) -> list[str]:
    return [response["stage"][0].decode() for response in answer.responses if response]


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    difference = np.abs(found.astype(int) - expected)
    assert found.shape == expected.shape
    assert expected.std() > 10, "a flat picture would prove nothing"
    assert difference.mean() <= 0.05 and difference.max() <= 2, (difference.mean(), difference.max())


# What is offered.


@pytest.mark.parametrize(
    ("model", "inputs", "outputs"),
    [
        (STREAM_MODEL, contract.STREAM_INPUTS, contract.STREAM_OUTPUTS),
        (UNARY_MODEL, contract.UNARY_INPUTS, contract.UNARY_OUTPUTS),
    ],
)
def test_the_server_offers_what_the_contract_says(server, model, inputs, outputs):
    with triton.InferenceServerClient(server.grpc_url) as client:
        config = client.get_model_config(model).config
    for declared, found in ((inputs, config.input), (outputs, config.output)):
        expected = [(tensor.name, f"TYPE_{tensor.dtype}", list(tensor.shape)) for tensor in declared]
        kinds = type(config).DESCRIPTOR.fields_by_name["input"].message_type.fields_by_name["data_type"].enum_type
        assert [(t.name, kinds.values_by_number[t.data_type].name, list(t.dims)) for t in found] == expected
    assert [t.optional for t in config.input] == [tensor.optional for tensor in inputs]
    policy = config.dynamic_batching.default_queue_policy
    assert policy.max_queue_size == QUEUE
    assert not config.response_cache.enable, "it keeps failures as successes"


# What a clip takes.


def told(wire: Wire, name: bytes) -> Answer:
    return wire.infer(CLIPS_MODEL, {"clip": Raw("BYTES", (1,), len(name).to_bytes(4, "little") + name)})


def test_the_server_offers_what_the_contract_says_of_clips(server):
    with triton.InferenceServerClient(server.grpc_url) as client:
        config = client.get_model_config(CLIPS_MODEL).config
    assert [(t.name, list(t.dims)) for t in config.input] == [(t.name, list(t.shape)) for t in contract.CLIPS_INPUTS]
    assert [(t.name, list(t.dims)) for t in config.output] == [(t.name, list(t.shape)) for t in contract.CLIPS_OUTPUTS]


def test_what_a_clip_takes_is_told_while_an_edit_runs(server, wire):
    server.log.clear()
    call = wire.stub.ModelInfer.future(request(UNARY_MODEL, raw(to_tensors("first", LONG))))
    until(lambda: any("begins" in line for line in list(server.log)))
    expected = ServedClip(
        frames=FRAMES, height=SIDE, width=SIDE, fps=8.0, prompt="a panda is skiing", inversion_steps=STEPS
    )
    with Client(server.grpc_url) as client:
        assert client.clip("first", deadline_s=30) == expected
    assert not call.done()
    call.cancel()
    until(lambda: any("CANCELLED" in line for line in list(server.log)))


@pytest.mark.parametrize("name", [b"nobody", b"../first", b"\xff", b"", b"x" * 10_000])
def test_no_clip_is_told_of_under_another_name(wire, name):
    answer = told(wire, name)
    assert answer.status == "NOT_FOUND" and "exported are: first" in answer.message and len(answer.message) < 500
    assert told(wire, b"first").status == "OK"


def test_all_clips_are_told_of_where_none_is_named(server):
    with Client(server.grpc_url) as client:
        assert client.clips() == {"first": client.clip("first")}


def test_a_repository_without_clips_has_none_to_tell_of():
    assert contract.from_clip_tensors(contract.to_clip_tensors({})) == {}


def test_servers_of_before_tell_of_one_clip_without_its_name(server):
    with Client(server.grpc_url) as client:
        clip = client.clip("first")
    tensors = contract.to_clip_tensors({"first": clip})
    del tensors["clip"]
    assert contract.from_clip_tensors(tensors) == {"": clip}


def test_a_damaged_clip_is_not_the_clients_fault(server, wire):
    folder = server.config.repository / STREAM_MODEL / "1" / "clips" / "damaged"
    folder.mkdir()
    (folder / "manifest.json").write_text("{")
    try:
        assert told(wire, b"damaged").status == "INTERNAL"
        with Client(server.grpc_url) as client:
            assert list(client.clips()) == ["first"]
        until(lambda: any("damaged cannot be read" in line for line in list(server.log)))
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("size", [(FRAMES * 2, 40, 96), (FRAMES, SIDE, SIDE)], ids=["other", "same"])
def test_a_file_is_fitted_to_the_clip_and_edited(server, engine, tmp_path, size):
    frames = np.random.default_rng(5).integers(0, 256, (*size, 3), dtype=np.uint8)
    video.write(tmp_path / "frames", frames, 8)
    with Client(server.grpc_url) as client:
        found = client.edit("first", SHORT, video=tmp_path / "frames", stride=1)
    fitted = video.read(tmp_path / "frames", count=FRAMES, height=SIDE, width=SIDE).frames
    assert_same(found.frames, editing.edit(engine, SHORT, frames=fitted))


def test_a_file_brings_its_speed_and_sound(server, exported, tmp_path):
    """Which the clip itself has none of."""
    source = recorded(tmp_path / "source.mp4", "aac", "mp4")
    asked = f"--clip first --url {server.grpc_url} --prompt x --steps 2 --video {source} --start 60 --stride 2".split()
    for name, options in (("own.mp4", ()), ("slow.mp4", ("--fps", "4"))):
        assert cli.main(["request", *asked, *options, "--out", str(tmp_path / name)]) == 0
    own, slow = (tmp_path / "own.mp4").read_bytes(), (tmp_path / "slow.mp4").read_bytes()
    assert (video.decode(own).fps, video.decode(slow).fps) == (15, 4)
    near(loud(own), (0.0, 4 / 15, 4 / 15))
    assert not has_sound(slow)
    assert comments(tmp_path / "own.mp4")[0]["clip"] == "first"


# Edits.


def test_an_inversion_with_iterations_is_the_engines_and_kept_apart(wire, engine):
    config = replace(SHORT, inversion_iterations=2)
    first, again, plain = asked(wire, config), asked(wire, config), asked(wire)
    assert stages(first)[:STEPS] == ["invert"] * STEPS and "invert" not in stages(again) + stages(plain)
    assert_same(first.last["frames"], editing.edit(engine, config))
    assert np.abs(first.last["frames"].astype(int) - plain.last["frames"]).max() > 2


def other_frames(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)


def test_frames_that_are_sent_are_edited_and_inverted_once(wire, engine):
    frames = other_frames(1)
    first = asked(wire, source_frames=frames)
    assert stages(first) == ["invert"] * STEPS + ["sample"] * 3 + ["done"]
    assert_same(first.last["frames"], editing.edit(engine, SHORT, frames=frames))
    second = asked(wire, source_frames=frames)
    assert "invert" not in stages(second)
    np.testing.assert_array_equal(second.last["frames"], first.last["frames"])


def test_a_video_that_is_sent_is_edited(wire, engine):
    frames = other_frames(2)
    answer = asked(wire, video=lossless(frames))
    assert answer.status == "OK", answer.message
    assert_same(answer.last["frames"], editing.edit(engine, SHORT, frames=frames))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"video": b"nonsense" * 9}, "none of"),
        ({"video": lossless(other_frames(3)[:2])}, "2 frames"),
        ({"video": lossless(other_frames(3)[:, :32])}, "frames of 64×32; the clip takes 4 to 1024 frames of 64×64"),
        ({"source_frames": other_frames(3)[:2]}, "has 2 frames of 64×64; clip first takes 4"),
    ],
)
def test_sources_of_another_size_are_refused(wire, changes, words):
    answer = asked(wire, **changes)
    assert answer.status == "INVALID_ARGUMENT"
    assert words in answer.message


def test_prompts_make_one_batch_and_mp4s_are_of_their_frames(wire, engine):
    config = replace(SHORT, prompts=("a panda is skiing", "a man"), negative_prompt="a dog")
    frames = asked(wire, config)
    assert stages(frames) == ["sample"] * 3 + ["done"], "two prompts were not one batch"
    assert_same(frames.last["frames"], editing.edit(engine, config))
    mp4 = asked(wire, config, output="mp4").last
    assert "frames" not in mp4
    found = np.stack([video.decode(data).frames for data in mp4["video"]]).astype(int)
    expected = [video.decode(video.encode_mp4(edit, 8.0)).frames for edit in frames.last["frames"]]
    off, swapped = (abs(found - other).mean() for other in (expected, expected[::-1]))
    assert off < swapped / 16, "threads sum in another order, and H.264 enlarges the last bit"


def test_previews_come_as_often_as_asked(wire):
    answer = asked(wire, replace(SHORT, steps=5), preview_interval=2)
    shown = [response["step"][0] for response in answer.responses if "preview" in response]
    assert shown == [2, 4]
    previews = [response["preview"] for response in answer.responses if "preview" in response]
    assert {preview.shape for preview in previews} == {(1, FRAMES, 8, 8, 3)}
    assert all(preview.std() > 1 for preview in previews)


@pytest.mark.parametrize("model", [UNARY_MODEL, CLIPS_MODEL])
def test_only_the_outputs_that_are_named_are_answered_and_nobody_dies_of_it(server, model):
    """Triton's backend frees what it takes out without Python's lock, and Python 3.12 dies of that."""
    before = processes(server)
    with triton.InferenceServerClient(server.grpc_url) as client:
        for seed in range(12):  # none is answered from the cache
            sent = to_tensors("first", replace(SHORT, steps=1, seed=seed))
            sent = sent if model == UNARY_MODEL else {"clip": sent["clip"]}
            inputs = [
                triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)) for name, array in sent.items()
            ]
            for told, array in zip(inputs, sent.values(), strict=True):
                told.set_data_from_numpy(array)
            answer = client.infer(model, inputs, outputs=[triton.InferRequestedOutput("fps")]).get_response()
            assert [output.name for output in answer.outputs] == ["fps"]
    time.sleep(0.5)  # of what is freed later
    assert processes(server) == before


# The command line.


def command(server: Server, source: Path, out: Path, *prompts: str) -> int:
    options = ["--url", server.grpc_url, "--clip", "first", "--video", str(source), "--stride", "1", "--out", str(out)]
    options.append("--prompt-metadata")
    return cli.main(["request", *options, "--steps", "3", "--guidance", "7.5", *(f"--prompt={p}" for p in prompts)])


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_the_command_edits_a_video_of_ones_own(server, wire, tmp_path, monkeypatch, suffix):
    """An MP4 is written as the server encoded it, other files are encoded here."""
    data, prompts, written, said = lossless(other_frames(4)), ("a panda is skiing", "a man"), [], []

    def write(path, edit, fps, metadata, sound=None):
        written.append(edit)
        said.append(metadata)

    (tmp_path / "source.mkv").write_bytes(data)
    monkeypatch.setattr(video, "write", write)
    assert command(server, tmp_path / "source.mkv", tmp_path / f"edit{suffix}", *prompts) == 0
    expected = asked(wire, replace(SHORT, prompts=prompts), video=data).last["frames"]
    if suffix == ".gif":
        np.testing.assert_array_equal(np.stack(written), expected)
        assert [(one["clip"], one["steps"], one["prompts"]) for one in said] == [("first", 3, [p]) for p in prompts]
        return
    assert [comments(tmp_path / f"edit-{number}.mp4")[0]["prompts"] for number in (1, 2)] == [[p] for p in prompts]
    found = np.stack([video.read(tmp_path / f"edit-{number}.mp4").frames for number in (1, 2)]).astype(int)
    encoded = [video.decode(video.encode_mp4(edit, 8.0)).frames for edit in expected]
    assert abs(found - encoded).mean() < 2 and not written, (
        "H.264 enlarges the last bit; other edits are off by far more"
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "source.mkv does not exist"),
        (b"nonsense" * 9, "none of"),
        (lossless(other_frames(3)[:2]), "4 frames from start 0, stride 1 need 4; it has 2"),
    ],
    ids=["absent", "nonsense", "too short"],
)
def test_the_command_refuses_other_videos(server, tmp_path, capsys, data, words):
    if data is not None:
        (tmp_path / "source.mkv").write_bytes(data)
    assert command(server, tmp_path / "source.mkv", tmp_path / "edit.mp4", "a panda is skiing") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error, error
    assert not (tmp_path / "edit.mp4").exists()


# The unary model.


def test_the_unary_model_answers_over_http_and_grpc_what_the_stream_does(server, wire):
    tensors = to_tensors("first", replace(SHORT, seed=101))
    expected = wire.ask(raw(tensors)).last
    over_grpc = wire.infer(UNARY_MODEL, raw(tensors)).last
    np.testing.assert_array_equal(over_grpc["frames"], expected["frames"])
    assert over_grpc["fps"] == [8.0]
    status, body = post(server, UNARY_MODEL, tensors)
    outputs = {output["name"]: output for output in body["outputs"]}
    found = np.array(outputs["frames"]["data"], np.uint8).reshape(outputs["frames"]["shape"])
    assert status == 200
    np.testing.assert_array_equal(found, expected["frames"])
    video_file = wire.infer(UNARY_MODEL, raw(to_tensors("first", SHORT, output="mp4"))).last["video"][0]
    assert video.decode(video_file).frames.shape == (FRAMES, SIDE, SIDE, 3)


def test_the_same_request_again_comes_from_the_cache_and_another_seed_does_not(server, wire):
    def worked() -> float:
        return metrics(server)['tav_opt_requests_total{status="OK"}']

    config = replace(SHORT, eta=1.0, seed=77)
    first = wire.infer(UNARY_MODEL, raw(to_tensors("first", config)))
    before = worked()
    again = wire.infer(UNARY_MODEL, raw(to_tensors("first", config)))
    assert worked() == before, "it was computed again"
    np.testing.assert_array_equal(again.last["frames"], first.last["frames"])
    other = wire.infer(UNARY_MODEL, raw(to_tensors("first", replace(config, seed=78))))
    assert worked() == before + 1
    assert not np.array_equal(other.last["frames"], first.last["frames"])


def test_a_clip_that_is_exported_anew_is_not_answered_from_the_cache(server, wire):
    tensors = raw(to_tensors("first", replace(SHORT, seed=5)))
    manifest = server.config.repository / STREAM_MODEL / "1" / "clips" / "first" / "manifest.json"
    wire.infer(UNARY_MODEL, tensors)
    before = metrics(server)['tav_opt_responses_total{from="worker"}']
    manifest.touch()
    assert wire.infer(UNARY_MODEL, tensors).status == "OK"
    assert metrics(server)['tav_opt_responses_total{from="worker"}'] == before + 1
    assert wire.infer(UNARY_MODEL, tensors).status == "OK"
    assert metrics(server)['tav_opt_responses_total{from="worker"}'] == before + 1


@pytest.mark.parametrize(
    ("clip", "config", "status", "code", "words"),
    [
        ("nobody", SHORT, "NOT_FOUND", 404, "clip 'nobody' is unknown; exported are: first"),
        ("first", replace(SHORT, steps=0), "INVALID_ARGUMENT", 400, "steps 0 is not within"),
        ("first", replace(SHORT, prompts=("skiing " * 40,)), "INVALID_ARGUMENT", 400, "tokens long"),
    ],
)
def test_refusals_have_the_same_status_everywhere(server, wire, clip, config, status, code, words):
    tensors = to_tensors(clip, config)
    unary = [wire.infer(UNARY_MODEL, raw(tensors)) for _ in range(2)]  # the second is no success either
    for answer in (wire.ask(raw(tensors)), *unary):
        assert answer.status == status
        assert words in answer.message
    found, body = post(server, UNARY_MODEL, tensors)
    assert found == code, body
    assert words in body["error"]


def test_failures_do_not_crash_a_server_whose_client_wants_grpc_errors(server, wire):
    """Errors on a stream with this header, between unary calls, end Triton 2.51: some 100 requests are enough."""
    unknown, fine = raw(to_tensors("nobody", SHORT)), raw(to_tensors("first", replace(SHORT, steps=1)))
    for number in range(60):
        answer = wire.ask(unknown, metadata=[("triton_grpc_error", "true")])
        assert answer.status == "NOT_FOUND", (number, answer)
        assert wire.infer(UNARY_MODEL, fine if number % 2 else unknown).status == ("OK" if number % 2 else "NOT_FOUND")
    assert server.process.poll() is None


# Limits.


def test_a_cancelled_unary_call_ends_its_edit(server, wire):
    server.log.clear()
    call = wire.stub.ModelInfer.future(request(UNARY_MODEL, raw(to_tensors("first", LONG))))
    until(lambda: any("begins" in line for line in list(server.log)))
    call.cancel()
    until(lambda: any("CANCELLED" in line for line in list(server.log)))
    steps = metrics(server)
    assert asked(wire).status == "OK"
    assert steps['tav_opt_requests_total{status="CANCELLED"}'] >= 1


@pytest.mark.parametrize("model", [STREAM_MODEL, UNARY_MODEL])
def test_a_timeout_stops_an_edit(wire, model):
    inputs = raw(to_tensors("first", LONG))
    ask = wire.ask if model == STREAM_MODEL else lambda *a, **k: wire.infer(model, *a, **k)
    for seconds in (0.3, 1.2, 4.8):  # on a stalled machine the shorter ones pass before the edit has begun
        answer = ask(inputs, parameters={"timeout": int(seconds * 1e6)})
        if answer.status != "UNAVAILABLE":
            break
    assert answer.status == "CANCELLED", answer
    assert f"timeout of {seconds:g} s" in answer.message


@pytest.mark.parametrize("model", [STREAM_MODEL, UNARY_MODEL])
def test_a_bounded_queue_refuses_the_excess_at_once_and_times_out_the_rest(server, wire, model):
    """One edit runs, QUEUE may wait; those that wait have a timeout of half a second."""
    begun = threading.Event()

    def hold() -> None:
        long = request(STREAM_MODEL, raw(to_tensors("first", LONG)))
        call = wire.stub.ModelStreamInfer(iter([long]))
        for _ in call:
            begun.set()
            if release.is_set():
                call.cancel()
                return
        raise AssertionError("the long edit ended")

    release = threading.Event()
    with ThreadPoolExecutor(20) as pool:
        holding = pool.submit(hold)
        assert begun.wait(60)
        timeouts = {"timeout": 500_000}

        def ask(number: int) -> Answer:
            inputs = raw(to_tensors("first", replace(SHORT, seed=1000 + number)))
            if model == STREAM_MODEL:
                return wire.ask(inputs, parameters=timeouts)
            return wire.infer(UNARY_MODEL, inputs, parameters=timeouts)

        answers = list(pool.map(ask, range(CROWD)))
        release.set()
        holding.result(60)
    told = [answer.message for answer in answers]
    assert {answer.status for answer in answers} == {"UNAVAILABLE"}, answers
    expired = sum("timeout expired" in text for text in told)
    assert sum("maximum queue size" in text for text in told) == CROWD - expired, told
    passed_on = model == UNARY_MODEL  # one more than wait
    assert QUEUE <= expired <= QUEUE + passed_on, told
    assert asked(wire).status == "OK"


# Metrics and the log.


def test_metrics_count_what_happens(server, wire):
    before = metrics(server)
    asked(wire, replace(SHORT, prompts=("one", "two")), source_frames=other_frames(50))
    asked(wire, replace(SHORT, steps=0))
    wire.ask(raw(to_tensors("nobody", SHORT)))
    after = metrics(server)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('tav_opt_requests_total{status="OK"}') == 1
    assert grown('tav_opt_requests_total{status="INVALID_ARGUMENT"}') == 1
    assert grown('tav_opt_requests_total{status="NOT_FOUND"}') == 1
    assert grown('tav_opt_steps_total{stage="sample"}') == 3
    assert grown('tav_opt_steps_total{stage="invert"}') == STEPS
    assert grown('tav_opt_starts_total{from="computed"}') == 1
    assert grown('tav_opt_stage_seconds_count{stage="sample"}') == 1
    assert grown("tav_opt_request_seconds_count") == 3
    assert grown("tav_opt_sent_bytes_total") > 2 * FRAMES * SIDE * SIDE * 3
    instance = '{instance="tune_a_video_stream_0_0"}'
    assert after[f"tav_opt_clips_resident{instance}"] == 1
    assert after[f"tav_opt_clips_bytes{instance}"] > 10_000
    assert after[f"tav_opt_inversions_memory_bytes{instance}"] > 0
    assert after[f"tav_opt_inversions_disk_bytes{instance}"] > 0
    assert after[f"tav_opt_steps_per_second{instance}"] > 0
    assert any(name.startswith("nv_inference_pending_request_count") for name in after)


def under_id(wire: Wire, name: str, config: EditConfig) -> None:
    """An edit whose lines in the log can be told from those of others, which come late."""
    message = request(STREAM_MODEL, raw(to_tensors("first", config)))
    message.id = name
    assert not any(reply.error_message for reply in wire.stub.ModelStreamInfer(iter([message])))


def ends(server: Server, name: str) -> list[str]:
    return [line for line in list(server.log) if f"request '{name}': " in line]


def test_one_line_a_request_without_the_prompt(server, wire):
    server.log.clear()
    under_id(wire, "hushed", replace(SHORT, prompts=("a hushed panda",), negative_prompt="a loud dog"))
    under_id(wire, "hushed", replace(SHORT, prompts=("a hushed panda " * 9,)))
    until(lambda: len(ends(server, "hushed")) == 2)
    good, bad = (line.partition(": ")[2] for line in ends(server, "hushed"))
    assert "OK in" in good and "clip='first'" in good and "steps=3" in good and "sample=" in good
    assert "INVALID_ARGUMENT in" in bad
    everything = "".join(list(server.log))
    assert "hushed" not in good + bad and "loud" not in everything and "panda" not in everything


def test_probes_are_neither_counted_nor_logged(server, wire):
    def counted() -> dict[str, float]:
        return {name: value for name, value in metrics(server).items() if name.startswith("tav_opt_")}

    server.log.clear()
    before = counted()
    for _ in range(3):
        assert probe(server.http_url, server.metrics_url).state == "alive"
    assert counted() == before
    under_id(wire, REQUEST_ID, SHORT)
    name = 'tav_opt_requests_total{status="OK"}'
    assert counted()[name] == before[name] + 1, "an edit by the probe's name is an edit"
    until(lambda: ends(server, REQUEST_ID))
    assert sum(REQUEST_ID in line for line in list(server.log)) == 1, list(server.log)


# Several instances.


def test_instances_share_the_inversions_and_invert_once(exported, tmp_path):
    repository = Path(shutil.copytree(exported.repository, tmp_path / "repository"))
    config = WorkerConfig(instances=2, cache=tmp_path / "cache")
    tensors = to_tensors("first", replace(SHORT, inversion_steps=40), source_frames=other_frames(60))
    with serving(repository, config) as running, Wire(running.grpc_url) as wire, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: wire.ask(raw(tensors)), range(4)))
        found = metrics(running)
    assert [answer.status for answer in answers] == ["OK"] * 4, answers
    assert all(np.array_equal(a.last["frames"], answers[0].last["frames"]) for a in answers)
    starts = {where: found[f'tav_opt_starts_total{{from="{where}"}}'] for where in ("computed", "disk", "memory")}
    assert starts["computed"] == 1 and sum(starts.values()) == 4, starts
    assert 'tav_opt_clips_resident{instance="tune_a_video_stream_0_1"}' in found
