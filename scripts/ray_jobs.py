"""Drives a dashboard with Ray's own job client; with --record it writes down what that client sends.

Usage: ray_jobs.py URL [--record FILE]. Needs ray[default] 2.60. Run by scripts/test_ray_jobs.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time

from ray.job_submission import JobStatus, JobSubmissionClient

RECORDED = []


def record(url):
    """Starts a proxy before the dashboard that writes down every request; returns its URL."""
    host, port = url.removeprefix("http://").split(":")
    server = socket.create_server(("127.0.0.1", 0))

    def serve(client):
        upstream = socket.create_connection((host, int(port)))
        data = b""
        while b"\r\n\r\n" not in data:
            part = client.recv(65536)
            if not part:
                return client.close()
            data += part
        head, body = data.split(b"\r\n\r\n", 1)
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        while len(body) < int(headers.get("Content-Length", 0)):
            body += client.recv(65536)
        method, path, _ = first.split(" ")
        upgrade = "Upgrade" in headers
        kept = {k: v for k, v in headers.items() if k not in ("Host", "Connection")}
        kept["Connection"] = "Upgrade" if upgrade else "close"
        entry = {"method": method, "path": path, "headers": kept, "body_hex": body.hex()}
        RECORDED.append(entry)
        lines = [first, f"Host: {host}:{port}"] + [f"{k}: {v}" for k, v in kept.items()]
        upstream.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        if upgrade:
            threading.Thread(target=pipe, args=(client, upstream), daemon=True).start()
        answer = pipe(upstream, client)
        entry["status"] = int(answer.split(b" ", 2)[1])
        client.close()

    def pipe(source, sink):
        whole = b""
        try:
            while part := source.recv(65536):
                whole += part
                sink.sendall(part)
        except OSError:
            pass
        return whole

    def accept():
        while True:
            client, _ = server.accept()
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def expect(**what):
    """Notes for the replay: what to wait for before the latest request, and what its answer holds."""
    time.sleep(0.1)
    if RECORDED:
        RECORDED[-1].update(what)


def until_ended(client, job):
    while not client.get_job_status(job).is_terminal():
        if RECORDED:
            RECORDED.pop()
        time.sleep(0.05)
    return client.get_job_info(job)


def refused(call, word):
    try:
        call()
    except RuntimeError as error:
        assert word in str(error), error
    else:
        raise AssertionError(f"{word} was accepted")


async def tail(client, job):
    return "".join([lines async for lines in client.tail_job_logs(job)])


def use_client(url):
    client = JobSubmissionClient(url)
    with tempfile.TemporaryDirectory() as code:
        with open(os.path.join(code, "main.sh"), "w") as script:
            script.write("echo $GREETING from the package; exit $1\n")
        runtime_env = {"working_dir": code, "env_vars": {"GREETING": "hello"}}
        metadata = {"owner": "me"}
        job = client.submit_job(
            entrypoint="sh main.sh 0", submission_id="good", runtime_env=runtime_env, metadata=metadata
        )
        expect(answer_has=['"submission_id":"good"'])
        assert job == "good"
        assert "hello from the package" in asyncio.run(tail(client, job))
        expect(answer_has=["hello from the package"])
        info = until_ended(client, job)
        expect(once="good SUCCEEDED", answer_has=['"status":"SUCCEEDED"', '"driver_exit_code":0'])
        assert (info.status, info.driver_exit_code, info.metadata) == (JobStatus.SUCCEEDED, 0, metadata), info
        assert info.end_time >= info.start_time and info.error_type is None, info
        bad = client.submit_job(entrypoint="sh main.sh 3", submission_id="bad", runtime_env=runtime_env)
        info = until_ended(client, bad)
        expect(once="bad FAILED", answer_has=["JOB_ENTRYPOINT_COMMAND_ERROR", '"driver_exit_code":3'])
        assert (info.status, info.driver_exit_code) == (JobStatus.FAILED, 3), info
        assert "hello from the package" in info.message, info
    assert "hello from the package" in client.get_job_logs("good")
    expect(answer_has=["hello from the package"])
    client.submit_job(entrypoint="sleep 100", submission_id="long", entrypoint_num_cpus=0.5)
    refused(lambda: client.delete_job("long"), "non-terminal")
    expect(answer_has=["non-terminal state"])
    assert client.stop_job("long")
    expect(answer_has=['"stopped":true'])
    assert until_ended(client, "long").status == JobStatus.STOPPED
    expect(once="long STOPPED", answer_has=["Job was intentionally stopped."])
    assert {job.submission_id for job in client.list_jobs()} >= {"good", "bad", "long"}
    expect(answer_has=['"submission_id":"long"'])
    assert client.delete_job("bad")
    expect(answer_has=['"deleted":true'])
    refused(lambda: client.get_job_info("bad"), "does not exist")
    expect(answer_has=["Job bad does not exist"])
    refused(lambda: client.submit_job(entrypoint="true", submission_id="good"), "already exists")
    for field, value in [("pip", ["x"]), ("conda", "env"), ("image_uri", "x")]:
        refused(lambda: client.submit_job(entrypoint="true", runtime_env={field: value}), f"runtime_env.{field}")
        expect(answer_has=[f"runtime_env.{field}"])
    refused(lambda: client.submit_job(entrypoint="true", entrypoint_num_gpus=0.5), "entrypoint_num_gpus")
    expect(answer_has=["entrypoint_num_gpus"])
    client.submit_job(
        entrypoint="true", submission_id="asks", entrypoint_memory=1024, entrypoint_num_cpus=0.5
    )
    assert until_ended(client, "asks").status == JobStatus.SUCCEEDED
    expect(once="asks SUCCEEDED", answer_has=['"status":"SUCCEEDED"'])
    client.submit_job(entrypoint="true", submission_id="waits", entrypoint_resources={"unicorn": 1})
    while "unicorn" not in client.get_job_info("waits").message:
        if RECORDED:
            RECORDED.pop()
        time.sleep(0.05)
    assert client.get_job_status("waits") == JobStatus.PENDING
    assert client.stop_job("waits")
    assert until_ended(client, "waits").status == JobStatus.STOPPED


def use_command(url):
    def ray(*args):
        environment = dict(os.environ, RAY_API_SERVER_ADDRESS=url)
        command = [os.path.join(os.path.dirname(sys.executable), "ray"), "job", *args]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    started = time.monotonic()
    code, text = ray("submit", "--submission-id", "cli", "--", "echo", "from the command")
    print(f"ray job submit -- echo: {time.monotonic() - started:.2f} s")
    assert code == 0 and "from the command" in text and "succeeded" in text, text
    code, text = ray("submit", "--", "sh", "-c", "exit 3")
    assert code == 1 and "exit code 3" in text, text
    code, text = ray("submit", "--no-wait", "--submission-id", "cli-long", "--", "sleep", "100")
    assert code == 0, text
    for args, expected in [
        (["list"], "cli-long"),
        (["status", "cli-long"], "RUNNING"),
        (["stop", "cli-long"], "was stopped"),
        (["logs", "cli"], "from the command"),
        (["delete", "cli"], "deleted successfully"),
    ]:
        code, text = ray(*args)
        assert code == 0 and expected in text, (args, text)


def main():
    url = sys.argv[1]
    if "--record" not in sys.argv:
        use_client(url)
        use_command(url)
        print("Ray's client and command work")
        return
    use_client(record(url))
    for entry in RECORDED:
        entry.setdefault("answer_has", [])
    with open(sys.argv[sys.argv.index("--record") + 1], "w") as out:
        json.dump(RECORDED, out, indent=1)
        out.write("\n")


main()
