"""Jobs: commands that run on the cluster. They outlive the client, the dashboard and the head."""

from __future__ import annotations

import codecs
import enum
import hashlib
import os
import shlex
import stat
import tempfile
import time
import zipfile
from dataclasses import dataclass, fields
from typing import IO, Any, Dict, Iterator, Mapping, Optional, Sequence, Union

from ._errors import HeliostatError, NoAnswer, WaitTimeout
from ._http import Http, job_refused, path

# How long a dashboard that went away while a log was followed may take to be back, seconds.
_AWAY_MAX_S = 30.0
# Longest wait of one request, seconds.
_WAIT_PART_S = 20.0


class JobStatus(str, enum.Enum):
    """How a job is, in Ray's words."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    def is_terminal(self) -> bool:
        """Whether it stays so."""
        return self not in (JobStatus.PENDING, JobStatus.RUNNING)


@dataclass(frozen=True)
class JobDetails:
    """All that is known of a job; times are milliseconds since 1970."""

    submission_id: str
    status: JobStatus
    entrypoint: str
    message: Optional[str]
    error_type: Optional[str]
    start_time: Optional[int]
    end_time: Optional[int]
    metadata: Mapping[str, str]
    runtime_env: Mapping[str, Any]
    driver_exit_code: Optional[int]

    @classmethod
    def of(cls, json: Mapping[str, Any]) -> JobDetails:
        """From the dashboard's answer."""
        values = {field.name: json.get(field.name) for field in fields(cls)}
        values["status"] = JobStatus(json["status"])
        values["metadata"] = json.get("metadata") or {}
        values["runtime_env"] = json.get("runtime_env") or {}
        return cls(**values)


class Job:
    """A job by its id."""

    def __init__(self, http: Http, submission_id: str) -> None:
        self._http = http
        self.id = submission_id

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def details(self) -> JobDetails:
        """All that is known of it now."""
        return JobDetails.of(self._http.json("GET", self._path(), refusal=job_refused))

    def status(self) -> JobStatus:
        """How it is now."""
        return self.details().status

    def logs(self) -> str:
        """What is kept of its log."""
        return str(self._http.json("GET", self._path("logs"), refusal=job_refused)["logs"])

    def follow(self) -> Iterator[str]:
        """Its log from the beginning, part by part as it is written, to its end. A dashboard that is restarted
        meanwhile is found again, and no byte is lost or comes twice."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offset, away_since = 0, None
        while True:
            try:
                where = self._path("logs", "stream")
                for part in self._http.stream(where, [("offset", str(offset))], timeout_s=None):
                    offset, away_since = offset + len(part), None
                    text = decoder.decode(part)
                    if text:
                        yield text
                return
            except NoAnswer:
                now = time.monotonic()
                away_since = away_since or now
                if offset == 0 or now - away_since > _AWAY_MAX_S:
                    raise
                time.sleep(0.05)

    def wait(self, timeout: Optional[float] = None) -> JobStatus:
        """Waits for its end and returns how it ended; raises WaitTimeout after `timeout` seconds."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _WAIT_PART_S if until is None else min(_WAIT_PART_S, until - time.monotonic())
            parameters = [("timeout_s", f"{max(left, 0.0):.3f}")]
            job = JobDetails.of(
                self._http.json(
                    "GET",
                    self._path("wait"),
                    parameters=parameters,
                    timeout_s=max(left, 0.0) + self._http.timeout_s,
                    refusal=job_refused,
                )
            )
            if job.status.is_terminal():
                return job.status
            if until is not None and time.monotonic() >= until:
                raise WaitTimeout(f"job {self.id} is {job.status.value} after {timeout} s")

    def stop(self) -> bool:
        """Asks for its end: SIGTERM to all its processes, then SIGKILL. False where it has ended already."""
        return bool(self._http.json("POST", self._path("stop"), refusal=job_refused)["stopped"])

    def delete(self) -> None:
        """Forgets it and its log; it must have ended."""
        self._http.json("DELETE", self._path(), refusal=job_refused)

    def _path(self, *rest: str) -> str:
        return path("api", "jobs", self.id, *rest)


def submit(
    http: Http,
    entrypoint: Union[str, Sequence[str]],
    *,
    working_dir: Optional[Union[str, "os.PathLike[str]"]],
    env: Mapping[str, str],
    metadata: Mapping[str, str],
    needs: Mapping[str, Any],
    submission_id: Optional[str],
) -> Job:
    """See `Cluster.submit`."""
    command = entrypoint if isinstance(entrypoint, str) else shlex.join(entrypoint)
    runtime_env: Dict[str, Any] = {}
    if working_dir is not None:
        runtime_env["working_dir"] = upload(http, os.fspath(working_dir))
    if env:
        runtime_env["env_vars"] = dict(env)
    body = {
        "entrypoint": command,
        "submission_id": submission_id,
        "runtime_env": runtime_env,
        "metadata": dict(metadata),
        **needs,
    }
    return Job(http, str(http.json("POST", "/api/jobs/", body)["submission_id"]))


def upload(http: Http, directory: str) -> str:
    """Sends a directory, unless the dashboard has it; returns its URI."""
    if not os.path.isdir(directory):
        raise HeliostatError(f"working_dir: {directory} is no directory")
    with tempfile.TemporaryFile() as file:
        _pack(directory, file)
        length = file.tell()
        file.seek(0)
        digest = hashlib.sha256()
        for part in _parts(file):
            digest.update(part)
        file.seek(0)
        name = f"helio_pkg_{digest.hexdigest()}.zip"
        where = path("api", "packages", "gcs", name)
        if not http.exists(where):
            http.put(where, _parts(file), length)
    return f"gcs://{name}"


def _parts(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(1 << 20), b"")


def _leads_back(link: str, parent: str) -> bool:
    """Whether a link leads to a directory that it lies in."""
    to = os.path.realpath(link)
    return os.path.commonpath([to, os.path.realpath(parent)]) == to


def _pack(directory: str, out: IO[bytes]) -> None:
    """The same files to the same bytes: in order, without times. Links are followed."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as package:
        for parent, directories, names in os.walk(directory, followlinks=True):
            directories[:] = sorted(name for name in directories if name != ".git")
            for name in sorted(directories + names):
                whole = os.path.join(parent, name)
                mode = os.stat(whole).st_mode
                is_directory = stat.S_ISDIR(mode)
                if not (is_directory or stat.S_ISREG(mode)):
                    raise HeliostatError(f"working_dir: {whole} is neither a file nor a directory")
                if is_directory and os.path.islink(whole) and _leads_back(whole, parent):
                    raise HeliostatError(
                        f"working_dir: {whole} is a link to a directory that it lies in itself: leave it out"
                    )
                within = os.path.relpath(whole, directory).replace(os.sep, "/")
                info = zipfile.ZipInfo(within + "/" if is_directory else within)
                info.external_attr = mode << 16
                if is_directory:
                    package.writestr(info, b"")
                    continue
                info.compress_type = zipfile.ZIP_DEFLATED
                with open(whole, "rb") as source, package.open(info, "w", force_zip64=True) as target:
                    for part in _parts(source):
                        target.write(part)
