using ConsoleAppFramework;
using Gpt2;
using Microsoft.Extensions.Logging;
using Microsoft.Extensions.Logging.Abstractions;
using ZLogger;
using static CommandLine;

Standard.Prepare(args is ["sample" or "verify" or "bench", ..]);

var app = ConsoleApp.Create();
var log = new StringWriter(); // what the framework prints
ConsoleApp.Log = log.WriteLine;
ConsoleApp.LogError = message => throw new Gpt2Exception(message, usage: true);
var help = new Help(command => {
    log.GetStringBuilder().Clear();
    app.Run([.. command, "--help"]);
    return $"{log}";
});
app.ConfigureGlobalOptions((ref options) => ConsoleApp.ServiceProvider = new GlobalOptions(
    options.AddGlobalOption("--device", "HARDWARE: Where to compute: auto, cuda or cpu.", DeviceKind.Auto),
    options.AddGlobalOption<DataType?>("--precision", "Of weights and activations: bf16 or fp32. [bf16 on a GPU]"),
    options.AddGlobalOption<bool>("--verbose",
        "OTHER: Show where an error came from; wait for the GPU after each operation, to name it.")));
app.Add<Commands>();
return Guard(args.Contains("--verbose"), () => {
    if (args is ["completion", ..] && Environment.GetEnvironmentVariable("COMP_LINE") is { } line) {
        Console.Out.Write(help.Complete(line));
        return 0;
    }
    var words = Normalize(args is ["help", .. var about] ? [.. about, "--help"] : args, help);
    if (words is ["train", .. var options] && options.Contains("--resume")) {
        var folder = options.SkipWhile(word => word != "--out").ElementAtOrDefault(1) ?? "log";
        words = Normalize(["train", .. Checkpoints.SettingsOf(folder), .. options], help);
    }
    if (words is [] or [.., "--help"]) {
        Console.Out.Write(help.Of(words));
        return 0;
    }
    log.GetStringBuilder().Clear();
    app.Run(words);
    if (words is [.., "--version"])
        Console.Out.Write(log);
    return Environment.ExitCode;
});

/// <summary>The options of every command, which ConsoleAppFramework hands to Commands' constructor.</summary>
internal sealed record GlobalOptions(DeviceKind Device, DataType? Precision, bool Verbose) : IServiceProvider {
    object IServiceProvider.GetService(Type type) => this;
}

