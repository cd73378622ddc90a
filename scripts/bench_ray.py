"""Measures Ray and Heliostat in the same run and prints a Markdown table. Run by scripts/bench_ray.

Every row is measured first with Ray, then with Heliostat, on the same otherwise idle machine. Times end where a user would say
so: with an answer of an actor, or the end of a command.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
RAY = os.path.join(os.path.dirname(sys.executable), "ray")
# `ray start` asks its clients for the token that it makes; they look for it only when told so.
os.environ["RAY_AUTH_MODE"] = "token"
HELIO = os.environ["HELIO"]
# The program of examples/counter.rs.
COUNTER = os.environ["COUNTER"]
# Rows of our benchmarks that stand beside one of Ray's under another name, and in which column.
RENAMED = {
    "actors in their own processes, 50 at once": ("actors in their own processes", "heliostat"),
    "memcpy, warm": ("put 1 GB on a node", "floor"),
    "head, idle": ("head, idle, as a library", "heliostat"),
    "write to cold shared memory": ("put of a size never put before", "floor"),
}
CARGO_BENCH = ["cargo", "bench", "--locked", "-q", "-p", "heliostat-runtime", "--bench"]
# Ray writes its own log to stdout; the table goes there alone.
STDOUT = os.dup(1)
os.dup2(2, 1)
# Row -> {"ray": text, "heliostat": text, "floor": text}
ROWS: dict[str, dict[str, str]] = {}


def row(name: str, side: str, text: str) -> None:
    ROWS.setdefault(name, {})[side] = text
    print(f"  {name}: {side}: {text}", file=sys.stderr, flush=True)


def run(*words: str, **options) -> str:
    done = subprocess.run(words, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def timed(*words: str, **options) -> float:
    began = time.perf_counter()
    run(*words, **options)
    return time.perf_counter() - began


def resident_mb(pid: int) -> float:
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def spread(values: list[float], unit: str, digits: int = 2) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    if len(values) == 1:
        return f"{middle:.{digits}f} {unit}"
    return f"{middle:.{digits}f} {unit} ({low:.{digits}f}-{high:.{digits}f})"


# ---- Ray -------------------------------------------------------------------------------------------------------------

FIRST_CALL = """
import ray
ray.init(address="auto", log_to_driver=False)
@ray.remote
class A:
    def f(self):
        return 1
