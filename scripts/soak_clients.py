"""The clients of a soak. Each kind makes one request and says how it ended.

Answers are greedy, and Heliostat promises the same tokens whatever happens meanwhile: so each must equal the reference.
"""

import asyncio
import collections
import json
import pathlib
import socket

import aiohttp

# CUT: the connection was one of a server that was killed, which is all that a client may lose.
COMPLETE, REFUSED, ABORTED, CUT, LOST = ENDS = ("complete", "refused", "aborted", "cut", "LOST")
Outcome = collections.namedtuple("Outcome", "end why", defaults=("",))
PATIENCE_S = 120.0
# Paths and models of the applications: the one of cluster.toml, and the one that is redeployed.
APPS = {"": "sundial-20m", "/chat": "chat"}
BUSY = (429, 503)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": ""},
}
KINDS = {}


def kind(function):
    KINDS[function.__name__.rstrip("_")] = function
    return function


def lost(why):
    return Outcome(LOST, why)


def session():
    # As many connections as there are clients are kept; each answer's end is waited for by the caller.
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), read_bufsize=1 << 14)


def prompts(model):
    pages = json.loads((pathlib.Path(model) / "prompts.json").read_text())
    return [page["text"][:300] for domain in pages.values() for page in domain[:4]]


def bodies(model):
    """The menu: name -> (path, body without the model)."""
    menu = {}
    for i, prompt in enumerate(prompts(model)):
        tokens = (16, 48, 96)[i % 3]
        plain = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
        menu[f"completion-{i}"] = ("/v1/completions", plain)
        menu[f"several-{i}"] = ("/v1/completions", plain | {"n": 3, "max_tokens": 12, "logprobs": 2})
        menu[f"long-{i}"] = ("/v1/completions", plain | {"max_tokens": 300, "ignore_eos": True})
        chat = {"messages": [{"role": "user", "content": prompt[:80]}], "max_tokens": 32, "temperature": 0}
        menu[f"chat-{i}"] = ("/v1/chat/completions", chat)
        form = {"type": "json_schema", "json_schema": {"name": "form", "schema": SCHEMA}}
        menu[f"json-{i}"] = ("/v1/chat/completions", chat | {"response_format": form, "max_tokens": 64})
        menu[f"responses-{i}"] = ("/v1/responses", {"input": prompt[:80], "max_output_tokens": 16, "temperature": 0})
        menu[f"tokenize-{i}"] = ("/tokenize", {"prompt": prompt})
    return menu


def essence(answer):
    """What must be equal: no ids, times or counts of cached tokens."""
    if "tokens" in answer:
        return answer["tokens"]
    if "output" in answer:
        return [[part["text"] for part in item["content"]] for item in answer["output"]]
    return [
        [choice.get("text", choice.get("message", {}).get("content")), choice["finish_reason"], choice.get("logprobs")]
        for choice in answer["choices"]
    ]


async def references(cluster):
    """The answers while nothing else happens. Both applications must agree."""
    menu = {}
    async with session() as own:
        for name, (path, body) in bodies(cluster.model).items():
            answers = []
            for prefix, model in APPS.items():
                async with own.post(cluster.url + prefix + path, json=body | {"model": model}) as answer:
                    got = await answer.json()
                    assert answer.status == 200, (name, got)
                    answers.append(essence(got))
            assert answers[0] == answers[1], (name, answers)
            menu[name] = (path, body, answers[0])
    return menu


def order(menu, chance, family):
    """One dish of a family, for one of the applications: address, body, reference."""
    path, body, reference = menu[chance.choice([name for name in menu if name.startswith(f"{family}-")])]
    prefix = chance.choice(list(APPS))
    return prefix + path, body | {"model": APPS[prefix]}, reference


async def refusal(answer):
    """The outcome of an answer that is not 200 to a request that is right."""
    said = await answer.text()
    if answer.status in BUSY and message(said):
        return Outcome(REFUSED, said)
    return lost(f"status {answer.status}: {said[:300]}")


def message(said):
    """The message of an error in OpenAI's form; none where it has another."""
    try:
        return json.loads(said)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return None


async def whole(own, cluster, menu, chance, family):
    """A request whose answer comes in one piece."""
    path, body, reference = order(menu, chance, family)
    async with own.post(cluster.url + path, json=body) as answer:
        if answer.status != 200:
            return await refusal(answer)
        got = essence(await answer.json())
    return Outcome(COMPLETE) if got == reference else lost(f"{path} {body}: {got} instead of {reference}")


@kind
async def several(own, cluster, menu, chance):
    return await whole(own, cluster, menu, chance, "several")


@kind
async def json_(own, cluster, menu, chance):
    return await whole(own, cluster, menu, chance, "json")


@kind
async def responses(own, cluster, menu, chance):
    return await whole(own, cluster, menu, chance, "responses")


@kind
async def tokenize(own, cluster, menu, chance):
    path, body, reference = order(menu, chance, "tokenize")
    async with own.post(cluster.url + path, json=body) as answer:
        if answer.status != 200:
            return await refusal(answer)
        tokens = (await answer.json())["tokens"]
    back = path.replace("tokenize", "detokenize")
    async with own.post(cluster.url + back, json={"model": body["model"], "tokens": tokens}) as answer:
        if answer.status != 200:
            return await refusal(answer)
        text = (await answer.json())["prompt"]
    right = tokens == reference and text.endswith(body["prompt"])
    return Outcome(COMPLETE) if right else lost(f"{path}: {tokens} {text!r}")