/// <summary>The commands. Their doc comments are the source of the help, of what the command line is checked against
/// and of completion in a shell: an option that begins with a word in capitals begins a group of that name, a number's
/// range is in parentheses, and a default that the device decides is in brackets.</summary>
internal sealed class Commands(GlobalOptions global) {
    /// <summary>Trains GPT-2 from random weights or from a model, on token shards.
    /// Example: gpt2 train -o log -x 1000</summary>
    /// <param name="trainData">-i, DATA: Token shards to train on (names may have * and ?), or a folder.</param>
    /// <param name="valData">-j, Token shards to validate on, or a folder.</param>
    /// <param name="noShuffle">Take the data in order.</param>
    /// <param name="overfit">-a, Train on the first batches alone.</param>
    /// <param name="init">-e, MODEL: A model, as for sample, or random: d6, d12, d24, d36, d48. [d12; CPU: d6]</param>
    /// <param name="seq">-t, Tokens in a sequence (1 to 131072). [1024; CPU: 128]</param>
    /// <param name="batch">-b, OPTIMIZATION: Sequences in a batch (1 or more). [16; CPU: 4]</param>
    /// <param name="totalBatch">-d, Tokens in an update (0 or more): n x batch x seq x GPUs; 0: n = 1 (CPU: 2).</param>
    /// <param name="optimizer">What updates the layers' matrices (AdamW does the rest): muon or adamw.</param>
    /// <param name="weightDecay">-c, Weight decay of the matrices (0 or more).</param>
    /// <param name="skipOutliers">Skip updates with a loss or norm X deviations above the last 128 (0 or more).</param>
    /// <param name="seed">Seed of weights, order and samples (0 or more).</param>
    /// <param name="maxSteps">-x, SCHEDULE: Updates in all (1 or more). [300; CPU: 100]</param>
    /// <param name="lr">-l, Highest learning rate (above 0). [2.5e-3; CPU: 5e-3; adamw: 1e-3]</param>
    /// <param name="schedule">-k, How the learning rate goes down: cosine, linear, constant or wsd.</param>
    /// <param name="warmup">-u, Updates until the highest learning rate (0 or more).</param>
    /// <param name="finalLrFrac">-q, Last learning rate as a fraction of the highest (0 to 1).</param>
    /// <param name="out">-o, OUTPUT: The run's folder: checkpoints, logs, loss.svg, a picture of the losses.</param>
    /// <param name="resume">-y, Go on from the last checkpoint in the output folder.</param>
    /// <param name="checkpointEvery">-n, Updates between checkpoints (0 or more); 0 for one at the end.</param>
    /// <param name="keep">Newest checkpoints to keep (1 or more).</param>
    /// <param name="keepBest">Keep the model with the best validation besides.</param>
    /// <param name="valEvery">-v, Updates between validations (0 or more); 0 for one at the end.</param>
    /// <param name="valBatches">-m, Batches in a validation (0 or more); 0 for 128 sequences.</param>
    /// <param name="sampleEvery">-s, Updates between samples of text (0 or more); 0 for one at the end.</param>
    /// <param name="genTokens">-g, Tokens in a sample (0 or more).</param>
    /// <param name="logEvery">Updates between step lines (1 or more); on a terminal at most ten a second.</param>
    /// <param name="gpus">HARDWARE: GPUs of this machine (1 or more). [all; those of mpirun, srun or torchrun]</param>
    /// <param name="recompute">-r, Less memory, more work (0 to 2): 1 recomputes GELU, 2 layer norms too.</param>
    /// <param name="zero">-z, Which ZeRO stage (0 or 1) divides the optimizer's state among GPUs: 0 for none.</param>
    /// <param name="timeout">Seconds that one GPU's process waits for another's (1 to 1000000).</param>
    public int Train(string trainData = "data/*train_*.bin", string valData = "data/*val_*.bin", bool noShuffle = false,
        bool overfit = false, string? init = null, int? seq = null, int? batch = null, int totalBatch = 0,
        OptimizerKind optimizer = OptimizerKind.Muon, float weightDecay = 0.1f, float skipOutliers = 0, uint seed = 42,
        int? maxSteps = null, float? lr = null, Schedule schedule = Schedule.Cosine, int warmup = 20,
        float finalLrFrac = 0.1f, string @out = "log", bool resume = false, int checkpointEvery = 200, int keep = 2,
        bool keepBest = false, int valEvery = 50, int valBatches = 0, int sampleEvery = 0, int genTokens = 64,
        int logEvery = 1, int? gpus = null, int recompute = 0, int zero = 1, int timeout = 600) =>
        OnEachGpu(gpus, timeout, (device, ranks) => {
            using var logs = LoggerFactory.Create(logging => logging.AddZLoggerConsole(options =>
                options.LogToStandardErrorThreshold = LogLevel.Trace));
            var (B, T) = Sizes(device, batch, seq, (16, 1024), (4, 128), device is Cpu ? 2 : ranks.Size);
            totalBatch = totalBatch == 0 ? B * T * (device is Cpu ? 2 : ranks.Size) : totalBatch;
            lr ??= optimizer == OptimizerKind.AdamW ? 1e-3f : device is Cpu ? 5e-3f : 2.5e-3f;
            maxSteps ??= device is Cpu ? 100 : 300;
            var options = new TrainOptions(Shards(trainData, "train"), Shards(valData, "val"), init, @out, B, T,
                totalBatch, maxSteps.Value, lr.Value, warmup, finalLrFrac, weightDecay, schedule, valEvery, valBatches,
                sampleEvery, genTokens, checkpointEvery, keep, resume, recompute, overfit, !noShuffle, seed,
                skipOutliers, zero, global.Precision, optimizer, keepBest, logEvery);
            using var trainer = new Trainer(options, device, ranks.Rank == 0 ? Console.Out : TextWriter.Null,
                ranks.Rank == 0 ? logs.CreateLogger("gpt2") : NullLogger.Instance, ranks);
            trainer.Run();
        });

