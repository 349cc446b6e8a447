using System.Diagnostics;
using System.Globalization;
using System.Runtime.InteropServices;
using System.Text;
using Microsoft.Extensions.Logging;
using ZLogger;

namespace Gpt2;

/// <summary>How the learning rate goes down after its warm-up.</summary>
public enum Schedule { Cosine, Linear, Constant, Wsd }

/// <summary>What `gpt2 train` was asked to do; the command's help explains each field. An empty Init takes the checkpoint's
/// model, or the device's default.</summary>
public sealed record TrainOptions(
    string TrainData, string ValData, string? Init, string Out, int B, int T, int TotalBatch, int MaxSteps,
    float LearningRate, int Warmup, float FinalFraction, float WeightDecay, Schedule Schedule, int ValEvery, int ValBatches,
    int SampleEvery, int GenTokens, int CheckpointEvery, int Keep, bool Resume, int Recompute, bool Overfit, bool Shuffle,
    uint Seed) {
    /// <summary>Passes over B·T tokens whose gradients make one update.</summary>
    public int MicroSteps => TotalBatch / (B * T);

    /// <summary>The learning rate of the update that follows <paramref name="step"/> others.</summary>
    public float LearningRateAt(int step) {
        if (step < Warmup)
            return LearningRate * (step + 1) / Warmup;
        var done = Math.Min(1, (float)(step - Warmup) / Math.Max(1, MaxSteps - Warmup));
        var floor = LearningRate * FinalFraction;
        const float held = 0.8f;
        return Schedule switch {
            Schedule.Cosine => floor + 0.5f * (1 + MathF.Cos(MathF.PI * done)) * (LearningRate - floor),
            Schedule.Linear => LearningRate - done * (LearningRate - floor),
            Schedule.Wsd when step > held * MaxSteps =>
                floor + (1 - MathF.Sqrt((step / (float)MaxSteps - held) / (1 - held))) * (LearningRate - floor),
            _ => LearningRate,
        };
    }

    /// <exception cref="Gpt2Exception">The numbers do not fit together.</exception>
    public void Check(Config config) {
        Require(B > 0, "--batch", "1 or more", B);
        Require(T > 0 && T <= config.MaxT, "--seq", $"1 to {config.MaxT}, the model's longest sequence", T);
        Require(TotalBatch > 0 && TotalBatch % ((long)B * T) == 0, "--total-batch", $"a multiple of {B} x {T} tokens", TotalBatch);
        Require(MaxSteps > 0, "--max-steps", "1 or more", MaxSteps);
        Require(LearningRate > 0, "--lr", "more than 0", LearningRate);
        Require(Warmup >= 0, "--warmup", "0 or more", Warmup);
        Require(FinalFraction is >= 0 and <= 1, "--final-lr-frac", "0 to 1", FinalFraction);
        Require(WeightDecay >= 0, "--weight-decay", "0 or more", WeightDecay);
        Require(ValBatches > 0, "--val-batches", "1 or more", ValBatches);
        Require(Recompute is >= 0 and <= 2, "--recompute", "0, 1 or 2", Recompute);
        Require(Keep > 0, "--keep", "1 or more", Keep);

        static void Require(bool right, string option, string expected, object found) {
            if (!right)
                throw new Gpt2Exception(
                    string.Create(CultureInfo.InvariantCulture, $"{option}: expected {expected}, found {found}"), usage: true);
        }
    }
}

/// <summary>The training loop: accumulation, clipping, AdamW, validation, samples, checkpoints and logs.</summary>
public sealed class Trainer : IDisposable {
    readonly TrainOptions options;
    readonly ILogger log;
    readonly TextWriter output;
    readonly IDevice device;
    readonly Model model;
    readonly Parameters m, v;
    readonly TokenLoader train, val;
    readonly Checkpoints checkpoints;
    readonly RunLog runLog;
    readonly int[] inputs, targets;
    readonly float[] losses;
    readonly int firstStep;

