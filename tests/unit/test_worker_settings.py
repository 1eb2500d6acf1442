"""A wrong setting is refused at start, by its name; a misspelt one is not ignored."""

import os
from pathlib import Path

import pytest

from rollpool.schemas import SettingsError
from rollpool.worker.settings import WorkerSettings, load_settings


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of ours, and a directory without a file."""
    for name in list(os.environ):
        if name.upper().startswith("ROLLPOOL_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def load(monkeypatch: pytest.MonkeyPatch, **environment: str) -> WorkerSettings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def test_the_defaults_need_nothing() -> None:
    assert load_settings() == WorkerSettings()


@pytest.mark.parametrize(
    "name", ["ROLLPOOL_LEASE", "ROLLPOOL_LEASE_S__X", "ROLLPOOL_ENGINE_TP_SIZE", "rollpool_oversubscribtion"]
)
def test_a_misspelt_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}: there is no such setting; there are .*LEASE_S"):
        load(monkeypatch, **{name: "3"})


def test_a_misspelt_setting_of_the_engine_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"engine\.tpsize: "):
        load(monkeypatch, ROLLPOOL_ENGINE__TPSIZE="4")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ROLLPOOL_LEASE_S", "0.1", r"lease_s: .*greater than or equal to 0\.5 \(got '0\.1'\)"),
        ("ROLLPOOL_LEASE_S", "inf", "lease_s: "),
        ("ROLLPOOL_LEASE_S", "nan", "lease_s: "),
        ("ROLLPOOL_DRAIN_S", "soon", "drain_s: .*valid number"),
        ("ROLLPOOL_HEARTBEAT_S", "0", "heartbeat_s: "),
        ("ROLLPOOL_MAX_ATTEMPTS", "0", "max_attempts: "),
        ("ROLLPOOL_OVERSUBSCRIPTION", "0.5", "oversubscription: "),
        ("ROLLPOOL_ENGINE__TP_SIZE", "0", r"engine\.tp_size: "),
        ("ROLLPOOL_ENGINE__URL", "localhost:30000", r"engine\.url: "),
        ("ROLLPOOL_ENGINE", "{not json", "engine.*: "),
        ("ROLLPOOL_ENGINE__EXTRA_ARGS", '["--dp-size", "2"]', "--dp-size 2: .*one v4-8 TPU VM"),
        ("ROLLPOOL_ENGINE__EXTRA_ARGS", '["--dp-size=2"]', "--dp-size 2: .*one v4-8 TPU VM"),
        ("ROLLPOOL_ENGINE__EXTRA_ARGS", '["--port", "1"]', r"--port belongs to engine\.port"),
        ("ROLLPOOL_CONFIG", "/no/such/file.toml", "ROLLPOOL_CONFIG names /no/such/file.toml"),
    ],
)
def test_a_wrong_value_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load(monkeypatch, **{name: value})


def test_the_engine_is_set_as_json_and_its_parts_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, ROLLPOOL_ENGINE='{"tp_size": 4, "model_path": "/m"}', ROLLPOOL_ENGINE__TP_SIZE="2")
    assert (settings.engine.tp_size, settings.engine.model_path) == (2, "/m")


def test_flags_win_over_the_environment_which_wins_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rollpool.toml").write_text("lease_s = 5\nmax_attempts = 7\ndrain_s = 3\n[engine]\ntp_size = 4\n")
    monkeypatch.setenv("ROLLPOOL_MAX_ATTEMPTS", "8")
    monkeypatch.setenv("ROLLPOOL_DRAIN_S", "4")
    settings = load_settings(drain_s=1)
    assert (settings.lease_s, settings.max_attempts, settings.drain_s, settings.engine.tp_size) == (5, 8, 1, 4)


def test_a_file_elsewhere_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "host.toml"
    file.write_text("lease_s = 5\n")
    assert load(monkeypatch, ROLLPOOL_CONFIG=str(file)).lease_s == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("leas_s = 5\n", "leas_s: "),
        ("[engine]\ntp = 4\n", r"engine\.tp: "),
        ("lease_s = \n", r"rollpool\.toml: "),
        ('lease_s = "\\x"\n', r"rollpool\.toml: "),
    ],
)
def test_a_wrong_file_is_refused_by_name(text: str, said: str) -> None:
    Path("rollpool.toml").write_text(text)
    with pytest.raises(SettingsError, match=said):
        load_settings()


def test_a_file_that_cannot_be_read_is_refused_by_name() -> None:
    Path("rollpool.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"rollpool\.toml: "):
        load_settings()


def test_the_trainers_variables_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, ROLLPOOL_POOL="math", ROLLPOOL_RUN="grpo-7", ROLLPOOL_URL="redis://elsewhere")
