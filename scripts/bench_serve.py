#!/usr/bin/env python3
"""Tokens per second of a running cluster, and of transformers on the same machine, with the bundled model.

    scripts/bench_serve.py load URL [--streams 1 8 64] [--tokens 128]
    scripts/bench_serve.py transformers MODEL_DIR [--streams 1 8 64] [--tokens 128]

Both generate greedily the same number of tokens from the same prompts, end-of-sequence ignored, and print the same
table. `load` needs Python only; `transformers` needs `pip install torch transformers safetensors`.
"""

import argparse
import http.client
import json
import statistics
import threading
import time
import urllib.parse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def prompts(count):
    """Held-out passages of three domains, in turn, cut to about 60 tokens."""
    domains = json.loads((ROOT / "models/sundial-20m/prompts.json").read_text())
    texts = [page["text"][:200] for pages in zip(*domains.values()) for page in pages]
    return [texts[i % len(texts)] + f" {i // len(texts)}" for i in range(count)]


def ask(url, prompt, tokens):
    connection = http.client.HTTPConnection(url.hostname, url.port)
    body = {"model": "sundial-20m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{response.status}: {response.read().decode()}")
    times = []
    for line in response:
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
    connection.close()
    return times[0] - started, [b - a for a, b in zip(times, times[1:])]


def load(args):
    url = urllib.parse.urlparse(args.target)
    ask(url, "warm up", 8)
    print("| streams | tokens/s | TTFT p50 ms | ITL p50 ms | ITL p99 ms |\n|---|---|---|---|---|")
    for streams in args.streams:
        results, threads = [], []
        started = time.perf_counter()
        for prompt in prompts(streams):
            threads.append(threading.Thread(target=lambda p=prompt: results.append(ask(url, p, args.tokens))))
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        seconds = time.perf_counter() - started
        first = statistics.median(ttft for ttft, _ in results) * 1e3
        gaps = sorted(gap for _, gaps in results for gap in gaps)
        p50, p99 = (gaps[int(len(gaps) * q)] * 1e3 for q in (0.5, 0.99))
        rate = streams * args.tokens / seconds
        print(f"| {streams} | {rate:.0f} | {first:.1f} | {p50:.2f} | {p99:.2f} |", flush=True)


def transformers(args):
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer, DeepseekV3ForCausalLM

    from make_reference import dequantize

    directory = Path(args.target)
    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    stored = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            stored.update({name: shard.get_tensor(name) for name in shard.keys()})
    weights = {}
    for name, tensor in stored.items():
        if name.endswith("weight_scale_inv"):
            continue
        scales = stored.get(name + "_scale_inv")
        weights[name] = tensor.float() if scales is None else dequantize(tensor, scales.float())
    model = DeepseekV3ForCausalLM(config).float().eval()
    if hasattr(model, "convert_state_dict"):
        weights = model.convert_state_dict(weights)
    tensors = fuse_experts(weights, dict(model.state_dict()))
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    if missing:
        raise SystemExit(f"weights missing: {missing[:5]}")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.padding_side, tokenizer.pad_token_id = "left", 4
    print(f"transformers, torch {torch.__version__}, {torch.get_num_threads()} threads, fp32")
    print("| streams | tokens/s |\n|---|---|")
    with torch.inference_mode():
        for streams in args.streams:
            batch = tokenizer(prompts(streams), return_tensors="pt", padding=True)
            batch.pop("token_type_ids", None)
            started = time.perf_counter()
            model.generate(**batch, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False)
            rate = streams * args.tokens / (time.perf_counter() - started)
            print(f"| {streams} | {rate:.0f} |", flush=True)


def fuse_experts(weights, wanted):
    """Stacks per-expert matrices where this version of transformers keeps them in one tensor."""
    import torch

    for name, like in wanted.items():
        if name in weights or ".experts." not in name:
            continue
        prefix, kind = name.rsplit(".", 1)
        count = like.shape[0]
        part = lambda expert, which: weights[f"{prefix}.{expert}.{which}_proj.weight"]
        if kind == "gate_up_proj":
            weights[name] = torch.stack([torch.cat([part(e, "gate"), part(e, "up")]) for e in range(count)])
        elif kind == "down_proj":
            weights[name] = torch.stack([part(e, "down") for e in range(count)])
    return {name: weights[name] for name in wanted if name in weights}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "transformers"])
    parser.add_argument("target")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    {"load": load, "transformers": transformers}[args.what](args)


if __name__ == "__main__":
    main()