    /// <summary>Opens the data, takes up a checkpoint or makes a new model, and says so.</summary>
    /// <param name="output">Takes the step lines and samples.</param>
    public Trainer(TrainOptions options, IDevice device, TextWriter output, ILogger log) {
        (this.options, this.device, this.output, this.log) = (options, device, output, log);
        checkpoints = new Checkpoints(options.Out);
        firstStep = checkpoints.Last ?? 0;
        if (!options.Resume && checkpoints.HasRun)
            throw new Gpt2Exception($"{options.Out}: expected no run in this folder, or --resume, found one of " +
                (checkpoints.Last is { } step ? $"step {step}" : "no complete checkpoint"));
        if (options.Resume && checkpoints.Last == null)
            log.ZLogInformation($"{options.Out} holds no complete checkpoint to resume: starting from step 0");
        var (file, config) = OpenModel();
        options.Check(config);
        train = new TokenLoader(options.TrainData, options.B, options.T, config.V, options.Shuffle && !options.Overfit, options.Seed);
        val = new TokenLoader(options.ValData, options.B, options.T, config.V, shuffle: false);
        model = new Model(config, device, options.B, options.T, Purpose.Train, options.Recompute);
        m = new Parameters(config, model.Allocate("first moments", config.ParameterCount * sizeof(float)));
        v = new Parameters(config, model.Allocate("second moments", config.ParameterCount * sizeof(float)));
        if (file == null)
            model.Initialize(options.Seed);
        else
            model.Load(file);
        if (checkpoints.Last != null)
            checkpoints.LoadState(firstStep, model, m, v, train);
        runLog = new RunLog(options.Out, firstStep);
        (inputs, targets) = (new int[options.B * options.T], new int[options.B * options.T]);
        losses = new float[options.B * options.T];
        Describe();
    }

    (BinaryFile? File, Config Config) OpenModel() {
        if (checkpoints.Last is not { } step)
            return Open(options.Init ?? "d6");
        checkpoints.Verify(step);
        var (file, config) = Config.Open(checkpoints.ModelPath(step));
        if (options.Init != null) {
            var (init, asked) = Open(options.Init);
            init?.Dispose();
            if (asked != config)
                throw file.Fail($"the model of --init {options.Init} ({asked.Summary})", config.Summary);
        }
        return (file, config);
    }

    /// <summary>The model that a descriptor or a checkpoint's path stands for; the file is null for a descriptor.</summary>
    public static (BinaryFile? File, Config Config) Open(string init) {
        if (Config.Of(init) is { } config)
            return (null, config);
        if (!init.Contains('/') && !init.Contains('.') && !File.Exists(init))
            throw new Gpt2Exception($"--init: expected a model file or one of d6, d12, d24, d36 and d48, found {init}", usage: true);
        return Config.Open(init);
    }

    void Describe() {
        var (config, o) = (model.Config, options);
        log.ZLogInformation($"model   {config.Summary}, {config.ParameterCount / 1e6:F1} M parameters");
        log.ZLogInformation($"data    {o.TrainData}: {train.Tokens / 1e6:F2} M tokens; {o.ValData}: {val.Tokens / 1e6:F2} M tokens");
        log.ZLogInformation($"batch   {o.B} x {o.T} tokens x {o.MicroSteps} micro-steps = {o.TotalBatch} tokens a step; ");
        log.ZLogInformation($"        steps {firstStep} to {o.MaxSteps}, {(double)o.MaxSteps * o.MicroSteps / train.Batches:F2} epochs");
        log.ZLogInformation($"device  {device.Name}");
        foreach (var (name, bytes) in model.Memory)
            log.ZLogInformation($"memory  {name,-16}{bytes / 1e6,9:F1} MB");
        log.ZLogInformation($"        {"together",-16}{model.Memory.Sum(part => part.Bytes) / 1e6,9:F1} MB");
    }

