"""tokenizer.ids: tokenizer.txt by npm's tiktoken 1.0.22, OpenAI's Rust as WASM, get_encoding("gpt2"). Not made here.
The rest of golden/ is, by plain PyTorch: fp32, CPU, one thread; the file formats are llm.c's.

    python tests/golden.py tests/golden                   all files below: 0.9 MB, seconds; no network, no NumPy
    python tests/golden.py DIR --channels 192 --seq 64    another shape (--help lists the options): model.bin, state.bin

model.bin         a random GPT-2 checkpoint, biases and layer norms random too, so that every term counts
state.bin         a batch, its logits, its mean loss and the gradients of one backward through model.bin
tokens_train.bin  4,000 tokens of a random Markov chain; tokens_val.bin: its next 500
train.txt         ten AdamW steps from model.bin, samples in order, 3 micro-batches a step: on each line step (from 1),
                  loss, gradient norm before clipping, learning rate; at last "val" and the loss of 5 validation batches
train_muon.txt    the same with Muon for the layers' matrices: torch.optim.Muon(adjust_lr_fn="match_rms_adamw") in fp32
trained.bin       the checkpoint after AdamW's. The key third of its qkvb is noise: softmax ignores what is added to all of
                  a row's scores, so that gradient is rounding error, which Adam scales up. No loss depends on it.
normals.txt       seed 42's first raw 32-bit numbers, and what normal_ makes of that seed
"""
import argparse
import array
import math
from pathlib import Path

import torch
import torch.nn.functional as F

SHAPE = {"heads": 3, "channels": 48, "layers": 2, "vocab": 211, "seq": 21, "batch": 2}
DECAYED = {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}  # the others are vectors, one a layer
STEPS, MICRO_BATCHES, VAL_BATCHES = 10, 3, 5
LR, WARMUP, FINAL_LR = 1e-2, 4, 1e-3
MUONS = ("qkvw", "attprojw", "fcw", "fcprojw")


def random_parameters(V, Vp, maxT, L, C):
    """The 16 tensors in checkpoint order; weights shrink with the width (0.2 at C = 48) to keep the logits' spread."""
    shapes = {"wte": (Vp, C), "wpe": (maxT, C), "ln1w": (L, C), "ln1b": (L, C), "qkvw": (L, 3 * C, C),
              "qkvb": (L, 3 * C), "attprojw": (L, C, C), "attprojb": (L, C), "ln2w": (L, C), "ln2b": (L, C),
              "fcw": (L, 4 * C, C), "fcb": (L, 4 * C), "fcprojw": (L, C, 4 * C), "fcprojb": (L, C),
              "lnfw": (C,), "lnfb": (C,)}
    p = {name: torch.randn(shape) * (1.4 / math.sqrt(C) if name in DECAYED else 0.1) for name, shape in shapes.items()}
    for name in ("ln1w", "ln2w", "lnfw"):
        p[name] += 1
    p["wte"][V:] = 0
    # Numbers of bf16, so that it has the same weights.
    return {name: tensor.bfloat16().float().requires_grad_() for name, tensor in p.items()}


def layer_norm(x, w, b):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * w + b


def forward(p, x, y, V, NH):
    """x and y are (B, T); returns the logits (B, T, V) and their mean loss."""
    (B, T), (L, C) = x.shape, p["ln1w"].shape
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    residual = p["wte"][x] + p["wpe"][:T]
    for l in range(L):
        qkv = F.linear(layer_norm(residual, p["ln1w"][l], p["ln1b"][l]), p["qkvw"][l], p["qkvb"][l])  # (B, T, 3C)
        q, k, v = qkv.view(B, T, 3, NH, C // NH).permute(2, 0, 3, 1, 4)  # each (B, NH, T, HS)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(C // NH)).masked_fill(future, -math.inf)
        attention = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(B, T, C)
        residual = residual + F.linear(attention, p["attprojw"][l], p["attprojb"][l])
        h = F.linear(layer_norm(residual, p["ln2w"][l], p["ln2b"][l]), p["fcw"][l], p["fcb"][l])  # (B, T, 4C)
        gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        residual = residual + F.linear(gelu, p["fcprojw"][l], p["fcprojb"][l])
    logits = layer_norm(residual, p["lnfw"], p["lnfb"]) @ p["wte"][:V].T
    return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())


def markov_chain(n, V):
    """n tokens; four in five are one of their predecessor's four successors, the rest anything."""
    successors = torch.randint(V, (V, 4)).tolist()
    choices, jumps = torch.randint(5, (n,)).tolist(), torch.randint(V, (n,)).tolist()
    tokens = jumps[:1]
    for choice, jump in zip(choices[1:], jumps[1:]):
        tokens.append(jump if choice == 4 else successors[tokens[-1]][choice])
    return torch.tensor(tokens)


def sample(shard, i, B, T):
    """Sample i of a shard: inputs and targets, each (B, T)."""
    tokens = shard[i * B * T : (i + 1) * B * T + 1]
    return tokens[:-1].view(B, T), tokens[1:].view(B, T)


