"""The cluster of a soak: two nodes of this machine, two ranks of cluster.toml's model, room for an application beside it."""

import asyncio
import contextlib
import json
import math
import pathlib
import shutil
import socket
import subprocess
import time

TOML = """\
[cluster]
name = "soak"
[head]
bind = "127.0.0.1:{head}"
[devices]
device = "cpu"
cpu = 3
threads = 1
[[nodes]]
name = "a"
[[nodes]]
name = "b"
[model]
path = "{model}"
[parallel]
dp = 2
ep = 2
[eplb]
window_size = 200
step_interval = 2000
[engine]
kv_cache_memory_bytes = "16MiB"
[serve]
port = {http}
node = "a"
max_queued_requests = 8
[dashboard]
port = {dashboard}
"""


def free_ports(count):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Cluster:
    """Up while it is entered."""

    def __init__(self, helio, model, directory):
        self.helio, self.model, self.directory = helio, model, directory
        # From when until when nobody may have listened.
        self.server_away = []

    def __enter__(self):
        head, http, dashboard = free_ports(3)
        text = TOML.format(head=head, http=http, dashboard=dashboard, model=self.model)
        (self.directory / "cluster.toml").write_text(text)
        self.url, self.port = f"http://127.0.0.1:{http}", http
        subprocess.run([self.helio, "up", "--detach"], cwd=self.directory, check=True, stdout=subprocess.DEVNULL)
        return self

    def __exit__(self, *_):
        subprocess.run([self.helio, "down"], cwd=self.directory, check=True, stdout=subprocess.DEVNULL)

    async def run(self, *words):
        """What a command of helio prints; an error with what it says where it fails."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(self.helio, *words, cwd=self.directory, stdout=pipe, stderr=pipe)
        out, err = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"helio {' '.join(words)}: {err.decode().strip() or out.decode().strip()}")
        return out.decode()

    async def status(self):
        return json.loads(await self.run("status", "--json"))

    async def actors(self):
        return {actor["name"]: actor for actor in (await self.status())["actors"]}

    async def until(self, what, look, seconds=60):
        """What `look` makes of the status, as soon as it is something."""
        end, last = asyncio.get_running_loop().time() + seconds, None
        while asyncio.get_running_loop().time() < end:
            try:
                last = await self.status()
                if found := look(last):
                    return found
            except RuntimeError as error:  # the head is on its way
                last = str(error)
            await asyncio.sleep(0.05)
        raise RuntimeError(f"waited {seconds} s in vain for {what}: {json.dumps(last)}")

    @contextlib.contextmanager
    def without_server(self):
        began = time.monotonic()
        self.server_away.append((began, math.inf))
        yield
        self.server_away[-1] = (began, time.monotonic())

    def server_was_away(self, since):
        return any(end >= since for _, end in self.server_away)

    def logs(self):
        return [*self.directory.glob("run/logs/*"), *self.directory.glob("run/nodes/*/logs/*")]

    def panics(self):
        return [
            f"{log.name}: {line.strip()}"
            for log in self.logs()
            for line in log.read_text(errors="replace").splitlines()
            if "panicked at" in line
        ]

    def keep_logs(self, to):
        for log in self.logs():
            shutil.copy(log, to / f"{log.parent.parent.name}-{log.name}")
