"""Two kinds of plots as SVG, with logarithmic axes."""
import math
from html import escape

COLORS = ["#d62728", "#1f77b4", "#17becf", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b"]
WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 36, 48


def text(x, y, content, anchor="start", size=12):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(content)}</text>'


def save(path, title, parts, height=HEIGHT):
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    )
    path.write_text("\n".join([head, text(LEFT, 20, title, size=14), *parts, "</svg>"]) + "\n")


def ticks(low, high):
    """Powers of ten from at most `low` to at least `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def label(number):
    return f"{number:g}" if number < 1e6 else f"{number / 1e6:g}M"


def lines(path, title, x_title, series):
    """A line for each name in `series`: points (x, y), both above zero."""
    points = [point for line in series.values() for point in line]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))

    def place(x, y):
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        part = (math.log(x) - math.log(x_low)) / (math.log(x_high) - math.log(x_low))
        up = (math.log(y) - math.log(y_ticks[0])) / (math.log(y_ticks[-1]) - math.log(y_ticks[0]))
        return LEFT + part * (right - LEFT), bottom - up * (bottom - TOP)

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(text(LEFT - 6, y + 4, label(tick), "end"))
    for tick in sorted({x for x, _ in points}):
        x, y = place(tick, y_ticks[0])
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{y:.1f}" stroke="#eee"/>')
        parts.append(text(x, y + 16, label(tick), "middle", 10))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_title, "middle"))
    for at, (name, line) in enumerate(series.items()):
        color, y = COLORS[at % len(COLORS)], TOP + 12 + 18 * at
        places = [place(*point) for point in line]
        path_of = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path_of}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
        parts.append(f'<rect x="{WIDTH - RIGHT + 12}" y="{y - 9}" width="12" height="4" fill="{color}"/>')
        parts.append(text(WIDTH - RIGHT + 30, y - 3, name))
    save(path, title, parts)


def bars(path, title, values):
    """A bar for each pair of a name and a number above zero."""
    scale = ticks(min(value for _, value in values), max(value for _, value in values))
    height = TOP + 28 * len(values) + BOTTOM
    left, right = 190, WIDTH - 70

    def place(value):
        part = (math.log(value) - math.log(scale[0])) / (math.log(scale[-1]) - math.log(scale[0]))
        return left + part * (right - left)

    parts = []
    for tick in scale:
        x = place(tick)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{height - BOTTOM}" stroke="#ddd"/>')
        parts.append(text(x, height - BOTTOM + 16, label(tick), "middle"))
    for at, (name, value) in enumerate(sorted(values, key=lambda pair: pair[1])):
        y = TOP + 28 * at + 4
        parts.append(text(left - 8, y + 14, name, "end"))
        parts.append(f'<rect x="{left}" y="{y}" width="{place(value) - left:.1f}" height="20" fill="{COLORS[1]}"/>')
        parts.append(text(place(value) + 6, y + 14, f"{value:.3g}"))
    save(path, title, parts, height)
