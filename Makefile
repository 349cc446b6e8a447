# make            ./gpt2, a native executable
# make train      build, data, training; more options in ARGS, as in: make train ARGS="-e d12 -x 1000"
# make test       every test that this machine can run
# make bench      training speed by operation, and PyTorch's if python3 has it for this GPU; ARGS="-e d48 -b 16"
# make profile    one training step by kernel, from hardware counters, where there is ncu; ARGS="-b 16"
# make data DATA=...   token shards: fineweb (SHARDS=9 of 103), tinystories, shakespeare, hellaswag, or a text of your
#                 own, a file or folder that gpt2 tokenize takes; they are in data/NAME, and make train DATA=... uses them
# make model MODEL=gpt2   OpenAI's weights into models/: gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt2_124M_bf16 (llm.c's)
# make test-bin, make toolkit, make clean: said where they stand

export DOTNET_NOLOGO := 1
export DOTNET_SYSTEM_GLOBALIZATION_INVARIANT := 1
export DOTNET_CLI_TELEMETRY_OPTOUT := 1

# $(call need,TOOL,HOW TO GET IT) stops with one line.
need = command -v $1 >/dev/null || { echo "make $@: $1 is missing: $2" >&2; exit 1; }
sdk = dotnet --list-sdks 2>/dev/null | grep -q '^[1-9][0-9]\.'
need_sdk = $(sdk) || \
	{ echo "make $@: the .NET 10 SDK is missing: install dotnet-sdk-10.0, or put dotnet on PATH" >&2; exit 1; }

.PHONY: train bench profile test test-bin data model toolkit clean always
.DELETE_ON_ERROR:

# Without DATA its shards are in data/ itself.
DATA ?=
$(if $(word 2,$(DATA)),$(error DATA: expected a path without spaces, found '$(DATA)'))
shards_in := data$(if $(DATA),/$(subst /,_,$(patsubst %/,%,$(DATA))))

# Two makes in one folder take turns: an inner make, which holds a lock on this file as long as it lives, builds.
# What is built then runs without the lock.
ifndef HOLDS_LOCK
.PHONY: gpt2 gpt2-tests
.NOTPARALLEL:
wait = ! command -v flock >/dev/null || flock -n 9 || \
	{ echo "make $@: waiting for another make in this folder" >&2; flock 9; }
dry_run = $(findstring n,$(firstword -$(MAKEFLAGS)))
build = $(if $(dry_run),,exec 9>>Makefile; $(wait);) exec $(MAKE) --no-print-directory HOLDS_LOCK=1 $@

gpt2 gpt2-tests test-bin data model toolkit clean:
	+@$(build)

train:
	+@$(build)
	./gpt2 train -y -i '$(shards_in)/*train_*.bin' -j '$(shards_in)/*val_*.bin' -o log $(ARGS)

bench:
	+@$(build)
	@./gpt2 bench $(ARGS) | tee bin/bench
	@if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		python3 tests/rival.py -d 524288 -b 64 $(ARGS) | tee bin/rival && \
		awk '/tok\/s/ && /MFU/ { ours = $$5 } /^pytorch/ { theirs = $$3 } \
			END { printf "%.2f times PyTorch\n", ours / theirs }' bin/bench bin/rival; \
	fi
	@./gpt2 bench --decode
	@if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		python3 tests/rival.py --decode; \
	fi

# Time, and the share of DRAM's and the tensor cores' peak: of one micro-batch and the update, by Nsight Compute.
counters = gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,$\
	sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active
profile:
	+@$(build)
	@$(call need,ncu,install NVIDIA Nsight Compute)
	@ncu --profile-from-start off --csv --page raw --print-units base --metrics $(counters) \
		./gpt2 bench -b 64 -d 65536 -x 1 $(ARGS) >bin/profile || { cat bin/profile >&2; exit 1; }
	@awk -f tests/profile.awk bin/profile

