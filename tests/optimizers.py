"""Draws validation losses against tokens and against seconds, one curve a run.

    python3 tests/optimizers.py OUT.svg TOKENS NAME=MAIN.LOG=SECONDS...

TOKENS is of a step; SECONDS what a run took from its start, validations included. Where lines of a log end in t:SECONDS,
those count instead.
"""
import re
import sys

COLORS = ["#2050a0", "#208050", "#d05020"]
TOP, BOTTOM, WIDTH = 20, 300, 340


def main(out, tokens, *runs):
    curves = []
    for run in runs:
        name, log, seconds = run.split("=")
        points = [(int(step), float(loss), time and float(time)) for step, loss, time in
                  re.findall(r"^s:(\d+) tel:(\S+)(?: t:(\S+))?", open(log).read(), re.M) if int(step)]
        last = points[-1][0]
        curves.append((name, [(step * int(tokens) / 1e6, time or step / last * float(seconds), loss)
                              for step, loss, time in points]))
    low = int(10 * min(loss for _, points in curves for *_, loss in points)) / 10
    high = 5.5
    lines = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 350" font-family="Arial" font-size="13">',
             '<rect width="800" height="350" fill="white"/>']
    for panel, (axis, label) in enumerate([(0, "million tokens"), (1, "seconds, start and validation included")]):
        left = 50 + 390 * panel
        end = max(point[axis] for _, points in curves for point in points)
        y = lambda loss: BOTTOM - (BOTTOM - TOP) * (min(loss, high) - low) / (high - low)
        for tick in range(7):
            loss = low + (high - low) * tick / 6
            lines += [f'<path d="M{left} {y(loss):.1f}h{WIDTH}" stroke="#ddd"/>',
                      f'<text x="{left - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.1f}</text>']
            lines.append(f'<text x="{left + WIDTH * tick / 6:.0f}" y="{BOTTOM + 18}" text-anchor="middle">'
                         f"{end * tick / 6:.0f}</text>")
        lines.append(f'<text x="{left + WIDTH / 2}" y="{BOTTOM + 38}" text-anchor="middle">{label}</text>')
        for i, (name, points) in enumerate(curves):
            path = " ".join(f"{left + WIDTH * point[axis] / end:.1f},{y(point[2]):.1f}" for point in points)
            lines += [f'<polyline points="{path}" fill="none" stroke="{COLORS[i]}" stroke-width="2"/>',
                      f'<path d="M{left + 150} {TOP + 10 + 18 * i}h24" stroke="{COLORS[i]}" stroke-width="2"/>',
                      f'<text x="{left + 180}" y="{TOP + 14 + 18 * i}">{name}: {points[-1][2]:.2f}</text>']
    open(out, "w").write("\n".join([*lines, "</svg>\n"]))


main(*sys.argv[1:])
