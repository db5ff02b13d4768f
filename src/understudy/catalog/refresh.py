"""Writes the snapshot in ``data/`` from sources that others keep.

    pip install "understudy[refresh]"
    pip download --no-deps -d sources litellm llm-sunset bydtech-model-retire langchain-openai \\
        langchain-anthropic langchain-google-genai langchain-mistralai langchain-groq langchain-xai \\
        langchain-deepseek
    python -m understudy.catalog.refresh sources src/understudy/catalog/data

reads LiteLLM's price map, the two lists of retirements and models.dev (as LangChain's model profiles carry
it; all MIT, facts only) out of their wheels, without installing or running them, and asks the installed
genai-prices and ecologits. A price that changed since the last snapshot is appended with the day of reading,
never overwritten. Files it did not write (open models and benchmarks, kept by hand) stay as they are. It
ignores prices of genai-prices: those are asked at run time (prices).
"""

from __future__ import annotations

import ast
import datetime as dt
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import yaml

from understudy.catalog.documents import compile_documents

Claims = dict[str, dict[str, Any]]
"""Field to source to value."""

HEADER = """\
# {vendor}: facts about models. Written by `python -m understudy.catalog.refresh`; do not edit by hand.
# A fact is `field: {{source: value}}`; where the source tells when it checked, {{value, read}}.
"""

# LiteLLM's provider -> our vendor
_LITELLM: dict[str, str] = {
    "openai": "openai",
    "anthropic": "anthropic",
    "gemini": "google",
    "mistral": "mistral",
    "xai": "xai",
    "deepseek": "deepseek",
    "cohere_chat": "cohere",
    "groq": "groq",
    "moonshot": "moonshot",
    "zai": "zai",
}
_SUNSET: dict[str, str] = {"Azure": "azure", "Google Vertex": "vertex", "xAI": "xai"}
_RETIRE: dict[str, str] = {
    "google-gemini-api": "google",
    "aws-bedrock": "bedrock",
    "google-vertex-ai": "vertex",
}
_PROFILES: dict[str, str] = {
    "langchain_openai": "openai",
    "langchain_anthropic": "anthropic",
    "langchain_google_genai": "google",
    "langchain_mistralai": "mistral",
    "langchain_groq": "groq",
    "langchain_xai": "xai",
    "langchain_deepseek": "deepseek",
}
_ECOLOGITS: dict[str, str] = {
    "openai": "openai",
    "anthropic": "anthropic",
    "google": "google_genai",
    "mistral": "mistralai",
    "cohere": "cohere",
}
_FEATURES = {
    "supports_function_calling": "tools",
    "supports_response_schema": "json_schema",
    "supports_prompt_caching": "caching",
    "supports_reasoning": "reasoning",
    "input_cost_per_token_batches": "batch",
}
_DENIALS = {**_FEATURES, "supports_sampling_params": "temperature"}
_PRICES = {
    "input": "input_cost_per_token",
    "output": "output_cost_per_token",
    "cached": "cache_read_input_token_cost",
    "cached_audio": "cache_read_input_audio_token_cost",
    "cache_write": "cache_creation_input_token_cost",
    "cache_write_1h": "cache_creation_input_token_cost_above_1hr",
    "input_audio": "input_cost_per_audio_token",
    "output_audio": "output_cost_per_audio_token",
    "reasoning": "output_cost_per_reasoning_token",
}
"""Our name of a price to LiteLLM's."""


class Source(NamedTuple):
    """Where a claim comes from."""

    name: str
    what: str
    licence: str
    read: str


def main(sources: Path, out: Path, today: dt.date) -> None:
    """Read the wheels in ``sources`` and write one YAML per vendor to ``out``."""
    models: dict[str, dict[str, Claims]] = {}
    read = [
        _litellm(sources, models, today),
        _sunset(sources, models, today),
        _retire(sources, models, today),
    ]
    if any(sources.glob("langchain_*.whl")):
        read.append(_models_dev(sources, models, today))
    read.append(_genai_prices(models, today))
    read += _ecologits(models, today) if find_spec("ecologits") else []
    out.mkdir(parents=True, exist_ok=True)
    for vendor, known in models.items():
        _keep_earlier_prices(known, out / f"{vendor}.yaml", today)
    for vendor, known in sorted(models.items()):
        (out / f"{vendor}.yaml").write_text(_yaml(vendor, known, read))
    compile_documents(out)


