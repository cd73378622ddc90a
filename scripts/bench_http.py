"""Requests per second and latency by wrk, at 1, 64 and 512 connections, of servers that do nothing.

Usage: bench_http.py BENCH RAY_BIN [--ray]. Run by scripts/bench_http. Rounds of all servers alternate, so that what else the
machine does disturbs all alike; the median round is shown.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

BENCH, RAY = sys.argv[1], pathlib.Path(sys.argv[2])
CONNECTIONS, ROUNDS, SECONDS = (1, 64, 512), 3, 5
BODY = {"model": "sundial-20m", "prompt": "The fox and the", "max_tokens": 1, "ignore_eos": True}
NOTHING = '''
from ray import serve

@serve.deployment(num_replicas=1, max_ongoing_requests=1024)
class Nothing:
    async def __call__(self, request):
        await request.body()
        return {"choices": [{"index": 0, "text": " the", "finish_reason": "length"}]}

app = Nothing.bind()
'''


@contextlib.contextmanager
def started(kind):
    """A server of the benchmark; yields its address and the processes that serve."""
    process = subprocess.Popen([BENCH, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address, *replica = process.stdout.readline().split()
        yield f"http://{address}/v1/completions", [process.pid, *map(int, replica)]
    finally:
        process.stdin.close()
        process.wait(20)


@contextlib.contextmanager
def ray_serve():
    """Ray Serve on port 8000 with one replica."""
    with tempfile.TemporaryDirectory() as directory:
        pathlib.Path(directory, "nothing.py").write_text(NOTHING)
        environment = os.environ | {"PYTHONPATH": directory, "RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{RAY}:{os.environ['PATH']}"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
        process = subprocess.Popen([RAY / "serve", "run", "nothing:app"], **quiet)
        try:
            deadline = time.monotonic() + 180
            while True:
                with contextlib.suppress(OSError):
                    request = urllib.request.Request("http://127.0.0.1:8000/", json.dumps(BODY).encode())
                    if urllib.request.urlopen(request, timeout=5).status == 200:
                        break
                if time.monotonic() > deadline or process.poll() is not None:
                    raise SystemExit("Ray Serve did not start")
                time.sleep(0.5)
            yield "http://127.0.0.1:8000/", []
        finally:
            process.terminate()
            process.wait(60)
            subprocess.run([RAY / "ray", "stop", "--force"], check=False, **quiet)


def wrk(url, connections, seconds=SECONDS):
    """Requests per second, and p50 and p99 in ms."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(f"wrk.method = 'POST'\nwrk.body = [[{json.dumps(BODY)}]]\nwrk.headers['content-type'] = 'application/json'\n")
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--timeout", "10", "--latency", "-s", script.name, url]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if failed := re.search(r"Non-2xx.*|Socket errors.*", out):
        print(f"    {url}, {connections} connections: {failed[0]}", file=sys.stderr)
    scale = {"us": 1e-3, "ms": 1, "s": 1e3}
    percentile = lambda p: (lambda found: float(found[1]) * scale[found[2]])(re.search(rf"{p}%\s+([\d.]+)(us|ms|s)", out))
    return float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]), percentile(50), percentile(99)


def cpu_s(processes):
    ticks = 0
    for process in processes:
        fields = pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main():
    if not shutil.which("wrk"):
        raise SystemExit("wrk is missing: apt install wrk")
    with contextlib.ExitStack() as stack:
        servers = {
            "actix-web alone": stack.enter_context(started("bare")),
            "router and replica process": stack.enter_context(started("serve")),
        }
        if "--ray" in sys.argv:
            servers["Ray Serve 2.60, no-op"] = stack.enter_context(ray_serve())
        runs, spent = {}, {}
        for url, _ in servers.values():
            wrk(url, 64, 2)
        for _ in range(ROUNDS):
            for connections in CONNECTIONS:
                for name, (url, processes) in servers.items():
                    before = cpu_s(processes)
                    got = wrk(url, connections)
                    runs.setdefault((name, connections), []).append(got)
                    spent.setdefault((name, connections), []).append((cpu_s(processes) - before) * 1e6 / (got[0] * SECONDS))
    print("| connections | server | requests/s | p50 ms | p99 ms | processor us per request |\n|---|---|---|---|---|---|")
    for connections in CONNECTIONS:
        for name, (_, processes) in servers.items():
            rate, p50, p99 = (statistics.median(column) for column in zip(*runs[name, connections]))
            cpu = f"{statistics.median(spent[name, connections]):.1f}" if processes else "-"
            print(f"| {connections} | {name} | {rate:,.0f} | {p50:.3f} | {p99:.2f} | {cpu} |")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"\nCommit {commit}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d %H:%M')} UTC.\n")


if __name__ == "__main__":
    main()
