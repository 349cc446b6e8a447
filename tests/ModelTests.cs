using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>The model and its training in any precision: against PyTorch's, and against itself where there are two ways
/// to one result.</summary>
/// <param name="T">Tokens in each of the batch's two sequences.</param>
public abstract class PrecisionTests(IDevice device, Config small, int T) {
    protected readonly IDevice device = device;

    /// <summary>A small model with a batch of two sequences.</summary>
    protected Model RandomModel(Purpose purpose, int recompute = 0) =>
        Models.Random(small, device, 2, T, purpose, recompute);

    [Test]
    public async Task LogitsLossAndGradientsEqualPyTorchs() {
        var results = Verification.Run(Golden("model.bin"), Golden("state.bin"), device).ToArray();
        string[] parameters = [.. Config.Of("d12")!.Parameters.Select(shape => shape.Name)];
        await Same(results.Select(result => result.Name), ["logits", "loss", .. parameters]);
        var tolerance = Verification.Tolerance(device.Precision);
        foreach (var (name, largest, relative) in results) {
            await Assert.That(double.IsFinite(largest) && relative >= 0 && relative < tolerance).IsTrue()
                .Because($"{name} differs by {relative:g3}, at most by {largest:g3}");
        }
    }

    [Test]
    [Arguments(OptimizerKind.AdamW), Arguments(OptimizerKind.Muon)]
    public async Task TenStepsOfTrainingEqualPyTorchs(OptimizerKind optimizer) {
        var bound = Verification.Tolerance(device.Precision);
        using var folder = new TemporaryFolder();
        var options = Models.Options with {
            TrainData = Golden("tokens_train.bin"), ValData = Golden("tokens_val.bin"), Init = Golden("model.bin"),
            Out = folder["run"], B = 2, T = 21, TotalBatch = 3 * 2 * 21, LearningRate = 1e-2f, Warmup = 4,
            Optimizer = optimizer,
        };
        var (found, validation) = Models.Train(options, device);
        await Assert.That(found.Length).IsEqualTo(10);
        // The number, loss, norm and learning rate of each step, then the validation loss.
        var golden = Golden(optimizer == OptimizerKind.Muon ? "train_muon.txt" : "train.txt");
        var lines = File.ReadAllLines(golden).Select(line => line.Split(' ')).ToArray();
        foreach (var (i, step) in found.Index()) {
            var expected = lines[i].Select(Parse).ToArray();
            await Assert.That(step[0]).IsEqualTo(expected[0]);
            // The learning rate is printed with three digits.
            foreach (var (column, tolerance) in ((int, double)[])[(1, bound), (2, bound), (3, 5e-3)])
                await Assert.That(RelativeError(step[column], expected[column])).IsLessThan(tolerance);
            await Assert.That(RelativeError(options.LearningRateAt(i), expected[3])).IsLessThan(1e-6);
        }
        await Assert.That(RelativeError(validation, Parse(lines[10][1]))).IsLessThan(bound);
        if (device.Precision == DataType.Fp32 && optimizer == OptimizerKind.AdamW)
            await ModelTests.CompareWeights(folder["run/model_00000010.bin"], Golden("trained.bin"));

        static double Parse(string text) => double.Parse(text, CultureInfo.InvariantCulture);
    }

    [Test, Arguments(1), Arguments(2)]
    public async Task RecomputationGivesTheSameBits(int recompute) {
        var (kept, recomputed) = (RandomModel(Purpose.Train), RandomModel(Purpose.Train, recompute));
        await SameBits(recomputed.Pass().Gradients, kept.Pass().Gradients);
        await Assert.That(recomputed.Memory.Sum(part => part.Bytes)).IsLessThan(kept.Memory.Sum(part => part.Bytes));
    }

    [Test]
    public async Task EvaluationGivesTheSameBitsAsTraining() {
        var (train, evaluate) = (RandomModel(Purpose.Train), RandomModel(Purpose.Evaluate));
        foreach (var model in (Model[])[train, evaluate]) {
            model.Forward();
            model.Loss();
            model.MeanLoss();
        }
        await SameBits(evaluate.Losses, train.Losses);
    }
}

/// <summary>The model's tests on the CPU.</summary>
[InheritsTests]
public sealed class CpuModelTests() : ModelTests(new Cpu());

/// <summary>The whole model in fp32.</summary>
[InheritsTests]
public abstract class ModelTests(IDevice device) : PrecisionTests(device, Small, T: 13), IDisposable {
    static readonly Config Small = new(MaxT: 13, V: 67, Vp: 80, L: 3, NH: 3, C: 24);

    public void Dispose() => device.Dispose();