async def events(answer):
    """The events of a stream as it sends them; ends with None after `[DONE]`."""
    async for line in answer.content:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            if data == b"[DONE]":
                yield None
                return
            yield json.loads(data)


async def streamed(own, cluster, dish, pause=0.0, leave_after=None):
    """A streamed request; `leave_after` so many events its client goes."""
    path, body, reference = dish
    text, finish, logprobs = "", None, None
    async with own.post(cluster.url + path, json=body | {"stream": True}) as answer:
        if answer.status != 200:
            return await refusal(answer)
        seen = 0
        async for event in events(answer):
            if event is None:
                break
            if "error" in event:
                return lost(f"{path}: the stream ended with {event['error']}")
            for choice in event["choices"]:
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                finish = choice["finish_reason"] or finish
            seen += 1
            if seen == leave_after:
                answer.close()
                return Outcome(ABORTED)
            if pause:
                await asyncio.sleep(pause)
        else:
            return lost(f"{path}: the stream ended without [DONE] after {seen} events")
    got = [text, finish, logprobs]
    return Outcome(COMPLETE) if [got] == reference else lost(f"{path} {body}: {got} instead of {reference}")


@kind
async def stream(own, cluster, menu, chance):
    return await streamed(own, cluster, order(menu, chance, chance.choice(["completion", "chat", "long"])))


@kind
async def abort(own, cluster, menu, chance):
    return await streamed(own, cluster, order(menu, chance, "long"), leave_after=chance.randint(1, 40))


@kind
async def slow(own, cluster, menu, chance):
    """A reader that takes little at a time, over a connection that holds little."""

    def small(info):
        connection = socket.socket(info[0], info[1], info[2])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        return connection

    connector = aiohttp.TCPConnector(socket_factory=small)
    async with aiohttp.ClientSession(connector=connector, timeout=own.timeout, read_bufsize=512) as mine:
        return await streamed(mine, cluster, order(menu, chance, "long"), pause=0.03)


@kind
async def unsupported(own, cluster, menu, chance):
    """What these models cannot do is refused by name."""
    prefix = chance.choice(list(APPS))
    path, body = chance.choice(
        [
            ("/v1/embeddings", {"input": "a"}),
            ("/v1/completions", {"prompt": "a", "suffix": "b"}),
            ("/v1/responses", {"input": "a", "previous_response_id": "r"}),
        ]
    )
    async with own.post(cluster.url + prefix + path, json=body | {"model": APPS[prefix]}) as answer:
        said = await answer.text()
    fine = 400 <= answer.status < 500 and message(said) or answer.status in BUSY
    return Outcome(REFUSED) if fine else lost(f"{path}: status {answer.status}: {said[:300]}")


@kind
async def bad(own, cluster, menu, chance):
    """Bodies and heads that are broken: an answer that is right, or a clear refusal, and never a failure of the server."""
    if chance.random() < 0.1:
        return await garbage(cluster, chance)
    path, body, _ = order(menu, chance, chance.choice(["completion", "chat", "json", "responses", "tokenize"]))
    data = broken(body, chance)
    kind_ = chance.choice(["application/json"] * 8 + ["text/plain", "application/x-www-form-urlencoded"])
    async with own.post(cluster.url + path, data=data, headers={"content-type": kind_}) as answer:
        said = await answer.text()
    if answer.status == 200:
        return Outcome(COMPLETE)
    fine = (400 <= answer.status < 500 or answer.status == 503) and message(said)
    return Outcome(REFUSED) if fine else lost(f"{path} {data[:200]!r}: status {answer.status}: {said[:300]}")


async def garbage(cluster, chance):
    """Bytes that are no HTTP: the server answers 4xx or closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.port)
    try:
        writer.write(chance.randbytes(chance.randint(1, 2000)) + b"\r\n\r\n")
        writer.write_eof()
        said = await reader.read(1 << 16)
    except ConnectionError:
        said = b""
    finally:
        writer.close()
    fine = not said or said.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
    return Outcome(REFUSED) if fine else lost(f"garbage was answered by {said[:200]!r}")


ODD = [None, True, -1, 0, 1e308, -0.0, 2**63, "", "x" * 5000, "\u0000", [], {}, [[]], [None], {"a": {}}, [[[[[[1]]]]]], "NaN"]


def broken(body, chance):
    """A body with one to three mistakes."""
    body = json.loads(json.dumps(body))
    for _ in range(chance.randint(1, 3)):
        key = chance.choice([*body, "stop", "logit_bias", "tools", "n", "stream", "seed", "top_p", "response_format"])
        if chance.random() < 0.2:
            body.pop(key, None)
        else:
            body[key] = chance.choice(ODD)
    if body.get("max_tokens") is None and body.get("max_output_tokens") is None:
        body["max_tokens"] = 8  # a mistake must not cost the whole context
    data = bytearray(json.dumps(body).encode())
    for _ in range(chance.choice([0, 0, 0, 1, 5])):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data[: chance.randrange(len(data))] if chance.random() < 0.1 else data)


# Kinds whose requests cost next to nothing.
CHEAP = ("bad", "tokenize", "unsupported")
# Eighteen clients: more than the ranks take at once, so that refusals come, too.
MIX = [
    *(f"stream{i}" for i in range(6)),
    "several0",
    "several1",
    "json0",
    "responses0",
    "tokenize0",
    "abort0",
    "abort1",
    "slow0",
    "slow1",
    "unsupported0",
    "bad0",
    "bad1",
]
