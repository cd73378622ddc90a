"""Memory of the cluster's processes during a soak: sampled, and judged by its slope after the warm-up."""

import pathlib
import time

# A process is flat when what it would gain in an hour is below this part of what it has, or its gain below so many KiB in all.
FLAT_PER_HOUR, NOISE_KIB = 0.25, 2048


class Memory:
    def __init__(self, warm_up_s):
        self.from_ = time.monotonic() + warm_up_s
        self.series = {}

    async def sample(self, cluster):
        try:
            status = await cluster.status()
        except RuntimeError:
            return  # the head is on its way
        named = [("head", status["head"]["pid"])]
        named += [(f"node {node['name']}", node["pid"]) for node in status["nodes"]]
        named += [(actor["name"], actor.get("pid")) for actor in status["actors"]]
        now = time.monotonic()
        for name, pid in named:
            if pid and (kib := anonymous_kib(pid)):
                self.series.setdefault((name, pid), []).append((now, kib))

    def show(self):
        """One line per process that lived through most of the time after the warm-up."""
        print(f"\n{'MEMORY':20}{'minutes':>8}{'from MiB':>10}{'to MiB':>10}{'max MiB':>10}{'KiB/min':>10}")
        whole = max((points[-1][0] for points in self.series.values()), default=0) - self.from_
        short = 0
        for (name, _), points in sorted(self.series.items()):
            points = [point for point in points if point[0] >= self.from_]
            if len(points) < 3 or points[-1][0] - points[0][0] < 0.6 * whole:
                short += 1
                continue
            minutes = (points[-1][0] - points[0][0]) / 60
            slope, sizes = slope_per_minute(points), [kib for _, kib in points]
            flat = slope * 60 < FLAT_PER_HOUR * sizes[0] or slope * minutes < NOISE_KIB
            word = "flat" if flat else "GROWS"
            figures = f"{sizes[0] / 1024:10.1f}{sizes[-1] / 1024:10.1f}{max(sizes) / 1024:10.1f}{slope:10.1f}"
            print(f"{name:20}{minutes:8.1f}{figures}  {word}")
        print(f"(private memory of processes, after the warm-up; {short} that were replaced meanwhile are left out)")


def anonymous_kib(pid):
    """Private memory of a process: what a leak would show in. Files and rings that are mapped do not count."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)


def slope_per_minute(points):
    """Of the line with the least squares."""
    at, size = [t / 60 for t, _ in points], [kib for _, kib in points]
    t, s = sum(at) / len(at), sum(size) / len(size)
    return sum((a - t) * (b - s) for a, b in zip(at, size)) / sum((a - t) ** 2 for a in at)
