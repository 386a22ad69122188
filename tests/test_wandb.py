"""The run's log with the real wandb: written, synced, and whatever can go wrong with it.

Each training runs in a process of its own, forked from one that has imported train.py already, and
ends as any script does, exit hooks and all. A server on 127.0.0.1 stands in for wandb's.
"""

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import train

LIMIT = 5.0  # seconds; the tests' own LOG_SECONDS
EXIT = 5.0  # seconds for the interpreter to end on a busy machine; torch alone takes 0.6
KEY = "0123456789" * 4

TRAININGS = """
import json, os, resource, sys, time
from pathlib import Path
import train

def training(enabled, limit, seconds, run_id):
    log = train.Log(enabled, {"arch": "run8", "lr": 0.5, "data": Path("data")}, run_id, limit)
    blocked, end, step = 0.0, time.monotonic() + seconds, 0
    while time.monotonic() < end:
        start = time.monotonic()
        log.metrics(step, **{"train/loss": 1 / (step + 1), "lr": 0.25})
        if step % 5 == 4:
            log.metrics(step, epoch=step // 5, **{"val/loss": 0.75, "val/accuracy": 0.875})
        blocked, step = max(blocked, time.monotonic() - start), step + 1
        time.sleep(0.05)
    Path("model.pt").write_bytes(b"weights" * 200)
    confusion = [[7 if a == p else int(p == 3) for p in range(36)] for a in range(36)]
    start = time.monotonic()
    log.finish({"accuracy": 0.9375, "nll": 0.1875}, confusion, Path("model.pt"))
    blocked = max(blocked, time.monotonic() - start)
    log.close()
    closing = time.monotonic() - start
    print(json.dumps({"run_id": log.run_id, "blocked": blocked, "closing": closing,
                      "steps": step, "imported": "wandb" in sys.modules, "end": time.time()}))

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    os.chdir(order["folder"])
    ours, theirs = os.openpty()
    child = os.fork()
    if child:
        print(child, flush=True)
        status, ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.time()
        if order["terminal"]:
            Path("stderr").write_bytes(os.read(ours, 2**16))
        print(json.dumps([status, ended]), flush=True)
        os.close(ours), os.close(theirs)
        continue
    for stream, name in ((0, "/dev/null"), (1, "stdout"), (2, "stderr")):
        terminal = order["terminal"] and stream != 1
        os.dup2(theirs if terminal else os.open(name, os.O_RDWR | os.O_CREAT), stream)
    os.environ.update(order["environ"])
    sys.path[:0] = order["path"]
    if order["file_size"]:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_size"], hard))
    training(**order["training"])
    if order["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # coverage writes at the end
    break  # and end as a script does
"""


@dataclass
class Outcome:
    """What a training left: its figures, all that it said, and how it ended."""

    status: int
    said: list[str]  # lines on stderr
    folder: Path
    run_id: str
    blocked: float  # seconds, the longest call of a method but close
    closing: float  # seconds in close
    exiting: float  # seconds from the script's last line to the end of its process
    imported: bool
    steps: int

    def assert_unharmed(self, limit: float = LIMIT) -> None:
        assert self.status == 0
        assert self.blocked < 0.5
        assert self.closing < limit + 1
        assert self.exiting < EXIT


class Trainings:
    """Starts trainings one after another in forks of one process."""

    def __init__(self) -> None:
        paths = [str(Path(train.__file__).parent), *sys.path]
        environ = {name: value for name, value in os.environ.items() if "WANDB" not in name}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", TRAININGS],
            env=environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(
        self,
        folder: Path,
        *,
        seconds: float = 0.5,
        enabled: bool = True,
        run_id: str | None = None,
        path: tuple[str, ...] = (),
        file_size: int = 0,
        terminal: bool = False,
        strike: Callable[[int, Path], None] | None = None,
        **environ: str,
    ) -> Outcome:
        """Train for some seconds in a folder; `strike` is called with its process meanwhile."""
        home = {"HOME": str(folder), "NETRC": str(folder / "netrc"), "WANDB_DIR": str(folder)}
        training = {"enabled": enabled, "limit": LIMIT, "seconds": seconds, "run_id": run_id}
        order = {"folder": str(folder), "environ": home | environ, "training": training}
        order |= {"path": path, "file_size": file_size, "terminal": terminal}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        process = int(self.process.stdout.readline())
        try:
            if strike:
                strike(process, folder)
        finally:
            status, ended = json.loads(self.process.stdout.readline())
        figures = json.loads((folder / "stdout").read_text() or '{"end": 0}')
        exiting = ended - figures.pop("end")
        said = (folder / "stderr").read_text().splitlines()
        return Outcome(status=status, said=said, folder=folder, exiting=exiting, **figures)


