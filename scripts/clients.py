"""Drives a server of the bundled model with the clients of others: openai, lm_eval and, with --load, guidellm.

Usage: clients.py URL MODEL_DIR [--load]. Run by scripts/test_clients.
"""

import asyncio
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import urllib.request

import openai

URL, MODEL_DIR = sys.argv[1], pathlib.Path(sys.argv[2])
MODEL = "sundial-20m"
BIN = pathlib.Path(sys.executable).parent
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def client(**options):
    return openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, **options)


def refused(call, status, param=None):
    """The error of a call that must fail so."""
    try:
        call()
    except openai.APIStatusError as error:
        assert error.status_code == status, error
        assert param is None or error.param == param, (error.param, error)
        return error
    raise AssertionError("it was not refused")


@check
def models_are_listed():
    assert [model.id for model in client().models.list()] == [MODEL]
    assert client().models.retrieve(MODEL).id == MODEL
    refused(lambda: client().models.retrieve("other"), 404)


@check
def completions_of_texts_tokens_and_batches():
    api = client()
    ask = lambda prompt, **more: api.completions.create(model=MODEL, prompt=prompt, max_tokens=5, temperature=0, **more)
    question = json.dumps({"prompt": "The Vec type"}).encode()
    request = urllib.request.Request(f"{URL}/tokenize", question, {"content-type": "application/json"})
    tokens = json.load(urllib.request.urlopen(request))["tokens"]
    text = ask("The Vec type").choices[0].text
    assert ask(tokens).choices[0].text == text
    batch = ask(["The Vec type", "fn main() {"], n=2)
    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3]
    assert batch.choices[0].text == batch.choices[1].text == text
    assert ask([tokens, tokens]).choices[1].text == text
    assert batch.usage.completion_tokens == 20
    assert len(ask("The", best_of=3, n=2).choices) == 2


@check
def echoed_log_probabilities():
    echoed = client().completions.create(model=MODEL, prompt="The Vec type", max_tokens=0, echo=True, logprobs=1)
    choice = echoed.choices[0]
    assert choice.text == "The Vec type", choice.text
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert "".join(choice.logprobs.tokens).endswith("The Vec type")


@check
def vllm_fields():
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 3, "ignore_eos": True,
             "stop_token_ids": [7], "prompt_logprobs": 1, "priority": -3}  # fmt: skip
    answer = client().completions.create(model=MODEL, prompt="The", max_tokens=6, seed=5, extra_body=extra)
    assert answer.choices[0].prompt_logprobs[0] is None
    again = client().completions.create(model=MODEL, prompt="The", max_tokens=6, seed=5, extra_body=extra)
    assert again.choices[0].text == answer.choices[0].text


@check
def chat_streams_with_usage():
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is a Vec?"}]
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2}
    chunks = list(client().chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=8, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens <= 8 and not chunks[-1].choices
    whole = client().chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=8, temperature=0)
    options = {"include_usage": True, "continuous_usage_stats": True}
    counted = list(
        client().chat.completions.create(
            model=MODEL, messages=messages, max_tokens=8, temperature=0, stream=True, stream_options=options
        )
    )
    assert all(chunk.usage for chunk in counted)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in counted if chunk.choices)
    assert text == whole.choices[0].message.content


@check
def tools_and_structured_output():
    schema = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"], "additionalProperties": False}
    function = {"name": "weather", "parameters": schema}
    ask = client().chat.completions.create
    messages = [{"role": "user", "content": "How is the weather in Rome?"}]
    named = {"type": "function", "function": {"name": "weather"}}
    called = ask(model=MODEL, messages=messages, tools=[{"type": "function", "function": function}], tool_choice=named, max_tokens=64)
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)["city"] in ("Oslo", "Rome")
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    structured = ask(model=MODEL, messages=messages, response_format=wanted, max_tokens=64)
    assert json.loads(structured.choices[0].message.content)["city"] in ("Oslo", "Rome")


@check
def responses_and_what_is_refused():
    api = client()
    assert api.responses.create(model=MODEL, input="Hi", max_output_tokens=4).output_text
    with api.responses.stream(model=MODEL, input="Hi", max_output_tokens=4) as stream:
        assert any(event.type == "response.output_text.delta" for event in stream)
    assert "embeddings" in str(refused(lambda: api.embeddings.create(model=MODEL, input="x"), 400))
    refused(lambda: api.completions.create(model=MODEL, prompt="x", suffix="y"), 400, "suffix")
    refused(lambda: api.completions.create(model=MODEL, prompt="x", max_tokens=10**6), 400, "max_tokens")
    refused(lambda: api.completions.create(model=MODEL, prompt="long " * 2_000_000), 413)


