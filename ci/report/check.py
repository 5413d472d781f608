#!/usr/bin/env python3
"""Opens a report of a run in Chromium, and checks what is there.

    check.py CHROMIUM REPORT TOKENS

REPORT is the page; TOKENS is a JSON list of the strings that its table of tokens must show. A copy of the page gets a script
that measures it, for the page itself has none. The exit status is 1 if anything is not as it should be."""

import json
import re
import subprocess
import sys
import tempfile
from html import unescape
from pathlib import Path

MEASURE = """<script>
addEventListener("load", () => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const wide = (element) => element.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
  const measured = {
    width: document.documentElement.clientWidth,
    page: document.documentElement.scrollWidth,
    wide: all("body *").filter((e) => wide(e) && !e.closest(".scroll") && !e.closest("svg")).map((e) => e.outerHTML.slice(0, 80)),
    svgs: all("figure > svg").map((svg) => ({
      titles: [...svg.querySelectorAll("text")].map((text) => text.textContent.trim()),
      drawn: svg.querySelectorAll("polyline").length,
      outside: [...svg.querySelectorAll("text, polyline, circle")].filter((e) => {
        const [inner, outer] = [e.getBoundingClientRect(), svg.getBoundingClientRect()];
        return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
      }).map((e) => e.textContent || e.tagName),
    })),
    tables: Object.fromEntries(all("table").map((table) => [table.id, table.querySelectorAll("tbody tr").length])),
    tokens: all("#tokens tbody tr td:first-child code").map((code) => code.textContent),
    headings: all("h2").map((heading) => heading.textContent),
    foreign: all("script, img, iframe, object, embed, link:not([rel=icon]), [src], [onerror], [onload]").length - 1,
    loaded: performance.getEntriesByType("resource").map((entry) => entry.name),
    background: getComputedStyle(document.body).backgroundColor,
    text: getComputedStyle(document.body).color,
  };
  const out = document.createElement("pre");
  out.id = "measured";
  out.textContent = JSON.stringify(measured);
  document.body.append(out);
});
</script>"""

CHARTS = ["loss", "gradient norm", "learning rate", "row norms", "row drift"]


class Checks:
    def __init__(self):
        self.failed = 0

    def __call__(self, what: str, ok: bool, found=""):
        print(f"{'ok  ' if ok else 'FAIL'}  {what} {found}".rstrip(), flush=True)
        self.failed += not ok


def run(chromium: str, page: Path, width: int, *options: str) -> tuple[str, str]:
    """What the page is once it has loaded, and what it said on its console."""
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        "--virtual-time-budget=4000", f"--window-size={width},1400", "--host-resolver-rules=MAP * ~NOTFOUND", *options,
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return done.stdout, "\n".join(console)


def measured(dom: str) -> dict:
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    if not found:
        raise SystemExit("the page was not measured")
    return json.loads(unescape(found[1]))


def luminance(color: str) -> float:
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", color)[:3])
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def check(chromium: str, report: Path, tokens: list[str], work: Path) -> int:
    checks = Checks()
    source = report.read_text()
    copy = work / "measured.html"
    copy.write_text(source.replace("</body>", MEASURE + "</body>"))
    external = [url for url in re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', source) if any(url)]
    checks("nothing is loaded from elsewhere", external == [("data:,", "")], external)
    for name, width, options in (
        ("wide", 1280, ()),
        ("narrow", 500, ()),
        ("dark", 1280, ("--blink-settings=preferredColorScheme=0",)),
    ):
        dom, console = run(chromium, copy, width, "--dump-dom", *options)
        page = measured(dom)
        checks(f"{name}: nothing on the console", not console, console)
        checks(f"{name}: nothing overflows", page["page"] <= page["width"] and not page["wide"], page["wide"][:3])
        titles = [next((t for t in svg["titles"] if t in CHARTS), None) for svg in page["svgs"]]
        checks(f"{name}: charts", titles == CHARTS, titles)
        checks(f"{name}: every chart has curves", all(svg["drawn"] for svg in page["svgs"]))
        outside = [text for svg in page["svgs"] for text in svg["outside"]]
        checks(f"{name}: nothing of a chart lies outside of it", not outside, outside)
        rows = page["tables"]
        filled = rows.get("summary", 0) > 5 and rows.get("options", 0) > 5
        checks(f"{name}: tables", filled and rows.get("tokens") == len(tokens), rows)
        checks(f"{name}: tokens as they are written", page["tokens"] == tokens, page["tokens"])
        checks(f"{name}: no element but those of the page", page["foreign"] == 0, page["foreign"])
        checks(f"{name}: no resource", not page["loaded"], page["loaded"])
        text, ground = luminance(page["text"]), luminance(page["background"])
        contrast = (max(text, ground) + 0.05) / (min(text, ground) + 0.05)
        checks(f"{name}: text is readable", contrast > 7 and (text > ground) == (name == "dark"), f"{contrast:.1f}:1")
        picture = report.with_name(f"{report.stem}-{name}.png")
        run(chromium, report, width, f"--screenshot={picture}", *options)
        checks(f"{name}: screenshot", picture.stat().st_size > 20_000, picture.name)
    return checks.failed


def main() -> int:
    chromium, report, tokens = sys.argv[1], Path(sys.argv[2]).resolve(), json.loads(sys.argv[3])
    with tempfile.TemporaryDirectory() as work:
        return min(check(chromium, report, tokens, Path(work)), 1)


if __name__ == "__main__":
    sys.exit(main())