assert ray.get(A.remote().f.remote()) == 1
"""


def ray_processes() -> list[int]:
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if "ray/core/src/ray" in words or "site-packages/ray/" in words or words.startswith("ray::"):
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def ray_head() -> None:
    began = time.perf_counter()
    run(RAY, "start", "--head", "--disable-usage-stats", "--num-cpus", "64")
    run(sys.executable, "-c", FIRST_CALL)
    row("start to first remote call", "ray", f"{time.perf_counter() - began:.1f} s")
    row("status", "ray", f"{timed(RAY, 'status'):.2f} s")
    pids = ray_processes()
    row("head, idle", "ray", f"{len(pids)} processes, {sum(map(resident_mb, pids)):.0f} MB")
    environment = {**os.environ, "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}
    row("job `echo hi`", "ray", f"{timed(RAY, 'job', 'submit', '--', 'echo', 'hi', env=environment):.1f} s")


def ray_calls() -> None:
    import numpy
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    ray.init(address="auto", log_to_driver=False)

    @ray.remote(num_cpus=0)
    class Echo:
        def ping(self, n=0):
            return n + 1

        def pid(self):
            return os.getpid()

    echo = Echo.remote()
    for _ in range(500):
        ray.get(echo.ping.remote())
    times = []
    for _ in range(3000):
        began = time.perf_counter()
        ray.get(echo.ping.remote())
        times.append((time.perf_counter() - began) * 1e6)
    times.sort()
    row("ask, empty, two processes, p50", "ray", f"{times[len(times) // 2]:.0f} us")
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        ray.get([echo.ping.remote() for _ in range(2000)])
        rates.append(2000 / (time.perf_counter() - began) / 1000)
    row("pipelined calls 1:1", "ray", spread(rates, "k/s"))

    began = time.perf_counter()
    actors = [Echo.remote() for _ in range(20)]
    pids = ray.get([actor.pid.remote() for actor in actors])
    row("actors in their own processes", "ray", f"{20 / (time.perf_counter() - began):.1f} /s")
    row("memory of an actor's process", "ray", f"{statistics.median(map(resident_mb, pids)):.1f} MB")
    for actor in actors:
        ray.kill(actor)

    for retries in (-1,):
        victim = Echo.options(max_restarts=-1, max_task_retries=retries).remote()
        times = []
        for _ in range(5):
            pid = ray.get(victim.pid.remote())
            began = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            ray.get(victim.ping.remote())
            times.append(time.perf_counter() - began)
        row("killed actor answers again", "ray", spread(times, "s"))

    # Only one such group fits: 64 CPUs, so 128 bundles of a half.
    times = []
    bundles = [{"CPU": 0.5} for _ in range(128)]
    group = placement_group(bundles)
    ray.get(group.ready())
    for _ in range(5):
        began = time.perf_counter()
        remove_placement_group(group)
        group = placement_group(bundles)
        group.wait(60)
        times.append((time.perf_counter() - began) * 1e3)
    remove_placement_group(group)
    row("gang of 128 bundles again right after removal", "ray", spread(times, "ms", 0))

    block = numpy.ones(1_000_000_000, dtype=numpy.uint8)
    rates, gets = [], []
    for _ in range(5):
        began = time.perf_counter()
        ref = ray.put(block)
        rates.append(1 / (time.perf_counter() - began))
        began = time.perf_counter()
        got = ray.get(ref)
        gets.append((time.perf_counter() - began) * 1e3)
        assert got.nbytes == 1_000_000_000
        del got, ref
    row("put 1 GB on a node", "ray", spread(rates, "GB/s"))
    row("zero-copy get of it", "ray", spread(gets, "ms"))
    ray.shutdown()


def ray_losses() -> None:
    """A second node on this machine is lost: its raylet killed, or all of it stopped."""
    import ray
    from ray.cluster_utils import Cluster

    for what, freeze in (("node agent killed", False), ("node frozen", True)):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        nodes = [cluster.add_node(num_cpus=1, resources={"spot": 1}) for _ in range(2)]
        cluster.wait_for_nodes()

        @ray.remote(num_cpus=0, resources={"spot": 1}, max_restarts=-1, max_task_retries=-1)
        class Mover:
            def where(self):
                return ray.get_runtime_context().get_node_id(), os.getpid()

        mover = Mover.remote()
        home, worker = ray.get(mover.where.remote())
        node = next(node for node in nodes if node.node_id == home)
        raylet = node.all_processes["raylet"][0].process.pid
        began = time.perf_counter()
        if freeze:
            os.kill(raylet, signal.SIGSTOP)
            os.kill(worker, signal.SIGSTOP)
        else:
            os.kill(raylet, signal.SIGKILL)
        answer = mover.where.remote()
        while any(n["NodeID"] == home and n["Alive"] for n in ray.nodes()):
            time.sleep(0.01)
        row(f"{what}: noticed", "ray", f"{time.perf_counter() - began:.1f} s")
        # A worker that its raylet left behind may still have answered.
        while ray.get(answer)[0] == home:
            answer = mover.where.remote()
        row(f"{what}: actor elsewhere", "ray", f"{time.perf_counter() - began:.1f} s")
        if freeze:
            os.kill(worker, signal.SIGKILL)
            os.kill(raylet, signal.SIGCONT)
        ray.shutdown()
        cluster.shutdown()


# ---- Heliostat -------------------------------------------------------------------------------------------------------


def helio_rows(bench: str, *rows: str) -> None:
    """The rows of a benchmark that prints them as JSON."""
    for line in run(*CARGO_BENCH, bench, "--", *rows, cwd=ROOT).splitlines():
        if not line.startswith("{"):
            continue
        found = json.loads(line)
        digits = 0 if found["unit"] == "1/s" else 3 if found["value"] < 0.1 else 2 if found["value"] < 10 else 1
        unit = {"1/s": "/s"}.get(found["unit"], found["unit"])
        text = f"{found['value']:.{digits}f} {unit}"
        if found["n"] > 1:
            text += f" ({found['min']:.{digits}f}-{found['max']:.{digits}f})"
        name, side = RENAMED.get(found["row"], (found["row"], "heliostat"))
        row(name, side, text)


def helio_bench() -> None:
    for line in run(*CARGO_BENCH, "ask", cwd=ROOT).splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if cells[0].startswith("raw TCP ping-pong"):
            row("ask, empty, two processes, p50", "floor", f"TCP ping-pong {float(cells[1]):.0f} us")
        elif cells[0] == "Handle, two processes":
            row("ask, empty, two processes, p50", "heliostat", f"{float(cells[1]):.0f} us")
            row("pipelined calls 1:1", "heliostat", f"{cells[3]} k/s")
        elif cells[0] == "Handle in process, two threads":
            row("ask, empty, in process, p50", "heliostat", f"{float(cells[1]):.2f} us")
        elif cells[0].startswith("actors spawned inside"):
            row("actors inside a process", "heliostat", f"{cells[3]} k/s")
    helio_rows("cluster", "actors", "killed", "hung", "gang", "lost")
    helio_rows("objects")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def helio_config(directory: str, more: str = "") -> tuple[str, int]:
    """A cluster.toml in that directory, and the port of its head."""
    head, serve, dashboard = free_port(), free_port(), free_port()
    config = pathlib.Path(directory) / "cluster.toml"
    config.write_text(
        f"""
