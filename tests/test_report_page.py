"""The report in a browser: opened from disk, filtered, read, coloured, compared; without a word on the console."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from test_report import NASTY, append, damage, make_cut, make_evaluation, make_run, played, record

from agentrl.buffer import write_jsonl
from agentrl.report.data import make_report
from agentrl.report.live import LiveReport, make_server
from agentrl.report.page import render

pytestmark = pytest.mark.slow

MANY = 2000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="pip install 'agentrl[report-test]'")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no browser: install chromium, or run `playwright install chromium` ({error.message[:60]!r})")
        yield started
        started.close()


class Reader:
    """A page, and all that it complained about."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append("dialog"), dialog.dismiss()))

    def open(self, address: str) -> Any:
        self.page.goto(address)
        self.page.wait_for_selector("body[data-ready]")
        return self.page


@pytest.fixture
def reader(browser: Any) -> Iterator[Reader]:
    opened = Reader(browser, viewport={"width": 1280, "height": 800})
    yield opened
    opened.context.close()
    assert opened.complaints == []


def write(folder: Path, *paths: Path) -> str:
    """Writes the report of `paths` and returns its address."""
    file = folder / "report.html"
    file.write_bytes(render(make_report(paths)))
    return file.as_uri()


def tally(page: Any) -> str:
    return str(page.inner_text(".tally"))


def shows(page: Any, selector: str, text: str) -> None:
    """Waits until an element says `text`."""
    page.locator(selector, has_text=text).wait_for()


def test_filter_open_colour_compare(reader: Reader, tmp_path: Path) -> None:
    page = reader.open(write(tmp_path, make_run(tmp_path / "run")))
    assert "Held-out success is 25" in page.inner_text(".lead")
    page.get_by_role("tab", name="Trajectories").click()
    assert tally(page) == "24 trajectories"

    page.select_option("select[name=outcome]", "success")
    assert tally(page) == "12 trajectories of 24"
    page.fill("input[name=iteration0]", "2")
    assert tally(page) == "4 trajectories of 24"
    page.fill("input[name=group]", "0001")
    assert tally(page) == "2 trajectories of 24"
    page.fill("#search", "go 1")
    shows(page, ".tally", "1 trajectory of 24")
    page.fill("#search", "nowhere to be found")
    page.wait_for_selector(".rows .empty")
    page.locator(".rows").get_by_text("Clear them").click()
    assert tally(page) == "24 trajectories"

    page.locator(".row", has_text="000002-0000/0").click()
    page.wait_for_selector(".turns > li")
    assert page.locator(".turns > li").count() == 3
    assert page.locator(".act .meta b").all_inner_texts() == ["+1.5", "−1", "+1"]
    assert page.locator(".act.invalid").count() == 1
    colour = "document.querySelector('.act').style.getPropertyValue('--s')"
    before = page.evaluate(colour)
    page.select_option("#mode", "step")
    shows(page, ".act .meta b >> nth=0", "+0.5")
    assert page.evaluate(colour) != before
    page.select_option("#mode", "environment")
    shows(page, ".act .meta b >> nth=2", "+0.5")

    page.click("#tokens")
    page.wait_for_selector(".token")
    assert page.locator(".token").first.get_attribute("title") == "−0.5 nats, probability 60.7\u202f%, id 5"

    page.locator("button.compare[aria-label='Compare with 000002-0000/2']").click()
    page.wait_for_selector(".parting")
    assert page.inner_text(".parting b") == "They part at turn 2"
    assert page.inner_text(".parting span") == "the same observation, another action"
    page.keyboard.press("Escape")
    page.wait_for_selector(".parting", state="detached")


