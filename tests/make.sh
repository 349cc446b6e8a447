#!/usr/bin/env bash
# Tests of the Makefile, in copies of the tree, on a machine whose SDK, compiler, GPU and binaries only pretend, so that
# all take seconds. The last line is the count.
set -uo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'touch "$work/end"; rm -rf "$work"' EXIT
unset MAKEFLAGS MAKELEVEL MFLAGS CUDA NVCC ISA ARCH ARGS
export HOME=$work FAKES=$work # HOME has no toolkit

# ---- The parts of the machine, a folder each; a test puts those that it wants on PATH

mkdir "$work"/{tools,flock,sdk,gpu,nvcc,ncu,net,hub}
for tool in awk cat cmp cp find grep head ls make mkdir mv rm rmdir sed seq sh sleep sort tee timeout touch tr wc xargs; do
    ln -s "$(command -v "$tool")" "$work/tools/"
done
ln -s "$(command -v flock)" "$work/flock/"
ln -s "$(command -v curl)" "$work/net/"
executable() { cat >"$1" && chmod +x "$1"; }
executable "$work/tools/gcc" <<<'#!/bin/sh'
executable "$work/gpu/nvidia-smi" <<<'echo "GPU 0: NVIDIA H100 80GB HBM3"'
executable "$work/ncu/ncu" <<'END'
echo '"ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed",'\
'"sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active"'
echo '"0","kernel of the tests","1000","50","50"'
END
executable "$work/nvcc/nvcc" <<'END'
#!/bin/sh
case $1 in
--version) echo 'Cuda compilation tools, release 12.4, V12.4.131' ;;
--list-gpu-arch) echo compute_90 ;;
*) while [ "$1" != -o ]; do shift; done; echo kernels >"$2" ;;
esac
END
# The binary says how it was called; its training lasts as long as there is a file "hold".
executable "$work/gpt2" <<'END'
#!/bin/sh
case $1 in
tokenize) mkdir -p data && touch "$3_train_000001.bin" "$3_val_000000.bin" ;;
train) while [ -e hold ] && [ ! -e "$FAKES/end" ]; do sleep 0.05; done ;;
esac
echo "gpt2 $*"
END
executable "$work/gpt2-tests" <<'END'
#!/bin/sh
printf '%s\n' 'Test run summary: Passed!' '  succeeded: 3'
END
# Two builds at once never go well with this SDK, and with SERVER it leaves a compiler server behind.
executable "$work/sdk/dotnet" <<'END'
#!/bin/sh
case $1 in
--list-sdks) echo '10.0.100 [/nowhere/sdk]' ;;
publish | build)
    echo "$*" >>calls
    mkdir building 2>/dev/null || { echo "two builds at once" >&2; exit 1; }
    sleep 0.5
    rmdir building
    [ -z "${SERVER:-}" ] || sleep 5 >/dev/null 2>&1 &
    while [ $# -gt 1 ]; do
        [ "$1" != -o ] || { mkdir -p "$2" && cp "$FAKES/gpt2" "$FAKES/gpt2-tests" "$2"; }
        shift
    done ;;
run) "$FAKES/gpt2-tests" ;;
esac
END

# A hub on loopback, which serves the folder "hub" by ranges. Where there is a file "cut", it sends half of what is asked
# for; it says that files are larger by the number of bytes in "lie".
cat >"$work/server.py" <<'END'
import http.server, os, re, sys

