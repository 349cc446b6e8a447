using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>Skips a test, visibly, where there is no GPU or the build has no kernels.</summary>
sealed class RequiresGpuAttribute() : SkipAttribute("there is no GPU, or the build is one without kernels") {
    static readonly bool isAvailable = Cuda.IsAvailable;

    public override Task<bool> ShouldSkip(TestRegisteredContext context) => Task.FromResult(!isAvailable);
}

/// <summary>The CPU, or the GPU in one precision.</summary>
/// <param name="Open">Opens a device that the caller closes.</param>
public sealed record DeviceUnderTest(string Name, DataType Precision, Func<IDevice> Open) {
    readonly Lazy<IDevice> shared = new(Open);

    /// <summary>A device for all tests, open to the end, since opening a GPU takes longer than most tests.</summary>
    public IDevice Shared => shared.Value;

    public static DeviceUnderTest Cpu { get; } = new("CPU", DataType.Fp32, () => new Cpu());
    public static DeviceUnderTest Fp32 { get; } = new("CUDA fp32", DataType.Fp32, () => new Cuda(DataType.Fp32));
    public static DeviceUnderTest Bf16 { get; } = new("CUDA bf16", DataType.Bf16, () => new Cuda(DataType.Bf16));

    /// <summary>With the attention that runs on any GPU, where a Hopper has its own.</summary>
    static DeviceUnderTest PortableBf16 { get; } =
        new("CUDA bf16 portable", DataType.Bf16, () => new Cuda(DataType.Bf16, portable: true));

    /// <summary>The GPU in each precision.</summary>
    public static IEnumerable<Func<DeviceUnderTest>> Precisions() => [() => Fp32, () => Bf16];

    /// <summary>The GPU in each precision, and with portable attention.</summary>
    public static IEnumerable<Func<DeviceUnderTest>> All() => [() => Fp32, () => Bf16, () => PortableBf16];

    /// <summary>Pairs of devices: the second resumes a run of the first.</summary>
    public static IEnumerable<Func<(DeviceUnderTest From, DeviceUnderTest To)>> Moves() => [
        () => (Bf16, Cpu), () => (Bf16, Fp32), () => (Cpu, Bf16), () => (Fp32, Bf16), () => (Fp32, Cpu),
        () => (Cpu, Fp32), () => (Fp32, Fp32), () => (Bf16, Bf16), () => (PortableBf16, PortableBf16),
    ];

    /// <summary>What the tests' names show.</summary>
    public override string ToString() => Name;

    /// <summary>Runs an operation on the CPU, and twice on this device on the same values. The results must be near the
    /// CPU's, and have the same bits both times.</summary>
    /// <returns>This device's results by name.</returns>
    internal async Task<Dictionary<string, float[]>> Compare(Action<Arrays> operation) {
        var draws = new Dictionary<(int, int, double), float[]>();
        Dictionary<string, (float[] Values, double Bound)> Run(IDevice device) {
            var arrays = new Arrays(device, Precision, draws);
            operation(arrays);
            return arrays.Results();
        }
        using var cpu = new Cpu();
        var (expected, found, again) = (Run(cpu), Run(Shared), Run(Shared));
        foreach (var (name, (values, bound)) in found) {
            await Assert.That(RelativeError(values, expected[name].Values)).IsLessThan(bound).Because(name);
            await SameBits(values, again[name].Values, name);
        }
        return found.ToDictionary(result => result.Key, result => result.Value.Values);
    }
}