    /// <summary>Trains to the last step, or until a signal, and leaves a checkpoint.</summary>
    public void Run() {
        var stop = false;
        void Stop(PosixSignalContext signal) {
            // The first signal ends the run after this step; a second one ends the process as usual.
            signal.Cancel = !stop;
            stop = true;
        }
        using var terminate = PosixSignalRegistration.Create(PosixSignal.SIGTERM, Stop);
        using var interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, Stop);
        var peak = device.PeakFlops();
        var live = !Console.IsOutputRedirected;
        var flops = model.Config.FlopsPerToken(options.T);
        if (firstStep == 0 && options.ValEvery > 0)
            Validate(0);
        var begin = Stopwatch.GetTimestamp();
        for (var step = firstStep; step < options.MaxSteps; ) {
            var start = Stopwatch.GetTimestamp();
            var (loss, norm) = Step(step);
            var seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
            var rate = options.LearningRateAt(step);
            runLog.Train(step, loss, rate, norm);
            step++;
            var speed = options.TotalBatch / seconds;
            output.WriteLine(string.Create(CultureInfo.InvariantCulture,
                $"{(live ? "\r\e[K" : "")}step {step,4}/{options.MaxSteps} | loss {loss:F6} | norm {norm:F4} | lr {rate:0.00e+00} | " +
                $"{seconds * 1e3:F2} ms | {speed * flops / peak:0.0%} MFU | {speed:F0} tok/s"));
            var last = step == options.MaxSteps || stop;
            if (last || Every(options.ValEvery, step))
                Validate(step);
            if (step == options.MaxSteps || Every(options.SampleEvery, step))
                Sample();
            if (last || Every(options.CheckpointEvery, step))
                checkpoints.Save(step, model, m, v, train, options.Shuffle && !options.Overfit, options.Keep);
            if (stop && step < options.MaxSteps) {
                log.ZLogInformation($"stopped by a signal after step {step}; --resume goes on from there");
                break;
            }
            if (live) {
                var left = Stopwatch.GetElapsedTime(begin) / (step - firstStep) * (options.MaxSteps - step);
                output.Write($"{100.0 * step / options.MaxSteps:F1}% | loss {loss:F3} | {speed:F0} tok/s | {left:hh\\:mm\\:ss} left");
            }
        }
    }

    static bool Every(int period, int step) => period > 0 && step % period == 0;

    /// <summary>One update: the mean loss and the gradient's norm before clipping.</summary>
    (float Loss, float Norm) Step(int step) {
        if (options.Overfit)
            train.Reset();
        var loss = 0.0;
        for (var micro = 0; micro < options.MicroSteps; micro++) {
            train.Next(inputs, targets);
            model.Forward(inputs);
            model.Loss(targets, losses, 1f / options.TotalBatch);
            loss += Mean(losses) / options.MicroSteps;
            model.Backward(inputs);
        }
        var norm = Update(model, m, v, step + 1, options.LearningRateAt(step), options.WeightDecay, loss);
        return ((float)loss, norm);
    }

    /// <summary>Clips the gradients to norm 1 and updates the weights with AdamW.</summary>
    /// <returns>The gradients' norm before clipping.</returns>
    /// <exception cref="Gpt2Exception">The loss or the norm is not finite; nothing was updated.</exception>
    public static float Update(Model model, Parameters m, Parameters v, int number, float rate, float decay, double loss = 0) {
        var norm = (float)Math.Sqrt(model.Device.SumOfSquares(model.Gradients!.All));
        if (!double.IsFinite(loss) || !float.IsFinite(norm))
            throw new Gpt2Exception($"step {number}: expected a finite loss and gradient, found loss {loss} and norm {norm}; " +
                "nothing was updated, and the last checkpoint stands");
        const float clip = 1;
        var update = new AdamWStep(number, rate, decay, norm > clip ? clip / norm : 1, 0.9f, 0.95f, 1e-8f);
        var shapes = model.Config.Parameters;
        for (var i = 0; i < shapes.Length; i++) {
            model.Device.AdamW(model.Weights.Tensors[i], model.Gradients.Tensors[i], m.Tensors[i], v.Tensors[i],
                shapes[i].IsMatrix ? update : update with { WeightDecay = 0 });
        }
        return norm;
    }

    static double Mean(ReadOnlySpan<float> values) {
        var sum = 0.0;
        foreach (var value in values)
            sum += value;
        return sum / values.Length;
    }

    void Validate(int step) {
        var loss = Evaluate(model, val, Math.Min(options.ValBatches, val.Batches), options.B, options.T);
        output.WriteLine(string.Create(CultureInfo.InvariantCulture, $"val loss {loss:F6}"));
        runLog.Validation(step, loss);
    }

    /// <summary>The mean loss over the first batches of a loader.</summary>
    public static double Evaluate(Model model, TokenLoader loader, long batches, int B, int T) {
        var (inputs, targets, losses) = (new int[B * T], new int[B * T], new float[B * T]);
        loader.Reset();
        var loss = 0.0;
        for (var batch = 0L; batch < batches; batch++) {
            loader.Next(inputs, targets);
            model.Forward(inputs);
            model.Loss(targets, losses, 0);
            loss += Mean(losses) / batches;
        }
        return loss;
    }

