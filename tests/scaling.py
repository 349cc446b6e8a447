"""How communication sits under the backward pass: the table in docs/many-gpus.md, by a formula. Nothing of it but the
rates of one GPU was measured.

    bytes   = 6·P·(N − 1)/N: fp32 gradients are reduce-scattered (4 bytes), bf16 weights gathered (2); all pass each node once
    reduce  = 4/6·bytes / rate of the link + (L + 1)·(N − 1)·hop;  gather = 2/6·bytes / rate + 4·(N − 1)·hop
    exposed = max(0, reduce − backward) + gather, where the backward pass is 2/3 of the last micro-step
    efficiency = step / (step + exposed)

Links carry 80% of their nominal rate: NVLink 4 450 GB/s a GPU, InfiniBand 8 x 50 GB/s a node of 8, Ethernet 12.5 GB/s a node.
A hop takes 2 us inside a node and 5 us between nodes; NCCL's rings have N − 1 of them, its trees fewer.
"""
MODELS = {  # parameters, layers, tokens a micro-step, tokens/s of one H100 (d24, d36: 52% MFU, not measured)
    "d12": (124.5e6, 12, 64 * 1024, 645_100), "d24": (354.9e6, 24, 32 * 1024, None),
    "d36": (774.1e6, 36, 16 * 1024, None), "d48": (1557.7e6, 48, 16 * 1024, 56_000)}
CHANNELS = {"d12": 768, "d24": 1024, "d36": 1280, "d48": 1600}
LINKS = {"NVLink": (450e9, 2e-6, [8]), "InfiniBand": (400e9, 5e-6, [64, 256, 1024]),
         "Ethernet": (12.5e9, 5e-6, [16, 64, 1024])}
GATHERS = 4


def exposed(P, L, N, rate, hop, micro):
    """Seconds that a step waits, and for what most."""
    latency = (N - 1) * hop
    reduce_ = 4 * P * (N - 1) / N / rate + (L + 1) * latency
    gather = 2 * P * (N - 1) / N / rate
    waits = {"reduce": max(0, reduce_ - 2 / 3 * micro), "gather": gather, "hops": GATHERS * latency}
    return sum(waits.values()), max(waits, key=waits.get)


columns = [(link, N) for link, (_, _, counts) in LINKS.items() for N in counts]
print("| | " + " | ".join(f"{link}: {N}" for link, N in columns) + " |")
print("| --- |" + " --- |" * len(columns))
for name, (P, L, tokens, speed) in MODELS.items():
    speed = speed or 0.52 * 989e12 / (6 * P + 6 * L * CHANNELS[name] * 1024)
    micro, cells = tokens / speed, []
    for link, N in columns:
        nominal, hop, _ = LINKS[link]
        wait, bound = exposed(P, L, N, 0.8 * nominal, hop, micro)
        steps = next(n for n in range(1, 10_000) if n * micro / (n * micro + wait) >= 0.9)
        cells.append(f"{1 / (1 + wait / micro):.0%}, {bound}; {steps * tokens >> 10}k")
    print(f"| {name} ({6 * P / 1e9:.2g} GB) | " + " | ".join(cells) + " |")