    Model RandomModel(int B, int T, Purpose purpose) => Models.Random(Small, device, B, T, purpose);

    // ---- PyTorch

    [Test]
    [Arguments("logits", 0, 0.1f), Arguments("loss", 1, 0.01f), Arguments("wte", 2, 0.01f)]
    [Arguments("qkvb", 7, 0.01f), Arguments("lnfb", 17, 0.01f), Arguments("lnfb", 17, float.NaN)]
    public async Task VerificationFindsAWrongNumber(string name, int index, float change) {
        using var folder = new TemporaryFolder();
        var numbers = MemoryMarshal.Cast<byte, float>(File.ReadAllBytes(Golden("state.bin"))).ToArray();
        // After 2·21 tokens and targets come the logits, the loss and the gradients; the last number of one changes.
        var (file, config) = Config.Open(Golden("model.bin"));
        file.Dispose();
        long[] counts = [2 * 21 * config.V, 1, .. config.Parameters.Select(shape => shape.Count)];
        var changed = 256 + 2 * 2 * 21 + (int)counts[..(index + 1)].Sum() - 1;
        numbers[changed] += change;
        File.WriteAllBytes(folder["state.bin"], MemoryMarshal.AsBytes(numbers.AsSpan()));
        var results = Verification.Run(Golden("model.bin"), folder["state.bin"], device).ToArray();
        var tolerance = Verification.Tolerance(device.Precision);
        var wrong = results.Where(result => !(result.Relative < tolerance)).Select(result => result.Name);
        await Same(wrong, [name]);
    }

    [Test]
    public async Task VerificationFindsAResultThatIsNotANumber() {
        using var folder = new TemporaryFolder();
        var numbers = MemoryMarshal.Cast<byte, float>(File.ReadAllBytes(Golden("model.bin"))).ToArray();
        numbers.AsSpan()[^96..^48].Fill(3e38f); // the last layer norm's weights: the logits overflow
        File.WriteAllBytes(folder["model.bin"], MemoryMarshal.AsBytes(numbers.AsSpan()));
        foreach (var (name, _, relative) in Verification.Run(folder["model.bin"], Golden("state.bin"), device))
            await Assert.That(relative < Verification.Tolerance(device.Precision)).IsFalse().Because(name);
    }

    /// <summary>Requires two checkpoints to have near tensors, except keys' biases: noise, as golden.py says.</summary>
    internal static async Task CompareWeights(string found, string expected) {
        var (left, config) = Config.Open(found);
        var (right, sameConfig) = Config.Open(expected);
        using var _ = left;
        using var __ = right;
        await Assert.That(config).IsEqualTo(sameConfig);
        foreach (var shape in config.Parameters) {
            var (a, b) = (new float[shape.Count], new float[shape.Count]);
            left.Read(a.AsSpan());
            right.Read(b.AsSpan());
            if (shape.Name == "qkvb") {
                for (var l = 0; l < config.L; l++) {
                    Array.Clear(a, (3 * l + 1) * config.C, config.C);
                    Array.Clear(b, (3 * l + 1) * config.C, config.C);
                }
            }
            await Assert.That(RelativeError(a, b)).IsLessThan(1e-4).Because(shape.Name);
        }
    }

    // ---- Batches

    [Test]
    [Arguments(2, 1)]
    // So many rows that their logits take two parts, and those of half the rows one.
    [Arguments(700, 2)]
    public async Task TwoMicroBatchesEqualOneOfTwiceTheSize(int B, int parts) {
        var T = Small.MaxT;
        var whole = RandomModel(2 * B, T, Purpose.Train);
        await Assert.That(whole.LogitParts).IsEqualTo(parts);
        var (expectedLosses, expectedGradients) = whole.Pass();
        var half = RandomModel(B, T, Purpose.Train);
        await Assert.That(half.LogitParts).IsEqualTo(1);
        var losses = new List<float>();
        for (var part = 0; part < 2; part++) {
            whole.Tokens.AsSpan(part * B * T, B * T).CopyTo(half.Tokens);
            whole.Targets.AsSpan(part * B * T, B * T).CopyTo(half.Targets);
            half.Forward();
            half.Loss(1f / (2 * B * T));
            half.Backward();
            half.MeanLoss();
            losses.AddRange(half.Losses);
        }
        await Assert.That(RelativeError(device.Values(half.Gradients!.All), expectedGradients)).IsLessThan(1e-5);
        await Assert.That(RelativeError(losses.ToArray(), expectedLosses)).IsLessThan(1e-6);
    }

