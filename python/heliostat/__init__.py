"""Client of a Heliostat cluster: submit jobs, deploy applications, call named actors, look at the cluster. Standard library only.

    import heliostat

    cluster = heliostat.connect()
    print(cluster.actor("counter").ask("add", 2))
    job = cluster.submit("python train.py", working_dir=".")
    for text in job.follow():
        print(text, end="")
    print(job.wait())
"""

from ._actors import Actor
from ._cluster import Cluster, connect
from ._errors import (
    ActorError,
    ActorNotFound,
    ActorUnavailable,
    CallRefused,
    CallTimeout,
    DeployFailed,
    HeliostatError,
    JobNotFound,
    NoAnswer,
    RequestRefused,
    WaitTimeout,
)
from ._jobs import Job, JobDetails, JobStatus
from ._serve import ApplicationState, DeploymentState, ReplicaState
from ._state import ActorState, NodeState, PlacementGroupState

__version__ = "0.1.0"

__all__ = [
    "Actor",
    "ActorError",
    "ActorNotFound",
    "ActorState",
    "ActorUnavailable",
    "ApplicationState",
    "CallRefused",
    "CallTimeout",
    "Cluster",
    "DeployFailed",
    "DeploymentState",
    "HeliostatError",
    "Job",
    "JobDetails",
    "JobNotFound",
    "JobStatus",
    "NoAnswer",
    "NodeState",
    "PlacementGroupState",
    "ReplicaState",
    "RequestRefused",
    "WaitTimeout",
    "connect",
]
