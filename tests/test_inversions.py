"""The cache of inversions: bounded, shared, and never in the way."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import GIB, Stop

from tav_opt import ddim
from tav_opt.config import InversionConfig
from tav_opt.serving import inversions
from tav_opt.serving.failures import DeadlinePassed
from tav_opt.serving.inversions import Inversions


def latents(seed: int, values: int = 1000) -> torch.Tensor:
    return torch.randn((1, 4, values // 4, 1, 1), generator=torch.Generator().manual_seed(seed))


def cache(folder: Path | None, **changes) -> Inversions:
    return Inversions(**{"memory_limit": GIB, "folder": folder, "disk_limit": GIB} | changes)


def name_of(number: int) -> str:
    return inversions.key("r", InversionConfig(steps=number), "clip")


def never():
    raise AssertionError("computed again")


def test_inversions_survive_a_restart_bit_for_bit(tmp_path):
    assert cache(tmp_path).get(name_of(1), lambda: latents(1))[1] == "computed"
    found, where = cache(tmp_path).get(name_of(1), never)
    assert where == "disk" and torch.equal(found, latents(1))


def test_every_part_of_the_key_counts():
    configs = [InversionConfig(steps=steps, iterations=n) for steps, n in ((1, 0), (11, 0), (1, 1), (1, 11))]
    configs += [replace(config, trajectory=True) for config in configs]
    keys = {inversions.key(r, i, c) for r in ("a", "b") for i in configs for c in ("clip", "1 clip", "frames 1")}
    assert len(keys) == 48


def test_what_was_cached_before_inversions_had_a_configuration_is_found():
    name = hashlib.sha256(b"r 50 clip").hexdigest()
    assert inversions.key("r", InversionConfig(steps=50), "clip") == name


def test_memory_and_disk_are_bounded_and_what_was_used_last_stays(tmp_path):
    ours = cache(tmp_path, memory_limit=8_000, disk_limit=9_000)
    for number in (1, 2, 1, 3):
        ours.get(name_of(number), lambda number=number: latents(number))
        time.sleep(0.01)  # file systems' clocks tick slowly
    assert 0 < ours.memory_bytes() <= 8_000
    assert 0 < ours.disk_bytes() <= 9_000
    assert ours.get(name_of(1), never)[1] == "memory"
    assert ours.get(name_of(2), lambda: latents(2))[1] == "computed"
    huge = cache(tmp_path, memory_limit=10, disk_limit=10)
    assert torch.equal(huge.get(name_of(9), lambda: latents(9))[0], latents(9))
    assert huge.memory_bytes() == 0


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:-1] + b"\x55", lambda _: b"{}"]
)
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    cache(tmp_path).get(name_of(1), lambda: latents(1))
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    troubles = []
    found, where = cache(tmp_path, on_trouble=troubles.append).get(name_of(1), lambda: latents(1))
    assert where == "computed" and torch.equal(found, latents(1))
    assert len(troubles) == 1 and path.name in troubles[0]
    assert cache(tmp_path).get(name_of(1), never)[1] == "disk"


def test_a_full_disk_costs_only_the_copy(tmp_path):
    """RLIMIT_FSIZE makes every write fail as a full disk does."""
    code = f"""
import resource, signal, torch
from pathlib import Path
from tav_opt.config import InversionConfig
from tav_opt.serving.inversions import Inversions, key
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
troubles = []
ours = Inversions(memory_limit=1 << 30, folder=Path({str(tmp_path)!r}), disk_limit=1 << 30, on_trouble=troubles.append)
found = [ours.get(key("r", InversionConfig(steps=1), "clip"), lambda: torch.ones(1, 4, 250, 1, 1))[1] for _ in range(2)]
assert found == ["computed", "memory"], found
assert len(troubles) == 1 and "not kept on disk" in troubles[0], troubles
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".lock-")], "a part was left behind"


def test_a_folder_that_cannot_be_made_costs_only_the_disk(tmp_path):
    (tmp_path / "file").write_text("")
    troubles = []
    ours = cache(tmp_path / "file" / "cache", on_trouble=troubles.append)
    assert ours.get(name_of(1), lambda: latents(1))[1] == "computed"
    assert ours.get(name_of(1), never)[1] == "memory"
    assert troubles


def test_of_several_that_ask_at_once_one_computes(tmp_path):
    computing, found = [], []

    def compute():
        computing.append(1)
        time.sleep(0.3)
        return latents(1)

    threads = [
        threading.Thread(target=lambda: found.append(cache(tmp_path).get(name_of(1), compute))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computing) == 1
    assert sorted(where for _, where in found) == ["computed", *["disk"] * 5]
    assert all(torch.equal(one, latents(1)) for one, _ in found)


def test_who_waits_for_anothers_inversion_can_leave_and_takes_over_when_that_one_fails(tmp_path):
    begun, go = threading.Event(), threading.Event()

    def failing():
        begun.set()
        go.wait(10)
        raise ddim.Stopped

    def first():
        with pytest.raises(ddim.Stopped):
            cache(tmp_path).get(name_of(1), failing)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(10)
    with pytest.raises(DeadlinePassed):
        cache(tmp_path).get(name_of(1), never, Stop(3, DeadlinePassed()))
    waited = []
    found, where = cache(tmp_path).get(name_of(1), lambda: latents(1), lambda: (waited.append(1), go.set()))
    thread.join()
    assert waited and where == "computed" and torch.equal(found, latents(1))
