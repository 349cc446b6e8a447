using System.Globalization;
using System.Runtime.InteropServices;
using System.Text.RegularExpressions;
using Microsoft.Extensions.Logging.Abstractions;
using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>The model's tests on the CPU.</summary>
[InheritsTests]
[MethodDataSource(typeof(Support), nameof(Support.Devices))]
public sealed class CpuModelTests(DeviceUnderTest deviceUnderTest) : ModelTests(deviceUnderTest);

/// <summary>The whole model and its training in fp32 against PyTorch's, and against itself where two ways lead to one
/// result.</summary>
public abstract class ModelTests(DeviceUnderTest deviceUnderTest) : IDisposable {
    static readonly Config Small = new(MaxT: 13, V: 67, Vp: 80, L: 3, NH: 3, C: 24);

    readonly IDevice device = deviceUnderTest.Open();

    public void Dispose() => device.Dispose();

    /// <summary>A model with a batch of random tokens and with random weights, biases included.</summary>
    Model RandomModel(Config config, int B, int T, Purpose purpose, int recompute = 0) {
        var model = new Model(config, device, B, T, purpose, recompute);
        device.Write(model.Weights.All, Floats(1, model.Weights.All.Count, 0.3));
        // Padded rows of wte must not matter.
        device.Write(model.Weights.Wte[0].Slice(config.V, config.Vp - config.V),
            Enumerable.Repeat(1000f, (config.Vp - config.V) * config.C).ToArray());
        Tokens(2, B * T, config.V).CopyTo(model.Tokens, 0);
        Tokens(3, B * T, config.V).CopyTo(model.Targets, 0);
        return model;
    }

    /// <summary>The gradients of the mean loss of the model's batch.</summary>
    float[] Gradients(Model model) {
        model.Forward();
        model.Loss(1f / model.Tokens.Length);
        model.Backward();
        return device.Values(model.Gradients!.All);
    }

    // ---- PyTorch

    [Test]
    public async Task LogitsLossAndGradientsEqualPyTorchs() {
        var results = Verification.Run(Golden("model.bin"), Golden("state.bin"), device).ToArray();
        string[] parameters = [.. Config.Of("d12")!.Parameters.Select(shape => shape.Name)];
        await Same(results.Select(result => result.Name), ["logits", "loss", .. parameters]);
        foreach (var (name, largest, relative) in results) {
            await Assert.That(double.IsFinite(largest) && relative is >= 0 and < 1e-4).IsTrue()
                .Because($"{name} differs by {relative:g3}, at most by {largest:g3}");
        }
    }