class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = 'hub' + self.path
        if not os.path.isfile(path):
            return self.send_error(404)
        data = open(path, 'rb').read()
        start = int(re.sub(r'\D', '', self.headers.get('Range', '0')))
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        if os.path.exists('lie'):
            self.send_header('X-Linked-Size', str(len(data) + int(open('lie').read())))
        self.send_header('Content-Length', str(len(data) - start))
        self.end_headers()
        if self.command == 'GET':
            open('requests', 'a').write(f'{self.path} {start}\n')
            rest = data[start:]
            self.wfile.write(rest[:len(rest) // 2] if os.path.exists('cut') else rest)
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_): pass

os.chdir(sys.argv[1])
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
open('port', 'w').write(str(server.server_port))
server.serve_forever()
END
python3 "$work/server.py" "$work" & server=$!
disown # so that no test waits for it
trap 'kill $server; touch "$work/end"; rm -rf "$work"' EXIT
until [ -s "$work/port" ]; do sleep 0.05; done
HUB=http://127.0.0.1:$(<"$work/port")
export HUB SHAKESPEARE=$HUB/input.txt no_proxy=127.0.0.1

# ---- How a test is written: what holds is joined by &&

passed=0 failed=0

# A new copy of the tree, and in it the binaries that are named.
fresh() {
    rm -rf "$work/tree" && mkdir "$work/tree"
    git ls-files Makefile '*.cs' '*.cu' '*.csproj' '*.json' 'tests/*.awk' | xargs cp --parents -t "$work/tree"
    for binary; do cp "$work/$binary" "$work/tree/"; done
}

# on "PARTS" COMMAND...: runs it in the copy, on a machine of these parts.
on() {
    local parts="tools $1" path="" part
    shift
    for part in $parts; do path+=${path:+:}$work/$part; done
    (cd "$work/tree" && PATH=$path exec "$@") </dev/null
}

# The same, whose output goes to a file.
make_on() { on "$1" timeout 20 make "${@:2}" >"$work/out" 2>&1; }

fails() { ! "$@"; }
says() { grep -qF -- "$1" "$work/out"; }
times() { [ "$(grep -cF -- "$2" "$work/$3" 2>/dev/null)" = "$1" ]; } # COUNT TEXT FILE
exists() { [ -e "$work/tree/$1" ]; }
calls() { times "$1" "$2" tree/calls; }
until_exists() { for _ in {1..100}; do exists "$1" && return; sleep 0.05; done; return 1; }

check() {
    rm -f "$work"/out*
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "make.sh: failed $*"
        head -n 30 "$work"/out*
    fi
    touch "$work/end"; wait; rm "$work/end"
}

# ---- Several makes in one folder

four_take_turns_and_one_builds() {
    fresh
    local i jobs=()
    for i in 1 2 3 4; do
        on "flock sdk" make >"$work/out$i" 2>&1 & jobs+=($!)
    done
    for i in "${jobs[@]}"; do wait "$i" || return 1; done
    calls 1 publish && [ "$(cat "$work"/out? | grep -c 'make gpt2: waiting for another make in this folder$')" = 3 ]
}

different_commands_take_turns() {
    fresh
    mkdir "$work/tree/data" && echo text >"$work/tree/data/text.txt"
    local i jobs=()
    for i in train test bench gpt2-tests; do
        on "flock sdk" make $i >"$work/out$i" 2>&1 & jobs+=($!)
    done
    for i in "${jobs[@]}"; do wait "$i" || return 1; done
    calls 1 "publish Gpt2Cli.csproj" && calls 1 "publish tests/" && calls 1 "build tests"
}

clean_waits_for_a_build() {
    fresh
    on "flock sdk" make >"$work/out1" 2>&1 & local building=$!
    until_exists building && make_on "flock sdk" clean && wait $building && says "make clean: waiting" &&
        fails exists gpt2 && make_on "flock sdk" && fails says waiting && exists gpt2
}

training_keeps_nobody_waiting() {
    fresh
    mkdir "$work/tree/data" && touch "$work/tree/hold" "$work/tree/data/text_train_000001.bin"
    on "flock sdk" make train >"$work/out1" 2>&1 & local training=$!
    until_exists gpt2 && sleep 0.2 && make_on "flock sdk" bench && fails says waiting && rm "$work/tree/hold" &&
        wait $training && grep -q '^gpt2 train' "$work/out1"
}

a_make_that_is_terminated_gives_way() {
    fresh
    on "flock sdk" make >"$work/out1" 2>&1 & local building=$!
    until_exists building && kill $building && fails wait $building && rm -r "$work/tree/building" &&
        make_on "flock sdk" && exists gpt2
}

a_make_that_is_killed_is_waited_for_until_the_inner_one_ends() {
    fresh
    on "flock sdk" make >"$work/out1" 2>&1 & local building=$!
    until_exists building && kill -9 $building && make_on "flock sdk" && says waiting && calls 1 publish
}

a_compiler_server_keeps_nobody_waiting() {
    fresh
    SERVER=1 make_on "flock sdk" && make_on "flock sdk" && fails says waiting
}

without_flock_it_builds() { fresh; make_on sdk && exists gpt2 && fails says flock; }

# Takes the lock until the test is over.
another_make() {
    on flock flock Makefile sh -c 'touch held; while [ ! -e "$FAKES/end" ]; do sleep 0.05; done' &
    until_exists held
}

a_dry_run_neither_waits_nor_makes() {
    fresh
    another_make && make_on "flock sdk" -n train && fails says waiting && says "dotnet publish" &&
        says "./gpt2 train" && fails exists bin && fails exists data && fails exists calls
}

no_other_option_is_a_dry_run() { # OPTION
    fresh
    another_make && fails on "flock sdk" timeout 0.5 make "$1" >"$work/out" 2>&1 && says waiting
}

# ---- Building

all_at_once() {
    fresh
    make_on "flock sdk nvcc" -j8 gpt2 test-bin && calls 2 publish && fails says waiting && fails says jobserver &&
        exists gpt2-tests
}

# ---- GPUs and the CUDA compiler

no_line_without_a_gpu() { fresh; make_on "flock sdk" && calls 1 Kernels=no && fails says GPU; }

one_line_with_a_gpu_and_no_compiler() {
    fresh
    make_on "flock sdk gpu" && calls 1 Kernels=no && times 1 GPU out && says "make toolkit" && make_on "flock sdk gpu"
}

no_line_with_both() { fresh; make_on "flock sdk gpu nvcc" && calls 1 Kernels=yes && fails says "GPU,"; }

kernels_come_and_go_with_the_compiler() {
    fresh
    make_on "flock sdk nvcc" && make_on "flock sdk" && calls 1 Kernels=no && make_on "flock sdk" && calls 2 publish &&
        make_on "flock sdk nvcc" && calls 2 Kernels=yes && make_on "flock sdk nvcc" && calls 3 publish
}

# ---- No SDK

missing="the .NET 10 SDK is missing"

a_brought_binary_is_used() { # COMMAND HOW IT IS CALLED
    fresh gpt2
    mkdir "$work/tree/data" && echo text >"$work/tree/data/text.txt"
    make_on "flock nvcc ncu" "$1" && times 1 "$missing" out && says "make $1: $missing: using ./gpt2 as it is" &&
        fails says older && says "$2" && fails exists bin/Kernels.fp32.fatbin || return
    touch -d '1 hour ago' "$work/tree/gpt2" && rm -f "$work"/tree/data/*.bin
    make_on "flock nvcc ncu" "$1" && says "using ./gpt2 as it is (older than the sources)" && says "$2"
}

no_binary_no_sdk() { fresh; fails make_on "flock nvcc" "$1" && times 1 "$missing: install" out; }

what_is_asked_for_by_name_is_built_or_refused() {
    fresh gpt2
    touch -d '1 hour ago' "$work/tree/gpt2"
    fails make_on flock && says "make gpt2: $missing: install" && fails make_on flock test-bin &&
        says "make gpt2-tests: $missing: install"
}

brought_tests_run() { fresh gpt2 gpt2-tests; make_on flock test && says "3 passed, 0 failed"; }

no_tests_no_sdk() { fresh gpt2; fails make_on flock test && says "make test: $missing: install"; }

no_text_no_network_no_sdk() {
    fresh gpt2
    fails make_on flock data && says "no network and no documentation" && fails exists data/text_train_000001.bin
}

# ---- Data and models

# holds PATH BYTES...: puts a file of this many random bytes on the hub.
holds() { mkdir -p "$work/hub/$(dirname "$1")" && head -c "$2" /dev/urandom >"$work/hub/$1"; }
requests() { times "$1" "$2" requests; }
hub() { fresh gpt2; rm -rf "$work"/{hub,requests,cut,lie} && mkdir "$work/hub"; }
same() { cmp -s "$work/hub/$1" "$work/tree/$2"; } # PATH AT THE HUB, PATH HERE

fineweb=datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_

fineweb_is_fetched_once() {
    hub
    holds ${fineweb}val_000000.bin 3000 && holds ${fineweb}train_000001.bin 5000 && holds ${fineweb}train_000002.bin 70
    make_on "flock net" data DATA=fineweb SHARDS=2 && same ${fineweb}val_000000.bin data/fineweb/fineweb_val_000000.bin &&
        same ${fineweb}train_000002.bin data/fineweb/fineweb_train_000002.bin && requests 3 fineweb &&
        make_on "flock net" data DATA=fineweb SHARDS=2 && requests 3 fineweb &&
        make_on "flock net" train DATA=fineweb && says "-i data/fineweb/*train_*.bin -j data/fineweb/*val_*.bin" &&
        requests 3 fineweb && fails make_on "flock net" data DATA=fineweb SHARDS=104 && says "expected 1 to 103"
}

an_interrupted_fetch_goes_on() {
    hub
    local path=openai-community/gpt2/resolve/main
    holds $path/config.json 9 && holds $path/model.safetensors 100000 && touch "$work/cut"
    fails make_on "flock net" model MODEL=gpt2 && says "config.json: fetching it was interrupted" &&
        fails exists models/gpt2/config.json && rm "$work/cut" && make_on "flock net" model && touch "$work/cut" &&
        rm "$work/tree/models/gpt2/model.safetensors" && fails make_on "flock net" model &&
        fails exists models/gpt2/model.safetensors && rm "$work/cut" && make_on "flock net" model &&
        requests 1 "model.safetensors 50000" && same $path/model.safetensors models/gpt2/model.safetensors &&
        same $path/config.json models/gpt2/config.json
}

a_wrong_size_is_named() { # BYTES THAT ARE THERE, BYTES THAT THE HUB PROMISES TOO MUCH
    hub
    holds datasets/karpathy/llmc-starter-pack/resolve/main/gpt2_124M_bf16.bin 3000
    mkdir "$work/tree/models" && head -c "$1" /dev/zero >"$work/tree/models/gpt2_124M_bf16.bin.part" && echo "$2" >"$work/lie"
    fails make_on "flock net" model MODEL=gpt2_124M_bf16 && fails exists models/gpt2_124M_bf16.bin &&
        says "models/gpt2_124M_bf16.bin.part: expected $((3000 + $2)) bytes, found"
}

what_the_hub_does_not_have_is_named() { # COMMAND...
    hub
    fails make_on "flock net" "${@:1:2}" && says "$3: expected its size from $HUB" && fails exists "$3"
}

texts_are_fetched_and_tokenized() {
    hub
    local stories=datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4
    holds $stories-train.txt 100 && holds $stories-valid.txt 50 && printf 'a\n\nb\n' >"$work/hub/input.txt" &&
        holds datasets/karpathy/llmc-starter-pack/resolve/main/hellaswag_val.bin 10
    make_on "flock net" data DATA=tinystories && exists data/tinystories/text_train_000001.bin &&
        says "-valid.txt data/tinystories/TinyStoriesV2-GPT4-train.txt" &&
        make_on "flock net" data DATA=shakespeare && exists data/shakespeare/text_val_000000.bin &&
        times 1 "<|endoftext|>b" tree/data/shakespeare/speeches.txt &&
        make_on "flock net" data DATA=hellaswag && exists data/hellaswag/hellaswag_val.bin
}

a_text_of_ones_own_makes_new_shards() { # DATA, ITS FOLDER
    hub
    mkdir -p "$work/tree/texts/more" && head -c 4000 /dev/zero >"$work/tree/texts/more/my.txt"
    local shard=$2/text_train_000001.bin
    make_on flock data DATA="$1" && exists "$shard" && says "--val-tokens 100 $1" &&
        make_on flock data DATA="$1" && fails says tokenize &&
        touch -d '1 day ago' "$work/tree/texts/more/my.txt" && touch "$work/tree/$2/text_train_000002.bin" &&
        make_on flock train DATA="$1" && says tokenize && fails exists "$2/text_train_000002.bin" &&
        says "gpt2 train -y -i $2/*train_*.bin"
}

new_text_makes_new_shards() {
    fresh gpt2
    mkdir "$work/tree/data" && touch -d '1 hour ago' "$work/tree"/data/text_train_00000{1,2}.bin && echo >"$work/tree/data/text.txt"
    make_on flock data && says tokenize && fails exists data/text_train_000002.bin
}

unknown_names_are_refused() { fresh gpt2; fails make_on "flock net" "$@" && says "expected" && says "found '$(cut -d= -f2 <<<"$2")'"; }

check four_take_turns_and_one_builds
check different_commands_take_turns
check clean_waits_for_a_build
check training_keeps_nobody_waiting
check a_make_that_is_terminated_gives_way
check a_make_that_is_killed_is_waited_for_until_the_inner_one_ends
check a_compiler_server_keeps_nobody_waiting
check without_flock_it_builds
check a_dry_run_neither_waits_nor_makes
check no_other_option_is_a_dry_run --no-print-directory
check no_other_option_is_a_dry_run NVCC=none
check all_at_once
check no_line_without_a_gpu
check one_line_with_a_gpu_and_no_compiler
check no_line_with_both
check kernels_come_and_go_with_the_compiler
check a_brought_binary_is_used train "gpt2 train -y"
check a_brought_binary_is_used bench "gpt2 bench"
check a_brought_binary_is_used profile "kernel of the tests"
check a_brought_binary_is_used data "gpt2 tokenize"
check no_binary_no_sdk gpt2
check no_binary_no_sdk train
check no_binary_no_sdk test
check what_is_asked_for_by_name_is_built_or_refused
check brought_tests_run
check no_tests_no_sdk
check no_text_no_network_no_sdk
check fineweb_is_fetched_once
check an_interrupted_fetch_goes_on
check a_wrong_size_is_named 4000 0
check a_wrong_size_is_named 1000 5
check what_the_hub_does_not_have_is_named model MODEL=gpt2-xl models/gpt2-xl/config.json
check what_the_hub_does_not_have_is_named data DATA=hellaswag data/hellaswag/hellaswag_val.bin
check texts_are_fetched_and_tokenized
check a_text_of_ones_own_makes_new_shards texts/more/my.txt data/texts_more_my.txt
check a_text_of_ones_own_makes_new_shards texts/ data/texts
check new_text_makes_new_shards
check unknown_names_are_refused data DATA=nothing.txt
check unknown_names_are_refused model MODEL=gpt3
echo "$passed passed, $failed failed"
exit $((failed > 0))
