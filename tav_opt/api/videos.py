"""`/v1/videos`: asked for, told of, listed, removed, and fetched."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterable, Mapping
from typing import IO, Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from tav_opt.api import answers
from tav_opt.api.answers import Deleted, Refused, Video, Videos
from tav_opt.api.asked_fields import SOURCE
from tav_opt.api.asking import Owner, TheService, known_query
from tav_opt.api.bodies import body_of
from tav_opt.api.described import asked_by, refused_with, sent_as
from tav_opt.api.job_files import FILES, Variant
from tav_opt.api.jobs import Job, Order, QueueFull
from tav_opt.api.orders import Kind, model_of, order_of, seconds_of, size_of
from tav_opt.api.service import Service

QUIET_SECONDS = 15.0
"""After so long without news those who wait for progress are told that somebody is there."""
_EDITS = "edits"
"""A route where the id of a video stands in others."""
router = APIRouter(prefix="/v1/videos", tags=["videos"], dependencies=[Depends(known_query)])


def the_job(video_id: Annotated[str, Path()], owner: Owner, service: TheService) -> Job:
    """The one of the path; raises Refused where there is none of this owner."""
    job = service.jobs.get(video_id, owner)
    if job is None:
        raise Refused(404, f"video {video_id[:63]!r} is unknown", "not_found")
    return job


TheJob = Annotated[Job, Depends(the_job)]


def _no_edits(video_id: Annotated[str, Path()]) -> None:
    """Raises Refused for the path of another route, which is no video's."""
    if video_id == _EDITS:
        raise Refused(405, f"{router.prefix}/{_EDITS} is asked by POST", Allow="POST")


@router.post("", responses=refused_with(404, 413, 415, 429, 503), openapi_extra=asked_by("videos"))
async def create_video(request: Request, owner: Owner, service: TheService) -> Video:
    """Asks for a video: an edit of the clip that `model` names, or of `input_reference` in its place."""
    return await _create(request, owner, service, "videos")


@router.post(f"/{_EDITS}", responses=refused_with(404, 413, 415, 429, 503), openapi_extra=asked_by("edits"))
async def edit_video(request: Request, owner: Owner, service: TheService) -> Video:
    """Asks for an edit of a video: one that is sent, or one that was made here."""
    return await _create(request, owner, service, "edits")


@router.get("", responses=refused_with(404))
async def list_videos(
    owner: Owner,
    service: TheService,
    after: Annotated[str | None, Query(max_length=64, description="the last one of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Order = "desc",
) -> Videos:
    """A page of one's videos, by when they were asked for."""
    last = None if after is None else the_job(after, owner, service)
    found = service.jobs.page(owner, after=last, limit=limit + 1, order=order)
    page = [_told(service, job) for job in found[:limit]]
    ends = (page[0].id, page[-1].id) if page else (None, None)
    return Videos(data=page, first_id=ends[0], last_id=ends[1], has_more=len(found) > limit)


@router.get("/{video_id}", responses=refused_with(404), dependencies=[Depends(_no_edits)])
async def retrieve_video(job: TheJob, service: TheService) -> Video:
    """How far a video is."""
    return _told(service, job)


@router.delete("/{video_id}", responses=refused_with(404), dependencies=[Depends(_no_edits)])
async def delete_video(job: TheJob, service: TheService) -> Deleted:
    """Removes a video; one that is being made is cancelled."""
    await service.runner.remove(job)
    return Deleted(id=job.id)


@router.get("/{video_id}/content", response_class=FileResponse, responses=refused_with(404) | sent_as(FILES))
async def download_content(job: TheJob, service: TheService, variant: Variant = "video") -> FileResponse:
    """The MP4; a picture of it; or several of its frames side by side."""
    if job.status != "completed":
        raise Refused(404, f"video {job.id} is {job.status}: there is nothing to fetch", "video_not_ready")
    path = service.files.path(job.id, variant)
    if path is None:
        raise Refused(404, f"video {job.id} is removed", "not_found")
    return FileResponse(path, media_type=FILES[variant][1], filename=f"{job.id}-{path.name}")


@router.get("/{video_id}/events", response_class=EventSourceResponse, responses=refused_with(404))
async def video_events(job: TheJob, service: TheService) -> AsyncIterable[ServerSentEvent]:
    """How far a video is, each time that changes, until it is completed, failed or removed, or the API ends."""
    told: Video | None = None
    while True:
        found = service.jobs.get(job.id)
        if found is None:
            yield ServerSentEvent(event="video.deleted", data=Deleted(id=job.id))
            return
        if (now := _told(service, found)) != told:
            told = now
            yield ServerSentEvent(event=f"video.{now.status}", data=now)
        if now.status in ("completed", "failed") or service.stopping:
            return
        await service.runner.changed(QUIET_SECONDS)


def _told(service: Service, job: Job) -> Video:
    position = service.jobs.position(job) if job.status == "queued" else None
    return answers.video(job, service.runner.percent(job), position)


async def _create(request: Request, owner: str, service: Service, kind: Kind) -> Video:
    _check_queue(service, owner)  # before anything is read
    async with body_of(request, kind, service.config.upload_mib) as body:
        source = body.asked.get(SOURCE if kind == "videos" else "video")
        made = _made(service, owner, source["id"]) if isinstance(source, Mapping) else None
        asked = {**body.asked}
        if made is not None and asked.get("model") is None:
            asked["model"] = made.model
        clips = await service.clips()
        asked["model"] = model_of(asked, clips)
        clip = clips[asked["model"].partition("@")[0]]
        order_of(asked, clip)
        job = Job(
            id=f"video_{secrets.token_hex(16)}",
            owner=owner,
            model=asked["model"],
            prompt=asked["prompt"],
            asked=asked,
            seconds=seconds_of(clip, asked),
            size=size_of(clip),
            remixed_from=made.id if made is not None else None,
            bytes=sum(_size(file) for file in body.files.values()),
        )
        await _keep(service, job, body.files, made, SOURCE if kind == "videos" else "video")
    told = _told(service, service.jobs.get(job.id) or job)  # which has its place in the queue
    service.runner.wake()
    return told


async def _keep(service: Service, job: Job, files: Mapping[str, IO[bytes]], made: Job | None, name: str) -> None:
    """The job and what was sent with it: the files first, so that a job in the table is whole."""
    if not service.runner.make_room(job.bytes):
        told = "the folder of videos is full, and none of them is finished"
        raise Refused(503, told, "storage_full", Retry_After="60")
    try:
        for field, file in files.items():
            await asyncio.to_thread(service.files.keep, job.id, field, file)
        if made is not None:
            await asyncio.to_thread(service.files.reuse, job.id, name, made.id)
        service.jobs.add(job, service.config.queue)
    except QueueFull:
        service.files.remove(job.id)
        raise _full(service) from None
    except BaseException:
        service.files.remove(job.id)
        raise


def _made(service: Service, owner: str, video_id: Any) -> Job:
    job = the_job(video_id, owner, service)
    if job.status != "completed":
        raise Refused(400, f"video {job.id} is {job.status}: only a completed one can be edited", "video_not_ready")
    return job


def _check_queue(service: Service, owner: str) -> None:
    if service.jobs.unfinished_of(owner) >= service.config.queue:
        raise _full(service)


def _full(service: Service) -> Refused:
    told = f"{service.config.queue} of your videos are waiting or in work, as many as may be: try again later"
    return Refused(429, told, "queue_full", Retry_After="10")


def _size(file: IO[bytes]) -> int:
    return file.seek(0, 2)