/// <summary>Every operation of the GPU but attention against the CPU's, which OperationTests prove.</summary>
[Category("gpu"), RequiresGpu, NotInParallel("gpu"), InheritsTests]
[MethodDataSource(typeof(DeviceUnderTest), nameof(DeviceUnderTest.Precisions))]
public sealed class GpuOperationTests(DeviceUnderTest gpu)
    : KnownResultTests(gpu.Shared, gpu.Precision, gpu.Open, multiple: 8) {
    /// <summary>For sums of so many terms that roundings add up, and for tensor cores, which truncate what they shift
    /// out.</summary>
    const double SumBound = 3e-5;

    readonly DataType type = gpu.Precision;

    // ---- Memory

    [Test]
    public async Task AModelThatDoesNotFitIsRefusedWithABatchThatDoes() {
        var error = Assert.Throws<Gpt2Exception>(() =>
            new Model(Config.Of("d12")!, device, B: 1 << 16, T: 1024, Purpose.Train));
        await Assert.That(error.Message).Matches(
            @"^memory: expected \S+ GB free on .+, found \S+ GB, \S+ GB too little; --batch \d+, or .+ fits$");
    }

    [Test]
    public async Task AProfileHasTheCallsAndTheirTime() {
        using var own = gpu.Open();
        Tensor x = own.Upload(Floats(1, 4_096), type), y = own.Poisoned([4_096], type);
        own.Profile = new Profile();
        for (var i = 0; i < 3; i++)
            own.Gelu(x, y);
        own.Synchronize();
        var operation = own.Profile.Operations.Values.Single();
        await Assert.That(operation.Calls).IsEqualTo(3);
        await Assert.That(operation.Seconds).IsGreaterThan(0);
    }

    [Test]
    public async Task NumbersAreReadBackAsWrittenOrTheNearestInBf16() {
        (float Value, float InBf16)[] numbers = [
            (0, 0), (-0f, -0f), (-1.5f, -1.5f), (float.PositiveInfinity, float.PositiveInfinity),
            // Ties, which go to even, and numbers next to a tie.
            (1 + 1 / 256f, 1), (1 + 3 / 256f, 1 + 1 / 64f), (-1 - 3 / 256f, -1 - 1 / 64f),
            (1 + 1 / 256f + 1e-6f, 1 + 1 / 128f), (1 + 3 / 256f - 1e-6f, 1 + 1 / 128f),
            // Beyond the largest number, and near the smallest.
            (float.MinValue, float.NegativeInfinity), (float.Epsilon, 0), (1e-40f, 9.1835e-41f),
        ];
        // A NaN whose payload is in the half that bf16 drops.
        var nan = BitConverter.Int32BitsToSingle(0x7f800001);
        float[] values = [.. numbers.Select(number => number.Value), nan];
        float[] expected = [.. numbers.Select(number => type == DataType.Fp32 ? number.Value : number.InBf16)];
        var found = device.Download(device.Upload(values, type));
        await Same(found[..^1].Select(BitConverter.SingleToInt32Bits), expected.Select(BitConverter.SingleToInt32Bits));
        await Assert.That(float.IsNaN(found[^1])).IsTrue();
    }

    [Test]
    public async Task ManyNumbersAreReadBack() {
        // More values than are copied at a time.
        float[] values = [.. Enumerable.Range(0, 9_000_005).Select(i => i * 0.37f)];
        var found = device.Download(device.Upload(values, type));
        await SameBits(found, Rounded(values, type));
    }

    [Test]
    public async Task SizesThatNoKernelTakesAreRefused() {
        // Twenty columns are no multiple of eight. One row is aligned: a kernel that takes it does other tests no harm.
        Tensor x = device.Poisoned([20], type), statistics = device.Poisoned([65_536, 1, 2]);
        // Too many channels, channels of a head, and sequences.
        Tensor wide = device.Poisoned([4104], type), y = device.Poisoned([65_536, 1, 8], type);
        Tensor wideQkv = device.Poisoned([3 * 264], type), qkv = device.Poisoned([65_536, 1, 24], type);
        Action[] operations = [
            () => device.Embed([0], x, x, x), () => device.LayerNorm(x, x, x, x, statistics),
            () => device.Attention(device.Poisoned([60], type), 1, x, statistics),
            () => device.Classify(x, [0], 20, statistics, 1),
            () => device.Embed([0], wide, wide, wide), () => device.LayerNorm(wide, wide, wide, wide, statistics),
            () => device.LayerNormBackward(wide, wide, wide, statistics, wide, wide, wide, default),
            () => device.Attention(wideQkv, 1, device.Poisoned([264], type), statistics),
            () => device.Attention(qkv, 1, y, statistics),
            () => device.AttentionBackward(y, qkv, y, statistics, 1, qkv, default),
        ];
        foreach (var (i, operation) in operations.Index())
            await Assert.That(operation).Throws<Gpt2Exception>().Because($"operation {i}");
    }

    // ---- Embedding

    [Test]
    [Arguments(1, 1, 8), Arguments(3, 7, 72), Arguments(1, 3, 24), Arguments(1, 1, 1600), Arguments(2, 130, 1032)]
    [Arguments(4, 250, 768), Arguments(1, 70, 4096)]
    public Task Embed(int B, int T, int C) => gpu.Compare(a => {
        const int V = 300;
        a.Device.Embed(Tokens(1, B * T, V), a.Input(2, [V, C]), a.Input(3, [T, C]), a.Output("x", [B, T, C]));
    });

    [Test]
    [Arguments(1, 1, 8, 5), Arguments(2, 5, 24, 5), Arguments(3, 7, 72, 300), Arguments(4, 250, 768, 300)]
    [Arguments(1, 1000, 1600, 40), Arguments(2, 500, 24, 50304), Arguments(2, 35, 4096, 70)]
    [Arguments(1, 40_000, 8, 131072)]
    public async Task EmbedBackward(int B, int T, int C, int V) {
        // Every other row has the same token, the rest random ones of the vocabulary's lower half. Positions from T on
        // get no gradient.
        int[] tokens = [.. Tokens(1, B * T, (V + 1) / 2).Select((token, i) => i % 2 == 0 ? V / 3 : token)];
        var results = await gpu.Compare(a => a.Device.EmbedBackward(tokens, a.Input(2, [B, T, C]),
            a.Sum("dwte", 3, [V, C]), a.Sum("dwpe", 4, [T + 3, C])));
        // Tokens that do not occur must get no gradient at all, which the norm of the whole would hide.
        var (dwte, before) = (results["dwte"], Floats(3, V * C));
        for (var token = 0; token < V; token++) {
            var same = dwte.AsSpan(token * C, C).SequenceEqual(before.AsSpan(token * C, C));
            await Assert.That(same).IsEqualTo(!tokens.Contains(token)).Because($"token {token}");
        }
    }

    // ---- Layer norm

    /// <summary>Rows and C: ragged ends of warps and blocks, and more rows than the blocks take at once.</summary>
    public static IEnumerable<(int Rows, int C)> Rows() =>
        [(1, 8), (3, 24), (7, 72), (130, 768), (5, 1032), (1000, 1600), (9000, 24), (300, 4096)];

    [Test, MethodDataSource(nameof(Rows))]
    public Task LayerNorm(int rows, int C) => gpu.Compare(a => a.Device.LayerNorm(
        a.Input(1, [rows, C], 2), a.Input(2, [C]), a.Input(3, [C]), a.Output("y", [rows, C]),
        a.Fp32Output("mean rstd", [rows, 2])));

    [Test, MethodDataSource(nameof(Rows))]
    public async Task LayerNormBackward(int rows, int C) {
        var x = Rounded(Floats(1, rows * C, 2), type);
        float[] statistics = [.. Reference.Statistics(Doubles(x), C).Select(value => (float)value)];
        foreach (var hasBias in (bool[])[false, true]) {
            // dx starts small, so as not to hide errors in what is added.
            await gpu.Compare(a => a.Device.LayerNormBackward(a.Input(2, [rows, C]), a.Input(x, [rows, C]),
                a.Input(3, [C]), a.Device.Upload(statistics, [rows, 2]), a.Result("dx", a.Input(4, [rows, C], 0.3)),
                a.Sum("dw", 5, [C]), a.Sum("db", 6, [C]), hasBias ? a.Sum("dbias", 7, [C]) : default));
        }
    }

    // ---- Linear and GELU

    /// <summary>Rows, C and OC of the products: each size is ragged in some; 50304 is the classifier's OC.</summary>
    public static IEnumerable<(int Rows, int C, int OC)> Products() => [
        (1, 8, 8), (3, 24, 72), (7, 72, 24), (1, 768, 2304), (65, 200, 8), (97, 96, 384), (129, 1032, 200),
        (1000, 72, 1032), (13, 1600, 1024), (16, 64, 50304),
        // Hopper has its own kernels from 512 rows on: a part of a tile, and more tiles than blocks.
        (512, 8, 8), (520, 1600, 200), (18_000, 136, 208),
    ];

    [Test, MethodDataSource(nameof(Products))]
    public Task Linear(int rows, int C, int OC) => gpu.Compare(a => {
        var (x, w, b) = (a.Input(1, [rows, C]), a.Input(2, [OC, C]), a.Input(3, [OC]));
        a.Device.Linear(x, w, b, a.Output("y", [rows, OC]));
        a.Device.Linear(x, w, default, a.Output("withoutBias", [rows, OC]));
        a.Device.LinearResidual(x, w, b, a.Input(4, [rows, OC]), a.Output("withResidual", [rows, OC]));
    });

    [Test, MethodDataSource(nameof(Products))]
    public Task LinearBackward(int rows, int C, int OC) => gpu.Compare(a => {
        var (dy, x, w) = (a.Input(1, [rows, OC]), a.Input(2, [rows, C]), a.Input(3, [OC, C]));
        var dx = a.Output("dx", [rows, C], fp32: OC > 10_000 ? SumBound : Arrays.Fp32Bound);
        a.Device.LinearBackward(dy, x, w, dx, a.Sum("dw", 4, [OC, C], SumBound));
    });

    [Test, Arguments(1, 24, 8), Arguments(5, 72, 200), Arguments(130, 8, 72), Arguments(600, 72, 200)]
    public Task ProductsTakeArraysAlignedTo16Bytes(int rows, int C, int OC) => gpu.Compare(a => {
        // Arrays without their first row, or first eight elements, which must stay as they are.
        var (x, w, b) = (a.Input(1, [rows + 1, C]), a.Input(2, [OC + 1, C]), a.Input(3, [OC + 8]));
        var y = a.Result("y", a.Input(4, [rows + 1, OC]));
        a.Device.Linear(x.Slice(1, rows), w.Slice(1, OC), b.Flat(8, OC), y.Slice(1, rows));
        var (dy, dx) = (a.Input(5, [rows + 1, OC]), a.Result("dx", a.Input(6, [rows + 1, C])));
        a.Device.LinearBackward(dy.Slice(1, rows), x.Slice(1, rows), w.Slice(1, OC), dx.Slice(1, rows),
            a.Sum("dw", 7, [OC + 1, C], SumBound).Slice(1, OC));
    });

    [Test]
    [Arguments(1, 8, 72), Arguments(3, 48, 72), Arguments(7, 768, 3072), Arguments(130, 24, 1032)]
    [Arguments(600, 1600, 200), Arguments(18_000, 136, 208)]
    public Task LinearGelu(int rows, int C, int OC) => gpu.Compare(a => a.Device.LinearGelu(
        a.Input(1, [rows, C]), a.Input(2, [OC, C], 1 / Math.Sqrt(C)), a.Input(3, [OC]),
        a.Output("input", [rows, OC]), a.Output("y", [rows, OC])));

    [Test]
    [Arguments(1, 8, 8), Arguments(3, 72, 24), Arguments(7, 3072, 768), Arguments(130, 1032, 24)]
    [Arguments(600, 200, 1600), Arguments(18_000, 208, 136)]
    public Task LinearGeluBackward(int rows, int C, int OC) {
        var input = Rounded(Floats(1, rows * C, 2), type);
        float[] x = [.. Reference.Gelu(Doubles(input)).Select(value => (float)value)];
        return gpu.Compare(a => {
            // Hopper's kernel rounds the product and the derivative before it rounds dx.
            var (dy, w, dx) = (a.Input(2, [rows, OC]), a.Input(3, [OC, C]), a.Output("dx", [rows, C], bf16: 4e-3));
            a.Device.LinearGeluBackward(dy, a.Input(x, [rows, C]), a.Input(input, [rows, C]), w, dx,
                a.Sum("dw", 4, [OC, C], SumBound), a.Sum("dbias", 5, [C], SumBound, bf16: 4e-3));
        });
    }

    [Test, Arguments(8), Arguments(72), Arguments(70_008)]
    public Task Gelu(int count) =>
        gpu.Compare(a => a.Device.Gelu(a.Input(1, [count], 3), a.Output("y", [count])));

    // ---- Classifier

    [Test]
    [Arguments(1, 1, 5, 8, 0.125f), Arguments(1, 3, 67, 80, 0.125f), Arguments(2, 5, 211, 256, 0.125f)]
    [Arguments(1, 130, 1000, 1000, 0.125f), Arguments(2, 3, 50257, 50304, 0.125f)]
    [Arguments(1, 3, 65536, 131072, 0.125f)]
    // Without gradients.
    [Arguments(2, 5, 211, 256, 0), Arguments(1, 3, 50257, 50304, 0)]
    public Task Classify(int B, int T, int V, int Vp, float scale) {
        var targets = Tokens(1, B * T, V);
        targets[^1] = V - 1;
        var logits = Floats(2, B * T * Vp, 3);
        // The padding must take no part.
        foreach (var row in Enumerable.Range(0, B * T))
            logits.AsSpan(row * Vp + V, Vp - V).Fill(float.NaN);
        return gpu.Compare(a => {
            var gradients = a.Input(logits, [B, T, Vp]);
            a.Device.Classify(gradients, targets, V, a.Fp32Output("losses", [B, T]), scale);
            if (scale == 0)
                return;
            // Targets have much larger gradients than other tokens, so each kind is compared by itself.
            a.Result("softmax targets", gradients, split: values => {
                float[] softmax = [.. values], those = [.. targets.Select((target, row) => values[row * Vp + target])];
                for (var row = 0; row < B * T; row++)
                    softmax[row * Vp + targets[row]] = 0;
                return [softmax, those];
            });
        });
    }

    /// <summary>Small sizes, and those of Hopper's own kernels: ragged tiles and padding, more tiles than the blocks
    /// take at once, and GPT-2's vocabulary.</summary>
    public static IEnumerable<(int Rows, int C, int V, int Vp)> Classifiers() => [
        (3, 24, 67, 80), (512, 8, 5, 8), (512, 64, 211, 256), (600, 72, 1000, 1000), (3_000, 136, 5_003, 5_056),
        (520, 768, 50257, 50304), (512, 16, 65536, 131072),
    ];

    [Test, MethodDataSource(nameof(Classifiers))]
    public Task LinearClassify(int rows, int C, int V, int Vp) {
        // Targets are in the vocabulary's lower half: the upper half's gradients come from the softmax alone.
        var (targets, middle) = (Tokens(1, rows, (V + 1) / 2), (V + 1) / 2 * C);
        return gpu.Compare(a => {
            var (x, w) = (a.Input(2, [rows, C]), a.Input(3, [Vp, C], 2 / Math.Sqrt(C)));
            var losses = a.Fp32Output("losses", [rows], ClassifierBound);
            var dx = a.Output("dx", [rows, C], bf16: 8e-3);
            var dw = a.Result("targets padding", a.Device.Upload(new float[Vp * C], [Vp, C]), bf16: 2e-2,
                split: all => [all[..middle], [.. all[(V * C)..].Select(value => 1 + value)]]);
            // Hopper's kernels round most of a large vocabulary to 0 at random: right in the mean, as below.
            a.Result("softmax", dw, bf16: V > 10_000 ? 0.15 : 2e-2, split: all => [all[middle..(V * C)]]);
            var logits = a.Device.Poisoned([rows, Vp], a.Device.Precision);
            a.Device.LinearClassify(x, w, targets, V, logits, losses, 0.125f, dx, dw);
        });
    }

    [Test]
    public async Task ClassesRoundedToZeroKeepTheMeanAndTheLoss() {
        // Equal rows get other random numbers: alone, each has the softmax's gradients a twentieth off.
        const int rows = 4_096, C = 64, V = 20_000, target = 3, rowsOfBlock = 8;
        float[] row = Rounded(Floats(1, C), type), weights = Rounded(Floats(2, V * C, 2 / Math.Sqrt(C)), type);
        (float[] Losses, float[] Dx, float[] Dw) Run(IDevice device, int count) {
            var precision = device.Precision;
            var (losses, dx) = (device.Poisoned([count]), device.Poisoned([count, C], precision));
            var dw = device.Upload(new float[V * C], [V, C]);
            float[] equal = [.. Enumerable.Repeat(row, count).SelectMany(values => values)];
            device.LinearClassify(device.Upload(equal, [count, C], precision),
                device.Upload(weights, [V, C], precision), [.. Enumerable.Repeat(target, count)], V,
                device.Poisoned([count, V], precision), losses, 1, dx, dw);
            return (device.Download(losses), device.Download(dx), device.Download(dw));
        }
        using var cpu = new Cpu();
        var (expected, found) = (Run(cpu, 1), Run(device, rows));
        float[] dxMean = [.. Enumerable.Range(0, C).Select(c => found.Dx.Where((_, i) => i % C == c).Average())];
        await Assert.That(RelativeError(dxMean, expected.Dx)).IsLessThan(4e-3);
        // The target's part of dw is much larger than the others', which come from the softmax alone.
        var others = (target + 1) * C;
        float[] dwMean = [.. found.Dw.Select(x => x / rows)];
        await Assert.That(RelativeError(dwMean[others..], expected.Dw.AsSpan(others))).IsLessThan(5e-3);
        await Assert.That(RelativeError(found.Losses, [.. Enumerable.Repeat(expected.Losses[0], rows)]))
            .IsLessThan(ClassifierBound);
        // Rows of one block of target_logits have one reference, and so one loss, to the bit.
        foreach (var losses in found.Losses.Chunk(rowsOfBlock))
            await Same(losses, Enumerable.Repeat(losses[0], losses.Length));
    }

    double ClassifierBound => type == DataType.Bf16 ? 2e-3 : Arrays.Fp32Bound;

    [Test]
    public async Task VeryLargeLossesAreFinite() {
        // Targets' logits are so far below the others that Hopper's kernels clamp the losses.
        const int rows = 512, C = 8, V = 16;
        float[] weights = [.. Enumerable.Range(0, V * C).Select(i => i < C ? -8f : 8f)];
        var (losses, dx) = (device.Poisoned([rows]), device.Poisoned([rows, C], type));
        var dw = device.Upload(new float[V * C], [V, C]);
        var ones = device.Upload([.. Enumerable.Repeat(1f, rows * C)], [rows, C], type);
        device.LinearClassify(ones, device.Upload(weights, [V, C], type), new int[rows], V,
            device.Poisoned([rows, V], type), losses, 1, dx, dw);
        await Assert.That(device.Download(losses).Min()).IsGreaterThan(115);
        await Assert.That(RelativeError(device.Download(dx), [.. Enumerable.Repeat(16.0, rows * C)])).IsLessThan(1e-2);
    }

    // ---- Optimizer

    [Test]
    [Arguments(8, 1.0), Arguments(72, 0.3), Arguments(70_008, 1.0)]
    // Gradients as small as epsilon, so that epsilon matters.
    [Arguments(24, 1e-8)]
    public Task AdamW(int count, double gradientStd) {
        // Parts of different lengths; the second does not decay.
        int[] counts = [count, count / 16 * 8 + 8, 8];
        return gpu.Compare(a => {
            var (parts, first) = (new List<AdamWPart>(), 0L);
            foreach (var (i, n) in counts.Index()) {
                Tensor Zeros(string name) => a.Result(name, a.Device.Upload(new float[n]), 1e-6, 1e-6);
                var master = a.Sum($"master{i}", i, [n], 1e-6);
                var w = a.Device.Precision == DataType.Fp32 ? master : a.Device.Poisoned([n], DataType.Bf16);
                parts.Add(new(first, i != 1, w, master, Zeros($"dw{i}"), Zeros($"m{i}"), Zeros($"v{i}")));
                first += n;
            }
            for (var number = 1; number <= 3; number++) {
                foreach (var (i, part) in parts.Index())
                    a.Device.Write(part.Dw, Floats(10 * number + i, part.Dw.Count, gradientStd));
                a.Device.AdamW(CollectionsMarshal.AsSpan(parts), Step(number));
            }
        });
    }

    [Test, Arguments(3, 13), Arguments(8, 21), Arguments(16, 1)]
    public async Task AdamWOfAPartLeavesItsNeighboursAlone(int first, int count) {
        const int all = 48, padded = 24;
        var before = Rounded(Floats(1, all), type);
        var w = device.Upload(before, type);
        Tensor Padded(ReadOnlySpan<float> values) =>
            device.Upload([.. values, .. new float[padded - values.Length]]).Flat(0, count);
        var master = type == DataType.Fp32 ? w.Flat(first, count) : Padded(before.AsSpan(first, count));
        var (dw, m, v) = (Padded(Floats(2, count)), Padded([]), Padded([]));
        device.AdamW([new(first, true, w.Flat(first, count), master, dw, m, v)],
            new AdamWStep(1, 0.5f, 0.1f, 1, 0.9f, 0.95f, 1e-8f, Seed: 42));
        var after = device.Download(w);
        for (var i = 0; i < all; i++)
            await Assert.That(after[i] == before[i]).IsEqualTo(i < first || i >= first + count).Because($"element {i}");
    }

    [Test]
    [Arguments(3, 8, 8)]
    [Arguments(2, 64, 256)]
    [Arguments(5, 72, 72)]
    [Arguments(1, 24, 4_104)]
    [Arguments(1, 1_600, 6_400)]
    // In fp32, more than the scratch memory holds at a time.
    [Arguments(36, 768, 768)]
    public async Task Muon(int matrices, int rows, int columns) {
        // One part with wide matrices or square ones, and one with a tall matrix, which was seen as a wide one above.
        (int Depth, int Rows, int Columns)[] shapes = [(matrices, rows, columns), (1, columns, rows)];
        float[][] gradients = [.. Enumerable.Range(0, 4).Select(i => {
            var (depth, height, width) = shapes[i % 2];
            return Floats(i, depth * height * width, 0.02);
        })];
        await gpu.Compare(a => {
            var parts = new List<MuonPart>();
            foreach (var (i, (depth, height, width)) in shapes.Index()) {
                Tensor Zeros(string name, double bf16, double fp32) => a.Result($"{name}{i}",
                    a.Device.Upload(new float[depth * height * width], [depth, height, width]), bf16, fp32);
                // Masters start at 0, so that what is compared is the change.
                var master = Zeros("master", 4e-2, 1e-4);
                var w = a.Device.Precision == DataType.Fp32 ? master
                    : a.Device.Poisoned([depth, height, width], DataType.Bf16);
                parts.Add(new(0, w, master, Zeros("dw", 1e-6, 1e-6), Zeros("m", 1e-6, 1e-6)));
            }
            for (var number = 0; number < 2; number++) {
                foreach (var (i, part) in parts.Index())
                    a.Device.Write(part.Dw, gradients[2 * number + i]);
                a.Device.Muon(CollectionsMarshal.AsSpan(parts), new MuonStep(0.5f, 0.4f, 0.7f, 0.9f, Seed: 42));
            }
        });
    }

    [Test]
    [Arguments(64, 64)]
    [Arguments(64, 200)]
    [Arguments(200, 64)]
    public async Task MuonBringsSingularValuesNearOneAndLeavesTheSingularVectors(int rows, int columns) {
        const int side = 64;
        // Reflections are orthogonal: u·S·v has the singular values that are on the diagonal of S.
        double[] u = Unit(1, rows), v = Unit(2, columns), S = new double[rows * columns];
        for (var i = 0; i < side; i++)
            S[i * (columns + 1)] = 1 - i / (side + 2.0); // 0.0095 to 0.21 of the norm
        var gradient = Reflected(S).Select(value => (float)value).ToArray();
        var (device, zeros) = (gpu.Shared, new float[rows * columns]);
        Tensor m = device.Upload(zeros, [rows, columns]), master = device.Upload(zeros, [rows, columns]);
        var w = gpu.Precision == DataType.Fp32 ? master : device.Poisoned([rows, columns], DataType.Bf16);
        device.Muon([new(0, w, master, device.Upload(gradient, [rows, columns]), m)],
            new MuonStep(-5 / MathF.Sqrt(Math.Max(rows, columns)), 0, 1, 0.95f, Seed: 42));
        var found = Reflected(Doubles(device.Download(master)));
        var others = 0.0;
        for (var i = 0; i < found.Length; i++) {
            if (i % (columns + 1) == 0 && i / columns < side)
                await Assert.That(found[i]).IsBetween(0.65, 1.25).Because($"value {i / columns}");
            else
                others += found[i] * found[i];
        }
        await Assert.That(Math.Sqrt(others / side)).IsLessThan(gpu.Precision == DataType.Fp32 ? 1e-5 : 2e-2);

        double[] Unit(int seed, int length) {
            var draws = Doubles(Floats(seed, length));
            return [.. draws.Select(value => value / Math.Sqrt(Reference.Dot(draws, draws)))];
        }
        static double[] Reflect(double[] x, double[] normal) {
            var y = (double[])x.Clone();
            for (var row = 0; row < x.Length; row += normal.Length) {
                var distance = Reference.Dot(x.AsSpan(row, normal.Length), normal);
                for (var i = 0; i < normal.Length; i++)
                    y[row + i] -= 2 * distance * normal[i];
            }
            return y;
        }
        double[] Reflected(double[] x) =>
            Reference.Transpose(Reflect(Reference.Transpose(Reflect(x, v), columns), u), rows);
    }
}

