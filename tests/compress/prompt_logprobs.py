"""What vLLM's server does with `prompt_logprobs`, a tiny model behind it."""

from __future__ import annotations

from typing import Any

import torch
from aiohttp import web


class Vllm:
    """What vLLM answers to token ids: null for the first, then the likeliest and the one that is there."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.asked: list[dict[str, Any]] = []
        self.told: Any = "as vLLM"

    async def respond(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.asked.append(asked)
        tokens = asked["prompt"]
        choice = {"index": 0, "text": "yes", "logprobs": None, "finish_reason": "length"}
        if self.told == "as vLLM":
            choice["prompt_logprobs"] = self.places(tokens, asked["prompt_logprobs"])
        elif self.told is not None:
            choice["prompt_logprobs"] = self.told
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 1, "total_tokens": len(tokens) + 1}
        return web.json_response({"object": "text_completion", "choices": [choice], "usage": usage})

    @torch.no_grad()
    def log_p(self, tokens: list[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)

    def places(self, tokens: list[int], count: int) -> list[Any]:
        found: list[Any] = [None]
        for place, row in enumerate(self.log_p(tokens)[:-1]):
            order = row.argsort(descending=True).tolist()
            named = dict.fromkeys([tokens[place + 1], *order[:count]])
            found.append(
                {
                    str(token): {
                        "logprob": float(row[token]),
                        "rank": order.index(token) + 1,
                        "decoded_token": self.tokenizer.decode([token]),
                    }
                    for token in named
                }
            )
        return found
