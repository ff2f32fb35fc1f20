"""`tav-opt …`, one file a command: parses, calls, prints; no logic."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from tav_opt import command
from tav_opt.cli import (
    api,
    app,
    clips,
    demo,
    detect,
    edit,
    evaluate,
    export,
    info,
    metrics,
    personalise,
    probe,
    push,
    request,
    serve,
    study,
    tune,
)

COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "demo": demo.run,
    "personalise": personalise.run,
    "tune": tune.run,
    "edit": edit.run,
    "detect": detect.run,
    "metrics": metrics.run,
    "evaluate": evaluate.run,
    "study": study.run,
    "export": export.run,
    "serve": serve.run,
    "api": api.run,
    "app": app.run,
    "probe": probe.run,
    "request": request.run,
    "clips": clips.run,
    "info": info.run,
    "push": push.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    words = [argument for argument in arguments if argument != command.DEBUG]
    return command.run(" ".join(["tav-opt", *words[:1]]), _command, arguments)


def _command(arguments: Sequence[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: tav-opt COMMAND …   (tav-opt COMMAND --help tells more)\n")
        for name, function in COMMANDS.items():
            print(f"  {name:13}{function.__doc__}")
        print(f"\n{command.DEBUG_HELP}")
        return 0
    if arguments[0] == "--version":
        from tav_opt import __version__

        print(f"tav-opt {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"tav-opt: no command {arguments[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return COMMANDS[arguments[0]](arguments[1:])