/// <summary>Stochastic rounding of master weights to bf16: up or down at random, and right on average.</summary>
[Category("gpu"), RequiresGpu, NotInParallel("gpu")]
[Arguments(false)]
[Arguments(true)]
public sealed class GpuRoundingTests(bool withMuon) {
    /// <summary>Standard deviations that a sum may be off. Seeds are fixed: a test passes always or never.</summary>
    const double Deviations = 5;

    readonly IDevice device = DeviceUnderTest.Bf16.Shared;

    /// <summary>The weights and their masters after an update. Without gradients the masters do not change.</summary>
    (float[] Weights, float[] Masters) Update(float[] masters, uint seed, long first = 0, double gradientStd = 0) {
        const int columns = 8;
        Tensor Matrix(float[] values) => device.Upload(values, [values.Length / columns, columns]);
        var zeros = new float[masters.Length];
        Tensor master = Matrix(masters), m = Matrix(zeros), dw = Matrix(Floats(9, masters.Length, gradientStd));
        var w = device.Poisoned([master.Rows, columns], DataType.Bf16);
        if (withMuon)
            device.Muon([new(first, w, master, dw, m)], new MuonStep(0.1f, 0, 1, 0.95f, seed));
        else
            device.AdamW([new(first, true, w, master, dw, m, Matrix(zeros))],
                new AdamWStep(1, 0.1f, 0, 1, 0.9f, 0.95f, 1e-8f, seed));
        return (device.Download(w), device.Download(master));
    }