    /// <summary>Continues a text, or with no prompt each line typed in.
    /// Example: gpt2 sample -e log -p "Once upon a time" -n 100</summary>
    /// <param name="init">-e, TEXT: A model: llm.c's .bin, .safetensors, or the folder of either or of a run.</param>
    /// <param name="prompt">-p, Text to continue; - reads it from standard input.</param>
    /// <param name="promptIds">Token ids to continue, in place of a text: 1,2,3. Ids are printed then.</param>
    /// <param name="tokens">-n, Tokens to add at most (1 or more).</param>
    /// <param name="num">Samples (1 or more).</param>
    /// <param name="stopAtContext">End where the context is full, instead of going on from its newest half.</param>
    /// <param name="quiet">Do not tell the speed.</param>
    /// <param name="temperature">CHOICE: Above 1 is wilder, below tamer (0 or more); 0 takes the likeliest.</param>
    /// <param name="topK">--top-k, Choose among this many of the likeliest tokens (0 or more); 0 for all.</param>
    /// <param name="topP">--top-p, Choose among the likeliest tokens of this probability (above 0 and up to 1).</param>
    /// <param name="seed">Seed of the choices (0 or more).</param>
    public int Sample(string init, string? prompt = null, int[]? promptIds = null, int tokens = 256, int num = 1,
        bool stopAtContext = false, bool quiet = false, float temperature = 0.8f, int topK = 50, float topP = 1,
        uint seed = 42) => Guard(global.Verbose, () => {
            Require(prompt == null || promptIds == null, "--prompt-ids", "no --prompt beside it", "both");
            var (file, config) = Checkpoints.Open(init);
            using var _ = file;
            file.Require(promptIds != null || config.V == Tokenizer.EndOfTextId + 1,
                "the tokenizer's vocabulary of 50257 (or --prompt-ids 1,2,3)", $"{config.V}");
            foreach (var id in promptIds ?? [])
                Require(id >= 0 && id < config.V, "--prompt-ids", $"ids from 0 to {config.V - 1}", id);
            var tokenizer = promptIds == null ? new Tokenizer() : null;
            var types = prompt == null && promptIds == null && !Console.IsInputRedirected;
            if (promptIds == null && !types && prompt is null or "\0-") {
                using var input = new StreamReader(Console.OpenStandardInput(), new UTF8Encoding(false, true));
                prompt = input.ReadToEnd();
                prompt = prompt.EndsWith('\n') ? prompt[..^1] : prompt;
            }
            using var device = Open();
            var model = new Model(config, device, Math.Min(num, IDevice.MostSequences), 1, Purpose.Generate,
                type: device is Cpu && file.Header[1] == 5 ? DataType.Bf16 : null);
            model.Load(file);
            var choice = new Choice(temperature, topK, topP, seed);
            var sampler = new Sampler(model, tokenizer, choice, num, tokens, stopAtContext, Console.Out);
            do {
                if (types)
                    Console.Error.Write("> ");
                if ((types ? Console.In.ReadLine() : prompt?.TrimStart('\0') ?? "") is not { } text)
                    break;
                var speed = sampler.Write(text, promptIds ?? [Tokenizer.EndOfTextId, .. tokenizer!.Encode(text)],
                    types ? DateTime.Now : Process.GetCurrentProcess().StartTime);
                if (!quiet)
                    Console.Error.WriteLine(speed);
            } while (types);
            if (types)
                Console.Error.WriteLine();
        });