    /// <summary>The share of examples whose right completion has the lowest mean loss a token.</summary>
    public static double EvaluateChoices(Model model, IReadOnlyList<MultipleChoice> examples, int B, int T) {
        var (inputs, targets, losses) = (new int[B * T], new int[B * T], new float[B * T]);
        var rows = examples.SelectMany((example, index) => example.Rows.Select(row => (example, index, row))).ToArray();
        if (rows.Any(row => row.row.Length > T))
            throw new Gpt2Exception($"--seq: expected at least {rows.Max(row => row.row.Length)}, the longest example's tokens, found {T}",
                usage: true);
        var scores = examples.Select(_ => new List<double>()).ToArray();
        foreach (var batch in rows.Chunk(B)) {
            for (var b = 0; b < batch.Length; b++) {
                for (var t = 0; t < T; t++) {
                    inputs[b * T + t] = t < batch[b].row.Length ? batch[b].row[t] : 0;
                    targets[b * T + t] = t + 1 < batch[b].row.Length ? batch[b].row[t + 1] : 0;
                }
            }
            model.Forward(inputs);
            model.Loss(targets, losses, 0);
            for (var b = 0; b < batch.Length; b++)
                scores[batch[b].index].Add(Mean(losses.AsSpan((b * T + batch[b].example.ContextLength - 1)..(b * T + batch[b].row.Length - 1))));
        }
        return examples.Zip(scores).Average(pair => pair.Second.IndexOf(pair.Second.Min()) == pair.First.Label ? 1.0 : 0);
    }

    void Sample() {
        var tokens = model.Generate([model.Config.V - 1], new Sampler(0.8f, 50, 1, options.Seed)).Take(options.GenTokens);
        if (model.Config.V == Tokenizer.EndOfTextId + 1)
            output.WriteLine($"sample: {string.Concat(new Tokenizer().Decode(tokens))}");
        else
            output.WriteLine($"sample: {string.Join(' ', tokens)}");
    }

    /// <summary>Closes the data.</summary>
    public void Dispose() {
        train.Dispose();
        val.Dispose();
    }
}

/// <summary>The checkpoints in an output folder: a model and a state file each, complete once DONE is there.</summary>
public sealed class Checkpoints(string folder) {
    const int Magic = 20240527;

    /// <summary>Whether the folder holds anything of a run.</summary>
    public bool HasRun => File.Exists(Path.Combine(folder, "main.log")) || Steps("DONE_*").Any() || Steps("model_*.bin").Any();

    /// <summary>The step of the last complete checkpoint.</summary>
    public int? Last => Steps("DONE_*").Cast<int?>().Max();

    public string ModelPath(int step) => Path.Combine(folder, $"model_{step:d8}.bin");
    string StatePath(int step) => Path.Combine(folder, $"state_{step:d8}_00000.bin");
    string DonePath(int step) => Path.Combine(folder, $"DONE_{step:d8}");

    IEnumerable<int> Steps(string pattern) => Directory.Exists(folder)
        ? Files.Glob(Path.Combine(folder, pattern)).Select(StepOf).Where(step => step >= 0).Order().ToArray()
        : [];

    static int StepOf(string path) => int.TryParse(Path.GetFileNameWithoutExtension(path).Split('_')[1], out var step) ? step : -1;

    /// <summary>Requires a checkpoint's files to be those that were written; llm.c's checkpoints say nothing of them.</summary>
    public void Verify(int step) {
        foreach (var line in File.ReadLines(DonePath(step))) {
            var found = Files.Describe(Path.Combine(folder, line.Split(' ')[0]));
            if (found != line)
                throw new Gpt2Exception($"{DonePath(step)}: expected '{line}' (name, size, hash), found '{found}'");
        }
    }

    /// <summary>Writes a checkpoint, DONE last, and removes all but the newest <paramref name="keep"/>.</summary>
    public void Save(int step, Model model, Parameters m, Parameters v, TokenLoader loader, bool shuffled, int keep) {
        try {
            Directory.CreateDirectory(folder);
        } catch (Exception e) when (e is IOException or UnauthorizedAccessException) {
            throw new Gpt2Exception($"{folder}: expected to make this folder, found {Files.Reason(e)}");
        }
        Files.Write(ModelPath(step), model.Save);
        Files.Write(StatePath(step), to => {
            var header = new int[BinaryFile.HeaderLength];
            (header[0], header[1], header[2], header[5], header[10]) = (Magic, 1, 1, shuffled ? 1 : 0, step);
            (header[30], header[32]) = loader.Position;
            to.Write(MemoryMarshal.AsBytes(header.AsSpan()));
            foreach (var moment in (Parameters[])[m, v]) {
                foreach (var tensor in moment.Tensors)
                    model.Write(to, tensor);
            }
            using var writer = new BinaryWriter(to, Encoding.UTF8, leaveOpen: true);
            loader.Save(writer);
        });
        var list = $"{Files.Describe(ModelPath(step))}\n{Files.Describe(StatePath(step))}\n";
        Files.Write(DonePath(step), to => to.Write(Encoding.UTF8.GetBytes(list)));
        foreach (var old in Steps("DONE_*").SkipLast(keep)) {
            File.Delete(DonePath(old));
            File.Delete(ModelPath(old));
            File.Delete(StatePath(old));
        }
    }