    [Test, Arguments(0), Arguments(1)]
    public async Task EachWeightIsANeighbourOfItsMasterAndTheyAgreeInTheMean(double gradientStd) {
        var before = Floats(1, 1 << 17);
        var (weights, masters) = Update(before, 42, gradientStd: gradientStd);
        await Assert.That(masters.SequenceEqual(before)).IsEqualTo(gradientStd == 0);
        double sum = 0, variance = 0;
        for (var i = 0; i < masters.Length; i++) {
            var bits = BitConverter.SingleToUInt32Bits(masters[i]);
            var toZero = BitConverter.UInt32BitsToSingle(bits & 0xffff0000);
            var fromZero = BitConverter.UInt32BitsToSingle((bits & 0xffff0000) + 0x10000);
            if (weights[i] != toZero && (weights[i] != fromZero || masters[i] == toZero))
                Assert.Fail($"{masters[i]:g9} became {weights[i]:g9}");
            // Measured away from zero, so that a bias towards or away from zero does not cancel out.
            sum += Math.Abs((double)weights[i]) - Math.Abs(masters[i]);
            // The variance of a choice between two numbers whose mean is the master.
            variance += ((double)masters[i] - toZero) * ((double)fromZero - masters[i]);
        }
        await Assert.That(Math.Abs(sum)).IsLessThan(Deviations * Math.Sqrt(variance));
    }

