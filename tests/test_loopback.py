"""Which addresses are this machine's, and that no proxy is asked for them."""

from __future__ import annotations

import urllib.request

import pytest

from tav_opt import loopback
from tav_opt.client.channel import options
from tav_opt.loopback import is_loopback, needs_no_proxy, urlopen

NAMES = "localhost LOCALHOST localhost. a.localhost ip6-localhost"
ADDRESSES = "127.0.0.1 127.0.0.2 127.1 0.0.0.0 ::1 [::1] [::] ::ffff:127.0.0.1"
ELSEWHERE = "example.org 127.example.org localhost.example.org 10.0.0.1 [2001:db8::1] ::ffff:10.0.0.1 128 ü.org"


@pytest.mark.parametrize("host", [*NAMES.split(), *ADDRESSES.split()])
def test_this_machine_by_its_spelling(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", [*ELSEWHERE.split(), "", "[", "127.0.0.1.example.org"])
def test_another_machine(host):
    assert not is_loopback(host)


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_where_no_proxy_says_so_the_way_is_direct(monkeypatch, name):
    for other in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
    assert not needs_no_proxy("192.0.2.1")
    for value in ("*", "192.0.2.1", "a.org, 192.0.2.1"):
        monkeypatch.setenv(name, value)
        assert needs_no_proxy("192.0.2.1"), value


@pytest.mark.parametrize("url", ["LOCALHOST:1", "127.0.0.2:1", "[::1]:1", "ipv4:127.0.0.1:1", "dns:localhost:1"])
def test_channels_to_this_machine_ask_no_proxy(url):
    assert ("grpc.enable_http_proxy", 0) in options(url)
    assert ("grpc.enable_http_proxy", 0) not in options("192.0.2.1:8001")


def test_a_server_of_this_machine_is_asked_directly_whatever_its_address(monkeypatch):
    asked = []
    monkeypatch.setattr(loopback._DIRECT, "open", lambda request, timeout: asked.append(request))
    urlopen("http://192.0.2.1:8000/", 3.0, direct=True)
    urlopen("http://127.0.0.2:8000/", 3.0)
    assert asked == ["http://192.0.2.1:8000/", "http://127.0.0.2:8000/"]


def test_a_remote_address_is_opened_as_the_user_configured(monkeypatch):
    asked = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: asked.append((request, timeout)))
    urlopen("http://192.0.2.1:8000/", 3.0)
    assert asked == [("http://192.0.2.1:8000/", 3.0)]
