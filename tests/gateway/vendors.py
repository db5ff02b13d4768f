"""Vendors as their documents describe them: handlers for `FaultyUpstream` that answer in their own shapes.

Each answers "It rains in Bonn." or, where tools are sent, calls the first of them with {"city": "Bonn"}.
Written from the vendors' API references; ``piece`` cuts a stream into pieces of that many bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from faulty_upstream import SSE_HEAD, Handler, Served, chunk, http

WORDS = ("It rains ", "in Bonn.")
GIVEN = ('{"city":', ' "Bonn"}')
ANTHROPIC_USAGE = {
    "input_tokens": 10,
    "cache_creation_input_tokens": 5,
    "cache_read_input_tokens": 30,
    "output_tokens": 7,
    "output_tokens_details": {"thinking_tokens": 2},
    "service_tier": "standard",
}
GEMINI_USAGE = {
    "promptTokenCount": 45,
    "cachedContentTokenCount": 30,
    "candidatesTokenCount": 5,
    "thoughtsTokenCount": 2,
    "totalTokenCount": 52,
    "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 45}],
}


def sse(events: Iterable[Any], *, named: bool = False, done: bool = False) -> bytes:
    """Events as vendors write them: Anthropic's and Responses' are named, chat completions end in [DONE]."""
    out = b""
    for event in events:
        name = f"event: {event['type']}\n" if named else ""
        out += f"{name}data: {json.dumps(event)}\n\n".encode()
    return out + (b"data: [DONE]\n\n" if done else b"")


async def send_stream(served: Served, raw: bytes, piece: int = 0) -> None:
    size = piece or len(raw)
    pieces = b"".join(chunk(raw[at : at + size]) for at in range(0, len(raw), size))
    await served.send(SSE_HEAD + pieces + b"0\r\n\r\n")


# Anthropic


def anthropic_message(blocks: list[dict[str, Any]], stop: str = "end_turn", **more: Any) -> dict[str, Any]:
    return {
        "id": "msg_01",
        "type": "message",
        "role": "assistant",
        "model": "claude-2026",
        "content": blocks,
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": ANTHROPIC_USAGE,
        **more,
    }


def anthropic_blocks(asked: dict[str, Any]) -> list[dict[str, Any]]:
    thoughts = (
        [{"type": "thinking", "thinking": "hm, rain", "signature": "c2ln"}] if asked.get("thinking") else []
    )
    if asked.get("tools"):
        call = {
            "type": "tool_use",
            "id": "toolu_1",
            "name": asked["tools"][0]["name"],
            "input": {"city": "Bonn"},
        }
        return [*thoughts, {"type": "text", "text": "Let me see."}, call]
    return [*thoughts, {"type": "text", "text": "".join(WORDS)}]


def anthropic_events(blocks: list[dict[str, Any]], stop: str = "end_turn") -> list[dict[str, Any]]:
    begun = ANTHROPIC_USAGE | {"output_tokens": 1}
    message = anthropic_message([], usage=begun) | {"stop_reason": None}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": message}, {"type": "ping"}]
    for index, block in enumerate(blocks):
        empty, deltas = _anthropic_deltas(block)
        events.append({"type": "content_block_start", "index": index, "content_block": empty})
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events.append({"type": "content_block_stop", "index": index})
    delta = {"stop_reason": stop, "stop_sequence": None}
    counted = {"output_tokens": 7, "output_tokens_details": {"thinking_tokens": 2}}
    return [*events, {"type": "message_delta", "delta": delta, "usage": counted}, {"type": "message_stop"}]


def _anthropic_deltas(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if block["type"] == "tool_use":
        return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": p} for p in ("", *GIVEN)]
    if block["type"] == "thinking":
        half = len(block["thinking"]) // 2
        texts = [block["thinking"][:half], block["thinking"][half:]]
        deltas = [{"type": "thinking_delta", "thinking": text} for text in texts]
        signature = {"type": "signature_delta", "signature": block["signature"]}
        return {"type": "thinking", "thinking": "", "signature": ""}, [*deltas, signature]
    half = len(block["text"]) // 2
    texts = [block["text"][:half], block["text"][half:]]
    return {"type": "text", "text": ""}, [{"type": "text_delta", "text": text} for text in texts]


def anthropic(piece: int = 0) -> Handler:
    async def handler(served: Served) -> None:
        if served.line.split()[1].endswith("/count_tokens"):
            await served.send(http(200, b'{"input_tokens": 2095}'))
            return
        asked = served.json
        blocks = anthropic_blocks(asked)
        stop = "tool_use" if asked.get("tools") else "end_turn"
        if asked.get("stream"):
            await send_stream(served, sse(anthropic_events(blocks, stop), named=True), piece)
        else:
            body = json.dumps(anthropic_message(blocks, stop)).encode()
            await served.send(http(200, body, headers={"request-id": "req_1"}))

    return handler


def anthropic_error(status: int, kind: str, message: str, **headers: str) -> Handler:
    body = json.dumps({"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"})

    async def handler(served: Served) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        await served.send(http(status, body.encode(), headers=named))

    return handler


# Gemini


def gemini_answer(parts: list[dict[str, Any]], finish: str = "STOP", **more: Any) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"}, "index": 0}
    if finish:
        candidate["finishReason"] = finish
    return {
        "candidates": [candidate],
        "usageMetadata": GEMINI_USAGE,
        "modelVersion": "gemini-2026",
        "responseId": "r-1",
        **more,
    }


def gemini_parts(asked: dict[str, Any]) -> list[dict[str, Any]]:
    if asked.get("tools"):
        name = asked["tools"][0]["functionDeclarations"][0]["name"]
        return [{"functionCall": {"name": name, "args": {"city": "Bonn"}}, "thoughtSignature": "c2ln"}]
    return [{"text": word} for word in WORDS]


def gemini_pieces(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    early = {"promptTokenCount": 45, "totalTokenCount": 45}
    pieces = [gemini_answer([part], "", usageMetadata=early) for part in parts]
    pieces[-1] = gemini_answer([parts[-1]])
    return pieces


def gemini_vector(text: str) -> list[float]:
    """Told apart by their texts, and not all of them a float32."""
    return [float(len(text)), 0.1, -1.5]


def gemini(piece: int = 0) -> Handler:
    async def handler(served: Served) -> None:
        if ":batchEmbedContents" in served.line:
            texts = [one["content"]["parts"][0]["text"] for one in served.json["requests"]]
            body = {"embeddings": [{"values": gemini_vector(text)} for text in texts]}
            counted = {"usageMetadata": {"promptTokenCount": 4}} if len(texts) > 1 else {}
            await served.send(http(200, json.dumps(body | counted).encode()))
            return
        if ":countTokens" in served.line:
            await served.send(http(200, b'{"totalTokens": 31}'))
            return
        parts = gemini_parts(served.json)
        if "streamGenerateContent?alt=sse" in served.line:
            await send_stream(served, sse(gemini_pieces(parts)).replace(b"\n", b"\r\n"), piece)
        else:
            await served.send(http(200, json.dumps(gemini_answer(parts)).encode()))

    return handler


def gemini_error(status: int, word: str, message: str, delay: str = "") -> Handler:
    retry = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}
    details = {"details": [retry]} if delay else {}
    body = json.dumps({"error": {"code": status, "message": message, "status": word, **details}})

    async def handler(served: Served) -> None:
        await served.send(http(status, body.encode()))

    return handler


# OpenAI


OPENAI_USAGE = {
    "prompt_tokens": 45,
    "completion_tokens": 7,
    "total_tokens": 52,
    "prompt_tokens_details": {"cached_tokens": 30},
    "completion_tokens_details": {"reasoning_tokens": 2},
}


def openai_message(asked: dict[str, Any]) -> dict[str, Any]:
    if asked.get("tools"):
        function = {"name": asked["tools"][0]["function"]["name"], "arguments": "".join(GIVEN)}
        calls = [{"id": "call_1", "type": "function", "function": function}]
        return {"role": "assistant", "content": None, "tool_calls": calls}
    return {"role": "assistant", "content": "".join(WORDS)}


def openai_chunks(asked: dict[str, Any]) -> list[dict[str, Any]]:
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-2026"}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    if asked.get("tools"):
        named = {"name": asked["tools"][0]["function"]["name"], "arguments": ""}
        deltas.append({"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": named}]})
        deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in GIVEN]
    else:
        deltas += [{"content": word} for word in WORDS]
    finish = "tool_calls" if asked.get("tools") else "stop"
    chunks = [{**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if (asked.get("stream_options") or {}).get("include_usage"):
        chunks.append({**base, "choices": [], "usage": OPENAI_USAGE})
    return chunks


def openai(piece: int = 0) -> Handler:
    async def handler(served: Served) -> None:
        asked = served.json
        if asked.get("stream"):
            await send_stream(served, sse(openai_chunks(asked), done=True), piece)
            return
        choice = {
            "index": 0,
            "message": openai_message(asked),
            "finish_reason": "tool_calls" if asked.get("tools") else "stop",
        }
        body = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "gpt-2026",
            "choices": [choice],
            "usage": OPENAI_USAGE,
        }
        await served.send(http(200, json.dumps(body).encode()))

    return handler


def response_object(status: str = "completed") -> dict[str, Any]:
    text = {"type": "output_text", "text": "".join(WORDS), "annotations": [], "logprobs": []}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [text]}
    usage = {
        "input_tokens": 45,
        "input_tokens_details": {"cached_tokens": 30},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 52,
    }
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "model": "gpt-2026",
        "output": [item],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": True,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "usage": usage,
        "metadata": {},
    }


def response_events() -> list[dict[str, Any]]:
    whole = response_object()
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    item = whole["output"][0]
    at = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}},
        *({"type": "response.output_text.delta", **at, "delta": word, "logprobs": []} for word in WORDS),
        {"type": "response.output_text.done", **at, "text": "".join(WORDS), "logprobs": []},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": whole},
    ]
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def openai_responses(piece: int = 0) -> Handler:
    async def handler(served: Served) -> None:
        if served.json.get("stream"):
            await send_stream(served, sse(response_events(), named=True), piece)
        else:
            await served.send(http(200, json.dumps(response_object()).encode()))

    return handler