    [Test]
    public async Task AnEighthOfTheWayUpEveryEighthGoesUp() {
        const int count = 100_000;
        const float lower = 1, upper = 1 + 1 / 128f;
        var masters = Enumerable.Repeat(1 + 1 / 1024f, count).ToArray();
        bool[] Up(uint seed) => [.. Update(masters, seed).Weights.Select(weight => weight switch {
            lower => false, upper => true, _ => throw new InvalidOperationException($"{weight}"),
        })];
        async Task Expect(string what, IEnumerable<bool> cases, double probability) {
            bool[] all = [.. cases];
            var (found, expected) = (all.Count(up => up), all.Length * probability);
            var deviation = Math.Sqrt(expected * (1 - probability));
            await Assert.That(Math.Abs(found - expected)).IsLessThan(Deviations * deviation).Because(what);
        }
        var (up, other) = (Up(42), Up(43));
        await Expect("one seed", up, 1.0 / 8);
        await Expect("the next seed", other, 1.0 / 8);
        // Neighbours, which may share a random number, are independent, and so is a weight in two steps.
        for (var distance = 1; distance <= 4; distance++)
            await Expect($"distance {distance}", up.Zip(up[distance..], (x, y) => x && y), 1.0 / 64);
        for (var distance = 0; distance <= 4; distance++)
            await Expect($"steps, distance {distance}", up.Zip(other[distance..], (x, y) => x && y), 1.0 / 64);
    }

