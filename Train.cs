using Microsoft.Extensions.Logging;
using ZLogger;

namespace Gpt2;

/// <summary>How the learning rate decays after its warm-up.</summary>
public enum Schedule { Cosine, Linear, Constant, Wsd }

/// <summary>The options of `gpt2 train`, as its help explains them. Without Init a new run is of d12, or d6 on a CPU;
/// ValBatches 0 validates on the first rows; SkipOutliers 0 skips none.</summary>
public sealed record TrainOptions(
    string TrainData, string ValData, string? Init, string Out, int B, int T, int TotalBatch, int MaxSteps,
    float LearningRate, int Warmup, float FinalFraction, float WeightDecay, Schedule Schedule, int ValEvery,
    int ValBatches, int SampleEvery, int GenTokens, int CheckpointEvery, int Keep, bool Resume, int Recompute,
    bool Overfit, bool Shuffle, uint Seed, float SkipOutliers = 0, int Zero = 1, DataType? Precision = null,
    OptimizerKind Optimizer = OptimizerKind.AdamW, bool KeepBest = false, int LogEvery = 1) {
    /// <summary>The options that a run's folder keeps, and --resume takes up unless they are given again.</summary>
    public IEnumerable<(string Option, object? Value)> Settings => [
        ("--init", Init), ("--train-data", TrainData), ("--val-data", ValData), ("--batch", B), ("--seq", T),
        ("--total-batch", TotalBatch), ("--max-steps", MaxSteps), ("--lr", LearningRate), ("--warmup", Warmup),
        ("--final-lr-frac", FinalFraction), ("--weight-decay", WeightDecay), ("--schedule", Schedule),
        ("--val-every", ValEvery), ("--val-batches", ValBatches), ("--sample-every", SampleEvery),
        ("--gen-tokens", GenTokens), ("--checkpoint-every", CheckpointEvery), ("--keep", Keep),
        ("--recompute", Recompute), ("--overfit", Overfit), ("--no-shuffle", !Shuffle),
        ("--skip-outliers", SkipOutliers), ("--seed", Seed), ("--zero", Zero), ("--precision", Precision),
        ("--optimizer", Optimizer), ("--keep-best", KeepBest), ("--log-every", LogEvery > 1 ? LogEvery : null),
    ];

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

    /// <summary>Micro-batches of each rank in an update.</summary>
    /// <exception cref="Gpt2Exception">The batch or the sequence does not fit.</exception>
    public static int MicroSteps(Config config, int B, int T, int totalBatch, int ranks = 1) {
        Require(T <= config.MaxT, "--seq", $"1 to {config.MaxT}, the model's longest sequence", T);
        Require(totalBatch > 0 && totalBatch % ((long)ranks * B * T) == 0, "--total-batch",
            $"a multiple of --batch {B} x --seq {T}{(ranks == 1 ? "" : $" on each of {ranks} ranks")}", totalBatch);
        return totalBatch / (ranks * B * T);
    }
}

/// <summary>The training loop. Each rank runs it, but only rank 0 has an output and a log.</summary>
public sealed class Trainer : IDisposable {
    readonly TrainOptions options;
    readonly ICollective ranks;
    readonly ILogger log;
    readonly TextWriter output;
    readonly Model model;
    readonly Optimizer optimizer;
    readonly TokenLoader train;
    readonly TokenShards val;
    readonly (int Shard, long First)[] valRows;
    readonly Checkpoints checkpoints;
    readonly FileStream? runLock;
    readonly RunLog? runLog;
    readonly int firstStep, microSteps;
    readonly long room; // bytes that were free before the model took its memory

    /// <summary>Opens the data, and the checkpoint or a new model.</summary>
    /// <param name="output">For step lines and samples.</param>
    public Trainer(
        TrainOptions options, IDevice device, TextWriter output, ILogger log, ICollective? collective = null) {
        (this.options, this.output, this.log, ranks) = (options, output, log, collective ?? new Alone());
        checkpoints = new Checkpoints(options.Out);
        if (!options.Resume && checkpoints.HasRun)
            throw new Gpt2Exception(
                $"{options.Out}: expected --resume or no run yet, found one of {checkpoints.Last ?? 0} steps");
        var last = options.Resume ? NewestWhole() : null;
        firstStep = last ?? 0;
        var own = last == null ? null : checkpoints.ModelPath(firstStep);
        var (file, config) = Open(own ?? options.Init ?? (device is Cpu ? "d6" : "d12"));
        var (init, asked) = own == null || options.Init == null ? (null, config) : Open(options.Init);
        init?.Dispose();
        file?.Require(asked == config, $"--init's model ({asked.Summary})", config.Summary);
        microSteps = TrainOptions.MicroSteps(config, options.B, options.T, options.TotalBatch, ranks.Size);
        train = new TokenLoader(options.TrainData, options.B, options.T, config.V,
            options.Shuffle && !options.Overfit, options.Seed, ranks.Rank, ranks.Size);
        val = new TokenShards(options.ValData, config.V);
        valRows = val.Rows(options.T, options.B * ranks.Size, options.ValBatches, rows: 128);
        var (part, parts) = options.Zero == 1 ? (ranks.Rank, ranks.Size) : (0, 1);
        room = device.FreeMemory + device.Workspace;
        model = new Model(
            config, device, options.B, options.T, Purpose.Train, options.Recompute, part, parts, options.Optimizer);
        optimizer = new Optimizer(model, ranks);
        model.Load(file, options.Seed);
        if (last != null)
            checkpoints.LoadState(firstStep, model, optimizer, train);
        Require(options.TotalBatch % train.SampleTokens == 0, "--total-batch",
            $"a multiple of the {train.SampleTokens} tokens of this run's samples", options.TotalBatch);
        if (ranks.Rank == 0)
            runLock = checkpoints.Lock(last);
        ranks.Sum([]); // until every rank has read the checkpoint and looked for a run
        if (ranks.Rank > 0)
            return;
        runLog = new RunLog(options.Out, firstStep);
        Describe();
        var changed = checkpoints.Keep(options.Settings);
        if (last != null && changed != "")
            log.ZLogInformation($"changed {changed}");
    }

