#!/usr/bin/env bash
# Training on 1, 2, 4 and 8 GPUs of this host, as far as it has them, with and without ZeRO-1, and PyTorch's beside it:
#     tests/scale.sh [d12 d48]
# STEPS=12; TOTAL=524288 tokens a step; OPTIMIZER=adamw; GPUS="1 2 4 8"; RIVALS= leaves out PyTorch; LLMC names a program that takes a
# number of GPUs and llm.c's options. SHARE=1 lets ranks share one GPU, which tries the script and says nothing of speed.
# Prints the table that docs/speed.md has; speeds are those of the median step without the first three.
set -uo pipefail
cd "$(dirname "$0")/.."
export NCCL_NVLS_ENABLE=0 # no NVLink multicast
export PYTORCH_ALLOC_CONF=expandable_segments:True # or PyTorch's 1.6B is out of memory
steps=${STEPS:-12} total=${TOTAL:-524288} there=$(nvidia-smi -L | wc -l)
[ -z "${SHARE:-}" ] || export GPT2_SHARE_GPUS=1 RIVALS=
python3 -c 'import torch' 2>/dev/null || RIVALS=
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
seq 1 3000000 >"$folder/text" && ./gpt2 tokenize -o "$folder/text" --val-tokens 600000 "$folder/text" 2>/dev/null || exit 1

row() { printf '| %s | %s | %s | %s | %s | %s | %s |\n' "$@"; }

# row_of MODEL GPUS HOW MEMORY: the median by the steps' milliseconds, beside what the same program did on one GPU.
declare -A one
row_of() {
    local speed mfu
    read -r speed mfu < <(awk -v total="$total" '/^step/ {
            for (i = 2; i <= NF; i++) {
                if ($i == "ms") speed = total / $(i - 1) * 1000
                if ($i == "MFU") mfu = $(i - 1) == "bf16" ? $(i - 2) : $(i - 1)
            }
            printf "%.0f %s\n", speed, mfu
        }' "$folder/out" | tail -n +4 | sort -n | awk '{ all[NR] = $0 } END { print all[int((NR + 1) / 2)] }')
    [ -n "$speed" ] || { row "$1" "$2" "$3" failed "" "" ""; tail -n 5 "$folder/err" "$folder/out" >&2; return; }
    [ "$2" -gt 1 ] || one[$1${3%%,*}]=$speed
    row "$1" "$2" "$3" "$speed" "$mfu" \
        "$(awk -v one="${one[$1${3%%,*}]:-0}" "BEGIN { if (one > 0) printf \"%.1f%%\", 100 * $speed / $2 / one }")" "$4"
}

# Ended by a kill when it has made its steps, for the checkpoint of the last one takes longer than they do.
train() {
    ./gpt2 train "$@" --optimizer "${OPTIMIZER:-adamw}" -x 1000 -v 0 -m 1 -g 0 -n 0 --timeout 60 >"$folder/out" 2>"$folder/err" &
    for ((tenths = 0; tenths < 3000; tenths++)); do
        [ "$(grep -c '^step' "$folder/out")" -lt "$steps" ] && kill -0 $! 2>/dev/null || break
        sleep 0.1
    done
    { kill -KILL $! && wait $!; } 2>/dev/null
    sleep 2 # until the other ranks have noticed
}

row model GPUs how tokens/s MFU efficiency "memory a GPU"
row --- --- --- --- --- --- ---
for model in ${@:-d12 d48}; do
    batch=${BATCH:-$([ "$model" = d48 ] && echo 16 || echo 64)}
    for gpus in ${GPUS:-1 2 4 8}; do
        [ "$gpus" -le "$there" ] || [ -n "${SHARE:-}" ] || continue
        for zero in 0 1; do
            [ "$gpus" -gt 1 ] || [ "$zero" = 0 ] || continue
            rm -rf "$folder/run"
            train -i "$folder/text_train*" -j "$folder/text_val*" -o "$folder/run" -e "$model" -b "$batch" -t 1024 -d "$total" \
                --gpus "$gpus" -z "$zero"
            row_of "$model" "$gpus" "gpt2, ZeRO-$zero" "$(sed -n 's/^memory  [^ ]* \([0-9.]* .B\) of .*/\1/p' "$folder/err")"
        done
        if [ -n "${RIVALS-yes}" ]; then
            timeout 400 python3 -m torch.distributed.run --nproc-per-node "$gpus" --master-addr 127.0.0.1 --master-port 29511 \
                tests/rival.py -e "$model" -b "$batch" -d "$total" -x "$steps" >"$folder/out" 2>"$folder/err"
            row_of "$model" "$gpus" "PyTorch, DDP" "$(awk '/^pytorch/ { print $5, "GB" }' "$folder/out")"
        fi
        if [ -n "${LLMC:-}" ]; then
            zero=$((gpus > 1))
            (set -f; exec $LLMC "$gpus" -i $folder/text_train* -j $folder/text_train* -e "$model" -b "$batch" -t 1024 -d "$total" \
                -x "$steps" -r 0 -ge 1 -z "$zero" -v 1000000 -m 0 -s 0 -h 0 -n 0) >"$folder/out" 2>"$folder/err"
            row_of "$model" "$gpus" "llm.c, ZeRO-$zero" "$(sed -n 's/^device memory usage: *\([0-9]* MiB\).*/\1/p' "$folder/out" | head -n 1)"
        fi
    done
done
