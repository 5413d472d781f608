"""Writes what was measured into docs/performance.md."""
import re
from pathlib import Path

import tables
from processes import Failure

PAGE = Path("docs/performance.md")
PLOTS = Path("docs/performance")


def write(report, out):
    """Replaces what lies between `<!-- measured: NAME -->` and `<!-- end -->`, and the plots."""
    made = tables.fragments(report, out)
    page = PAGE.read_text()

    def fragment(match):
        name = match.group(1)
        if name not in made:
            raise Failure(f"{PAGE} has a place for {name}, which was not measured")
        body = made[name].replace("](", f"]({PLOTS.name}/")
        return f"<!-- measured: {name} -->\n\n{body}\n\n<!-- end -->"

    page, places = re.subn(r"<!-- measured: (\w+) -->.*?<!-- end -->", fragment, page, flags=re.DOTALL)
    if places == 0:
        raise Failure(f"{PAGE} has no place for figures")
    PLOTS.mkdir(exist_ok=True)
    for plot in sorted(out.glob("*.svg")):
        (PLOTS / plot.name).write_text(plot.read_text())
    PAGE.write_text(page)
    print(f"{PAGE}: {places} places")