def test_the_keyboard_alone(reader: Reader, tmp_path: Path) -> None:
    page = reader.open(write(tmp_path, make_run(tmp_path / "run")))
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("3")
    page.keyboard.press("j")
    page.wait_for_selector(".episode")
    assert page.inner_text(".episode h2") == "000002-0000/0"
    page.keyboard.press("j")
    shows(page, ".episode h2", "000002-0000/1")
    page.keyboard.press("m")  # the first that ended otherwise
    page.wait_for_selector(".parting")
    assert page.locator(".heads h2").all_inner_texts() == ["000002-0000/1", "000002-0000/2"]
    address = page.url
    page.keyboard.press("d")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.goto("about:blank")
    page = reader.open(address)  # a link comes back to the same place
    page.wait_for_selector(".parting")


def test_what_an_agent_says_is_never_run(reader: Reader, tmp_path: Path) -> None:
    nasty = played(0, 0, error=NASTY)
    nasty.turns[0].action = nasty.turns[0].observation = nasty.instructions = NASTY
    write_jsonl(tmp_path / "nasty.jsonl", [nasty, played(0, 3)])
    page = reader.open(write(tmp_path, tmp_path / "nasty.jsonl"))
    page.keyboard.press("3")
    page.keyboard.press("j")
    page.wait_for_selector(".turns > li")
    assert page.locator(".said").first.text_content() == NASTY
    assert page.locator("main img").count() == 0
    assert "No credit is stored" in page.inner_text(".note")


def test_a_click_opens_the_episode_of_its_file(reader: Reader, tmp_path: Path) -> None:
    for name, won in (("a", True), ("b", False)):
        members = [played(0, n, success=won, outcome=float(won), policy=f"policy-{name}") for n in (0, 1)]
        write_jsonl(tmp_path / f"{name}.jsonl", [*members, members[0]])  # one id twice in one file, too
    page = reader.open(write(tmp_path, tmp_path))
    page.keyboard.press("3")
    for n in range(6):
        name, fate = ("a", "success") if n < 3 else ("b", "failure")
        row = page.locator(f"#row-{n}")
        assert f"{fate}\n000000-0000/{1 if n % 3 == 1 else 0} · {name}.jsonl" in row.inner_text()
        row.click()
        page.wait_for_selector(f"#row-{n}.chosen")
        shows(page, ".episode", f"policy-{name}")
        assert page.locator(".row.chosen").count() == 1
        assert fate in page.inner_text(".episode")
        assert "Group of 3" in page.inner_text(".group summary")
    address = page.url
    page.goto("about:blank")
    reader.open(address).wait_for_selector("#row-5.chosen")


def test_evaluations_side_by_side(reader: Reader, tmp_path: Path) -> None:
    make_evaluation(tmp_path / "one", "echo")
    make_evaluation(tmp_path / "two", "parrot", per_task=1)
    make_evaluation(tmp_path / "cut", "cut", complete=False)
    page = reader.open(write(tmp_path, tmp_path))
    lines = [line.split("\t") for line in page.inner_text(".evaluation tbody").splitlines()]
    assert [line[:4] for line in lines] == [
        ["one", "Toy-v0", "echo", "50\u202f%"],
        ["one", "Other-v0", "echo", "50\u202f%"],
        ["two", "Toy-v0", "parrot", "50\u202f%"],
        ["two", "Other-v0", "parrot", "50\u202f%"],
    ]
    assert "to" in lines[0][4]
    assert page.locator(".attempts tbody tr").count() == 4
    assert page.inner_text(".attempts tbody tr >> nth=1").split("\t")[1] == "2"
    assert page.locator("table").nth(2).locator("tbody").inner_text().split("\t")[:4] == ["cut", "–", "1", "50\u202f%"]
    page.keyboard.press("6")
    assert "sampling.temperature" in page.inner_text(".config")
    page.keyboard.press("5")
    assert "All episodes by how they ended: 16 terminated." in page.inner_text("main")
    page = reader.open(write(tmp_path, tmp_path / "two"))
    assert "Mean success of 50" in page.inner_text(".lead")
    assert "temperature 1, top-p 1" in page.inner_text("dl >> nth=0")