    /// <summary>The step of the newest whole checkpoint, or null if there is none at all. Rank 0 decides.</summary>
    /// <exception cref="Gpt2Exception">There are checkpoints, but none is whole.</exception>
    int? NewestWhole() {
        var candidates = new Stack<int>(ranks.Rank == 0 ? checkpoints.Complete : []);
        while (candidates.TryPeek(out var newest) && checkpoints.FaultOf(newest) is { } fault) {
            candidates.Pop();
            if (candidates.Count == 0)
                throw new Gpt2Exception(fault);
            log.ZLogInformation($"{fault}; trying the checkpoint of step {candidates.Peek()}");
        }
        var step = (int)ranks.Sum(candidates.TryPeek(out var whole) ? whole + 1 : 0) - 1;
        if (step < 0)
            log.ZLogInformation($"{options.Out}: no complete checkpoint to resume, starting from step 0");
        return step < 0 ? null : step;
    }

    /// <summary>The model that a path or a descriptor stands for; the file is null for a descriptor.</summary>
    public static (BinaryFile? File, Config Config) Open(string init) {
        if (Config.Of(init) is { } config)
            return (null, config);
        Require(init.Contains('/') || init.Contains('.') || Path.Exists(init), "--init",
            "a model file, a run's folder, or d6, d12, d24, d36 or d48", init);
        return Checkpoints.Open(init);
    }

    /// <summary>A row of the table that stands before the steps, and of the one after them.</summary>
    void Row(string name, string text) => log.ZLogInformation($"{name,-8}{Terminal.Wrap(text, 8, Terminal.Width)}");

    void Describe() {
        var (config, o) = (model.Config, options);
        Row("model", $"{config.Summary}; {config.ParameterCount / 1e6:F1} M parameters");
        Row("data", $"{o.TrainData}: {train.Shards.Tokens} tokens; {o.ValData}: {val.Tokens}, of which " +
            $"{valRows.Length} x {o.T} are validated on");
        foreach (var path in train.Shards.TooShort(train.SampleTokens))
            Row("data", $"{path} is passed over: it has no sample of {train.SampleTokens} tokens");
        var many = ranks.Size > 1 ? $" x {ranks.Size} ranks" : "";
        Row("batch", $"{o.B} x {o.T} tokens x {microSteps} micro-steps{many} = {o.TotalBatch} tokens");
        var epoch = (double)train.Samples * train.SampleTokens / o.TotalBatch;
        Row("steps", $"{firstStep} to {o.MaxSteps}; {epoch:F1} an epoch");
        var heights = Enumerable.Range(0, 24).Select(i =>
            7 * o.LearningRateAt((int)(i * (o.MaxSteps - 1L) / 23)) / o.LearningRate);
        Row("rate", string.Concat(heights.Select(height => "▁▂▃▄▅▆▇█"[Math.Clamp((int)height, 0, 7)])) +
            $" up to {o.LearningRate}, {o.Schedule}, for {o.Optimizer}".ToLowerInvariant());
        Row("device", $"{model.Device.Name}{many}");
        (string Name, long Bytes)[] memory = [.. model.Memory, ("workspace", model.Device.Workspace)];
        var bar = new string('█', (int)(24 * Memory / room)).PadRight(24, '░');
        Row("memory", $"{bar} {Size(Memory)} of {Size(room)}: " +
            string.Join(", ", memory.Where(part => part.Bytes > 0).Select(part => $"{part.Name} {Size(part.Bytes)}")));

        static string Size(long bytes) => bytes < 1e9 ? $"{bytes / 1e6:F1} MB" : $"{bytes / 1e9:F1} GB";
    }

    /// <summary>Bytes that the model, its training and the device take.</summary>
    long Memory => model.Memory.Sum(part => part.Bytes) + model.Device.Workspace;

    /// <summary>Says what came of the run, and what to type next.</summary>
    void Report(int step, TimeSpan time) {
        var (program, isText) = (Environment.GetCommandLineArgs()[0], model.Config.V == Tokenizer.EndOfTextId + 1);
        if (step > firstStep)
            Row("done", $"{step - firstStep} steps in {Terminal.Time(time)}, " +
                $"{(step - firstStep) * (options.TotalBatch / time.TotalSeconds):F0} tokens/s: " +
                checkpoints.ModelPath(step));
        if (runLog?.BestAt(step) is { } best)
            Row("best", $"validation loss {best.Loss:F4} at step {best.Step}" +
                (File.Exists(checkpoints.BestPath(best.Step)) ? $": {checkpoints.BestPath(best.Step)}" : ""));
        Row("next", $"{program} " + (step < options.MaxSteps ? $"train -y -o {options.Out}"
            : $"sample -e {options.Out}{(isText ? "" : " --prompt-ids 1,2,3")}"));
    }

