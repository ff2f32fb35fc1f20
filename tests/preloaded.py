"""Our commands in a process forked from one that has imported PyTorch and diffusers: those seconds are spent once.

A command's arguments, folder, environment and files are the caller's, and so is its exit status. What stays running
(`tav-opt serve`, …) is started as it is installed.
"""

from __future__ import annotations

import array
import contextlib
import importlib
import json
import os
import runpy
import socket
import stat
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

STAYING = ("serve", "api", "app", "study")


@contextlib.contextmanager
def commands(folder: Path) -> Iterator[Path]:
    """A folder of `tav-opt` and `python`, to be put before those that are installed, while this is open."""
    place = folder / "preloaded"
    with subprocess.Popen([sys.executable, __file__, str(place)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            for name in ("tav-opt", "python"):
                script = folder / "bin" / name
                script.parent.mkdir(exist_ok=True)
                script.write_text(
                    f"#!{sys.executable} -S\nimport sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                    f"import preloaded; preloaded.ask({str(place)!r}, {name!r})\n"
                )
                script.chmod(script.stat().st_mode | stat.S_IXUSR)
            yield folder / "bin"
        finally:
            process.kill()


def ask(place: str, name: str) -> None:
    """Runs the caller's command, and ends with its status."""
    arguments = sys.argv[1:]
    ours = (
        arguments[:1] and arguments[0] not in STAYING
        if name == "tav-opt"
        else arguments[:2] == ["-m", "tav_opt.export"]
    )
    if not ours:
        os.execv(Path(sys.executable).parent / name, [name, *arguments])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        files = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (0, 1, 2)))
        connection.sendmsg([b"\0"], [files])
        connection.sendall(json.dumps([name, arguments, os.getcwd(), dict(os.environ)]).encode() + b"\n")
        told = connection.recv(1)
    sys.exit(told[0] if told else 255)


def _serve(place: str) -> None:
    for module in ("cli", "tuning", "export.exporting", "suite.evaluating"):
        importlib.import_module(f"tav_opt.{module}")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen(8)
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    _run(connection)
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass


def _run(connection: socket.socket) -> None:
    status = 1
    try:
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        for number, stream in enumerate(("stdin", "stdout", "stderr")):
            setattr(sys, stream, open(number, "rww"[number], closefd=False))  # noqa: SIM115
        name, arguments, folder, environment = json.loads(connection.makefile().readline())
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        status = _status(name, arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(bytes([status]))
        os._exit(status)


def _status(name: str, arguments: list[str]) -> int:
    try:
        if name == "tav-opt":
            from tav_opt import cli

            sys.argv = [name, *arguments]
            return cli.main()
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1])