@check
def request_ids_and_ranks():
    options = {"x-request-id": "mine", "X-data-parallel-rank": "1"}
    answer = client().completions.with_raw_response.create(model=MODEL, prompt="The", max_tokens=1, extra_headers=options)
    assert answer.headers["x-request-id"] == "mine" and answer.parse().id == "cmpl-mine"
    pinned = lambda: client().completions.create(model=MODEL, prompt="x", extra_headers={"X-data-parallel-rank": "9"})
    refused(pinned, 400, "X-data-parallel-rank")


@check
def many_at_once_and_some_that_go_away():
    async def run():
        api = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)

        async def one(number):
            stream = await api.completions.create(model=MODEL, prompt="The", max_tokens=24, stream=True, extra_body={"ignore_eos": True})
            count = 0
            async for chunk in stream:
                count += bool(chunk.choices[0].text)
                if number % 4 == 0 and count == 3:
                    await stream.close()
                    return 0
            return 1

        return sum(await asyncio.gather(*(one(number) for number in range(64))))

    assert asyncio.run(run()) == 48


TASKS = {
    "choice": {"output_type": "multiple_choice", "doc_to_text": "{{begin}}", "doc_to_choice": "{{choices}}",
               "doc_to_target": 0, "target_delimiter": "", "metric_list": [{"metric": "acc"}]},
    "perplexity": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                   "metric_list": [{"metric": "byte_perplexity"}]},
    "generate": {"output_type": "generate_until", "doc_to_text": "{{begin}}", "doc_to_target": "{{rest}}",
                 "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24, "temperature": 0},
                 "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


@check
def lm_eval_local_completions():
    """Held-out passages: their true continuation must be likelier than another's, and their perplexity low."""
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        domains = json.loads((MODEL_DIR / "prompts.json").read_text())
        texts = [page["text"] for pages in domains.values() for page in pages[:4]]
        rows = [
            {"text": text[:300], "begin": text[:80], "rest": text[80:110], "choices": [text[80:110], other[150:180]]}
            for text, other in zip(texts, texts[5:] + texts[:5])
        ]
        (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for name, task in TASKS.items():
            task |= {"task": f"helio_{name}", "dataset_path": "json", "test_split": "test"}
            task["dataset_kwargs"] = {"data_files": {"test": str(directory / "rows.jsonl")}}
            # JSON is YAML.
            (directory / f"{name}.yaml").write_text(json.dumps(task))
        model = f"model={MODEL},base_url={URL}/v1/completions,tokenizer_backend=remote,num_concurrent=4"
        command = [BIN / "lm_eval", "run", "--model", "local-completions", "--model_args", model, "--tasks"]
        command += [",".join(f"helio_{name}" for name in TASKS), "--include_path", directory, "--output_path", directory]
        run(command)
        results = json.loads(next(directory.glob("**/results_*.json")).read_text())["results"]
    accuracy = results["helio_choice"]["acc,none"]
    perplexity = results["helio_perplexity"]["byte_perplexity,none"]
    print(f"    lm_eval: accuracy {accuracy:.2f}, perplexity of a byte {perplexity:.2f}")
    assert accuracy >= 0.75 and math.isfinite(perplexity) and perplexity < 8


def load():
    """guidellm: prompts of 64 tokens, answers of 24, 8 at a time."""
    with tempfile.TemporaryDirectory() as directory:
        report = pathlib.Path(directory) / "report.json"
        run([
            BIN / "guidellm", "run", "--backend", f"kind=openai_http,target={URL},model={MODEL}",
            "--profile", "kind=concurrent,streams=8", "--constraint", "kind=max_requests,count=64",
            "--tokenizer", f"kind=hf_auto,model={MODEL_DIR}", "--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=24",
            "--output", f"kind=json,path={report}", "--disable-console",
        ])  # fmt: skip
        text = report.read_text()
    totals = json.loads(text)["benchmarks"][0]["metrics"]["request_totals"]
    print(f"    guidellm: {totals}")
    assert totals["successful"] == 64 and totals["errored"] == 0


def run(command):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        raise SystemExit(f"{command[0]} failed:\n{ended.stdout[-4000:]}\n{ended.stderr[-4000:]}")


def main():
    for function in CHECKS + ([load] if "--load" in sys.argv else []):
        function()
        print(f"ok  {function.__name__.replace('_', ' ')}", flush=True)


if __name__ == "__main__":
    main()
