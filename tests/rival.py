"""The same training in PyTorch: llm.c's weights, batches, clipping and schedule, as `gpt2 train` has them, and all the
speed that plain PyTorch gives: torch.compile, cuDNN's attention, autocast to bf16, fused AdamW, a padded vocabulary.

    python3 tests/rival.py --init d12 -b 64 -t 1024 -d 524288 -x 20                        its speed, on random tokens
    python3 tests/rival.py -x 300 -i 'data/*train_*.bin' -j 'data/*val_*.bin' --out FILE   its losses, one a line

    torchrun --nproc-per-node 8 tests/rival.py --init d12                              on 8 GPUs, by DistributedDataParallel
    python3 tests/rival.py --decode                       generation: a static cache, compiled, in CUDA graphs, all in bf16

The last line has the median speed without the first 3 steps, and the most memory that tensors took at a time.
"""
import argparse
import contextlib
import glob
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
MODELS = {"d6": (6, 6, 384), "d12": (12, 12, 768), "d24": (24, 16, 1024), "d36": (36, 20, 1280), "d48": (48, 25, 1600)}
V, Vp, MAX_T = 50257, 50304, 1024
OPTIONS = {"-e --init": "d12", "-b --batch": 64, "-t --seq": 1024, "-d --total-batch": 524288, "-x --max-steps": 20,
           "-i --train-data": "", "-j --val-data": "", "-m --val-batches": 20, "-l --lr": 1e-3, "-u --warmup": 20,
           "-q --final-lr-frac": 0.1, "-c --weight-decay": 0.1, "--out": "/dev/null", "--compile-mode": "default"}


class Block(nn.Module):
    def __init__(self, NH, C):
        super().__init__()
        self.NH = NH
        self.ln1 = nn.LayerNorm(C)
        self.qkv = nn.Linear(C, 3 * C)
        self.attproj = nn.Linear(C, C)
        self.ln2 = nn.LayerNorm(C)
        self.fc = nn.Linear(C, 4 * C)
        self.fcproj = nn.Linear(4 * C, C)

    def forward(self, residual):
        B, T, C = residual.shape
        q, k, v = self.qkv(self.ln1(residual)).view(B, T, 3, self.NH, C // self.NH).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, NH, T, C // NH), as q, k and v are
        residual = residual + self.attproj(attention.transpose(1, 2).reshape(B, T, C))
        return residual + self.fcproj(F.gelu(self.fc(self.ln2(residual)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, L, NH, C):
        super().__init__()
        self.wte = nn.Embedding(Vp, C)
        self.wpe = nn.Embedding(MAX_T, C)
        self.blocks = nn.Sequential(*(Block(NH, C) for _ in range(L)))
        self.lnf = nn.LayerNorm(C)

    def forward(self, tokens, T):
        """The mean loss of B·T + 1 tokens: the last target of a row is the first input of the next."""
        residual = self.blocks(self.wte(tokens[:-1].view(-1, T)) + self.wpe.weight[:T])
        logits = F.linear(self.lnf(residual), self.wte.weight)
        # Not logits[..., :V], whose rows would lose their alignment; torch.compile fuses the mask into the loss.
        logits = logits.masked_fill(torch.arange(Vp, device=logits.device) >= V, -math.inf)
        return F.cross_entropy(logits.flatten(0, 1), tokens[1:])


@torch.no_grad()
def initialize(model):
    generator = torch.Generator().manual_seed(42)  # llm.c's weights are drawn in the order of the parameters
    for name, parameter in model.named_parameters():
        parameter.fill_(1 if parameter.dim() == 1 and name.endswith("weight") else 0)  # a layer norm's weight is 1
        if parameter.dim() == 2:  # [:V] leaves out wte's padding, and nothing of the others
            std = 0.02 / math.sqrt(2 * len(model.blocks)) if "proj" in name else 0.02
            parameter[:V].copy_(torch.empty(parameter[:V].shape).normal_(0, std, generator=generator))


def permute(items, random):
    for i in range(len(items) - 1, 0, -1) if random else ():
        j = random.randint(2**32, dtype=np.uint32) % (i + 1)  # NumPy gives the generator's raw numbers, torch does not
        items[i], items[j] = items[j], items[i]
    return items


def samples(pattern, size, random=None):
    """Yields size + 1 tokens at a time for ever: random ones, or the shards', which random puts into llm.c's order; of a
    sample of all ranks, this rank's part."""
    while not pattern:
        yield torch.randint(V, (size + 1,), device="cuda")
    paths = sorted(glob.glob(pattern))
    while paths:
        for path in permute(paths, random):
            shard = np.memmap(path, np.uint16, "r", offset=1024)
            for start in permute(list(range(0, len(shard) - RANKS * size, RANKS * size)), random):
                start += RANK * size
                tokens = torch.from_numpy(shard[start : start + size + 1].astype(np.int64))
                yield tokens.pin_memory().to("cuda", non_blocking=True)  # not pinned, it would wait for an idle GPU


def learning_rate(step, o):
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - o.warmup) / (o.max_steps - o.warmup)))
    return o.lr * (o.final_lr_frac + cosine * (1 - o.final_lr_frac))