def test_evaluations_are_shown_one_by_one_and_say_what_is_missing(reader: Reader, tmp_path: Path) -> None:
    make_evaluation(tmp_path / "one")
    make_evaluation(tmp_path / "two", seed=1)
    page = reader.open(write(tmp_path, tmp_path))
    assert (page.inner_text("h1"), page.inner_text(".lead")) == ("2 evaluations", "2 evaluations.")
    assert page.locator("table").count() == 2, "theirs and that of pass@k, none of means over seeds"
    missing = "8 of 16 episodes, those that ended first"
    page = reader.open(write(tmp_path, make_cut(tmp_path / "cut")))
    assert page.inner_text(".lead") == f"Not complete: {missing}. 50\u202f% of them succeeded."
    page = reader.open(write(tmp_path, tmp_path))
    assert page.inner_text(".lead") == f"3 evaluations; cut is not complete: {missing}."
    final = page.locator("table").nth(2)
    row = [f"cut not complete: {missing}", "–", "1", "50\u202f%"]
    assert "mean over seeds" not in final.inner_text()
    assert final.locator("tbody").inner_text().split("\t")[:4] == row
    for seed in (0, 1):
        make_run(tmp_path / "runs" / str(seed), seed=seed)
    make_cut(tmp_path / "cut2", seed=2)
    page = reader.open(write(tmp_path, tmp_path))
    counts = "2 runs of 1 setting, up to 2 seeds each; 4 evaluations"
    assert page.inner_text(".lead") == f"{counts}; 2 are not complete: 16 of 32 episodes, those that ended first."
    page.keyboard.press("5")
    assert "All stored episodes by how they ended: 8 terminated." in page.inner_text("main")
    assert "All training episodes by how they ended: " in page.inner_text("main")


def test_an_interval_that_is_not_there_is_not_written(reader: Reader, tmp_path: Path) -> None:
    result = make_evaluation(tmp_path / "same") / "result.json"
    found = json.loads(result.read_text())
    found["results"][0]["outcome"] = {"value": 0.5, "low": None, "high": None}
    result.write_text(json.dumps(found))
    page = reader.open(write(tmp_path, tmp_path / "same"))
    assert page.inner_text(".evaluation tbody tr >> nth=0").split("\t")[4] == "0.5"


def held_out(iteration: int, value: float) -> dict[str, Any]:
    """A line of metrics with a held-out evaluation."""
    success = {"value": value, "low": value / 2, "high": (1 + value) / 2, "episodes": 16}
    return record(iteration, eval={"success": success})


def test_a_sentence_for_what_rose_fell_and_stayed(reader: Reader, tmp_path: Path) -> None:
    for name, values, said in (
        ("up", (0.0, 0.5), "rose from 0\u202f% to 50\u202f%"),
        ("down", (0.5, 0.0), "fell from 50\u202f% to 0\u202f%"),
        ("none", (0.0, 0.0), "stayed at 0\u202f% (95"),
        ("little", (0.5, 0.50001), "stayed at 50\u202f% (95"),
        ("once", (0.5,), "is 50\u202f% (95"),
    ):
        lines = [json.dumps(held_out(n, value)) for n, value in enumerate(values)]
        (make_run(tmp_path / name) / "metrics.jsonl").write_text("\n".join([*lines, ""]))
        assert f"Held-out success {said}" in reader.open(write(tmp_path, tmp_path / name)).inner_text(".lead")