    [Test]
    [Arguments("logits", 0, 0.1f)]
    [Arguments("loss", 1, 0.01f)]
    [Arguments("wte", 2, 0.01f)]
    [Arguments("qkvb", 7, 0.01f)]
    [Arguments("lnfb", 17, 0.01f)]
    [Arguments("lnfb", 17, float.NaN)]
    public async Task VerificationFindsAWrongNumber(string name, int index, float change) {
        using var folder = new TemporaryFolder();
        var numbers = MemoryMarshal.Cast<byte, float>(File.ReadAllBytes(Golden("state.bin"))).ToArray();
        // The last number of what follows 2·21 tokens and targets: logits, loss, the parameters' gradients.
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

    [Test]
    [Arguments(OptimizerKind.AdamW)]
    [Arguments(OptimizerKind.Muon)]
    public Task TenStepsOfTrainingEqualPyTorchs(OptimizerKind optimizer) =>
        TenStepsOfTrainingEqualPyTorchs(device, optimizer);

    /// <summary>The same in any precision, each within its bound.</summary>
    internal static async Task TenStepsOfTrainingEqualPyTorchs(IDevice device,
        OptimizerKind optimizer = OptimizerKind.AdamW) {
        var bound = Verification.Tolerance(device.Precision);
        using var folder = new TemporaryFolder();
        var options = new TrainOptions(Golden("tokens_train.bin"), Golden("tokens_val.bin"), Golden("model.bin"),
            folder["run"], B: 2, T: 21, TotalBatch: 3 * 2 * 21, MaxSteps: 10, LearningRate: 1e-2f, Warmup: 4,
            FinalFraction: 0.1f, WeightDecay: 0.1f, Schedule.Cosine, ValEvery: 0, ValBatches: 5, SampleEvery: 0,
            GenTokens: 4, CheckpointEvery: 0, Keep: 1, Resume: false, Recompute: 0, Overfit: false, Shuffle: false,
            Seed: 42, Optimizer: optimizer);
        using var output = new StringWriter(CultureInfo.InvariantCulture);
        using (var trainer = new Trainer(options, device, output, NullLogger.Instance))
            trainer.Run();
        var lines = File.ReadAllLines(Golden(optimizer == OptimizerKind.Muon ? "train_muon.txt" : "train.txt"));
        var found = Regex.Matches(output.ToString(), @"step +(\d+)/10 \| loss (\S+) \| norm (\S+) \| lr (\S+) ");
        await Assert.That(found.Count).IsEqualTo(10);
        for (var i = 0; i < 10; i++) {
            var expected = lines[i].Split(' ').Select(Parse).ToArray();
            await Assert.That(Parse(found[i].Groups[1].Value)).IsEqualTo(expected[0]);
            await Near(found[i].Groups[2].Value, expected[1], bound);
            await Near(found[i].Groups[3].Value, expected[2], bound);
            // Printed with three digits, and here with all.
            await Near(found[i].Groups[4].Value, expected[3], 5e-3);
            await Assert.That(RelativeError(options.LearningRateAt(i), expected[3])).IsLessThan(1e-6);
        }
        var validation = Regex.Match(output.ToString(), @"val loss (\S+)").Groups[1].Value;
        await Near(validation, Parse(lines[10].Split(' ')[1]), bound);
        if (device.Precision == DataType.Fp32 && optimizer == OptimizerKind.AdamW)
            await CompareWeights(folder[Path.Combine("run", "model_00000010.bin")], Golden("trained.bin"));

        static double Parse(string text) => double.Parse(text, CultureInfo.InvariantCulture);
        static async Task Near(string found, double expected, double bound) =>
            await Assert.That(RelativeError(Parse(found), expected)).IsLessThan(bound);
    }

    /// <summary>Requires two checkpoints' tensors to be near, but for the noise that golden.py tells of.</summary>
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

    // ---- Two ways to one result

    [Test]
    [Arguments(1)]
    [Arguments(2)]
    public async Task RecomputationGivesTheSameBits(int recompute) {
        var kept = RandomModel(Small, 2, 13, Purpose.Train);
        var recomputed = RandomModel(Small, 2, 13, Purpose.Train, recompute);
        await Same(Bits(Gradients(recomputed)), Bits(Gradients(kept)));
        await Assert.That(recomputed.Memory.Sum(part => part.Bytes)).IsLessThan(kept.Memory.Sum(part => part.Bytes));
    }

    [Test]
    public async Task EvaluationGivesTheSameBitsAsTraining() {
        var train = RandomModel(Small, 2, 13, Purpose.Train);
        var evaluate = RandomModel(Small, 2, 13, Purpose.Evaluate);
        foreach (var model in (Model[])[train, evaluate]) {
            model.Forward();
            model.Loss();
            model.MeanLoss();
        }
        await Same(Bits(evaluate.Losses), Bits(train.Losses));
    }

    static IEnumerable<int> Bits(float[] values) => values.Select(BitConverter.SingleToInt32Bits);

    [Test]
    [Arguments(2, 1)]
    // So many rows that their logits are computed in two parts, and by halves in one.
    [Arguments(700, 2)]
    public async Task TwoMicroBatchesEqualOneOfTwiceTheSize(int B, int parts) {
        var T = Small.MaxT;
        var whole = RandomModel(Small, 2 * B, T, Purpose.Train);
        await Assert.That(whole.LogitParts).IsEqualTo(parts);
        var expected = Gradients(whole);
        var half = RandomModel(Small, B, T, Purpose.Train);
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
        await Assert.That(RelativeError(device.Values(half.Gradients!.All), expected)).IsLessThan(1e-5);
        whole.MeanLoss();
        await Assert.That(RelativeError(whole.Losses, losses.ToArray())).IsLessThan(1e-6);
    }

    [Test]
    [Arguments(2)]
    [Arguments(1300)]
    public async Task TheLossIsThatOfTheLogits(int B) {
        var model = RandomModel(Small, B, 13, Purpose.Evaluate);
        model.Forward();
        var logits = Enumerable.Range(0, model.LogitParts).SelectMany(i => device.Values(model.Logits(i))).ToArray();
        model.Loss();
        var mean = model.MeanLoss();
        var expected = Reference.Losses(Doubles(logits), model.Targets, Small.V, Small.Vp);
        await Assert.That(RelativeError(model.Losses, expected)).IsLessThan(1e-5);
        await Assert.That(RelativeError(mean, expected.Average())).IsLessThan(1e-6);
    }

    // ---- Generation

    /// <summary>What a sampler picks after each position of a sequence, from one on, by one forward pass.</summary>
    int[] Picks(Model model, int[] sequence, int first, Sampler sampler) {
        sequence.CopyTo(model.Tokens, 0);
        model.Forward();
        var rows = device.Values(model.Logits(0)).Chunk(Small.Vp);
        return [.. rows.Take(sequence.Length).Skip(first).Select(row => sampler.Next(row[..Small.V]))];
    }

    [Test]
    [Arguments(1, 0f)]
    [Arguments(5, 0f)]
    [Arguments(13, 0f)]
    // Random picks from the same seed, whose sequence is a more varied one.
    [Arguments(1, 2f)]
    [Arguments(5, 2f)]
    public async Task GenerationPicksAsFullForwardPassesDo(int promptLength, float temperature) {
        var model = RandomModel(Small, 1, 1, Purpose.Generate);
        var whole = RandomModel(Small, 1, Small.MaxT, Purpose.Evaluate);
        var prompt = Tokens(5, promptLength, Small.V);
        Sampler NewSampler() => new(temperature, 0, 1, 1);
        int[] generated = [.. model.Generate(prompt, NewSampler())];
        // The last token follows a full context.
        await Assert.That(generated.Length).IsEqualTo(Small.MaxT - promptLength + 1);
        await Same(generated, Picks(whole, [.. prompt, .. generated[..^1]], promptLength - 1, NewSampler()));
        // Nothing of the first time is left when it is done again, after the beginning of another prompt.
        _ = model.Generate([1, 2, 3], NewSampler()).First();
        await Same(model.Generate(prompt, NewSampler()), generated);
    }

    // ---- Weights

    [Test]
    [Arguments(11)]
    // Just as many elements as are drawn at a time, and with a last group that overlaps the one before.
    [Arguments(131_073)]
    [Arguments(131_075)]
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
        // 0.02/√(2L) for what adds to the residual stream.
        float[] wte = Normal(V * C), wpe = Normal(5 * C);
        float[] qkvw = Normal(3 * C * C), attprojw = Normal(C * C, 0.01);
        float[] fcw = Normal(4 * C * C), fcprojw = Normal(4 * C * C, 0.01);
        qkvw = [.. qkvw, .. Normal(3 * C * C)];
        attprojw = [.. attprojw, .. Normal(C * C, 0.01)];
        fcw = [.. fcw, .. Normal(4 * C * C)];
        fcprojw = [.. fcprojw, .. Normal(4 * C * C, 0.01)];
        float[] ones = [.. Enumerable.Repeat(1f, 2 * C)], zeros = new float[2 * C];
        float[] expected = [
            .. wte, .. new float[5 * C], .. wpe,
            .. ones, .. zeros, .. qkvw, .. new float[2 * 3 * C], .. attprojw, .. zeros,
            .. ones, .. zeros, .. fcw, .. new float[2 * 4 * C], .. fcprojw, .. zeros,
            .. ones[..C], .. zeros[..C],
        ];
        await Same(device.Values(model.Weights.All), expected);
    }

