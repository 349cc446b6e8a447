#!/usr/bin/env python3
"""gpt2 tokenize on files that pyarrow and Python wrote, against the same documents in a plain text; and its speed.

    python3 tests/documents.py ./gpt2 TEXT [--goldens FOLDER] [--gigabyte 1e9]

Every line says PASS or FAIL, the last one counts them. TEXT is repeated for the timing. FOLDER gets small files to commit
in tests/golden/rows, whose documents are those of rows.txt there. Needs pyarrow; zstd by pyarrow; no network.
"""
import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time

import pyarrow as pa
import pyarrow.parquet as pq

MARK = '<|endoftext|>'
SMALL = ['One two three.', None, '', 'dup', 'Quotes " and \\, tabs\t and lines\n\r\x01 é 中 😀 \u2028', 'dup', ' ', None, 'dup',
         'The end', 'dup', f'x{MARK}y', 'A "\\u0041" that stays']
counts = {True: 0, False: 0}


def report(name, passed, note=''):
    counts[bool(passed)] += 1
    print(f"{'PASS' if passed else 'FAIL'} {name} {note}", flush=True)


def tokenize(gpt2, folder, name, *files):
    """The bytes of all shards, and the seconds it took."""
    begin = time.time()
    run = subprocess.run([gpt2, 'tokenize', '-o', f'{folder}/{name}', *files], capture_output=True, text=True)
    seconds = time.time() - begin
    shards = sorted(f for f in os.listdir(folder) if f.startswith(f'{name}_train_'))
    tokens = b''
    for shard in shards:
        with open(f'{folder}/{shard}', 'rb') as file:
            tokens += file.read()[1024:]
        os.remove(f'{folder}/{shard}')
    return (tokens if run.returncode == 0 else None), seconds, run.stderr.strip()


def documents(seed, count):
    """Texts with nulls, empty ones, repeated ones, escapes, every plane of Unicode, and three of 2 MB."""
    draw = random.Random(seed)
    words = ['one', 'two', 'three', '"four"', '\\', '\t', '\n', '\r\n', 'é', '中文', '😀', '𝒳', '\x07', "it's", '12345', '\u2028', '\ufeff',
             '<|end', '</s>', ' ']
    made = []
    for i in range(count):
        kind = draw.randrange(10)
        made.append(None if kind == 0 else '' if kind == 1 else draw.choice(['the same', 'again']) if kind == 2 else
                    ' '.join(draw.choices(words, k=draw.randrange(200))))
    made[0] = 'first' # a mark of UTF-8 at the beginning would be dropped from the text alone
    for at in draw.sample(range(1, count), 3):
        made[at] = ' '.join(draw.choices(words, k=700_000))
    return made


def write_jsonl(path, docs, ascii, bom=False):
    opened = gzip.open(path, 'wb') if path.endswith('.gz') else \
        pa.CompressedOutputStream(path, 'zstd') if path.endswith('.zst') else open(path, 'wb')
    with opened as file:
        file.write(b'\xef\xbb\xbf' if bom else b'')
        for i, text in enumerate(docs):
            row = {'id': i, 'meta': {'text': 'no', 'list': [1, None, {'text': 'no'}]}, 'text': text, 'score': 1e-9}
            file.write(json.dumps(row, ensure_ascii=ascii).encode() + b'\n')


def table(docs, kind=None):
    count = len(docs)
    return pa.table({
        'meta': pa.array([None if i % 5 == 0 else {'text': 'no', 'n': i} for i in range(count)]),
        'tags': pa.array([None if i % 4 == 0 else ['text', None] * (i % 3) for i in range(count)], pa.list_(pa.string())),
        'text': pa.array(docs, kind or pa.string()),
        'map': pa.array([[('a', i)] for i in range(count)], pa.map_(pa.string(), pa.int64())),
        'score': pa.array([i / 3 for i in range(count)]),
    })


def same_as_text(gpt2, folder, docs):
    with open(f'{folder}/plain.txt', 'w', newline='') as file:
        file.write(MARK.join(text for text in docs if text is not None))
    expected, _, error = tokenize(gpt2, folder, 'plain', f'{folder}/plain.txt')
    report('plain text', expected, error)

    def check(name):
        found, _, error = tokenize(gpt2, folder, 'found', f'{folder}/{name}')
        report(name, found == expected, '' if found == expected else error)
        os.remove(f'{folder}/{name}')

    for end in ('', '.gz', '.zst'):
        for ascii in (True, False):
            write_jsonl(f'{folder}/a{ascii}.jsonl{end}', docs, ascii, bom=not ascii)
            check(f'a{ascii}.jsonl{end}')
    for codec in ('none', 'snappy', 'zstd', 'gzip'):
        for dictionary in (True, False):
            for version in ('1.0', '2.0'):
                name = f"{codec}_{'dictionary' if dictionary else 'plain'}_page{version[0]}.parquet"
                pq.write_table(table(docs), f'{folder}/{name}', compression=codec, use_dictionary=dictionary,
                               data_page_version=version, row_group_size=777, data_page_size=50_000)
                check(name)
    for name, kind, options in (
            ('large_string', pa.large_string(), {}), ('binary', pa.binary(), {}),
            ('one_group', None, {'row_group_size': 10 ** 6}), ('format1', None, {'version': '1.0'}),
            ('statistics', None, {'write_page_index': True, 'write_page_checksum': True})):
        rows = table([text.encode() if text is not None and kind == pa.binary() else text for text in docs], kind)
        pq.write_table(rows, f'{folder}/{name}.parquet', **options)
        check(f'{name}.parquet')
    required = [text for text in docs if text is not None]
    schema = pa.schema([pa.field('text', pa.string(), nullable=False)])
    for version in ('1.0', '2.0'):
        pq.write_table(pa.table({'text': required}, schema), f'{folder}/required{version[0]}.parquet', data_page_version=version)
        check(f'required{version[0]}.parquet')
    # All in a folder, whose files are taken in order.
    os.mkdir(f'{folder}/all')
    half = len(docs) // 2
    os.mkdir(f'{folder}/all/b')
    pq.write_table(table(docs[:half]), f'{folder}/all/a.parquet')
    write_jsonl(f'{folder}/all/b/1.jsonl.zst', docs[half:], True)
    open(f'{folder}/all/README.md', 'w').write('not this one')
    check_folder, _, error = tokenize(gpt2, folder, 'found', f'{folder}/all')
    report('a folder', check_folder == expected, error)