# The last line is the count. A run that fails without saying which test failed counts as one failure.
define count_tests
BEGIN { status = "unknown" }
{ gsub(/\033\[[0-9;]*m/, "") } # the colours, which CI=true turns on
/^Test run summary:/ { summary = 1 }
summary && /^  [a-z]+: [0-9]+$$/ { count[$$1] = $$2 }
/^exit status [0-9]+$$/ { status = $$3; next }
/^skipped / { getline; next } # and the reason, which is on the next line
{ print; fflush() }
END {
    failed = count["failed:"] + 0
    if (failed == 0 && (status != 0 || !count["succeeded:"])) {
        print "make test: exit status " status (summary ? "" : " without a summary") " and no failed test: one failure"
        failed = 1
    }
    if (count["skipped:"]) printf "%d skipped: they need a GPU, or a build with kernels\n", count["skipped:"]
    printf "%d passed, %d failed\n", count["succeeded:"], failed
    exit failed > 0
}
endef
export count_tests
test:
	+@$(build)
	@{ if $(sdk); then dotnet run --no-build --project tests -c Release; else ./gpt2-tests; fi; \
		echo "exit status $$?"; } 2>&1 | awk "$$count_tests"

else # the inner make
# Instruction set of the binaries: native is this machine's vector units, x86-64-v3 is any machine with AVX2.
ISA ?= native
# The CUDA compiler: one on PATH that is new enough, or else the one that `make toolkit` unpacks.
CUDA ?= $(HOME)/.cache/gpt2/cuda
NVCC ?= $(or $(shell command -v nvcc >/dev/null && nvcc --version | sed -n 's/.*release \([0-9.]*\).*/\1/p' \
	| sed '1i 12.4' | sort -CV && command -v nvcc),$(CUDA)/nvcc)

# GPUs that the kernels are compiled for, by compute capability (80 is for 86 and 89, too); native is this machine's.
ARCH ?= 80 90a $(shell [ -x "$(NVCC)" ] && $(NVCC) --list-gpu-arch | sed -n 's/^compute_\(100\|120\)$$/\1/p')

# Without a CUDA compiler the build is for CPUs only.
has_sdk := $(shell $(sdk) && echo yes)
kernels := $(and $(has_sdk),$(wildcard $(NVCC)),bin/Kernels.bf16.fatbin bin/Kernels.fp32.fatbin)
sources := $(wildcard *.cs) Gpt2Cli.csproj $(wildcard packages.lock.json) bin/isa $(kernels)
tests := $(wildcard tests/*.cs tests/*.csproj tests/packages.lock.json)
shards := $(wildcard data/*train_*.bin)

# $(call publish,PROJECT,FOLDER): -p:CppCompilerAndLinker=gcc spares us clang. Intermediate files have a folder of their
# own, for the runtime that publishing leaves among them would keep `dotnet run` from starting. A compiler server
# outlives make, and must not keep the lock (9).
options := -c Release -p:Kernels=$(if $(kernels),yes,no) --nologo -v quiet
publish = dotnet publish $1 $(options) -r linux-x64 -p:CppCompilerAndLinker=gcc -p:IlcInstructionSet=$(ISA) \
	--artifacts-path bin/artifacts -o $2 9>&-

# Without an SDK, all but `make gpt2` takes the ./gpt2 that somebody brought.
brought := $(if $(has_sdk)$(filter gpt2,$(MAKECMDGOALS)),,$(wildcard gpt2))
older := $(if $(brought),$(if $(shell find *.cs *.cu -newer gpt2), (older than the sources)))

# Both binaries appear by rename: a run that is going on keeps the file that it started from.
ifdef brought
gpt2: always
	@echo "make $(MAKECMDGOALS): the .NET 10 SDK is missing: using ./gpt2 as it is$(older)"
else
gpt2: $(sources)
	@$(need_sdk)
	@$(call need,gcc,install your distribution's gcc)
	@$(if $(kernels),:,! $(has_gpu) || echo "make $@: $(no_kernels)")
	$(call publish,Gpt2Cli.csproj,bin/publish)
	@cp bin/publish/gpt2 $@.new && mv $@.new $@
endif
has_gpu = { nvidia-smi -L; ls -d /proc/driver/nvidia/gpus/* /dev/nvidia[0-9]; } 2>/dev/null | grep -q '^GPU\|^/'
no_kernels = there is a GPU, but no nvcc: this build will use CPUs only (make toolkit gets nvcc, make then the kernels)

# The tests as one native executable, for a GPU box without an SDK; the tests run ./gpt2 as well, so take both:
# make gpt2 test-bin ISA=x86-64-v3
test-bin: gpt2-tests
gpt2-tests: $(sources) $(tests)
	@$(need_sdk)
	@$(call need,gcc,install your distribution's gcc)
	$(call publish,tests/Gpt2Cli.Tests.csproj,bin/tests)
	@cp bin/tests/$@ $@.new && mv $@.new $@

# The kernels as machine code for each GPU, without PTX.
capability = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d . | sed 's/^90$$/90a/')
targets = $(foreach a,$(if $(filter native,$(ARCH)),$(capability),$(ARCH)),-gencode arch=compute_$a,code=sm_$a)
bin/Kernels.%.fatbin: Kernels.cu bin/arch
	$(NVCC) -std=c++17 -O3 $(if $(filter fp32,$*),-DFP32) $(targets) -Xfatbin -compress-all -fatbin -o $@.new $<
	@mv $@.new $@

# Rewritten only when an option is another one than last time, and then what was built is out of date.
stamp = mkdir -p bin && echo "$1" | cmp -s - $@ || echo "$1" >$@
bin/isa: always
	@$(call stamp,$(ISA)$(if $(kernels),, without kernels))
bin/arch: always
	@$(call stamp,$(ARCH))

# What each command needs before it runs.
train: data
train bench profile: gpt2
	@mkdir -p bin
test: gpt2
ifdef has_sdk
	@dotnet build tests $(options) 9>&-
else
	@[ -x gpt2-tests ] || $(need_sdk)
endif

# Token shards without DATA: any that are in data/ already, or those of data/text.txt, which may be a text of your own.
.SECONDARY: data/text.txt
ifndef DATA
data: $(or $(firstword $(shards)),data/text_train_000001.bin)
data/text_train_000001.bin: data/text.txt | gpt2
	@rm -f data/text_train_*.bin data/text_val_*.bin
	./gpt2 tokenize -o data/text --val-tokens 32768 data/text.txt
else ifeq ($(DATA),fineweb)
SHARDS ?= 1
number = $(filter $(SHARDS),$(shell seq 103))
data: $(or $(if $(number),data/fineweb/fineweb_val_000000.bin),$(error SHARDS: expected 1 to 103, found '$(SHARDS)'))
data: $(shell seq -f data/fineweb/fineweb_train_%06.0f.bin $(number))
data/fineweb/%:
	@$(call fetch,datasets/kjj0/fineweb10B-gpt2/resolve/main/$*)
else ifeq ($(DATA),hellaswag)
data: data/hellaswag/hellaswag_val.bin
data/hellaswag/%:
	@$(call fetch,datasets/karpathy/llmc-starter-pack/resolve/main/$*)
else ifeq ($(DATA),tinystories)
data: data/tinystories/text_train_000001.bin
stories := data/tinystories/TinyStoriesV2-GPT4
data/tinystories/text_train_000001.bin: $(stories)-valid.txt $(stories)-train.txt | gpt2
	@rm -f $(@D)/text_*.bin
	./gpt2 tokenize -o $(@D)/text --val-tokens 4000000 $^
data/tinystories/%.txt:
	@$(call fetch,datasets/roneneldan/TinyStories/resolve/main/$*.txt)
else ifeq ($(DATA),shakespeare)
data: data/shakespeare/text_train_000001.bin
data/shakespeare/text_train_000001.bin: data/shakespeare/input.txt | gpt2
	@rm -f $(@D)/text_*.bin
	@$(speeches) $< >$(@D)/speeches.txt
	./gpt2 tokenize -o $(@D)/text --val-tokens 32768 $(@D)/speeches.txt
data/shakespeare/input.txt:
	@$(call fetch,,$(SHAKESPEARE))
else
# A text of your own: new shards when the list of its files, their sizes and times is another one than last time. A tenth
# is for validation, 32,768 tokens at most.
names := fineweb, tinystories, shakespeare, hellaswag, a file or a folder
data: $(if $(wildcard $(DATA)),$(shards_in)/text_train_000001.bin,$(error DATA: expected $(names), found '$(DATA)'))
$(shards_in)/text_train_000001.bin: $(shards_in)/files | gpt2
	@rm -f $(@D)/text_*.bin
	./gpt2 tokenize -o $(@D)/text --val-tokens \
		$$(awk '{ n += $$1 / 40 } END { printf "%d", n < 32768 ? n : 32768 }' $<) $(DATA)
$(shards_in)/files: always
	@mkdir -p $(@D) && find -L '$(DATA)' -type f -printf '%s %T@ %p\n' | LC_ALL=C sort >$@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi
endif

# $(call fetch,PATH AT THE HUB,URL IF IT IS ELSEWHERE) fetches what is $@, and goes on with what has come of it before.
HUB ?= https://huggingface.co
define get
url=$$1 file=$$2
mkdir -p "$${file%/*}"
have() { wc -c <"$$file.part" 2>/dev/null || echo 0; }
fail() { echo "make: $$*" >&2; exit 1; }
size=$$(curl -sIL --connect-timeout 20 "$$url" | tr -d '\r' | awk 'tolower($$1) == "x-linked-size:" { linked = $$2 }
	/^HTTP/ { status = $$2; size = "" } tolower($$1) == "content-length:" { size = $$2 }
	END { print linked ? linked : status == 200 ? size : "" }')
[ -n "$$size" ] || fail "$$file: expected its size from $$url, found none: is there a network?"
[ "$$(have)" -ge "$$size" ] || curl -fL -C - --retry 3 --connect-timeout 20 $$([ -t 2 ] || echo -sS) \
	-o "$$file.part" "$$url" || fail "$$file: fetching it was interrupted: the same command goes on"
[ "$$(have)" -eq "$$size" ] || fail "$$file.part: expected $$size bytes, found $$(have): remove it"
mv "$$file.part" "$$file" && echo "$$file: $$size bytes"
endef
export get
fetch = $(call need,curl,install your distribution's curl); sh -c "$$get" get $(or $2,$(HUB)/$1) $@

# OpenAI's weights, and llm.c's file of the smallest.
MODEL ?= gpt2
ifneq ($(filter $(MODEL),gpt2 gpt2-medium gpt2-large gpt2-xl),)
model: models/$(MODEL)/config.json models/$(MODEL)/model.safetensors
else ifeq ($(MODEL),gpt2_124M_bf16)
model: models/gpt2_124M_bf16.bin
else
model:
	@echo "MODEL: expected gpt2, gpt2-medium, gpt2-large, gpt2-xl or gpt2_124M_bf16, found '$(MODEL)'" >&2; exit 1
endif
models/%.bin:
	@$(call fetch,datasets/karpathy/llmc-starter-pack/resolve/main/$*.bin)
models/$(MODEL)/%:
	@$(call fetch,openai-community/$(MODEL)/resolve/main/$*)

# Shakespeare's speeches, a document each as in llm.c, if the network is there; if not, the SDK's own documentation.
speeches = awk '{ print } /^$$/ && !gap { printf "<|endoftext|>" } { gap = /^$$/ }'
SHAKESPEARE ?= https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
data/text.txt:
	@mkdir -p data
	@if { curl -fsL --connect-timeout 5 --max-time 60 -o $@.part $(SHAKESPEARE) || \
		wget -q -T 5 -t 1 -O $@.part $(SHAKESPEARE); } 2>/dev/null && \
		grep -q '^First Citizen:$$' $@.part; then \
		$(speeches) $@.part >$@.new || exit 1; \
		echo "data: $(SHAKESPEARE)"; \
	else \
		packs=$$(dotnet --list-sdks 2>/dev/null | sed -n '$$s/.*\[\(.*\)\/sdk\]$$/\1\/packs/p'); \
		find "$$packs" -path '*.Ref/*' -name '*.xml' ! -name '*Intrinsics.xml' 2>/dev/null | sort >$@.part; \
		[ -s $@.part ] || { echo "make data: no network and no documentation in the SDK (packs/*.Ref):" \
			"put a text of your own into $@" >&2; exit 1; }; \
		LC_ALL=C xargs -d '\n' awk -f tests/apidocs.awk <$@.part >$@.new || exit 1; \
		echo "data: the .NET documentation in $$packs, for there is no network"; \
	fi && rm -f $@.part && mv $@.new $@ && wc -c $@

# nvcc 12.4 for a machine that has none: packages of Debian trixie, which apt checks with the keys that this machine
# trusts, unpacked into a folder of the user's home. Nothing is installed, and the system's apt state is not touched.
# 1.0 GB comes, 0.25 GB stays; interrupted, it goes on with the packages that have come.
define probe
__global__ void probe(float *out, unsigned long long a, unsigned long long b) {
    float d[4] = {};
    asm volatile("wgmma.fence.sync.aligned;"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
        "wgmma.commit_group.sync.aligned;"
        "wgmma.wait_group.sync.aligned 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    out[threadIdx.x] = tanhf(d[0]) + erfcf(d[1]) + d[2] + d[3];
}
endef
# Debian's nvcc.profile has paths of an installed toolkit; this one finds its parts beside itself.
define profile
TOP = $$(_HERE_)/../../..
NVVMIR_LIBRARY_DIR = $$(_HERE_)/../libdevice
LD_LIBRARY_PATH += $$(TOP)/lib/x86_64-linux-gnu:
PATH += $$(_HERE_):$$(TOP)/bin:
INCLUDES += "-I$$(TOP)/include" $$(_SPACE_)
endef
# nvcc 12.4 takes g++ up to version 13.
define wrapper
#!/bin/sh
gxx=$$(command -v g++-13 || command -v g++-12 || command -v g++)
exec "$$(dirname "$$(readlink -f "$$0")")/usr/lib/nvidia-cuda-toolkit/bin/nvcc" -ccbin "$$gxx" "$$@"
endef
# An apt of our own: its folders are the current one, and hooks of the system's (which may empty its cache) do not run.
define apt_hooks
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
endef
apt = apt-get -qq -c=hooks -o Dir::Etc::SourceList=$$PWD/source -o Dir::Etc::SourceParts=- -o Dir::State=$$PWD \
	-o Dir::State::status=$$PWD/status -o Dir::Cache=$$PWD -o Acquire::Languages=none \
	-o Acquire::http::Timeout=20 -o APT::Sandbox::User=
get_nvcc = install CUDA 12.4 or newer and put its nvcc on PATH
export probe profile wrapper apt_hooks

toolkit: $(NVCC)
	@echo "$(NVCC): $$($(NVCC) --version | grep release)"

$(CUDA)/nvcc:
	@$(call need,apt-get,$(get_nvcc))
	@$(call need,g++,install your distribution's g++)
	@echo "make toolkit: fetching 1.0 GB of packages"
	@mkdir -p $(CUDA).part/lists/partial && cd $(CUDA).part && touch status && \
	site=$$(apt-get update --print-uris | sed -n "s|^'\(.*/debian\)/dists/.*/InRelease'.*|\1|p" | head -n 1) && \
	echo "deb $$site trixie main non-free" >source && echo "$$apt_hooks" >hooks && \
	$(apt) update && $(apt) download nvidia-cuda-toolkit nvidia-cuda-dev libnvvm4 libcu++-dev || \
		{ echo "make toolkit: no package source for Debian trixie is within reach: $(get_nvcc)" >&2; exit 1; }
	@cd $(CUDA).part && rm -rf root && mkdir root && \
	for deb in nvidia-cuda-toolkit_*.deb libnvvm4_*.deb libcu++-dev_*.deb; do \
		dpkg-deb -x $$deb root || exit 1; done && \
	dpkg-deb --fsys-tarfile nvidia-cuda-dev_*.deb | tar -x -C root ./usr/include && \
	bin=root/usr/lib/nvidia-cuda-toolkit/bin && rm $$bin/nvcc.profile && echo "$$profile" >$$bin/nvcc.profile && \
	echo "$$wrapper" >root/nvcc && chmod +x root/nvcc && echo "$$probe" >probe.cu && \
	root/nvcc -arch=sm_90a -cubin -o probe.cubin probe.cu && mv -T root $(CUDA) && rm -rf $(CUDA).part

# What was built; data/ and log/ stay.
clean:
	rm -rf bin obj tests/bin tests/obj gpt2 gpt2-tests
endif