    /// <summary>Measures a model's loss and perplexity on token shards, and its accuracy on multiple choices.
    /// Example: gpt2 eval -e log -j data</summary>
    /// <param name="init">-e, MODEL: A model: llm.c's .bin, .safetensors, or the folder of either or of a run.</param>
    /// <param name="valData">-j, Token shards, as in training. [data/*val_*.bin; not needed for --hellaswag]</param>
    /// <param name="valBatches">-m, Batches at most (0 or more); 0 for all.</param>
    /// <param name="batch">-b, Sequences in a batch (1 or more). [4]</param>
    /// <param name="seq">-t, Tokens in a sequence (1 to 131072). [the model's longest]</param>
    /// <param name="hellaswag">A multiple-choice file, such as hellaswag_val.bin.</param>
    /// <param name="gpus">HARDWARE: GPUs of this machine (1 or more). [all; those of mpirun, srun or torchrun]</param>
    /// <param name="timeout">Seconds that one GPU's process waits for another's (1 to 1000000).</param>
    public int Eval(string init, string? valData = null, int valBatches = 0, int? batch = null, int? seq = null,
        string? hellaswag = null, int? gpus = null, int timeout = 600) =>
        OnEachGpu(gpus, timeout, (device, ranks) => {
            var (file, config) = Checkpoints.Open(init);
            using var _ = file;
            var (B, T) = Sizes(device, batch, seq, (4, config.MaxT), (4, config.MaxT), ranks.Size);
            Require(T <= config.MaxT, "--seq", $"1 to {config.MaxT}, the model's longest sequence", T);
            var questions = hellaswag == null ? [] : MultipleChoice.Read(hellaswag, config.V).ToArray();
            var longest = questions.Max(question => question.Rows.Max(row => (int?)row.Length)) ?? 0;
            var advice = longest <= config.MaxT ? $"or --seq {longest}" : "the model's longest sequence";
            Require(longest <= T, hellaswag!, $"examples of at most {T} tokens ({advice})", longest);
            var pattern = Shards(valData ?? "data/*val_*.bin", "val");
            using var shards = valData == null && questions.Length > 0 && Files.Glob(pattern).Length == 0 ? null
                : new TokenShards(pattern, config.V);
            var rows = shards?.Rows(T, B * ranks.Size, valBatches) ?? [];
            var model = new Model(config, device, B, T, Purpose.Evaluate);
            model.Load(file);
            var output = ranks.Rank == 0 ? Console.Out : TextWriter.Null;
            if (shards != null) {
                var loss = Evaluation.Loss(model, shards, rows, ranks);
                if (!double.IsFinite(loss))
                    throw new Gpt2Exception($"{init}: expected weights with a finite loss, found loss {loss}");
                output.WriteLine($"loss {loss:F6} | perplexity {Math.Exp(loss):F3} | {(long)rows.Length * T} tokens");
            }
            if (questions.Length > 0) {
                var accuracy = Evaluation.Accuracy(model, questions, ranks);
                output.WriteLine($"accuracy {accuracy:F4} | {questions.Length} examples");
            }
        });

    /// <summary>Writes a model as a folder for Hugging Face's transformers, or as a file of llm.c's format.
    /// Example: gpt2 export -e log -o my-gpt2</summary>
    /// <param name="init">-e, FILES: A model: llm.c's .bin, .safetensors, or the folder of either or of a run.</param>
    /// <param name="out">-o, The folder to write; a name that ends in .bin is llm.c's file.</param>
    /// <param name="type">Type of the weights: fp32, bf16 or fp16. [the model's]</param>
    public int Export(string init, string @out, StoredType? type = null) => Guard(global.Verbose, () => {
        var (file, config) = Checkpoints.Open(init);
        using var _ = file;
        var own = Safetensors.TypeOf(file);
        var (isFile, isHalf) = (@out.EndsWith(".bin"), (type ?? own) == StoredType.Bf16);
        Require(type != StoredType.Fp16 || !isFile, "--type", "fp32 or bf16 for a .bin", "fp16");
        if (isFile)
            Safetensors.ExportFile(@out, file, config, isHalf ? DataType.Bf16 : DataType.Fp32);
        else
            Safetensors.ExportFolder(@out, file, config, type ?? own);
        if (!isFile && config.V != Tokenizer.EndOfTextId + 1)
            Console.Error.WriteLine($"gpt2: {@out} has no tokenizer: the vocabulary is {config.V}, not GPT-2's");
    });

