"""Draws pictures for the documents: SVG as text, whose colours follow the reader's light or dark mode."""

import re

LIGHT = dict(page="#ffffff", ink="#1f2328", grid="#d8dee4", grey="#6e7781")
LIGHT.update(blue="#0969da", orange="#c4500b", green="#11813a", purple="#8250df")
DARK = dict(page="#0d1117", ink="#e6edf3", grid="#30363d", grey="#8b949e")
DARK.update(blue="#58a6ff", orange="#f0883e", green="#3fb950", purple="#bc8cff")


def page(width, height, parts, size=13):
    """Returns the whole file. parts: lines that the other functions make. size: of the font, in pixels."""
    light, dark = ("".join(f" --{name}: {value};" for name, value in colours.items())
                   for colours in (LIGHT, DARK))
    css = f":root {{{light} }} @media (prefers-color-scheme: dark) {{ :root {{{dark} }} }}"
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}">']
    head += [f"<style>{css} text {{ font: {size}px system-ui, sans-serif; fill: var(--ink); }}</style>"]
    head += [f'<rect width="{width}" height="{height}" style="fill: var(--page)"/>']
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def scale(low, high, start, end):
    """Returns a function that maps values from low to high linearly to places from start to end."""
    return lambda value: round(start + (end - start) * (value - low) / (high - low), 1)


def path(points, style, **more):
    more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items() if value)
    return f'<path d="M{" ".join(f"{a},{b}" for a, b in points)}" style="{style}"{more}/>'


def line(points, colour, dashes=""):
    return path(points, f"fill: none; stroke: var(--{colour}); stroke-width: 2", stroke_dasharray=dashes)


def text(x, y, words, anchor="start", colour=""):
    """Returns a line of text. A coloured one has an outline in the page's colour, to be readable on lines."""
    style = ""
    if colour:
        style = f' style="fill: var(--{colour}); stroke: var(--page); stroke-width: 6; paint-order: stroke"'
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{style}>{words}</text>'


def level(left, right, y, words):
    """Returns a horizontal grid line, and its label on the left."""
    return [path([(left, y), (right, y)], "stroke: var(--grid)"), text(left - 8, y + 4, words, "end")]


def box(x, y, width, height, lines, colour="grey", dashes="", size=13):
    """A frame with lines of words in its middle. Words that are too long for it are an error."""
    for words in lines:
        if 0.53 * size * len(re.sub("<.*?>", "", words)) > width:  # the mean width of a letter
            raise ValueError(f"'{words}' is wider than its box of {width} pixels")
    corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)]
    first = y + height / 2 - (len(lines) - 1) * 0.65 * size + 0.35 * size
    return [path(corners, f"fill: var(--page); stroke: var(--{colour}); stroke-width: 1.5",
                 stroke_dasharray=dashes),
            *(text(x + width / 2, round(first + 1.3 * size * i, 1), words, "middle")
              for i, words in enumerate(lines))]


def arrow(points, colour="grey", dashes=""):
    """A line through these points with a head at the last one, which it reaches along an axis."""
    (a, b), (x, y) = points[-2:]
    dx, dy = (x > a) - (x < a), (y > b) - (y < b)
    head = [(x, y), (x - 8 * dx + 4 * dy, y - 8 * dy + 4 * dx), (x - 8 * dx - 4 * dy, y - 8 * dy - 4 * dx)]
    return [path(points, f"fill: none; stroke: var(--{colour}); stroke-width: 1.5", stroke_dasharray=dashes),
            path(head, f"fill: var(--{colour})")]