    [Test]
    public async Task NumbersOfBf16StayWhatTheyAre() {
        var masters = Rounded(Floats(1, 10_000), DataType.Bf16);
        await Same(Update(masters, 42).Weights, masters);
    }

    [Test]
    public async Task ARoundingDependsOnTheIndexAndTheSeedAlone() {
        const int count = 4_096, split = 1_000;
        const long far = 1L << 34;
        var masters = Floats(1, count);
        var weights = Update(masters, 42).Weights;
        await Same(Update(masters, 42).Weights, weights);
        await Same(Update(masters[..split], 42).Weights, weights[..split]);
        await Same(Update(masters[split..], 42, split).Weights, weights[split..]);
        // With another seed or index, many weights are rounded the other way.
        foreach (var (seed, first) in ((uint, long)[])[(43, 0), (42, count), (42, far)]) {
            var other = Update(masters, seed, first).Weights;
            var different = other.Zip(weights, (x, y) => x != y).Count(isDifferent => isDifferent);
            await Assert.That(different).IsBetween(count / 4, count / 2).Because($"seed {seed}, first {first}");
        }
    }
}

/// <summary>Attention in each of its kernels against the CPU's.</summary>
[Category("gpu"), RequiresGpu, NotInParallel("gpu")]
[MethodDataSource(typeof(DeviceUnderTest), nameof(DeviceUnderTest.All))]
public sealed class GpuAttentionTests(DeviceUnderTest gpu) {
    /// <summary>A score of 400 is rounded by 1e-5 and more, and so is its exponential in proportion.</summary>
    const double LargeScoresBound = 1e-4;

    /// <summary>In bf16 P is rounded, then its product with dP − delta, then the result.</summary>
    const double BackwardBound = 5e-3;

    /// <summary>B, T, NH and HS: tiles of 64 and blocks of 128 end raggedly where heads have 64 channels; other heads,
    /// the largest included, have kernels of their own.</summary>
    static readonly (int B, int T, int NH, int HS)[] sizes = [
        (1, 5, 3, 64), (2, 63, 1, 64), (1, 64, 12, 64), (2, 65, 3, 64), (1, 127, 1, 64), (2, 128, 3, 64),
        (1, 129, 12, 64), (2, 200, 3, 64), (1, 256, 1, 64), (1, 1000, 3, 64), (2, 1024, 3, 64),
        (1, 5, 1, 8), (2, 65, 3, 16), (1, 130, 2, 24), (2, 33, 1, 40), (1, 300, 3, 128), (2, 70, 1, 256),
        // The longest that takes no more than seconds, the most heads of a model, and the most sequences.
        (1, 20_000, 1, 64), (1, 20_000, 1, 8), (1, 3, 512, 8), (65_535, 2, 1, 8), (65_535, 2, 1, 64),
    ];

