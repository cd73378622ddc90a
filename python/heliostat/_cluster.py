"""The door: a cluster by the URL of its dashboard."""

from __future__ import annotations

import json
import os
from types import TracebackType
from typing import Any, Dict, List, Mapping, Optional, Sequence, Type, Union

from ._actors import Actor
from ._errors import ActorNotFound, HeliostatError
from ._http import Http, path
from ._jobs import Job, JobDetails, submit
from . import _serve
from ._serve import ApplicationState
from ._state import ActorState, NodeState, PlacementGroupState, of

# Where a dashboard is unless something says otherwise.
_DEFAULT_URL = "http://127.0.0.1:8265"
# Rows that the state API gives at once.
_LIMIT_MAX = 10_000


def _ca_of_cluster() -> Optional[str]:
    """The CA in the directory, or in the file of paths, that HELIOSTAT_TLS names."""
    tls = os.environ.get("HELIOSTAT_TLS")
    if not tls:
        return None
    if os.path.isdir(tls):
        return os.path.join(tls, "ca.crt")
    try:
        with open(tls, encoding="utf-8") as file:
            return str(json.load(file)["ca"])
    except (OSError, ValueError, KeyError) as why:
        raise HeliostatError(f"HELIOSTAT_TLS={tls}: {why!r}") from why


def connect(
    url: Optional[str] = None,
    *,
    api_key: Optional[str] = None,
    ca_file: Optional[str] = None,
    timeout: float = 30.0,
) -> Cluster:
    """Connects to a cluster, and fails if none answers.

    url: of the dashboard; without it HELIOSTAT_DASHBOARD, else http://127.0.0.1:8265. In a job it is set.
    api_key: the dashboard's key; without it the content of the file that HELIOSTAT_DASHBOARD_KEY_FILE names, if any.
    ca_file: whose certificates are trusted, for https with a CA of one's own; without it the cluster's, where HELIOSTAT_TLS
        names it, as in a job.
    timeout: seconds that an answer may take.
    """
    key_file = os.environ.get("HELIOSTAT_DASHBOARD_KEY_FILE")
    if api_key is None and key_file:
        try:
            with open(key_file, encoding="utf-8") as file:
                api_key = file.read().strip()
        except OSError as why:
            raise HeliostatError(f"HELIOSTAT_DASHBOARD_KEY_FILE={key_file}: {why}") from why
    ca_file = ca_file or _ca_of_cluster()
    url = url or os.environ.get("HELIOSTAT_DASHBOARD") or _DEFAULT_URL
    cluster = Cluster(Http(url, api_key, ca_file, timeout))
    try:
        cluster.version()
    except BaseException:
        cluster.close()
        raise
    return cluster


