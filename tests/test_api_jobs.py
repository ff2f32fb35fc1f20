"""The API without a server: who works on jobs when, what outlives a process, and what requests may say."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tav_opt import video
from tav_opt.api import asked_fields, runner
from tav_opt.api.api_config import ApiConfig, checked
from tav_opt.api.asked_fields import request_model
from tav_opt.api.job_files import JobFiles
from tav_opt.api.jobs import Job, Jobs, Outcome, QueueFull
from tav_opt.api.keys import Keys
from tav_opt.api.orders import expected_steps, order_of
from tav_opt.api.runner import Runner
from tav_opt.client import Edit, Progress, ServerError
from tav_opt.client.channel import Unreachable
from tav_opt.config import PRESETS, EditConfig, InputError
from tav_opt.contract import STREAM_INPUTS, WORDS, ServedClip, ServedTensor

CLIP = ServedClip(frames=3, height=32, width=48, fps=6.0, prompt="a dog", inversion_steps=4)
MP4 = video.encode_mp4(np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8), 6)
EDIT = Edit(frames=np.empty((0, 0, 0, 0, 3), np.uint8), fps=6.0, videos=(MP4,), metadata=({"steps": 2},))
OUTCOME = Outcome(seconds="1", size="48x32", settings={}, bytes=10)


def job(owner: str = "", **given: Any) -> Job:
    asked = {"model": "toy", "prompt": "x", "steps": 2}
    known = {"id": f"video_{secrets.token_hex(16)}", "model": "toy", "prompt": "x", "asked": asked, "seconds": "0.5"}
    return Job(**known | {"size": "48x32", "owner": owner} | given)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "jobs.sqlite")


# The table.


def test_a_job_is_what_it_was_after_another_opening(jobs, tmp_path):
    one = job(owner="anna", remixed_from="video_x", bytes=7)
    jobs.add(one, 1)
    found = Jobs(tmp_path / "jobs.sqlite").get(one.id, "anna")
    assert found == replace(one, number=found.number) and Jobs(tmp_path / "jobs.sqlite").get(one.id, "berta") is None


def test_what_is_done_stays_done(jobs):
    one = job()
    jobs.add(one, 9)
    assert jobs.take().id == one.id and jobs.complete(one.id, OUTCOME, 60)
    for change in (jobs.give_back, jobs.again, lambda i: jobs.fail(i, "expired", "x", 1)):
        change(one.id)
    assert not jobs.complete(one.id, OUTCOME, 60) and jobs.take() is None
    assert (jobs.get(one.id).status, jobs.get(one.id).runs) == ("completed", 1)


def test_owners_take_turns_and_each_is_served_in_order(jobs):
    for owner in ("anna", "anna", "anna", "berta", "berta"):
        jobs.add(job(owner), 9)
    taken = [jobs.take() for _ in range(5)]
    assert [one.owner for one in taken] == ["anna", "berta", "anna", "berta", "anna"]
    assert [one.number for one in taken if one.owner == "anna"] == [1, 2, 3] and jobs.take() is None


def test_an_owner_has_so_many_unfinished_jobs(jobs):
    jobs.add(job("anna"), 2)
    jobs.add(job("anna"), 2)
    with pytest.raises(QueueFull):
        jobs.add(job("anna"), 2)
    jobs.add(job("berta"), 2)
    jobs.fail(jobs.take().id, "expired", "x", 1)
    jobs.add(job("anna"), 2)
    assert jobs.unfinished_of("anna") == 2


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"\xff" * 200])
def test_a_table_that_is_none_is_named(tmp_path, content):
    (tmp_path / "jobs.sqlite").write_bytes(content)
    with pytest.raises(InputError, match="sqlite cannot be used"):
        Jobs(tmp_path / "jobs.sqlite")


def test_a_table_of_another_version_is_left_alone(jobs, tmp_path):
    jobs._db.execute("pragma user_version = 7")
    with pytest.raises(InputError, match="of version 7, not 1"):
        Jobs(tmp_path / "jobs.sqlite")


# Who works on them.


class Fake:
    """A server's client: each edit does what the next of its plans says."""

    def __init__(self, *plans: Any) -> None:
        self.plans, self.streams, self.cancelled = list(plans), 0, 0

    async def clip(self, _name: str) -> ServedClip:
        return CLIP

    async def clips(self, **_: Any) -> dict[str, ServedClip]:
        return {"toy": CLIP}

    async def is_live(self) -> bool:
        return True

    @contextlib.asynccontextmanager
    async def stream(self, _clip: str, _edit: EditConfig, **options: Any) -> AsyncIterator[Any]:
        self.streams += 1
        self.options = options
        try:
            yield Stream(self.plans.pop(0) if self.plans else None)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class Stream:
    """Two steps, an error amid them or before, or no end."""

    def __init__(self, plan: Any) -> None:
        self.plan, self.step = plan, 0

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Progress:
        if self.plan == "endless":
            await asyncio.sleep(0.01)
            return Progress(stage="sample", step=1, steps=2)
        if isinstance(self.plan, Exception) and self.step == getattr(self.plan, "after", 1):
            raise self.plan
        self.step += 1
        if self.step > 2:
            raise StopAsyncIteration
        return Progress(stage="sample", step=self.step, steps=2)

    async def result(self) -> Edit:
        return EDIT


