"""Proves that ./gpt2 and Hugging Face's transformers (5.x) read each other's models, bit by bit where that is possible.

    python tests/hf.py [./gpt2]           a line for each check, exit status 1 if one fails; a minute, no network
    python tests/hf.py --golden FOLDER    writes a model and its greedy text, which tests/golden/transformers has

It makes random GPT-2s of odd sizes, saves them with transformers in every type, compares logits, greedy tokens and
gradients, exports them again, and compares tokenizers. On a machine with a GPU, both devices compute, in fp32.
"""
import array
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

GPT2 = str(Path(sys.argv[1] if len(sys.argv) > 1 else "./gpt2").resolve())
GOLDEN = Path(__file__).resolve().parent / "golden"
DEVICES = [["--device", "cpu"]] + [["--device", "cuda", "--precision", "fp32"]] * torch.cuda.is_available()
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {
    "odd": dict(n_layer=3, n_head=3, n_embd=48, vocab_size=300, n_positions=40),
    "text": dict(n_layer=2, n_head=2, n_embd=128, vocab_size=50257, n_positions=64),
}
failures = 0


def check(name, passed, detail=""):
    global failures
    failures += not passed
    print(f"{'PASS' if passed else 'FAIL'} {name}{f': {detail}' if detail != '' else ''}", flush=True)


def run(*words):
    """Standard output of a command of gpt2; a failure is a check that fails."""
    words = [GPT2, *map(str, words)]
    result = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", timeout=600)
    if result.returncode:
        check(" ".join(words), False, f"exit status {result.returncode}: {result.stderr.strip()}")
    return result.stdout


def random_model(sizes):
    """Every parameter random, so that each term counts."""
    special = sizes["vocab_size"] - 1
    config = GPT2Config(**sizes, bos_token_id=special, eos_token_id=special)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * (1.4 / config.n_embd**0.5 if p.dim() == 2 else 0.1) + (".ln_" in name and
                    name.endswith("weight")))
    return model


