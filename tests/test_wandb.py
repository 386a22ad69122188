"""The log at Weights & Biases: a real one, offline; and whatever can go wrong, by a stand-in."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest

import CNN


@pytest.fixture
def fake(monkeypatch) -> MagicMock:
    """A stand-in for the module wandb; its run is online, under the id abc."""
    fake = MagicMock()
    fake.init.return_value.configure_mock(id="abc", offline=False, url="https://wandb/abc")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


@pytest.fixture
def at_home(tmp_path, monkeypatch) -> Iterator[None]:
    """Let the real wandb know no key and no settings, and write into tmp_path."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))
    import wandb

    yield
    wandb.teardown()


def test_without_a_key_the_real_log_is_offline_and_whole(run_train, at_home, tmp_path):
    status, _, err = run_train("--wandb", "--lr", 0.00321)
    assert status == 0
    first = err.splitlines()[0]
    assert first.startswith(f"wandb: logging offline; send it with: wandb sync {tmp_path}/")
    assert "warning" not in err
    (log,) = Path(first.rpartition(" ")[2]).glob("run-*.wandb")
    data, block, header = log.read_bytes(), 32_768, 7  # bytes: LevelDB's form
    data = b"".join(data[i + header : i + block] for i in range(0, len(data), block))
    test = CNN.load(tmp_path / "model.pt").card.metrics["test"]
    names = [f"{part}/{name}" for part in ("val", "test") for name in test]
    words = ("train/loss", "lr", "0.00321")
    for text in (*words, *names, json.dumps(test["nll"])):
        assert text.encode() in data, text


def test_the_users_mode_decides_also_without_a_key(run_train, fake, monkeypatch):
    fake.login.return_value = False
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert run_train("--wandb", "--epochs", 1).status == 0
    assert "mode" not in fake.init.call_args.kwargs


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("WANDB_API_KEY", "too-short", "API key must"),
        ("WANDB_MODE", "ofline", "WANDB_MODE ofline: "),
    ],
)
def test_a_malformed_key_or_mode_is_named_and_the_log_offline(
    run_train, at_home, tmp_path, monkeypatch, name, value, found
):
    monkeypatch.setenv(name, value)
    status, _, err = run_train("--wandb", "--epochs", 1)
    assert status == 0
    warning, line, *_ = err.splitlines()
    assert warning.startswith("warning: wandb: ")
    assert found in warning
    assert line.startswith(f"wandb: logging offline; send it with: wandb sync {tmp_path}/")


def test_resumed_training_goes_on_with_its_run(run_train, fake, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(CNN, "save", MagicMock(side_effect=KeyboardInterrupt))
        assert run_train("--wandb").status == 130
    assert fake.init.call_args.kwargs["id"] is None
    assert "mode" not in fake.init.call_args.kwargs  # a key is known, so online
    assert run_train("--wandb", "--resume").status == 0
    assert fake.init.call_args.kwargs["id"] == "abc"


@pytest.mark.parametrize("call", ["import", "log", "finish"])
def test_failing_wandb_is_one_warning(run_train, fake, tmp_path, monkeypatch, call):
    run, error = fake.init.return_value, RuntimeError("no\nluck")
    getattr(run, call).side_effect = [None, error] if call == "log" else error
    if call == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    status, _, err = run_train("--wandb", "--epochs", 1)
    assert status == 0
    assert CNN.load(tmp_path / "model.pt").card.metrics["test"]["accuracy"] >= 0
    lines = [line for line in err.splitlines() if "warning: " in line or line == "luck"]
    (line,) = lines
    assert line.startswith("warning: wandb: ")
    assert line.endswith(": training goes on without its log")
