#!/usr/bin/env bash
# Runs the commands of README.md and docs/ as they stand there, line by line, with ./gpt2 on this CPU, in one folder: page
# after page, as a reader would, README first. Only sizes are smaller: each training is two steps of a tiny model, and
# downloads come from loopback. Commands that need more than that are listed. The last line is the count.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD work=$(mktemp -d) passed=0 failed=0 ran=0
trap 'kill "$server"; rm -rf "$work"' EXIT
unset MAKEFLAGS MAKELEVEL MFLAGS ARGS DATA MODEL SHARDS

check() { # NAME COMMAND...
    if "${@:2}" >"$work/out" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "docs.sh: failed: $1" && tail -n 5 "$work/out"
    fi
}

# Why a command is not run here; nothing if it is.
needs() {
    case $1 in
        curl*) echo "a network" ;;
        "make toolkit" | "make test" | make | "make "*"ISA="* | "make ARCH="*) echo "a build, which CI makes itself" ;;
        "make profile" | tests/scale.sh*) echo "an NVIDIA GPU" ;;
        *--gpus* | mpirun* | torchrun* | srun*) echo "several GPUs" ;;
    esac
}

# ---- A reader's folder: a clone with a ./gpt2 that somebody brought, texts, and a hub on loopback

mkdir -p "$work"/{bin,clone/books,hub}
git ls-files Makefile '*.cs' '*.cu' '*.csproj' '*.awk' | xargs cp --parents -t "$work/clone"
cp tests/golden/rows/rows.txt "$work/clone/books/a.txt"
cp tests/golden/rows/arrow.jsonl "$work/clone/books/b.jsonl"
cp tests/golden/rows/arrow.jsonl.zst "$work/clone/rows.jsonl.zst"
cp tests/golden/rows/arrow_snappy.parquet "$work/clone/rows.parquet"
for _ in {1..20}; do cat Model.cs; done | tee "$work/clone/my.txt" | sed '1i First Citizen:' >"$work/hub/input.txt"
printf '#!/bin/sh\nexit 1\n' >"$work/bin/dotnet" && chmod +x "$work/bin/dotnet" # no SDK: make takes ./gpt2 as it is

# A random model of two layers, and a question with four answers.
python3 - "$work" <<'END'
import array, os, random, sys
os.chdir(sys.argv[1])
ints = lambda type, *values: array.array(type, values).tobytes()
header = lambda *values: ints("i", *values, *[0] * (256 - len(values)))
C, L, V, T = 64, 2, 50304, 1024
some = array.array("f", (random.gauss(0, 0.02) for _ in range((1 << 16) + 1))).tobytes()
size = 4 * ((V + T + 2) * C + L * (12 * C * C + 13 * C))
open("tiny.bin", "wb").write(header(20240326, 3, T, 50257, L, 2, C, V) + (some * (size // len(some) + 1))[:size])
answers = [word for i in range(4) for word in (2, i, i + 1)]
open("choices.bin", "wb").write(header(20240522, 1, 1, 42) + ints("H", 65535, 42, 0, 1, 4, 3, 1, 2, 3, *answers))
END
cat >"$work/clone/gpt2" <<END
#!/bin/bash
# The real one; random weights are the tiny model's, and each training goes two steps further.
words=()
for word; do [[ \$word =~ ^d[0-9]+\$ ]] && word=$work/tiny.bin; words+=("\$word"); done
case \$1 in
    train) echo >>$work/trainings
        words=(train -e $work/tiny.bin "\${words[@]:1}" -b 1 -t 32 -d 32 -x \$((2 * \$(wc -l <$work/trainings))) -m 1 -g 4) ;;
    bench) [[ " \$* " = *" --decode "* ]] || words=(bench -e $work/tiny.bin "\${words[@]:1}" -b 1 -t 32 -x 1) ;;
esac
exec $root/gpt2 "\${words[@]}" --device cpu
END
sed -i '/^exec/i [[ $1 =~ ^(tokenize|export|help|completion|plot|info)$ ]] \&\& exec '"$root"'/gpt2 "${words[@]}"' "$work/clone/gpt2"
chmod +x "$work/clone/gpt2"
ln -s "$work/clone/gpt2" "$work/bin/gpt2"

hold() { mkdir -p "$work/hub/$(dirname "$2")" && cp "$1" "$work/hub/$2"; } # FILE PATH
./gpt2 tokenize -o "$work/shard" --val-tokens 3000 "$work/clone/my.txt" 2>/dev/null
fineweb=datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb
hold "$work/shard_val_000000.bin" ${fineweb}_val_000000.bin
for i in {1..9}; do hold "$work/shard_train_000001.bin" ${fineweb}_train_00000$i.bin; done
hold "$work/choices.bin" datasets/karpathy/llmc-starter-pack/resolve/main/hellaswag_val.bin
./gpt2 export -e "$work/tiny.bin" -o "$work/gpt2" &&
    for file in config.json model.safetensors; do hold "$work/gpt2/$file" openai-community/gpt2/resolve/main/$file; done
python3 -u -m http.server 0 --bind 127.0.0.1 --directory "$work/hub" >"$work/port" 2>/dev/null & server=$!
disown
until grep -q port "$work/port"; do sleep 0.05; done
HUB=http://127.0.0.1:$(sed -n 's/.* port \([0-9]*\).*/\1/p' "$work/port")
export HUB SHAKESPEARE=$HUB/input.txt no_proxy=127.0.0.1 PATH=$work/bin:$PATH

# ---- The pages

pages=(README.md docs/your-own-gpt2.md $(ls docs/*.md | grep -v your-own))
for page in "${pages[@]}"; do
    while IFS= read -r line; do
        reason=$(needs "$line")
        [ -z "$reason" ] || { echo "not run, needs $reason: $line"; continue; }
        ran=$((ran + 1))
        check "$page: $line" timeout 120 bash -c "cd '$work/clone' && $line" </dev/null
    done < <(sed -n '/^```sh$/,/^```$/ { /^```/d; /^ *\(#.*\)\?$/d; p }' "$page")
    for link in $(grep -o '](\(<[^>]*>\|[^)]*\))' "$page" | sed 's/^](//; s/)$//; s/#.*//' | grep -v '^http' | sort -u); do
        check "$page: $link exists" test -e "$(dirname "$page")/$link"
    done
done

# Each command's example, in a folder of its own.
mkdir -p "$work/examples/data" && cp "$work/clone/my.txt" tests/golden/{model,state}.bin "$work/examples"
for command in tokenize train info plot sample eval export bench verify completion; do
    line=$(./gpt2 help $command | sed -n 's/^Example: //p')
    check "gpt2 help $command: $line" timeout 120 bash -c "cd '$work/examples' && $line" </dev/null
done

short() { [ "$(wc -l <README.md)" -le 120 ] && [ "$(wc -w <README.md)" -le 1300 ]; }
same_numbers() { # the speeds that README has are those of docs/speed.md
    local speed
    for speed in $(grep '^| \*\*gpt2\|^| llm.c\|^| PyTorch' README.md | grep -o '[0-9][0-9,]*,[0-9]*'); do
        grep -qF "$speed" docs/speed.md || { echo "$speed"; return 1; }
    done
}
same_bars() { python3 tests/bars.py "$work/speed.svg" && cmp "$work/speed.svg" tests/speed.svg; }
check "there are commands" [ "$ran" -ge 30 ]
check "README has at most 120 lines and 1,300 words" short
check "README's speeds are those of docs/speed.md" same_numbers
check "tests/bars.py draws tests/speed.svg" same_bars
echo "$passed passed, $failed failed"
exit $((failed > 0))