def refusals(gpt2, folder, docs):
    """What is not read is a sentence, without a shard."""
    pq.write_table(table(docs), f'{folder}/lz4.parquet', compression='lz4')
    pq.write_table(table(docs), f'{folder}/brotli.parquet', compression='brotli')
    pq.write_table(table(docs), f'{folder}/delta.parquet', use_dictionary=False,
                   column_encoding={'text': 'DELTA_LENGTH_BYTE_ARRAY'})
    for name, words in (('lz4.parquet', 'compression'), ('brotli.parquet', 'compression'), ('delta.parquet', 'encoding 6')):
        found, _, error = tokenize(gpt2, folder, 'found', f'{folder}/{name}')
        report(f'refuses {name}', found is None and error.count('\n') == 0 and name in error and words in error, error)


def speed(gpt2, folder, text, size):
    """Rates of a plain text and of the same documents in a file of another kind, in bytes of text a second."""
    with open(text, encoding='utf-8') as file:
        docs = [doc for doc in file.read().split(MARK) if doc.strip()]
    docs = docs if len(docs) > 1 else [docs[0][i:i + 4000] for i in range(0, len(docs[0]), 4000)]
    many, total = [], 0
    while total < size:
        many.append(docs[len(many) % len(docs)])
        total += len(many[-1].encode())
    with open(f'{folder}/big.txt', 'w', newline='') as file:
        file.write(MARK.join(many))
    write_jsonl(f'{folder}/big.jsonl.zst', many, True)
    write_jsonl(f'{folder}/big.jsonl', many, True)
    pq.write_table(table(many), f'{folder}/big.parquet', compression='zstd', row_group_size=100_000)
    pq.write_table(table(many), f'{folder}/snappy.parquet', compression='snappy', row_group_size=1000)
    best = {}
    for _ in range(3):
        for name in ('big.txt', 'big.jsonl.zst', 'big.jsonl', 'big.parquet', 'snappy.parquet'):
            tokens, seconds, error = tokenize(gpt2, folder, 'found', f'{folder}/{name}')
            if tokens is None:
                report(name, False, error)
            best[name] = min(seconds, best.get(name, seconds))
    for name, seconds in best.items():
        share = best['big.txt'] / seconds
        report(f'speed of {name}', share >= 0.8,
               f'{total / 1e6 / seconds:.0f} MB/s, {100 * share:.0f}% of plain text, {os.cpu_count()} cores')


def goldens(folder):
    os.makedirs(folder, exist_ok=True)
    with open(f'{folder}/rows.txt', 'w', newline='') as file:
        file.write(MARK.join(text for text in SMALL if text is not None))
    for name, options in (
            ('none_v1', {'compression': 'none', 'use_dictionary': False}), ('snappy_v1', {'compression': 'snappy'}),
            ('snappy_v2', {'compression': 'snappy', 'data_page_version': '2.0'}),
            ('zstd_v2', {'compression': 'zstd', 'data_page_version': '2.0', 'use_dictionary': False}),
            ('gzip_v1', {'compression': 'gzip', 'use_dictionary': False})):
        pq.write_table(table(SMALL), f'{folder}/pyarrow_{name}.parquet', row_group_size=8, store_schema=False, **options)
    pq.write_table(table(SMALL, pa.large_string()), f'{folder}/pyarrow_large.parquet')
    for end in ('', '.gz', '.zst'):
        write_jsonl(f'{folder}/python.jsonl{end}', SMALL, True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('gpt2')
    parser.add_argument('text')
    parser.add_argument('--goldens')
    parser.add_argument('--gigabyte', type=float, default=1e9, help='bytes of text to time')
    given = parser.parse_args()
    gpt2 = os.path.abspath(given.gpt2)
    if given.goldens:
        goldens(given.goldens)
        expected, _, _ = tokenize(gpt2, given.goldens, 'plain', f'{given.goldens}/rows.txt')
        for name in sorted(os.listdir(given.goldens)):
            found, _, error = tokenize(gpt2, given.goldens, 'found', f'{given.goldens}/{name}')
            report(f'golden {name}', found == expected and found, error)
    with tempfile.TemporaryDirectory() as folder:
        docs = documents(1, 5000)
        same_as_text(gpt2, folder, docs)
        refusals(gpt2, folder, SMALL)
    if given.gigabyte > 0:
        with tempfile.TemporaryDirectory() as folder:
            speed(gpt2, folder, given.text, given.gigabyte)
    print(f'{counts[True]} passed, {counts[False]} failed')
    sys.exit(counts[False] > 0)


main()
