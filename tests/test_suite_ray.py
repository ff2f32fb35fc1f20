"""A suite on a real local Ray of several processes: the same results, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from suites import entry, random_video, settings, written

from tav_opt import checkpoint, cli, tuning_state
from tav_opt.config import InputError
from tav_opt.files import read_object
from tav_opt.suite import ray_workers
from tav_opt.suite.suite_file import read_suite

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tav-opt[ray]'")
pytestmark = pytest.mark.full
"""Ray alone takes half a minute to start and to end on two cores."""


def three(golden: Path, folder: Path, steps: int) -> Path:
    """A suite of three videos."""
    model = golden / "reference_checkpoint" / "sd"
    for number in range(3):
        random_video(folder / f"v{number}.mp4", seed=number)
    videos = [entry(f"v{number}.mp4") for number in range(3)]
    tune = {"steps": steps, "inversion_steps": 2, "save_every": 1}
    return written(folder, settings(model, tune=tune, videos=videos))


@pytest.fixture
def suite(golden: Path, tmp_path: Path) -> Path:
    """Three videos, tuned for long enough to be killed amid it."""
    return three(golden, tmp_path, 30)


@pytest.fixture
def short(golden: Path, tmp_path: Path) -> Path:
    """Three videos that are soon tuned."""
    return three(golden, tmp_path, 4)


NICENESS = {"RAY_worker_niceness": "0"}
"""Else a busy machine starves workers."""


def driver(suite: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """`tav-opt evaluate` as it is run."""
    code = "import sys; from tav_opt.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "evaluate", str(suite), "--out", str(out), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **NICENESS}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def tuned(out: Path) -> dict[str, dict[str, Any]]:
    """The values of all checkpoints, by video."""
    folders = sorted(path for path in (out / "units" / "tune").iterdir() if checkpoint.is_checkpoint(path))
    return {path.name.split("-")[0]: checkpoint.load(path).values for path in folders}


def amid_tuning(out: Path) -> tuple[Path, int]:
    """A checkpoint's folder that has a saved state of some steps and is not finished."""
    for _ in range(3000):
        for folder in (out / "units" / "tune").glob("*"):
            steps = tuning_state.saved_steps(folder)
            if steps is not None and 2 < steps < 20:
                return folder, steps
        time.sleep(0.1)
    raise AssertionError("nothing is being tuned")


def never_back(process: subprocess.Popen[str], folder: Path, steps: int) -> str:
    """Waits for a driver, whose clip in `folder` must go on from the steps that are saved; returns what it told."""
    told: list[str] = []
    reader = threading.Thread(target=lambda: told.append(process.stderr.read() if process.stderr else ""))
    reader.start()
    while process.poll() is None:
        found = tuning_state.saved_steps(folder)
        assert found is None or found >= steps, f"tuning begins anew: {found} steps after {steps}"
        steps = found or steps
        time.sleep(0.05)
    reader.join()
    return told[0]


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Ray's actors below a driver; they are children of Ray's own processes."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if any("Worker" in part for part in child.cmdline()[:1])]


def test_workers_may_be_killed_and_the_results_are_those_of_one_process(suite: Path, tmp_path: Path) -> None:
    alone = driver(suite, tmp_path / "alone")
    assert alone.wait() == 0, alone.stderr.read() if alone.stderr else ""
    shared = driver(suite, tmp_path / "shared", "--workers", "2")
    folder, before = amid_tuning(tmp_path / "shared")
    victims = workers_of(shared)
    assert victims, "no worker of Ray was found"
    victims[0].kill()
    error = never_back(shared, folder, before)
    assert shared.returncode == 0, error
    assert "[12/12]" in error and "FAILED" not in error and before > 0 and folder.is_dir()
    one, two = tuned(tmp_path / "alone"), tuned(tmp_path / "shared")
    assert set(one) == set(two) == {"v0", "v1", "v2"}
    for name in one:
        assert all((one[name][value] == two[name][value]).all() for value in one[name]), f"{name} is another"


