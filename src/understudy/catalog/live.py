"""What your vendors' own model lists say today, read with your keys into a file the catalog loads.

Each list is read by the fields it has: OpenAI's ``shutdown_date``, OpenRouter's ``expiration_date`` and
prices, Azure's ``lifecycle_status`` and ``deprecation``, Anthropic's capabilities, Gemini's limits. An
endpoint that cannot be read keeps what it said last and is named. It ignores models that do not write text.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args
from urllib.parse import urlsplit

import msgspec
import yaml

from understudy.catalog.prices import vendor_of_url
from understudy.errors import EndpointError, InputError
from understudy.protocol import Modality

TIMEOUT_S = 30.0
PAGES = 50
"""Most pages of one list."""
AZURE_VERSION = "2024-10-21"
_HEADER = "# What vendors' own lists say. Written by `understudy models --refresh`; do not edit by hand.\n"
_PARAMETERS = {
    "tools": "tools",
    "structured_outputs": "json_schema",
    "response_format": "json_object",
    "logprobs": "logprobs",
    "reasoning": "reasoning",
}
_CAPABILITIES = {"batch": "batch", "structured_outputs": "json_schema", "thinking": "reasoning"}
_METHODS = {"createCachedContent": "caching", "batchGenerateContent": "batch"}


class LiveEndpoint(NamedTuple):
    """Where a list is read."""

    name: str
    """As in the config."""
    kind: str
    """openai, anthropic or gemini."""
    base_url: str
    api_key: str


class Read(NamedTuple):
    """What one endpoint's list brought."""

    endpoint: str
    models: int
    ending: int
    """Of them, those with an announced end."""
    gone: tuple[str, ...]
    """Listed last time, not any more: calls to them will fail."""
    failure: str
    """Why it could not be read; empty when it was."""


def refresh(path: Path, endpoints: Sequence[LiveEndpoint], today: dt.date) -> list[Read]:
    """Read every endpoint's list and write ``path``. Raises InputError when the file there is broken."""
    document = _earlier(path)
    results = asyncio.run(_read_all(endpoints))
    told = [_merge(document, e, result, today) for e, result in zip(endpoints, results, strict=True)]
    if any(not read.failure for read in told):
        path.write_text(_HEADER + yaml.safe_dump(document, sort_keys=False, width=110, allow_unicode=True))
    return told


async def _read_all(endpoints: Sequence[LiveEndpoint]) -> list[list[dict[str, Any]] | EndpointError]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def one(endpoint: LiveEndpoint) -> list[dict[str, Any]] | EndpointError:
            try:
                return [row async for row in _rows(session, endpoint)]
            except EndpointError as error:
                return error
            except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError) as error:
                return EndpointError(f"{endpoint.name}: {type(error).__name__}: {error}")

        return list(await asyncio.gather(*(one(e) for e in endpoints)))


async def _rows(session: Any, endpoint: LiveEndpoint) -> AsyncIterator[dict[str, Any]]:
    """The entries of a list, page by page."""
    url, headers = _request(endpoint)
    parameters: dict[str, str] = {}
    for _ in range(PAGES):
        async with session.get(url, headers=headers, params=parameters) as response:
            raw = await response.read()
            if response.status != 200:
                raise EndpointError(
                    f"{endpoint.name}: its list answered {response.status}", status=response.status
                )
        page = msgspec.json.decode(raw, type=dict[str, Any])
        for row in cast(list[dict[str, Any]], page.get("data") or page.get("models") or []):
            yield row
        if page.get("has_more") and page.get("last_id"):
            parameters["after_id"] = str(page["last_id"])
        elif page.get("nextPageToken"):
            parameters["pageToken"] = str(page["nextPageToken"])
        else:
            return


def _request(endpoint: LiveEndpoint) -> tuple[str, dict[str, str]]:
    base = endpoint.base_url.rstrip("/")
    if endpoint.kind == "anthropic":
        return f"{base}/models?limit=1000", {"x-api-key": endpoint.api_key, "anthropic-version": "2023-06-01"}
    if endpoint.kind == "gemini":
        return f"{base}/models?pageSize=1000", {"x-goog-api-key": endpoint.api_key}
    if (host := urlsplit(base)).path.startswith("/openai"):  # Azure: the list stands beside the deployments
        versioned = "/v1/models" if "/v1" in host.path else f"/models?api-version={AZURE_VERSION}"
        return f"{host.scheme}://{host.netloc}/openai{versioned}", {"api-key": endpoint.api_key}
    return f"{base}/models", {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}


def facts_of(row: Mapping[str, Any], vendor_known: bool = True) -> Iterator[tuple[str, Any]]:
    """Field and value of every fact an entry states, in the form of the catalog's files.

    ``vendor_known`` False leaves the day of creation out: a server of your own writes its start there.
    """
    if ends := _day(
        row.get("shutdown_date") or row.get("expiration_date") or _inner(row, "deprecation", "inference")
    ):
        yield "retires", ends
    if row.get("lifecycle_status"):
        yield "lifecycle", str(row["lifecycle_status"])
    if vendor_known and (born := _day(row.get("created_at") or row.get("created"))):
        yield "released", born
    window = row.get("context_length") or row.get("max_input_tokens") or row.get("inputTokenLimit")
    if window := window or row.get("max_model_len"):
        yield "context_window", int(window)
    most = (
        _inner(row, "top_provider", "max_completion_tokens")
        or row.get("outputTokenLimit")
        or row.get("max_tokens")
    )
    if most:
        yield "output_limit", int(most)
    if inputs := _inputs(row):
        yield "inputs", inputs
    if outputs := _modalities(_inner(row, "architecture", "output_modalities")):
        yield "outputs", outputs
    if features := _features(row):
        yield "features", features
    if price := _price(row):
        yield "prices", [price]


