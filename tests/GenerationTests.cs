using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>Generation on a device, beside full forward passes and the choice of the CPU.</summary>
public abstract class GenerationTests(DeviceUnderTest under) : IDisposable {
    protected static readonly Config Small = new(80, 203, 208, 2, 3, 48);
    readonly IDevice device = under.Open();

    public void Dispose() => device.Dispose();

    Model NewModel(int sequences = 1, Config? config = null) =>
        Models.Random(config ?? Small, device, sequences, 1, Purpose.Generate);

    static int[][] Generate(Model model, int[] prompt, Choice choice, int count) =>
        [.. model.Generate(prompt, choice, count, model.B)];

    [Test, Arguments(1, 0f), Arguments(70, 0f), Arguments(80, 0f), Arguments(1, 2f), Arguments(5, 2f)]
    public async Task PicksAsFullForwardPassesDo(int promptLength, float temperature) {
        var (prompt, choice) = (Tokens(5, promptLength, Small.V), new Choice(temperature, 0, 1, 1));
        var count = Small.MaxT - promptLength + 1; // the last token follows a full context
        int[] generated = [.. Generate(NewModel(), prompt, choice, count).Select(tokens => tokens[0])];
        var whole = Models.Random(Small, device, 1, Small.MaxT, Purpose.Evaluate);
        int[] sequence = [.. prompt, .. generated[..^1]];
        sequence.CopyTo(whole.Tokens, 0);
        var rows = whole.ForwardLogits()[(promptLength - 1)..];
        foreach (var (n, row) in rows.Index()) {
            if (device.Precision == DataType.Fp32)
                await Assert.That(generated[n]).IsEqualTo(Cpu.Next(row, choice with { Drawn = n }))
                    .Because($"token {n}");
            else if (temperature == 0) // other kernels may swap two tokens whose logits are this close
                await Assert.That(row[generated[n]])
                    .IsGreaterThan((1 - (float)Verification.Tolerance(device.Precision)) * row.Max());
        }
    }

    [Test, Arguments(7), Arguments(64)]
    public async Task ABatchIsItsSamplesOneByOne(int sequences) {
        var (prompt, choice) = (Tokens(5, 6, Small.V), new Choice(1.5f, 40, 0.95f, 7));
        var together = Generate(NewModel(sequences), prompt, choice, 20);
        var single = NewModel();
        foreach (var sample in (int[])[0, 1, sequences - 1])
            await Same(Generate(single, prompt, choice with { Sample = sample }, 20).Select(tokens => tokens[0]),
                together.Select(tokens => tokens[sample]));
        await Assert.That(together.All(tokens => tokens[0] == tokens[1])).IsFalse();
    }

    [Test, Arguments(1), Arguments(3)]
    public async Task GoesOnFromTheNewestHalfOfAFullContext(int sequences) {
        var (prompt, choice) = (Tokens(5, 30, Small.V), new Choice(0, 0, 1, 1));
        var first = Generate(NewModel(sequences), prompt, choice, 100).Select(tokens => tokens[^1]).ToArray();
        // The 51st token fills the context; what follows depends on its last 40 tokens alone.
        int[] all = [.. prompt, .. first];
        var half = Generate(NewModel(), all[41..81], choice, 40).Select(tokens => tokens[0]);
        await Same(first[51..91], half);
        // A prompt that is too long is cut to half a context.
        await Same(Generate(NewModel(), all[..81], choice, 40).Select(tokens => tokens[0]), half);
    }