@pytest.fixture(scope="module")
def trainings() -> Iterator[Trainings]:
    started = Trainings()
    yield started
    started.process.stdin.close()
    started.process.wait(10)


# A server in place of wandb's

ANSWERS = {  # to the GraphQL operations of wandb 0.31, as far as a run needs them
    "UpsertBucket": {
        "upsertBucket": {
            "bucket": {
                "id": "B",
                "name": "",
                "displayName": "brave-run-1",
                "project": {"id": "P", "name": "emnist", "entity": {"id": "E", "name": "me"}},
            },
            "inserted": True,
        }
    },
    "RunResumeStatus": {"model": {"id": "P", "name": "emnist", "bucket": None}},
    "Viewer": {"viewer": {"id": "V", "entity": "me", "username": "me", "teams": {"edges": []}}},
    "ArtifactType": {"project": {"artifact": None}},
    "CreateArtifact": {
        "createArtifact": {
            "artifact": {
                "id": "A",
                "state": "COMMITTED",
                "artifactSequence": {"latestArtifact": {"id": "A"}},
            }
        }
    },
}


class Request(http.server.BaseHTTPRequestHandler):
    """One request, answered as the server's `mood` is."""

    def do_POST(self) -> None:
        server, body = self.server.owner, self.rfile.read(int(self.headers["Content-Length"]))
        is_json = self.headers["Content-Type"] == "application/json"
        query = json.loads(body) if is_json and body.startswith(b"{") else {}
        text = query.get("query", "")
        operation = re.search(r"\b(?:query|mutation) (\w+)", text)
        name = operation[1] if operation else self.path.split("/")[-1]
        server.received.append((name, query))
        if server.mood == "stalls" or (server.mood == "stalls later" and len(server.received) > 2):
            server.released.wait(60)
        code = server.mood if isinstance(server.mood, int) else 200
        answer = ANSWERS.get(name, {})
        if name == "UpsertBucket":
            answer["upsertBucket"]["bucket"]["name"] = query["variables"]["name"]
        if name == "CreateRunFiles":
            names = query["variables"]["files"]
            files = [{"name": file, "uploadUrl": f"{server.address}/put/{file}"} for file in names]
            answer = {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
        content = json.dumps({"data": answer}).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_POST  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@dataclass
class Server:
    """An HTTP server on 127.0.0.1 that answers like wandb's, or not."""

    mood: int | str = "well"
    received: list[tuple[str, dict]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def environ(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": KEY}

    def history(self) -> list[dict]:
        """Return the rows of the run's history that have arrived."""
        rows = []
        for name, query in self.received:
            if name == "file_stream":
                lines = query.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
                rows += [json.loads(line) for line in lines]
        return rows

    def summary(self) -> dict:
        streams = [query["files"] for name, query in self.received if name == "file_stream"]
        contents = [
            files["wandb-summary.json"]["content"]
            for files in streams
            if len(files) > 0 and "wandb-summary.json" in files
        ]
        return json.loads(contents[-1][-1])

    def variables(self, operation: str) -> list[dict]:
        return [query["variables"] for name, query in self.received if name == operation]


@pytest.fixture
def server() -> Iterator[Server]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Request) as listener:
        listener.daemon_threads, listener.block_on_close = True, False
        listener.owner = Server(address=f"http://127.0.0.1:{listener.server_port}")
        threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        yield listener.owner
        listener.owner.released.set()
        listener.shutdown()


def assert_whole(server: Server, outcome: Outcome) -> None:
    """Assert that all of a training's log has reached the server."""
    history = server.history()
    assert [row["step"] for row in history if "train/loss" in row] == [*range(outcome.steps)]
    assert history[0]["train/loss"] == 1
    validations = [row for row in history if "val/loss" in row]
    assert [row["epoch"] for row in validations] == [*range(outcome.steps // 5)]
    assert validations[0]["val/accuracy"] == 0.875

    config = json.loads(server.variables("UpsertBucket")[-1]["config"])
    assert config["arch"] == {"value": "run8"}
    assert config["data"] == {"value": "data"}
    assert metric_axes(config) == train.LOG_AXES
    assert "confusion_matrix" in json.dumps(config["_wandb"]["value"]["visualize"])

    summary = server.summary()
    assert summary["test/accuracy"] == 0.9375
    assert summary["test/nll"] == 0.1875
    assert summary["test/confusion_table"]["nrows"] == 36 * 36
    artifacts = [variables["input"] for variables in server.variables("CreateArtifact")]
    assert "model" in [artifact["artifactTypeName"] for artifact in artifacts]
    buckets = server.variables("UpsertBucket")
    assert {variables["name"] for variables in buckets} == {outcome.run_id}


def metric_axes(config: dict) -> dict[str, str]:
    """Return the axis of each metric: wandb numbers its fields, 1 name, 2 glob, 5 axis from 1."""
    metrics = config["_wandb"]["value"]["m"]
    axes = {m.get("1") or m.get("2"): metrics[m["5"] - 1]["1"] for m in metrics if "5" in m}
    return {name: axis for name, axis in axes.items() if name in train.LOG_AXES}


def the_warning(outcome: Outcome) -> str:
    """Return the one warning; there may be the line that says where the log is, nothing else."""
    warnings = [line for line in outcome.said if line.startswith("warning: wandb: ")]
    others = [line for line in outcome.said if line not in warnings]
    assert len(warnings) == 1, outcome.said
    assert all(line.startswith("wandb: ") for line in others), outcome.said
    assert len(others) <= 1, outcome.said
    return warnings[0]


def folder_in(line: str) -> Path:
    folder = Path(re.search(r"wandb sync (\S+)$", line)[1])
    assert list(folder.glob("run-*.wandb"))
    return folder


# When all is well


def test_offline_run_can_be_sent_as_its_one_line_says(trainings, server, tmp_path):
    outcome = trainings.run(tmp_path)
    outcome.assert_unharmed()
    (line,) = outcome.said
    assert line.startswith("wandb: logging offline; send it with: wandb sync ")
    folder = folder_in(line)
    assert folder.parent == tmp_path / "wandb"

    sync = [sys.executable, "-m", "wandb", "sync", str(folder)]
    environ = os.environ | {"HOME": str(tmp_path)} | server.environ()
    subprocess.run(sync, cwd=tmp_path, env=environ, check=True, capture_output=True, timeout=30)
    assert_whole(server, outcome)


def test_user_with_a_key_logs_online(trainings, server, tmp_path):
    outcome = trainings.run(tmp_path, **server.environ())
    outcome.assert_unharmed()
    assert outcome.said == [f"wandb: {server.address}/me/emnist/runs/{outcome.run_id}"]
    assert_whole(server, outcome)


def test_key_in_netrc_is_found_and_a_resumed_training_goes_on_with_its_run(
    trainings, server, tmp_path
):
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {server.address.removeprefix('http://')} login user password {KEY}")
    netrc.chmod(0o600)
    outcome = trainings.run(tmp_path, run_id="abcd1234", WANDB_BASE_URL=server.address)
    outcome.assert_unharmed()
    assert outcome.said == [f"wandb: {server.address}/me/emnist/runs/abcd1234"]
    assert server.variables("RunResumeStatus")[0]["name"] == "abcd1234"
    assert server.variables("UpsertBucket")[0]["name"] == "abcd1234"


def test_no_wandb_means_none(trainings, tmp_path):
    outcome = trainings.run(tmp_path, enabled=False, seconds=0.1)
    outcome.assert_unharmed()
    assert outcome.said == []
    assert not outcome.imported
    assert not (tmp_path / "wandb").exists()
    assert outcome.closing < 0.1


def test_wandb_mode_disabled_is_obeyed(trainings, tmp_path):
    outcome = trainings.run(tmp_path, WANDB_MODE="disabled")
    outcome.assert_unharmed()
    assert outcome.said == []
    assert not list(tmp_path.glob("wandb/*run-*"))


def test_wandb_mode_offline_is_obeyed_in_spite_of_a_key(trainings, server, tmp_path):
    outcome = trainings.run(tmp_path, WANDB_MODE="offline", **server.environ())
    outcome.assert_unharmed()
    assert folder_in(outcome.said[0])
    assert server.received == []


# When something is wrong


def test_terminal_without_a_key_is_not_asked_for_one(trainings, tmp_path):
    outcome = trainings.run(tmp_path, terminal=True)
    outcome.assert_unharmed()
    (line,) = outcome.said
    assert folder_in(line)


@pytest.mark.parametrize("terminal", [True, False])
def test_wandb_mode_online_without_a_key_does_not_ask(trainings, tmp_path, terminal):
    outcome = trainings.run(tmp_path, terminal=terminal, WANDB_MODE="online")
    outcome.assert_unharmed()
    assert "No API key configured" in the_warning(outcome)


def test_malformed_key(trainings, tmp_path):
    outcome = trainings.run(tmp_path, WANDB_API_KEY="abc")
    outcome.assert_unharmed()
    assert "API key must have" in the_warning(outcome)
    assert folder_in(the_warning(outcome))


def test_refusing_server(trainings, tmp_path):
    environ = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
    outcome = trainings.run(tmp_path, **environ)
    outcome.assert_unharmed()
    assert "logging offline: " in the_warning(outcome)
    assert "connection refused" in the_warning(outcome)
    assert folder_in(the_warning(outcome))


@pytest.mark.parametrize("mood", [401, 500, "stalls"])
def test_server_that_fails_from_the_start(trainings, server, tmp_path, mood):
    server.mood = mood
    outcome = trainings.run(tmp_path, **server.environ())
    outcome.assert_unharmed()
    assert "logging offline: " in the_warning(outcome)
    assert folder_in(the_warning(outcome))


def test_server_that_stalls_at_the_end(trainings, server, tmp_path):
    server.mood = "stalls later"
    outcome = trainings.run(tmp_path, **server.environ())
    outcome.assert_unharmed()
    assert folder_in(the_warning(outcome))
    assert services(tmp_path) == []


def services(folder: Path) -> list[int]:
    """Return the processes of wandb's service that a training in this folder has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            program = (path / "cmdline").read_bytes().split(b"\0")[0]
            if b"wandb-core" in program and os.readlink(path / "cwd") == str(folder):
                found.append(int(path.name))
        except OSError:  # it is gone
            continue
    return found


def strike_with(number: signal.Signals) -> Callable[[int, Path], None]:
    def strike(process: int, folder: Path) -> None:
        deadline, said = time.monotonic() + 10, folder / "stderr"
        while time.monotonic() < deadline and not (said.exists() and "sync" in said.read_text()):
            time.sleep(0.05)
        (service,) = services(folder)
        os.kill(service, number)

    return strike


def test_killed_service(trainings, tmp_path):
    outcome = trainings.run(tmp_path, seconds=3, strike=strike_with(signal.SIGKILL))
    outcome.assert_unharmed()
    assert "Connection" in the_warning(outcome)
    assert outcome.closing < 1


def test_hanging_service(trainings, tmp_path):
    outcome = trainings.run(tmp_path, seconds=3, strike=strike_with(signal.SIGSTOP))
    outcome.assert_unharmed()
    assert f"not done {LIMIT:g} s after the training" in the_warning(outcome)
    assert services(tmp_path) == []


def test_file_limit_like_a_full_disk(trainings, tmp_path):
    outcome = trainings.run(tmp_path, file_size=8 * 2**10)
    outcome.assert_unharmed()
    assert "File too large" in the_warning(outcome)


@pytest.mark.parametrize("size", ["4k", "32k"])
def test_full_disk(trainings, tmp_path, size):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk; test_file_limit covers others")
    try:
        outcome = trainings.run(tmp_path, WANDB_DIR=str(small))
        outcome.assert_unharmed()
        assert re.search("disk is full|No space left", the_warning(outcome))
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("source", "reason"),
    [("raise ImportError('no libfoo')", "no libfoo"), ("import time; time.sleep(60)", "not done")],
    ids=["fails", "hangs"],
)
def test_import_of_wandb(trainings, tmp_path, source, reason):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "wandb.py").write_text(source)
    outcome = trainings.run(tmp_path, path=(str(broken),))
    outcome.assert_unharmed()
    assert reason in the_warning(outcome)


def test_folder_that_cannot_be_written(trainings, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    folders = {"WANDB_DIR": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "tmp")}
    outcome = trainings.run(tmp_path, **folders)
    outcome.assert_unharmed()
    assert folder_in(outcome.said[0]).is_relative_to(tmp_path / "tmp")  # wandb's own way out


def test_full_queue_drops_with_a_warning(monkeypatch, capsys):
    busy = threading.Event()
    monkeypatch.setattr(train, "LOG_QUEUE", 3)
    monkeypatch.setattr(train.Log, "_open", lambda self, config: busy.wait(10))
    log = train.Log(True, {}, limit=1)
    for step in range(9):
        log.metrics(step, loss=0.5)
    log.close()
    busy.set()
    said = capsys.readouterr().err
    assert said == "warning: wandb: 3 entries are waiting, new ones are dropped\n"


def test_limit_is_what_the_readme_promises():
    assert train.LOG_SECONDS <= 30