def _litellm(sources: Path, models: dict[str, dict[str, Claims]], today: dt.date) -> Source:
    table, release = _from_wheel(sources, "litellm-*.whl", "model_prices_and_context_window_backup.json")
    for key, row in table.items():
        vendor = _LITELLM.get(row.get("litellm_provider", ""))
        if vendor is None or not _writes_text(row):
            continue
        model = key.rpartition("/")[2] if vendor != "groq" else key.partition("/")[2]
        claims = models.setdefault(vendor, {}).setdefault(model, {})
        for field, value in _litellm_facts(row):
            claims.setdefault(field, {})["litellm"] = value
    for known in models.values():
        _note_tuning(known)
    return Source("litellm", f"LiteLLM {release}, model_prices_and_context_window", "MIT", str(today))


def _note_tuning(models: dict[str, Claims]) -> None:
    """A price for ``ft:MODEL`` says that MODEL can be fine-tuned."""
    for name in [n for n in models if n.startswith("ft:")]:
        features = models.get(name.removeprefix("ft:"), {}).get("features", {})
        if "litellm" in features:
            features["litellm"] = sorted({*features["litellm"], "fine_tuning"})


def _writes_text(row: Mapping[str, Any]) -> bool:
    return row.get("mode") in ("chat", "responses") and "text" in row.get(
        "supported_output_modalities", ["text"]
    )


