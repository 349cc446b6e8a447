using ConsoleAppFramework;
using Gpt2;
using Microsoft.Extensions.Logging;
using Microsoft.Extensions.Logging.Abstractions;
using ZLogger;
using static Gpt2.Gpt2Exception;

// Help alone is a success; help for want of something required is not.
var misused = args is ["sample" or "eval" or "tokenize" or "verify"];
ConsoleApp.LogError = message => {
    misused = true;
    Console.Error.WriteLine($"gpt2: {message}");
};
var app = ConsoleApp.Create();
app.Add<Commands>();
string[] known = ["train", "sample", "eval", "tokenize", "verify", "bench", "-h", "--help", "--version"];
if (args.Contains("--"))
    ConsoleApp.LogError("expected options, found '--'");
else if (args.Length == 0 || known.Contains(args[0]))
    app.Run(args);
else
    ConsoleApp.LogError($"expected a command (gpt2 --help lists them), found '{args[0]}'");
return misused ? 2 : Environment.ExitCode;

/// <summary>The commands; each one's comment is its help.</summary>
internal sealed class Commands {
    /// <summary>Trains GPT-2 from scratch or from a checkpoint, on token shards.</summary>
    /// <param name="trainData">-i, Token shards to train on; * and ? match in file names.</param>
    /// <param name="valData">-j, Token shards to validate on.</param>
    /// <param name="init">-e, A model file, or d6, d12, d24, d36 or d48 for random weights. [d12; d6 on a CPU]</param>
    /// <param name="out">-o, Folder for checkpoints, main.log and loss.svg.</param>
    /// <param name="batch">-b, Sequences in a batch. [16; 4 on a CPU]</param>
    /// <param name="seq">-t, Tokens in a sequence. [1024; 128 on a CPU]</param>
    /// <param name="totalBatch">-d, Tokens in an update, a multiple of batch x seq x GPUs. [one batch on each]</param>
    /// <param name="maxSteps">-x, Updates in all.</param>
    /// <param name="lr">-l, Highest learning rate.</param>
    /// <param name="warmup">-u, Updates until the highest learning rate.</param>
    /// <param name="finalLrFrac">-q, Last learning rate as a fraction of the highest.</param>
    /// <param name="weightDecay">-c, Weight decay of the matrices.</param>
    /// <param name="schedule">-k, How the learning rate goes down: cosine, linear, constant or wsd.</param>
    /// <param name="valEvery">-v, Updates between validations; 0 for one at the end.</param>
    /// <param name="valBatches">-m, Batches in a validation.</param>
    /// <param name="sampleEvery">-s, Updates between samples of text; 0 for one at the end.</param>
    /// <param name="genTokens">-g, Tokens in a sample.</param>
    /// <param name="checkpointEvery">-n, Updates between checkpoints; 0 for one at the end.</param>
    /// <param name="keep">Newest checkpoints to keep.</param>
    /// <param name="resume">-y, Go on from the last checkpoint in the output folder.</param>
    /// <param name="recompute">-r, Less memory, more work: 1 recomputes GELU, 2 layer norms too.</param>
    /// <param name="overfit">-a, Train on the first batches alone.</param>
    /// <param name="noShuffle">Take the data in order.</param>
    /// <param name="skipOutliers">Skip updates whose loss or norm is so many deviations above the last 128.</param>
    /// <param name="device">auto, cuda or cpu.</param>
    /// <param name="precision">Of weights and activations: bf16 or fp32. [bf16 on a GPU]</param>
    /// <param name="seed">Seed of weights, order and samples.</param>
    /// <param name="gpus">GPUs of this machine to train on. [all; those of mpirun, srun or torchrun]</param>
    /// <param name="zero">-z, Which ZeRO stage divides the optimizer's state among GPUs: 0 for none, or 1.</param>
    /// <param name="timeout">Seconds that one GPU's process waits for another's.</param>
    /// <param name="verbose">Show where an error came from; wait for the GPU after each operation, to name it.</param>
    public int Train(string trainData = "data/*train_*.bin", string valData = "data/*val_*.bin", string? init = null,
        string @out = "log", int? batch = null, int? seq = null, int totalBatch = 0, int maxSteps = 300,
        float lr = 1e-3f, int warmup = 20, float finalLrFrac = 0.1f, float weightDecay = 0.1f,
        Schedule schedule = Schedule.Cosine,
        int valEvery = 50, int valBatches = 20, int sampleEvery = 0, int genTokens = 64, int checkpointEvery = 200,
        int keep = 2, bool resume = false, int recompute = 0, bool overfit = false, bool noShuffle = false,
        float skipOutliers = 0, DeviceKind device = DeviceKind.Auto, DataType? precision = null, uint seed = 42,
        int? gpus = null, int zero = 1, int timeout = 600, bool verbose = false) =>
        OnEachGpu(gpus, timeout, device, precision, verbose, (computer, collective) => {
            using var logs = LoggerFactory.Create(logging => logging.AddZLoggerConsole(options =>
                options.LogToStandardErrorThreshold = LogLevel.Trace));
            var (B, T) = Sizes(computer, batch, seq, (16, 1024), (4, 128));
            totalBatch = totalBatch == 0 ? B * T * collective.Size : totalBatch;
            var options = new TrainOptions(trainData, valData, init, @out, B, T, totalBatch, maxSteps, lr,
                warmup, finalLrFrac, weightDecay, schedule, valEvery, valBatches, sampleEvery, genTokens,
                checkpointEvery, keep, resume, recompute, overfit, !noShuffle, seed, skipOutliers,
                computer is Cpu ? "d6" : "d12", zero);
            var isFirst = collective.Rank == 0;
            using var trainer = new Trainer(options, computer, isFirst ? Console.Out : TextWriter.Null,
                isFirst ? logs.CreateLogger("gpt2") : NullLogger.Instance, collective);
            trainer.Run();
        });

