"""Writes what was measured into the pages that show it."""
import re
from pathlib import Path

import tables
from processes import Failure

PAGES = [Path("docs/performance.md"), Path("README.md")]
PLOTS = Path("docs/performance")
PLACE = re.compile(r"^( *)<!-- measured: (\w+) -->.*?<!-- end -->", re.DOTALL | re.MULTILINE)


def write(report, out):
    """Replaces what lies between `<!-- measured: NAME -->` and `<!-- end -->`, and the plots."""
    made = tables.fragments(report, out)
    if "layer" in report:
        made["step"] = tables.step(report["layer"])
    pages = {page: filled(page, made) for page in PAGES}
    PLOTS.mkdir(exist_ok=True)
    for plot in sorted(out.glob("*.svg")):
        (PLOTS / plot.name).write_text(plot.read_text())
    for page, text in pages.items():
        page.write_text(text)
        print(page)


def filled(page, made):
    """The page with its figures. A place of what was not measured stays as it is; there must be one at least."""
    def fragment(match):
        indent, name = match.groups()
        if name not in made:
            return match.group(0)
        body = made[name].replace("](", f"]({PLOTS.name}/")
        lines = [f"<!-- measured: {name} -->", "", *body.splitlines(), "", "<!-- end -->"]
        return "\n".join(indent + line if line else line for line in lines)

    text, places = PLACE.subn(fragment, page.read_text())
    if places == 0:
        raise Failure(f"{page} has no place for figures")
    return text
