"""`understudy keys`: a secret is shown once, listed never, and ends when revoked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from understudy.cli.keys import keys
from understudy.errors import InputError
from understudy.traffic.store import open_store


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "understudy.toml"
    path.write_text("[gateway]\nrequire_key = true\n")
    return path


def run(config_path: Path, *arguments: str) -> Result:
    done = CliRunner().invoke(keys, [*arguments, "--config", str(config_path)])
    if done.exception is not None:
        raise done.exception
    return done


def test_a_key_opens_the_gateway_until_it_is_revoked(config_path: Path) -> None:
    made = json.loads(run(config_path, "create", "the team", "--json").stdout)
    with open_store("sqlite:///understudy.db", config_path.parent) as store:
        found = store.lookup_key(made["secret"])
        assert found is not None
        assert (found.id, found.name) == (made["id"], "the team")
        assert json.loads(run(config_path, "revoke", made["id"], "--json").stdout) == {
            "id": made["id"],
            "revoked": True,
        }
        assert store.lookup_key(made["secret"]) is None


def test_the_secret_alone_is_on_standard_output_and_nowhere_else(config_path: Path) -> None:
    done = run(config_path, "create", "team")
    secret = done.stdout.strip()
    assert secret.startswith("us-")
    assert secret not in done.stderr
    assert secret not in run(config_path, "list").stdout
    assert secret not in run(config_path, "list", "--json").stdout
    assert secret.encode() not in (config_path.parent / "understudy.db").read_bytes()


def test_the_list_tells_living_from_revoked(config_path: Path) -> None:
    assert "understudy keys create" in run(config_path, "list").stdout
    first, second = (json.loads(run(config_path, "create", n, "--json").stdout)["id"] for n in ("one", "two"))
    run(config_path, "revoke", first)
    lines = run(config_path, "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [first, second]
    assert "revoked" in lines[0]
    assert "living" in lines[1]


def test_limits_are_given_changed_and_shown(config_path: Path) -> None:
    arguments = ("--limit-requests-per-minute", "60", "--limit-usd-per-month", "12.5", "--json")
    made = json.loads(run(config_path, "create", "team", *arguments).stdout)
    expected = {
        "requests_per_minute": 60,
        "tokens_per_minute": 0,
        "usd_per_day": 0.0,
        "usd_per_month": 12.5,
    }
    assert made["limits"] == expected
    run(config_path, "limit", made["id"], "--limit-tokens-per-minute", "9000", "--limit-usd-per-month", "0")
    (listed,) = json.loads(run(config_path, "list", "--json").stdout)
    assert listed["limits"] == {**expected, "tokens_per_minute": 9000, "usd_per_month": 0.0}
    assert "(60 requests per minute, 9,000 tokens per minute)" in run(config_path, "list").stdout
    run(config_path, "revoke", made["id"])
    with pytest.raises(InputError, match="no living key"):
        run(config_path, "limit", made["id"], "--limit-usd-per-day", "1")


def test_revoking_what_is_not_there_says_so_without_repeating_a_secret(config_path: Path) -> None:
    made = json.loads(run(config_path, "create", "team", "--json").stdout)
    for wrong in ("none", made["secret"]):
        with pytest.raises(InputError, match="no living key") as caught:
            run(config_path, "revoke", wrong)
        assert made["secret"] not in str(caught.value)
        assert "understudy keys list" in str(caught.value)


def test_without_require_key_the_next_step_is_named(tmp_path: Path) -> None:
    (tmp_path / "open.toml").write_text("[gateway]\n")
    assert "require_key = true" in run(tmp_path / "open.toml", "create", "team").stderr
