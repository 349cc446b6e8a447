"""Draws tests/speed.svg, the bars in README, from the first table of docs/speed.md: tokens/s by model and program.

    python3 tests/bars.py OUT.svg
"""
import re
import sys
from pathlib import Path

STYLE = """<style>
rect { fill: #fff } text { fill: #222 } .ours { fill: #2050a0 } .theirs { fill: #b4bcc6 }
@media (prefers-color-scheme: dark) { rect { fill: #0d1117 } text { fill: #e6e6e6 } .ours { fill: #6ea8ff } .theirs { fill: #566070 } }
</style>"""
WIDTH, LEFT, BAR, GAP, HEAD = 800, 110, 20, 6, 30

table = (Path(__file__).parent.parent / "docs/speed.md").read_text().split("\n\n| | ")[1].split("\n\n")[0].split("\n")
cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table[2:]]
groups = [name.strip().replace("B =", "batch").split(",")[:2] for name in table[0].strip("| ").split("|")[::2]]  # every other column is memory
y, bars = 8, []
for column, name in enumerate(groups):
    speeds = {row[0]: row[1 + 2 * column] for row in cells}
    speeds = {name: int(m[0].replace(",", "")) for name, text in speeds.items() if (m := re.match(r"[\d,]+", text))}
    bars.append(f'<text x="{LEFT}" y="{y + 18}" font-weight="bold">{",".join(name)}</text>')
    y += HEAD
    for program, speed in speeds.items():
        width = (WIDTH - LEFT - 80) * speed / max(speeds.values())
        bars += [f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{program}</text>',
                 f'<path class="{"ours" if program == "gpt2" else "theirs"}" d="M{LEFT} {y}h{width:.1f}v{BAR}h-{width:.1f}z"/>',
                 f'<text x="{LEFT + width + 8:.1f}" y="{y + 15}">{speed:,}</text>']
        y += BAR + GAP
lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 34}" font-family="Arial, sans-serif" '
         'font-size="14">', "<title>Training speed in tokens per second on one H100</title>", STYLE,
         f'<rect width="{WIDTH}" height="{y + 34}"/>', *bars,
         f'<text x="{LEFT}" y="{y + 20}">tokens per second in training, one H100, longer is better</text>', "</svg>\n"]
Path(sys.argv[1]).write_text("\n".join(lines))
