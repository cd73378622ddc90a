"""Looks at a cluster with Ray's own state commands and Python API, and compares with what `helio status` says.

Usage: ray_state.py URL HELIO RUN_DIR. Needs ray[default] 2.60. Run by scripts/test_ray_state.
"""

import json
import os
import subprocess
import sys

from ray.util.state import get_actor, get_node, list_actors, list_jobs, list_nodes, list_workers, summarize_actors
from ray.util.state.exception import RayStateApiException

URL, HELIO, RUN = sys.argv[1:]


def ray(*words, fails=False):
    """What Ray's command prints."""
    command = [os.path.join(os.path.dirname(sys.executable), "ray"), *words]
    env = {**os.environ, "RAY_API_SERVER_ADDRESS": URL}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert (done.returncode != 0) == fails, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + (done.stderr if fails else "")


def helio(*words):
    """The JSON that our own command prints."""
    done = subprocess.run([HELIO, *words, "--run-dir", RUN, "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return json.loads(done.stdout)


def same(what, one, other):
    assert one == other, f"{what}: {one!r} is not {other!r}"
    print(f"  {what}")


def main():
    status = helio("status")
    actors = {actor["name"]: actor for actor in status["actors"]}
    subprocess.run([HELIO, "job", "submit", "--run-dir", RUN, "--submission-id", "one", "--", "true"], check=True)

    print("ray list")
    rows = json.loads(ray("list", "actors", "--format", "json"))
    same("actors", {row["name"]: row["pid"] for row in rows}, {name: a["pid"] for name, a in actors.items()})
    same("all alive", {row["state"] for row in rows}, {"ALIVE"})
    rows = json.loads(ray("list", "actors", "--format", "json", "-f", "class_name=JOBS", "-f", "pid!=0"))
    same("actors by filters", [row["actor_id"] for row in rows], ["jobs"])
    rows = json.loads(ray("list", "actors", "--format", "json", "--limit", "1", "--detail"))
    same("actors in detail, limited", [row["num_restarts"] for row in rows], [0])
    table = ray("list", "actors")
    assert all(name in table for name in actors) and "CLASS_NAME" in table, table
    same("actors as a table", f"Total: {len(actors)}" in table, True)
    nodes = json.loads(ray("list", "nodes", "--format", "json"))
    same("nodes", [n["node_id"] for n in nodes], [n["name"] for n in status["nodes"]])
    same("nodes' CPUs", [n["resources_total"]["CPU"] for n in nodes], [n["cpus"] for n in status["nodes"]])
    same("the head's node", [n["is_head_node"] for n in nodes], [True])
    jobs = json.loads(ray("list", "jobs", "--format", "json"))
    same("jobs", [(job["submission_id"], job["status"]) for job in jobs], [("one", "SUCCEEDED")])
    same("no such job", "No resource" in ray("list", "jobs", "-f", "status=FAILED"), True)
    workers = json.loads(ray("list", "workers", "--format", "json"))
    same("workers", {w["pid"] for w in workers}, {w["pid"] for w in status["workers"]})
    ray("list", "placement-groups")
    refused = ray("list", "actors", "-f", "nonsense=1", fails=True)
    same("a filter that is none", "Invalid filter key" in refused, True)
    refused = ray("list", "tasks", fails=True)
    same("tasks are refused by name", "keeps no record of tasks" in refused, True)

    print("ray get, ray summary")
    same("an actor", f"pid: {actors['jobs']['pid']}" in ray("get", "actors", "jobs"), True)
    same("a node", "state: ALIVE" in ray("get", "nodes", nodes[0]["node_id"]), True)
    same("no actor", "not found" in ray("get", "actors", "nobody"), True)
    summary = ray("summary", "actors")
    same("actors by class", "ALIVE: 1" in summary and "jobs" in summary, True)

    print("ray.util.state")
    same("list_actors", {a.name for a in list_actors(address=URL, limit=1000)}, set(actors))
    same("get_actor", get_actor("jobs", address=URL).class_name, "jobs")
    same("get_node", get_node(nodes[0]["node_id"], address=URL).state, "ALIVE")
    same("list_nodes", len(list_nodes(address=URL, filters=[("state", "=", "dead")])), 0)
    same("list_workers", all(w.is_alive for w in list_workers(address=URL)), True)
    same("list_jobs", [job.submission_id for job in list_jobs(address=URL)], ["one"])
    summary = summarize_actors(address=URL)["cluster"]
    same("summarize_actors", summary["total_actors"], len(actors))
    try:
        list_actors(address=URL, limit=10_000, filters=[("pid", "=", "many")])
        raise AssertionError("a filter that cannot hold was taken")
    except RayStateApiException as why:
        same("why a filter cannot hold", "pid holds a number" in str(why), True)
    print("ok")


if __name__ == "__main__":
    main()
