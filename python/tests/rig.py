"""What the tests share: where things are, and a real cluster for a class of them."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))

import heliostat  # noqa: E402

HELIO = os.environ["HELIO"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def folder(case) -> pathlib.Path:
    """A directory that is there for as long as the tests of the class run."""
    directory = tempfile.TemporaryDirectory()
    case.addClassCleanup(directory.cleanup)
    return pathlib.Path(directory.name)


def up(case, folder: pathlib.Path, http: int, dashboard: int, more: str = "") -> None:
    """A cluster with one CPU device while the tests of the class run. `more` comes last: it goes on with [dashboard]."""
    config = folder / "cluster.toml"
    config.write_text(
        f"""
[cluster]
run_dir = "run"
[head]
bind = "127.0.0.1:{free_port()}"
[devices]
device = "cpu"
cpu = 1
[serve]
port = {http}
[dashboard]
port = {dashboard}
{more}"""
    )
    done = subprocess.run([HELIO, "up", str(config), "--detach"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    case.addClassCleanup(helio, folder, "down")


def helio(folder: pathlib.Path, *words: str) -> str:
    """What the command prints."""
    done = subprocess.run([HELIO, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