    /// <summary>Trains to the last step, or until a signal, and leaves a checkpoint.</summary>
    public void Run() {
        var (stop, stopped) = (false, 0L);
        void Stop(PosixSignalContext signal) {
            // A launcher passes on a Ctrl-C that the terminal has sent us too: two signals within a second are one.
            signal.Cancel = !stop || Stopwatch.GetElapsedTime(stopped) < TimeSpan.FromSeconds(1);
            if (stop)
                return;
            (stop, stopped) = (true, Stopwatch.GetTimestamp());
            log.ZLogInformation($"finishing this step, then a checkpoint; again quits at once");
        }
        using var terminate = PosixSignalRegistration.Create(PosixSignal.SIGTERM, Stop);
        using var interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, Stop);
        using var hangUp = PosixSignalRegistration.Create(PosixSignal.SIGHUP, Stop);
        var (live, begin, shown) = (Terminal.IsLive, Stopwatch.GetTimestamp(), 0L);
        var peak = model.Device is Cpu ? (double?)null : model.Device.PeakFlops(); // a CPU's hangs on what else runs
        var perToken = model.Config.FlopsPerToken(options.T) / peak / ranks.Size;
        if (firstStep == 0 && options.ValEvery > 0)
            Validate(0);
        var step = firstStep;
        for (var stopping = false; step < options.MaxSteps && !stopping;) {
            ranks.Place = $"step {step + 1}";
            var start = Stopwatch.GetTimestamp();
            var (loss, norm, skipped) = Step(step);
            var seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
            var (rate, speed) = (options.LearningRateAt(step), options.TotalBatch / seconds);
            runLog?.Update(step, loss, rate, norm, options.TotalBatch, seconds, speed * perToken, Memory);
            step++;
            // On a terminal at most ten a second.
            var shows = skipped || step == firstStep + 1 || step == options.MaxSteps || step % options.LogEvery == 0 &&
                (!live || Stopwatch.GetElapsedTime(shown) > TimeSpan.FromSeconds(0.1));
            if (shows) {
                shown = Stopwatch.GetTimestamp();
                output.WriteLine(Terminal.Over($"step {step,4}/{options.MaxSteps} | loss {loss:F6} | " +
                    $"norm {norm:F4} | lr {rate:0.00e+00} | {seconds * 1e3:F2} ms | " +
                    $"{speed * perToken:0.0% 'MFU | '}{speed:F0} tok/s{(skipped ? " | outlier, not updated" : "")}"));
            }
            bool Due(int period) => step == options.MaxSteps || period > 0 && step % period == 0;
            if (Due(options.ValEvery))
                Validate(step);
            if (Due(options.SampleEvery) && options.GenTokens > 0 && ranks.Rank == 0)
                Sample();
            stopping = ranks.Sum(stop ? 1 : 0) > 0; // read once: a signal after this waits for the next step
            if (Due(options.CheckpointEvery) || stopping)
                Save(step);
            // The first step warms up.
            var left = step == firstStep + 2 ? TimeSpan.FromSeconds(seconds) * (options.MaxSteps - step)
                : Stopwatch.GetElapsedTime(begin) / (step - firstStep) * (options.MaxSteps - step);
            if (step == firstStep + 2 && step < options.MaxSteps) {
                output.Write(Terminal.Over(""));
                Row("time", $"about {Terminal.Time(left)}" +
                    (left.TotalDays < 1 ? $", until {DateTime.Now + left:HH:mm}" : ""));
            } else if (live && shows && step < options.MaxSteps && !stopping)
                output.Write(Terminal.Over($"{(double)step / options.MaxSteps:0.0%} | loss {loss:F3} | " +
                    $"{speed:F0} tok/s | {Terminal.Time(left)} left"));
        }
        if (stop)
            log.ZLogInformation($"stopped by a signal; --resume goes on from here");
        else if (firstStep >= options.MaxSteps)
            log.ZLogInformation($"nothing to do: {firstStep} steps are done, and --max-steps is {options.MaxSteps}");
        Report(step, Stopwatch.GetElapsedTime(begin));
    }

    /// <summary>Writes a checkpoint if the loss is finite, so that a useless one takes no good one's place.</summary>
    void Save(int step) {
        CheckFinite(step, ranks.Sum(model.Evaluate()), "loss after the update", "nothing was saved");
        checkpoints.Save(step, model, optimizer, train, options.Keep, ranks, at => runLog?.BestAt(at)?.Step);
    }

    void CheckFinite(int step, double value, string what, string consequence) {
        if (!double.IsFinite(value))
            throw new Gpt2Exception($"step {step}: expected a finite {what}, found {value} (a lower --lr may help); " +
                $"{consequence}, and " + (checkpoints.Last is { } last ? $"the checkpoint of step {last} stands: " +
                checkpoints.ModelPath(last) : "there is no checkpoint yet"));
    }

    /// <summary>Makes an update, unless the mean loss or the gradient's norm (before clipping) is an outlier.</summary>
    (double Loss, float Norm, bool Skipped) Step(int step) {
        if (options.Overfit)
            train.Reset();
        var (loss, norm) = optimizer.Accumulate(microSteps, () => train.Next(model.Tokens, model.Targets));
        CheckFinite(step + 1, loss, "loss", "nothing was updated");
        CheckFinite(step + 1, norm, "norm of the gradient", "nothing was updated");
        var skips = options.SkipOutliers > 0 && ranks.Sum(runLog?.Deviation(loss, norm) ?? 0) > options.SkipOutliers;
        if (skips)
            optimizer.Skip();
        else
            optimizer.Update(step + 1, options.LearningRateAt(step), options.WeightDecay, norm);
        return (loss, norm, skips);
    }

    void Validate(int step) {
        var loss = Evaluation.Loss(model, val, valRows, ranks);
        CheckFinite(step, loss, "validation loss", "no checkpoint was written");
        output.WriteLine(Terminal.Over($"val loss {loss:F6}{runLog?.Validated(step, loss)}"));
        if (!options.KeepBest || step == 0 || runLog?.BestAt(step)?.Step != step)
            return;
        Files.Write(checkpoints.BestPath(step), model.Save);
        checkpoints.PruneBest(step, at => runLog.BestAt(at)?.Step);
    }

    void Sample() {
        var last = model.Config.V - 1;
        var tokens = model.Generate([last], new Choice(0.8f, 50, 1, options.Seed), options.GenTokens).Select(x => x[0]);
        var isText = last == Tokenizer.EndOfTextId;
        var text = isText ? string.Concat(new Tokenizer().Decode(tokens)) : string.Join(' ', tokens);
        output.WriteLine($"sample: {text}");
    }

    public void Dispose() {
        train.Dispose();
        val.Dispose();
        runLock?.SetLength(0);
        runLock?.Dispose();
    }
}