class Cluster:
    """A cluster. Made by `connect`; may be used by several threads, and in a `with`."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def __repr__(self) -> str:
        return f"Cluster({self.url!r})"

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections. Jobs and actors live on."""
        self._http.close()

    @property
    def url(self) -> str:
        """URL of the dashboard."""
        return self._http.url

    def version(self) -> str:
        """The release of Heliostat that serves the dashboard."""
        return str(self._http.json("GET", "/api/version").get("heliostat_version"))

    def status(self) -> Dict[str, Any]:
        """The whole cluster as `helio status --json` shows it: head, nodes, workers, actors, groups, state store."""
        status = self._http.json("GET", "/api/status")
        assert isinstance(status, dict)
        return status

    # Actors

    def actor(self, name: str) -> Actor:
        """A handle to a named actor. Nothing is asked until it is used."""
        return Actor(self._http, name)

    def actors(self, *filters: str) -> List[ActorState]:
        """All actors, or those that fulfil all filters: `actors("state=ALIVE", "class_name!=rank")`."""
        return [of(ActorState, row) for row in self.list("actors", *filters)]

    def get_actor(self, name: str) -> ActorState:
        """One actor by its name; raises ActorNotFound."""
        for actor in self.actors(f"actor_id={name}"):
            return actor
        raise ActorNotFound(f"there is no actor {name!r}", 404)

    # Jobs

    def submit(
        self,
        entrypoint: Union[str, Sequence[str]],
        *,
        working_dir: Optional[Union[str, "os.PathLike[str]"]] = None,
        env: Optional[Mapping[str, str]] = None,
        metadata: Optional[Mapping[str, str]] = None,
        num_cpus: Optional[float] = None,
        num_gpus: Optional[int] = None,
        memory: Optional[int] = None,
        resources: Optional[Mapping[str, float]] = None,
        submission_id: Optional[str] = None,
    ) -> Job:
        """Runs a command on the cluster as a job: a line for the shell, or a list of words that are taken as they are.

        working_dir: a directory that is sent along and is the job's own; the same one is sent once.
        env, metadata: strings. num_cpus, num_gpus, memory (bytes) and resources (custom ones, by name) are
        set aside while it runs; it waits for them. submission_id: the job's name, else one is made.
        """
        return submit(
            self._http,
            entrypoint,
            working_dir=working_dir,
            env=env or {},
            metadata=metadata or {},
            needs={
                "entrypoint_num_cpus": num_cpus,
                "entrypoint_num_gpus": num_gpus,
                "entrypoint_memory": memory,
                "entrypoint_resources": dict(resources) if resources else None,
            },
            submission_id=submission_id,
        )

    def job(self, submission_id: str) -> Job:
        """A job by its id. Nothing is asked until it is used."""
        return Job(self._http, submission_id)

    def jobs(self) -> List[JobDetails]:
        """All jobs that are kept, oldest first."""
        return [JobDetails.of(job) for job in self._http.json("GET", "/api/jobs/")]

    def get_job(self, submission_id: str) -> JobDetails:
        """All that is known of one job; raises JobNotFound."""
        return self.job(submission_id).details()

    # Serving

    def deploy(
        self, document: Mapping[str, Any], *, timeout: Optional[float] = None
    ) -> Dict[str, ApplicationState]:
        """Serves exactly what a document of Ray Serve says, and returns its applications when they run.

        document: as `yaml.safe_load` reads it from a file. An application that it does not list is drained and ends.
        timeout: seconds to wait at most; what was deployed goes on being deployed after it.
        Raises RequestRefused where the document is wrong, and DeployFailed where an application does not run.
        """
        return _serve.deploy(self._http, document, timeout)

    def serve_status(self) -> Dict[str, ApplicationState]:
        """All applications by name, with their deployments and replicas."""
        return _serve.status(self._http)

    def serve_shutdown(self) -> None:
        """Drains and ends all applications, that of cluster.toml included, and returns when they are gone."""
        _serve.shutdown(self._http)

    # State

    def nodes(self, *filters: str) -> List[NodeState]:
        """All nodes, or those that fulfil all filters."""
        return [of(NodeState, row) for row in self.list("nodes", *filters)]

    def placement_groups(self, *filters: str) -> List[PlacementGroupState]:
        """All placement groups, or those that fulfil all filters."""
        return [of(PlacementGroupState, row) for row in self.list("placement_groups", *filters)]

    def list(self, kind: str, *filters: str, limit: int = _LIMIT_MAX) -> List[Dict[str, Any]]:
        """Rows of Ray's state API: `actors`, `nodes`, `workers`, `jobs` or `placement_groups`, with all columns.

        filters: `KEY=VALUE` or `KEY!=VALUE`; text is compared without regard to case.
        """
        parameters = [("limit", str(limit)), ("detail", "true")]
        for text in filters:
            key, equals, value = text.partition("=")
            if not equals or not key.strip("! "):
                raise HeliostatError(f"{text!r} is no filter: write KEY=VALUE or KEY!=VALUE")
            parameters.append(("filter_keys", key.rstrip("! ").strip()))
            parameters.append(("filter_predicates", "!=" if key.rstrip().endswith("!") else "="))
            parameters.append(("filter_values", value.strip()))
        answer = self._http.json("GET", path("api", "v0", kind), parameters=parameters)
        rows = answer["data"]["result"]["result"]
        assert isinstance(rows, list)
        return rows