    [Test, Arguments(2), Arguments(1300)]
    public async Task TheLossIsThatOfTheLogits(int B) {
        var model = RandomModel(B, 13, Purpose.Evaluate);
        double[] logits = [.. model.ForwardLogits().SelectMany(row => Doubles(row))];
        model.Loss();
        var mean = model.MeanLoss();
        var expected = Reference.Losses(logits, model.Targets, Small.V, Small.V);
        await Assert.That(RelativeError(model.Losses, expected)).IsLessThan(1e-5);
        await Assert.That(RelativeError(mean, expected.Average())).IsLessThan(1e-6);
    }

    // ---- Weights

    [Test]
    [Arguments(11)]
    // As many elements as are drawn at a time, and a last group that overlaps the one before.
    [Arguments(131_073), Arguments(131_075)]
    public async Task WeightsFromScratchAreDrawnInTheDocumentedOrder(int V) {
        var config = new Config(MaxT: 5, V, Vp: V + 5, L: 2, NH: 1, C: 8);
        var model = new Model(config, device, 1, 5, Purpose.Evaluate);
        model.Load(null, 42);
        var random = new Mt19937(42);
        float[] Normal(int count, double std = 0.02) {
            var values = new float[count];
            random.Normal(values, (float)std);
            return values;
        }
        const int C = 8;
        float[] wte = Normal(V * C), wpe = Normal(5 * C);
        // 0.02/√(2L) for the projections onto the residual stream.
        var layers = Enumerable.Range(0, 2).Select(_ => (Qkvw: Normal(3 * C * C), Attprojw: Normal(C * C, 0.01),
            Fcw: Normal(4 * C * C), Fcprojw: Normal(4 * C * C, 0.01))).ToArray();
        float[] ones = [.. Enumerable.Repeat(1f, 2 * C)], zeros = new float[2 * C];
        float[] expected = [
            .. wte, .. new float[5 * C], .. wpe,
            .. ones, .. zeros, .. layers.SelectMany(layer => layer.Qkvw), .. new float[2 * 3 * C],
            .. layers.SelectMany(layer => layer.Attprojw), .. zeros,
            .. ones, .. zeros, .. layers.SelectMany(layer => layer.Fcw), .. new float[2 * 4 * C],
            .. layers.SelectMany(layer => layer.Fcprojw), .. zeros,
            .. ones[..C], .. zeros[..C],
        ];
        await Same(device.Values(model.Weights.All), expected);
    }

    [Test]
    public async Task ASavedModelLoadsInFp32AndInBf16() {
        // wte has more elements than are copied at a time, and no multiple of them.
        var config = new Config(MaxT: 3, V: 35_003, Vp: 35_008, L: 2, NH: 2, C: 40);
        using var folder = new TemporaryFolder();
        var model = new Model(config, device, 1, 1, Purpose.Evaluate);
        var values = Floats(1, config.ParameterCount);
        device.Write(model.Weights.All, values);
        using (var file = File.Create(folder["fp32.bin"]))
            model.Save(file);
        int[] header = [20240326, 3, 3, 35_003, 2, 2, 40, 35_008];
        WriteFile(folder["expected.bin"], header, MemoryMarshal.AsBytes(values.AsSpan()));
        await Same(File.ReadAllBytes(folder["fp32.bin"]), File.ReadAllBytes(folder["expected.bin"]));
        ushort[] halves = [.. values.Select(value => (ushort)(BitConverter.SingleToUInt32Bits(value) >> 16))];
        header[1] = 5;
        WriteFile(folder["bf16.bin"], header, MemoryMarshal.AsBytes(halves.AsSpan()));
        await Same(Loaded("fp32.bin"), values);
        await Same(Loaded("bf16.bin"), halves.Select(half => BitConverter.UInt32BitsToSingle((uint)half << 16)));

        float[] Loaded(string name) {
            var (file, found) = Config.Open(folder[name]);
            var loaded = new Model(found, device, 1, 1, Purpose.Evaluate);
            loaded.Load(file);
            return device.Values(loaded.Weights.All);
        }
    }

    // ---- Evaluation

    [Test]
    public async Task EvaluationIsTheMeanOfAllBatchesOrOfTheFirst() {
        using var folder = new TemporaryFolder();
        const int B = 2, T = 5;
        ushort[] tokens = [.. Tokens(7, 3 * B * T + 1, Small.V).Select(token => (ushort)token)];
        WriteShard(folder["val.bin"], tokens);
        using var shards = new TokenShards(folder["val.bin"], Small.V);
        var rows = shards.Rows(T, 1, 0);
        var model = RandomModel(B, T, Purpose.Evaluate);
        double[] losses = [.. Enumerable.Range(0, 3).Select(i => {
            for (var j = 0; j < B * T; j++)
                (model.Tokens[j], model.Targets[j]) = (tokens[i * B * T + j], tokens[i * B * T + j + 1]);
            model.Forward();
            model.Loss();
            return model.MeanLoss();
        })];
        var two = Evaluation.Loss(model, shards, rows[..(2 * B)], new Alone());
        var all = Evaluation.Loss(model, shards, rows, new Alone());
        await Assert.That(RelativeError(two, losses[..2].Average())).IsLessThan(1e-9);
        await Assert.That(RelativeError(all, losses.Average())).IsLessThan(1e-9);
    }