[cluster]
run_dir = "run"
[head]
bind = "127.0.0.1:{head}"
[devices]
device = "cpu"
cpu = 1
[serve]
port = {serve}
[dashboard]
port = {dashboard}
{more}
"""
    )
    return str(config), head


def helio_commands() -> None:
    """The commands: first a bare cluster, as `ray start --head` gives it, then one that serves the bundled model."""
    started, stopped = [], []
    for turn in range(5):
        with tempfile.TemporaryDirectory() as directory:
            config, head = helio_config(directory)
            environment = {**os.environ, "HELIOSTAT_ADDRESS": f"127.0.0.1:{head}"}
            began = time.perf_counter()
            run(HELIO, "up", config, "--detach")
            run(COUNTER, "1", env=environment)
            started.append(time.perf_counter() - began)
            options = {"cwd": directory}
            if turn == 0:
                times = [timed(HELIO, "status", **options) for _ in range(5)]
                row("status", "heliostat", spread(times, "s", 3))
                times = [timed(HELIO, "job", "submit", "--", "echo", "hi", **options) for _ in range(5)]
                row("job `echo hi`", "heliostat", spread(times, "s"))
                pids = json.loads(run(HELIO, "status", "--json", **options))
                row("head, idle", "heliostat", f"one process, {resident_mb(pids['head']['pid']):.0f} MB")
            stopped.append(timed(HELIO, "down", **options))
    row("start to first remote call", "heliostat", spread(started, "s"))
    row("stop", "heliostat", spread(stopped, "s"))
    with tempfile.TemporaryDirectory() as directory:
        config, _ = helio_config(directory, f'[model]\npath = "{ROOT / "models" / "sundial-20m"}"')
        row("`helio up --detach` until the bundled model serves", "heliostat", f"{timed(HELIO, 'up', config, '--detach'):.2f} s")
        row("`helio down` of it", "heliostat", f"{timed(HELIO, 'down', cwd=directory):.2f} s")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--quick", action="store_true", help="without lost and frozen nodes of Ray")
    quick = arguments.parse_args().quick
    ray_head()
    try:
        ray_calls()
    finally:
        took = timed(RAY, "stop")
    row("stop", "ray", f"{took:.1f} s")
    if not quick:
        ray_losses()
    helio_bench()
    helio_commands()
    commit = run("git", "rev-parse", "--short", "HEAD", cwd=ROOT).strip()
    cores = os.cpu_count()
    os.dup2(STDOUT, 1)
    print(f"Commit {commit}, Ray 2.60, {cores} cores, {time.strftime('%Y-%m-%d %H:%M')} UTC.\n")
    print("| | Ray | Heliostat | floor |\n|---|---|---|---|")
    for name, sides in ROWS.items():
        cells = [sides.get(side, "-") for side in ("ray", "heliostat", "floor")]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
