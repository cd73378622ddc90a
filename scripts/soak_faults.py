"""What is done to the cluster during a soak. Each returns when the cluster is whole again, and raises when it does not become so."""

import asyncio
import json
import os
import signal

APP, NODE = "chat", "b"
# What the documents of the application say; a redeploy changes one of them.
_document = {"seqs": 8, "interval": 2000}


async def deploy(cluster):
    """Deploys the application as it is wanted now and waits until it serves so."""
    document = {
        "applications": [
            {
                "name": APP,
                "route_prefix": f"/{APP}",
                "import_path": "ray.serve.llm:build_openai_app",
                "args": {
                    "llm_configs": [
                        {
                            "model_loading_config": {"model_id": APP, "model_source": str(cluster.model)},
                            "engine_kwargs": {"max_num_seqs": _document["seqs"], "max_num_batched_tokens": 128},
                            "deployment_config": {
                                "num_replicas": 1,
                                "user_config": {"eplb_config": {"step_interval": _document["interval"]}},
                            },
                        }
                    ]
                },
            }
        ]
    }
    (cluster.directory / "serve.yaml").write_text(json.dumps(document))  # JSON is YAML
    await cluster.run("serve", "deploy", "serve.yaml", "--wait")


async def rebalance(cluster):
    try:
        await cluster.run("eplb", "rebalance")
    except RuntimeError as error:
        # The EPLB actor's own, every `step_interval` steps, may be under way, or have just done what is asked for.
        if not any(fine in str(error) for fine in ("still being applied", "already what the policy wants")):
            raise
    shown = None
    for _ in range(200):
        shown = json.loads(await cluster.run("eplb", "show", "--json"))
        if shown.get("open") is None:
            return
    raise RuntimeError(f"the remap does not end: {shown['open']}")


async def redeploy_user_config(cluster):
    _document["interval"] = 5000 - _document["interval"]
    before = await _pids(cluster)
    await deploy(cluster)
    after = await _pids(cluster)
    ranks = [name for name in before if _is_rank(name)]
    if any(before[name] != after.get(name) for name in ranks):
        raise RuntimeError(f"a change of user_config restarted a rank: {before} -> {after}")


async def rolling_update(cluster):
    _document["seqs"] = 17 - _document["seqs"]
    await deploy(cluster)


async def kill_rank(cluster):
    await _kill_and_wait(cluster, "rank-1")


async def kill_replica(cluster):
    names = [name for name in await _pids(cluster) if _is_rank(name) and not name.startswith("rank-")]
    await _kill_and_wait(cluster, names[0])


async def kill_eplb(cluster):
    await _kill_and_wait(cluster, "eplb")


async def kill_serve_controller(cluster):
    await _kill_and_wait(cluster, "serve")


async def kill_ingress(cluster):
    with cluster.without_server():
        await _kill_and_wait(cluster, "ingress")


async def kill_head(cluster):
    pid = (await cluster.status())["head"]["pid"]
    os.kill(pid, signal.SIGKILL)
    await cluster.until("another head", lambda status: status["head"]["pid"] != pid and whole(status))


async def freeze_head(cluster):
    """For longer than a node may be silent. Nobody is given up by a head that could not listen."""
    pid, before = (await cluster.status())["head"]["pid"], await _pids(cluster)
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(5)
    os.kill(pid, signal.SIGCONT)
    await cluster.until("all actors after a frozen head", whole)
    after = await _pids(cluster)
    if before != after:
        raise RuntimeError(f"a head that stood still gave up on actors: {before} -> {after}")


async def kill_node_agent(cluster):
    node = next(node for node in (await cluster.status())["nodes"] if node["name"] == NODE)
    os.kill(node["pid"], signal.SIGKILL)
    back = lambda status: any(n["name"] == NODE and n["pid"] != node["pid"] and _ready(n) for n in status["nodes"])
    await cluster.until("the node agent", lambda status: back(status) and whole(status))


async def drain_node(cluster):
    await cluster.run("drain", NODE, "--deadline", "5")
    await cluster.run("undrain", NODE)
    await cluster.until("all actors after a drain", whole)


ALL = [
    rebalance,
    redeploy_user_config,
    rolling_update,
    kill_rank,
    kill_replica,
    kill_eplb,
    kill_serve_controller,
    kill_ingress,
    kill_head,
    freeze_head,
    kill_node_agent,
    drain_node,
]


def whole(status):
    """Whether every actor and every group is there."""
    return all(map(_ready, status["actors"])) and all(group["complete"] for group in status["groups"])


def _ready(thing):
    return thing["state"]["state"] == "ready"


def _is_rank(name):
    return "rank" in name.rsplit("/", 1)[-1]


async def _pids(cluster):
    return {name: actor["pid"] for name, actor in (await cluster.actors()).items()}


async def _kill_and_wait(cluster, name):
    pid = (await _pids(cluster))[name]
    os.kill(pid, signal.SIGKILL)
    again = lambda status: any(a["name"] == name and a["pid"] != pid for a in status["actors"])
    await cluster.until(f"{name} again", lambda status: again(status) and whole(status))
