"""The page of inference.py --report: complete, self-contained, and harmless whatever it shows."""

import base64
import csv
import html
import io
import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import strokes
from PIL import Image

import CNN
import inference
from picture import prepare

NAMES = (
    "</script><script>document.title=`run`</script>.png",
    "<img src=x onerror=document.title=`run`>.png",
    "<!--<script>.png",
    "]]>&lt;b&gt;&amp;.png",
    "quote\"'`${document.title=1}.png",
    "new\nline \x1b[31m \u202egnp.\u2028.png",
    "\udcff.png",
    "O.png",
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TEMPLATE = Path(inference.__file__).with_name("report.html")


@pytest.fixture(scope="module")
def page(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on characters with names that try to become code, a photo, a blank and a wreck."""
    top = tmp_path_factory.mktemp("report")
    for i, name in enumerate(NAMES):
        path = top / "in" / name  # a name with / in it is a path
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = strokes.drawn("O0I1"[i % 4], seed=i)
        grey.save(path, "PNG")
    grey.convert("RGB").resize((900, 700)).save(top / "in" / "photo.jpg")
    Image.fromarray(np.asarray(grey, np.float32) / 255).save(top / "in" / "float.tif")
    grey.convert("LA").save(top / "in" / "alpha.png")
    Image.new("L", (30, 30), 90).save(top / "in" / "blank.png")
    (top / "in" / "wreck.jpg").write_bytes(b"\xff\xd8\xff\xe0 and nothing more")
    flags = ["--model", weights, "--report", top / "page.html", "--alphabet", "0OA"]
    flags += ["--format", "json", "--output", top / "answers"]
    handler = signal.getsignal(signal.SIGTERM)
    assert inference.main(["--input", str(top / "in"), *map(str, flags)]) == 1
    signal.signal(signal.SIGTERM, handler)
    return top / "page.html"


def entries(page: Path) -> list[list]:
    text = page.read_text("ascii")
    found = re.search('<script type="application/json"[^>]*>(.*?)</script>', text, re.S)
    *rows, last = json.loads(found[1])
    assert last is None
    return rows


def test_every_picture_is_there_with_what_the_net_saw(page):
    lines = map(json.loads, page.with_name("answers").read_text().splitlines())
    assert [line["character"] or "" for line in lines] == [row[1] for row in entries(page)]
    found = {row[0].rpartition("/")[2]: row for row in entries(page)}
    assert len(found) == len(NAMES) + 5
    assert r"new\nline \x1b[31m \u202egnp.\u2028.png" in found
    for name, row in found.items():
        shown, character, confidence, alternatives, alike, error, ink, view, path = row
        assert shown == inference.escaped(path)
        if name == "wreck.jpg":
            assert (character, ink, view) == ("", "", "")
            assert error
            continue
        kind, _, content = view.partition(";base64,")
        assert kind == "data:image/webp"
        with Image.open(io.BytesIO(base64.b64decode(content))) as thumbnail:
            assert max(thumbnail.size) <= 96
        if name == "blank.png":
            assert (character, ink, error) == ("", "", inference.BLANK)
            continue
        assert base64.b64decode(ink) in [image.tobytes() for image in prepare(path, CNN.SIZE)]
        assert character in "0OA"
        assert confidence + sum(p for _, p in alternatives) == pytest.approx(1, abs=1e-3)
        assert alike == ("0O" if {character, alternatives[0][0]} == {"0", "O"} else "")


def test_the_page_fetches_nothing_and_no_name_leaves_its_string(page):
    text = page.read_text("ascii")
    assert text.count("<script") == text.count("</script") == 2
    assert "<!--" not in text
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?:", TEMPLATE.read_text())
    assert "default-src 'none'" in text
    assert not page.with_name("page.html.partial").exists()


ACTIONS = """<script>
const images = document.querySelectorAll("main img").length
const log = [], note = () => log.push([list.children.length, get("count").textContent,
  [...list.children].indexOf(document.activeElement)])
const press = key => (document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true })), note())
const choose = (id, key, value) => {
  get(id)[key] = value
  get(id).dispatchEvent(new Event("input", { bubbles: true }))
  note()
}
for (const key of ["j", "j", "k", "a"]) press(key)
choose("answer", "value", "blank"), choose("answer", "value", ""), choose("alike", "checked", true)
choose("alike", "checked", false), choose("doubt", "value", 0.1), choose("order", "value", 0)
choose("doubt", "value", 1)
for (const key of ["Escape", "c", "x", "j", "c", "Escape", "j", "c", "7"]) press(key)
let table = null
URL.createObjectURL = blob => (table = blob, "#saved")
get("save").click()
const end = text => document.title = JSON.stringify([document.title, images, log, text])
table ? table.text().then(end) : end("")
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_all_of_it_and_runs_none_of_the_names(page, tmp_path):
    shown = tmp_path / "page.html"
    shown.write_text(page.read_text() + ACTIONS)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000", "--dump-dom"]
    end = subprocess.run([CHROMIUM, *flags, shown.as_uri()], capture_output=True, timeout=60)
    dom = end.stdout.decode()
    title, images, log, table = json.loads(
        html.unescape(re.search("<title>(.*?)</title>", dom, re.S)[1])
    )
    assert title == "Characters, most doubtful first"
    rows = entries(page)
    count, alike = len(rows), sum(bool(row[4]) for row in rows)
    assert images == count - 1
    numbers = [count] * 4 + [1, count, alike, count, 2, 2]
    assert [text for _, text, _ in log[:10]] == [f"{n} of {count} pictures" for n in numbers]
    assert [focus for *_, focus in log[:4]] == [0, 1, 0, -1]
    header, *lines = csv.reader(io.StringIO(table, newline=""))
    assert header == ["path", "character"]
    assert [character for _, character in lines] == ["X", "7"]  # the third was left as it is
    known = {row[8].encode("utf-8", "replace").replace(b"?", b"") for row in rows}
    assert {path.replace("\ufffd", "").encode() for path, _ in lines} <= known
