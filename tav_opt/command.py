"""How every command of the package ends: a result, or one line that says what was wrong."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Never

from tav_opt.config import InputError

DEBUG = "--debug"
DEBUG_HELP = f"{DEBUG}, anywhere on the line of any command, shows where in the program an error comes from"
MAX_LINE = 500
"""Characters of an error that nobody foresaw; some libraries write pages."""


class Interrupted(KeyboardInterrupt):
    """A signal asks the command to end; `text` says what is left of its work."""

    def __init__(self, number: int, text: str = "interrupted") -> None:
        super().__init__(text)
        self.number = number


def run(name: str, command: Callable[[list[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Runs a command on arguments (default: the program's) and gives its exit status.

    One line on stderr and 2 after an InputError, and after an error of the operating system (a full disk, no rights);
    one line and 1 after any other error; the traceback too under `--debug`, which the command does not see. 130 after
    Ctrl-C, 143 after SIGTERM, which close what was opened, a server too. 141, and nothing said, when nobody reads
    stdout any more, as in `… | head`.
    """
    _quiet()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    given = list(sys.argv[1:] if arguments is None else arguments)
    rest = [argument for argument in given if argument != DEBUG]
    try:
        try:
            return command(rest) or 0
        finally:
            sys.stdout.flush()  # not at the interpreter's end, where nobody could catch what it raises
    except SystemExit as end:
        if not end.code and {"-h", "--help"} & set(rest):
            print(DEBUG_HELP)
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to flush
        return 128 + signal.SIGPIPE
    except BaseException as error:
        if rest != given:
            traceback.print_exc()
        status, text = _told(error)
        print(f"{name}: {printable(' '.join(map(str.strip, text.splitlines())))}", file=sys.stderr)
        return status


def printable(text: str) -> str:
    """Letters as they are; what would move a terminal's cursor, or colour it, spelt out."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _told(error: BaseException) -> tuple[int, str]:
    """Exit status and what is said of an error."""
    match error:
        case InputError():
            return 2, str(error)
        case OSError(errno=int(), strerror=str(reason)):
            return 2, f"{error.filename}: {reason}" if error.filename is not None else reason
        case Interrupted():
            return 128 + error.number, str(error)
        case KeyboardInterrupt():
            return 128 + signal.SIGINT, "interrupted"
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return 1, f"{text if len(text) <= MAX_LINE else text[:MAX_LINE] + ' …'} ({DEBUG} shows where)"


def _interrupt(number: int, _frame: object) -> Never:
    raise Interrupted(number)


def _quiet() -> None:
    """Libraries' advice to their own developers is no news for the people who run a command.

    What a terminal has no letters for is spelt out instead of ending the command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch").setLevel(logging.ERROR)
