"""GPT-2's byte-pair encoding once more: the pattern by the Unicode database of Python, the merges as GPT-2's own
encoder.py makes them (every occurrence of the lowest pair at once), the ranks from the NuGet package.

    python tests/tokenizer.py tests/golden     documents.txt: random documents; documents.bin: the shard that
                                               `gpt2 tokenize` must make of them, llm.c's format; 0.2 MB, seconds

The documents have characters of every kind from all of Unicode (letters, numbers, white space and others beyond U+FFFF
beside each other, beside ASCII, Han and apostrophes), contractions, and pieces of thousands of bytes. Code points that
this Python does not know yet are left out: a newer Unicode may make letters of them.
"""
import array
import base64
import os
import random
import sys
import unicodedata
import zlib
from pathlib import Path

MARK, MARK_ID = "<|endoftext|>", 50256
SPACES = {*"\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000", *map(chr, range(0x2000, 0x200B))}


def read_ranks():
    """Token bytes -> rank: a deflated resource in the assembly, a line of base64 for each token."""
    packages = Path(os.environ.get("NUGET_PACKAGES", Path.home() / ".nuget/packages"))
    name = "Microsoft.ML.Tokenizers.Data.R50kBase"
    (path,) = packages.glob(f"{name.lower()}/*/lib/net8.0/{name}.dll")
    data = path.read_bytes()
    for start in range(len(data)):
        try:
            if zlib.decompressobj(-15).decompress(data[start : start + 99], 9) == b"Capacity:":
                break
        except zlib.error:
            pass
    lines = zlib.decompressobj(-15).decompress(data[start:]).split()[2:]
    assert len(lines) == MARK_ID
    return {base64.b64decode(line): rank for rank, line in enumerate(lines)}


def kind(character):
    category = unicodedata.category(character)[0]
    return " " if character in SPACES else category if category in "LN" else "."


def pieces(text):
    """What 's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+ finds, in order."""
    while text:
        end = next((len(x) for x in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(x)), 0)
        if not end:
            first = 1 if text[0] == " " and text[1:] and kind(text[1]) != " " else 0
            end = first + 1
            while end < len(text) and kind(text[end]) == kind(text[first]):
                end += 1
            if kind(text[first]) == " " and end < len(text) and end > 1:
                end -= 1
        yield text[:end]
        text = text[end:]


def merge(piece, ranks):
    tokens = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        best = min((ranks.get(a + b, MARK_ID) for a, b in zip(tokens, tokens[1:])), default=MARK_ID)
        if best == MARK_ID:
            return [ranks[token] for token in tokens]
        merged = []
        for token in tokens:
            if merged and ranks.get(merged[-1] + token) == best:
                token = merged.pop() + token
            merged.append(token)
        tokens = merged


def documents(ranks):
    rng = random.Random(1)
    known = {}
    for code in range(0x110000):
        if unicodedata.category(chr(code)) not in ("Cn", "Cs") and chr(code) != "\ufeff":
            known.setdefault((kind(chr(code)), code > 0xFFFF), []).append(chr(code))
    kinds = sorted(known)
    fixed = [*" \n'aZ0.\u4e2d\u90fd\u3000\xa0", "'s", "'ll", "'re", "'t", " '", "  ", "\r\n"]

    def character():
        return rng.choice(fixed) if rng.random() < 0.4 else rng.choice(known[rng.choice(kinds)])

    for _ in range(1200):
        alphabet = [character() for _ in range(rng.randint(1, 6))]
        yield "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 12)))
    texts = [token.decode(errors="ignore").strip() for token in ranks]
    words = [text for text in texts if text.isalpha() and text.isascii()]
    kana = [text for text in texts if text.isalpha() and any(0x3040 < ord(c) < 0x3100 for c in text)]
    runs = ["a", "acgt", "abcdefghijklmnopqrstuvwxyz", "0123456789", "!'", "'<|>=-*", "\xc3\xc2", "\u4e2d", "\u30fc",
            *[" \u2003"] * 4, "\U0001d41a\u90fd", "\U0001f600", words, kana]
    for run in runs:
        yield "x" * (run[0] in " !'") + "".join(rng.choice(run) for _ in range(4000))[: rng.randint(1900, 2100)] + "x"
    # Tokens of up to 128 bytes, so that a token depends on text far behind it, at any distance from the start.
    for run in ("=", "-", "\xc3\xc2"):
        for _ in range(6):
            yield "#?" * rng.randint(0, 9) * (run < "A") + "x" * rng.randint(1, 64) * (run > "A") + run * 1000
    yield from (" ", "\n\u3000", "")


def main(folder):
    ranks = read_ranks()
    texts = list(documents(ranks))
    tokens = array.array("H")
    for text in texts:
        if any(kind(character) != " " for character in text):
            tokens.append(MARK_ID)
            for piece in pieces(text):
                tokens.extend(merge(piece.encode(), ranks))
    header = array.array("i", [20240520, 1, len(tokens)] + [0] * 253)
    (folder / "documents.txt").write_text(MARK.join(texts), encoding="utf-8", newline="")
    (folder / "documents.bin").write_bytes(header.tobytes() + tokens.tobytes())


main(Path(sys.argv[1]))
