"""inference.py: what it reads, what it answers, in which form, and with which exit code."""

import csv
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from strokes import drawn

import CNN
import inference
from inference import Picture
from picture import prepare

HOSTILE = (  # names that paths can have on Linux, each of a picture
    b'comma, and "quote".png',
    b"new\nline.png",
    b"return\r.png",
    b"escape\x1b[31m.png",
    b"not utf-8 \xff\xfe.png",
    b"tab\t and back\\slash.png",
    "über \u202egnp.\u2028.png".encode(),
    b"<script>alert(1)<\\script>.png",
    b"-rf.png",
    b"=1+1.PNG",
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 36 characters and some with hostile names, with a blank, a wreck and a text."""
    top = tmp_path_factory.mktemp("pictures")
    for i, character in enumerate(CNN.ALPHABET):
        place = top / f"part{i % 3}" / ("deep" if i % 2 else ".")
        place.mkdir(parents=True, exist_ok=True)
        drawn(character, 40 + i % 7, seed=i).save(place / f"{i:03d}_{character}.png")
    for i, name in enumerate(HOSTILE):
        drawn("3AQ7"[i % 4], 48, seed=i).save(top / os.fsdecode(name), "PNG")
    Image.new("L", (30, 30), 90).save(top / "blank.png")
    (top / "wreck.jpg").write_bytes(b"\xff\xd8\xff\xe0 and nothing more")
    (top / "notes.txt").write_text("not a picture")
    return top


@pytest.fixture
def run(weights: Path, capfdbinary: pytest.CaptureFixture) -> Callable:
    """Run the command in this process; return exit code, stdout and stderr."""

    def run_in_process(*arguments: object) -> tuple[int, bytes, str]:
        capfdbinary.readouterr()
        try:
            alone = ["--model", str(weights), "--no-adapt"]  # see test_adapting.py for others
            code = inference.main([*alone, *map(str, arguments)])
        except SystemExit as end:  # argparse's
            code = end.code
        out, err = capfdbinary.readouterr()
        return code, out, err.decode()

    return run_in_process


@pytest.fixture(scope="module")
def answered(weights: Path, folder: Path) -> dict[str, bytes]:
    """What the command writes about the folder, by format, each with all characters."""
    texts = {}
    for form in inference.LINES:
        output = weights.with_name(form)
        flags = ["--model", weights, "--no-adapt", "--topk", 36, "--output", output]
        inference.main(["--input", str(folder), "--format", form, *map(str, flags)])
        texts[form] = output.read_bytes()
    return texts


def rows(text: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text.decode("utf-8", "surrogateescape"), newline="")))


def entries(text: bytes) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# What it reads


def test_orientation_flags_are_obeyed(run, tmp_path):
    upright = drawn(side=80).crop((10, 0, 70, 80))
    t = Image.Transpose
    stored_as = {2: t.FLIP_LEFT_RIGHT, 3: t.ROTATE_180, 4: t.FLIP_TOP_BOTTOM, 5: t.TRANSPOSE}
    stored_as |= {6: t.ROTATE_90, 7: t.TRANSVERSE, 8: t.ROTATE_270}
    for flag, turn in stored_as.items():
        exif = Image.Exif()
        exif[0x112] = flag
        for suffix in ("jpg", "png", "webp", "tif"):
            upright.transpose(turn).save(tmp_path / f"{flag}.{suffix}", exif=exif)
    code, out, _ = run("--input", tmp_path, "--model", ROOT / "model.pt")  # 0: all answered
    assert (code, {line[:3] for line in out.splitlines()}) == (0, {b"070"})


# What it finds


def test_order_is_that_of_inputs_then_a_folders_pictures_then_its_folders(
    run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tree = ["2.png", "a.PNG", "B/1.png", "a/0.png", "a/b/1.png", "a b/1.png", "a.b/1.png"]
    for name in [*tree[::-1], "noted.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        drawn().save(tmp_path / name, "PNG")
    code, out, err = run("--input", "./a/", "noted.txt", ".", "a", "--format", "json")
    first = ["a/0.png", "a/b/1.png", "noted.txt"]  # what is given twice counts once
    others = [f"./{path}" for path in tree if path not in first]
    assert code == 0
    assert [entry["path"] for entry in entries(out)] == first + others
    assert "8 pictures: 8 answered, 1 other files passed over" in err
    (tmp_path / "empty").mkdir()
    code, out, err = run("--input", "empty")
    assert (code, out, "0 pictures: none found" in err) == (1, b"", True)


def test_no_path_begins_as_a_formula(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["+1.png", "-1.png", "=1.png", "@1.png", "\t1.png"]
    for name in names:
        drawn().save(tmp_path / name)
    _, out, _ = run("--input", ".", "--format", "csv")
    assert {row["path"] for row in rows(out)} == {f"./{name}" for name in names}
    assert inference.list_pictures(names)[0] == [f"./{name}" for name in names]


def test_what_is_hidden_and_links_to_folders_are_passed_over_in_silence(run, tmp_path):
    hidden = [".hidden.png", "__MACOSX/._seen.png", ".venv/logo.png", "a/.git/b.png"]
    for name in ("a/seen.png", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        drawn().save(tmp_path / name)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "loop.png").symlink_to(tmp_path)
    _, out, err = run("--input", tmp_path, tmp_path / ".venv")  # but for what is named
    read = [line[5:] for line in out.decode().splitlines()]
    assert read == [f"{tmp_path}/a/seen.png", f"{tmp_path}/.venv/logo.png"]
    assert err.startswith("2 pictures: 2 answered (")


def test_memory_stays_flat_over_many_pictures(run, tmp_path, monkeypatch):
    class Pool:
        """Of workers that find every picture blank."""

        def __init__(self, *arguments: object, **options: object) -> None:
            self.stop = self.join = lambda: None

        def schedule(self, work: Callable, arguments: tuple = (), timeout: float = 0) -> Future:
            future = Future()
            if work is inference.do_all:
                task, paths = arguments
                blank = Picture("", error=inference.BLANK, thumbnail="x" * 10_000)
                is_first = task.func is inference.read_picture
                future.set_result([blank._replace(path=p) if is_first else [] for p in paths])
            return future

    monkeypatch.setattr(inference, "ProcessPool", Pool)
    (tmp_path / "in").mkdir()
    for i in range(5000):
        (tmp_path / "in" / f"{i}.png").touch()
    run("--input", tmp_path / "in" / "0.png")  # imports, caches
    tracemalloc.start()
    run("--input", tmp_path / "in", "--report", tmp_path / "page.html", "--format", "json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "page.html").stat().st_size > 5000 * 10_000 > 3 * peak


# What it answers


def test_answers_are_those_of_the_net_alone(run, folder):
    """By another route: the plain net in float32, which sees each picture's first reading."""
    model = ROOT / "model.pt"
    _, out, _ = run("--input", folder, "--format", "json", "--model", model)
    net = CNN.load(model)
    answered = [entry for entry in entries(out) if entry["character"]]
    images = np.stack([prepare(entry["path"], CNN.SIZE) for entry in answered])
    logits, _ = CNN.predict(net, torch.from_numpy(images))
    p = (logits / net.card.temperature).softmax(1)
    of_net = [row[CNN.ALPHABET.index(e["character"])] for row, e in zip(p, answered, strict=True)]
    near = [abs(q - e["confidence"]) < 0.06 for q, e in zip(of_net, answered, strict=True)]
    assert sum(near) > 0.7 * len(answered) > 20  # the others are in doubt: all readings are seen


def test_the_same_answers_for_any_batch_size_and_number_of_workers(
    run, folder, answered, monkeypatch
):
    monkeypatch.setattr(inference, "CHUNK", 16)  # or there is work for one alone
    flags = ("--input", folder, "--format", "csv", "--topk", 36)
    assert run(*flags, "--batch-size", 7, "--workers", 3)[1] == answered["csv"]


def test_an_alphabet_restricts(run, folder):
    flags = ("--input", folder / "part0", "--format", "json", "--topk", 36, "--model")
    every = entries(run(*flags, ROOT / "model.pt")[1])
    restricted = entries(run(*flags, ROOT / "model.pt", "--alphabet", "0-3x")[1])
    kept = 0
    for line, few in zip(every, restricted, strict=True):
        assert {few["character"], *few["alternatives"]} - {None} == set("0123X")
        if line["character"] in set("0123X"):
            kept += 1
            assert few["character"] == line["character"]
            assert few["confidence"] > line["confidence"] - 0.02  # what it may not be adds to it
    assert kept >= 2


def test_doubtful_answers_are_none_and_marked_in_each_format(run, folder, answered):
    found = [e for e in entries(answered["json"]) if "/part1/" in e["path"]]
    confidence = {e["path"]: e["confidence"] for e in found}
    sure = sorted(e["confidence"] for e in found if e["character"])
    limit = sure[len(sure) // 2]
    flags = ("--input", folder / "part1", "--min-confidence", limit, "--format")
    _, out, err = run(*flags, "json")
    doubtful = [e for e in entries(out) if "--min-confidence" in (e["error"] or "")]
    for entry in doubtful:
        assert entry["confidence"] == confidence[entry["path"]] <= limit
        assert (len(entry["alternatives"]), entry["character"]) == (3, None)
    assert 0.3 * len(sure) < len(doubtful) < 0.7 * len(sure)
    assert f"{len(doubtful)} doubtful" in err
    code, out, _ = run(*flags, "ascii")
    assert (code, out.count(b"---, ")) == (1, len(doubtful))


def test_lookalikes_are_named_where_the_two_best_are_of_a_group(run, folder):
    flags = ("--input", folder / "part0", "--topk", 1, "--format", "csv", "--alphabet")
    for alphabet, group in {"O0": "0O", "0A": "", "0": ""}.items():
        assert {row["lookalike"] for row in rows(run(*flags, alphabet)[1])} == {group}


# What it writes


def test_ascii_lines_are_the_origins_one_for_each_picture(run, folder):
    code, out, err = run("--input", folder)
    lines = out.decode().splitlines()
    assert code == 1
    assert len(lines) == 36 + len(HOSTILE)
    assert all(re.fullmatch(r"\d{3}, /[^\x00-\x1f\x7f]+\.(png|PNG)", line) for line in lines)
    assert {chr(int(line[:3])) for line in lines} <= set(CNN.ALPHABET)
    assert any(line.endswith(r"/new\nline.png") for line in lines)
    assert any(line.endswith(r"/not utf-8 \udcff\udcfe.png") for line in lines)
    assert any(line.endswith('/comma, and "quote".png') for line in lines)
    assert f"{folder}/blank.png: {inference.BLANK}\n" in err
    assert f"{folder}/wreck.jpg: " in err
    assert "48 pictures: 46 answered, 1 blank, 1 unreadable, 1 other files passed over" in err


def test_csv_and_json_carry_every_path_to_the_byte(folder, answered):
    of_csv = rows(answered["csv"])
    of_json = entries(answered["json"])
    on_disk = {os.fsencode(path) for path in folder.rglob("*") if path.is_file()}
    on_disk.remove(os.fsencode(folder / "notes.txt"))
    for found in (of_csv, of_json):
        assert sorted(os.fsencode(row["path"]) for row in found) == sorted(on_disk)
    for row, entry in zip(of_csv, of_json, strict=True):
        assert row["path"] == entry["path"]
        assert row["character"] == (entry["character"] or "")
        assert row["error"] == (entry["error"] or "")
        others = dict(pair.split(":") for pair in row["alternatives"].split())
        assert {c: float(p) for c, p in others.items()} == entry["alternatives"]
        p = [entry["confidence"], *entry["alternatives"].values()]
        if entry["character"]:  # what is missing of 1 is that nothing is written
            assert p == sorted(p, reverse=True)
            assert (len(p), 0.5 < sum(p) < 1.003) == (36, True)
        elif entry["error"] == inference.BLANK:
            assert (len(p), sum(p)) == (37, pytest.approx(1, abs=0.003))
        else:
            assert p == [None]
    answers = [f"{ord(row['character']):03d}".encode() for row in of_csv if row["character"]]
    assert answers == [line[:3] for line in answered["ascii"].splitlines()]


def test_an_output_replaces_what_a_link_points_to_once_it_is_whole(run, folder, answered, tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    assert run("--input", folder, "--output", tmp_path / "link")[:2] == (1, b"")
    assert (tmp_path / "old").read_bytes() == answered["ascii"]
    assert sorted(os.listdir(tmp_path)) == ["link", "old"]
    assert (tmp_path / "link").is_symlink()


def test_under_torchrun_each_process_writes_its_share(run, folder, answered, tmp_path, monkeypatch):
    flags = ("--input", folder, "--format", "csv", "--topk", 36)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")  # is another's where torchrun is not
    assert run("--help")[0] == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    report = ("--report", tmp_path / "page.html")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        # 1 would make torchrun end the others
        assert run(*flags, *report, "--output", tmp_path / "answers.csv")[:2] == (0, b"")
    parts = [(tmp_path / f"answers.{rank}.csv").read_bytes() for rank in "01"]
    assert sorted(b"".join(parts).splitlines()) == sorted(answered["csv"].splitlines())
    assert parts[0].startswith(b"path,")
    assert abs(len(rows(parts[0])) - len(rows(answered["csv"])) / 2) < 1
    assert len(list(tmp_path.iterdir())) == 4
    code, _, err = run(*flags)
    assert (code, "name it with --output" in err) == (2, True)


# How it ends

WRONG = {  # flags, by comma: what the message names
    "--alphabet,9-0": "9-0",
    "--alphabet,ß": "ß",
    "--alphabet,": "expected characters",
    "--model,missing.pt": "missing.pt",
    f"--model,{__file__}": "no weights of ours",
    "--device,abacus": "abacus",
    "--batch-size,0": "--batch-size",
    "--min-confidence,nan": "--min-confidence",
    "--timeout,inf": "--timeout",
    "--digits,nan": "--digits",
    "--output,/dev/null": "not a regular file",
    "--output,missing/out.csv": "missing/out.csv",
    "--device,meta": "try --device cpu",
    "--input,missing\x1b[2J": r"missing\x1b[2J: no such",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_usage_is_one_clear_message_and_2_with_nothing_written(
    run, folder, tmp_path, monkeypatch, flags
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("--input", folder, *flags.split(","))
    assert (code, out) == (2, b"")
    assert WRONG[flags] in err.splitlines()[-1]
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--output", "--report"])
def test_what_is_read_is_never_replaced(run, weights, folder, tmp_path, flag):
    single, part = tmp_path / "single", tmp_path / "a.partial"  # which is taken on the way to a
    drawn().save(single, "PNG")
    drawn().save(part, "PNG")
    (tmp_path / "link").symlink_to(weights)
    page = ROOT / "report.html"
    for file in (single, weights, tmp_path / "link", folder / "blank.png", page, tmp_path / "a"):
        before = {read: read.read_bytes() for read in (single, part, weights, page)}
        code, out, err = run("--input", folder, single, part, flag, file)
        assert (code, out) == (2, b"")
        assert err == f"inference.py: {flag} {file}: would replace what is read: choose another\n"
        assert {read: read.read_bytes() for read in before} == before


def test_one_output_does_not_replace_the_other(run, folder, tmp_path):
    for report in ("x", "x.partial"):
        outputs = ["--output", tmp_path / "x", "--report", tmp_path / report]
        code, _, err = run("--input", folder, *outputs)
        assert (code, "--report" in err) == (2, True)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_keeps_what_was_written(run, folder, tmp_path, disk_for):
    disk_for(1000)
    flags = ("--input", folder / "part1", "--output", tmp_path / "out", "--format", "json")
    code, out, err = run(*flags)
    disk_for(resource.RLIM_INFINITY)
    assert (code, out, err.count("\n")) == (2, b"", 1)
    assert "File too large" in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_a_disk_too_full_for_the_report_leaves_the_answers_whole(run, folder, tmp_path, disk_for):
    disk_for(20_000)  # the page alone has more
    page = tmp_path / "page.html"
    flags = ("--input", folder / "part1", "--output", tmp_path / "out", "--format", "json")
    code, _, err = run(*flags, "--report", page)
    disk_for(resource.RLIM_INFINITY)
    assert (code, err) == (2, f"inference.py: {page}: File too large\n")
    assert len(entries((tmp_path / "out").read_bytes())) == 12


# In processes of its own


def start(weights: Path, words: list, how: str = "") -> subprocess.Popen:
    """Start the command from bash, `how` after it, in a process group of its own."""
    command = [sys.executable, ROOT / "inference.py", "--model", weights, "--no-adapt", *words]
    script = f'exec "$@" {how}' if "|" not in how else f'set -o pipefail; "$@" {how}'
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = ["bash", "-c", script, "-", *map(str, command)]
    return subprocess.Popen(words, start_new_session=True, **options)


def test_who_does_not_listen_costs_no_answer(weights, folder):
    """A stderr that is closed or full; a reader that leaves, which ends it quietly."""
    flags = ["--input", folder / "part1", "--batch-size", 1]
    ways = ("2>&-", "2>/dev/full", "| head -n 1")
    processes = [start(weights, flags, how) for how in ways]
    ends = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        ends.append((process.returncode, out.count("\n"), err))
    assert ends[:2] == [(0, 12, "")] * 2
    assert (ends[2][1], "rror" in ends[2][2]) == (1, False)


def test_ctrl_c_in_a_terminal_is_one_line_whenever_it_comes(weights, folder):
    """It reaches the workers, too, which are starting."""
    processes = [start(weights, ["--input", folder, "--workers", 2]) for _ in range(3)]
    for i, process in enumerate(processes):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while process.poll() is None and not children.read_text():
            time.sleep(0.01)  # its own imports
        time.sleep(0.1 + 0.25 * i)
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGINT)  # by an impatient hand
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, "inference.py: stopped by SIGINT\n")


def test_a_signal_ends_it_and_what_was_answered_stays(weights, folder, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for i in range(5000):  # enough for a second, however fast
        os.link(folder / "part0" / "deep" / "003_3.png", many / f"{i:05d}.png")
    output = tmp_path / "out.json"
    part = tmp_path / "out.json.partial"
    process = start(weights, ["--input", many, "--format", "json", "--output", output])
    while not (part.exists() and part.stat().st_size > 1000) and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=60)
    said = f"stopped by SIGTERM; what was answered is in {part}"
    assert (process.returncode, err) == (143, f"inference.py: {said}\n")
    assert not output.exists()
    assert 0 < len(entries(part.read_bytes())) < 5000