def _litellm_facts(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(row.get("max_input_tokens"), int):
        yield "context_window", row["max_input_tokens"]
    if isinstance(row.get("max_output_tokens"), int):
        yield "output_limit", row["max_output_tokens"]
    yield "inputs", _inputs(row)
    if "supported_output_modalities" in row or row.get("supports_audio_output"):
        told = {
            *row.get("supported_output_modalities", ()),
            *(("audio",) * row.get("supports_audio_output", 0)),
        }
        yield "outputs", ["text", *sorted(told & {"image", "audio"})]
    yield "features", sorted(word for name, word in _FEATURES.items() if row.get(name))
    denied = sorted(word for name, word in _DENIALS.items() if row.get(name) is False)
    if denied:
        yield "lacks", denied
    if row.get("supported_regions"):
        yield "regions", sorted(row["supported_regions"])
    # zero is written for free tiers and for prices not known: neither is a price
    if row.get("input_cost_per_token") and row.get("output_cost_per_token"):
        yield "prices", [_litellm_price(row)]
    if re.fullmatch(r"\d{4}-\d\d-\d\d", str(row.get("deprecation_date"))):
        yield "retires", row["deprecation_date"]
    if row.get("successor_model"):
        yield "successor", str(row["successor_model"]).rpartition("/")[2]


def _litellm_price(row: Mapping[str, Any]) -> dict[str, Any]:
    price: dict[str, Any] = _amounts(row, "")
    bounds = {
        int(m[1]) for name in row if (m := re.fullmatch(r"input_cost_per_token_above_(\d+)k_tokens", name))
    }
    tiers = [{"above": 1000 * k, **_amounts(row, f"_above_{k}k_tokens")} for k in sorted(bounds)]
    if tiers := [t for t in tiers if t.keys() >= {"input", "output"}]:
        price["tiers"] = tiers
    if (batch := _amounts(row, "_batches")).keys() >= {"input", "output"}:
        price["batch"] = batch
    return price


def _amounts(row: Mapping[str, Any], suffix: str) -> dict[str, float]:
    """USD per million tokens, from LiteLLM's USD per token."""
    return {
        ours: round(row[theirs + suffix] * 1e6, 6)
        for ours, theirs in _PRICES.items()
        if isinstance(row.get(theirs + suffix), (int, float))
    }


def _inputs(row: Mapping[str, Any]) -> list[str]:
    listed = set(row.get("supported_modalities") or ()) & {"image", "audio"}
    told = {"image": "supports_vision", "audio": "supports_audio_input", "file": "supports_pdf_input"}
    return ["text", *sorted(listed | {word for word, name in told.items() if row.get(name)})]


def _sunset(sources: Path, models: dict[str, dict[str, Claims]], today: dt.date) -> Source:
    rows, release = _from_wheel(sources, "llm_sunset-*.whl", "snapshot.json")
    for row in rows:
        vendor = _SUNSET.get(row["provider"], str(row["provider"]).lower())
        successors = row.get("replacement_models") or [None]
        _add_dates(models, vendor, row["model_id"], "llm-sunset", row["last_observed"], {
            "deprecated": row.get("deprecation_date"),
            "retires": row.get("shutdown_date"),
            "successor": successors[0],
        })  # fmt: skip
    return Source("llm-sunset", f"llm-sunset {release}", "MIT", str(today))


def _retire(sources: Path, models: dict[str, dict[str, Claims]], today: dt.date) -> Source:
    table, release = _from_wheel(sources, "bydtech_model_retire-*.whl", "models.json")
    for row in table["models"]:
        vendor = _RETIRE.get(row["provider"], str(row["provider"]))
        _add_dates(models, vendor, row["id"], "bydtech-model-retire", row["checked"], {
            "deprecated": row.get("deprecated_on"),
            "retires": row.get("retires_on"),
            "successor": row.get("replacement"),
        })  # fmt: skip
    return Source("bydtech-model-retire", f"bydtech-model-retire {release}", "MIT", str(today))


def _add_dates(
    models: dict[str, dict[str, Claims]],
    vendor: str,
    model: str,
    source: str,
    read: str,
    told: dict[str, Any],
) -> None:
    claims = models.setdefault(vendor, {}).setdefault(model, {})
    for field, value in told.items():
        if value:
            claims.setdefault(field, {})[source] = {"value": value, "read": read}


def _genai_prices(models: dict[str, dict[str, Claims]], today: dt.date) -> Source:
    """Context windows only, as a second opinion on LiteLLM's."""
    from genai_prices.data_snapshot import get_snapshot

    providers = {"x-ai": "xai", "moonshotai": "moonshot"}
    for provider in get_snapshot().providers:
        known = models.get(providers.get(provider.id, provider.id), {})
        for model, claims in known.items():
            found = next((m for m in provider.models if m.id == model and m.context_window), None)
            if found:
                claims.setdefault("context_window", {})["genai-prices"] = found.context_window
    return Source("genai-prices", f"genai-prices {version('genai-prices')}", "MIT", str(today))


def _models_dev(sources: Path, models: dict[str, dict[str, Claims]], today: dt.date) -> Source:
    releases: list[str] = []
    for package, vendor in _PROFILES.items():
        path = max(sources.glob(f"{package}-*.whl"), key=lambda p: p.stat().st_mtime, default=None)
        if path is None:
            continue
        releases.append(path.name.rpartition("-py")[0])
        for model, profile in _profiles(path, package).items():
            # a profile that only corrects another has no name: it states no facts of the model
            if "name" in profile and profile["text_outputs"]:
                claims = models.setdefault(vendor, {}).setdefault(model, {})
                for field, value in _profile_facts(profile):
                    claims.setdefault(field, {})["models.dev"] = value
    return Source("models.dev", f"models.dev, in {', '.join(releases)}", "MIT", str(today))


def _profiles(path: Path, package: str) -> dict[str, dict[str, Any]]:
    """The table of a wheel's profiles, read as a literal: nothing of it is run."""
    with zipfile.ZipFile(path) as archive:
        tree = ast.parse(archive.read(f"{package}/data/_profiles.py"))
    table = next(n.value for n in tree.body if isinstance(n, ast.AnnAssign) and n.value is not None)
    return cast(dict[str, dict[str, Any]], ast.literal_eval(table))


def _profile_facts(profile: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if profile["max_input_tokens"]:
        yield "context_window", profile["max_input_tokens"]
    if profile["max_output_tokens"]:
        yield "output_limit", profile["max_output_tokens"]
    told = {"image": "image_inputs", "audio": "audio_inputs", "file": "pdf_inputs"}
    yield "inputs", ["text", *sorted(word for word, name in told.items() if profile.get(name))]
    spoken = {"image": "image_outputs", "audio": "audio_outputs"}
    yield "outputs", ["text", *sorted(word for word, name in spoken.items() if profile.get(name))]
    words = {"tools": "tool_calling", "json_schema": "structured_output", "reasoning": "reasoning_output"}
    yield "features", sorted(word for word, name in words.items() if profile.get(name))
    # temperature: whether sampling can be tuned at all
    words["temperature"] = "temperature"
    if denied := sorted(word for word, name in words.items() if profile.get(name) is False):
        yield "lacks", denied
    yield "open_weights", profile["open_weights"]
    if day := _whole_day(profile["release_date"]):
        yield "released", day


def _whole_day(text: str) -> str:
    """A date; one that names only a month begins with its first day."""
    if re.fullmatch(r"20\d\d-\d\d", text):
        return f"{text}-01"
    return text if re.fullmatch(r"20\d\d-\d\d-\d\d", text) else ""


def _ecologits(models: dict[str, dict[str, Claims]], today: dt.date) -> list[Source]:
    """Parameters and energy per million answer tokens, computed by ecologits (Rincé and Banse 2025)."""
    from ecologits.model_repository import models as repository  # pyright: ignore[reportMissingImports]

    for vendor, provider in _ECOLOGITS.items():
        for model, claims in models.get(vendor, {}).items():
            found = repository.find_model(provider=provider, model_name=model)
            if found is not None:
                closed = any("not-released" in w.code for w in found.warnings or ())
                source = "ecologits-estimate" if closed else "ecologits"
                for field, value in _ecologits_facts(provider, model, found):
                    claims.setdefault(field, {})[source] = value
    what = f"ecologits {version('ecologits')}"
    return [
        Source("ecologits", what, "MPL-2.0, facts only", str(today)),
        Source(
            "ecologits-estimate", f"{what}: the vendor published nothing", "MPL-2.0, facts only", str(today)
        ),
    ]


def _ecologits_facts(provider: str, model: str, found: Any) -> Iterator[tuple[str, Any]]:
    from ecologits.tracers.utils import llm_impacts  # pyright: ignore[reportMissingImports]

    parameters = found.architecture.parameters
    yield "architecture", str(found.architecture.type.value)
    total = getattr(parameters, "total", parameters)
    yield "parameters", round(sum(_ends(total)) / 2 * 1e9)
    if hasattr(parameters, "active"):
        yield "active_parameters", round(sum(_ends(parameters.active)) / 2 * 1e9)
    told: Any = llm_impacts(provider, model, 1_000_000, float("inf"))
    if not told.errors:
        kwh, kg = (tuple(float(f"{end:.3g}") for end in _ends(v.value)) for v in (told.energy, told.gwp))
        yield "energy", {"kwh": list(kwh), "kg_co2e": list(kg)}


def _ends(value: Any) -> tuple[float, float]:
    """Both ends of ecologits' range, or a number twice."""
    return float(getattr(value, "min", value)), float(getattr(value, "max", value))


def _keep_earlier_prices(models: dict[str, Claims], written: Path, today: dt.date) -> None:
    """Where a source's price moved since the file was written, the old one stays and the new one begins."""
    if not written.exists():
        return
    before = yaml.safe_load(written.read_bytes())["models"]
    for model, claims in models.items():
        for source, listed in claims.get("prices", {}).items():
            if earlier := before.get(model, {}).get("prices", {}).get(source):
                claims["prices"][source] = _continued(_dated(earlier), listed[-1], today)


def _continued(earlier: list[dict[str, Any]], now: dict[str, Any], today: dt.date) -> list[dict[str, Any]]:
    """The prices so far and the one of today; one that is only told in more detail has not moved."""
    last = {k: v for k, v in earlier[-1].items() if k != "start"}
    if last.items() <= now.items():
        start = {"start": earlier[-1]["start"]} if "start" in earlier[-1] else {}
        return [*earlier[:-1], {**now, **start}]
    return [*earlier, {**now, "start": str(today)}]


def _dated(prices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**p, "start": str(p["start"])} if "start" in p else dict(p) for p in prices]


def _from_wheel(folder: Path, wheel: str, file: str) -> tuple[Any, str]:
    """A JSON file inside the newest wheel of that name, and the wheel's version."""
    path = max(folder.glob(wheel), key=lambda p: p.stat().st_mtime)
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("/" + file))
        return msgspec.json.decode(archive.read(name)), path.name.split("-")[1]


def _yaml(vendor: str, models: Mapping[str, Claims], sources: list[Source]) -> str:
    used = {source for claims in models.values() for said in claims.values() for source in said}
    lines = [HEADER.format(vendor=vendor), "sources:"]
    for source in sources:
        if source.name in used:
            told = {"what": source.what, "licence": source.licence, "read": source.read}
            lines.append(f"  {source.name}: {_flow(told)}")
    lines.append("models:")
    for model, claims in sorted(models.items()):
        lines.append(f"  {_flow(model)}:")
        lines += [f"    {field}: {_flow(said)}" for field, said in claims.items()]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """YAML in flow style on one line; dates and plain words without quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z][\w.-]*|20\d\d-\d\d-\d\d", value):
        return msgspec.json.encode(value).decode()
    return str(value)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), dt.datetime.now(dt.UTC).date())
