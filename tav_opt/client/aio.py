"""The client for asyncio; what each part means is said in `sync`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tav_opt.client.channel import Tls, check_url, connect_aio, misfit, unreachable
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


class AsyncClient:
    """A connection to a server, for one event loop; any number of edits at a time.

    ```python
    async with AsyncClient("localhost:8001") as client:
        edit = await client.edit("man-skiing", ["a panda is skiing"])
    ```
    """

    def __init__(self, url: str = "localhost:8001", *, tls: Tls | None = None, retry: Retry | None = None) -> None:
        self.url = check_url(url)
        self._tls, self._retry = tls, retry or Retry()
        self._channel = connect_aio(url, tls)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def stream(self, clip: str, edit: EditConfig | Sequence[str], **options: Unpack[Options]) -> AsyncStream:
        """Begins an edit, as `Client.stream` does; a file is fitted by `edit` alone, which can wait for it."""
        if (files := files_of(options)) is not None:
            path = files.video or files.mask
            raise InputError(f"{path}: `edit` fits a file to the clip; to stream, give video's bytes or source_frames")
        return AsyncStream(self, Exchange.of(clip, edit, options, self._retry))

    async def edit(
        self,
        clip: str,
        edit: EditConfig | Sequence[str],
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[Options],
    ) -> Edit:
        """Edits an exported clip, and raises, as `Client.edit` does; cancelling the task cancels it on the server."""
        if (files := files_of(options)) is not None:
            began = time.monotonic()
            served = await self.clip(clip, deadline_s=options.get("deadline_s"))
            options = await asyncio.to_thread(fitted, options, files.video, served, mask=files.mask, began=began)
        async with self.stream(clip, edit, **options) as stream:
            async for progress in stream:
                if on_progress is not None:
                    on_progress(progress.stage, progress.step, progress.steps)
            return await stream.result()

    async def clip(self, name: str, *, deadline_s: float | None = None) -> ServedClip:
        """What an exported clip is and takes in its place, as `Client.clip` tells."""
        (told,) = (await self._told(Exchange.about(name, self._retry, deadline_s))).values()
        return told

    async def clips(self, *, deadline_s: float | None = None) -> dict[str, ServedClip]:
        """All exported clips by name, as `Client.clips` tells."""
        return await self._told(Exchange.about(None, self._retry, deadline_s))

    async def _told(self, question: Exchange) -> dict[str, ServedClip]:
        while True:
            message, timeout = question.request()
            try:
                return question.told(await self._stub.ModelInfer(message, timeout=timeout))
            except grpc.RpcError as refused:
                error = failed(refused)
            pause = question.pause(error)
            if pause is None:
                raise await self._failure(question, error)
            await asyncio.sleep(pause)

    async def _failure(self, exchange: Exchange, error: ServerError) -> InputError | ServerError:
        if exchange.is_unanswered(error) and not await self.is_live():
            return await asyncio.to_thread(unreachable, self.url, self._tls)
        return exchange.blamed(error)

    async def is_live(self) -> bool:
        """Whether a server answers at all; it may yet be too busy for an edit."""
        try:
            return bool((await self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=5)).live)
        except grpc.RpcError as error:
            return is_gateway(error)
        except grpc.aio.UsageError:  # of a closed channel
            return False

    async def close(self) -> None:
        """Cancels the edits in flight and closes the connection."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncStream(AsyncIterator[Progress]):
    """An edit under way: an asynchronous iterator of its progress; then `await result()`."""

    def __init__(self, client: AsyncClient, exchange: Exchange) -> None:
        self._client, self._exchange = client, exchange
        self._cancelled = asyncio.Event()
        self._edit: Edit | None = None
        self._begin()

    async def __anext__(self) -> Progress:
        """Waits for the next step; raises InputError and ServerError as `Client.edit` does."""
        if self._edit is not None:
            raise StopAsyncIteration
        answer = await self._answer()
        if isinstance(answer, Progress):
            return answer
        self._edit = answer
        await self._end()
        raise StopAsyncIteration

    async def result(self) -> Edit:
        """The edit, when it is done; waits for it."""
        async for _ in self:
            pass
        assert self._edit is not None
        return self._edit

    def cancel(self) -> None:
        """Stops the edit, here and, within one step, on the server."""
        self._cancelled.set()
        self._ended.set()  # or the task that feeds the call would wait for it for ever
        self._call.cancel()

    def _begin(self) -> None:
        message, timeout = self._exchange.request()
        self._ended = asyncio.Event()
        requests = _held_open(message, self._ended)
        self._call = self._client._stub.ModelStreamInfer(requests, timeout=timeout)

    async def _answer(self) -> Progress | Edit:
        while True:
            try:
                return self._exchange.answer(await self._read())
            except grpc.RpcError as error:
                await self._recover(failed(error))
            except ServerError as error:
                await self._end()
                await self._recover(error)
            except asyncio.CancelledError:
                # grpc.aio raises this for a call that was cancelled, and asyncio for a task that is.
                if not self._cancelled.is_set():
                    self.cancel()
                    raise
                raise ServerError("the edit was cancelled", "CANCELLED") from None

    async def _read(self) -> Any:
        message = await self._call.read()
        if message is grpc.aio.EOF:
            raise self._exchange.no_result()
        return message

    async def _recover(self, error: ServerError) -> None:
        """Tries again after a pause, where that is safe; raises otherwise."""
        self._ended.set()
        if self._exchange.is_unanswered(error):
            wrong = await asyncio.to_thread(misfit, self._client.url, self._client._tls, error.details)
            if wrong is not None:
                raise wrong from None
        pause = self._exchange.pause(error)
        if pause is None:
            raise await self._client._failure(self._exchange, error) from None
        try:
            await asyncio.wait_for(self._cancelled.wait(), pause)
        except TimeoutError:
            self._begin()
        else:
            raise ServerError("the edit was cancelled", "CANCELLED") from None

    async def _end(self) -> None:
        self._ended.set()
        try:
            await self._call.read()
        except grpc.RpcError:
            pass  # what the answer says stands
        except asyncio.CancelledError:
            if not self._cancelled.is_set():  # but the task's
                raise

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


async def _held_open(
    message: service_pb2.ModelInferRequest, ended: asyncio.Event
) -> AsyncIterator[service_pb2.ModelInferRequest]:
    yield message
    await ended.wait()