/// <summary>AdamW, or Muon for the layers' matrices and AdamW for all else, with their moments. Under ZeRO-1
/// (Rajbhandari et al., 2020) each rank updates its part of the weights and gathers the others'.</summary>
public sealed class Optimizer {
    readonly Model model;
    readonly ICollective ranks, owners; // all ranks, and those of them that update the other parts
    // What is updated at a time, and then the weights that ranks exchange: of Muon's a tensor, all layers of it.
    readonly (AdamWPart[] Parts, Share[] Weights)[] adamWs;
    readonly (MuonPart[] Parts, Share[] Weights)[] muons;

    public Optimizer(Model model, ICollective? collective = null) {
        (this.model, ranks) = (model, collective ?? new Alone());
        (M, V, owners) = (model.AllocateParts(), model.AllocateParts(true), model.IsCut ? ranks : new Alone());
        var (cuts, weights, gradients) = (model.Master.Cuts, model.WeightParts, model.GradientParts!);
        var (config, byMuon) = (model.Config, Enumerable.Range(0, cuts.Length).ToLookup(i => cuts[i].IsMuons));
        // Under ZeRO-1 a quarter of AdamW's at a time, which is gathered while the next one is updated.
        adamWs = [.. byMuon[false].Chunk(byMuon[false].Count() / (model.IsCut ? 4 : 1)).Select(some => (
            some.Select(AdamW).ToArray(), some.Select(i => Share(i, 0, model.Weights, weights)).ToArray()))];
        muons = [.. byMuon[true].Select(i => (cuts[i].Count == 0 ? [] : (MuonPart[])[Muon(i)],
            Enumerable.Range(0, config.L).Select(l => Share(i, l, model.Weights, weights)).ToArray()))];

        AdamWPart AdamW(int i) => new(cuts[i].Index, config.Parameters[cuts[i].Tensor].IsMatrix, weights.Tensors[i],
            model.Master.Tensors[i], gradients.Tensors[i], M.Tensors[i], V.Tensors[Array.IndexOf(V.Cuts, cuts[i])]);

        MuonPart Muon(int i) => new(cuts[i].Index, Matrices(weights, i), Matrices(model.Master, i),
            Matrices(gradients, i), Matrices(M, i));

        // (n, rows, columns); queries, keys and values have a matrix each.
        Tensor Matrices(Parameters parts, int i) {
            var (x, shape) = (parts.Tensors[i], config.Parameters[parts.Cuts[i].Tensor]);
            var rows = shape.Name == "qkvw" ? shape.Columns : shape.Rows;
            return x with { Depth = (int)(x.Count / rows / shape.Columns), Rows = rows, Columns = shape.Columns };
        }
    }

    /// <summary>The first moments, and the second ones of what AdamW updates.</summary>
    public Parameters M { get; }
    public Parameters V { get; }

    /// <summary>Seed of the next update's stochastic rounding.</summary>
    public uint RoundingSeed { get; set; } = 42;

    /// <summary>Part i and the array that it is of; if it is Muon's, one layer, which belongs to one rank.</summary>
    Share Share(int i, int layer, Parameters whole, Parameters parts) {
        var cut = parts.Cuts[i];
        var (all, owner) = (whole.Tensors[cut.Tensor][layer], ((layer + 1) * ranks.Size - 1) / model.Config.L);
        return !cut.IsMuons ? new(whole.Tensors[cut.Tensor][cut.Layer], parts.Tensors[i])
            : new(all, owner != ranks.Rank ? default
                : parts.Tensors[i].Flat(layer * all.Count - cut.First, (int)all.Count), owner);
    }

    /// <summary>Sums the gradients of micro-batches, which <paramref name="next"/> puts into the model.</summary>
    /// <returns>The mean loss over micro-batches and ranks, and the norm of all gradients together.</returns>
    public (double Loss, float Norm) Accumulate(int microSteps, Action next) {
        var loss = 0.0;
        next();
        for (var left = microSteps - 1; left >= 0; left--) {
            model.Forward();
            model.Loss(1f / (ranks.Size * microSteps * model.B * model.T));
            model.Completed = left == 0 && ranks.Size > 1 ? Reduce : null;
            model.Backward();
            if (left > 0)
                next(); // while the device is at work on the last one
            loss += model.MeanLoss() / microSteps / ranks.Size;
        }
        return (ranks.Sum(loss), GradientNorm());
    }

    /// <summary>Sums a layer's gradients over ranks, for −1 those outside of layers; the norm waits for it.</summary>
    public void Reduce(int layer) {
        var (cuts, l) = (model.Master.Cuts, Math.Max(0, layer));
        int[] own = [.. Enumerable.Range(0, cuts.Length).Where(i => (cuts[i].Tensor is >= 2 and < 14) == layer >= 0 &&
            (cuts[i].Layer == l || !model.IsCut || cuts[i].IsMuons))];
        if (model.IsCut)
            ranks.ReduceScatter([.. own.Select(i => Share(i, l, model.Gradients!, model.GradientParts!))]);
        else
            ranks.AllReduce([.. own.Select(i => model.Gradients!.Tensors[cuts[i].Tensor][l])]);
    }

    /// <summary>The norm of all gradients together.</summary>
    public float GradientNorm() {
        ranks.Join();
        return (float)Math.Sqrt(owners.Sum(model.Device.SumOfSquares(model.GradientParts!.All)));
    }