def test_what_is_not_known_is_not_said(reader: Reader, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for text in ("[", "model: {path: tiny}\nrollout: {groups: 2}\n"):
        (run / "config.yaml").write_text(text)
        facts = reader.open(write(tmp_path, run)).inner_text("dl >> nth=0")
        assert "iterations\n3" in facts
        assert "undefined" not in facts
        assert "model\n(" not in facts
    assert "model\ntiny" in facts


def test_bands_are_named_for_what_they_are(reader: Reader, tmp_path: Path) -> None:
    def note(*paths: Path) -> str:
        return str(reader.open(write(tmp_path, *paths)).inner_text("figcaption span"))

    one, other = (make_run(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other")))
    assert note(one) == "share of held-out episodes; band: 95\u202f% interval"
    assert note(one, other) == "share of held-out episodes; line: mean, band: range over seeds"
    third = make_run(tmp_path / "third", credit={"method": "grpo"})
    own = "; band of one run: 95\u202f% interval"
    assert note(one, other, third) == f"share of held-out episodes; line: mean, band: range over seeds{own}"
    (one / "metrics.jsonl").write_text("".join(json.dumps(record(n)) + "\n" for n in range(3)))
    assert note(one) == "share of training episodes"


def test_evaluations_take_no_band_and_no_colour_from_runs(reader: Reader, tmp_path: Path) -> None:
    for n in range(4):
        make_evaluation(tmp_path / f"eval-{n}", seed=n)
    runs = [make_run(tmp_path / f"run-{method}", credit={"method": method}) for method in ("grpo", "rloo")]
    page = reader.open(write(tmp_path, tmp_path))
    assert page.inner_text("figcaption span") == "share of held-out episodes; band: 95\u202f% interval"
    lines = page.evaluate("charts[0].spec.series.map((one) => [one.colour, one.low.length])")
    assert lines == [["--c1", 1], ["--c2", 1]]
    assert page.locator(".dot").count() == len(runs)


def test_drift_of_centred_rewards_is_said_to_be_absent(reader: Reader, tmp_path: Path) -> None:
    said = "Drift is not measured where rewards are centred"
    for centred in (True, False):
        run = make_run(tmp_path / f"centred-{centred}", prm={"centred": centred})
        append(run / "metrics.jsonl", json.dumps(record(4, pair_accuracy=0.5, prm_loss=0.5)))
        page = reader.open(write(tmp_path, run))
        page.keyboard.press("4")
        assert (said in page.inner_text("main")) == centred


@pytest.mark.parametrize("seed", range(12))
def test_pages_of_damaged_files_draw_without_complaint(reader: Reader, tmp_path: Path, seed: int) -> None:
    random = Random(1000 + seed)
    made, evaluated = make_run(tmp_path / "run", iterations=12), make_evaluation(tmp_path / "evaluation")
    for _ in range(3):
        damage([*made.glob("*.*"), *made.rglob("*-000001.jsonl"), *evaluated.rglob("*.*")], random)
    page = reader.open(write(tmp_path, tmp_path))
    for number in range(1, 7):
        page.keyboard.press(str(number))
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.keyboard.press("3")
    for _ in range(3):
        page.keyboard.press("j")
    page.keyboard.press("m")


@pytest.mark.usefixtures("browser")  # skipped where there is none
def test_pictures_and_figures_of_a_report(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "report_screenshots.py"
    options = ["--out", tmp_path / "out", "--repeat", "1", "--json", tmp_path / "figures.json"]
    subprocess.run([sys.executable, script, make_run(tmp_path / "run"), *options], check=True, timeout=300)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert (found["trajectories"], found["stored"]) == (24, 24)
    names = ["report_desktop.png", "report_desktop_dark.png", "report_phone.png", "report_phone_dark.png"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    assert all(found[f"{name}, s"] > 0 for name in ("overview", "trajectories", "search"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_shows_every_cell_without_scrolling_a_table(browser: Any, tmp_path: Path, scheme: str) -> None:
    reader = Reader(browser, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    made = [make_evaluation(tmp_path / "one"), make_evaluation(tmp_path / "a" / "long" / "name" / "of" / "another")]
    page = reader.open(write(tmp_path, *made, make_cut(tmp_path / "cut")))
    ends = "(cells) => cells.map((cell) => cell.getBoundingClientRect().right)"
    for number, tables in ((1, 3), (5, 3)):
        page.keyboard.press(str(number))
        assert page.locator("table").count() == tables
        assert max(page.locator("caption, th, td").evaluate_all(ends)) <= 390 - 16
    page.keyboard.press("1")
    label = "(cell) => getComputedStyle(cell, '::before').content"
    assert page.locator(".evaluation td.n").first.evaluate(label) == '"success "'
    page.set_viewport_size({"width": 900, "height": 844})
    assert max(page.locator("td").evaluate_all(ends)) > 900, "a table again, wider than the page"
    assert max(page.locator("caption").evaluate_all(ends)) <= 900 - 24
    reader.context.close()
    assert reader.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_shows_every_page_without_scrolling_sideways(browser: Any, tmp_path: Path, scheme: str) -> None:
    reader = Reader(browser, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = reader.open(write(tmp_path, make_evaluation(tmp_path / "evaluation")))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page = reader.open(write(tmp_path, make_run(tmp_path / "run")))
    for number in range(1, 7):
        page.keyboard.press(str(number))
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, f"page {number}"
    page.keyboard.press("3")
    page.locator(".row").first.click()
    page.wait_for_selector(".turns > li")
    assert not page.locator(".side").is_visible()
    page.keyboard.press("m")
    page.wait_for_selector(".parting")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator(".back").click()
    page.locator(".back", has_text="list").click()
    assert page.locator(".side").is_visible()
    reader.context.close()
    assert reader.complaints == []


def test_empty_and_damaged_runs_explain_themselves(reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    page = reader.open(write(tmp_path, tmp_path / "empty.jsonl"))
    assert "empty.jsonl is empty" in page.inner_text(".absent")
    titles = []
    for number in range(2, 7):
        page.keyboard.press(str(number))
        titles.append(page.inner_text(".empty h3"))
    assert titles == [
        "No learning curves",
        "No trajectories",
        "No process reward model",
        "No counts",
        "No configuration",
    ]


def test_many_trajectories_open_at_once(browser: Any, tmp_path: Path) -> None:
    many = [played(g, m, turns=12) for g in range(MANY // 8) for m in range(8)]
    write_jsonl(tmp_path / "many.jsonl", many)
    address = write(tmp_path, tmp_path / "many.jsonl")
    reader = Reader(browser, viewport={"width": 1280, "height": 800})
    began = time.perf_counter()
    page = reader.open(address + "#trajectories")
    page.wait_for_selector(".row")
    seconds = time.perf_counter() - began
    assert tally(page) == "2,000 trajectories"
    assert page.locator(".row").count() < 40, "only the rows in view are drawn"
    page.evaluate("browse.box.scrollTop = browse.box.scrollHeight")
    page.wait_for_selector("#row-1999")
    # 2 s on an idle machine (docs/report.md has the number); a loaded one gets room.
    assert seconds < 8, f"opened in {seconds:.1f} s"
    assert reader.complaints == []
    reader.context.close()


def test_live_news_leave_the_reader_where_he_is(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", iterations=6)
    server = make_server(LiveReport([run]), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    reader = Reader(browser, viewport={"width": 1280, "height": 500})
    try:
        page = reader.open(f"http://127.0.0.1:{server.server_address[1]}/")
        page.keyboard.press("3")
        page.select_option("select[name=outcome]", "failure")
        page.locator(".row").nth(2).click()
        page.wait_for_selector(".turns > li")
        page.evaluate("browse.box.scrollTop = 5 * ROW; browse.detail.scrollTop = 40")
        place = "[store.key(browse.rows[Math.floor(browse.box.scrollTop / ROW)]), browse.open, browse.detail.scrollTop]"
        before = page.evaluate(place)
        write_jsonl(run / "trajectories" / "iteration-000006.jsonl", [played(0, m, iteration=6) for m in range(4)])
        shows(page, ".tally", "26 trajectories of 52")
        assert page.evaluate(place) == before
    finally:
        reader.context.close()
        server.shutdown()
        thread.join()
        server.server_close()
    assert reader.complaints == []
