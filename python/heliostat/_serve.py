"""What is served: documents in, applications with their deployments and replicas out. Ray Serve's REST."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional

from ._errors import DeployFailed, HeliostatError
from ._http import Http

_PATH = "/api/serve/applications/"
# Between two looks at what is being deployed.
_LOOK_S = 0.1


@dataclass(frozen=True)
class ReplicaState:
    """A replica. `state` is Ray's: STARTING, RUNNING or STOPPING."""

    replica_id: str
    state: str
    actor_name: Optional[str]
    node_id: Optional[str]
    pid: Optional[int]


@dataclass(frozen=True)
class DeploymentState:
    """A deployment. `status` is Ray's: UPDATING, HEALTHY, UNHEALTHY, DEPLOY_FAILED, UPSCALING or DOWNSCALING."""

    name: str
    status: str
    message: str
    target_num_replicas: int
    replicas: List[ReplicaState]


@dataclass(frozen=True)
class ApplicationState:
    """An application. `status` is Ray's: DEPLOYING, RUNNING, UNHEALTHY, DEPLOY_FAILED or DELETING."""

    name: str
    route_prefix: Optional[str]
    status: str
    message: str
    deployments: Dict[str, DeploymentState]


def status(http: Http) -> Dict[str, ApplicationState]:
    """All applications by name."""
    applications = http.json("GET", _PATH)["applications"]
    return {name: _application(name, shown) for name, shown in applications.items()}


def deploy(http: Http, document: Mapping[str, Any], timeout: Optional[float]) -> Dict[str, ApplicationState]:
    """Serves exactly what a document says, and waits until it is served."""
    if not isinstance(document, Mapping) or "applications" not in document:
        raise HeliostatError('a document is a mapping with "applications", as yaml.safe_load reads it from a file')
    http.json("PUT", _PATH, document)
    names = [str(app.get("name", "default")) for app in document["applications"]]
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        there = status(http)
        served = {name: there[name] for name in names if name in there}
        for app in served.values():
            if app.status == "DEPLOY_FAILED":
                raise DeployFailed(f"application {app.name!r} was not deployed: {app.message}", app)
        waits = [name for name in names if name not in served or served[name].status != "RUNNING"]
        if not waits:
            return served
        if end is not None and time.monotonic() >= end:
            app = served.get(waits[0])
            said = f"{app.status} {app.message}".strip() if app else "it is not known yet"
            raise DeployFailed(f"application {waits[0]!r} does not run after {timeout} s: {said}", app)
        time.sleep(_LOOK_S)


def shutdown(http: Http) -> None:
    """Drains and ends all applications, and waits until they are gone."""
    http.json("DELETE", _PATH)
    while status(http):
        time.sleep(_LOOK_S)


def _application(name: str, shown: Mapping[str, Any]) -> ApplicationState:
    return ApplicationState(
        name=name,
        route_prefix=shown["route_prefix"],
        status=shown["status"],
        message=shown["message"],
        deployments={name: _deployment(it) for name, it in shown["deployments"].items()},
    )


def _deployment(shown: Mapping[str, Any]) -> DeploymentState:
    return DeploymentState(
        name=shown["name"],
        status=shown["status"],
        message=shown["message"],
        target_num_replicas=shown["target_num_replicas"],
        replicas=[_replica(it) for it in shown["replicas"]],
    )


def _replica(shown: Mapping[str, Any]) -> ReplicaState:
    return ReplicaState(
        replica_id=shown["replica_id"],
        state=shown["state"],
        actor_name=shown.get("actor_name"),
        node_id=shown.get("node_id"),
        pid=shown.get("pid"),
    )
