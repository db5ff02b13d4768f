"""Config: every fault at once, each with its line; references and secrets checked."""

from pathlib import Path

import pytest

from understudy import config
from understudy.cli.init import field_documents, template
from understudy.errors import ConfigError, InputError

GOOD = """
[gateway]
listen = "127.0.0.1:8080"

[store]
url = "sqlite:///understudy.db"

[endpoints.openai]
kind = "openai"
base_url = "https://api.openai.com/v1"
api_key = "env:OPENAI_API_KEY"

[endpoints.local]
base_url = "http://127.0.0.1:8091/v1"

[aliases.assistant]
model = "openai/gpt-4.1"
fallback = ["local/student"]
"""


def faults_of(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, "understudy.toml", Path())
    return caught.value.faults


def test_the_readme_config_reads_as_written() -> None:
    loaded = config.parse(GOOD, "understudy.toml", Path("/somewhere"))
    assert loaded.aliases["assistant"].fallback == ["local/student"]
    assert loaded.endpoints["local"].kind == "openai"
    assert loaded.path("x.db") == Path("/somewhere/x.db")
    endpoint, model = loaded.endpoint_of("openai/gpt-4.1")
    assert (endpoint.base_url, model) == ("https://api.openai.com/v1", "gpt-4.1")


def test_all_faults_come_together_each_with_its_line() -> None:
    faults = faults_of(
        "[gateway]\nlisten = 'here'\nrecrod = 'strict'\n"
        "[evaluate]\nmargin = 'wide'\n[aliases.a]\nmodel = 'gone/m'\n"
    )
    assert [fault.split(":")[0] for fault in faults] == ["line 2", "line 3", "line 5", "line 7"]
    assert "did you mean 'record'?" in faults[1]
    assert "no [endpoints.gone]" in faults[3]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[gatway]\n", "line 1: gatway: no such section; did you mean 'gateway'?"),
        ("gateway = 3\n", "expected a table [gateway]"),
        ("[endpoints.x]\nkind = 'openai'\n", "line 1: endpoints.x: base_url is missing"),
        ("[endpoints.x]\nbase_url = 'ftp://a'\n", "expected http://… or https://…"),
        ("[endpoints.x]\nbase_url = 'http://a'\napi_key = 'sk-123'\n", "a key in clear"),
        ("[evaluate]\nalpha = 0.9\n", "expected a number between 0.0 and 0.5"),
        ("[dashboard]\nadmin_key = 'open-sesame'\n", "line 2: dashboard.admin_key: a key in clear"),
        ("[dashboard]\nlisten = '8081'\n", "expected HOST:PORT"),
        ("[redact]\nrules = ['email', 'iban']\n", "line 2: redact.rules"),
        ("[redact]\nrules = ['email']\nmode = 'hash'\n", "expected a salt"),
        ("[store]\nkeep_days = -1\n", "line 2: store.keep_days: -1.0: expected a number from 0 on"),
        ("[aliases.a]\nmodel = 'x/m'\nweights = { 'y/m' = 1 }\n", "line 3: aliases.a.weights: 'y/m': no"),
        ("[aliases.a]\nmodel = 'x/m'\nweights = { 'x/m' = -1 }\n", "-1.0 for 'x/m': expected a number"),
        ("[aliases.a]\nmodel = 'x/m'\nweights = { 'x/m' = 0 }\n", "all are 0"),
        ("[redact]\nsalt = 'pepper'\n", "line 2: redact.salt: a key in clear"),
        ("[redact]\n[redact.patterns]\nx = '('\n", "line 3: redact.patterns.x: '(': not a regular"),
        ("[drill]\nalias = 'nobody'\n", "no [aliases.nobody]"),
        ("[gateway\n", "not TOML"),
    ],
)
def test_each_fault_names_value_and_fix(text: str, says: str) -> None:
    assert says in "\n".join(faults_of(text))


def test_a_key_in_clear_is_never_repeated_in_the_message() -> None:
    faults = faults_of("[endpoints.x]\nbase_url = 'http://a'\napi_key = 'sk-verysecret'\n")
    assert "verysecret" not in "\n".join(faults)


def test_a_missing_file_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="understudy init"):
        config.load(tmp_path / "understudy.toml")


def test_the_templates_other_vendors_need_but_their_marks_taken_away() -> None:
    lines = template().splitlines()
    begin, end = lines.index("# [endpoints.anthropic]"), lines.index("[redact]")
    lines[begin:end] = [line.removeprefix("# ").removeprefix("#") for line in lines[begin:end]]
    loaded = config.parse("\n".join(lines), "understudy.toml", Path())
    assert [endpoint.kind for endpoint in loaded.endpoints.values()] == ["openai", "anthropic", "gemini"]
    assert loaded.aliases["claude"].fallback == ["gemini/gemini-2.5-pro", "openai/gpt-4.1"]


def test_the_template_is_valid_and_explains_every_field() -> None:
    loaded = config.parse(template(), "understudy.toml", Path())
    assert loaded.aliases["assistant"].model == "openai/gpt-4.1"
    uncommented = template().replace("\n# ", "\n")
    kinds = (
        config.Gateway,
        config.Store,
        config.Alias,
        config.Redact,
        config.Serve,
        config.Own,
        config.Evaluate,
    )
    for kind in (*kinds, config.Dashboard, config.Drill):
        documents = field_documents(kind)
        assert set(documents) == set(kind.__struct_fields__), kind
        assert all(f"\n{name} = " in uncommented for name in documents)


def test_secrets_come_from_environment_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "abc")
    (tmp_path / "key").write_text("def\n")
    assert config.resolve_secret("env:THE_KEY", tmp_path) == "abc"
    assert config.resolve_secret("file:key", tmp_path) == "def"
    assert config.resolve_secret("", tmp_path) == ""
    with pytest.raises(InputError, match="export NOT_SET="):
        config.resolve_secret("env:NOT_SET", tmp_path)


def test_package_paths_resolve_inside_an_installed_package() -> None:
    assert config.resolve_path("package:click/core.py", Path()).is_file()
    with pytest.raises(InputError, match="no-such-package"):
        config.resolve_path("package:no_such_package/x", Path())