    /// <summary>Clips the gradients, whose norm is given, to norm 1, and makes update 1, 2 or later.</summary>
    public void Update(int number, float rate, float decay, float norm) {
        const float clip = 1;
        var scale = norm > clip ? clip / norm : 1;
        var step = new AdamWStep(number, rate, decay, scale, 0.9f, 0.95f, 1e-8f, RoundingSeed);
        var momentum = 0.85f + 0.1f * Math.Min((number - 1) / 300f, 1);
        var muonStep = new MuonStep(rate, decay, scale, momentum, RoundingSeed++);
        foreach (var (parts, weights) in adamWs) {
            model.Device.AdamW(parts, step);
            owners.AllGather(weights);
        }
        foreach (var (parts, weights) in muons) {
            model.Device.Muon(parts, muonStep);
            owners.AllGather(weights);
        }
        if (model.IsCut)
            model.Device.Clear(model.Gradients!.All); // the updates have cleared the parts alone
        ranks.Join();
    }

    /// <summary>Drops the gradients.</summary>
    public void Skip() {
        model.Device.Clear(model.GradientParts!.All);
        model.Device.Clear(model.Gradients!.All);
    }
}

/// <summary>The checkpoints in a run's folder: a model and state files each, complete once DONE is there.</summary>
public sealed class Checkpoints(string folder) {
    public const int Magic = 20240527;
    const int SampleTokens = 40, OptimizerField = 41, Data = 42; // in a state's header; llm.c leaves 0 there

    /// <summary>Whether the folder holds anything of a run.</summary>
    public bool HasRun => Steps("*").Length > 0 || File.Exists(Path.Combine(folder, "main.log")) &&
        File.ReadLines(Path.Combine(folder, "main.log")).Any(line => line.Contains(" trl:"));

    /// <summary>The steps of the checkpoints that have been completed, in order.</summary>
    public int[] Complete => Steps("DONE_*");

    /// <summary>The step of the last completed checkpoint, or null.</summary>
    public int? Last => Complete.Cast<int?>().LastOrDefault();

    /// <summary>Locks the folder until the process ends, for a run from checkpoint <paramref name="last"/>.</summary>
    /// <exception cref="Gpt2Exception">Another run has the folder, or has had it meanwhile.</exception>
    public FileStream Lock(int? last) {
        Directory.CreateDirectory(folder);
        var file = new FileStream(Path.Combine(folder, "lock"), FileMode.OpenOrCreate, FileAccess.ReadWrite,
            FileShare.ReadWrite);
        try {
            file.Lock(0, 0);
        } catch (IOException) {
            using var reader = new StreamReader(file);
            throw new Gpt2Exception($"{folder}: expected no other run in this folder, found that of process " +
                reader.ReadToEnd().Trim());
        }
        file.SetLength(0);
        file.Write(Encoding.UTF8.GetBytes($"{Environment.ProcessId}\n"));
        file.Flush();
        return last != null || Last == null ? file
            : throw new Gpt2Exception($"{folder}: expected no run yet, found one that has ended since this one began");
    }

    /// <summary>Writes settings.txt; the result says what differs from the one that was there.</summary>
    public string Keep(IEnumerable<(string Option, object? Value)> settings) {
        var lines = settings.Where(setting => setting.Value is not (null or false))
            .Select(setting => setting.Value is true ? setting.Option : $"{setting.Option} {setting.Value}").ToArray();
        var before = File.Exists(SettingsPath) ? ReadSettings() : [];
        lines = [.. lines.Any(IsInit) ? [] : before.Where(IsInit), .. lines];
        Files.Write(SettingsPath, string.Join('\n', lines) + "\n");
        return before.Length == 0 || before.SequenceEqual(lines) ? ""
            : $"{string.Join(", ", before.Except(lines))} to {string.Join(", ", lines.Except(before))}";
    }

    string SettingsPath => Path.Combine(folder, "settings.txt");

    /// <summary>A run's settings as words of a command line; none if its folder has no checkpoint.</summary>
    public static IEnumerable<string> SettingsOf(string folder) =>
        new Checkpoints(folder) is var run && (run.Last != null || File.Exists(run.SettingsPath))
            // What a run began with counts until it has a checkpoint; later the file may be gone.
            ? run.ReadSettings().Where(line => run.Last == null || !IsInit(line)).SelectMany(line => line.Split(' ', 2))
            : [];

    static bool IsInit(string line) => line.StartsWith("--init ");

    /// <summary>The lines of settings.txt. Runs of llm.c and of earlier versions name no optimizer: AdamW.</summary>
    string[] ReadSettings() {
        var lines = File.Exists(SettingsPath) ? File.ReadAllLines(SettingsPath) : [];
        return lines.Any(line => line.StartsWith("--optimizer ")) ? lines : [.. lines, "--optimizer AdamW"];
    }

    /// <summary>Opens a model: a file of llm.c or safetensors, or a folder's, for a run the last whole one.</summary>
    public static (BinaryFile File, Config Config) Open(string path) {
        path = !Directory.Exists(path) ? path : new Checkpoints(path) is { Last: { } last } run ? run.ModelPath(last)
            : Safetensors.In(path) ?? throw new Gpt2Exception(
                $"{path}: expected a folder with a complete checkpoint (DONE_...) or model.safetensors, found none");
        return !Path.GetFileName(path).Contains(".safetensors") ? Config.Open(path)
            : new Safetensors(path) is var file ? (file, file.Config) : default;
    }

    public string ModelPath(int step) => Path.Combine(folder, $"model_{step:d8}.bin");
    public string BestPath(int step) => Path.Combine(folder, $"best_{step:d8}.bin");
    string StatePath(int step, int? rank) =>
        Path.Combine(folder, $"state_{step:d8}_{(rank is { } r ? $"{r:d5}" : "*")}.bin");
    string DonePath(int step) => Path.Combine(folder, $"DONE_{step:d8}");

    int[] Steps(string pattern) => [.. Files.Glob(Path.Combine(folder, pattern))
        .Select(path => Regex.Match(Path.GetFileName(path), @"^(DONE_(?<step>\d{8})|" +
            @"model_(?<step>\d{8})\.bin|state_(?<step>\d{8})_\d{5}\.bin)$"))
        .Where(match => match.Success).Select(match => int.Parse(match.Groups["step"].Value)).Distinct().Order()];

