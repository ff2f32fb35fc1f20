"""How every command of the package ends: a result, or one line that says what was wrong."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable

from tav_opt.config import InputError


def run(name: str, command: Callable[[], int | None]) -> int:
    """Runs a command and gives its exit status: 2 after an InputError (one line on stderr), 130 after Ctrl-C.

    141, and nothing said, when nobody reads stdout any more, as in `… | head`. SIGTERM ends it as `sys.exit` would:
    what it opened is closed, a server it started too.
    """
    _quiet()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        try:
            return command() or 0
        finally:
            sys.stdout.flush()  # not at the interpreter's end, where nobody could catch what it raises
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to flush
        return 128 + signal.SIGPIPE
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def _quiet() -> None:
    """Libraries' advice to their own developers is no news for the people who run a command."""
    for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch").setLevel(logging.ERROR)