    /// <summary>Sizes with the inputs' standard deviation. A deviation of 10 makes scores of about ±400: unless their
    /// maximum is subtracted, their exponentials overflow.</summary>
    public static IEnumerable<(int B, int T, int NH, int HS, double Std)> Forwards() => [
        .. sizes.Select(size => (size.B, size.T, size.NH, size.HS, 1.0)),
        (1, 1, 1, 64, 1), (2, 1, 3, 64, 1), (2, 1, 3, 16, 1), (2, 200, 3, 64, 10), (2, 200, 3, 16, 10),
    ];

    [Test, MethodDataSource(nameof(Forwards))]
    public Task Attention(int B, int T, int NH, int HS, double std) => gpu.Compare(a => {
        var y = a.Output("y", [B, T, NH * HS], fp32: std > 1 ? LargeScoresBound : Arrays.Fp32Bound);
        a.Device.Attention(a.Input(1, [B, T, 3 * NH * HS], std), NH, y, a.Fp32Output("lse", [B, NH, T]));
    });

    public static IEnumerable<(int B, int T, int NH, int HS, double Std)> Backwards() => [
        .. sizes.Select(size => (size.B, size.T, size.NH, size.HS, 1.0)), (2, 200, 3, 64, 10), (2, 200, 3, 16, 10),
    ];

    [Test, MethodDataSource(nameof(Backwards))]
    public Task AttentionBackward(int B, int T, int NH, int HS, double std) {
        var (qkv, y, lse) = Forward(B, T, NH, HS, std);
        var fp32 = std > 1 ? LargeScoresBound : Arrays.Fp32Bound;
        int[] shape = [B, T, NH * HS], packed = [B, T, 3 * NH * HS];
        return gpu.Compare(a => a.Device.AttentionBackward(a.Input(2, shape), a.Input(qkv, packed), a.Input(y, shape),
            a.Device.Upload(lse, [B, NH, T]), NH, a.Output("dq dk dv", packed, BackwardBound, fp32),
            a.Sum("dbias", 3, [3 * NH * HS], fp32, BackwardBound)));
    }

    /// <summary>Random queries, keys and values, and what the CPU makes of them.</summary>
    (float[] Qkv, float[] Y, float[] Lse) Forward(int B, int T, int NH, int HS, double std) {
        using var cpu = new Cpu();
        var qkv = Rounded(Floats(1, B * T * 3 * NH * HS, std), gpu.Precision);
        var (y, lse) = (cpu.Poisoned([B, T, NH * HS]), cpu.Poisoned([B, NH, T]));
        cpu.Attention(cpu.Upload(qkv, [B, T, 3 * NH * HS]), NH, y, lse);
        return (qkv, cpu.Download(y), cpu.Download(lse));
    }

    [Test, Arguments(64), Arguments(8)]
    public async Task AttentionTakesTheLongestSequence(int HS) {
        // The reference computes three queries: the others' outputs are not compared, and have no gradient.
        const int T = IDevice.LongestT;
        var (device, type, scale) = (gpu.Shared, gpu.Precision, 1 / Math.Sqrt(HS));
        float[] qkv = Rounded(Floats(1, T * 3 * HS), type), draws = Rounded(Floats(2, T * HS), type);
        float[] dy = new float[T * HS], y = new float[T * HS], lse = [.. Enumerable.Repeat(20f, T)];
        double[] values = Doubles(qkv), expected = new double[T * 3 * HS];
        Tensor qkvDevice = device.Upload(qkv, [T, 3 * HS], type), yDevice = device.Poisoned([T, HS], type);
        var lseDevice = device.Poisoned([T]);
        device.Attention(qkvDevice, 1, yDevice, lseDevice);
        var (yFound, lseFound) = (device.Download(yDevice), device.Download(lseDevice));
        foreach (var t in (int[])[0, T / 2 + 1, T - 1]) {
            Span<double> Packed(double[] array, int part, int s) => array.AsSpan((s * 3 + part) * HS, HS);
            var (output, logSums) = Reference.Attention(values[..((t + 1) * 3 * HS)], 1, t + 1, t, 1, HS);
            var (logSum, gradient) = (logSums[0], Doubles(draws.AsSpan(t * HS, HS)));
            draws.AsSpan(t * HS, HS).CopyTo(dy.AsSpan(t * HS));
            var delta = Reference.Dot(output, gradient);
            for (var s = 0; s <= t; s++) {
                var weight = Math.Exp(Reference.Dot(Packed(values, 0, t), Packed(values, 1, s)) * scale - logSum);
                var dscore = weight * (Reference.Dot(gradient, Packed(values, 2, s)) - delta) * scale;
                for (var i = 0; i < HS; i++) {
                    Packed(expected, 0, t)[i] += dscore * Packed(values, 1, s)[i];
                    Packed(expected, 1, s)[i] += dscore * Packed(values, 0, t)[i];
                    Packed(expected, 2, s)[i] += weight * gradient[i];
                }
            }
            for (var i = 0; i < HS; i++)
                y[t * HS + i] = (float)output[i];
            lse[t] = (float)logSum;
            var bound = type == DataType.Bf16 ? Arrays.Bf16Bound : LargeScoresBound;
            await Assert.That(RelativeError(yFound.AsSpan(t * HS, HS), output)).IsLessThan(bound).Because($"y {t}");
            await Assert.That(Math.Abs(lseFound[t] - logSum)).IsLessThan(1e-4).Because($"lse {t}");
        }
        var (dqkv, dbias) = (device.Poisoned([T, 3 * HS], type), device.Upload(new float[3 * HS]));
        device.AttentionBackward(device.Upload(dy, [T, HS], type), qkvDevice, device.Upload(y, [T, HS], type),
            device.Upload(lse), 1, dqkv, dbias);
        var (found, parts) = (Arrays.Columns(device.Download(dqkv), 3 * HS, 3), Arrays.Columns(expected, 3 * HS, 3));
        for (var part = 0; part < 3; part++) {
            var bound = type == DataType.Bf16 ? BackwardBound : LargeScoresBound;
            await Assert.That(RelativeError(found[part], parts[part])).IsLessThan(bound).Because($"part {part}");
        }
    }

