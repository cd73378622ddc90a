"""Starts a cluster, loads it with mixed clients while its parts are moved and killed, and accounts for every request.

Usage: soak.py HELIO MODEL_DIR MINUTES. Run by scripts/soak. Exit code 0: nothing was lost; 1: something was, and is named.
"""

import asyncio
import collections
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

import aiohttp

import soak_clients as clients
import soak_faults as faults
from soak_cluster import Cluster
from soak_memory import Memory

HELIO, MODEL, MINUTES = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]), float(sys.argv[3])
SEED = int(os.environ.get("SOAK_SEED", time.time()))
# Between the end of one disturbance and the next: less, and restarts would exceed `max_restarts`.
PAUSE_S = 4.0


class Book:
    """What became of every request."""

    def __init__(self):
        self.counts = collections.Counter()
        self.latencies = collections.defaultdict(list)
        self.lost = []

    def enter(self, kind, outcome, seconds):
        self.counts[kind, outcome.end] += 1
        if outcome.end == clients.COMPLETE:
            self.latencies[kind].append(seconds)
        if outcome.end == clients.LOST:
            self.lost.append(f"{time.strftime('%H:%M:%S')} {kind}: {outcome.why}")
            print("  LOST", self.lost[-1], flush=True)

    def show(self):
        print(f"\n{'REQUESTS':16}" + "".join(f"{end:>10}" for end in clients.ENDS) + f"{'p50 s':>9}{'max s':>9}")
        for kind in sorted({kind for kind, _ in self.counts}):
            times = sorted(self.latencies[kind])
            spread = f"{times[len(times) // 2]:9.2f}{times[-1]:9.2f}" if times else ""
            print(f"{kind:16}" + "".join(f"{self.counts[kind, end]:10,}" for end in clients.ENDS) + spread)
        total = collections.Counter()
        for (_, end), count in self.counts.items():
            total[end] += count
        print(f"{'all':16}" + "".join(f"{total[end]:10,}" for end in clients.ENDS))


async def client(name, cluster, menu, book, until):
    """One client: request after request of its kind until the time is over."""
    chance = random.Random(f"{SEED} {name}")
    kind = name.rstrip("0123456789")
    async with clients.session() as session:
        while time.monotonic() < until:
            began = time.monotonic()
            try:
                async with asyncio.timeout(clients.PATIENCE_S):
                    outcome = await clients.KINDS[kind](session, cluster, menu, chance)
            except TimeoutError:
                outcome = clients.lost(f"no end after {clients.PATIENCE_S:.0f} s")
            except (aiohttp.ClientError, OSError) as error:
                cut = cluster.server_was_away(since=began)
                outcome = clients.Outcome(clients.CUT) if cut else clients.lost(f"connection: {error!r}")
            book.enter(kind, outcome, time.monotonic() - began)
            # Requests that cost the server nothing must not crowd out the others, and who was refused comes back later.
            thinks = kind in clients.CHEAP or outcome.end in (clients.REFUSED, clients.CUT)
            await asyncio.sleep(chance.uniform(0.02, 0.2) if thinks else 0)


async def disturb(cluster, until, happened):
    """One disturbance after the other, each to its end, in an order that the seed decides."""
    chance, failed = random.Random(f"{SEED} faults"), []
    while time.monotonic() < until:
        turn = list(faults.ALL)
        chance.shuffle(turn)
        for fault in turn:
            if time.monotonic() >= until:
                break
            began = time.monotonic()
            try:
                await fault(cluster)
            except Exception as error:  # whatever it is, it is a finding
                failed.append(f"{time.strftime('%H:%M:%S')} {fault.__name__}: {error}")
                print("  FAILED", failed[-1], flush=True)
            happened[fault.__name__.replace("_", " ")].append(time.monotonic() - began)
            await asyncio.sleep(PAUSE_S)
    return failed


async def sample(cluster, memory, until):
    while time.monotonic() < until:
        await memory.sample(cluster)
        await asyncio.sleep(5)


async def in_flight(cluster):
    """What the ingress believes to be under way."""
    async with clients.session() as session:
        async with session.get(cluster.url + "/metrics") as answer:
            text = await answer.text()
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if re.match(r"(vllm:num_requests_(running|waiting)|heliostat:sequences_in_flight)\{", line)
    }


async def at_rest(cluster):
    """Waits until nothing is in flight; what still is after a while."""
    for _ in range(200):
        left = {name: value for name, value in (await in_flight(cluster)).items() if value}
        if not left:
            break
        await asyncio.sleep(0.1)
    return [f"in flight after the last client: {name} {value:.0f}" for name, value in left.items()]


async def soak(cluster):
    await faults.deploy(cluster)
    menu = await clients.references(cluster)
    print(f"{len(menu)} reference answers; seed {SEED}; {MINUTES:g} minutes of {len(clients.MIX)} clients", flush=True)
    book, memory, happened = Book(), Memory(warm_up_s=min(300, MINUTES * 60 / 3)), collections.defaultdict(list)
    until = time.monotonic() + MINUTES * 60
    async with asyncio.TaskGroup() as group:
        disturbed = group.create_task(disturb(cluster, until, happened))
        group.create_task(sample(cluster, memory, until))
        for name in clients.MIX:
            group.create_task(client(name, cluster, menu, book, until))
    wrong = disturbed.result() + await at_rest(cluster) + cluster.panics()
    book.show()
    print(f"\n{'DISTURBANCES':24}{'times':>6}{'p50 s':>9}{'max s':>9}")
    for name, took in sorted(happened.items()):
        print(f"{name:24}{len(took):6}{sorted(took)[len(took) // 2]:9.2f}{max(took):9.2f}")
    memory.show()
    return book.lost + wrong


def main():
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{HELIO}, commit {commit}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d %H:%M')} UTC")
    with tempfile.TemporaryDirectory() as directory, Cluster(HELIO, MODEL, pathlib.Path(directory)) as cluster:
        wrong = asyncio.run(soak(cluster))
        if wrong:
            kept = pathlib.Path(tempfile.mkdtemp(prefix="soak-logs-"))
            cluster.keep_logs(kept)
            print(f"\nlogs of the cluster: {kept}")
    print("\n" + ("\n".join(f"WRONG {line}" for line in wrong) if wrong else "nothing was lost"))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