    /// <summary>What is wrong with a checkpoint, or null. DONE lists all its files, or as llm.c's, none.</summary>
    public string? FaultOf(int step) {
        try {
            var listed = File.ReadAllLines(DonePath(step));
            Config.Open(ModelPath(step)).File.Dispose();
            using var state = OpenState(step, 0);
            var files = listed.Length == 0 ? [] : FilesOf(step, Math.Max(1, state.Header[2]));
            string[] found = [.. files.Select(Files.Describe)];
            return found.All(listed.Contains) ? null
                : $"{DonePath(step)}: expected '{string.Join(", ", listed.Except(found))}' (name, size, hash), " +
                    $"found '{string.Join(", ", found.Except(listed))}'";
        } catch (Exception e) when (e is IOException or UnauthorizedAccessException or Gpt2Exception) {
            return $"{DonePath(step)}: {Sentence(e)}";
        }
    }

    IEnumerable<string> FilesOf(int step, int parts) =>
        Enumerable.Range(0, parts).Select(rank => StatePath(step, rank)).Prepend(ModelPath(step));

    BinaryFile OpenState(int step, int part) => new(StatePath(step, part), "a training state", Magic, 1);

    /// <summary>What a state's header says, in rows.</summary>
    public static IEnumerable<(string Name, string Text)> Describe(string path) {
        using var state = new BinaryFile(path, "a training state", Magic, 1);
        var header = state.Header;
        yield return ("state", $"of step {header[10]}, part {header[3] + 1} of {header[2]}");
        yield return ("holds", $"moments of {(OptimizerKind)header[OptimizerField]}" +
            (header[4] == 1 ? ", master weights" : "") + ", the place in the data");
        yield return ("data", $"shard {header[30]}, sample {header[32]}, {(header[5] == 1 ? "shuffled" : "in order")}");
    }

    /// <summary>Writes a checkpoint: rank 0 the model, each rank its part of the state, and DONE last; then all but the
    /// newest <paramref name="keep"/> go, and all but the best model up to each of these.</summary>
    /// <param name="bestAt">The step of the best validation up to a step.</param>
    public void Save(int step, Model model, Optimizer optimizer, TokenLoader loader, int keep, ICollective ranks,
        Func<int, int?> bestAt) {
        var parts = model.IsCut ? ranks.Size : 1;
        var header = new int[BinaryFile.HeaderLength];
        (header[0], header[1], header[2], header[3]) = (Magic, 1, parts, ranks.Rank);
        (header[5], header[10], header[SampleTokens]) = (loader.Shuffles ? 1 : 0, step, loader.SampleTokens);
        header[OptimizerField] = (int)model.Optimizer;
        BitConverter.TryWriteBytes(MemoryMarshal.AsBytes(header.AsSpan(Data)), loader.Fingerprint);
        (header[4], header[20], header[22]) =
            (model.Master == model.Weights ? 0 : 1, (int)optimizer.RoundingSeed, (int)optimizer.RoundingSeed - 1);
        (header[30], header[32]) = loader.Position;
        if (ranks.Rank == 0)
            Files.Write(ModelPath(step), model.Save);
        if (ranks.Rank < parts) {
            Files.Write(StatePath(step, ranks.Rank), to => {
                to.Write(MemoryMarshal.AsBytes(header.AsSpan()));
                model.Write(to, optimizer.M);
                model.Write(to, optimizer.V);
                if (model.Master != model.Weights)
                    model.Write(to, model.Master);
                loader.Save(new BinaryWriter(to));
            });
        }
        ranks.Sum([]);
        if (ranks.Rank > 0)
            return;
        string[] files = [.. FilesOf(step, parts)];
        // State files left over from a killed run with more ranks.
        foreach (var stale in Files.Glob(StatePath(step, null)).Except(files))
            File.Delete(stale);
        Files.Write(DonePath(step), string.Concat(files.Select(file => Files.Describe(file) + "\n")));
        // Newer checkpoints are those that this run could not go on from.
        var kept = Complete.Where(other => other <= step).TakeLast(keep).ToArray();
        foreach (var old in Steps("*").Except(kept)) {
            // DONE first, so that nobody finds it without its files.
            foreach (var path in (string[])[DonePath(old), ModelPath(old), .. Files.Glob(StatePath(old, null))])
                File.Delete(path);
        }
        PruneBest(step, bestAt);
    }

    /// <summary>Deletes all best models but the best up to a step, and up to each checkpoint.</summary>
    public void PruneBest(int step, Func<int, int?> bestAt) {
        var best = Complete.Append(step).Select(bestAt).OfType<int>().Select(BestPath);
        foreach (var path in Files.Glob(Path.Combine(folder, "best_????????.bin")).Except(best))
            File.Delete(path);
    }

    /// <summary>Reads the moments and the loader's position of a checkpoint of any number of ranks.</summary>
    public void LoadState(int step, Model model, Optimizer optimizer, TokenLoader loader) {
        for (var (part, parts) = (0, 1); part < parts; part++) {
            using var file = OpenState(step, part);
            var header = file.Header;
            parts = part == 0 ? header[2] : parts;
            var there = Files.Glob(StatePath(step, null)).Length;
            file.Check("number of ranks", 2, parts >= 1 && parts <= there && header[2] == parts,
                part == 0 ? $"1 to {there}, the states of this step," : $"{parts}");
            file.Check("rank", 3, header[3] == part, $"{part}");
            file.Check("master weights", 4, header[4] is 0 or 1, "0 or 1");
            file.Check("shuffling", 5, header[5] is 0 or 1, "0 or 1");
            file.Check("upper half of the shard index", 31, header[31] == 0, "0");
            file.Check("upper half of the sample index", 33, header[33] == 0, "0");
            file.Check("step", 10, header[10] == step, $"{step} as its name says");
            var written = (OptimizerKind)header[OptimizerField];
            file.Require(written == model.Optimizer,
                $"a state of --optimizer {model.Optimizer}", $"one of --optimizer {written}");
            var data = MemoryMarshal.Read<ulong>(MemoryMarshal.AsBytes(header.AsSpan(Data)));
            file.Require(data == 0 || data == loader.Fingerprint,
                "the shards of --train-data that this run began with (or another --out)", "others");
            optimizer.RoundingSeed = (uint)header[20];
            // Without ZeRO-1, llm.c writes everything for every rank.
            var everything = (2 + header[4]) * sizeof(float) * model.Config.ParameterCount;
            if (header[SampleTokens] == 0 && file.Length > everything)
                parts = 1;
            Cut[] cuts = [.. model.Config.Cuts(part, parts, model.Optimizer)];
            model.Read(file, cuts, optimizer.M);
            model.Read(file, Model.AdamWs(cuts), optimizer.V);
            if (header[4] == 1)
                model.Read(file, cuts, model.Master);
            loader.Load(file, header[5] == 1, (header[30], header[32]), header[SampleTokens]);
            file.CheckEnd();
        }
    }
}