    [Test]
    // Heads of other sizes; a vocabulary of less than a block's part; one channel group.
    [Arguments(40, 9, 3, 96, 1), Arguments(17, 300, 4, 48, 2), Arguments(33, 1000, 1, 256, 20)]
    [Arguments(1, 100, 1, 8, 3), Arguments(130, 5000, 5, 640, 33), Arguments(1024, 300, 2, 128, 2)]
    [Arguments(600, 300, 12, 96, 8)] // more heads and parts of a context than a GPU has blocks
    public async Task TakesOtherSizes(int maxT, int V, int heads, int C, int sequences) {
        var config = new Config(maxT, V, (V + 7) / 8 * 8 + 8, 2, heads, C);
        var (prompt, choice) = (Tokens(5, Math.Max(1, maxT / 3), V), new Choice(0, 0, 1, 1));
        var generated = Generate(NewModel(sequences, config), prompt, choice, maxT - prompt.Length + 1);
        var whole = Models.Random(config, device, 1, maxT, Purpose.Evaluate);
        int[] sequence = [.. prompt, .. generated[..^1].Select(tokens => tokens[^1])];
        sequence.CopyTo(whole.Tokens, 0);
        var bound = device.Precision == DataType.Fp32 ? 1e-5f : (float)Verification.Tolerance(device.Precision);
        foreach (var (row, tokens) in whole.ForwardLogits()[(prompt.Length - 1)..].Zip(generated))
            await Assert.That(row[tokens[^1]]).IsGreaterThanOrEqualTo(row.Max() - bound * Math.Abs(row.Max()));
    }

    [Test]
    public async Task ContinuesAsTransformersDoes() {
        var (file, config) = Checkpoints.Open(Golden("transformers"));
        var model = new Model(config, device, 1, 1, Purpose.Generate);
        model.Load(file);
        int[] expected = [.. File.ReadAllText(Golden("transformers/greedy.txt")).Split(' ').Select(int.Parse)];
        var found = Generate(model, expected[..4], new(0, 0, 1, 1), expected.Length - 4).Select(tokens => tokens[0]);
        if (device.Precision == DataType.Fp32) // in bf16 two tokens may be equally likely
            await Same(found, expected[4..]);
    }

    // ---- The choice alone, in a program of nothing else

    static readonly float[] Logits = [1.5f, -2, 3, 0, 2.5f, -1e30f, 0.5f, -1];

    int[] Draw(float[] logits, Choice choice, int count) {
        // The head's product, of one input 1, gives the logits; eight channels are the fewest.
        var w = new float[logits.Length * 8];
        var x = device.Upload([1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 8], device.Precision);
        for (var i = 0; i < logits.Length; i++)
            w[8 * i] = logits[i];
        var head = new Operation(OperationKind.Logits, x, device.Upload(w, [1, logits.Length, 8], device.Precision),
            default, device.Poisoned([1, 1, logits.Length]));
        var next = new int[count];
        device.Decode([head, new(OperationKind.Choose, head.Y, default, default, default)], choice, 0, 0, [0], next);
        return next;
    }

    [Test]
    [Arguments(0f, 0, 1f), Arguments(0f, 5, 0.9f), Arguments(1f, 1, 1f), Arguments(1f, 0, 0.01f)]
    [Arguments(0.001f, 0, 1f)]
    public async Task TakesTheLikeliest(float temperature, int topK, float topP) =>
        await Same(Draw(Logits, new(temperature, topK, topP, 1), 100).Distinct(), [2]);

    [Test]
    [Arguments(1f, 0, 1f, 8), Arguments(1.7f, 0, 1f, 8), Arguments(0.6f, 0, 1f, 8), Arguments(1f, 3, 1f, 3)]
    [Arguments(2f, 100, 1f, 8)]
    // The likeliest tokens have probabilities of about .50, .30, .11, .041 and .025: two reach .6, and three .85.
    [Arguments(1f, 0, 0.6f, 2), Arguments(1f, 0, 0.85f, 3)]
    // Among the first three, the first two have .88.
    [Arguments(1f, 3, 0.87f, 2)]
    public async Task FrequenciesAreThoseOfTheSoftmax(float temperature, int topK, float topP, int kept) {
        const int draws = 100_000;
        var order = Logits.OrderDescending().Take(kept).ToArray();
        var weights = Logits.Select(x => x >= order[^1] ? Math.Exp(x / temperature) : 0).ToArray();
        double[] expected = [.. weights.Select(weight => draws * weight / weights.Sum())];
        var counts = new double[Logits.Length];
        foreach (var token in Draw(Logits, new(temperature, topK, topP, 1), draws))
            counts[token]++;
        // Chi-square, whose mean is the degrees of freedom and whose tail above 40 is below 1e-5 for up to 7.
        var chi = 0.0;
        for (var i = 0; i < counts.Length; i++) {
            await Assert.That(expected[i] > 1e-3 || counts[i] == 0).IsTrue().Because($"token {i}: {counts[i]}");
            chi += expected[i] > 1e-3 ? (counts[i] - expected[i]) * (counts[i] - expected[i]) / expected[i] : 0;
        }
        await Assert.That(chi).IsLessThan(40);
    }

