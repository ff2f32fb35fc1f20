"""What lies in the repository while it is served: pipes in files' places, a repository that goes and comes back."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import supervised
from served import until
from supervised import CLIP, SHORT

from tav_opt.client import Client, Retry, ServerError
from tav_opt.config import InputError
from tav_opt.contract import STREAM_MODEL

PATIENT = Retry(attempts=60, longest_pause_s=1.0)
ONCE = Retry(attempts=1)


@pytest.fixture
def repository(golden: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    common = supervised.repository(golden, tmp_path_factory.getbasetemp())
    return Path(shutil.copytree(common, tmp_path / "repository"))


@pytest.fixture
def run(repository: Path) -> Iterator[supervised.Serving]:
    with supervised.serving(repository) as running:
        yield running


def test_a_pipe_in_a_files_place_is_refused_and_nobody_waits(run, repository):
    clips = repository / STREAM_MODEL / "1" / "clips"
    for name, file in (("piped", "manifest.json"), ("valued", "values.safetensors")):
        shutil.copytree(clips / CLIP, clips / name)
        (clips / name / file).unlink()
        os.mkfifo(clips / name / file)
    shutil.copytree(clips / CLIP, clips / "vast")
    os.truncate(clips / "vast" / "values.safetensors", 1 << 40)
    with Client(run.urls["gRPC"], retry=ONCE) as client:
        expected = client.edit(CLIP, SHORT).frames
        for name in ("piped", "valued", "vast"):
            began = time.monotonic()
            with pytest.raises(ServerError, match=f"clip {name} cannot be opened") as refused:
                client.edit(name, SHORT)
            assert refused.value.status == "INTERNAL" and time.monotonic() - began < 20, "it did not wait"
            np.testing.assert_array_equal(client.edit(CLIP, SHORT).frames, expected)
        with pytest.raises(ServerError, match="cannot be read: it is no plain file"):
            client.clip("piped")
        assert client.clip(CLIP).frames == expected.shape[1]
    assert run.restarts() == 0


def test_a_repository_that_goes_and_comes_back_is_served_again(run, repository):
    """A server that dies meanwhile is waited with, not given up."""
    away = repository.with_name("away")
    with Client(run.urls["gRPC"], retry=PATIENT) as client:
        expected = client.edit(CLIP, SHORT).frames
        repository.rename(away)
        with pytest.raises(InputError, match="is unknown; exported are: none"):
            client.edit(CLIP, SHORT)
        away.rename(repository)
        np.testing.assert_array_equal(client.edit(CLIP, SHORT).frames, expected)
        repository.rename(away)
        supervised.triton(run.process).kill()
        until(lambda: any("is gone: waits until it is back" in line for line in list(run.errors)))
        time.sleep(2)
        assert run.process.poll() is None and run.restarts() == 1, "waiting is no restart"
        away.rename(repository)
        assert run.ready() == run.urls
        np.testing.assert_array_equal(client.edit(CLIP, SHORT).frames, expected)


def test_two_instances_both_drain(repository):
    """The edits that each of them has in hand end, though the other is idle before."""
    with supervised.serving(repository, "--instances", "2") as run, Client(run.urls["gRPC"], retry=ONCE) as client:
        expected = client.edit(CLIP, replace(SHORT, steps=40)).frames
        begun: set[int] = set()

        def edit(number: int, steps: int) -> np.ndarray:
            config = replace(SHORT, steps=steps)
            return client.edit(CLIP, config, on_progress=lambda *_: begun.add(number)).frames

        with ThreadPoolExecutor(2) as pool:
            edits = [pool.submit(edit, number, steps) for number, steps in enumerate((40, 400))]
            until(lambda: len(begun) == 2)
            run.process.send_signal(signal.SIGTERM)
            short, long = (one.result() for one in edits)
        np.testing.assert_array_equal(short, expected)
        assert long.shape == expected.shape
        assert run.ended() == 0, run.errors