    /// <summary>Reads the moments and the loader's position of a checkpoint.</summary>
    public void LoadState(int step, Model model, Parameters m, Parameters v, TokenLoader loader) {
        using var file = new BinaryFile(StatePath(step), "a training state", Magic, 1);
        var header = file.Header;
        file.Check("number of ranks", 2, header[2] == 1, "1");
        file.Check("rank", 3, header[3] == 0, "0");
        file.Check("master weights", 4, header[4] is 0 or 1, "0 or 1");
        file.Check("shuffling", 5, header[5] is 0 or 1, "0 or 1");
        file.Check("step", 10, header[10] == step, $"{step} as its name says");
        model.Read(file, m);
        model.Read(file, v);
        if (header[4] == 1)
            model.Read(file, model.Weights);
        loader.Load(file, header[5] == 1, (header[30], header[32]));
        file.CheckEnd();
    }
}

/// <summary>main.log and loss.svg in the output folder.</summary>
public sealed class RunLog {
    readonly string folder;
    readonly List<(int Step, double Loss)> train = [], validation = [];

    /// <summary>Goes on with the log of a run as it was before a step: what a later, lost part of it wrote is dropped.</summary>
    public RunLog(string folder, int firstStep) {
        this.folder = folder;
        if (!File.Exists(LogPath))
            return;
        var kept = File.ReadLines(LogPath).Where(line => Parse(line) is { } entry &&
            (entry.Train ? entry.Step < firstStep : entry.Step <= firstStep)).ToArray();
        foreach (var line in kept) {
            var entry = Parse(line)!.Value;
            (entry.Train ? train : validation).Add((entry.Step, entry.Loss));
        }
        Files.Write(LogPath, to => to.Write(Encoding.UTF8.GetBytes(string.Concat(kept.Select(line => line + "\n")))));
    }

    string LogPath => Path.Combine(folder, "main.log");

    static (int Step, bool Train, double Loss)? Parse(string line) {
        var fields = line.Split(' ', ':');
        return fields is ["s", var step, "trl" or "tel", var loss, ..] && int.TryParse(step, out var s) &&
            double.TryParse(loss, CultureInfo.InvariantCulture, out var value) && (fields[2] == "tel" || fields.Length == 8)
            ? (s, fields[2] == "trl", value) : null;
    }

    /// <summary>Logs an update.</summary>
    public void Train(int step, float loss, float rate, float norm) {
        train.Add((step, loss));
        Append(string.Create(CultureInfo.InvariantCulture, $"s:{step} trl:{loss:F4} lr:{rate:F6} norm:{norm:F2}\n"));
    }

    /// <summary>Logs a validation after <paramref name="step"/> updates, and draws the curves.</summary>
    public void Validation(int step, double loss) {
        validation.Add((step, loss));
        Append(string.Create(CultureInfo.InvariantCulture, $"s:{step} tel:{loss:F4}\n"));
        Files.Write(Path.Combine(folder, "loss.svg"), to => to.Write(Encoding.UTF8.GetBytes(Draw())));
    }

    void Append(string line) {
        try {
            Directory.CreateDirectory(folder);
            File.AppendAllText(LogPath, line);
        } catch (Exception e) when (e is IOException or UnauthorizedAccessException) {
            throw new Gpt2Exception($"{LogPath}: expected to write it, found {Files.Reason(e)}");
        }
    }