    [Test]
    public async Task ASavedModelLoadsInFp32AndInBf16() {
        // wte has more elements than pass through the host at a time, and not a multiple of them.
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
        var model = RandomModel(Small, B, T, Purpose.Evaluate);
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
        var model = RandomModel(Small, B, T, Purpose.Evaluate);
        var alone = RandomModel(Small, 1, T, Purpose.Evaluate);
        var random = new Random(4);
        ushort[] Draw(int length) => [.. Enumerable.Range(0, length).Select(_ => (ushort)random.Next(Small.V))];
        var questions = Enumerable.Range(0, count).Select(_ => {
            var context = Draw(random.Next(1, 5));
            ushort[] Row() => [.. context, .. Draw(random.Next(1, 5))];
            return new MultipleChoice(0, context.Length, [Row(), Row(), Row(), Row()]);
        }).ToArray();
        // Each row by itself, from its logits.
        double Score(MultipleChoice question, ushort[] row) {
            for (var t = 0; t < T; t++)
                alone.Tokens[t] = t < row.Length ? row[t] : 0;
            alone.Forward();
            var logits = Doubles(device.Values(alone.Logits(0)));
            var targets = row.Skip(1).Select(token => (int)token).ToArray();
            return Reference.Losses(logits, targets, Small.V, Small.Vp).Skip(question.ContextLength - 1).Average();
        }
        int[] answers = [.. questions.Select(question => {
            var scores = question.Rows.Select(row => Score(question, row)).ToArray();
            return Array.IndexOf(scores, scores.Min());
        })];
        // The right answers, with one wrong one more each time.
        for (var wrong = 0; wrong <= count; wrong++) {
            var labeled = questions.Select((question, i) =>
                question with { Label = (answers[i] + (i < wrong ? 1 : 0)) % 4 }).ToArray();
            var accuracy = Evaluation.Accuracy(model, labeled, new Alone());
            await Assert.That(accuracy).IsEqualTo((double)(count - wrong) / count);
        }
    }
}

