"""Draws the losses of runs against tokens and, if their seconds are given, against time.

    python3 tests/curves.py OUT.svg trl|tel TOKENS NAME=FILE[=SECONDS]...

trl are training losses and tel validation losses. TOKENS is of a step. FILE is a main.log, or has a training loss a line
as tests/rival.py --out writes them. SECONDS is what a run took from its start, validations included; where lines of a log
end in t:SECONDS, those count instead. Prints how far the first two runs are apart over the last 50 losses. The pictures:

    train="-b 64 -t 1024 -d 65536 -x 200 -l 6e-4 -u 20 -i data/*train* -j data/*val* -m 3"
    ./gpt2 train -e d12 $train --optimizer adamw -o run; python3 tests/rival.py $train --out theirs
    python3 tests/curves.py tests/learning.svg trl 65536 gpt2=run/main.log PyTorch=theirs
    python3 tests/curves.py tests/optimizers.svg tel 65536 "gpt2, Muon=muon/main.log=69" "gpt2, AdamW=adamw/main.log=68"
"""
import re
import sys

STYLE = """<style>
rect { fill: #fff } text { fill: #222 } .grid { stroke: #ddd } .a { stroke: #2050a0 } .b { stroke: #d05020 } .c { stroke: #208050 }
@media (prefers-color-scheme: dark) {
rect { fill: #0d1117 } text { fill: #e6e6e6 } .grid { stroke: #333b45 }
.a { stroke: #6ea8ff } .b { stroke: #ff8a5c } .c { stroke: #5fd08f } }
</style>"""
TOP, BOTTOM, TICKS, LAST = 20, 300, 6, 50


def read(kind, tokens, name, file, seconds=None):
    """A run's name and its points: million tokens, seconds or None, loss."""
    text = open(file).read()
    points = [(int(step) + (kind == "trl"), float(loss), time) for step, loss, time in
              re.findall(rf"^s:(\d+) {kind}:(\S+).*?(?: t:(\S+))?$", text, re.M) if kind == "trl" or int(step)]
    points = points or [(step, float(loss), None) for step, loss in enumerate(text.split(), 1)]
    return name, [(step * tokens / 1e6, float(time or step / points[-1][0] * float(seconds)) if time or seconds else None,
                   loss) for step, loss, time in points]


def main(out, kind, tokens, *runs):
    curves = [read(kind, int(tokens), *run.split("=")) for run in runs]
    axes = ["million tokens", "seconds, start and validation included"][:2 if curves[0][1][0][1] is not None else 1]
    width = 800 // len(axes) - 70
    low = int(10 * min(loss for _, points in curves for *_, loss in points)) / 10
    high = low + 3 if kind == "tel" else max(loss for _, points in curves for *_, loss in points)
    y = lambda loss: BOTTOM - (BOTTOM - TOP) * (min(loss, high) - low) / (high - low)
    lines = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 350" font-family="Arial" font-size="13">',
             STYLE, '<rect width="800" height="350"/>']
    for axis, label in enumerate(axes):
        left = 50 + 400 * axis
        end = max(point[axis] for _, points in curves for point in points)
        for tick in range(TICKS + 1):
            loss = low + (high - low) * tick / TICKS
            lines += [f'<path d="M{left} {y(loss):.1f}h{width}" class="grid"/>',
                      f'<text x="{left - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.1f}</text>',
                      f'<text x="{left + width * tick / TICKS:.0f}" y="{BOTTOM + 18}" text-anchor="middle">'
                      f"{end * tick / TICKS:.0f}</text>"]
        lines.append(f'<text x="{left + width / 2}" y="{BOTTOM + 38}" text-anchor="middle">{label}</text>')
        for i, ((name, points), color) in enumerate(zip(curves, "abc")):
            path = " ".join(f"{left + width * point[axis] / end:.1f},{y(point[2]):.1f}" for point in points)
            lines += [f'<polyline points="{path}" fill="none" class="{color}" stroke-width="1.5"/>',
                      f'<path d="M{left + 150} {TOP + 10 + 18 * i}h24" class="{color}" stroke-width="2"/>',
                      f'<text x="{left + 180}" y="{TOP + 14 + 18 * i}">{name}: {points[-1][2]:.2f}</text>']
    open(out, "w").write("\n".join([*lines, "</svg>\n"]))
    first, second, *_ = [[loss for *_, loss in points] for _, points in curves]
    assert len(first) == len(second), f"{len(first)} and {len(second)} losses"
    gap = sum(a - b for a, b in list(zip(first, second))[-LAST:]) / min(LAST, len(first))
    print(f"mean of the first's - the second's over the last {LAST} of {len(first)} losses: {gap:+.4f}")


main(*sys.argv[1:])