    [Test, Arguments(1, 1, 64), Arguments(2, 3, 64), Arguments(2, 3, 16)]
    public async Task OneRowAttendsToItselfWhateverItsScore(int B, int NH, int HS) {
        // The output is the row's value; the score's gradient is the difference of two equal numbers.
        var (C, device, type) = (NH * HS, gpu.Shared, gpu.Precision);
        var (qkv, y, lse) = Forward(B, 1, NH, HS, 1);
        var dy = Rounded(Floats(2, B * C), type);
        var dqkv = device.Poisoned([B, 1, 3 * C], type);
        device.AttentionBackward(device.Upload(dy, [B, 1, C], type), device.Upload(qkv, [B, 1, 3 * C], type),
            device.Upload(y, [B, 1, C], type), device.Upload(lse, [B, NH, 1]), NH, dqkv,
            device.Poisoned([3 * C]));
        var rows = device.Download(dqkv).Chunk(3 * C).ToArray();
        await Assert.That(RelativeError([.. rows.SelectMany(row => row[(2 * C)..])], dy)).IsLessThan(1e-5);
        await Assert.That(rows.SelectMany(row => row[..(2 * C)]).Max(Math.Abs)).IsLessThan(1e-5f);
    }
}

/// <summary>The model's tests on the GPU in fp32.</summary>
[Category("gpu"), RequiresGpu, NotInParallel("gpu"), InheritsTests]
public sealed class GpuModelTests() : ModelTests(DeviceUnderTest.Fp32.Open());

/// <summary>Training on the GPU: against PyTorch, the CPU and itself, with heads of 64 channels, the only ones
/// that some kernels take.</summary>
[Category("gpu"), RequiresGpu, NotInParallel("gpu"), InheritsTests]
[MethodDataSource(typeof(DeviceUnderTest), nameof(DeviceUnderTest.All))]
public sealed class GpuTrainingTests(DeviceUnderTest gpu) : PrecisionTests(gpu.Shared, Small, T) {
    internal static readonly Config Small = new(MaxT: 128, V: 300, Vp: 304, L: 2, NH: 2, C: 128);

    const int B = 2, T = 100;

    [Test]
    public async Task LogitsLossesAndGradientsEqualTheCpus() {
        using var cpu = new Cpu();
        var (expected, found) = (Pass(cpu), Pass(device));
        foreach (var (name, values) in found) {
            await Assert.That(RelativeError(values, expected[name])).IsLessThan(Verification.Tolerance(gpu.Precision))
                .Because(name);
        }

        static Dictionary<string, float[]> Pass(IDevice device) {
            var model = Models.Random(Small, device, B, T, Purpose.Train);
            var results = new Dictionary<string, float[]> {
                ["logits"] = [.. model.ForwardLogits().SelectMany(row => row)], ["losses"] = model.Pass().Losses,
            };
            foreach (var (i, shape) in Small.Parameters.Index())
                results.Add(shape.Name, device.Values(model.Gradients!.Tensors[i]));
            return results;
        }
    }

    [Test]
    public async Task TwoTrainingsGiveTheSameBits() {
        float[] Train() {
            using var own = gpu.Open();
            return Models.Random(Small, own, B, T, Purpose.Train).Update(3);
        }
        await SameBits(Train(), Train());
    }
}

/// <summary>Runs that are resumed, on the same device or on another.</summary>
[Category("gpu"), RequiresGpu, NotInParallel("gpu")]
public sealed class GpuCheckpointTests {
    [Test, MethodDataSource(typeof(DeviceUnderTest), nameof(DeviceUnderTest.Moves))]
    public async Task AResumedRunEqualsAnUnbrokenOne(DeviceUnderTest from, DeviceUnderTest to) {
        var config = GpuTrainingTests.Small;
        using var folder = new TemporaryFolder();
        Folders.WriteModel(folder["model.bin"], config.MaxT, config.V, config.L, config.NH, config.C, config.Vp);
        WriteShard(folder["train.bin"], [.. Tokens(1, 4_000, config.V).Select(token => (ushort)token)]);
        WriteShard(folder["val.bin"], [.. Tokens(2, 1_000, config.V).Select(token => (ushort)token)]);
        var expected = Train(from, "whole", resume: false);
        Folders.Copy(folder["whole"], folder["part"], name => !name.Contains("00000006"));
        var found = Train(to, "part", resume: true);
        await Assert.That(expected.Length).IsEqualTo(6);
        await Assert.That(found.Length).IsEqualTo(3);
        for (var i = 0; i < 3; i++)
            await Assert.That(RelativeError(found[i], expected[3 + i])).IsLessThan(1e-2).Because($"step {4 + i}");
        if (from == to)
            await Assert.That(Folders.Contents(folder["part"])).IsEqualTo(Folders.Contents(folder["whole"]));

        // Trains with a checkpoint every three steps, and returns each step's loss.
        double[] Train(DeviceUnderTest on, string to, bool resume) {
            using var device = on.Open();
            const int B = 2, T = 100;
            var (steps, _) = Models.Train(Models.Options with {
                TrainData = folder["train.bin"], ValData = folder["val.bin"], Init = folder["model.bin"],
                Out = folder[to], B = B, T = T, TotalBatch = 2 * B * T, MaxSteps = 6, LearningRate = 1e-3f, Warmup = 2,
                ValEvery = 2, ValBatches = 2, SampleEvery = 2, GenTokens = 5, CheckpointEvery = 3, Keep = 10,
                Resume = resume, Shuffle = true,
            }, device);
            return [.. steps.Select(step => step[1])];
        }
    }
}

/// <summary>Faults, which end the process's use of the GPU; this runs only when asked for by name.</summary>
[Category("fault"), RequiresGpu]
public sealed class GpuFaultTests {
    [Test, Explicit]
    public async Task AFaultNamesTheOperation() {
        using var device = new Cuda(DataType.Fp32, verbose: true);
        var nowhere = new Tensor(4096, 1, 1, 64);
        await Assert.That(() => device.Gelu(nowhere, nowhere)).Throws<Gpt2Exception>()
            .WithMessageContaining("gelu: expected success, found CUDA_ERROR");
    }
}