    /// <summary>Encodes documents as token shards PREFIX_val_000000.bin and PREFIX_train_000001.bin, ...
    /// Example: gpt2 tokenize -o data/my --val-tokens 20000 my.txt</summary>
    /// <param name="out">-o, SHARDS: Prefix of the shards' names.</param>
    /// <param name="valTokens">First tokens to hold out for validation (0 to 100000000).</param>
    /// <param name="shardTokens">Most tokens in a shard for training (1 to 1000000000).</param>
    /// <param name="field">TEXTS: Field of JSON lines, or column of Parquet, that has a document's text.</param>
    /// <param name="lossy">Put U+FFFD in place of bytes that are not UTF-8.</param>
    /// <param name="files">FILE: Texts in UTF-8, in which &lt;|endoftext|&gt; divides documents; .jsonl and .parquet,
    /// with a document a line or row; .gz and .zst of text and .jsonl; folders, for their .txt, .jsonl and .parquet; -
    /// for a text on standard input. A document that is null or white space is left out.</param>
    public int Tokenize(string @out, int valTokens = 0, int shardTokens = Tokenizer.ShardTokens, string field = "text",
        bool lossy = false, [Argument] params string[] files) =>
        Guard(global.Verbose, () => {
            Require(files.Length > 0, "FILE", "one file or more", "none");
            var paths = Documents.Find(files);
            var (total, done) = (paths.Where(File.Exists).Sum(file => new FileInfo(file).Length), 0L);
            var (begin, shown) = (Stopwatch.GetTimestamp(), TimeSpan.FromSeconds(-1));
            var (tokens, shards) = new Tokenizer().WriteShards(@out, valTokens, paths, lossy, (file, bytes) => {
                done += bytes ?? 0;
                if (bytes == null)
                    Console.Error.WriteLine($"gpt2: {file}: no text for 5 seconds, waiting");
                else if (Stopwatch.GetElapsedTime(begin) is var now && now - shown > TimeSpan.FromSeconds(0.1))
                    Show(shown = now);
            }, field, shardTokens);
            if (!Console.IsErrorRedirected) {
                Show(Stopwatch.GetElapsedTime(begin));
                Console.Error.WriteLine();
            }
            Console.Error.WriteLine($"{tokens} tokens: {valTokens} for validation, the others in {shards} shards");

            void Show(TimeSpan time) {
                var part = total == 0 ? 0 : Math.Min(1, (double)done / total);
                var left = part == 0 ? "" : $" | {Terminal.Time(time * (1 / part - 1))} left";
                if (!Console.IsErrorRedirected)
                    Console.Error.Write($"\r{new string('#', (int)(24 * part)),-24} {done >> 20} MiB | " +
                        $"{done / 1e6 / Math.Max(1e-3, time.TotalSeconds):F1} MB/s{left}\e[K");
            }
        });

    /// <summary>Compares logits, loss and gradients with a PyTorch debug state; exit status 1 if they differ.
    /// Example: gpt2 verify -e model.bin --state state.bin</summary>
    /// <param name="init">-e, FILES: A model: llm.c's .bin, .safetensors, or the folder of either or of a run.</param>
    /// <param name="state">The debug state that PyTorch wrote for it.</param>
    public int Verify(string init, string state) => Guard(global.Verbose, () => {
        using var device = Open();
        var good = true;
        Console.WriteLine($"{"tensor",-12}{"largest",12}{"relative",12}");
        foreach (var (name, largest, relative) in Verification.Run(init, state, device)) {
            var ok = relative < Verification.Tolerance(device.Precision);
            good &= ok;
            Console.WriteLine($"{name,-12}{largest,12:0.00e+00}{relative,12:0.00e+00}  {(ok ? "ok" : "DIFFERS")}");
        }
        return good ? 0 : 1;
    });

    /// <summary>Says what a model, a training state, a token shard, a run or a folder of these is.
    /// Example: gpt2 info log</summary>
    /// <param name="paths">FILE: Files or folders.</param>
    public int Info([Argument] params string[] paths) => Guard(global.Verbose, () => {
        Require(paths.Length > 0, "FILE", "one file or folder, or more", "none");
        foreach (var (name, text) in paths.SelectMany(path => Gpt2.Info.Of(path).Prepend(("", path))))
            Console.Out.WriteLine(name == "" ? text : $"{name,-8}{Terminal.Wrap(text, 8, Terminal.Width)}");
    });

