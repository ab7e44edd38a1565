"""The report of a run in a browser: its size, how long it takes to open and to search, and pictures of it.

    python benchmarks/report_screenshots.py runs/demo/train --out docs/results

Needs `pip install 'agentrl[report-test]'` and a Chromium. A desktop (1280 x 860) and a telephone (390 x 844), light and
dark: each picture holds the top of the overview and the top of an opened trajectory. Times are medians over `--repeat`
openings in a browser that runs already: from the address to the page that can be used, beside an empty page's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from common import table, write_json
from PIL import Image
from playwright.sync_api import sync_playwright

from agentrl.report.data import make_report
from agentrl.report.page import render

DEVICES: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 860}},
    "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 1.5, "is_mobile": True},
}

TELLING = """() => {
    const get = store.get, mixed = (i) => new Set(store.members(i).map(fate)).size > 1;
    let best = 0;
    for (let i = 0; i < store.count; i++) {
        const late = get("iteration", i) >= get("iteration", best);
        if (late && fate(i) === "success" && mixed(i) && get("turns", i) > 4) best = i;
    }
    openTrajectory(best);
}"""
"""Opens a success of five turns or more that others of its group did not have, of the last iteration with one."""

SEARCH = "() => store.search('no such words', () => {}, () => true)"


def measure(browser: Any, address: str, empty: str, repeat: int) -> dict[str, float]:
    """Returns median seconds: an empty page, the overview, the list of trajectories, a search through all texts."""
    page = browser.new_page(**DEVICES["desktop"])
    found: dict[str, list[float]] = {"empty page": [], "overview": [], "trajectories": [], "search": []}

    def timed(name: str, action: Callable[[], Any]) -> None:
        began = time.perf_counter()
        action()
        found[name].append(time.perf_counter() - began)

    def opened(at: str, sign: str) -> None:
        page.goto(at)
        page.wait_for_selector(sign)

    for _ in range(repeat):
        timed("empty page", lambda: page.goto(empty))
        timed("overview", lambda: opened(address, "body[data-ready]"))
        page.goto(empty)
        timed("trajectories", lambda: opened(f"{address}#trajectories", ".row"))
        timed("search", lambda: page.evaluate(SEARCH))
    page.close()
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def picture(browser: Any, address: str, device: str, scheme: str) -> Image.Image:
    """Returns the overview and an opened trajectory: on a desktop one over the other, on a telephone side by side."""
    context = browser.new_context(**DEVICES[device], color_scheme=scheme)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    page.wait_for_timeout(300)  # charts are drawn when they come into view
    shots = [page.screenshot()]
    page.keyboard.press("3")
    page.evaluate(TELLING)
    page.wait_for_selector(".turns > li")
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(300)
    shots.append(page.screenshot())
    wide = page.evaluate("document.documentElement.scrollWidth") - DEVICES[device]["viewport"]["width"]
    context.close()
    if complaints or wide > 0:
        raise SystemExit(f"{device}, {scheme}: {complaints or f'{wide} pixels too wide'}")
    first, second = (Image.open(BytesIO(shot)).convert("RGB") for shot in shots)
    gap, beside = 12, device == "phone"
    size = (2 * first.width + gap, first.height) if beside else (first.width, 2 * first.height + gap)
    joined = Image.new("RGB", size, (128, 128, 128))
    joined.paste(first, (0, 0))
    joined.paste(second, (first.width + gap, 0) if beside else (0, first.height + gap))
    return joined


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, help="folder of the pictures; none are made without it")
    parser.add_argument("--trajectories", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args(arguments)

    began = time.perf_counter()
    report = make_report([options.run], trajectories=options.trajectories)
    page = render(report)
    listed = report.summary["trajectories"]
    result: dict[str, Any] = {
        "trajectories": listed["count"],
        "stored": listed["found"],
        "megabytes": round(len(page) / 1e6, 2),
        "seconds to make": round(time.perf_counter() - began, 2),
    }
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file, empty = Path(folder) / "report.html", Path(folder) / "empty.html"
        file.write_bytes(page)
        empty.write_text("<!doctype html><title>empty</title>")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        result["load average"] = round(os.getloadavg()[0], 1)
        seconds = measure(browser, file.as_uri(), empty.as_uri(), options.repeat)
        result |= {f"{name}, s": round(value, 2) for name, value in seconds.items()}
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            for device in DEVICES:
                for scheme, suffix in (("light", ""), ("dark", "_dark")):
                    target = options.out / f"report_{device}{suffix}.png"
                    picture(browser, file.as_uri(), device, scheme).save(target, optimize=True)
                    result[f"{target.name}, kB"] = round(target.stat().st_size / 1e3)
        browser.close()
    table(("", "value"), [(name, str(value)) for name, value in result.items()])
    write_json(options.json, result)
    return result


if __name__ == "__main__":
    main()