def before(error: Exception) -> Exception:
    error.after = 0  # type: ignore[attr-defined]
    return error


class World:
    """A folder, in which one process after the other works on the jobs."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.config = ApiConfig(jobs=folder, **settings)
        self.files, self.jobs = JobFiles(folder), Jobs(folder / "jobs.sqlite")

    def work(self, client: Fake, until: Callable[[], bool], recover: bool = True) -> Runner:
        """Until something is so, and then it is asked to end."""

        async def run() -> Runner:
            found = Runner(self.config, self.jobs, self.files, client)  # type: ignore[arg-type]
            if recover:
                found.recover()
            task = asyncio.create_task(found.run())
            end = time.monotonic() + 20
            while not until():
                assert time.monotonic() < end and not task.done(), task
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait([task])
            return found

        return asyncio.run(run())

    def status(self, one: Job) -> str:
        found = self.jobs.get(one.id)
        return found.status if found else "removed"

    def ends(self, *all_: Job) -> Callable[[], bool]:
        return lambda: all(self.status(one) in ("completed", "failed") for one in all_)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "jobs")


@pytest.fixture
def one(world: World) -> Job:
    found = job()
    world.jobs.add(found, 9)
    return found


def test_a_finished_job_has_its_files_and_no_uploads(world, one):
    client = Fake()
    world.work(client, world.ends(one))
    found = world.jobs.get(one.id)
    assert (found.status, found.seconds, found.size, found.settings) == ("completed", "0.5", "48x32", {"steps": 2})
    assert found.bytes == sum(path.stat().st_size for path in (world.config.jobs / "videos" / one.id).rglob("*.*"))
    assert world.files.path(one.id, "video").read_bytes() == MP4 and client.options["output"] == "mp4"


def test_what_was_lost_amid_its_run_is_run_again_once(world, one, capsys):
    lost = [ServerError("the server died while it had the request", "UNAVAILABLE") for _ in range(3)]
    client = Fake(*lost[:1])
    world.work(client, world.ends(one))
    assert world.status(one) == "completed" and client.streams == 2
    two = job()
    world.jobs.add(two, 9)
    client = Fake(*lost)
    world.work(client, world.ends(two))
    found = world.jobs.get(two.id)
    assert client.streams == 2 and "it was run 2 times" in found.error_message and found.error_code == "server_error"
    assert capsys.readouterr().err.count("is run again") == 2


@pytest.mark.parametrize("error", [Unreachable("no server answers"), ServerError("queue full", "UNAVAILABLE")])
def test_what_was_never_begun_waits_as_long_as_it_takes(world, one, error, monkeypatch):
    monkeypatch.setattr(runner, "FIRST_REST", 0.01)
    monkeypatch.setattr(runner, "LONGEST_REST", 0.02)
    client = Fake(*[before(error)] * 5)
    world.work(client, world.ends(one))
    assert world.status(one) == "completed" and client.streams == 6 and world.jobs.get(one.id).runs == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("prompt is wrong"), "invalid_request"),
        (ServerError("broken", "INTERNAL"), "server_error"),
        (ValueError("a\nfault"), "server_error"),
    ],
)
def test_other_failures_are_told_and_not_tried_again(world, one, error, code):
    client = Fake(error)
    world.work(client, world.ends(one))
    found = world.jobs.get(one.id)
    assert client.streams == 1 and found.error_code == code and "\n" not in found.error_message
    assert str(error).splitlines()[0] in found.error_message and not (world.config.jobs / "videos" / one.id).exists()


def test_a_process_that_is_asked_to_end_gives_back_what_it_had_in_work(world, one):
    client = Fake("endless")
    world.work(client, lambda: client.streams == 1)
    assert client.cancelled == 1 and world.status(one) == "queued" and world.jobs.get(one.id).runs == 0
    world.work(Fake(), world.ends(one))
    assert world.status(one) == "completed" and world.jobs.get(one.id).runs == 1


def test_after_kills_a_job_is_run_again_once(world, one):
    for _ in range(2):
        world.jobs.take()
        Runner(world.config, world.jobs, world.files, Fake()).recover()  # type: ignore[arg-type]
    found = world.jobs.get(one.id)
    assert found.status == "failed" and "the API ended while it made this video; it was run 2" in found.error_message


def test_what_was_whole_on_the_disk_at_a_kill_is_not_made_again(world, one):
    world.jobs.take()
    world.files.store(one.id, EDIT, "x")
    client = Fake()
    world.work(client, world.ends(one))
    assert client.streams == 0 and world.status(one) == "completed"


def test_folders_of_no_job_and_half_written_files_go(world, one):
    stray = world.config.jobs / "videos" / "video_stray"
    stray.mkdir()
    world.work(Fake(), world.ends(one))
    assert not stray.exists()


def test_a_removed_job_is_cancelled_and_leaves_nothing(world, one):
    client = Fake("endless")

    async def run() -> None:
        found = Runner(world.config, world.jobs, world.files, client)  # type: ignore[arg-type]
        task = asyncio.create_task(found.run())
        while not found.percent(world.jobs.get(one.id)):
            await asyncio.sleep(0.01)
        assert found.percent(world.jobs.get(one.id)) == 50
        await found.remove(world.jobs.get(one.id))
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(run())
    assert world.status(one) == "removed" and client.cancelled == 1
    assert list((world.config.jobs / "videos").iterdir()) == []


def test_finished_jobs_expire_and_those_that_no_server_takes_fail(tmp_path):
    world = World(tmp_path / "jobs", keep_hours=0.001)
    done, waiting = job(), job(created_at=time.time() - 60)
    world.jobs.add(done, 9)
    world.jobs.take()
    world.jobs.complete(done.id, world.files.store(done.id, EDIT, "x"), -1)
    world.jobs.add(waiting, 9)
    client = Fake(*[before(Unreachable("no server"))] * 100)
    world.work(client, lambda: world.status(done) == "removed" and world.status(waiting) == "failed")
    assert world.jobs.get(waiting.id).error_message == "no server took it within 0.001 hours"
    assert not (world.config.jobs / "videos" / done.id).exists()


def test_the_oldest_finished_go_where_room_is_short(tmp_path):
    world = World(tmp_path / "jobs", keep_mib=1)
    made = [job() for _ in range(3)]
    for one in made:
        world.jobs.add(one, 9)
        world.jobs.take()
        world.jobs.complete(one.id, replace(OUTCOME, bytes=400 << 10), 60)
    found = Runner(world.config, world.jobs, world.files, Fake())  # type: ignore[arg-type]
    assert found.make_room(0) and [world.status(one) for one in made] == ["removed", "completed", "completed"]
    world.jobs.add(job(bytes=1000 << 10), 9)
    assert not found.make_room(1000 << 10) and world.status(made[1]) == world.status(made[2]) == "removed"


def test_a_folder_is_of_one_process(world):
    with pytest.raises(InputError, match="is in use by another tav-opt api"):
        JobFiles(world.config.jobs)
    world.files.close()
    JobFiles(world.config.jobs).close()


# What requests may say.


def test_every_setting_of_the_contract_is_a_field_with_its_range():
    names = {tensor.name for tensor in STREAM_INPUTS} - set(asked_fields.SPOKEN_FOR)
    for kind in ("videos", "edits"):
        schema = request_model(kind).model_json_schema()["properties"]
        assert names <= set(schema)
        steps, seed = schema["steps"]["anyOf"][0], schema["seed"]["anyOf"][0]
        assert (steps["minimum"], steps["maximum"]) == (1, 1000) and seed["maximum"] == 2**63 - 1
        assert schema["solver"]["anyOf"][0]["enum"] == ["ddim", "dpm++", "unipc"]
        assert schema["guidance_scale"]["description"] == "classifier-free guidance"


@pytest.fixture
def newer_contract(monkeypatch: pytest.MonkeyPatch):
    """One with inputs that this file has never heard of."""
    newer = (
        ServedTensor(name="words", dtype="STRING", shape=(-1,), doc="several", optional=True),
        ServedTensor(name="strength", dtype="FP32", shape=(1,), doc="one", optional=True),
        ServedTensor(name="poses", dtype="UINT8", shape=(-1, -1, -1, 3), doc="a clip", optional=True),
    )
    monkeypatch.setattr(asked_fields, "STREAM_INPUTS", (*STREAM_INPUTS, *newer))
    for found in (request_model, asked_fields.files, asked_fields.frames):
        found.cache_clear()
    yield
    for found in (request_model, asked_fields.files, asked_fields.frames):
        found.cache_clear()


def test_settings_that_come_later_appear_by_themselves(newer_contract):
    model = request_model("videos")
    schema = model.model_json_schema()["properties"]
    assert schema["words"]["anyOf"][0]["items"]["type"] == "string" and schema["strength"]["description"] == "one"
    assert asked_fields.lists(model) == {"words", *WORDS}
    assert asked_fields.frames() == {"poses"} and asked_fields.files() == {"poses", "mask"}
    asked = model.model_validate_json('{"prompt": "x", "words": ["a", "b"], "strength": 0.5}').model_dump()
    assert asked["words"] == ("a", "b") and asked["strength"] == 0.5


def test_an_order_is_what_a_request_of_ours_would_be():
    asked = {"model": "toy@fast", "prompt": "x", "fps": 3.0, "seconds": 1, "seed": 5, "eta": 0.5}
    order = order_of(asked, CLIP)
    assert order.edit == EditConfig(prompts="x", seed=5, eta=0.5) and order.clip == "toy"
    assert order.options["preset"] == "fast" and order.options["fps"] == 3 and "steps" in order.options["left_out"]
    assert expected_steps(order) == PRESETS["fast"]["steps"]
    order = order_of({"model": "toy", "prompt": "x", "num_inference_steps": 7, "inversion": False}, CLIP)
    assert order.edit.steps == expected_steps(order) == 7 and order.options["left_out"].isdisjoint(
        {"steps", "inversion"}
    )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"fps": 0.0}, "fps 0 is not within"),
        ({"input_reference": "data:", "inversion": False}, "would not be looked at"),
        ({"input_reference": {"id": "video_x"}, "stride": 1}, "stride chooses frames of a video that is sent"),
        ({"model": "toy@"}, "preset '' is not"),
        ({"num_inference_steps": 0}, "steps 0 is not within 1…1000"),
        ({"seconds": "long"}, "seconds long: clip toy has 0.5"),
        ({"seconds": "1e999"}, "clip toy has 0.5"),
    ],
)
def test_what_makes_no_sense_together_is_refused(asked, words):
    with pytest.raises(InputError, match=words):
        order_of({"model": "toy", "prompt": "x", **asked}, CLIP)


# Keys and settings.


def test_keys_are_owners_and_nothing_else_is(tmp_path):
    (tmp_path / "keys").write_text("# two\n\nanna 0123456789abcdef\nberta  fedcba9876543210\n")
    keys = Keys.read(tmp_path / "keys")
    assert keys.needed and keys.owner("Bearer 0123456789abcdef") == "anna" and keys.owner("bearer fedcba9876543210")
    for header in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer anna",
        "Basic 0123456789abcdef",
        "0123456789abcdef",
        "Bearer é",
    ):
        assert keys.owner(header) is None
    assert Keys.read(None).owner(None) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no key"),
        ("# none\n", "has no key"),
        ("anna\n", "line 1: must be an owner's name and a key"),
        ("anna short\n", "line 1: the key of anna has under 16 letters"),
        ("anna 0123456789abcdef\nberta 0123456789abcdef", "line 2: this key stands there twice"),
    ],
)
def test_files_of_keys_that_are_none_are_named(tmp_path, text, words):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(InputError, match=words):
        Keys.read(tmp_path / "keys")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "example.org"])
def test_other_machines_need_keys(tmp_path, host):
    with pytest.raises(InputError, match="lets other machines in"):
        checked(ApiConfig(host=host, jobs=tmp_path))
    assert checked(ApiConfig(host=host, jobs=tmp_path, keys=tmp_path / "keys")).host == host


def test_what_the_configuration_says_is_held():
    assert {field.name for field in fields(ApiConfig)} >= {"queue", "keep_hours", "keep_mib", "upload_mib", "parallel"}
    with pytest.raises(InputError, match="a TLS certificate and its key go together"):
        checked(ApiConfig(tls_certificate="x.pem"))
