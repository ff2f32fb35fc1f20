"""The real server with several edits in hand: each answer is that of its edit alone."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import supervised
from served import serving, until
from supervised import CLIP, SHORT

from tav_opt import editing
from tav_opt.client import Client
from tav_opt.config import EditConfig, WorkerConfig
from tav_opt.engines.registry import open_clip

CLIENTS = 8
CONFIG = replace(SHORT, steps=20)
EDITS = [replace(CONFIG, prompts=(f"a panda is skiing {n}",), guidance_scale=5.0 + n) for n in range(CLIENTS)]


@pytest.fixture(scope="module")
def repository(golden, tmp_path_factory):
    return supervised.repository(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def alone(repository):
    engine = open_clip(repository, CLIP, threads=1)
    return [editing.edit(engine, config) for config in EDITS]


@pytest.fixture
def server(repository):
    with serving(repository, WorkerConfig(batch_requests=4)) as running:
        yield running


def edited(url: str, config: EditConfig) -> np.ndarray:
    with Client(url) as client:
        return client.edit(CLIP, config).frames


def assert_alike(found: np.ndarray, expected: np.ndarray) -> None:
    off = abs(found.astype(int) - expected)
    assert expected.std() > 10 and off.mean() <= 0.05 and off.max() <= 2, (off.mean(), off.max())


def together(server) -> list[int]:
    return [int(found[1]) for line in list(server.log) if (found := re.search(r": OK in .* together=(\d+)", line))]


def test_eight_clients_are_served_in_batches_and_one_that_leaves_harms_nobody(server, alone):
    """And what is in hand when the server is told to stop is answered."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        with Client(server.grpc_url) as client, client.stream(CLIP, replace(CONFIG, steps=1000)) as leaving:
            next(leaving)
            futures = [pool.submit(edited, server.grpc_url, config) for config in EDITS]
            until(lambda: len(together(server)) >= 2)
            leaving.cancel()
        for found, expected in zip((future.result(120) for future in futures), alone, strict=True):
            assert_alike(found, expected)
        until(lambda: any("CANCELLED" in line for line in list(server.log)))
        until(lambda: len(together(server)) == CLIENTS)
        assert max(together(server)) == 4, together(server)
        with Client(server.grpc_url) as client, client.stream(CLIP, replace(EDITS[0], steps=200)) as first:
            next(first)
            second = pool.submit(edited, server.grpc_url, EDITS[1])
            until(lambda: server._channel._in_hand.get("tune_a_video_stream_0_0") == 2)
            server.drain()
            assert_alike(second.result(60), alone[1])
            assert first.result().frames.shape == alone[0].shape
    assert server.wait(60)