    [Test]
    [Arguments(1f, 50, 1f), Arguments(0.8f, 50, 0.9f), Arguments(1f, 0, 0.9f), Arguments(0.7f, 0, 1f)]
    [Arguments(1f, 1000, 0.5f), Arguments(30f, 0, 0.99f), Arguments(1f, 50256, 1f), Arguments(1f, 7, 1f, 0.5)]
    [Arguments(1f, 0, 0.3f, 0.5)]
    public async Task ChoosesAsTheCpuDoes(float temperature, int topK, float topP, double step = 0) {
        // With a step many logits are alike.
        var logits = Rounded(Floats(3, 50257, 3), DataType.Bf16);
        if (step > 0)
            logits = [.. logits.Select(x => (float)(Math.Round(x / step) * step))];
        var choice = new Choice(temperature, topK, topP, 5, Sample: 0);
        var found = Draw(logits, choice, 40);
        await Same(found, Enumerable.Range(0, 40).Select(n => Cpu.Next(logits, choice with { Drawn = n })));
    }

    [Test]
    public async Task DependsOnTheSeedTheSampleAndTheNumber() {
        var choice = new Choice(1, 0, 1, 7);
        var first = Draw(Logits, choice, 200);
        await Same(Draw(Logits, choice, 200), first);
        await Same(Draw(Logits, choice with { Drawn = 50 }, 100), first[50..150]);
        await Assert.That(Draw(Logits, choice with { Seed = 8 }, 200).SequenceEqual(first)).IsFalse();
        await Assert.That(Draw(Logits, choice with { Sample = 1 }, 200).SequenceEqual(first)).IsFalse();
    }

    [Test, Arguments(float.NaN), Arguments(float.PositiveInfinity)]
    public async Task LogitsMustBeFinite(float value) =>
        await Assert.That(() => Draw([1, value, value, 2], new(1, 0, 1, 7), 1)).Throws<Gpt2Exception>();
}

[InheritsTests]
public sealed class CpuGenerationTests() : GenerationTests(DeviceUnderTest.Cpu) {
    [Test, Arguments(0f, 3), Arguments(1.5f, 1)]
    // The last have rows that fill no vector.
    [Arguments(0f, 6, 7, 35), Arguments(1.5f, 2, 1, 9)]
    public async Task WeightsInBf16GiveTheBitsOfTheirFp32(float temperature, int sequences, int heads = 3, int C = 48) {
        var config = Small with { NH = heads, C = C };
        using var cpu = new Cpu(2);
        var halves = new Model(config, cpu, sequences, 1, Purpose.Generate, type: DataType.Bf16);
        var whole = Models.Random(config, cpu, sequences, 1, Purpose.Generate);
        foreach (var (from, to) in whole.Weights.Tensors.Zip(halves.Weights.Tensors))
            cpu.Write(to, cpu.Values(from));
        var (prompt, choice) = (Tokens(5, 6, config.V), new Choice(temperature, 0, 0.9f, 7));
        await Same(halves.Generate(prompt, choice, 90).SelectMany(tokens => tokens),
            whole.Generate(prompt, choice, 90).SelectMany(tokens => tokens));
        await SameBits(cpu.Values(halves.Weights.Lnfb), cpu.Values(whole.Weights.Lnfb));
    }

