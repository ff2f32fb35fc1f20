"""The client for threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Unpack
from weakref import WeakSet

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tav_opt.client.channel import Tls, check_url, connect, misfit, unreachable
from tav_opt.client.exchange import (
    Edit,
    Exchange,
    Options,
    Progress,
    Retry,
    ServerError,
    failed,
    is_gateway,
)
from tav_opt.client.sources import files_of, fitted
from tav_opt.config import EditConfig, InputError, OnProgress
from tav_opt.contract import ServedClip


class Client:
    """A connection to a server; any number of edits at a time, from any thread.

    ```python
    with Client("localhost:8001") as client:
        edit = client.edit("man-skiing", ["a panda is skiing"])
    ```
    """

    def __init__(self, url: str = "localhost:8001", *, tls: Tls | None = None, retry: Retry | None = None) -> None:
        self.url = check_url(url)
        self._tls, self._retry = tls, retry or Retry()
        self._channel = connect(url, tls)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._open: WeakSet[Stream] = WeakSet()

    def stream(self, clip: str, edit: EditConfig | Sequence[str], **options: Unpack[Options]) -> Stream:
        """Begins an edit of an exported clip; prompts alone stand for EditConfig(prompts=…).

        A video's file, and a mask's, is fitted to the clip first, which the server is asked about. Raises InputError
        for settings that do not fit the wire and for files that cannot be fitted; all else is raised by the stream.
        """
        if (files := files_of(options)) is not None:
            began = time.monotonic()
            served = self.clip(clip, deadline_s=options.get("deadline_s"))
            options = fitted(options, files.video, served, mask=files.mask, began=began)
        return Stream(self, Exchange.of(clip, edit, options, self._retry))

    def edit(
        self,
        clip: str,
        edit: EditConfig | Sequence[str],
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[Options],
    ) -> Edit:
        """Edits an exported clip and returns the result.

        Raises InputError for an unknown clip, settings the server refuses, and a server that cannot be reached;
        ServerError for its failures and for a deadline that passed. Ctrl-C, an exception in `on_progress` and `close`
        cancel the edit on the server.
        """
        with self.stream(clip, edit, **options) as stream:
            for progress in stream:
                if on_progress is not None:
                    on_progress(progress.stage, progress.step, progress.steps)
            return stream.result()

    def clip(self, name: str, *, deadline_s: float | None = None) -> ServedClip:
        """What an exported clip is and takes in its place, told at once, whatever edits run; raises as `edit` does."""
        (told,) = self._told(Exchange.about(name, self._retry, deadline_s)).values()
        return told

    def clips(self, *, deadline_s: float | None = None) -> dict[str, ServedClip]:
        """All exported clips by name, as `clip` tells of one."""
        return self._told(Exchange.about(None, self._retry, deadline_s))

    def _told(self, question: Exchange) -> dict[str, ServedClip]:
        while True:
            message, timeout = question.request()
            try:
                return question.told(self._stub.ModelInfer(message, timeout=timeout))
            except grpc.RpcError as refused:
                error = failed(refused)
            pause = question.pause(error)
            if pause is None:
                raise self._failure(question, error)
            time.sleep(pause)

    def _failure(self, exchange: Exchange, error: ServerError) -> InputError | ServerError:
        if exchange.is_unanswered(error) and not self.is_live():
            return unreachable(self.url, self._tls)
        return exchange.blamed(error)

    def is_live(self) -> bool:
        """Whether a server answers at all; it may yet be too busy for an edit."""
        try:
            return bool(self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=5).live)
        except grpc.RpcError as error:
            return is_gateway(error)
        except ValueError:  # of a closed channel
            return False

    def close(self) -> None:
        """Cancels the edits in flight and closes the connection."""
        for stream in list(self._open):
            stream.cancel()
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream(Iterator[Progress]):
    """An edit under way: an iterator of its progress; then `result()`. Leaving its block cancels what is not done.

    ```python
    with client.stream("man-skiing", ["a panda is skiing"]) as stream:
        for progress in stream:
            print(progress.stage, progress.step, "of", progress.steps)
        edit = stream.result()
    ```
    """

    def __init__(self, client: Client, exchange: Exchange) -> None:
        self._client, self._exchange = client, exchange
        self._cancelled = threading.Event()
        self._edit: Edit | None = None
        client._open.add(self)
        self._begin()

    def __next__(self) -> Progress:
        """Waits for the next step; raises InputError and ServerError as `Client.edit` does."""
        if self._edit is not None:
            raise StopIteration
        answer = self._answer()
        if isinstance(answer, Progress):
            return answer
        self._edit = answer
        self._end()
        self._client._open.discard(self)
        raise StopIteration

    def result(self) -> Edit:
        """The edit, when it is done; waits for it."""
        for _ in self:
            pass
        assert self._edit is not None
        return self._edit

    def cancel(self) -> None:
        """Stops the edit, here and, within one step, on the server; from any thread."""
        self._cancelled.set()
        self._call.cancel()
        self._client._open.discard(self)

    def _begin(self) -> None:
        message, timeout = self._exchange.request()
        self._ended = ended = threading.Event()
        requests = _held_open(message, ended)
        self._call = self._client._stub.ModelStreamInfer(requests, timeout=timeout)
        if not self._call.add_callback(ended.set):
            ended.set()

    def _answer(self) -> Progress | Edit:
        while True:
            try:
                return self._exchange.answer(next(self._call))
            except StopIteration:
                raise self._exchange.no_result() from None
            except grpc.RpcError as error:
                self._recover(failed(error))
            except ServerError as error:
                self._end()
                self._recover(error)

    def _recover(self, error: ServerError) -> None:
        """Tries again after a pause, where that is safe; raises otherwise."""
        if self._exchange.is_unanswered(error) and (
            wrong := misfit(self._client.url, self._client._tls, error.details)
        ):
            raise wrong from None
        pause = None if self._cancelled.is_set() else self._exchange.pause(error)
        if pause is None:
            raise self._client._failure(self._exchange, error) from None
        if self._cancelled.wait(pause):
            raise ServerError("the edit was cancelled", "CANCELLED") from None
        self._begin()
        if self._cancelled.is_set():  # between the two
            self._call.cancel()

    def _end(self) -> None:
        """Takes the call's status, which is right behind the last answer.

        A call that is cancelled or loses its connection just then leaves an open socket in Triton 2.51, now and then.
        """
        self._ended.set()
        with suppress(grpc.RpcError):  # what the answer says stands
            next(self._call, None)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


def _held_open(
    message: service_pb2.ModelInferRequest, ended: threading.Event
) -> Iterator[service_pb2.ModelInferRequest]:
    """One request, after which the stream stays open until its end, as tritonclient leaves it."""
    yield message
    ended.wait()
