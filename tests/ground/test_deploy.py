"""The examples under deploy/: they parse, what they name exists, and our own config reads theirs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from understudy import config
from understudy.cli.main import main

DEPLOY = Path(__file__).parents[2] / "deploy"
OBJECTS: list[dict[str, Any]] = [
    one
    for name in ("understudy", "workers")
    for one in yaml.safe_load_all((DEPLOY / f"kubernetes/{name}.yaml").read_text())
]
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_text())
VERSIONS = {
    "Service": "v1",
    "StatefulSet": "apps/v1",
    "Deployment": "apps/v1",
    "PodDisruptionBudget": "policy/v1",
    "Job": "batch/v1",
    "PersistentVolumeClaim": "v1",
}
SETS = [o for o in OBJECTS if o["kind"] in ("StatefulSet", "Deployment")]


def containers(work: dict[str, Any]) -> list[dict[str, Any]]:
    return work["spec"]["template"]["spec"]["containers"]


def commands() -> list[list[str]]:
    work = [*SETS, *(o for o in OBJECTS if o["kind"] == "Job")]
    found = [c["command"] for one in work for c in containers(one) if "command" in c]
    found = [shlex.split(c[2])[1:] if c[:2] == ["sh", "-c"] else c for c in found]
    return found + [s["command"] for s in COMPOSE["services"].values() if "command" in s]


def test_every_object_has_a_known_kind_and_a_name_of_its_own():
    assert all(VERSIONS[o["kind"]] == o["apiVersion"] for o in OBJECTS)
    names = [(o["kind"], o["metadata"]["name"]) for o in OBJECTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("version", ["1.31", "1.35"])
def test_kubernetes_own_schemas_take_every_object_without_an_unknown_field(version):
    validate = pytest.importorskip("kubernetes_validate")
    for one in OBJECTS:
        validate.validate(one, version, strict=True)
    typo = {**OBJECTS[0], "spec": {**OBJECTS[0]["spec"], "replica": 3}}
    with pytest.raises(validate.ValidationError, match="replica"):
        validate.validate(typo, version, strict=True)


@pytest.mark.parametrize("work", SETS, ids=lambda w: w["metadata"]["name"])
def test_selectors_find_their_pods_and_mounts_their_volumes(work):
    spec = work["spec"]
    labels, pod = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    volumes = {v["name"] for v in pod.get("volumes", [])}
    volumes |= {v["metadata"]["name"] for v in spec.get("volumeClaimTemplates", [])}
    for container in containers(work):
        assert {m["name"] for m in container["volumeMounts"]} <= volumes
        assert container["resources"]["limits"]["memory"]
        assert container["readinessProbe"]
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        probe = container["readinessProbe"].get("httpGet")
        assert probe is None or probe["port"] in ports
        for one in container.get("env", []):
            secret = one.get("valueFrom", {}).get("secretKeyRef")
            assert secret is None or secret["key"] in ("openai", "postgres")


def test_every_service_leads_to_pods_that_listen_there():
    for service in (o for o in OBJECTS if o["kind"] == "Service"):
        (work,) = [
            w
            for w in SETS
            if service["spec"]["selector"].items() <= w["spec"]["template"]["metadata"]["labels"].items()
        ]
        listens = {p["containerPort"] for c in containers(work) for p in c["ports"]}
        assert all(p.get("targetPort", p["port"]) in listens for p in service["spec"]["ports"])


@pytest.mark.parametrize("command", commands(), ids=lambda c: " ".join(c[:3]))
def test_commands_and_options_exist(command):
    assert command[0] == "understudy"
    found = main.get_command(click.Context(main), command[1])
    options = {name for parameter in found.params for name in parameter.opts}
    assert {word for word in command if word.startswith("--")} <= options


def test_workers_share_the_shards_out_among_all_of_them():
    (job,) = [o for o in OBJECTS if o["kind"] == "Job"]
    spec, (container,) = job["spec"], containers(job)
    parts = container["command"][2].rpartition("--part ")[2]
    assert spec["completionMode"] == "Indexed"
    echo, last = ["sh", "-c", f"echo {parts}"], {"JOB_COMPLETION_INDEX": str(spec["completions"] - 1)}
    run = subprocess.run(echo, env=last, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"{spec['completions']}/{spec['completions']}"
    claims = {o["metadata"]["name"] for o in OBJECTS if o["kind"] == "PersistentVolumeClaim"}
    volumes = job["spec"]["template"]["spec"]["volumes"]
    assert {v["persistentVolumeClaim"]["claimName"] for v in volumes} == claims


@pytest.mark.parametrize("place", ["compose", "kubernetes"])
def test_our_own_config_reads_theirs(place, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    read = config.load(DEPLOY / place / "understudy.toml")
    assert read.store.url.startswith("postgresql://")
    assert read.gateway.require_key, "a gateway that others reach asks for keys"
    named = {e.base_url.split("/")[2].split(":")[0] for e in read.endpoints.values()}
    inside = set(COMPOSE["services"]) if place == "compose" else {o["metadata"]["name"] for o in OBJECTS}
    assert {name for name in named if "." not in name} <= inside


def test_compose_services_name_volumes_and_conditions_that_exist():
    volumes = set(COMPOSE["volumes"])
    for service in COMPOSE["services"].values():
        sources = [v.split(":")[0] for v in service.get("volumes", [])]
        assert {s for s in sources if not s.startswith(".")} <= volumes
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])
        for value in service.get("environment", {}).values():
            assert not re.search(r"password|sk-", str(value).split(":?")[0]), "no secret in the file"