    /// <summary>Continues a text.</summary>
    /// <param name="init">-e, A model file.</param>
    /// <param name="prompt">-p, Text to continue.</param>
    /// <param name="promptIds">Token ids to continue, in place of a text: 1,2,3. Ids are printed then.</param>
    /// <param name="tokens">-n, Tokens to add at most.</param>
    /// <param name="temperature">Above 1 is wilder, below tamer; 0 always takes the likeliest token.</param>
    /// <param name="topK">--top-k, Choose among this many of the likeliest tokens; 0 for all.</param>
    /// <param name="topP">--top-p, Choose among the likeliest tokens of this probability together.</param>
    /// <param name="num">Samples.</param>
    /// <param name="seed">Seed of the choices.</param>
    /// <param name="device">auto, cuda or cpu.</param>
    /// <param name="precision">Of weights and activations: bf16 or fp32. [bf16 on a GPU]</param>
    /// <param name="verbose">Show where an error came from; wait for the GPU after each operation, to name it.</param>
    public int Sample(string init, string? prompt = null, int[]? promptIds = null, int tokens = 256,
        float temperature = 1, int topK = 0, float topP = 1, int num = 1, uint seed = 42,
        DeviceKind device = DeviceKind.Auto, DataType? precision = null, bool verbose = false) => Guard(verbose, () => {
            Require(tokens > 0, "--tokens", "1 or more", tokens);
            Require(temperature >= 0, "--temperature", "0 or more", temperature);
            Require(topK >= 0, "--top-k", "0 or more", topK);
            Require(topP is > 0 and <= 1, "--top-p", "more than 0, at most 1", topP);
            Require(num > 0, "--num", "1 or more", num);
            Require(prompt == null || promptIds == null, "--prompt-ids", "no --prompt beside it", "both");
            var (file, config) = Config.Open(init);
            using var _ = file;
            var isText = promptIds == null;
            if (isText && config.V != Tokenizer.EndOfTextId + 1)
                throw file.Fail("the tokenizer's vocabulary of 50257 (or --prompt-ids 1,2,3)", $"{config.V}");
            var tokenizer = isText ? new Tokenizer() : null;
            int[] ids = promptIds ?? [Tokenizer.EndOfTextId, .. tokenizer!.Encode(prompt ?? "")];
            var known = ids.All(id => id >= 0 && id < config.V);
            Require(known, "--prompt-ids", $"ids from 0 to {config.V - 1}", string.Join(',', ids));
            Require(ids.Length > 0 && ids.Length <= config.MaxT, "--prompt", $"1 to {config.MaxT} tokens", ids.Length);
            using var computer = Open(device, precision, verbose);
            var model = new Model(config, computer, 1, 1, Purpose.Generate);
            model.Load(file);
            var sampler = new Sampler(temperature, topK, topP, seed);
            for (var i = 0; i < num; i++) {
                var generated = model.Generate(ids, sampler).Take(tokens);
                if (i > 0)
                    Console.Out.Write("---\n");
                if (isText)
                    Print([prompt ?? ""], tokenizer!.Decode(generated.TakeWhile(Tokenizer.IsText)), "");
                else
                    Print(ids.Select(id => $"{id}"), generated.Select(id => $"{id}"), " ");
            }
            return 0;
        });