/// <summary>The choice of the next token.</summary>
public class SamplerTests {
    static readonly float[] Logits = [1.5f, -2, 3, 0, 2.5f, -1e30f, 0.5f, -1];

    /// <summary>The probabilities of the softmax at a temperature, of the likeliest k tokens alone.</summary>
    static double[] Probabilities(double temperature, int k) {
        var order = Logits.Order().Reverse().Take(k).ToArray();
        var weights = Logits.Select(logit => logit >= order[^1] ? Math.Exp(logit / temperature) : 0).ToArray();
        return [.. weights.Select(weight => weight / weights.Sum())];
    }

    static int[] Draw(Sampler sampler, int count) =>
        [.. Enumerable.Range(0, count).Select(_ => sampler.Next([.. Logits]))];

    [Test]
    [Arguments(0f, 0, 1f)]
    [Arguments(0f, 5, 0.9f)]
    [Arguments(1f, 1, 1f)]
    [Arguments(1f, 0, 0.01f)]
    [Arguments(0.001f, 0, 1f)]
    public async Task TakesTheLikeliest(float temperature, int topK, float topP) =>
        await Same(Draw(new Sampler(temperature, topK, topP, 1), 100).Distinct(), [2]);

    [Test]
    [Arguments(1f, 0, 1f, 8)]
    [Arguments(1.7f, 0, 1f, 8)]
    [Arguments(0.6f, 0, 1f, 8)]
    [Arguments(1f, 3, 1f, 3)]
    [Arguments(2f, 100, 1f, 8)]
    // The likeliest tokens have probabilities of about .50, .30, .11, .041, .025: .5 is not .6, and .5 and .3 are more.
    [Arguments(1f, 0, 0.6f, 2)]
    [Arguments(1f, 0, 0.85f, 3)]
    // Of the first three alone, the first two have .88.
    [Arguments(1f, 3, 0.87f, 2)]
    public async Task FrequenciesAreThoseOfTheSoftmax(float temperature, int topK, float topP, int kept) {
        const int draws = 20_000;
        var counts = new int[Logits.Length];
        foreach (var token in Draw(new Sampler(temperature, topK, topP, 1), draws))
            counts[token]++;
        var expected = Probabilities(temperature, kept);
        for (var i = 0; i < Logits.Length; i++) {
            // Five standard deviations of a binomial, which is exactly zero for a token that is left out.
            var deviation = Math.Sqrt(draws * expected[i] * (1 - expected[i]));
            await Assert.That(Math.Abs(counts[i] - draws * expected[i]) <= 5 * deviation).IsTrue()
                .Because($"token {i} was drawn {counts[i]} times, not {draws * expected[i]:f0}");
        }
    }

