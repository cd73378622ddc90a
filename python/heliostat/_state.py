"""What the cluster is made of, as plain values. What this release of the client does not know is in `more`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, Mapping, Optional, Type, TypeVar

T = TypeVar("T")


def of(kind: Type[T], row: Mapping[str, Any]) -> T:
    """A row of the state API as a value of `kind`."""
    known = {f.name for f in fields(kind)} - {"more"}  # type: ignore[arg-type]
    values: Dict[str, Any] = {name: row.get(name) for name in known}
    values["more"] = {name: value for name, value in row.items() if name not in known}
    return kind(**values)


@dataclass(frozen=True)
class ActorState:
    """An actor. `state` is Ray's: PENDING_CREATION, ALIVE, RESTARTING or DEAD."""

    actor_id: str
    name: str
    class_name: str
    state: str
    node_id: Optional[str]
    pid: int
    ray_namespace: str
    num_restarts: int
    death_cause: Optional[Mapping[str, Any]]
    more: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class NodeState:
    """A machine. `state` is ALIVE or DEAD, `state_message` says more."""

    node_id: str
    node_name: str
    node_ip: str
    is_head_node: bool
    state: str
    state_message: Optional[str]
    resources_total: Mapping[str, float]
    labels: Mapping[str, str]
    more: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class PlacementGroupState:
    """A placement group. `state` is PENDING, CREATED, RESCHEDULING or REMOVED."""

    placement_group_id: str
    name: str
    state: str
    bundles: Optional[List[Mapping[str, Any]]]
    stats: Optional[Mapping[str, Any]]
    more: Mapping[str, Any] = field(repr=False)