def load(folder):
    """A folder's model in fp32, with plain attention."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def greedy(model, prompt, n):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def write_state(path, model):
    """A batch, its logits, loss and gradients, in the format of golden.py's state.bin."""
    c, B = model.config, 2
    T, Vp = c.n_positions - 1, -(-c.vocab_size // 128) * 128
    x, y = torch.randint(c.vocab_size, (2, B, T))
    model.zero_grad()
    logits = model(x).logits
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    t, h = model.transformer, model.transformer.h
    wte = F.pad(t.wte.weight.grad, (0, 0, 0, Vp - c.vocab_size))
    vector, matrix = lambda p: p.grad, lambda p: p.grad.T  # Conv1D has (in, out)
    layers = [(vector, "ln_1.weight"), (vector, "ln_1.bias"), (matrix, "attn.c_attn.weight"),
              (vector, "attn.c_attn.bias"), (matrix, "attn.c_proj.weight"), (vector, "attn.c_proj.bias"),
              (vector, "ln_2.weight"), (vector, "ln_2.bias"), (matrix, "mlp.c_fc.weight"), (vector, "mlp.c_fc.bias"),
              (matrix, "mlp.c_proj.weight"), (vector, "mlp.c_proj.bias")]
    parts = [("i", x), ("i", y), ("f", logits), ("f", loss), ("f", wte), ("f", t.wpe.weight.grad)]
    parts += [("f", of(block.get_parameter(name))) for of, name in layers for block in h]
    parts += [("f", t.ln_f.weight.grad), ("f", t.ln_f.bias.grad)]
    header = [20240327, 2, B, T]
    with open(path, "wb") as file:
        file.write(array.array("i", header + [0] * (256 - len(header))).tobytes())
        for code, tensor in parts:
            file.write(array.array(code, tensor.detach().flatten().tolist()).tobytes())


def compare(name, init, model, work):
    """Logits to 1e-5 of their norm, gradients, and the same greedy tokens, on each device."""
    write_state(work / "state.bin", model)
    prompt, n = [5, 1, 4, 2], 24
    expected = greedy(model, prompt, n)
    for device in DEVICES:
        table = run("verify", "-e", init, "--state", work / "state.bin", *device)
        errors = {row[0]: float(row[2]) for row in map(str.split, table.splitlines()[1:])}
        where = f"{name} on {device[1]}"
        check(f"{where}: logits to 1e-5", errors.get("logits", 1) < 1e-5, errors.get("logits"))
        worst = max(errors, key=errors.get) if errors else "all"
        check(f"{where}: gradients to 1e-4", len(errors) == 18 and errors[worst] < 1e-4, f"{worst} {errors.get(worst)}")
        ids = ",".join(map(str, prompt))
        found = run("sample", "-e", init, "--prompt-ids", ids, "-n", n, "--temperature", 0, *device)
        check(f"{where}: greedy tokens", found.split() == [str(id) for id in expected], found.strip())


def same_tensors(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    a, b = ({name.removeprefix("transformer."): tensor for name, tensor in x.items() if name != "lm_head.weight"}
            for x in (a, b))
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def check_models(work):
    for size, sizes in SIZES.items():
        model = random_model(sizes)
        for type, dtype in TYPES.items():
            name, folder = f"{size} {type}", work / f"{size}-{type}"
            model.to(dtype).save_pretrained(folder)
            ours, again = work / f"{size}-{type}-out", work / f"{size}-{type}-again"
            compare(name, folder, load(folder), work)
            # Out and in again.
            run("export", "-e", folder, "-o", ours)
            check(f"{name}: exported tensors are transformers' own", same_tensors(folder, ours))
            loaded = AutoModelForCausalLM.from_pretrained(ours)
            check(f"{name}: transformers loads it in its type", loaded.dtype == dtype, loaded.dtype)
            x = torch.randint(sizes["vocab_size"], (2, sizes["n_positions"]))
            with torch.no_grad():
                equal = torch.equal(load(folder)(x).logits, load(ours)(x).logits)
            check(f"{name}: the same logits in transformers after export", equal)
            run("export", "-e", ours, "-o", work / "again.bin", "--type", "bf16" if type == "bf16" else "fp32")
            run("export", "-e", work / "again.bin", "-o", again, "--type", type)
            bytes = [(folder / "model.safetensors").read_bytes() for folder in (ours, again)]
            check(f"{name}: the same bytes by way of llm.c's format", bytes[0] == bytes[1])
            model.to(torch.float32)

        # Other ways to save the same model.
        fp32 = work / f"{size}-fp32"
        model = load(fp32)
        shards, base, old = (work / f"{size}-{kind}" for kind in ("shards", "base", "old"))
        model.save_pretrained(shards, max_shard_size="50KB")
        files = len(list(shards.glob("model-*.safetensors")))
        check(f"{size} shards: transformers wrote several", files > 1, files)
        compare(f"{size} shards", shards, model, work)
        model.transformer.save_pretrained(base)
        names = load_file(base / "model.safetensors")
        check(f"{size} base model: names have no prefix", "wte.weight" in names)
        compare(f"{size} base model", base / "model.safetensors", model, work)
        # openai-community's files have the causal mask among the tensors, and others the head.
        T = sizes["n_positions"]
        for i in range(sizes["n_layer"]):
            names[f"h.{i}.attn.bias"] = torch.ones(T, T).tril().view(1, 1, T, T)
            names[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        names["lm_head.weight"] = names["wte.weight"].clone()
        old.mkdir()
        save_file(names, old / "model.safetensors", metadata={"format": "pt"})
        if sizes["n_embd"] // sizes["n_head"] != 64:
            model.config.save_pretrained(old)
        compare(f"{size} with buffers and head", old, model, work)

        # Trained here, and used there.
        shard = work / "tokens.bin"
        tokens = array.array("H", torch.randint(sizes["vocab_size"], (2000,)).tolist())
        shard.write_bytes(array.array("i", [20240520, 1, 2000] + [0] * 253).tobytes() + tokens.tobytes())
        log, trained = work / f"{size}-log", work / f"{size}-trained"
        run("train", "-e", fp32, "-i", shard, "-j", shard, "-b", 2, "-t", 32, "-d", 64, "-x", 2, "-o", log, *DEVICES[0])
        run("export", "-e", log, "-o", trained)
        compare(f"{size} finetuned", log, load(trained), work)
        loss = re.search(r"loss (\S+)", run("eval", "-e", trained, "-j", shard, "-t", 32, *DEVICES[0]))
        x = torch.tensor(tokens[:1985]).long()
        with torch.no_grad():
            logits = load(trained)(x[:1984].view(62, 32)).logits
        expected = F.cross_entropy(logits.flatten(0, 1), x[1:]).item()
        check(f"{size} finetuned: loss", loss is not None and abs(float(loss[1]) - expected) < 1e-3,
              f"{loss and loss[1]}, transformers' {expected:.6f}")


def check_tokenizer(work):
    tokenizer = AutoTokenizer.from_pretrained(work / "text-fp32-out")
    ranges = [(0x9, 2), (0x20, 0x5F), (0x85, 1), (0xA0, 0x60), (0x370, 8), (0x5D0, 9), (0x627, 9), (0x905, 9),
              (0x300, 4), (0x2000, 16), (0x3000, 3), (0x4E00, 99), (0xAC00, 99), (0x1F600, 60), (0x20000, 9)]
    odd = "".join(chr(c) for first, n in ranges for c in range(first, first + n))
    odd += odd[::-1] + odd[::3] + " " * 40 + "\n\n\n" + "it's we'll they've I'd you're 'S" + "x" * 500 + "012345678" * 9
    texts = {"golden": (GOLDEN / "tokenizer.txt").read_bytes().decode(), "odd": odd}  # as it is: with \r
    for name, text in texts.items():
        (work / f"{name}.txt").write_bytes(text.encode())
        run("tokenize", "-o", work / name, work / f"{name}.txt")
        shard = array.array("H")
        shard.frombytes((work / f"{name}_train_000001.bin").read_bytes()[1024:])
        ids = [tokenizer.eos_token_id] + tokenizer(text)["input_ids"]
        first = next((i for i, (a, b) in enumerate(zip(ids, shard)) if a != b), min(len(ids), len(shard)))
        check(f"tokenizer: ids of the {name} text", ids == shard.tolist(), f"{len(ids)}, the first {first} the same")
        check(f"tokenizer: decodes the {name} text", tokenizer.decode(ids[1:]) == text)
    check("tokenizer: golden ids", tokenizer(texts["golden"])["input_ids"] ==
          [int(id) for id in (GOLDEN / "tokenizer.ids").read_text().split()])
    check("tokenizer: the mark is one token", tokenizer("a<|endoftext|>b")["input_ids"] == [64, 50256, 65])
    check("tokenizer: sizes", (len(tokenizer), tokenizer.model_max_length) == (50257, SIZES["text"]["n_positions"]))
    model = AutoModelForCausalLM.from_pretrained(work / "text-fp32-out")
    inputs = tokenizer("Hello, world", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist()
    prompt = inputs["input_ids"][0].tolist()
    check("generate: the same greedy tokens", greedy(model, prompt, 20)[:len(output)] == output)
    found = run("sample", "-e", work / "text-fp32-out", "-p", "Hello, world", "-n", 20, "--temperature", 0, *DEVICES[0])
    expected = greedy(model, [tokenizer.eos_token_id] + prompt, 20)[1:]
    expected = expected[:expected.index(50256)] if 50256 in expected else expected
    # Half a character at the end, and line ends, become what each language makes of them.
    texts = [re.sub("[\ufffd\r\n]", "", text) for text in (found, tokenizer.decode(expected))]
    check("sample: the same greedy text", texts[0] == texts[1], repr(texts))


def check_llmc(work):
    """llm.c's golden model there and back."""
    run("export", "-e", GOLDEN / "model.bin", "-o", work / "golden")
    run("export", "-e", work / "golden", "-o", work / "golden.bin")
    check("golden model: the same bytes", (GOLDEN / "model.bin").read_bytes() == (work / "golden.bin").read_bytes())
    state = array.array("f")
    state.frombytes((GOLDEN / "state.bin").read_bytes()[1024:])
    x = array.array("i")
    x.frombytes(state[:42].tobytes())
    with torch.no_grad():
        logits = load(work / "golden")(torch.tensor(x).long().view(2, 21)).logits.flatten()
    expected = torch.tensor(state[84:84 + len(logits)])
    error = ((logits - expected).norm() / expected.norm()).item()
    check("golden model: its logits in transformers", error < 1e-5, f"{error:.2e}")


def write_golden(folder):
    """A small model, and 4 tokens with what it makes of them, for GenerationTests.ContinuesAsTransformersDoes."""
    model = random_model(dict(n_layer=2, n_head=2, n_embd=32, vocab_size=90, n_positions=48))
    model.save_pretrained(folder)
    (folder / "greedy.txt").write_text(" ".join(map(str, greedy(model, [5, 1, 4, 2], 44))))


torch.manual_seed(1337)
if "--golden" in sys.argv:
    sys.exit(write_golden(Path(sys.argv[-1])))
with tempfile.TemporaryDirectory() as name:
    check_llmc(Path(name))
    check_models(Path(name))
    check_tokenizer(Path(name))
print(f"{failures} failed")
sys.exit(failures > 0)