    /// <summary>What Cpu.Next says, by sorting and with all the logarithms.</summary>
    static int Slowly(float[] logits, Choice choice) {
        var (T, max) = (choice.Temperature, logits.Max());
        var order = logits.Index().OrderByDescending(x => x.Item).ToArray();
        var selects = choice.TopK > 0 && choice.TopK < logits.Length;
        var least = selects ? order[choice.TopK - 1].Item : float.NegativeInfinity;
        least = MathF.Max(least, choice.TopP < 1 ? max + T * MathF.Log((1 - choice.TopP) / logits.Length) : least);
        order = [.. order.TakeWhile(x => x.Item >= least)];
        if (choice.TopP < 1) {
            ulong Weight(float logit) => (ulong)(MathF.Exp((logit - max) / T) * (1L << 40));
            var all = order.Aggregate(0ul, (sum, x) => sum + Weight(x.Item));
            var (left, sum, i) = ((ulong)(choice.TopP * (double)all), 0ul, 0);
            do
                sum += Weight(order[i].Item);
            while (sum < left && ++i < order.Length);
            order = [.. order.TakeWhile(x => x.Item >= order[i].Item)];
        }
        static uint Bits(uint counter, uint seed) {
            for (var round = 0; round < 2; round++) {
                counter = (counter ^ seed) * 0x9e3779b9;
                counter = (counter ^ counter >> 16) * 0x85ebca6b;
                counter = (counter ^ counter >> 13) * 0xc2b2ae35;
                counter ^= counter >> 16;
            }
            return counter;
        }
        var seed = Bits((uint)choice.Drawn, Bits((uint)choice.Sample, choice.Seed));
        float Gumbel(int token) => -MathF.Log(-MathF.Log(((Bits((uint)token, seed) >> 9) + 0.5f) / (1 << 23)));
        return order.MaxBy(x => (x.Item / T + Gumbel(x.Index), -x.Index)).Index;
    }

    [Test, Arguments(1, 0.0), Arguments(100, 0.0), Arguments(5000, 0.0), Arguments(5000, 0.5)]
    public async Task ChoosesAsBySortingAndWithAllLogarithms(int V, double step) {
        for (var n = 0; n < 400; n++) {
            var logits = Floats(n, V, 0.1 * (1 << n % 7));
            if (step > 0)
                logits = [.. logits.Select(x => (float)(Math.Round(x / step) * step))];
            var (topK, topP) = (((int[])[0, 1, 50, V, V - 1, 10 * V])[n % 6],
                ((float[])[1, 0.9f, 1e-13f, 0.9999999f])[n / 6 % 4]);
            var choice = new Choice(((float[])[1, 0.3f, 5])[n % 7 % 3], topK, topP, 3, n, n);
            await Assert.That(Cpu.Next(logits, choice)).IsEqualTo(Slowly(logits, choice)).Because($"{choice}");
        }
    }

    [Test, Arguments(1), Arguments(2), Arguments(100)]
    public async Task AnExceptionOnAnyThreadReachesTheCaller(int count) {
        using var workers = new Workers(3);
        for (var thrower = 0; thrower < Math.Min(count, 10); thrower++) {
            await Assert.That(() => workers.Run(count, thrower, static (thrower, i) => {
                if (i == thrower)
                    throw new Gpt2Exception("this");
            })).Throws<Gpt2Exception>();
            var calls = new int[count];
            workers.Run(count, calls, static (calls, i) => calls[i]++);
            await Same(calls, Enumerable.Repeat(1, count));
        }
    }
}

[Category("gpu"), RequiresGpu, NotInParallel("gpu"), InheritsTests]
[MethodDataSource(typeof(DeviceUnderTest), nameof(DeviceUnderTest.Precisions))]
public sealed class GpuGenerationTests(DeviceUnderTest gpu) : GenerationTests(gpu) {
    [Test] // more than four for each thread of a block; slow on a CPU
    public Task TakesManyChannels() => TakesOtherSizes(12, 50, 20, 1280, 4);
}
