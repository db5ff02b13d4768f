"""Chat completions as Gemini's generateContent and back: every mapping written out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from understudy.forms.chat import Left
from understudy.forms.fault import Told, Unmappable, Unreadable, VendorError
from understudy.forms.gemini import Stream, answer, error, path, request
from understudy.protocol import assemble_chunks, usage_of

HELLO: dict[str, Any] = {"model": "gemini-2.5-pro", "messages": [{"role": "user", "content": "hello"}]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}}
CALL = {
    "id": "t1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city":"Bonn"}'},
    "extra_content": {"google": {"thought_signature": "c2ln"}},
}


def test_a_conversation_with_everything() -> None:
    parts = [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
        {"type": "image_url", "image_url": {"url": "https://x.io/a.JPG?size=1"}},
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,QUJD"}},
    ]
    asked = request(
        HELLO
        | {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": parts},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "t1", "content": "rain"},
                {"role": "user", "content": "and?"},
            ],
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 50,
            "n": 2,
            "seed": 7,
            "stop": ["END"],
            "presence_penalty": 0.1,
            "frequency_penalty": 0.2,
            "logprobs": True,
            "top_logprobs": 3,
            "reasoning_effort": "medium",
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        },
        Left(),
    )
    assert asked == {
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "contents": [
            {
                "role": "user",
                "parts": [
                    {"text": "look"},
                    {"inlineData": {"mimeType": "image/png", "data": "QUJD"}},
                    {"fileData": {"mimeType": "image/jpeg", "fileUri": "https://x.io/a.JPG?size=1"}},
                    {"inlineData": {"mimeType": "audio/wav", "data": "QUJD"}},
                    {"inlineData": {"mimeType": "application/pdf", "data": "QUJD"}},
                ],
            },
            {
                "role": "model",
                "parts": [
                    {
                        "functionCall": {"name": "weather", "args": {"city": "Bonn"}},
                        "thoughtSignature": "c2ln",
                    }
                ],
            },
            {
                "role": "user",
                "parts": [
                    {"functionResponse": {"name": "weather", "response": {"output": "rain"}}},
                    {"text": "and?"},
                ],
            },
        ],
        "tools": [
            {
                "functionDeclarations": [
                    {"name": "weather", "description": "Tells it.", "parametersJsonSchema": SCHEMA}
                ]
            }
        ],
        "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["weather"]}},
        "generationConfig": {
            "temperature": 0.5,
            "topP": 0.9,
            "candidateCount": 2,
            "seed": 7,
            "presencePenalty": 0.1,
            "frequencyPenalty": 0.2,
            "maxOutputTokens": 50,
            "stopSequences": ["END"],
            "responseLogprobs": True,
            "logprobs": 3,
            "thinkingConfig": {"thinkingBudget": 8192},
            "responseMimeType": "application/json",
            "responseJsonSchema": SCHEMA,
        },
    }


@pytest.mark.parametrize(
    ("model", "more", "thinking"),
    [
        ("gemini-2.5-flash", {"reasoning_effort": "none"}, {"thinkingBudget": 0}),
        ("gemini-3-pro", {"reasoning_effort": "low"}, {"thinkingLevel": "low"}),
        (
            "gemini-2.5-pro",
            {"thinking": {"type": "enabled", "budget_tokens": 2000}},
            {"thinkingBudget": 2000, "includeThoughts": True},
        ),
        ("gemini-2.5-pro", {"thinking": {"type": "adaptive"}}, {"includeThoughts": True}),
        ("gemini-2.5-pro", {"thinking": {"type": "disabled"}}, {"thinkingBudget": 0}),
    ],
)
def test_thinking_by_model(model: str, more: dict[str, Any], thinking: dict[str, Any]) -> None:
    asked = request(HELLO | more | {"model": model}, Left())
    assert asked["generationConfig"]["thinkingConfig"] == thinking


def test_a_call_of_another_model_has_the_signature_that_is_documented_for_it() -> None:
    bare = {name: value for name, value in CALL.items() if name != "extra_content"}
    messages = [
        *HELLO["messages"],
        {"role": "assistant", "tool_calls": [bare, {**bare, "id": "t2"}]},
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "tool", "tool_call_id": "t2", "content": "oops", "is_error": True},
    ]
    asked = request({"model": "gemini-3-pro", "messages": messages}, Left())
    first, second = asked["contents"][1]["parts"]
    assert first["thoughtSignature"] == "skip_thought_signature_validator"
    assert "thoughtSignature" not in second
    results = [part["functionResponse"]["response"] for part in asked["contents"][2]["parts"]]
    assert results == [{"output": "rain"}, {"error": "oops"}]
    older = request({"model": "gemini-2.5-pro", "messages": messages}, Left())
    assert "thoughtSignature" not in older["contents"][1]["parts"][0]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"user": "u"}, "user"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"reasoning_effort": "xhigh"}, "reasoning_effort"),
        (
            {"tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}]},
            "tools[0].function.strict",
        ),
        (
            {"messages": [{"role": "tool", "tool_call_id": "t9", "content": "x"}]},
            "messages[0].tool_call_id",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/a"}}]}
                ]
            },
            "messages[0].content[0].image_url",
        ),
    ],
)
def test_what_cannot_be_said_there_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    with pytest.raises(Unmappable) as caught:
        request(HELLO | more, Left())
    assert caught.value.param == param


USAGE = {
    "promptTokenCount": 40,
    "toolUsePromptTokenCount": 5,
    "cachedContentTokenCount": 30,
    "candidatesTokenCount": 3,
    "thoughtsTokenCount": 4,
    "totalTokenCount": 52,
    "promptTokensDetails": [{"modality": "AUDIO", "tokenCount": 9}, {"modality": "TEXT", "tokenCount": 31}],
}
PARTS = [
    {"text": "hm", "thought": True},
    {"text": "It "},
    {"text": "is "},
    {"functionCall": {"name": "weather", "args": {"city": "Bonn"}}, "thoughtSignature": "c2ln"},
    {"functionCall": {"id": "own", "name": "weather", "args": {}}},
]
ANSWER: dict[str, Any] = {
    "candidates": [{"content": {"role": "model", "parts": PARTS}, "finishReason": "STOP", "index": 0}],
    "usageMetadata": USAGE,
    "modelVersion": "gemini-2026",
    "responseId": "r1",
}


def test_an_answer_becomes_a_completion() -> None:
    done = answer(ANSWER, 5)
    assert (done["id"], done["model"], done["created"]) == ("r1", "gemini-2026", 5)
    (choice,) = done["choices"]
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("It is ", "hm")
    first, second = message["tool_calls"]
    assert first["extra_content"] == {"google": {"thought_signature": "c2ln"}}
    assert (len(first["id"]), second["id"]) == (29, "own")  # OpenAI takes no name beyond 40 letters
    assert choice["finish_reason"] == "tool_calls"
    usage = usage_of(done)
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (45, 7, 52)
    assert (usage.cached_tokens, usage.reasoning_tokens, usage.audio_tokens) == (30, 4, 9)


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        ("MAX_TOKENS", "length"),
        ("SAFETY", "content_filter"),
        ("MALFORMED_FUNCTION_CALL", "malformed_function_call"),
    ],
)
def test_reasons(finish: str, reason: str) -> None:
    candidate = {"content": {"parts": [{"text": "a"}]}, "finishReason": finish}
    assert answer(ANSWER | {"candidates": [candidate]}, 0)["choices"][0]["finish_reason"] == reason


def test_a_blocked_prompt_is_a_refusal() -> None:
    blocked = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 4}}
    (choice,) = answer(blocked, 0)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("content_filter", None)
    assert "SAFETY" in choice["message"]["refusal"]
    stream = Stream(0)
    chunks = [told.chunk for told in stream.feed(json.dumps(blocked).encode())]
    assert chunks[0] is not None
    assert (chunks[0]["choices"][0]["finish_reason"], stream.done) == ("content_filter", True)


def test_scores_of_tokens() -> None:
    scored = {
        "chosenCandidates": [{"token": "é", "tokenId": 1, "logProbability": -0.5}],
        "topCandidates": [
            {"candidates": [{"token": "é", "logProbability": -0.5}, {"token": "e", "logProbability": -2}]}
        ],
    }
    candidate = {"content": {"parts": [{"text": "é"}]}, "finishReason": "STOP", "logprobsResult": scored}
    (choice,) = answer(ANSWER | {"candidates": [candidate]}, 0)["choices"]
    (token,) = choice["logprobs"]["content"]
    assert (token["token"], token["logprob"], token["bytes"]) == ("é", -0.5, [195, 169])
    assert [top["logprob"] for top in token["top_logprobs"]] == [-0.5, -2]


@pytest.mark.parametrize("body", [{}, {"candidates": [{"content": {"parts": [{"executableCode": {}}]}}]}])
def test_what_is_unknown_here_is_an_error(body: dict[str, Any]) -> None:
    with pytest.raises(Unreadable):
        answer(body, 0)


def pieces_of_answer() -> list[dict[str, Any]]:
    head = {name: ANSWER[name] for name in ("modelVersion", "responseId")}
    pieces = [
        {**head, "candidates": [{"content": {"role": "model", "parts": [part]}, "index": 0}]}
        for part in PARTS
    ]
    last = {"content": {"role": "model", "parts": [{"text": ""}]}, "finishReason": "STOP", "index": 0}
    return [*pieces, {**head, "candidates": [last], "usageMetadata": USAGE}]


def test_a_stream_says_what_the_whole_answer_says() -> None:
    stream = Stream(5)
    told = [one for piece in pieces_of_answer() for one in stream.feed(json.dumps(piece).encode())]
    told += stream.close()
    chunks = [one.chunk for one in told if one.chunk is not None]
    whole = answer(ANSWER, 5)
    assert stream.done
    assert not stream.complete
    assert assemble_chunks(chunks) == whole


def test_errors_inside_and_outside_of_a_stream() -> None:
    retry = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1.5s"}
    body = {"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED", "details": [retry]}}
    told = VendorError(429, "quota", "RESOURCE_EXHAUSTED", retry_after_s=1.5)
    assert error(429, json.dumps(body).encode()) == told
    assert error(429, json.dumps([body]).encode()) == told
    assert list(Stream(0).feed(json.dumps(body).encode())) == [Told(error=told)]


def test_paths_cannot_be_escaped_from() -> None:
    assert path("gemini-2.5-pro", False) == "/models/gemini-2.5-pro:generateContent"
    assert path("models/a/../b?x", True) == "/models/a%2F..%2Fb%3Fx:streamGenerateContent?alt=sse"