    [Test]
    public async Task AccuracyCountsTheQuestionsWhoseLabelHasTheLowestLoss() {
        const int B = 3, T = 9, count = 7;
        var model = RandomModel(B, T, Purpose.Evaluate);
        var alone = RandomModel(1, T, Purpose.Evaluate);
        var random = new Random(4);
        ushort[] Draw(int length) => [.. Enumerable.Range(0, length).Select(_ => (ushort)random.Next(Small.V))];
        var questions = Enumerable.Range(0, count).Select(_ => {
            var context = Draw(random.Next(1, 5));
            ushort[] Row() => [.. context, .. Draw(random.Next(1, 5))];
            return new MultipleChoice(0, context.Length, [Row(), Row(), Row(), Row()]);
        }).ToArray();
        // The loss of a row by itself, from its logits.
        double Score(MultipleChoice question, ushort[] row) {
            for (var t = 0; t < T; t++)
                alone.Tokens[t] = t < row.Length ? row[t] : 0;
            double[] logits = [.. alone.ForwardLogits().SelectMany(row => Doubles(row))];
            var targets = row.Skip(1).Select(token => (int)token).ToArray();
            return Reference.Losses(logits, targets, Small.V, Small.V).Skip(question.ContextLength - 1).Average();
        }
        int[] answers = [.. questions.Select(question => {
            var scores = question.Rows.Select(row => Score(question, row)).ToArray();
            return Array.IndexOf(scores, scores.Min());
        })];
        // All labels are right at first, then one more is wrong each time.
        for (var wrong = 0; wrong <= count; wrong++) {
            var labeled = questions.Select((question, i) =>
                question with { Label = (answers[i] + (i < wrong ? 1 : 0)) % 4 }).ToArray();
            var accuracy = Evaluation.Accuracy(model, labeled, new Alone());
            await Assert.That(accuracy).IsEqualTo((double)(count - wrong) / count);
        }
    }
}

/// <summary>Learning rates worked out by hand.</summary>
public class ScheduleTests {
    /// <summary>Rates at some steps. All schedules warm up from a part of the highest rate, 0.1, to all of it; those
    /// that decay end at 0.01.</summary>
    static readonly (Schedule Schedule, int Warmup, int MaxSteps, (int Step, double Rate)[] Points)[] curves = [
        // After a quarter, a half, three quarters and all of the 80 steps.
        (Schedule.Cosine, 20, 100, [(0, 0.005), (20, 0.1), (40, 0.01 + 0.09 * 0.8535533905932737), (60, 0.055),
            (80, 0.01 + 0.09 * 0.1464466094067262), (100, 0.01)]),
        (Schedule.Linear, 20, 100, [(4, 0.025), (20, 0.1), (40, 0.0775), (60, 0.055), (100, 0.01)]),
        (Schedule.Constant, 20, 100, [(9, 0.05), (20, 0.1), (99, 0.1)]),
        // Down from step 80 on: by √(1/20), √(1/4) and all.
        (Schedule.Wsd, 20, 100, [(19, 0.1), (79, 0.1), (80, 0.1), (81, 0.1 - 0.09 * 0.22360679774997896), (85, 0.055),
            (100, 0.01)]),
        // Without a warm-up, and with nothing but one.
        (Schedule.Cosine, 0, 10, [(0, 0.1)]), (Schedule.Linear, 10, 10, [(9, 0.1)]),
    ];

    public static IEnumerable<(Schedule, int Warmup, int MaxSteps, int Step, double Rate)> Rates() =>
        curves.SelectMany(curve => curve.Points.Select(point =>
            (curve.Schedule, curve.Warmup, curve.MaxSteps, point.Step, point.Rate)));

    [Test, MethodDataSource(nameof(Rates))]
    public async Task TheRateIsAsByHand(Schedule schedule, int warmup, int maxSteps, int step, double rate) {
        var options = Models.Options with { Schedule = schedule, Warmup = warmup, MaxSteps = maxSteps };
        await Assert.That(RelativeError(options.LearningRateAt(step), rate)).IsLessThan(1e-6);
    }
}
