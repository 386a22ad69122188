"""The page of inference.py --report: complete, self-contained, and harmless whatever it shows."""

import base64
import csv
import html
import io
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import strokes
from PIL import Image

import CNN
import inference
from picture import escaped, prepare

NAMES = (
    "</script><script>document.title=`run`</script>.png",
    "<img src=x onerror=document.title=`run`>.png",
    "<!--<script>.png",
    "]]>&lt;b&gt;&amp;.png",
    "quote\"'`${document.title=1}.png",
    "new\nline \x1b[31m \u202egnp.\u2028.png",
    "\udcff.png",
    "O.png",
    *(f"{truth}/{i}.png" for i in range(3) for truth in "0Oa"),  # one of three is right
    *(f"rows/{form}_{cell}.png" for form in range(10, 15) for cell in range(2)),
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
        number = int(path.stem) if path.stem.isdigit() else i
        grey = strokes.drawn("O0I1"[number % 4], seed=number)
        grey.save(path, "PNG")
    grey.convert("RGB").resize((900, 700)).save(top / "in" / "photo.jpg")
    Image.fromarray(np.asarray(grey, np.float32) / 255).save(top / "in" / "float.tif")
    grey.convert("LA").save(top / "in" / "alpha.png")
    Image.new("L", (30, 30), 90).save(top / "in" / "blank.png")
    (top / "in" / "wreck.jpg").write_bytes(b"\xff\xd8\xff\xe0 and nothing more")
    flags = ["--model", weights, "--report", top / "page.html", "--alphabet", "0OA"]
    flags += ["--format", "json", "--output", top / "answers"]
    assert inference.main(["--input", str(top / "in"), *map(str, flags)]) == 1
    return top / "page.html"


def entries(page: Path) -> list[dict]:
    text = page.read_text("ascii")
    found = re.search('<script type="application/json"[^>]*>(.*?)</script>', text, re.S)
    *rows, last = json.loads(found[1])
    assert last is None
    return rows


def test_every_picture_is_there_with_what_the_net_saw(page):
    lines = map(json.loads, page.with_name("answers").read_text().splitlines())
    assert [line["character"] or "" for line in lines] == [r["character"] for r in entries(page)]
    found = {row["shown"].removeprefix(f"{page.parent}/in/"): row for row in entries(page)}
    assert len(found) == len(NAMES) + 5
    assert r"new\nline \x1b[31m \u202egnp.\u2028.png" in found
    for name, row in found.items():
        assert row["shown"] == escaped(row["path"])
        assert row["truth"] == (name[0].upper() if name[1:2] == "/" and name[0] != "<" else "")
        if name == "wreck.jpg":
            assert (row["character"], row["image"], row["thumbnail"]) == ("", "", "")
            assert row["error"]
            continue
        kind, _, content = row["thumbnail"].partition(";base64,")
        assert kind == "data:image/webp"
        with Image.open(io.BytesIO(base64.b64decode(content))) as thumbnail:
            assert max(thumbnail.size) <= 96
        if name == "blank.png":
            blank = ("", "", inference.BLANK)
            assert (row["character"], row["image"], row["error"]) == blank
            continue
        image, alternatives = base64.b64decode(row["image"]), row["alternatives"]
        assert image == prepare(row["path"], CNN.SIZE).tobytes()
        assert row["character"] in "0OA"
        assert row["confidence"] + sum(p for _, p in alternatives) == pytest.approx(1, abs=1e-3)
        alike = {row["character"], alternatives[0][0]} == {"0", "O"}
        assert row["lookalike"] == ("0O" if alike else "")


def test_the_page_fetches_nothing_and_no_name_leaves_its_string(page):
    text = page.read_text("ascii")
    assert text.count("<script") == text.count("</script") == 2
    assert "<!--" not in text
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?:", TEMPLATE.read_text())
    assert "default-src 'none'" in text
    assert not page.with_name("page.html.partial").exists()


ACTIONS = """<script>
const log = { images: document.querySelectorAll("main img").length }, saved = []
const cards = () => [...list.querySelectorAll("article")]
const note = name => log[name] = [cards().length, get("count").textContent,
  cards().indexOf(document.activeElement), get("right").textContent]
const press = keys => {
  for (const key of keys) document.activeElement.dispatchEvent(
    new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }))
}
const choose = (id, key, value) => {
  get(id)[key] = value
  get(id).dispatchEvent(new Event("input", { bubbles: true }))
}

const left = () => +get("count").textContent.match(/(\\d+) unchecked/)[1]
const word = i => list.querySelectorAll(".answer")[i].textContent

press(["Enter"]), note("1"), press(["ArrowRight"]), note("2"), press(["ArrowLeft"]), note("1 again")
press(["/"]), log.filters = document.activeElement.id
choose("answer", "value", "blank"), note("blank"), choose("answer", "value", ""), note("any")
choose("alike", "checked", true), note("alike"), choose("alike", "checked", false)
choose("doubt", "value", 0.6), note("doubt"), choose("doubt", "value", 1)
choose("wrong", "checked", true), note("wrong"), choose("wrong", "checked", false)
log.mixed = [...get("mixed").children].map(button => button.textContent)
get("mixed").children[0].click(), note("pair"), get("mixed").children[0].click(), note("no pair")
const inRows = order => {
  choose("order", "value", order), note(order)
  log[order + " rows"] = [...list.querySelectorAll("section")].map(section => [
    section.querySelector("h2").textContent, section.querySelectorAll("article").length])
}
inRows("path"), inRows("form"), choose("order", "value", "doubt")
log.before = [left(), get("save").disabled]
choose("answer", "value", "blank"), press(["Escape", "Enter"]), choose("answer", "value", "")
press(["Escape", "Enter", "Enter", "Enter"]), note("Enter")  // one is a wreck: passed over
press(["x", "Shift", " ", "7"]), note("typed"), press(["Backspace"]), note("Backspace")
press(["8"]), log.left = left()
choose("unchecked", "checked", true), note("unchecked"), choose("unchecked", "checked", false)
log.cards = cards().map((card, i) => word(i))
log.unsaved = !dispatchEvent(new Event("beforeunload", { cancelable: true }))
URL.createObjectURL = blob => (saved.push(blob.text()), "#saved")
get("save").click(), get("save_all").click(), log.buttons = [
  get("save").textContent, get("save_all").textContent]
Promise.all(saved).then(tables => {
  checked.clear(), load(tables[1] + '"no, ""such"" one",A'), get("save").click()
  log.loaded = [get("loaded").value, left()]
  return Promise.all([...tables, saved.at(-1)])
}).then(tables => {
  document.title = JSON.stringify({ ...log, tables, title: document.title })
})
</script>"""


@pytest.fixture(scope="module")
def seen(page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a browser shows of the page while somebody uses it."""
    if not CHROMIUM:
        pytest.skip("needs Chromium: apt-get install chromium")
    folder = tmp_path_factory.mktemp("browser")
    (folder / "page.html").write_text(page.read_text() + ACTIONS)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={folder}", "--virtual-time-budget=2000", "--dump-dom"]
    command = [CHROMIUM, *flags, (folder / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, timeout=60).stdout.decode()
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.S)[1]))


def test_a_browser_shows_all_of_it_and_runs_none_of_the_names(page, seen):
    rows = entries(page)
    count, alike = len(rows), sum(bool(row["lookalike"]) for row in rows)
    doubtful = sum(row["confidence"] <= 0.6 for row in rows)
    assert 2 < doubtful < count
    assert seen["title"] == "Characters, most doubtful first"
    assert seen["images"] == count - 1
    numbers = {"1": count, "blank": 1, "any": count, "alike": alike, "doubt": doubtful}
    for name, number in (numbers | {"path": count, "form": count}).items():
        assert seen[name][:2] == [number, f"{number} of {count} pictures, {number} unchecked"], name
    names = ("1", "2", "1 again", "Enter", "typed", "Backspace")
    assert [seen[name][2] for name in names] == [0, 1, 0, 3, 6, 5]
    assert seen["filters"] == "answer"


def test_cells_of_a_form_stand_in_a_row_the_most_doubtful_form_first(page, seen):
    forms = {}
    for row in entries(page):
        if "/rows/" in row["shown"]:
            forms.setdefault(row["shown"].rpartition("_")[0], []).append(row["confidence"])
    by_path = [row for row in seen["path rows"] if "/rows/" in row[0]]
    assert by_path == [[form, 2] for form in sorted(forms)]
    by_doubt = [row for row in seen["form rows"] if "/rows/" in row[0]]
    assert by_doubt == [[form, 2] for form in sorted(forms, key=lambda form: min(forms[form]))]


def test_the_page_knows_what_is_right_by_the_folders_names(page, seen):
    labelled = [row for row in entries(page) if row["truth"] and row["character"]]
    assert len(labelled) == 9
    above = [row for row in labelled if row["confidence"] > 0.6]
    right = sum(row["character"] == row["truth"] for row in above)
    assert 0 < len(above) < 9
    told = "Right: 33.3\u00a0% of all 9"
    assert seen["any"][3] == told
    fraction = f"{100 * right / len(above):.1f}\u00a0%"
    assert seen["doubt"][3] == f"{told}, {fraction} of the {len(above)} above 60.0\u00a0%"
    assert seen["wrong"][0] == 6
    wrong = [row for row in labelled if row["character"] != row["truth"]]
    counts = Counter(f"{row['truth']} > {row['character']}" for row in wrong)
    assert Counter(seen["mixed"]) == Counter(f"{pair}: {n}" for pair, n in counts.items())
    assert seen["mixed"][0].endswith(f": {max(counts.values())}")
    assert seen["pair"][0] == max(counts.values())
    assert seen["no pair"][0] == len(entries(page))


def test_answers_are_confirmed_corrected_saved_and_loaded(page, seen):
    rows = sorted(entries(page), key=lambda row: row["confidence"])
    count = len(rows)
    assert (seen["before"], seen["unsaved"]) == ([count, True], True)
    blank = next(i for i, row in enumerate(rows) if row["error"] == inference.BLANK)
    wreck = next(i for i, row in enumerate(rows) if row["path"].endswith("wreck.jpg"))
    confirmed = [i for i in (blank, 0, 1, 2) if i != wreck]
    told = {i: rows[i]["character"] for i in confirmed} | {3: "X", 4: "", 5: "8"}
    assert wreck < 3
    for i, character in told.items():
        word = "confirmed" if character == rows[i]["character"] else f"{character}corrected"
        assert (word if character else "empty") in seen["cards"][i]
    assert seen["left"] == seen["unchecked"][0] == count - len(told)
    corrections, answers, again = (
        list(csv.reader(io.StringIO(table, newline=""))) for table in seen["tables"]
    )
    assert corrections[0] == answers[0] == ["path", "character"]
    assert corrections[1:] == [[browsers(rows[i]["path"]), told[i]] for i in told]
    characters = {row["path"]: row["character"] for row in rows if row["character"]}
    characters |= {rows[i]["path"]: character for i, character in told.items()}
    paths = [row["path"] for row in entries(page) if row["path"] in characters]
    assert answers[1:] == [[browsers(path), characters[path]] for path in paths]
    assert again == answers
    assert seen["loaded"] == [
        f"{len(paths)} of {len(paths) + 1} lines are of this page",
        count - len(paths),
    ]
    assert seen["buttons"] == [f"Save {len(told)} checked", f"Save all {len(paths)} as shown"]


def browsers(path: str) -> str:
    """Return a path as a browser writes it: it has no bytes that are not UTF-8."""
    return path.encode("utf-8", "replace").replace(b"?", "\ufffd".encode()).decode()
