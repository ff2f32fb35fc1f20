"""What stands behind the routes: the jobs, their files, who works on them, who may ask, and the server's clips."""

from __future__ import annotations

from dataclasses import dataclass, field

from tav_opt.api.answers import Refused
from tav_opt.api.api_config import ApiConfig
from tav_opt.api.job_files import JobFiles
from tav_opt.api.jobs import Jobs
from tav_opt.api.keys import Keys
from tav_opt.api.runner import Runner
from tav_opt.client import AsyncClient, Retry, ServerError, Tls
from tav_opt.client.channel import Unreachable
from tav_opt.contract import ServedClip

ASK_SECONDS = 5.0
"""Within which the server tells its clips."""


@dataclass(kw_only=True)
class Service:
    """Of one event loop, which `close` ends."""

    config: ApiConfig
    keys: Keys
    jobs: Jobs
    files: JobFiles
    runner: Runner
    client: AsyncClient
    stopping: bool = False
    """Who waits for progress is told no more of it."""
    _clips: dict[str, ServedClip] | None = field(default=None, init=False)

    @classmethod
    def open(cls, config: ApiConfig) -> Service:
        """In a running event loop; raises InputError for a folder, keys or certificates that cannot be used."""
        keys = Keys.read(config.keys)
        files = JobFiles(config.jobs)
        jobs = Jobs(config.jobs / "jobs.sqlite")
        paths = {name: getattr(config, name) for name in ("root_certificates", "certificate", "key")}
        tls = Tls(**paths) if config.tls or any(paths.values()) else None
        client = AsyncClient(config.url, tls=tls, retry=Retry(attempts=2))
        runner = Runner(config, jobs, files, client)
        return cls(config=config, keys=keys, jobs=jobs, files=files, runner=runner, client=client)

    async def clips(self) -> dict[str, ServedClip]:
        """The exported clips; those that were told last, while the server is started anew. Raises Refused."""
        try:
            self._clips = await self.client.clips(deadline_s=ASK_SECONDS)
        except (Unreachable, ServerError) as error:
            if self._clips is None:
                raise Refused(503, str(error), "no_server", Retry_After="5") from None
        return self._clips

    async def close(self) -> None:
        await self.client.close()
        self.jobs.close()
        self.files.close()