/// <summary>How good a model is.</summary>
public static class Evaluation {
    /// <summary>The mean loss over rows of T tokens, whatever the batch size and the number of ranks.</summary>
    public static double Loss(Model model, TokenShards shards, (int Shard, long First)[] rows, ICollective ranks) {
        var (T, sum) = (model.T, 0.0);
        foreach (var (i, batch) in rows.Chunk(model.B).Index().Where(batch => batch.Index % ranks.Size == ranks.Rank)) {
            foreach (var (b, (shard, first)) in batch.Index())
                shards.Read(shard, first, model.Tokens.AsSpan(b * T, T), model.Targets.AsSpan(b * T, T));
            model.Evaluate();
            sum += model.Losses.Take(batch.Length * T).Sum(loss => (double)loss);
        }
        return ranks.Sum(sum) / rows.Length / T;
    }

    /// <summary>The share of questions whose right completion has the lowest mean loss per token.</summary>
    public static double Accuracy(Model model, MultipleChoice[] questions, ICollective ranks) {
        var (T, scores) = (model.T, new Queue<double>());
        var own = questions.Where((_, i) => i % ranks.Size == ranks.Rank).ToArray();
        foreach (var batch in own.SelectMany(q => q.Rows, (q, row) => (q.ContextLength, Tokens: row)).Chunk(model.B)) {
            Array.Clear(model.Tokens);
            foreach (var (b, row) in batch.Index())
                row.Tokens.CopyTo(model.Tokens, b * T);
            // The target of each position is the next token; only those of the completion count.
            model.Tokens.AsSpan(1).CopyTo(model.Targets);
            if (!double.IsFinite(model.Evaluate()))
                throw new Gpt2Exception("--hellaswag: expected finite losses, found others: the weights are too large");
            foreach (var (b, (context, tokens)) in batch.Index())
                scores.Enqueue(model.Losses.Skip(b * T + context - 1).Take(tokens.Length - context)
                    .Average(loss => (double)loss));
        }
        return ranks.Sum(own.Count(question => {
            double[] ofRows = [.. question.Rows.Select(_ => scores.Dequeue())];
            return ofRows.IndexOf(ofRows.Min()) == question.Label;
        })) / questions.Length;
    }
}

/// <summary>A model's logits, loss and gradients beside those that PyTorch computed.</summary>
public static class Verification {
    /// <summary>The largest ‖a − b‖/‖b‖ that counts as equal.</summary>
    public static double Tolerance(DataType type) => type == DataType.Fp32 ? 1e-4 : 2e-2;

    /// <summary>Compares with a debug state: for each tensor the largest difference, and ‖a − b‖/‖b‖.</summary>
    public static IEnumerable<(string Name, double Largest, double Relative)> Run(
        string init, string state, IDevice device) {
        var (file, config) = Checkpoints.Open(init);
        using var reference = new BinaryFile(state, "a PyTorch debug state", 20240327, 2);
        var (B, T) = (reference.Header[2], reference.Header[3]);
        reference.Check("batch size", 2, B is > 0 and <= 1 << 16, "1 to 65536");
        reference.Check("sequence length", 3, T > 0 && T <= config.MaxT, $"1 to {config.MaxT}, the model's longest");
        reference.CheckSize(BinaryFile.HeaderBytes + 4 * ((long)B * T * (config.V + 2) + 1 + config.ParameterCount));
        var model = new Model(config, device, B, T, Purpose.Train);
        reference.Read(model.Tokens.AsSpan());
        reference.Read(model.Targets.AsSpan());
        var wrong = model.Tokens.Concat(model.Targets).FirstOrDefault(token => token < 0 || token >= config.V);
        reference.Require(wrong == 0, $"tokens below the model's vocabulary of {config.V}", $"{wrong}");
        model.Load(file);
        model.Forward();
        var rows = Enumerable.Range(0, model.LogitParts).Select(model.Logits)
            .SelectMany(part => Enumerable.Range(0, part.Rows).Select(row => part.Slice(row, 1)));
        yield return Compare("logits", rows.Select(row => Values(row.Flat(0, config.V))));
        model.Loss(1f / (B * T));
        yield return Compare("loss", [[(float)model.MeanLoss()]]);
        model.Backward();
        for (var i = 0; i < config.Parameters.Length; i++)
            yield return Compare(config.Parameters[i].Name, model.Gradients!.Tensors[i].Chunks().Select(Values));

        float[] Values(Tensor part) {
            var values = new float[part.Count];
            device.Read(part, values);
            return values;
        }

        (string, double, double) Compare(string name, IEnumerable<float[]> parts) {
            var (largest, squares, norm) = (0.0, 0.0, double.Epsilon);
            foreach (var found in parts) {
                var expected = new float[found.Length];
                reference.Read(expected.AsSpan());
                for (var i = 0; i < found.Length; i++) {
                    var difference = (double)found[i] - expected[i];
                    largest = Math.Max(largest, Math.Abs(difference));
                    squares += difference * difference;
                    norm += (double)expected[i] * expected[i];
                }
            }
            return (name, largest, Math.Sqrt(squares / norm));
        }
    }
}