    /// <summary>Measures a model's loss and perplexity on token shards, and its accuracy on multiple choices.</summary>
    /// <param name="init">-e, A model file.</param>
    /// <param name="valData">-j, Token shards.</param>
    /// <param name="valBatches">-m, Batches at most; 0 for all.</param>
    /// <param name="batch">-b, Sequences in a batch.</param>
    /// <param name="seq">-t, Tokens in a sequence. [the model's longest]</param>
    /// <param name="hellaswag">A multiple-choice file, such as hellaswag_val.bin.</param>
    /// <param name="gpus">GPUs of this machine to use. [all; those of mpirun, srun or torchrun]</param>
    /// <param name="timeout">Seconds that one GPU's process waits for another's.</param>
    /// <param name="device">auto, cuda or cpu.</param>
    /// <param name="precision">Of weights and activations: bf16 or fp32. [bf16 on a GPU]</param>
    /// <param name="verbose">Show where an error came from; wait for the GPU after each operation, to name it.</param>
    public int Eval(string init, string valData = "data/*val_*.bin", int valBatches = 0, int batch = 4, int seq = 0,
        string? hellaswag = null, int? gpus = null, int timeout = 600, DeviceKind device = DeviceKind.Auto,
        DataType? precision = null, bool verbose = false) =>
        OnEachGpu(gpus, timeout, device, precision, verbose, (computer, ranks) => {
            var (file, config) = Config.Open(init);
            using var _ = file;
            Require(batch > 0, "--batch", "1 or more", batch);
            seq = seq == 0 ? config.MaxT : seq;
            Require(seq > 0 && seq <= config.MaxT, "--seq", $"1 to {config.MaxT}, the model's longest sequence", seq);
            Require(valBatches >= 0, "--val-batches", "0 or more", valBatches);
            using var loader = new TokenLoader(
                valData, batch, seq, config.V, shuffle: false, rank: ranks.Rank, ranks: ranks.Size);
            var questions = hellaswag == null ? [] : MultipleChoice.Read(hellaswag, config.V).ToArray();
            var model = new Model(config, computer, batch, seq, Purpose.Evaluate);
            model.Load(file);
            var batches = valBatches > 0 ? Math.Min(valBatches, loader.Batches) : loader.Batches;
            var loss = Trainer.Evaluate(model, loader, batches, ranks);
            var tokens = batches * loader.SampleTokens;
            var output = ranks.Rank == 0 ? Console.Out : TextWriter.Null;
            output.WriteLine($"loss {loss:F6} | perplexity {Math.Exp(loss):F3} | {tokens} tokens");
            if (questions.Length > 0) {
                var accuracy = Trainer.Evaluate(model, questions, ranks);
                output.WriteLine($"accuracy {accuracy:F4} | {questions.Length} examples");
            }
        });