    /// <summary>Draws the losses of one run or more over one another, as an SVG.
    /// Example: gpt2 plot log -o log.svg</summary>
    /// <param name="out">-o, PICTURE: The file to write.</param>
    /// <param name="runs">RUN: Runs' folders; a run of llm.c's will do.</param>
    public int Plot(string @out = "plot.svg", [Argument] params string[] runs) => Guard(global.Verbose, () => {
        Require(runs.Length > 0, "RUN", "one run or more", "none");
        Files.Write(@out, Picture.Draw([.. runs.Select(run => new RunLog(run).Begun())]));
    });

    /// <summary>Prints a script that lets a shell complete commands and options.
    /// Example: source &lt;(gpt2 completion bash)</summary>
    /// <param name="shell">SHELL: bash, zsh or fish.</param>
    public int Completion([Argument] string shell = "") =>
        Guard(global.Verbose, () => Console.Out.Write(Help.Completion(shell)));

    /// <summary>Times training by operation, beside the device's measured peak.
    /// Example: gpt2 bench -e d12 -b 16</summary>
    /// <param name="init">-e, MODEL: A model's file or folder, or random: d6, d12, d24, d36, d48.</param>
    /// <param name="batch">-b, Sequences in a batch (1 or more). [64; CPU: 4]</param>
    /// <param name="seq">-t, Tokens in a sequence (1 to 131072). [1024; CPU: 64]</param>
    /// <param name="totalBatch">-d, Tokens in an update (1 or more): n x batch x seq. [524288; CPU: n = 1]</param>
    /// <param name="optimizer">As in training: adamw or muon.</param>
    /// <param name="steps">-x, MEASURE: Steps (1 or more), of which the median counts.</param>
    /// <param name="decode">Time generation instead of training; takes --init alone.</param>
    /// <param name="recompute">-r, HARDWARE: As in training (0 to 2).</param>
    /// <param name="portable">Do without the instructions that only Hopper GPUs have.</param>
    public int Bench(string init = "d12", int? batch = null, int? seq = null, int? totalBatch = null,
        OptimizerKind optimizer = OptimizerKind.AdamW, int steps = 5, bool decode = false, int recompute = 0,
        bool portable = false) =>
        Guard(global.Verbose, () => {
            Require(!decode || (batch ?? seq ?? totalBatch, optimizer, steps, recompute) == (null, default, 5, 0),
                "--decode", "--init alone beside it", "options of training");
            using var device = Open(portable);
            if (decode) {
                Benchmark.Decode(init, device, Console.Out);
                return;
            }
            var (B, T) = Sizes(device, batch, seq, (64, 1024), (4, 64));
            totalBatch ??= device is Cpu ? B * T : 524_288;
            Benchmark.Run(init, B, T, totalBatch.Value, steps, recompute, optimizer, device, Console.Out);
        });

    /// <summary>Runs an action on the device asked for: on several GPUs, in one process each.</summary>
    int OnEachGpu(int? gpus, int timeout, Action<IDevice, ICollective> action) {
        Job? job = null;
        return Guard(global.Verbose, () => {
            job = Job.OfEnvironment(gpus, global.Device);
            if (job == null && Job.Gpus(gpus, global.Device) is > 1 and var count)
                return Job.Start(count).Result;
            var patience = TimeSpan.FromSeconds(timeout);
            var peers = job?.Meet(patience);
            using var device = Open(rank: job?.LocalRank ?? 0);
            using ICollective ranks = peers == null ? new Alone()
                : device is Cuda cuda ? new Nccl(cuda, peers, patience)
                : throw new Gpt2Exception($"--device: expected a GPU for each of {peers.Size} ranks, found a CPU");
            action(device, ranks);
            peers?.Leave();
            return 0;
        }, () => job is { Rank: > 0 } ? $"rank {job.Rank}: " : "");
    }

