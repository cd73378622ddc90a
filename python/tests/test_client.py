"""The client against a real cluster. HELIO names the binary; `scripts/test` runs this."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
import unittest

from rig import ROOT, folder, free_port, heliostat, helio, up

KEY = "a-key-of-the-tests"


def until(what, seconds=20.0):
    """What `what` returns as soon as it is something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("waited in vain")


class ClientTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.dir = folder(cls)
        dashboard = free_port()
        cls.dashboard = f"http://127.0.0.1:{dashboard}"
        key_file = cls.dir / "key"
        key_file.write_text(KEY + "\n")
        key_file.chmod(0o600)
        model = f'[model]\npath = "{ROOT / "models" / "sundial-20m"}"\n'
        up(cls, cls.dir, free_port(), dashboard, 'api_key_file = "key"\n' + model)
        cls.cluster = heliostat.connect(cls.dashboard, api_key=KEY)
        cls.addClassCleanup(cls.cluster.close)

    @classmethod
    def helio(cls, *words: str) -> str:
        return helio(cls.dir, *words)

    # Connecting

    def test_nobody_there_and_a_wrong_key_are_told(self) -> None:
        with self.assertRaisesRegex(heliostat.NoAnswer, "helio up"):
            heliostat.connect(f"http://127.0.0.1:{free_port()}")
        with self.assertRaisesRegex(heliostat.RequestRefused, "Authorization") as caught:
            heliostat.connect(self.dashboard, api_key="another")
        self.assertEqual(caught.exception.status, 401)
        with self.assertRaisesRegex(heliostat.HeliostatError, "http://HOST:PORT"):
            heliostat.connect("ftp://127.0.0.1")

    def test_a_key_file_and_an_address_are_taken_from_the_environment(self) -> None:
        kept = dict(os.environ)
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(kept)))
        os.environ.update(HELIOSTAT_DASHBOARD=self.dashboard, HELIOSTAT_DASHBOARD_KEY_FILE=str(self.dir / "key"))
        with heliostat.connect() as cluster:
            self.assertEqual(cluster.url, self.dashboard)

    def test_a_connection_that_the_other_side_closed_is_not_used_again(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
        seen = []

        def serve() -> None:
            for _ in range(2):
                client, _ = listener.accept()
                seen.append(client.recv(65536).split(b" ")[1])
                client.sendall(answer)
                client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        cluster = heliostat.connect(f"http://127.0.0.1:{listener.getsockname()[1]}")
        kept = cluster._http._idle[0].sock
        until(lambda: select.select([kept], [], [], 0)[0])
        cluster.version()
        cluster.close()
        thread.join()
        self.assertEqual(seen, [b"/api/version", b"/api/version"])

    # State

    def test_state(self) -> None:
        status = self.cluster.status()
        names = {actor["name"] for actor in status["actors"]}
        self.assertEqual({actor.name for actor in self.cluster.actors()}, names)
        jobs = self.cluster.get_actor("jobs")
        self.assertEqual((jobs.class_name, jobs.state), ("jobs", "ALIVE"))
        self.assertIn("repr_name", jobs.more)
        self.assertEqual([a.pid for a in self.cluster.actors("name=jobs", "state!=DEAD")], [jobs.pid])
        with self.assertRaisesRegex(heliostat.ActorNotFound, "nobody"):
            self.cluster.get_actor("nobody")
        (node,) = self.cluster.nodes()
        self.assertTrue(node.is_head_node and node.resources_total["CPU"] > 0)
        self.assertEqual(self.cluster.placement_groups(), [])
        with self.assertRaisesRegex(heliostat.HeliostatError, "no filter"):
            self.cluster.actors("state")
        with self.assertRaisesRegex(heliostat.RequestRefused, "no column"):
            self.cluster.actors("nonsense=1")
        with self.assertRaisesRegex(heliostat.RequestRefused, "no record of tasks"):
            self.cluster.list("tasks")

    # Actors

    def test_actors_are_called(self) -> None:
        rank = self.cluster.actor("rank-0")
        self.assertIsNone(rank.ask("rank.ping", timeout=10))
        rank.tell("rank.ping")
        with self.assertRaisesRegex(heliostat.CallRefused, "there are .*rank.ping"):
            rank.ask("rank.submit", {"request": 1})
        with self.assertRaisesRegex(heliostat.CallRefused, "rank.ping"):
            rank.ask("rank.ping", {"unexpected": 1})
        with self.assertRaisesRegex(heliostat.CallRefused, "accepts none"):
            self.cluster.actor("jobs").ask("jobs.list")
        with self.assertRaisesRegex(heliostat.ActorNotFound, "nobody"):
            self.cluster.actor("nobody").ask("rank.ping")
        with self.assertRaisesRegex(heliostat.CallRefused, "timeout_s"):
            rank.ask("rank.ping", timeout=0)
        try:
            started = self.cluster.actor("eplb").ask("eplb.rebalance")
            self.assertGreater(started["epoch"], 0)
        except heliostat.ActorError as refused:
            # With one rank there is nothing to move: the actor's own words arrive.
            self.assertTrue(str(refused))

    # Jobs

    def test_a_job_with_its_directory(self) -> None:
        code = self.dir / "code"
        (code / "sub").mkdir(parents=True)
        (code / "empty").mkdir()
        (code / "sub" / "main.sh").write_text('ls -d empty; echo "$GREETING from $HELIOSTAT_JOB_ID"; exit 3\n')
        job = self.cluster.submit(
            ["sh", "sub/main.sh"],
            working_dir=code,
            env={"GREETING": "it's  me"},
            metadata={"owner": "tests"},
            submission_id="with-dir",
        )
        lines = "".join(job.follow()).splitlines()
        self.assertEqual(lines[1:], ["empty", "it's  me from with-dir"])
        self.assertEqual(job.wait(), heliostat.JobStatus.FAILED)
        details = job.details()
        self.assertEqual((details.driver_exit_code, dict(details.metadata)), (3, {"owner": "tests"}))
        self.assertIn("it's  me", job.logs())
        self.assertIn("with-dir", [j.submission_id for j in self.cluster.jobs()])
        again = self.cluster.submit("true", working_dir=code)
        self.assertEqual(again.wait(10), heliostat.JobStatus.SUCCEEDED)
        job.delete()
        with self.assertRaises(heliostat.JobNotFound):
            job.status()

    def test_a_job_is_waited_for_and_stopped(self) -> None:
        job = self.cluster.submit("sleep 100")
        with self.assertRaisesRegex(heliostat.WaitTimeout, "PENDING|RUNNING"):
            job.wait(0.2)
        self.assertFalse(job.status().is_terminal())
        self.assertTrue(job.stop())
        self.assertEqual(job.wait(20), heliostat.JobStatus.STOPPED)
        self.assertFalse(job.stop())

    def test_a_log_is_followed_over_the_death_of_the_dashboard(self) -> None:
        go = self.dir / "go"
        job = self.cluster.submit(f"echo before; while [ ! -e {go} ]; do sleep 0.05; done; echo \u00e4fter")
        parts = job.follow()
        text = next(parts)
        pid = self.cluster.get_actor("jobs").pid
        os.kill(pid, 9)
        until(lambda: self.jobs_pid() not in (None, pid))
        go.touch()
        lines = (text + "".join(parts)).splitlines()
        self.assertEqual(lines[1:], ["before", "\u00e4fter"])
        self.assertEqual(job.wait(20), heliostat.JobStatus.SUCCEEDED)

    def jobs_pid(self):
        try:
            return self.cluster.get_actor("jobs").pid or None
        except heliostat.HeliostatError:
            return None

    def test_what_cannot_be_submitted_is_refused(self) -> None:
        with self.assertRaisesRegex(heliostat.HeliostatError, "no directory"):
            self.cluster.submit("true", working_dir=self.dir / "nowhere")
        with self.assertRaisesRegex(heliostat.RequestRefused, "submission_id"):
            self.cluster.submit("true", submission_id="a/b")
        with self.assertRaises(heliostat.JobNotFound):
            self.cluster.job("../version").status()


if __name__ == "__main__":
    unittest.main()
