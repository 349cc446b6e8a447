"""Draws gpt2's and PyTorch's training losses, and prints their mean gap over the last 50 steps.

    ./gpt2 train -e d12 -b 64 -t 1024 -d 65536 -x 200 -l 6e-4 -u 20 -i 'data/*train*' -j 'data/*val*' -m 3 --optimizer adamw -o run
    python3 tests/rival.py -b 64 -t 1024 -d 65536 -x 200 -l 6e-4 -u 20 -i 'data/*train*' -j 'data/*val*' -m 3 --out theirs
    python3 tests/learning.py run/main.log theirs tests/learning.svg
"""
import re
import sys

LEFT, RIGHT, TOP, BOTTOM, LAST = 60, 780, 20, 380, 50


def main(log, losses, out):
    ours = [float(loss) for loss in re.findall(r"^s:\d+ trl:(\S+)", open(log).read(), re.M)]
    theirs = [float(line) for line in open(losses)]
    assert len(ours) == len(theirs), f"{len(ours)} steps in {log}, {len(theirs)} in {losses}"
    gap = sum(a - b for a, b in list(zip(ours, theirs))[-LAST:]) / LAST
    print(f"mean of ours - PyTorch's over the last {LAST} of {len(ours)} steps: {gap:+.4f}")
    low, high = int(min(ours + theirs)), int(max(ours + theirs)) + 1
    lines = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 430" font-family="Arial" font-size="13">',
             '<rect width="800" height="430" fill="white"/>']
    for loss in range(low, high + 1):
        y = BOTTOM - (BOTTOM - TOP) * (loss - low) / (high - low)
        lines += [f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#ddd"/>',
                  f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss}</text>']
    for tick in range(5):
        x = LEFT + (RIGHT - LEFT) * tick / 4
        lines.append(f'<text x="{x:.0f}" y="{BOTTOM + 20}" text-anchor="middle">{len(ours) * tick // 4}</text>')
    for i, (name, curve, style) in enumerate([("PyTorch", theirs, 'stroke="#d05020" stroke-width="4" opacity="0.5"'),
                                              ("gpt2", ours, 'stroke="#2050a0" stroke-width="1.2"')]):
        points = " ".join(f"{LEFT + (RIGHT - LEFT) * step / len(curve):.1f},"
                          f"{BOTTOM - (BOTTOM - TOP) * (loss - low) / (high - low):.1f}" for step, loss in enumerate(curve))
        lines += [f'<polyline points="{points}" fill="none" {style}/>',
                  f'<path d="M600 {TOP + 20 + 20 * i}h40" {style}/>',
                  f'<text x="650" y="{TOP + 24 + 20 * i}">{name}</text>']
    lines.append(f'<text x="{(LEFT + RIGHT) // 2}" y="{BOTTOM + 42}" text-anchor="middle">steps of 65,536 tokens; '
                 f"mean gap of the last {LAST}: {gap:+.4f}</text>")
    open(out, "w").write("\n".join([*lines, "</svg>\n"]))


main(*sys.argv[1:])