    /// <summary>The curves of training and validation loss against steps as an SVG picture.</summary>
    string Draw() {
        const int width = 800, height = 450, left = 60, right = 20, top = 20, bottom = 50;
        var points = train.Concat(validation).ToArray();
        var lastStep = Math.Max(1, points.Max(point => point.Step));
        var (low, high) = (Math.Floor(points.Min(point => point.Loss)), Math.Ceiling(points.Max(point => point.Loss) + 1e-9));
        var svg = new StringBuilder();
        double X(double step) => left + (width - left - right) * step / lastStep;
        double Y(double loss) => height - bottom - (height - top - bottom) * (loss - low) / (high - low);
        void Add(FormattableString line) => svg.Append(FormattableString.Invariant(line)).Append('\n');
        void Curve(IEnumerable<(int Step, double Loss)> curve, string color, string name, int row) {
            var path = string.Join(' ', curve.Select(p => FormattableString.Invariant($"{X(p.Step):F1},{Y(p.Loss):F1}")));
            Add($"""<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>""");
            Add($"""<text x="{width - right - 10}" y="{top + 18 * row}" fill="{color}" text-anchor="end">{name}</text>""");
        }

        Add($"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">""");
        Add($"""<rect width="{width}" height="{height}" fill="white"/>""");
        const int ticks = 5;
        for (var tick = 0; tick <= ticks; tick++) {
            var (step, loss) = ((double)lastStep * tick / ticks, low + (high - low) * tick / ticks);
            Add($"""<path d="M{left} {Y(loss):F1}H{width - right}" stroke="#ddd"/>""");
            Add($"""<text x="{left - 8}" y="{Y(loss) + 4:F1}" text-anchor="end">{loss:F1}</text>""");
            Add($"""<text x="{X(step):F1}" y="{height - bottom + 18}" text-anchor="middle">{step:F0}</text>""");
        }
        Add($"""<text x="{(left + width - right) / 2}" y="{height - 12}" text-anchor="middle">step</text>""");
        Add($"""<text transform="translate(16 {height / 2}) rotate(-90)" text-anchor="middle">loss</text>""");
        Curve(train, "#4878b0", "training", 1);
        Curve(validation, "#d05020", "validation", 2);
        return svg.Append("</svg>\n").ToString();
    }
}

/// <summary>Training steps timed by operation.</summary>
public static class Benchmark {
    /// <summary>Prints the time of a training step on random tokens, and of its operations.</summary>
    public static void Run(string init, int B, int T, int steps, IDevice device, TextWriter output) {
        var (file, config) = Trainer.Open(init);
        var model = new Model(config, device, B, T, Purpose.Train);
        var m = new Parameters(config, model.Allocate("first moments", config.ParameterCount * sizeof(float)));
        var v = new Parameters(config, model.Allocate("second moments", config.ParameterCount * sizeof(float)));
        if (file == null)
            model.Initialize(42);
        else
            model.Load(file);
        var random = new Random(1);
        int[] tokens = [.. Enumerable.Range(0, B * T).Select(_ => random.Next(config.V))];
        var losses = new float[B * T];
        var times = new double[steps];
        for (var step = -1; step < steps; step++) {
            if (step == 0)
                device.Profile = new Profile();
            var start = Stopwatch.GetTimestamp();
            model.Forward(tokens);
            model.Loss(tokens, losses, 1f / tokens.Length);
            model.Backward(tokens);
            Trainer.Update(model, m, v, step + 2, 1e-4f, 0.1f);
            if (step >= 0)
                times[step] = Stopwatch.GetElapsedTime(start).TotalSeconds;
        }
        Array.Sort(times);
        var (median, peak) = (times[steps / 2], device.PeakFlops());
        void Print(FormattableString line) => output.WriteLine(line.ToString(CultureInfo.InvariantCulture));
        Print($"{device.Name}; measured peak {peak / 1e9:F0} GFLOP/s");
        Print($"{config.Summary}; batch {B} x {T}");
        Print($"step {median * 1e3:F1} ms | {B * T / median:F0} tok/s | {config.FlopsPerToken(T) * B * T / median / peak:0.0%} MFU");
        Print($"{"operation",-42}{"calls",6}{"ms",10}{"share",8}{"GFLOP/s",9}{"of peak",9}");
        foreach (var (name, entry) in device.Profile!.Operations.OrderByDescending(entry => entry.Value.Seconds)) {
            var rate = entry.Flops > 0 ? string.Create(CultureInfo.InvariantCulture,
                $"{entry.Flops / entry.Seconds / 1e9,9:F1}{entry.Flops / entry.Seconds / peak,9:0.0%}") : "";
            Print($"{name,-42}{entry.Calls / steps,6}{entry.Seconds / steps * 1e3,10:F2}{entry.Seconds / times.Sum(),8:0.0%}{rate}");
        }
    }
}
