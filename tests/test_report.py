"""The page of inference.py --report: complete, self-contained, and harmless whatever it shows."""

import base64
import html
import html.parser
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import strokes
import torch
from PIL import Image

import CNN
import inference

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


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on characters with names that try to become code, a photo, a blank and a wreck."""
    top = tmp_path_factory.mktemp("report")
    (top / "in").mkdir()
    for i, name in enumerate(NAMES):
        folder = top / "in" / os.path.dirname(name)  # a name with / in it is a path
        folder.mkdir(parents=True, exist_ok=True)
        ink = strokes.ink("O0I1"[i % 4], strokes.hand(i), (60, 50))
        grey = Image.fromarray((255 - 255 * np.asarray(ink)).astype(np.uint8))
        grey.save(folder / os.path.basename(name), "PNG")
    grey.convert("RGB").resize((900, 700)).save(top / "in" / "photo.jpg")
    Image.fromarray(np.asarray(grey, np.float32) / 255).save(top / "in" / "float.tif")
    grey.convert("LA").save(top / "in" / "alpha.png")
    Image.new("L", (30, 30), 90).save(top / "in" / "blank.png")
    (top / "in" / "wreck.jpg").write_bytes(b"\xff\xd8\xff\xe0 and nothing more")
    torch.manual_seed(0)
    net = CNN.Net()
    net.lookalikes = ["0O"]
    CNN.save(net, top / "model.pt")
    flags = ["--model", str(top / "model.pt"), "--report", str(top / "page.html")]
    assert inference.main(["--input", str(top / "in"), *flags, "--alphabet", "0OA"]) == 1
    return top / "page.html"


class Elements(html.parser.HTMLParser):
    """The elements of a page, counted, and the names of all their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.attributes |= {name for name, _ in attributes}


def entries(page: Path) -> list[list]:
    text = page.read_text("ascii")
    return json.loads(
        re.search('<script type="application/json"[^>]*>(.*?)</script>', text, re.S)[1]
    )


def test_every_picture_is_there_with_what_the_net_saw(page: Path) -> None:
    found = {os.path.basename(row[0]): row for row in entries(page)}
    assert len(found) == len(NAMES) + 5
    assert r"new\nline \x1b[31m \u202egnp.\u2028.png" in found
    for name, (path, character, confidence, alternatives, pair, error, ink, view) in found.items():
        if name == "wreck.jpg":
            assert (character, ink, view) == ("", "", "")
            assert error
            continue
        kind, _, content = view.partition(";base64,")
        assert kind in ("data:image/png", "data:image/jpeg")
        thumbnail = base64.b64decode(content)
        assert thumbnail[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0")
        if name == "blank.png":
            assert (character, ink, error) == ("", "", inference.BLANK)
            continue
        image = base64.b64decode(ink)
        assert len(image) == CNN.SIZE**2
        if os.path.exists(path):  # a name with control characters is shown, not given
            assert (
                image
                == inference.fit([inference.to_grey(inference.load(path))], CNN.SIZE)[0].tobytes()
            )
        assert character in "0OA"
        assert confidence + sum(p for _, p in alternatives) == pytest.approx(1, abs=1e-3)
        assert pair == ("0O" if {character, alternatives[0][0]} == {"0", "O"} else "")


def test_the_page_fetches_nothing_and_no_name_leaves_its_string(page: Path) -> None:
    text = page.read_text("ascii")
    assert text.count("<script") == 2
    assert text.count("</script") == 2
    assert "<!--" not in text
    rest = re.sub(r'(<script type="application/json".*?>).*?(</script>)', r"\1\2", text, flags=re.S)
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?:", rest)
    assert "default-src 'none'" in text
    assert not page.with_name("page.html.partial").exists()


def test_answers_are_those_without_a_report(page: Path, capfdbinary: pytest.CaptureFixture) -> None:
    flags = ["--model", str(page.with_name("model.pt")), "--alphabet", "0OA", "--format", "json"]
    inference.main(["--input", str(page.parent / "in"), *flags])
    lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [line["character"] or "" for line in lines] == [row[1] for row in entries(page)]


def browse(page: Path, profile: Path) -> str:
    """Return what a browser makes of a page."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom"]
    end = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, timeout=60)
    return end.stdout.decode()


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_all_of_it_and_runs_none_of_the_names(page: Path, tmp_path: Path) -> None:
    dom = browse(page, tmp_path)
    assert "<title>Characters, most doubtful first</title>" in dom
    body = dom[dom.index("<main") : dom.index("</main>")]
    elements = Elements(body)
    assert elements.counts["article"] == len(NAMES) + 5
    assert elements.counts["img"] == len(NAMES) + 4
    assert elements.counts["canvas"] == len(NAMES) + 3
    assert elements.counts["script"] == 0
    known = {"id", "class", "tabindex", "aria-label", "src", "alt", "value", "width", "height"}
    assert elements.attributes == known
    shown = [float(p) for p in re.findall(r"<span>([0-9.]+)&nbsp;% </span>", body)]
    assert shown == sorted(shown)
    assert len(shown) == len(NAMES) + 3
    assert f"{len(NAMES) + 5} of {len(NAMES) + 5} pictures" in dom


ACTIONS = """<script>
const log = [], note = () => log.push([list.children.length, get("count").textContent,
  [...list.children].indexOf(document.activeElement), document.activeElement.id])
const press = key => (document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true })), note())
const choose = (id, key, value) => {
  get(id)[key] = value
  get(id).dispatchEvent(new Event("input", { bubbles: true }))
  note()
}
for (const key of ["j", "j", "k", "a", "j", "Escape", "d", "Escape", "ArrowRight"]) press(key)
for (let i = 0; i < 118; i++) press("j")
choose("answer", "value", "blank"), choose("answer", "value", "no answer")
choose("answer", "value", ""), choose("alike", "checked", true)
choose("alike", "checked", false), choose("doubt", "value", 0.1), choose("doubt", "value", 1)
choose("order", "value", 0)
const paths = [...document.querySelectorAll(".path")].map(path => path.textContent)
document.title = JSON.stringify([log, paths])
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
def test_keys_move_and_controls_filter_and_sort(tmp_path: Path) -> None:
    results = [inference.Result(f"{i:03d}.png", "OA"[i % 2], 1 - i / 250) for i in range(200)]
    results += [inference.Result(f"alike {i}.png", "O", 0.5, (("0", 0.4),), "0O") for i in range(3)]
    results += [inference.Result("doubtful.png", "", 0.3, (("A", 0.3),), error="no answer: 0.3")]
    results += [inference.Result(f"{i} blank.png", error=inference.BLANK) for i in range(5)]
    report = inference.Report(tmp_path / "page.html")
    report.write(results)
    report.finish()
    with open(tmp_path / "page.html", "a") as page:
        page.write(ACTIONS)
    dom = browse(tmp_path / "page.html", tmp_path / "profile")
    log, paths = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.S)[1]))
    keys, controls = log[:-8], log[-8:]
    assert [focus for _, _, focus, _ in keys] == [0, 1, 0, -1, -1, 0, -1, 0, *range(1, 120)]
    assert [focused for *_, focused in keys[3:7]] == ["answer", "answer", "", "doubt"]
    assert (keys[-2][0], keys[-1][0]) == (120, 209)  # those below are built when they are near
    numbers = [5, 1, 209, 3, 209, 5, 209, 209]
    assert [text for _, text, *_ in controls] == [f"{n} of 209 pictures" for n in numbers]
    assert [built for built, *_ in controls] == [min(n, 120) for n in numbers]
    assert paths == sorted(result.path for result in results)[:120]
