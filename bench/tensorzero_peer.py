"""TensorZero embedded in a process, not recording: CPU-microseconds for each call. Run by gateway.py.

It runs with the Python of an environment that holds the package; arguments: the upstream's port, the kind of
call (json, stream or paced), how many. It ignores everything but the CPU of this process.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tensorzero import AsyncTensorZeroGateway

CONFIG = """
[models.a-model]
routing = ["local"]
[models.a-model.providers.local]
type = "openai"
model_name = "a-model"
api_base = "http://127.0.0.1:{port}/v1/"
api_key_location = "env::BENCH_KEY"
[functions.ask]
type = "chat"
[functions.ask.variants.only]
type = "chat_completion"
model = "a-model"
[gateway]
observability.enabled = false
"""
IN_FLIGHT = {"json": 16, "stream": 16, "paced": 64}


async def call(gateway: Any, kind: str) -> None:
    text = "What is the capital of France, and why?\n" * 20
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    asked: dict[str, Any] = {"messages": messages, "system": "You answer briefly. " * 20}
    # the fake upstream paces what says so anywhere in its request
    if kind == "paced":
        asked["messages"].append({"role": "user", "content": [{"type": "text", "text": "paced"}]})
    answer = await gateway.inference(function_name="ask", input=asked, stream=kind != "json", dryrun=True)
    if kind != "json":
        async for _ in answer:
            pass


async def run(gateway: Any, kind: str, count: int) -> None:
    async def some(number: int) -> None:
        for _ in range(number):
            await call(gateway, kind)

    await asyncio.gather(*(some(count // IN_FLIGHT[kind]) for _ in range(IN_FLIGHT[kind])))


async def main() -> None:
    port, kind, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.environ.setdefault("BENCH_KEY", "sk-bench")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensorzero.toml"
        path.write_text(CONFIG.format(port=port))
        gateway = await AsyncTensorZeroGateway.build_embedded(config_file=str(path), async_setup=True)
        await run(gateway, kind, count // 5)
        before = time.process_time()
        await run(gateway, kind, count)
        print((time.process_time() - before) / (count // IN_FLIGHT[kind] * IN_FLIGHT[kind]) * 1e6)


if __name__ == "__main__":
    asyncio.run(main())
