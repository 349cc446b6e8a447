#!/usr/bin/env bash
# Training on 1, 2, 4 and 8 GPUs of this host, as far as it has them, with and without ZeRO-1, and PyTorch's beside it:
#     tests/scale.sh [d12 d48]        STEPS=12; TOTAL=524288 tokens a step; GPUS="1 2 4 8"; LLMC=program of llm.c with NCCL
# SHARE=1 lets ranks share one GPU, which tries the script and says nothing of speed. Prints the table that README has.
set -euo pipefail
cd "$(dirname "$0")/.."
export NCCL_NVLS_ENABLE=0 # no NVLink multicast
steps=${STEPS:-12} total=${TOTAL:-524288} there=$(nvidia-smi -L | wc -l)
[ -z "${SHARE:-}" ] || export GPT2_SHARE_GPUS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
seq 1 3000000 >"$folder/text" && ./gpt2 tokenize -o "$folder/text" --val-tokens 600000 "$folder/text" 2>/dev/null

# The median of the steps' tokens/s without the first three.
median() { sed -n 's/.* \([0-9]*\) tok\/s.*/\1/p' | tail -n +4 | sort -n | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'; }
row() { printf '| %s | %s | %s | %s | %s | %s | %s |\n' "$@"; }

row model GPUs how tokens/s MFU efficiency "memory a GPU"
row --- --- --- --- --- --- ---
for model in ${@:-d12 d48}; do
    batch=${BATCH:-$([ "$model" = d48 ] && echo 16 || echo 64)}
    one=
    for gpus in ${GPUS:-1 2 4 8}; do
        [ "$gpus" -le "$there" ] || [ -n "${SHARE:-}" ] || continue
        for zero in 0 1; do
            [ "$gpus" -gt 1 ] || [ "$zero" = 0 ] || continue
            rm -rf "$folder/run"
            ./gpt2 train -i "$folder/text_train*" -j "$folder/text_val*" -o "$folder/run" -e "$model" -b "$batch" -t 1024 \
                -d "$total" -x "$steps" -v 0 -m 1 -g 0 -n 0 --gpus "$gpus" -z "$zero" >"$folder/out" 2>"$folder/err" ||
                { cat "$folder/err" >&2; exit 1; }
            speed=$(median <"$folder/out")
            one=${one:-$speed}
            row "$model" "$gpus" "gpt2, ZeRO-$zero" "$speed" "$(sed -n 's/.* \([0-9.]*%\) MFU.*/\1/p' "$folder/out" | tail -n 1)" \
                "$(awk "BEGIN { printf \"%.1f%%\", 100 * $speed / $gpus / $one }")" \
                "$(sed -n 's/^memory  together *//p' "$folder/err")"
        done
        if [ -z "${SHARE:-}" ] && python3 -c 'import torch' 2>/dev/null; then
            torchrun --nproc-per-node "$gpus" tests/rival.py -e "$model" -b "$batch" -d "$total" -x "$steps" >"$folder/out" 2>"$folder/err" &&
                row "$model" "$gpus" "PyTorch, DDP" "$(awk '/^pytorch/ { print $3 }' "$folder/out")" "" "" \
                    "$(awk '/^pytorch/ { print $5, "GB" }' "$folder/out")" || row "$model" "$gpus" "PyTorch, DDP" failed "" "" ""
        fi
        if [ -n "${LLMC:-}" ]; then
            mpirun --allow-run-as-root -np "$gpus" "$LLMC" -i "$folder/text_train*" -j "$folder/text_train*" -e "$model" -b "$batch" \
                -t 1024 -d "$total" -x "$steps" -ge 1 -z 1 -v 1000000 -m 0 -s 0 -h 0 -n 0 >"$folder/out" 2>&1 &&
                row "$model" "$gpus" "llm.c, ZeRO-1" "$(median <"$folder/out")" "" "" "" || row "$model" "$gpus" llm.c failed "" "" ""
        fi
    done
done
