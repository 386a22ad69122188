"""The log at Weights & Biases: a real one, offline; and whatever can go wrong, by a stand-in."""

import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

import CNN
import train


@pytest.fixture
def fake(monkeypatch) -> MagicMock:
    """A stand-in for the module wandb; its run is online, under the id abc."""
    fake = MagicMock()
    fake.init.return_value.configure_mock(id="abc", offline=False, url="https://wandb/abc")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_without_a_key_the_real_log_is_offline_and_whole(run_train, tmp_path, monkeypatch):
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))
    status, _, err = run_train("--wandb", "--lr", 0.00321)
    wandb.teardown()
    assert status == 0
    first = err.splitlines()[0]
    assert first.startswith(f"wandb: logging offline; send it with: wandb sync {tmp_path}/")
    assert "warning" not in err
    (log,) = Path(first.rpartition(" ")[2]).glob("run-*.wandb")
    data, block, header = log.read_bytes(), 32_768, 7  # bytes: LevelDB's form
    data = b"".join(data[i + header : i + block] for i in range(0, len(data), block))
    test = CNN.load(tmp_path / "model.pt").figures["test"]
    names = [f"{part}/{name}" for part in ("val", "test") for name in test]
    words = ("train/loss", "lr", "test/confusion_table", "emnist-cnn", "0.00321")
    for text in (*words, *names, json.dumps(test["nll"])):
        assert text.encode() in data, text


def test_curves_chart_and_artifact_are_logged_by_step(run_train, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "REPORT_STEPS", 5)
    status, _, err = run_train("--wandb")
    run, rows = fake.init.return_value, {}
    assert status == 0
    assert err.splitlines()[0] == "wandb: logging https://wandb/abc"
    for call in run.log.call_args_list:
        for name, value in call.args[0].items():
            rows.setdefault(name, {})[call.kwargs.get("step")] = value
    assert list(rows["train/loss"]) == list(rows["lr"]) == [5, 8, 10, 15, 16, 20, 24]
    assert rows["lr"][5] == pytest.approx(0.003)  # the last step of the warm-up
    assert list(rows["val/accuracy"]) == list(rows["val/nll"]) == [8, 16, 24]
    assert f"validation nll {rows['val/nll'][16]:.4f}" in err
    test = CNN.load(tmp_path / "model.pt").figures["test"]
    run.summary.update.assert_called_once_with({f"test/{k}": v for k, v in test.items()})
    _, truth, answers, characters = fake.plot.confusion_matrix.call_args.args
    assert (len(truth), len(answers), characters) == (72, 72, list(CNN.ALPHABET))
    assert [call[0] for call in run.mock_calls[-2:]] == ["log_artifact", "finish"]


def test_mode_is_the_users_or_online_with_a_key_or_offline(run_train, fake, monkeypatch):
    for mode, key, chosen in (("", False, "offline"), ("", True, None), ("disabled", False, None)):
        fake.login.return_value = key
        if mode:
            monkeypatch.setenv("WANDB_MODE", mode)
        assert run_train("--wandb", "--epochs", 1).status == 0
        assert fake.init.call_args.kwargs["mode"] == chosen  # None lets WANDB_MODE decide


def test_resumed_training_goes_on_with_its_run(run_train, fake, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(CNN, "save", MagicMock(side_effect=OSError("full")))
        assert run_train("--wandb").status == 1
    assert fake.init.call_args.kwargs["id"] is None
    assert run_train("--wandb", "--resume").status == 0
    assert fake.init.call_args.kwargs["id"] == "abc"


def test_no_wandb_needs_none(run_train, fake, monkeypatch):
    for module in (fake, None):  # the import of None fails
        monkeypatch.setitem(sys.modules, "wandb", module)
        status, _, err = run_train("--no-wandb", "--epochs", 1)
        assert status == 0
        assert "wandb: " not in err
    assert fake.mock_calls == []


@pytest.mark.parametrize("error", [RuntimeError("no\nluck"), SystemExit("no luck")])
@pytest.mark.parametrize("call", ["import", "init", "log", "log later", "log_artifact", "finish"])
def test_failing_wandb_is_one_warning(run_train, fake, tmp_path, monkeypatch, call, error):
    run = fake.init.return_value
    failing = {"init": fake.init, "log later": run.log}.get(call) or getattr(run, call)
    failing.side_effect = [None, None, error] if call == "log later" else error
    if call == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    status, _, err = run_train("--wandb", "--epochs", 2)
    assert status == 0
    assert CNN.load(tmp_path / "model.pt").figures["test"]["accuracy"] >= 0
    (line,) = [line for line in err.splitlines() if "warning: " in line or line == "luck"]
    assert line.startswith("warning: wandb: ")
    assert line.endswith(": training goes on without its log")