    [Test]
    public async Task DependsOnTheSeedAlone() {
        int[] first = Draw(new Sampler(1, 0, 1, 7), 200), second = Draw(new Sampler(1, 0, 1, 7), 200);
        await Same(second, first);
        await Assert.That(Draw(new Sampler(1, 0, 1, 8), 200).SequenceEqual(first)).IsFalse();
    }
}

/// <summary>Learning rates worked out by hand.</summary>
public class ScheduleTests {
    static TrainOptions Options(Schedule schedule, int warmup, int maxSteps) => new("", "", null, "", 1, 1, 1, maxSteps,
        LearningRate: 0.1f, warmup, FinalFraction: 0.1f, 0, schedule, 0, 0, 0, 0, 0, 1, false, 0, false, false, 0);

    [Test]
    // All warm up from a part of the highest rate to all of it.
    [Arguments(Schedule.Cosine, 20, 100, 0, 0.005)]
    [Arguments(Schedule.Linear, 20, 100, 4, 0.025)]
    [Arguments(Schedule.Constant, 20, 100, 9, 0.05)]
    [Arguments(Schedule.Wsd, 20, 100, 19, 0.1)]
    // 80 steps from 0.1 to 0.01: a quarter, a half, three quarters and all of the way.
    [Arguments(Schedule.Cosine, 20, 100, 20, 0.1)]
    [Arguments(Schedule.Cosine, 20, 100, 40, 0.01 + 0.09 * 0.8535533905932737)]
    [Arguments(Schedule.Cosine, 20, 100, 60, 0.055)]
    [Arguments(Schedule.Cosine, 20, 100, 80, 0.01 + 0.09 * 0.1464466094067262)]
    [Arguments(Schedule.Cosine, 20, 100, 100, 0.01)]
    [Arguments(Schedule.Linear, 20, 100, 20, 0.1)]
    [Arguments(Schedule.Linear, 20, 100, 40, 0.0775)]
    [Arguments(Schedule.Linear, 20, 100, 60, 0.055)]
    [Arguments(Schedule.Linear, 20, 100, 100, 0.01)]
    [Arguments(Schedule.Constant, 20, 100, 20, 0.1)]
    [Arguments(Schedule.Constant, 20, 100, 99, 0.1)]
    // Down from step 80 on: by √(1/20), √(1/4) and all.
    [Arguments(Schedule.Wsd, 20, 100, 79, 0.1)]
    [Arguments(Schedule.Wsd, 20, 100, 80, 0.1)]
    [Arguments(Schedule.Wsd, 20, 100, 81, 0.1 - 0.09 * 0.22360679774997896)]
    [Arguments(Schedule.Wsd, 20, 100, 85, 0.055)]
    [Arguments(Schedule.Wsd, 20, 100, 100, 0.01)]
    // Without a warm-up, and with nothing but one.
    [Arguments(Schedule.Cosine, 0, 10, 0, 0.1)]
    [Arguments(Schedule.Linear, 10, 10, 9, 0.1)]
    public async Task TheRateIsAsByHand(Schedule schedule, int warmup, int maxSteps, int step, double expected) =>
        await Assert.That(RelativeError(Options(schedule, warmup, maxSteps).LearningRateAt(step), expected))
            .IsLessThan(1e-6);
}