    /// <summary>Encodes text files as token shards PREFIX_val_000000.bin and PREFIX_train_000001.bin, ...</summary>
    /// <param name="out">-o, Prefix of the shards' names.</param>
    /// <param name="valTokens">First tokens to hold out for validation.</param>
    /// <param name="lossy">Put U+FFFD in place of bytes that are not UTF-8.</param>
    /// <param name="verbose">Show where an error came from.</param>
    /// <param name="files">Text files in UTF-8, - for standard input; &lt;|endoftext|&gt; divides documents.</param>
    public int Tokenize(string @out, int valTokens = 0, bool lossy = false, bool verbose = false,
        [Argument] params string[] files) => Guard(verbose, () => {
            Require(files.Length > 0, "FILE", "one text file or more", "none");
            Require(valTokens is >= 0 and <= Tokenizer.ShardTokens, "--val-tokens", "0 to 100000000", valTokens);
            var total = files.Where(File.Exists).Sum(file => new FileInfo(file).Length);
            var done = 0L;
            var (tokens, shards) = new Tokenizer().WriteShards(@out, valTokens, files, lossy, (file, bytes) => {
                done += bytes ?? 0;
                var bar = new string('#', (int)Math.Min(40, 40 * done / Math.Max(1, total)));
                if (bytes == null)
                    Console.Error.WriteLine($"gpt2: {file}: no text for 5 seconds, waiting");
                else if (!Console.IsErrorRedirected)
                    Console.Error.Write($"\r{(total > 0 ? bar : ""),-40} {done >> 20} MiB");
            });
            if (!Console.IsErrorRedirected)
                Console.Error.WriteLine();
            Console.Error.WriteLine($"{tokens} tokens: {valTokens} for validation, the others in {shards} shards");
            return 0;
        });

    /// <summary>Compares logits, loss and gradients with a PyTorch debug state; exit status 1 if they differ.</summary>
    /// <param name="init">-e, A model file.</param>
    /// <param name="state">The debug state that PyTorch wrote for it.</param>
    /// <param name="device">auto, cuda or cpu.</param>
    /// <param name="precision">Of weights and activations: bf16 or fp32. [bf16 on a GPU]</param>
    /// <param name="verbose">Show where an error came from; wait for the GPU after each operation, to name it.</param>
    public int Verify(string init, string state, DeviceKind device = DeviceKind.Auto, DataType? precision = null,
        bool verbose = false) => Guard(verbose, () => {
            using var computer = Open(device, precision, verbose);
            var good = true;
            Console.WriteLine($"{"tensor",-12}{"largest",12}{"relative",12}");
            foreach (var (name, largest, relative) in Verification.Run(init, state, computer)) {
                var ok = relative < Verification.Tolerance(computer.Precision);
                good &= ok;
                Console.WriteLine($"{name,-12}{largest,12:0.00e+00}{relative,12:0.00e+00}  {(ok ? "ok" : "DIFFERS")}");
            }
            return good ? 0 : 1;
        });

    /// <summary>Times training by operation, beside the device's measured peak.</summary>
    /// <param name="init">-e, A model file or descriptor.</param>
    /// <param name="batch">-b, Sequences in a batch. [64; 4 on a CPU]</param>
    /// <param name="seq">-t, Tokens in a sequence. [1024; 64 on a CPU]</param>
    /// <param name="totalBatch">-d, Tokens in an update, a multiple of batch x seq. [524288; one batch on CPU]</param>
    /// <param name="steps">-x, Steps, of which the median counts.</param>
    /// <param name="recompute">-r, As in training.</param>
    /// <param name="portable">Do without the instructions that only Hopper GPUs have.</param>
    /// <param name="device">auto, cuda or cpu.</param>
    /// <param name="precision">Of weights and activations: bf16 or fp32. [bf16 on a GPU]</param>
    /// <param name="verbose">Show where an error came from; wait for the GPU after each operation, to name it.</param>
    public int Bench(string init = "d12", int? batch = null, int? seq = null, int? totalBatch = null, int steps = 5,
        int recompute = 0, bool portable = false, DeviceKind device = DeviceKind.Auto, DataType? precision = null,
        bool verbose = false) => Guard(verbose, () => {
            Require(steps > 0, "--steps", "1 or more", steps);
            using var computer = Open(device, precision, verbose, portable);
            var (B, T) = Sizes(computer, batch, seq, (64, 1024), (4, 64));
            totalBatch ??= computer is Cpu ? B * T : 524_288;
            Benchmark.Run(init, B, T, totalBatch.Value, steps, recompute, computer, Console.Out);
            return 0;
        });

