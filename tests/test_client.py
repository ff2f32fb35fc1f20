"""The client where no server helps it; its edits are tested in test_serving.py."""

from __future__ import annotations

import socket

import pytest

from tav_opt.client import Client
from tav_opt.config import EditConfig, InputError


@pytest.mark.parametrize("url", ["", "localhost", "http://localhost:8001", "localhost:", "localhost:grpc"])
def test_a_url_is_host_and_port(url):
    with pytest.raises(InputError, match=r"is not host:port, e\.g\. localhost:8001"):
        Client(url)


def test_an_absent_server_is_named_with_what_to_do():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, not listening: nothing answers there
        url = f"127.0.0.1:{s.getsockname()[1]}"
        with Client(url) as client, pytest.raises(InputError, match=rf"no server answers at {url}.*tav-opt serve"):
            client.edit("toy", ["a panda"])


def test_settings_that_do_not_fit_the_wire_leave_the_client_usable():
    with Client("127.0.0.1:1") as client:
        for seed in (-1, 2**64):
            with pytest.raises(InputError, match=f"seed {seed} does not fit UINT64"):
                client.edit("toy", EditConfig(prompts=("x",), seed=seed))
