"""Serving through the client, on a cluster without a model. HELIO names the binary; `scripts/test` runs this."""

from __future__ import annotations

import json
import unittest
import urllib.request

from rig import ROOT, folder, free_port, heliostat, up


def app(**engine: object) -> "dict[str, object]":
    loading = {"model_id": "m", "model_source": str(ROOT / "models" / "sundial-20m")}
    kwargs = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256, **engine}
    return {
        "name": "chat",
        "route_prefix": "/chat",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [{"model_loading_config": loading, "engine_kwargs": kwargs}]},
    }


class ServeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        dashboard, cls.http = free_port(), free_port()
        up(cls, folder(cls), cls.http, dashboard)
        cls.cluster = heliostat.connect(f"http://127.0.0.1:{dashboard}")
        cls.addClassCleanup(cls.cluster.close)

    def test_a_document_is_served_and_taken_back(self) -> None:
        self.assertEqual(self.cluster.serve_status(), {})
        served = self.cluster.deploy({"applications": [app()]}, timeout=120)
        chat = served["chat"]
        self.assertEqual((chat.status, chat.route_prefix), ("RUNNING", "/chat"))
        (deployment,) = chat.deployments.values()
        self.assertEqual((deployment.name, deployment.status), ("LLMServer:m", "HEALTHY"))
        self.assertEqual([replica.state for replica in deployment.replicas], ["RUNNING"])
        body = json.dumps({"model": "m", "prompt": "The Vec type", "max_tokens": 4}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http}/chat/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            self.assertEqual(json.load(answer)["usage"]["completion_tokens"], 4)
        # What is refused changes nothing.
        with self.assertRaisesRegex(heliostat.RequestRefused, "tensor_parallel_size: 2 is not supported"):
            self.cluster.deploy({"applications": [app(tensor_parallel_size=2)]})
        self.assertEqual(self.cluster.serve_status()["chat"].status, "RUNNING")
        self.cluster.serve_shutdown()
        self.assertEqual(self.cluster.serve_status(), {})

    def test_what_does_not_run_says_why(self) -> None:
        # A cache that holds no sequence cannot be: its ranks are not created.
        with self.assertRaisesRegex(heliostat.DeployFailed, "'chat' was not deployed") as failed:
            self.cluster.deploy({"applications": [app(kv_cache_memory_bytes=1)]}, timeout=120)
        self.assertEqual(failed.exception.application.status, "DEPLOY_FAILED")
        with self.assertRaisesRegex(heliostat.HeliostatError, "yaml.safe_load"):
            self.cluster.deploy({})
        self.cluster.deploy({"applications": []})


if __name__ == "__main__":
    unittest.main()