    /// <summary>Does something on every GPU, in a process each, or on the device asked for.</summary>
    static int OnEachGpu(int? gpus, int timeout, DeviceKind device, DataType? precision, bool verbose,
        Action<IDevice, ICollective> action) {
        Job? job = null;
        return Guard(verbose, () => {
            Require(timeout is > 0 and <= 1_000_000, "--timeout", "1 to 1000000 seconds", timeout);
            job = Job.OfEnvironment();
            if (job == null && Job.Gpus(gpus, device) is > 1 and var ranks)
                return Job.Start(ranks);
            var patience = TimeSpan.FromSeconds(timeout);
            var others = job?.Meet(patience);
            using var computer = Open(device, precision, verbose, rank: job?.LocalRank ?? 0);
            using ICollective collective = others == null ? new Alone()
                : computer is Cuda cuda ? new Nccl(cuda, others, patience)
                : throw new Gpt2Exception($"--device: expected a GPU for each of {others.Size} ranks, found a CPU");
            action(computer, collective);
            others?.Leave();
            return 0;
        }, () => job is { Rank: > 0 } ? $"rank {job.Rank}: " : "");
    }

    /// <summary>The device asked for; bf16 unless said otherwise on a GPU, and fp32 on the CPU.</summary>
    static IDevice Open(
        DeviceKind device, DataType? precision, bool verbose, bool portable = false, int rank = 0) {
        Require(Enum.IsDefined(device), "--device", "auto, cuda or cpu", device);
        Require(precision == null || Enum.IsDefined(precision.Value), "--precision", "bf16 or fp32", precision!);
        if (device == DeviceKind.Cuda || device == DeviceKind.Auto && Cuda.IsAvailable)
            // Where the launcher shows each rank its own GPU alone, every rank has the first.
            return new Cuda(precision ?? DataType.Bf16, portable, verbose, rank == 0 ? 0 : rank % Cuda.Count());
        Require(precision != DataType.Bf16, "--precision", "fp32 on the CPU", "bf16");
        return new Cpu();
    }

    /// <summary>The batch and sequence asked for, or what suits the device.</summary>
    static (int B, int T) Sizes(IDevice device, int? batch, int? seq, (int B, int T) gpu, (int B, int T) cpu) {
        var (B, T) = device is Cpu ? cpu : gpu;
        (B, T) = (batch ?? B, seq ?? T);
        Require(B > 0, "--batch", "1 or more", B);
        Require(B <= int.MaxValue / Math.Max(1, T), "--batch", "less than 2^31 tokens together", B);
        return (B, T);
    }

    /// <summary>Streams a prompt and what follows, ended by a new line.</summary>
    static void Print(IEnumerable<string> prompt, IEnumerable<string> generated, string separator) {
        var first = true;
        foreach (var part in prompt.Concat(generated)) {
            Console.Out.Write(first ? part : separator + part);
            Console.Out.Flush();
            first = false;
        }
        Console.Out.WriteLine();
    }

    /// <summary>The one place that turns errors into a sentence and an exit status.</summary>
    /// <param name="speaker">Whose error it is, where there are several.</param>
    static int Guard(bool verbose, Func<int> command, Func<string>? speaker = null) {
        try {
            return command();
        } catch (Exception e) {
            e = (e as AggregateException)?.InnerException ?? e;
            var who = e.Message.StartsWith("rank ") ? "" : speaker?.Invoke();
            Console.Error.WriteLine($"gpt2: {who}{(verbose ? e : e.Message)}");
            return (e as Gpt2Exception)?.ExitCode ?? 1;
        }
    }
}