def model_of(row: Mapping[str, Any]) -> str:
    """The id that requests name; empty for what is no text model."""
    methods = row.get("supportedGenerationMethods")
    if methods is not None and "generateContent" not in methods:
        return ""
    capabilities = row.get("capabilities") or {}
    if capabilities.get("chat_completion") is False and capabilities.get("completion") is False:
        return ""
    return str(row.get("id") or row.get("name") or "").removeprefix("models/")


def _earlier(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"sources": {}, "models": {}}
    try:
        document = yaml.safe_load(path.read_bytes())
        return {"sources": dict(document["sources"]), "models": dict(document["models"])}
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is not what `understudy models --refresh` writes: {error}",
            expected="sources: and models:",
            next_step=f"rm {path}, then understudy models --refresh",
        ) from error


def _merge(
    document: dict[str, Any],
    endpoint: LiveEndpoint,
    result: list[dict[str, Any]] | EndpointError,
    today: dt.date,
) -> Read:
    if isinstance(result, EndpointError):
        return Read(endpoint.name, 0, 0, (), result.value)
    known = vendor_of_url(endpoint.base_url)
    vendor, source = known or endpoint.name, f"{endpoint.name}, live"
    listed = {f"{vendor}/{model}": row for row in result if (model := model_of(row))}
    models = document["models"]
    before = {name for name, claims in models.items() if any(source in said for said in claims.values())}
    ending = 0
    for name, row in listed.items():
        claims = models.setdefault(name, {})
        told = dict(facts_of(row, bool(known)))
        ending += "retires" in told
        _replace(claims, source, told, today)
    document["sources"][source] = {
        "what": f"the model list of {urlsplit(endpoint.base_url).netloc}",
        "licence": "your account",
        "read": today,
    }
    return Read(endpoint.name, len(listed), ending, tuple(sorted(before - set(listed))), "")


def _replace(claims: dict[str, Any], source: str, told: dict[str, Any], today: dt.date) -> None:
    """This source's claims by what it says now; a price that moved is appended with today's date."""
    earlier = claims.get("prices", {}).get(source)
    for said in claims.values():
        said.pop(source, None)
    if earlier and "prices" in told:
        same = {k: v for k, v in earlier[-1].items() if k != "start"} == told["prices"][0]
        told["prices"] = earlier if same else [*earlier, {**told["prices"][0], "start": today}]
    for field, value in told.items():
        claims.setdefault(field, {})[source] = value
    for field in [f for f, said in claims.items() if not said]:
        del claims[field]
    # a model of which nothing is told but that it exists is still listed
    claims.setdefault("names", {}).setdefault(source, [])


def _day(value: object) -> dt.date | None:
    """A day from an ISO date or time, or Unix seconds; None for epochs, which stand for unknown."""
    if isinstance(value, (int, float)) and value > 86_400:
        return dt.datetime.fromtimestamp(value, dt.UTC).date()
    found = re.match(r"(\d{4})-(\d\d)-(\d\d)", value) if isinstance(value, str) else None
    day = dt.date(*map(int, found.groups())) if found else None
    return day if day and day.year > 1970 else None


def _inner(row: Mapping[str, Any], name: str, field: str) -> Any:
    inner = row.get(name)
    return cast(dict[str, Any], inner).get(field) if isinstance(inner, dict) else None


def _supported(row: Mapping[str, Any], name: str) -> bool:
    told = _inner(row, "capabilities", name)
    return bool(cast(dict[str, Any], told).get("supported")) if isinstance(told, dict) else False


def _inputs(row: Mapping[str, Any]) -> list[str]:
    listed = _inner(row, "architecture", "input_modalities")
    if listed is not None:
        return _modalities(listed)
    if "capabilities" in row and "max_input_tokens" in row:
        told = {"image": "image_input", "file": "pdf_input"}
        return ["text", *sorted(word for word, name in told.items() if _supported(row, name))]
    return []


def _modalities(listed: Any) -> list[str]:
    return sorted(set(cast(list[str], listed or [])) & set(get_args(Modality)))


def _features(row: Mapping[str, Any]) -> list[str]:
    found = {_PARAMETERS[p] for p in row.get("supported_parameters") or () if p in _PARAMETERS}
    found |= {word for name, word in _CAPABILITIES.items() if _supported(row, name)}
    found |= {_METHODS[m] for m in row.get("supportedGenerationMethods") or () if m in _METHODS}
    found |= {"fine_tuning"} if _inner(row, "capabilities", "fine_tune") is True else set()
    return sorted(found | ({"reasoning"} if row.get("thinking") is True else set()))


def _price(row: Mapping[str, Any]) -> dict[str, float]:
    """OpenRouter's USD per token, as text, per million; a price of 0 or below 0 (it varies) is no price."""
    names = {"input": "prompt", "output": "completion", "cached": "input_cache_read"}
    told = {name: _inner(row, "pricing", key) for name, key in names.items()}
    price = {name: round(float(value) * 1e6, 6) for name, value in told.items() if value not in (None, "")}
    return price if price.get("input", 0) > 0 and price.get("output", 0) > 0 else {}