def write(path, header, *parts):
    """The 256 integers of the header, then tensors: (type code, tensor)."""
    parts = [("i", torch.tensor(header + [0] * (256 - len(header)))), *parts]
    path.write_bytes(b"".join(array.array(code, tensor.flatten().tolist()).tobytes() for code, tensor in parts))


def muon(w, g, m, lr, momentum):
    """One update of the matrix w (rows, columns), by its gradient g, and of its momentum m."""
    m.lerp_(g, 1 - momentum)
    x = g.lerp(m, momentum)
    x = x / x.norm().clamp(min=1e-7)
    x = x.T if w.shape[0] > w.shape[1] else x
    for _ in range(5):
        A = x @ x.T
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    x = x.T if w.shape[0] > w.shape[1] else x
    w.mul_(1 - lr * 0.1).sub_(x, alpha=lr * 0.2 * math.sqrt(max(w.shape)))


def train(p, train_tokens, val_tokens, V, NH, B, T, muons=()):
    """Ten steps on p, in place; yields the lines of train.txt. The tensors named are updated by Muon."""
    decayed, others = ([p[name] for name in p if name not in muons and (name in DECAYED) == wanted]
                       for wanted in (True, False))
    momentum = {name: torch.zeros_like(p[name]) for name in muons}
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(STEPS):
        for tensor in p.values():
            tensor.grad = None
        losses = []
        for micro_batch in range(MICRO_BATCHES):
            _, loss = forward(p, *sample(train_tokens, step * MICRO_BATCHES + micro_batch, B, T), V, NH)
            (loss / MICRO_BATCHES).backward()
            losses.append(loss.item())
        norm = math.sqrt(sum(tensor.grad.double().square().sum().item() for tensor in p.values()))
        for tensor in p.values():
            tensor.grad.mul_(1 / norm if norm > 1 else 1.0)  # llm.c's clipping: no epsilon, unlike clip_grad_norm_
        cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        lr = LR * (step + 1) / WARMUP if step < WARMUP else FINAL_LR + cosine * (LR - FINAL_LR)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            for name in muons:
                _, rows, columns = p[name].shape
                rows = columns if name == "qkvw" else rows  # queries, keys and values are a matrix each
                matrices = (tensor.view(-1, rows, columns) for tensor in (p[name], p[name].grad, momentum[name]))
                for w, g, m in zip(*matrices):
                    muon(w, g, m, lr, 0.85 + 0.1 * min(step / 300, 1))
        yield f"{step + 1} {sum(losses) / MICRO_BATCHES:.9g} {norm:.9g} {lr:.9g}\n"
    losses = [forward(p, *sample(val_tokens, i, B, T), V, NH)[1].item() for i in range(VAL_BATCHES)]
    yield f"val {sum(losses) / VAL_BATCHES:.9g}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    o = parser.parse_args()
    NH, C, L, V, T, B = (getattr(o, name) for name in SHAPE)
    Vp, maxT = -(-V // 128) * 128, max(32, T)
    assert C % NH == 0, "--channels must be a multiple of --heads"
    o.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(1337)
    p = random_parameters(V, Vp, maxT, L, C)
    header = [20240326, 3, maxT, V, L, NH, C, Vp]
    write(o.out / "model.bin", header, *(("f", tensor) for tensor in p.values()))
    x, y = sample(markov_chain(B * T + 1, V), 0, B, T)
    logits, loss = forward(p, x, y, V, NH)
    loss.backward()
    write(o.out / "state.bin", [20240327, 2, B, T], ("i", x), ("i", y), ("f", logits), ("f", loss),
          *(("f", tensor.grad) for tensor in p.values()))
    if (NH, C, L, V, T, B) == tuple(SHAPE.values()):
        train_tokens, val_tokens = markov_chain(4500, V).split([4000, 500])
        write(o.out / "tokens_train.bin", [20240520, 1, 4000], ("H", train_tokens))
        write(o.out / "tokens_val.bin", [20240520, 1, 500], ("H", val_tokens))
        same = {name: tensor.detach().clone().requires_grad_() for name, tensor in p.items()}
        (o.out / "train.txt").write_text("".join(train(p, train_tokens, val_tokens, V, NH, B, T)))
        (o.out / "train_muon.txt").write_text("".join(train(same, train_tokens, val_tokens, V, NH, B, T, MUONS)))
        write(o.out / "trained.bin", header, *(("f", tensor) for tensor in p.values()))
        # An int64 over its full range takes two raw numbers, the high half first.
        pairs = torch.empty(2, dtype=torch.int64).random_(-(2**63), None, generator=torch.manual_seed(42)).tolist()
        lines = ["raw " + " ".join(str(half & 0xFFFFFFFF) for pair in pairs for half in (pair >> 32, pair))]
        for n, std in (16, 0.02), (100, 1.0):
            normals = torch.empty(n).normal_(0, std, generator=torch.manual_seed(42)).tolist()
            lines.append(f"normal{n} " + " ".join(f"{value:.9g}" for value in normals))
        (o.out / "normals.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