    /// <summary>Opens the device asked for: a GPU in bf16 by default, the CPU always in fp32.</summary>
    IDevice Open(bool portable = false, int rank = 0) {
        var (device, precision, verbose) = global;
        var obstacle = device == DeviceKind.Auto ? Cuda.Obstacle : null;
        if (device != DeviceKind.Cpu && obstacle == null)
            // Modulo, because some launchers show each rank its own GPU alone.
            return new Cuda(precision ?? DataType.Bf16, portable, verbose, rank == 0 ? 0 : rank % Cuda.Count());
        if (obstacle is not (null or ""))
            Console.Error.WriteLine($"gpt2: using the CPU although there is a GPU: {obstacle}");
        Require(precision != DataType.Bf16, "--precision", "fp32 on the CPU", "bf16");
        return new Cpu();
    }

    /// <summary>The batch size and sequence length asked for, or the device's defaults.</summary>
    static (int B, int T) Sizes(
        IDevice device, int? batch, int? seq, (int B, int T) gpu, (int B, int T) cpu, int ranks = 1) {
        var (B, T) = device is Cpu ? cpu : gpu;
        (B, T) = (batch ?? B, seq ?? T);
        var most = int.MaxValue / ranks / T;
        Require(B <= most, "--batch", $"at most {most} sequences of {T} tokens, fewer than 2^31 together", B);
        return (B, T);
    }

    /// <summary>The glob pattern of a split's token shards; a folder stands for the shards in it.</summary>
    static string Shards(string data, string split) =>
        Directory.Exists(data) ? Path.Combine(data, $"*{split}*.bin") : data;
}

/// <summary>The process's standard streams and limits.</summary>
internal static partial class Standard {
    /// <summary>Makes up for what .NET leaves undone.</summary>
    /// <param name="endsWithReader">Ends the process silently when the reader of its output goes away.</param>
    public static void Prepare(bool endsWithReader) {
        const int readWrite = 2, brokenPipe = 13, childEnded = 17, stack = 3, openFiles = 7, addresses = 9;
        // Below these limits .NET fails where no exception can be caught.
        foreach (var (resource, least, option) in ((int, ulong, string)[])
            [(stack, 2 << 20, "-s (bytes of stack)"), (openFiles, 32, "-n"), (addresses, 1 << 30, "-v (bytes)")]) {
            var limits = new ulong[2]; // soft, hard
            if (getrlimit(resource, limits) == 0 && limits[0] < least) {
                _ = dprintf(2, $"gpt2: ulimit {option}: expected {least} or more, found {limits[0]}\n");
                Environment.Exit(1);
            }
        }
        // The next file to be opened would become a standard stream that is closed.
        while (open("/dev/null"u8, readWrite) is >= 0 and < 3) { }
        // Console, when it starts, switches the keypad of a terminal that it knows to another mode for good.
        var term = Environment.GetEnvironmentVariable("TERM");
        Environment.SetEnvironmentVariable("TERM", null);
        _ = Console.WindowWidth;
        Environment.SetEnvironmentVariable("TERM", term);
        Console.SetOut(new Writer(Console.Out, e => throw new Gpt2Exception(
            $"standard output: expected to write there, found: {(e is IOException ? e.Message : "it is closed")}")));
        Console.SetError(new Writer(Console.Error, _ => { })); // there is nowhere left to report it
        if (endsWithReader)
            _ = signal(brokenPipe, 0);
        _ = signal(childEnded, 0); // where a parent had us ignore it, Process would wait for ever
    }

    /// <summary>Calls back when writing fails.</summary>
    sealed class Writer(TextWriter to, Action<Exception> failed) : TextWriter {
        public override Encoding Encoding => to.Encoding;
        public override void Write(char value) => Write($"{value}");
        public override void WriteLine(string? value) => Write(value + "\n");
        public override void Write(string? value) {
            try {
                to.Write(value);
            } catch (Exception e) when (e is IOException or UnauthorizedAccessException) {
                failed(e);
            }
        }
    }

    [LibraryImport("libc")] private static partial int open(ReadOnlySpan<byte> path, int flags);
    [LibraryImport("libc", StringMarshalling = StringMarshalling.Utf8)]
    private static partial int dprintf(int handle, string text); // a text without %
    [LibraryImport("libc")] private static partial int getrlimit(int resource, Span<ulong> limits);
    [LibraryImport("libc")] private static partial nint signal(int number, nint handler);
}