def train(model, o, without_sync):
    groups = [{"params": [parameter for parameter in model.parameters() if parameter.dim() == 2]},
              {"params": [parameter for parameter in model.parameters() if parameter.dim() == 1], "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=o.weight_decay, fused=True)
    size, seconds, losses = o.batch * o.seq, [], open(o.out, "w")
    assert o.total_batch % (RANKS * size) == 0, "--total-batch must be a multiple of --batch x --seq x GPUs"
    steps = o.total_batch // (RANKS * size)
    data, val_data = samples(o.train_data, size, np.random.RandomState(42)), samples(o.val_data, size)
    for step in range(o.max_steps):
        torch.cuda.synchronize()
        start, mean_loss = time.perf_counter(), 0
        for micro in range(steps):
            with contextlib.nullcontext() if micro == steps - 1 else without_sync():
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(next(data), o.seq) / steps  # gradients are averaged over ranks
                loss.backward()
            mean_loss += loss.detach()
        gradients = [parameter.grad for parameter in model.parameters()]
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, 1 / norm.clamp(min=1))  # llm.c's clipping: no epsilon, unlike clip_grad_norm_
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, o)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if step == 0:  # Linux keeps a process's start in hundredths of a second since boot
            first = time.clock_gettime(time.CLOCK_BOOTTIME) - int(open("/proc/self/stat").read().split()[21]) / 100
        if RANK > 0:
            continue
        print(f"step {step + 1:4}/{o.max_steps} | loss {mean_loss:.6f} | norm {norm:.4f} |",
              f"{seconds[-1] * 1e3:.2f} ms | {o.total_batch / seconds[-1]:.0f} tok/s", flush=True)
        print(f"{mean_loss:.6f}", file=losses, flush=True)
    speed, memory = o.total_batch / np.median(seconds[3:] or seconds), torch.cuda.max_memory_allocated() / 1e9
    if o.val_data:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            print(f"val loss {np.mean([model(next(val_data), o.seq).item() for _ in range(o.val_batches)]):.6f}")
    if RANK == 0:
        print(f"pytorch {torch.__version__} {speed:.0f} tok/s, {memory:.1f} GB, {first:.1f} s to the first step")


class Decoder(nn.Module):
    """One more token of B sequences, whose keys and values have a place for each position."""

    def __init__(self, model, NH, B):
        super().__init__()
        self.model, self.NH = model, NH
        C = model.wte.weight.shape[1]
        for i, _ in enumerate(model.blocks):
            self.register_buffer(f"cache{i}", torch.zeros(2, B, NH, MAX_T, C // NH, dtype=torch.bfloat16, device="cuda"))

    def forward(self, tokens, position, temperature, top_k):
        residual = self.model.wte(tokens) + self.model.wpe(position)
        B, C = residual.shape
        visible = (torch.arange(MAX_T, device="cuda") <= position)[None, None, None]  # for (B, NH, 1, MAX_T)
        for i, block in enumerate(self.model.blocks):
            qkv = block.qkv(block.ln1(residual)).view(B, 3, self.NH, 1, C // self.NH)
            cache = getattr(self, f"cache{i}")
            cache.index_copy_(3, position, qkv[:, 1:].transpose(0, 1))
            y = F.scaled_dot_product_attention(qkv[:, 0], cache[0], cache[1], attn_mask=visible)
            residual = residual + block.attproj(y.reshape(B, C))
            residual = residual + block.fcproj(F.gelu(block.fc(block.ln2(residual)), approximate="tanh"))
        logits = F.linear(self.model.lnf(residual), self.model.wte.weight)[:, :V].float()
        if temperature == 0:
            return logits.argmax(-1)
        best, indices = torch.topk(logits, top_k)
        noise = -torch.empty_like(best).exponential_().log()  # Gumbel's, as multinomial does it
        return indices.gather(1, (best / temperature + noise).argmax(-1, keepdim=True))[:, 0]


@torch.no_grad()
def decode(model, o):
    model = model.bfloat16()
    for B, temperature in (1, 0.0), (1, 0.8), (64, 0.8):
        step = torch.compile(Decoder(model, MODELS[o.init][1], B))
        tokens, position = torch.zeros(B, dtype=torch.long, device="cuda"), torch.tensor([10], device="cuda")

        def advance():
            tokens.copy_(step(tokens, position, temperature, 50))
            position.add_(1)

        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                advance()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            advance()
        for i in range(300):
            if i == 44:  # warm by now
                torch.cuda.synchronize()
                start = time.perf_counter()
            graph.replay()
        torch.cuda.synchronize()
        rate = 256 * B / (time.perf_counter() - start)
        print(f"pytorch decode, B = {B}, {'greedy' if temperature == 0 else 'top-k 50'}: {rate:.0f} tok/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for names, default in OPTIONS.items():
        parser.add_argument(*names.split(), type=type(default), default=default)
    parser.add_argument("--decode", action="store_true")
    o = parser.parse_args()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with torch.device("cuda"):
        model = GPT2(*MODELS[o.init])
    initialize(model)
    if o.decode:
        return decode(model, o)
    without_sync = contextlib.nullcontext
    if RANKS > 1:
        torch.distributed.init_process_group("nccl")
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        without_sync = model.no_sync
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        train(torch.compile(model, mode=o.compile_mode), o, without_sync)
    if RANKS > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