def test_a_driver_that_was_killed_goes_on(suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = driver(suite, out, "--workers", "2")
    folder, steps = amid_tuning(out)
    below = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    psutil.wait_procs(below, timeout=60)  # Ray ends what lost its driver
    whole = {path: path.stat().st_mtime_ns for path in (out / "units").glob("*/*/unit.json")}
    assert not (folder / "unit.json").exists() and (tuning_state.saved_steps(folder) or 0) >= steps
    assert cli.main(["evaluate", str(suite), "--out", str(out)]) == 0
    for path, written_at in whole.items():
        assert path.stat().st_mtime_ns == written_at, f"{path} was whole and is computed anew"
    assert len(list((out / "units").glob("*/*/unit.json"))) == 12


def test_a_broken_clip_is_reported_by_workers_too(short: Path, tmp_path: Path) -> None:
    (tmp_path / "v1.mp4").write_bytes((tmp_path / "v1.mp4").read_bytes()[:700])
    process = driver(short, tmp_path / "out", "--workers", "2")
    _, error = process.communicate()
    assert process.returncode == 1 and "source v1: FAILED" in error and "3 units need what failed" in error
    assert set(tuned(tmp_path / "out")) == {"v0", "v2"}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one processor each, on this machine."""
    from ray.cluster_utils import Cluster

    for name, value in NICENESS.items():
        monkeypatch.setenv(name, value)
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    started.second = started.add_node(num_cpus=1)
    started.wait_for_nodes()
    yield started
    started.shutdown()


def test_a_node_that_is_lost_takes_nothing_with_it(suite: Path, tmp_path: Path, cluster: Any) -> None:
    """Its worker has no place any more; what it had in hand goes to the one that is left."""
    out = tmp_path / "out"
    process = driver(suite, out, "--ray", cluster.address)
    folder, steps = amid_tuning(out)
    cluster.remove_node(cluster.second, allow_graceful=False)
    error = never_back(process, folder, steps)
    assert process.returncode == 0 and "[12/12]" in error and "FAILED" not in error, error
    assert set(tuned(out)) == {"v0", "v1", "v2"}


def test_clips_on_one_base_do_not_load_it_again(short: Path, tmp_path: Path) -> None:
    """Tuned and edited on the model that its worker has in hand, which it loads once."""
    process = driver(short, tmp_path / "out", "--workers", "1")
    _, error = process.communicate()
    assert process.returncode == 0, error
    abouts = [read_object(path) for path in (tmp_path / "out" / "units").glob("*/*/unit.json")]
    assert sum(about["model_loaded"] for about in abouts) == 1 and len(abouts) == 12


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, which only root may mount."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_ends_all_workers_and_the_same_command_goes_on(short: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    process = driver(short, out, "--workers", "2")
    _, error = process.communicate()
    assert process.returncode == 2 and "disk full while writing" in error.splitlines()[-1], error
    whole = {path: path.stat().st_mtime_ns for path in (out / "units").glob("*/*/unit.json")}
    assert whole and len(whole) < 12, "the sources have room, checkpoints have not"
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    process = driver(short, out, "--workers", "2")
    _, error = process.communicate()
    assert process.returncode == 0 and "FAILED" not in error, error
    assert all(path.stat().st_mtime_ns == written_at for path, written_at in whole.items())
    assert len(list((out / "units").glob("*/*/unit.json"))) == 12


def test_many_clips_are_tuned_by_workers(short: Path, tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("video,prompt\nv0.mp4,a dog\nv1.mp4,a cat\n")
    model = read_suite(short).model
    sizes = ["--frames", "3", "--height", "64", "--width", "64", "--steps", "2", "--inversion-steps", "2"]
    given = ["tune", "--model", str(model), "--many", str(tmp_path / "clips.csv"), "--out", str(tmp_path / "out")]
    code = "import sys; from tav_opt.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *given, *sizes, "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "out" / name) for name in ("v0", "v1")]
    assert checkpoint.load(tmp_path / "out" / "v1").info.prompt == "a cat"


def test_what_fits_a_cluster() -> None:
    taken = {"num_cpus": 1.0, "memory": 4.0 * 2**30}
    assert ray_workers.fitting(None, taken, {"CPU": 8.0, "memory": 10.0 * 2**30}) == 2
    assert ray_workers.fitting(1, taken, {"CPU": 8.0, "memory": 10.0 * 2**30}) == 1
    with pytest.raises(InputError, match=r"3 workers do not fit: .* there is room for 2"):
        ray_workers.fitting(3, taken, {"CPU": 8.0, "memory": 10.0 * 2**30})
    assert ray_workers.gpu_share(20 * 2**30, 80 * 2**30) == 0.25
    assert ray_workers.gpu_share(41 * 2**30, 80 * 2**30) == 1
    with pytest.raises(InputError, match=r"needs 90.0 GiB, a GPU here has 80.0"):
        ray_workers.gpu_share(90 * 2**30, 80 * 2**30)
    with pytest.raises(InputError, match="100000 workers need about"):
        ray_workers.check_memory(100_000, 1.0)


def test_no_cluster_is_one_line(small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["evaluate", str(small()), "--out", str(tmp_path / "out"), "--ray", "127.0.0.1:9"])
    error = capsys.readouterr().err
    assert status == 2 and "no Ray answers at 127.0.0.1:9" in error, error
