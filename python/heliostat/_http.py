"""One dashboard over HTTP: connections that are kept, a key, and errors as exceptions. Knows no route."""

from __future__ import annotations

import http.client
import json
import select
import ssl
import threading
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence, Tuple, Type, Union
from urllib.parse import quote, urlencode, urlsplit

from ._errors import HeliostatError, JobNotFound, NoAnswer, RequestRefused

Parameters = Sequence[Tuple[str, str]]
Body = Union[bytes, "Iterator[bytes]", None]

# Connections that are kept while nobody uses them.
_IDLE_MAX = 8


def path(*parts: str) -> str:
    """A path of which no part can leave its place."""
    return "/" + "/".join(quote(part, safe="") for part in parts)


class Http:
    """A dashboard. May be used by several threads."""

    def __init__(self, url: str, api_key: Optional[str], ca_file: Optional[str], timeout_s: float) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise HeliostatError(f"{url!r} is no URL of a dashboard: write http://HOST:PORT")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.timeout_s = timeout_s
        self._host, self._port = parts.hostname, parts.port
        self._tls = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else None
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._idle: "list[http.client.HTTPConnection]" = []
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def json(
        self,
        method: str,
        where: str,
        body: Any = None,
        *,
        parameters: Parameters = (),
        timeout_s: Optional[float] = None,
        refusal: Optional[Callable[[int, str], Exception]] = None,
    ) -> Any:
        """What the dashboard answers. `refusal` makes the exception of an answer that is none."""
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        headers = {} if content is None else {"Content-Type": "application/json"}
        connection, response = self.send(method, where, content, headers, parameters, timeout_s)
        text = self._read(connection, response)
        if response.status >= 300:
            raise (refusal or refused)(response.status, text)
        return json.loads(text) if text else None

    def put(self, where: str, body: Body, length: int) -> None:
        """Sends what is too large for memory."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(length)}
        connection, response = self.send("PUT", where, body, headers)
        text = self._read(connection, response)
        if response.status >= 300:
            raise refused(response.status, text)

    def exists(self, where: str) -> bool:
        """Whether there is something."""
        connection, response = self.send("GET", where)
        text = self._read(connection, response)
        if response.status in (200, 404):
            return response.status == 200
        raise refused(response.status, text)

    def stream(self, where: str, parameters: Parameters, timeout_s: Optional[float]) -> Iterator[bytes]:
        """An answer, part by part as it comes."""
        connection, response = self.send("GET", where, parameters=parameters, timeout_s=timeout_s)
        if response.status >= 300:
            raise refused(response.status, self._read(connection, response))
        try:
            while True:
                try:
                    part = response.read1(65536)
                except (OSError, http.client.HTTPException) as why:
                    raise self._lost(why) from why
                if not part:
                    return
                yield part
        finally:
            connection.close()

    def send(
        self,
        method: str,
        where: str,
        body: Body = None,
        headers: Optional[Mapping[str, str]] = None,
        parameters: Parameters = (),
        timeout_s: Optional[float] = None,
    ) -> Tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Sends a request once, and returns the connection and the head of the answer."""
        target = where + ("?" + urlencode(parameters) if parameters else "")
        connection = self._take(self.timeout_s if timeout_s is None else timeout_s)
        try:
            connection.request(method, target, body=body, headers={**self._headers, **(headers or {})})
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException) as why:
            connection.close()
            raise self._lost(why) from why

    def _take(self, timeout_s: float) -> http.client.HTTPConnection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                break
            # Whoever closed an idle connection is seen before anything is sent: no request is ever sent twice.
            if connection.sock is not None and not select.select([connection.sock], [], [], 0)[0]:
                connection.sock.settimeout(timeout_s)
                return connection
            connection.close()
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        return http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=self._tls)

    def _read(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> str:
        try:
            text = response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as why:
            connection.close()
            raise self._lost(why) from why
        with self._lock:
            keep = not response.will_close and len(self._idle) < _IDLE_MAX
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()
        return text

    def _lost(self, why: Exception) -> NoAnswer:
        fix = "start a cluster with `helio up`, or name its dashboard: connect(\"http://HOST:PORT\")"
        if isinstance(why, ConnectionRefusedError):
            return NoAnswer(f"no dashboard answers at {self.url}: {why}; {fix}")
        return NoAnswer(f"no answer from {self.url}: {why or type(why).__name__}")


def refused(status: int, text: str, kind: Type[RequestRefused] = RequestRefused) -> RequestRefused:
    """The exception of an answer that says no, with its words."""
    return kind(words(text) or f"HTTP status {status}", status)


def job_refused(status: int, text: str) -> RequestRefused:
    """The same for a request about one job."""
    return refused(status, text, JobNotFound if status == 404 else RequestRefused)


def words(text: str) -> str:
    """What an answer says in words: its `msg`, its `error.message`, or all of it."""
    try:
        value = json.loads(text)
    except ValueError:
        return text.strip()
    if isinstance(value, dict):
        error = value.get("error")
        said = error.get("message") if isinstance(error, dict) else value.get("msg")
        if isinstance(said, str):
            return said
    return text.strip()