/// <summary>Training steps timed, as a whole and by operation.</summary>
public static class Benchmark {
    /// <summary>Prints the median times of a training step on random tokens and of its operations, compared with what
    /// the device reaches now in a large product or a large copy.</summary>
    public static void Run(string init, int B, int T, int totalBatch, int steps, int recompute,
        OptimizerKind kind, IDevice device, TextWriter output) {
        var (file, config) = Trainer.Open(init);
        var microSteps = TrainOptions.MicroSteps(config, B, T, totalBatch);
        var ceilings = device.MeasureCeilings();
        var model = new Model(config, device, B, T, Purpose.Train, recompute, optimizer: kind);
        var optimizer = new Optimizer(model);
        model.Load(file, 42);
        var random = new Random(1);
        for (var i = 0; i < B * T; i++)
            (model.Tokens[i], model.Targets[i]) = (random.Next(config.V), random.Next(config.V));
        var number = 0;
        double Step() {
            var start = Stopwatch.GetTimestamp();
            optimizer.Update(++number, 1e-4f, 0.1f, optimizer.Accumulate(microSteps, () => { }).Norm);
            device.Synchronize();
            return Stopwatch.GetElapsedTime(start).TotalSeconds;
        }
        Step(); // warms up
        var median = Median([.. Enumerable.Range(0, steps).Select(_ => Step())]);
        output.WriteLine($"{device.Name}, {device.Precision}; large product {ceilings.Flops / 1e12:F1} TFLOP/s, " +
            $"large copy {ceilings.Bytes / 1e9:F0} GB/s");
        output.WriteLine($"{config.Summary}; batch {B} x {T}, {totalBatch} tokens a step; " +
            $"{model.Memory.Sum(part => part.Bytes) / 1e9:F1} GB");
        output.WriteLine($"step {median * 1e3:F2} ms | {totalBatch / median:F0} tok/s | " +
            $"{config.FlopsPerToken(T) * totalBatch / median / device.PeakFlops():0.0%} MFU");
        var operations = Enumerable.Range(0, steps).SelectMany(_ => {
            var profile = device.Profile = new Profile();
            Step();
            return profile.Operations;
        }).GroupBy(entry => entry.Key, entry => entry.Value).Select(runs => (Name: runs.Key, Run: runs.First(),
            Seconds: Median([.. runs.Select(run => run.Seconds)]))).OrderByDescending(each => each.Seconds).ToArray();
        var total = operations.Sum(operation => operation.Seconds);
        output.WriteLine($"{"operation",-40}{"calls",6}{"ms",10}{"share",8}{"",17}{"of best",8}");
        foreach (var (name, (calls, _, flops, bytes), seconds) in operations) {
            var rate = flops > 0 ? $"{flops / seconds / 1e12,9:F2} TFLOP/s{flops / seconds / ceilings.Flops,7:0.0%}"
                : bytes > 0 ? $"{bytes / seconds / 1e9,9:F0} GB/s   {bytes / seconds / ceilings.Bytes,7:0.0%}" : "";
            output.WriteLine($"{name,-40}{calls,6}{seconds * 1e3,10:F3}{seconds / total,8:0.0%}{rate}");
        }
        output.WriteLine($"{"together",-46}{total * 1e3,10:F3}");
    }

    /// <summary>Prints how many tokens generation makes a second, and the limit by reading each weight once.</summary>
    public static void Decode(string init, IDevice device, TextWriter output) {
        var (file, config) = Trainer.Open(init);
        var (most, bytes) = (device is Cpu ? 8 : IDevice.MostSequences, device.MeasureCeilings().Bytes);
        var model = new Model(config, device, most, 1, Purpose.Generate);
        model.Load(file, 42);
        var limit = bytes / ((double)config.ParameterCount * Tensor.SizeOf(model.Weights.All.Type));
        output.WriteLine($"{device.Name}, {device.Precision}; {config.Summary}; large copy {bytes / 1e9:F0} GB/s, " +
            $"which reads the weights {limit:F0} times a second");
        Choice greedy = new(0, 0, 1, 42), usual = new(0.8f, 50, 0.9f, 42);
        foreach (var (name, B, prompt, choice) in ((string, int, int, Choice)[])[
            ("1 sample, greedy", 1, 10, greedy), ("1 sample, top-k 50, top-p 0.9, temperature 0.8", 1, 10, usual),
            ("1 sample, temperature 1", 1, 10, new(1, 0, 1, 42)), ("1 sample, top-p 0.9", 1, 10, new(1, 0, 0.9f, 42)),
            ("1 sample, greedy, after 700 tokens", 1, 700, greedy),
            ($"{most} samples, top-k 50, top-p 0.9", most, 10, usual),
        ]) {
            int[] ids = [.. Enumerable.Range(0, Math.Min(prompt, config.MaxT)).Select(i => i * 31 % config.V)];
            _ = model.Generate(ids, choice, 17, B).Count(); // warms up
            var start = Stopwatch.GetTimestamp();
            using var steps = model.Generate(ids, choice, 257, B).GetEnumerator();
            steps.MoveNext();
            var first = Stopwatch.GetElapsedTime(start).TotalSeconds;
            while (steps.MoveNext()) { }
            var rate = 256 * B / (Stopwatch.GetElapsedTime(start).TotalSeconds - first);
            output.WriteLine($"{name,-50}{rate,9:F0} tok/s{rate / B / limit,6:0%} of the limit; first token " +
                $"{first * 1e3:F1} ms");
        }
    }

    static double Median(double[] values) => values.Order().ElementAt(values.Length / 2);
}
