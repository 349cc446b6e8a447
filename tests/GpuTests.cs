using System.Globalization;
using System.Runtime.InteropServices;
using System.Text.RegularExpressions;
using Microsoft.Extensions.Logging.Abstractions;
using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>Skips a test, and says so, where no GPU is or the build has no kernels.</summary>
sealed class RequiresGpuAttribute() : SkipAttribute("there is no GPU, or the build is one without kernels") {
    static readonly bool isAvailable = Cuda.IsAvailable;

    public override Task<bool> ShouldSkip(TestRegisteredContext context) => Task.FromResult(!isAvailable);
}

/// <summary>The GPU in one of the ways that it computes.</summary>
/// <param name="Precision">The type of weights and activations.</param>
/// <param name="Portable">With the attention that any GPU can do, where a Hopper has its own.</param>
public sealed record GpuUnderTest(DataType Precision, bool Portable = false) {
    readonly Lazy<Cuda> shared = new(() => new Cuda(Precision, Portable));

    public static GpuUnderTest Fp32 { get; } = new(DataType.Fp32);
    public static GpuUnderTest Bf16 { get; } = new(DataType.Bf16);
    static GpuUnderTest PortableBf16 { get; } = new(DataType.Bf16, Portable: true);

    /// <summary>In each precision.</summary>
    public static IEnumerable<Func<GpuUnderTest>> Precisions() => [() => Fp32, () => Bf16];

    /// <summary>In each precision, and with portable attention.</summary>
    public static IEnumerable<Func<GpuUnderTest>> All() => [() => Fp32, () => Bf16, () => PortableBf16];

    /// <summary>A device that stays open to the end for all tests, since opening one takes longer than most of
    /// them.</summary>
    public IDevice Shared => shared.Value;

    /// <summary>A device of one's own.</summary>
    public IDevice Open() => new Cuda(Precision, Portable);

    /// <summary>What the tests' names show.</summary>
    public override string ToString() =>
        $"CUDA {Precision.ToString().ToLowerInvariant()}{(Portable ? " portable" : "")}";

    /// <summary>Runs an operation on the CPU and twice on the GPU, from the same numbers: requires what it leaves to be
    /// near and the same bits each time.</summary>
    /// <returns>What it left on the GPU, by name.</returns>
    internal async Task<Dictionary<string, float[]>> Compare(Action<Arrays> operation) {
        var draws = new Dictionary<(int, long, double), float[]>();
        Dictionary<string, (float[] Values, double Bound)> Run(IDevice device) {
            var arrays = new Arrays(device, Precision, draws);
            operation(arrays);
            return arrays.Results();
        }
        using var cpu = new Cpu();
        var (expected, found, again) = (Run(cpu), Run(Shared), Run(Shared));
        foreach (var (name, (values, bound)) in found) {
            await Assert.That(RelativeError(values, expected[name].Values)).IsLessThan(bound).Because(name);
            await Assert.That(SameBits(values, again[name].Values)).IsTrue().Because($"{name} again");
        }
        return found.ToDictionary(result => result.Key, result => result.Value.Values);
    }

    /// <summary>Whether all bits are equal.</summary>
    internal static bool SameBits(float[] left, float[] right) =>
        MemoryMarshal.Cast<float, int>(left).SequenceEqual(MemoryMarshal.Cast<float, int>(right));
}

/// <summary>The arrays of one operation on one device. Their numbers depend on their seeds and sizes alone, and are
/// such as the GPU's precision has; the CPU holds them in fp32.</summary>
sealed class Arrays(IDevice device, DataType precision, Dictionary<(int, long, double), float[]> draws) {
    /// <summary>Bounds of ‖a − b‖/‖b‖: some fifty roundings of fp32; one or two roundings to bf16, of which each makes
    /// 0.0017.</summary>
    public const double Fp32Bound = 1e-5, Bf16Bound = 3e-3;

    readonly List<(string[] Names, Tensor Tensor, double Bound, Func<float[], float[][]>? Split)> results = [];

    public IDevice Device => device;

    float[] Draw(int seed, long count, double std) {
        if (!draws.TryGetValue((seed, count, std), out var values))
            draws[(seed, count, std)] = values = Floats(seed, count, std);
        return values;
    }

    /// <summary>Normal draws.</summary>
    public Tensor Input(int seed, int depth, int rows, int columns, double std = 1) =>
        Input(Draw(seed, (long)depth * rows * columns, std), depth, rows, columns);

    /// <summary>Given numbers, rounded.</summary>
    public Tensor Input(float[] values, int depth, int rows, int columns) =>
        device.Upload(Rounded(values, precision), depth, rows, columns, device.Precision);

    /// <summary>An array to be overwritten, and then compared.</summary>
    /// <param name="names">One, or those of equal parts of the columns, with spaces between.</param>
    public Tensor Output(string names, int depth, int rows, int columns, double bf16 = Bf16Bound,
        double fp32 = Fp32Bound) =>
        Result(names, device.Poisoned(depth, rows, columns, device.Precision), bf16, fp32);

    /// <summary>The same for what is fp32 always.</summary>
    public Tensor Fp32Output(string names, int depth, int rows, int columns, double bound = Fp32Bound) =>
        Result(names, device.Poisoned(depth, rows, columns), bound, bound);

    /// <summary>An array in fp32 that is added to, and then compared.</summary>
    public Tensor Sum(string name, int seed, int rows, int columns, double bound = Fp32Bound, double? bf16 = null) =>
        Result(name, device.Upload(Draw(seed, (long)rows * columns, 1), 1, rows, columns), bf16 ?? bound, bound);

    /// <summary>An array that is compared in the end, as a whole or in the parts that a function makes of it.</summary>
    public Tensor Result(string names, Tensor tensor, double bf16 = Bf16Bound, double fp32 = Fp32Bound,
        Func<float[], float[][]>? split = null) {
        var named = names.Split(' ', StringSplitOptions.RemoveEmptyEntries);
        results.Add((named, tensor, precision == DataType.Bf16 ? bf16 : fp32, split));
        return tensor;
    }

    /// <summary>What has become of the arrays to be compared.</summary>
    public Dictionary<string, (float[] Values, double Bound)> Results() {
        var named = new Dictionary<string, (float[], double)>();
        foreach (var (names, tensor, bound, split) in results) {
            var values = device.Download(tensor);
            var parts = split != null ? split(values) : names.Length < 2 ? [values] : Columns(values, names.Length);
            for (var i = 0; i < names.Length; i++)
                named.Add(names[i], (parts[i], bound));

            float[][] Columns(float[] values, int count) {
                var width = tensor.Columns / count;
                return [.. Enumerable.Range(0, count).Select(part => {
                    var columns = new float[values.Length / count];
                    for (var row = 0; row < tensor.AllRows; row++)
                        values.AsSpan(row * tensor.Columns + part * width, width).CopyTo(columns.AsSpan(row * width));
                    return columns;
                })];
            }
        }
        return named;
    }
}

/// <summary>Every operation of the GPU but attention against the CPU's, which OperationTests prove.</summary>
[Category("gpu"), RequiresGpu, NotInParallel("gpu")]
[MethodDataSource(typeof(GpuUnderTest), nameof(GpuUnderTest.Precisions))]
public sealed class GpuOperationTests(GpuUnderTest gpu) {
    /// <summary>For sums of so many terms that their roundings add up, and for those of tensor cores, which cut off
    /// what they shift out.</summary>
    const double SumBound = 3e-5;

    // ---- Memory

    [Test]
    [Arguments(1)]
    [Arguments(67)]
    [Arguments(70_001)]
    public async Task ClearFillsWithZerosAndNoFurther(int count) {
        foreach (var type in (DataType[])[gpu.Precision, DataType.Fp32]) {
            var x = gpu.Shared.Upload(Floats(1, count), type);
            gpu.Shared.Clear(x);
            await Assert.That(gpu.Shared.Download(x).All(value => value == 0)).IsTrue();
        }
    }

    [Test]
    public async Task AllocatedMemoryIsZero() {
        const int blocks = 8, count = 1_000_001;
        var ones = Enumerable.Repeat(1f, count).ToArray();
        Tensor New(IDevice device) => new(device.Allocate(count * sizeof(float)), 1, 1, count);
        // The memory of a device that is gone is likely to be taken again.
        using (var before = gpu.Open()) {
            for (var i = 0; i < blocks; i++)
                before.Write(New(before), ones);
        }
        using var device = gpu.Open();
        for (var i = 0; i < blocks; i++)
            await Assert.That(device.Values(New(device)).AsSpan().ContainsAnyExcept(0)).IsFalse();
    }

    [Test]
    public async Task AModelThatDoesNotFitIsRefusedWithABatchThatDoes() {
        var error = Assert.Throws<Gpt2Exception>(() =>
            new Model(Config.Of("d12")!, gpu.Shared, B: 1 << 16, T: 1024, Purpose.Train));
        await Assert.That(error.Message).Matches(
            @"^memory: expected \S+ GB free on .+, found \S+ GB, \S+ GB too little; --batch \d+, or .+ fits$");
    }

    [Test]
    public async Task AProfileHasTheCallsAndTheirTime() {
        using var device = gpu.Open();
        Tensor x = device.Upload(Floats(1, 4_096), gpu.Precision), y = device.Poisoned(1, 1, 4_096, gpu.Precision);
        device.Profile = new Profile();
        for (var i = 0; i < 3; i++)
            device.Gelu(x, y);
        device.Synchronize();
        var operation = device.Profile.Operations.Values.Single();
        await Assert.That(operation.Calls).IsEqualTo(3);
        await Assert.That(operation.Seconds).IsGreaterThan(0);
    }

    [Test]
    public async Task NumbersAreReadBackAsWrittenOrTheNearestInBf16() {
        (float Value, float InBf16)[] numbers = [
            (0, 0), (-0f, -0f), (-1.5f, -1.5f), (float.PositiveInfinity, float.PositiveInfinity),
            // Ties, to even; and what is next to one.
            (1 + 1 / 256f, 1), (1 + 3 / 256f, 1 + 1 / 64f), (-1 - 3 / 256f, -1 - 1 / 64f),
            (1 + 1 / 256f + 1e-6f, 1 + 1 / 128f), (1 + 3 / 256f - 1e-6f, 1 + 1 / 128f),
            // Beyond the largest and the smallest numbers.
            (float.MinValue, float.NegativeInfinity), (float.Epsilon, 0), (1e-40f, 9.1835e-41f),
        ];
        // One bit of payload, in the half that bf16 has not.
        var nan = BitConverter.Int32BitsToSingle(0x7f800001);
        float[] values = [.. numbers.Select(number => number.Value), nan];
        float[] expected = [.. numbers.Select(number => gpu.Precision == DataType.Fp32 ? number.Value : number.InBf16)];
        var found = gpu.Shared.Download(gpu.Shared.Upload(values, gpu.Precision));
        await Same(found[..^1].Select(BitConverter.SingleToInt32Bits), expected.Select(BitConverter.SingleToInt32Bits));
        await Assert.That(float.IsNaN(found[^1])).IsTrue();
    }

    [Test]
    public async Task ManyNumbersAreReadBack() {
        // More than go through the host at a time.
        float[] values = [.. Enumerable.Range(0, 9_000_005).Select(i => i * 0.37f)];
        var found = gpu.Shared.Download(gpu.Shared.Upload(values, gpu.Precision));
        await Assert.That(GpuUnderTest.SameBits(found, Rounded(values, gpu.Precision))).IsTrue();
    }

    [Test]
    public async Task ColumnsThatAreNoMultipleOf8AreRefused() {
        // One row is aligned, so that a kernel that takes it nevertheless does no harm to other tests.
        var (device, type) = (gpu.Shared, gpu.Precision);
        Tensor x = device.Poisoned(1, 1, 20, type), statistics = device.Poisoned(1, 1, 2);
        Action[] operations = [
            () => device.Embed([0], x, x, 0, x), () => device.LayerNorm(x, x, x, x, statistics),
            () => device.Attention(device.Poisoned(1, 1, 60, type), 0, 1, x, statistics),
            () => device.Classify(x, [0], 20, statistics, 1),
        ];
        foreach (var operation in operations)
            await Assert.That(operation).Throws<Gpt2Exception>();
        Tensor qkv = device.Poisoned(1, 1, 3 * 264, type), y = device.Poisoned(1, 1, 264, type);
        await Assert.That(() => device.Attention(qkv, 0, 1, y, statistics)).Throws<Gpt2Exception>();
    }

    [Test]
    public async Task SizesBeyondTheLargestAreRefused() {
        var (device, type) = (gpu.Shared, gpu.Precision);
        Tensor wide = device.Poisoned(1, 1, 4104, type), many = device.Poisoned(65_536, 1, 24, type);
        Tensor statistics = device.Poisoned(65_536, 1, 2), y = device.Poisoned(65_536, 1, 8, type);
        Action[] operations = [
            () => device.LayerNorm(wide, wide, wide, wide, statistics), () => device.Embed([0], wide, wide, 0, wide),
            () => device.LayerNormBackward(wide, wide, wide, statistics, wide, wide, wide, default),
            () => device.Attention(many, 0, 1, y, statistics),
            () => device.AttentionBackward(y, many, y, statistics, 1, many, default),
        ];
        foreach (var operation in operations)
            await Assert.That(operation).Throws<Gpt2Exception>();
    }

    // ---- Embedding

    [Test]
    [Arguments(1, 1, 8, 0)]
    [Arguments(3, 7, 72, 0)]
    [Arguments(1, 3, 24, 4)]
    [Arguments(1, 1, 1600, 1000)]
    [Arguments(2, 130, 1032, 0)]
    [Arguments(4, 250, 768, 0)]
    [Arguments(1, 70, 4096, 3)]
    public Task Embed(int B, int T, int C, int start) => gpu.Compare(a => {
        const int V = 300;
        a.Device.Embed(Tokens(1, B * T, V), a.Input(2, 1, V, C), a.Input(3, 1, start + T, C), start,
            a.Output("x", B, T, C));
    });

    [Test]
    [Arguments(1, 1, 8, 5)]
    [Arguments(2, 5, 24, 5)]
    [Arguments(3, 7, 72, 300)]
    [Arguments(4, 250, 768, 300)]
    [Arguments(1, 1000, 1600, 40)]
    [Arguments(2, 500, 24, 50304)]
    [Arguments(2, 35, 4096, 70)]
    [Arguments(1, 40_000, 8, 131072)]
    public async Task EmbedBackward(int B, int T, int C, int V) {
        // Every other row has one and the same token, the rest others of the lower half; positions past T get nothing.
        int[] tokens = [.. Tokens(1, B * T, (V + 1) / 2).Select((token, i) => i % 2 == 0 ? V / 3 : token)];
        var results = await gpu.Compare(a => a.Device.EmbedBackward(tokens, a.Input(2, B, T, C),
            a.Sum("dwte", 3, V, C), a.Sum("dwpe", 4, T + 3, C)));
        // What the norm of the whole would hide.
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

    [Test]
    [MethodDataSource(nameof(Rows))]
    public Task LayerNorm(int rows, int C) => gpu.Compare(a => a.Device.LayerNorm(
        a.Input(1, 1, rows, C, 2), a.Input(2, 1, 1, C), a.Input(3, 1, 1, C), a.Output("y", 1, rows, C),
        a.Fp32Output("mean rstd", 1, rows, 2)));

    [Test]
    [MethodDataSource(nameof(Rows))]
    public async Task LayerNormBackward(int rows, int C) {
        await LayerNormBackward(rows, C, hasBias: false);
        await LayerNormBackward(rows, C, hasBias: true);
    }

    Task LayerNormBackward(int rows, int C, bool hasBias) {
        var x = Rounded(Floats(1, rows * C, 2), gpu.Precision);
        float[] statistics = [.. Reference.Statistics(Doubles(x), C).Select(value => (float)value)];
        // What dx holds before is small, so that it hides no error in what is added.
        return gpu.Compare(a => a.Device.LayerNormBackward(a.Input(2, 1, rows, C), a.Input(x, 1, rows, C),
            a.Input(3, 1, 1, C), a.Device.Upload(statistics, 1, rows, 2), a.Result("dx", a.Input(4, 1, rows, C, 0.3)),
            a.Sum("dw", 5, 1, C), a.Sum("db", 6, 1, C), hasBias ? a.Sum("dbias", 7, 1, C) : default));
    }

    [Test]
    [Arguments(24, 0f)]
    [Arguments(72, 3f)]
    [Arguments(48, -1000f)]
    public async Task LayerNormOfAConstantRowIsTheBias(int C, float value) {
        // Whole numbers, so that the mean is exact and nothing remains to be divided by √1e-5.
        var results = await gpu.Compare(a => a.Device.LayerNorm(a.Input([.. Enumerable.Repeat(value, 3 * C)], 1, 3, C),
            a.Input(1, 1, 1, C), a.Input(2, 1, 1, C), a.Output("y", 1, 3, C), a.Fp32Output("mean rstd", 1, 3, 2)));
        var b = Rounded(Floats(2, C), gpu.Precision);
        await Same(results["y"], [.. b, .. b, .. b]);
    }

    // ---- Linear and GELU

    /// <summary>Rows, C and OC of the products: each is ragged in some; the last is the classifier's.</summary>
    public static IEnumerable<(int Rows, int C, int OC)> Products() => [
        (1, 8, 8), (3, 24, 72), (7, 72, 24), (1, 768, 2304), (65, 200, 8), (97, 96, 384), (129, 1032, 200),
        (1000, 72, 1032), (13, 1600, 1024), (16, 64, 50304),
        // From 512 rows on Hopper has kernels of its own: part of a tile, and more tiles than blocks.
        (512, 8, 8), (520, 1600, 200), (18_000, 136, 208),
    ];

    [Test]
    [MethodDataSource(nameof(Products))]
    public Task Linear(int rows, int C, int OC) => gpu.Compare(a => {
        var (x, w, b) = (a.Input(1, 1, rows, C), a.Input(2, 1, OC, C), a.Input(3, 1, 1, OC));
        a.Device.Linear(x, w, b, a.Output("y", 1, rows, OC));
        a.Device.Linear(x, w, default, a.Output("withoutBias", 1, rows, OC));
        a.Device.LinearResidual(x, w, b, a.Input(4, 1, rows, OC), a.Output("withResidual", 1, rows, OC));
    });

    [Test]
    [MethodDataSource(nameof(Products))]
    public Task LinearBackward(int rows, int C, int OC) => gpu.Compare(a => {
        var (dy, x, w) = (a.Input(1, 1, rows, OC), a.Input(2, 1, rows, C), a.Input(3, 1, OC, C));
        var dx = a.Output("dx", 1, rows, C, fp32: OC > 10_000 ? SumBound : Arrays.Fp32Bound);
        a.Device.LinearBackward(dy, x, w, dx, a.Sum("dw", 4, OC, C, SumBound));
    });

    [Test]
    [Arguments(1, 24, 8)]
    [Arguments(5, 72, 200)]
    [Arguments(130, 8, 72)]
    [Arguments(600, 72, 200)]
    public Task ProductsTakeArraysAlignedTo16Bytes(int rows, int C, int OC) => gpu.Compare(a => {
        // All but one row or eight elements; what is left out must stay as it is.
        var (x, w, b) = (a.Input(1, 1, rows + 1, C), a.Input(2, 1, OC + 1, C), a.Input(3, 1, 1, OC + 8));
        var y = a.Result("y", a.Input(4, 1, rows + 1, OC));
        a.Device.Linear(x.Slice(1, rows), w.Slice(1, OC), b.Flat(8, OC), y.Slice(1, rows));
        var (dy, dx) = (a.Input(5, 1, rows + 1, OC), a.Result("dx", a.Input(6, 1, rows + 1, C)));
        a.Device.LinearBackward(dy.Slice(1, rows), x.Slice(1, rows), w.Slice(1, OC), dx.Slice(1, rows),
            a.Sum("dw", 7, OC + 1, C, SumBound).Slice(1, OC));
    });

    [Test]
    [Arguments(1, 8, 72)]
    [Arguments(3, 48, 72)]
    [Arguments(7, 768, 3072)]
    [Arguments(130, 24, 1032)]
    [Arguments(600, 1600, 200)]
    [Arguments(18_000, 136, 208)]
    public Task LinearGelu(int rows, int C, int OC) => gpu.Compare(a => a.Device.LinearGelu(
        a.Input(1, 1, rows, C), a.Input(2, 1, OC, C, 1 / Math.Sqrt(C)), a.Input(3, 1, 1, OC),
        a.Output("input", 1, rows, OC), a.Output("y", 1, rows, OC)));

    [Test]
    [Arguments(1, 8, 8)]
    [Arguments(3, 72, 24)]
    [Arguments(7, 3072, 768)]
    [Arguments(130, 1032, 24)]
    [Arguments(600, 200, 1600)]
    [Arguments(18_000, 208, 136)]
    public Task LinearGeluBackward(int rows, int C, int OC) {
        var input = Rounded(Floats(1, rows * C, 2), gpu.Precision);
        float[] x = [.. Reference.Gelu(Doubles(input)).Select(value => (float)value)];
        return gpu.Compare(a => {
            // Hopper's kernel rounds the product and the derivative before it rounds dx.
            var (dy, w, dx) = (a.Input(2, 1, rows, OC), a.Input(3, 1, OC, C), a.Output("dx", 1, rows, C, bf16: 4e-3));
            a.Device.LinearGeluBackward(dy, a.Input(x, 1, rows, C), a.Input(input, 1, rows, C), w, dx,
                a.Sum("dw", 4, OC, C, SumBound), a.Sum("dbias", 5, 1, C, SumBound, bf16: 4e-3));
        });
    }

    [Test]
    [Arguments(8)]
    [Arguments(72)]
    [Arguments(70_008)]
    public Task Gelu(int count) =>
        gpu.Compare(a => a.Device.Gelu(a.Input(1, 1, 1, count, 3), a.Output("y", 1, 1, count)));

    [Test]
    public async Task GeluOfLargeNumbersIsTheNumberOrZeroAndSoIsItsGradient() {
        var (device, type, n) = (gpu.Shared, gpu.Precision, 8);
        var x = device.Upload([-8192, -128, -20, -0f, 20, 64, 128, 8192], type);
        var (y, dx) = (device.Poisoned(1, 1, n, type), device.Poisoned(1, 1, n, type));
        device.Gelu(x, y);
        // With the unit matrix for weights, dx is the derivative itself.
        float[] unit = [.. Enumerable.Range(0, n * n).Select(i => i % (n + 1) == 0 ? 1f : 0)];
        var ones = device.Upload([.. Enumerable.Repeat(1f, n)], type);
        device.LinearGeluBackward(ones, y, x, device.Upload(unit, 1, n, n, type), dx, device.Upload(unit, 1, n, n),
            device.Poisoned(1, 1, n));
        var (gelu, slope) = (device.Download(y), device.Download(dx));
        await Assert.That(RelativeError(gelu, [0, 0, 0, 0, 20, 64, 128, 8192])).IsLessThan(1e-5);
        await Assert.That(RelativeError(slope, [0, 0, 0, 0.5, 1, 1, 1, 1])).IsLessThan(1e-5);
    }

    // ---- Classifier

    [Test]
    [Arguments(1, 1, 5, 8)]
    [Arguments(1, 3, 67, 80)]
    [Arguments(2, 5, 211, 256)]
    [Arguments(1, 130, 1000, 1000)]
    [Arguments(2, 3, 50257, 50304)]
    [Arguments(1, 3, 65536, 131072)]
    public Task Classify(int B, int T, int V, int Vp) {
        var targets = Tokens(1, B * T, V);
        targets[^1] = V - 1;
        var logits = Floats(2, B * T * Vp, 3);
        // What the padding holds must take no part.
        foreach (var row in Enumerable.Range(0, B * T))
            logits.AsSpan(row * Vp + V, Vp - V).Fill(float.NaN);
        return gpu.Compare(a => {
            // Beside those of the targets, all other gradients are small.
            var gradients = a.Result("softmax targets", a.Input(logits, B, T, Vp), split: values => {
                float[] softmax = [.. values], those = [.. targets.Select((target, row) => values[row * Vp + target])];
                for (var row = 0; row < B * T; row++)
                    softmax[row * Vp + targets[row]] = 0;
                return [softmax, those];
            });
            a.Device.Classify(gradients, targets, V, a.Fp32Output("losses", 1, B, T), 0.125f);
        });
    }

    [Test]
    [Arguments(2, 5, 211, 256)]
    [Arguments(1, 3, 50257, 50304)]
    public Task ClassifyWithoutGradientsComputesTheLosses(int B, int T, int V, int Vp) => gpu.Compare(a =>
        a.Device.Classify(a.Input(1, B, T, Vp, 3), Tokens(2, B * T, V), V, a.Fp32Output("losses", 1, B, T), 0));

    [Test]
    public async Task ClassifyTakesExtremeLogits() {
        const int V = 5, Vp = 8;
        var device = gpu.Shared;
        float[] logits = [8192, -8192, 0, 1, 2, 0, 0, 0, 8192, -8192, 0, 1, 2, 0, 0, 0, .. new float[8]];
        var (logitsOnDevice, losses) = (device.Upload(logits, 1, 3, Vp, gpu.Precision), device.Poisoned(1, 1, 3));
        device.Classify(logitsOnDevice, [0, 1, 4], V, losses, 1);
        await Assert.That(RelativeError(device.Download(losses), [0, 16384, Math.Log(5)])).IsLessThan(1e-6);
        double[] gradient = [0, 0, 0, 0, 0, 0, 0, 0, 1, -1, 0, 0, 0, 0, 0, 0, 0.2, 0.2, 0.2, 0.2, -0.8, 0, 0, 0];
        var bound = gpu.Precision == DataType.Bf16 ? Arrays.Bf16Bound : Arrays.Fp32Bound;
        await Assert.That(RelativeError(device.Download(logitsOnDevice), gradient)).IsLessThan(bound);
    }

    /// <summary>Rows, channels and vocabulary, small ones and those that Hopper has kernels for: ragged tiles and
    /// padding, more tiles than the blocks take at once, and GPT-2's.</summary>
    public static IEnumerable<(int Rows, int C, int V, int Vp)> Classifiers() => [
        (3, 24, 67, 80), (512, 8, 5, 8), (512, 64, 211, 256), (600, 72, 1000, 1000), (3_000, 136, 5_003, 5_056),
        (520, 768, 50257, 50304), (512, 16, 65536, 131072),
    ];

    [Test]
    [MethodDataSource(nameof(Classifiers))]
    public Task LinearClassify(int rows, int C, int V, int Vp) {
        // Targets are of the lower half, so that the gradients of the others' weights are the softmax's alone.
        var (targets, middle) = (Tokens(1, rows, (V + 1) / 2), (V + 1) / 2 * C);
        return gpu.Compare(a => {
            var (x, w) = (a.Input(2, 1, rows, C), a.Input(3, 1, Vp, C, 2 / Math.Sqrt(C)));
            var losses = a.Fp32Output("losses", 1, 1, rows, ClassifierBound);
            var dx = a.Output("dx", 1, rows, C, bf16: 8e-3);
            var dw = a.Result("targets softmax padding", a.Device.Upload(new float[Vp * C], 1, Vp, C), bf16: 2e-2,
                split: all => [all[..middle], all[middle..(V * C)], [.. all[(V * C)..].Select(value => 1 + value)]]);
            var logits = a.Device.Poisoned(1, rows, Vp, a.Device.Precision);
            a.Device.LinearClassify(x, w, targets, V, logits, losses, 0.125f, dx, dw);
        });
    }

    double ClassifierBound => gpu.Precision == DataType.Bf16 ? 2e-3 : Arrays.Fp32Bound;

    // Targets' logits are so far below the others that the losses of Hopper's kernels do not grow any more.
    [Test]
    public async Task VeryLargeLossesAreFinite() {
        const int rows = 512, C = 8, V = 16;
        var (device, type) = (gpu.Shared, gpu.Precision);
        float[] weights = [.. Enumerable.Range(0, V * C).Select(i => i < C ? -8f : 8f)];
        var (losses, dx) = (device.Poisoned(1, 1, rows), device.Poisoned(1, rows, C, type));
        var dw = device.Upload(new float[V * C], 1, V, C);
        var ones = device.Upload([.. Enumerable.Repeat(1f, rows * C)], 1, rows, C, type);
        device.LinearClassify(ones, device.Upload(weights, 1, V, C, type), new int[rows], V,
            device.Poisoned(1, rows, V, type), losses, 1, dx, dw);
        await Assert.That(device.Download(losses).Min()).IsGreaterThan(115);
        await Assert.That(RelativeError(device.Download(dx), [.. Enumerable.Repeat(16.0, rows * C)])).IsLessThan(1e-2);
    }

    // ---- Optimizer

    [Test]
    [Arguments(1)]
    [Arguments(67)]
    [Arguments(1_023)]
    [Arguments(5_000_001)]
    public async Task SumOfSquares(int count) {
        var draws = Floats(1, Math.Min(count, 70_001));
        float[] x = [.. Enumerable.Range(0, count).Select(i => draws[i % draws.Length])];
        var onDevice = gpu.Shared.Upload(x);
        var (found, again) = (gpu.Shared.SumOfSquares(onDevice), gpu.Shared.SumOfSquares(onDevice));
        await Assert.That(RelativeError(found, x.Sum(value => (double)value * value))).IsLessThan(1e-6);
        await Assert.That(again).IsEqualTo(found);
    }

    [Test]
    [Arguments(8, 1.0)]
    [Arguments(72, 0.3)]
    [Arguments(70_008, 1.0)]
    // Gradients as small as epsilon, which then counts.
    [Arguments(24, 1e-8)]
    public Task AdamW(int count, double gradientStd) {
        // Parts of different lengths, of which one does not decay.
        int[] counts = [count, count / 16 * 8 + 8, 8];
        return gpu.Compare(a => {
            var (parts, first) = (new List<AdamWPart>(), 0L);
            foreach (var (i, n) in counts.Index()) {
                Tensor Zeros(string name) => a.Result(name, a.Device.Upload(new float[n]), 1e-6, 1e-6);
                var master = a.Sum($"master{i}", i, 1, n, 1e-6);
                var w = a.Device.Precision == DataType.Fp32 ? master : a.Device.Poisoned(1, 1, n, DataType.Bf16);
                parts.Add(new(first, i != 1, w, master, Zeros($"dw{i}"), Zeros($"m{i}"), Zeros($"v{i}")));
                first += n;
            }
            for (var number = 1; number <= 3; number++) {
                foreach (var (i, part) in parts.Index())
                    a.Device.Write(part.Dw, Floats(10 * number + i, part.Dw.Count, gradientStd));
                // The second update has another rate, and the third one no decay.
                a.Device.AdamW(CollectionsMarshal.AsSpan(parts), new AdamWStep(number, number == 2 ? 0.1f : 0.05f,
                    number == 3 ? 0 : 0.1f, 0.7f, 0.9f, 0.95f, 1e-8f, Seed: 42));
            }
        });
    }

    [Test]
    [Arguments(3, 13)]
    [Arguments(8, 21)]
    [Arguments(16, 1)]
    public async Task AdamWOfAPartLeavesItsNeighboursAlone(int first, int count) {
        const int all = 48, padded = 24;
        var (device, type) = (gpu.Shared, gpu.Precision);
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
                    a.Device.Upload(new float[depth * height * width], depth, height, width), bf16, fp32);
                // Masters start at 0, so that what is compared is the change.
                var master = Zeros("master", 4e-2, 1e-4);
                var w = a.Device.Precision == DataType.Fp32 ? master
                    : a.Device.Poisoned(depth, height, width, DataType.Bf16);
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
        Tensor m = device.Upload(zeros, 1, rows, columns), master = device.Upload(zeros, 1, rows, columns);
        var w = gpu.Precision == DataType.Fp32 ? master : device.Poisoned(1, rows, columns, DataType.Bf16);
        device.Muon([new(0, w, master, device.Upload(gradient, 1, rows, columns), m)],
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

/// <summary>How weights in bf16 follow their masters: rounded up or down at random, so that they are right in the
/// mean.</summary>
[Category("gpu"), RequiresGpu, NotInParallel("gpu")]
[Arguments(false)]
[Arguments(true)]
public sealed class GpuRoundingTests(bool withMuon) {
    /// <summary>How many of its standard deviations a sum may be off. Seeds are fixed, so it passes always or
    /// never.</summary>
    const double Deviations = 5;

    readonly IDevice device = GpuUnderTest.Bf16.Shared;

    /// <summary>The weights after an update of these masters, and the masters, which without gradients stay.</summary>
    (float[] Weights, float[] Masters) Update(float[] masters, uint seed, long first = 0, double gradientStd = 0) {
        const int columns = 8;
        Tensor Matrix(float[] values) => device.Upload(values, 1, values.Length / columns, columns);
        var zeros = new float[masters.Length];
        Tensor master = Matrix(masters), m = Matrix(zeros), dw = Matrix(Floats(9, masters.Length, gradientStd));
        var w = device.Poisoned(1, master.Rows, columns, DataType.Bf16);
        if (withMuon)
            device.Muon([new(first, w, master, dw, m)], new MuonStep(0.1f, 0, 1, 0.95f, seed));
        else
            device.AdamW([new(first, true, w, master, dw, m, Matrix(zeros))],
                new AdamWStep(1, 0.1f, 0, 1, 0.9f, 0.95f, 1e-8f, seed));
        return (device.Download(w), device.Download(master));
    }

    [Test]
    [Arguments(0)]
    [Arguments(1)]
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
            // Away from zero, so that what always goes one way there does not cancel out.
            sum += Math.Abs((double)weights[i]) - Math.Abs(masters[i]);
            // Of a choice between two numbers whose mean is the master.
            variance += ((double)masters[i] - toZero) * ((double)fromZero - masters[i]);
        }
        await Assert.That(Math.Abs(sum)).IsLessThan(Deviations * Math.Sqrt(variance));
    }

    [Test]
    public async Task AnEighthOfTheWayUpEveryEighthGoesUp() {
        const int count = 100_000;
        const float lower = 1, upper = 1 + 1 / 128f;
        var masters = Enumerable.Repeat(1 + 1 / 1024f, count).ToArray();
        bool[] Up(uint seed) {
            var weights = Update(masters, seed).Weights;
            return [.. weights.Select(weight => weight == upper || (weight == lower ? false
                : throw new InvalidOperationException($"{weight}")))];
        }
        async Task Expect(string what, IEnumerable<bool> cases, double probability) {
            bool[] all = [.. cases];
            var deviation = Math.Sqrt(all.Length * probability * (1 - probability));
            await Assert.That(all.Count(up => up)).IsBetween(
                (int)(all.Length * probability - Deviations * deviation),
                (int)(all.Length * probability + Deviations * deviation) + 1).Because(what);
        }
        var (up, other) = (Up(42), Up(43));
        await Expect("one seed", up, 1.0 / 8);
        await Expect("the next seed", other, 1.0 / 8);
        // Neighbours, which may share a random number, and the same weight in two steps know nothing of each other.
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
        // Another seed or place: most of the weights' choices are others.
        foreach (var (seed, first) in ((uint, long)[])[(43, 0), (42, count), (42, far)]) {
            var other = Update(masters, seed, first).Weights;
            var different = other.Zip(weights, (x, y) => x != y).Count(isDifferent => isDifferent);
            await Assert.That(different).IsBetween(count / 4, count / 2).Because($"seed {seed}, first {first}");
        }
    }
}

/// <summary>Attention in each of its kernels against the CPU's.</summary>
[Category("gpu"), RequiresGpu, NotInParallel("gpu")]
[MethodDataSource(typeof(GpuUnderTest), nameof(GpuUnderTest.All))]
public sealed class GpuAttentionTests(GpuUnderTest gpu) {
    /// <summary>A score of 400 is rounded by 1e-5 and more, and so is its exponential in proportion.</summary>
    const double LargeScoresBound = 1e-4;

    /// <summary>B, T, NH and HS: tiles of 64 and blocks of 128 end raggedly where heads have 64 channels; other heads,
    /// the largest included, have kernels of their own.</summary>
    public static IEnumerable<(int B, int T, int NH, int HS)> Sizes() => [
        (1, 5, 3, 64), (2, 63, 1, 64), (1, 64, 12, 64), (2, 65, 3, 64), (1, 127, 1, 64), (2, 128, 3, 64),
        (1, 129, 12, 64), (2, 200, 3, 64), (1, 256, 1, 64), (1, 1000, 3, 64), (2, 1024, 3, 64),
        (1, 5, 1, 8), (2, 65, 3, 16), (1, 130, 2, 24), (2, 33, 1, 40), (1, 300, 3, 128), (2, 70, 1, 256),
        // The longest that a kernel's tests take seconds for, the most heads of a model, and the most sequences.
        (1, 20_000, 1, 64), (1, 20_000, 1, 8), (1, 3, 512, 8), (65_535, 1, 1, 8), (65_535, 2, 1, 64),
    ];

    [Test]
    [Arguments(1, 1, 1, 64)]
    [Arguments(2, 1, 3, 64)]
    [Arguments(2, 1, 3, 16)]
    [MethodDataSource(nameof(Sizes))]
    public Task Attention(int B, int T, int NH, int HS) => Attention(B, T, 0, NH, HS, 1);

    [Test]
    [Arguments(1, 2, 1, 1, 64)]
    [Arguments(1, 8, 7, 12, 64)]
    [Arguments(2, 70, 64, 3, 64)]
    [Arguments(1, 101, 100, 3, 64)]
    [Arguments(1, 200, 100, 3, 16)]
    [Arguments(2, 10, 7, 1, 128)]
    public Task AttentionOfTheLastRows(int B, int T, int start, int NH, int HS) => Attention(B, T, start, NH, HS, 1);

    [Test]
    [Arguments(0, 64)]
    [Arguments(100, 64)]
    [Arguments(0, 16)]
    // Scores of some ±400: without the subtraction of their maximum, their exponentials would overflow.
    public Task AttentionTakesLargeScores(int start, int HS) => Attention(2, 200, start, 3, HS, 10);

    Task Attention(int B, int T, int start, int NH, int HS, double std) => gpu.Compare(a => {
        var y = a.Output("y", B, T - start, NH * HS, fp32: std > 1 ? LargeScoresBound : Arrays.Fp32Bound);
        a.Device.Attention(a.Input(1, B, T, 3 * NH * HS, std), start, NH, y, a.Fp32Output("lse", B, NH, T - start));
    });

    [Test]
    [MethodDataSource(nameof(Sizes))]
    public Task AttentionBackward(int B, int T, int NH, int HS) => Backward(B, T, NH, HS, 1);

    [Test]
    [Arguments(64)]
    [Arguments(16)]
    public Task AttentionBackwardTakesLargeScores(int HS) => Backward(2, 200, 3, HS, 10);

    Task Backward(int B, int T, int NH, int HS, double std) {
        var (qkv, y, lse) = Forward(B, T, NH, HS, std);
        var fp32 = std > 1 ? LargeScoresBound : Arrays.Fp32Bound;
        const double bf16 = 5e-3; // P is rounded, then its product with dP − delta, then the result
        return gpu.Compare(a => a.Device.AttentionBackward(a.Input(2, B, T, NH * HS), a.Input(qkv, B, T, 3 * NH * HS),
            a.Input(y, B, T, NH * HS), a.Device.Upload(lse, B, NH, T), NH,
            a.Output("dq dk dv", B, T, 3 * NH * HS, bf16, fp32), a.Sum("dbias", 3, 1, 3 * NH * HS, fp32, bf16)));
    }

    /// <summary>Random queries, keys and values, and what the CPU makes of them.</summary>
    (float[] Qkv, float[] Y, float[] Lse) Forward(int B, int T, int NH, int HS, double std) {
        using var cpu = new Cpu();
        var qkv = Rounded(Floats(1, B * T * 3 * NH * HS, std), gpu.Precision);
        var (y, lse) = (cpu.Poisoned(B, T, NH * HS), cpu.Poisoned(B, NH, T));
        cpu.Attention(cpu.Upload(qkv, B, T, 3 * NH * HS), 0, NH, y, lse);
        return (qkv, cpu.Download(y), cpu.Download(lse));
    }

    [Test]
    [Arguments(64)]
    [Arguments(8)]
    public async Task AttentionTakesTheLongestSequence(int HS) {
        // Three queries are the reference's work: the others' outputs are not looked at, and have no gradient.
        const int T = Config.LongestT;
        var (device, type, scale) = (gpu.Shared, gpu.Precision, 1 / Math.Sqrt(HS));
        float[] qkv = Rounded(Floats(1, T * 3 * HS), type), draws = Rounded(Floats(2, T * HS), type);
        float[] dy = new float[T * HS], y = new float[T * HS], lse = [.. Enumerable.Repeat(20f, T)];
        double[] values = Doubles(qkv), expected = new double[T * 3 * HS];
        var yDevice = device.Poisoned(1, T, HS, type);
        var (qkvDevice, lseDevice) = (device.Upload(qkv, 1, T, 3 * HS, type), device.Poisoned(1, 1, T));
        device.Attention(qkvDevice, 0, 1, yDevice, lseDevice);
        var (yFound, lseFound) = (device.Download(yDevice), device.Download(lseDevice));
        foreach (var t in (int[])[0, T / 2 + 1, T - 1]) {
            Span<double> Packed(double[] array, int part, int s) => array.AsSpan((s * 3 + part) * HS, HS);
            draws.AsSpan(t * HS, HS).CopyTo(dy.AsSpan(t * HS));
            var (scores, output, gradient) = (new double[t + 1], new double[HS], Doubles(draws.AsSpan(t * HS, HS)));
            for (var s = 0; s <= t; s++)
                scores[s] = Reference.Dot(Packed(values, 0, t), Packed(values, 1, s)) * scale;
            var logSum = Reference.LogSumExp(scores);
            for (var s = 0; s <= t; s++) {
                for (var i = 0; i < HS; i++)
                    output[i] += Math.Exp(scores[s] - logSum) * Packed(values, 2, s)[i];
            }
            var delta = Reference.Dot(output, gradient);
            for (var s = 0; s <= t; s++) {
                var weight = Math.Exp(scores[s] - logSum);
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
        var (dqkv, dbias) = (device.Poisoned(1, T, 3 * HS, type), device.Upload(new float[3 * HS]));
        device.AttentionBackward(device.Upload(dy, 1, T, HS, type), qkvDevice, device.Upload(y, 1, T, HS, type),
            device.Upload(lse, 1, 1, T), 1, dqkv, dbias);
        var found = device.Download(dqkv);
        for (var part = 0; part < 3; part++) {
            var columns = Enumerable.Range(0, expected.Length).Where(i => i / HS % 3 == part);
            var error = RelativeError([.. columns.Select(i => found[i])], [.. columns.Select(i => expected[i])]);
            var bound = type == DataType.Bf16 ? 5e-3 : LargeScoresBound;
            await Assert.That(error).IsLessThan(bound).Because($"part {part}");
        }
    }

    [Test]
    [Arguments(1, 1, 64)]
    [Arguments(2, 3, 64)]
    [Arguments(2, 3, 16)]
    public async Task OneRowAttendsToItselfWhateverItsScore(int B, int NH, int HS) {
        // Its output is its value; the gradient of its score is the difference of two equal numbers.
        var (C, device, type) = (NH * HS, gpu.Shared, gpu.Precision);
        var (qkv, y, lse) = Forward(B, 1, NH, HS, 1);
        var dy = Rounded(Floats(2, B * C), type);
        var dqkv = device.Poisoned(B, 1, 3 * C, type);
        device.AttentionBackward(device.Upload(dy, B, 1, C, type), device.Upload(qkv, B, 1, 3 * C, type),
            device.Upload(y, B, 1, C, type), device.Upload(lse, B, NH, 1), NH, dqkv,
            device.Poisoned(1, 1, 3 * C));
        var rows = device.Download(dqkv).Chunk(3 * C).ToArray();
        await Assert.That(RelativeError([.. rows.SelectMany(row => row[(2 * C)..])], dy)).IsLessThan(1e-5);
        await Assert.That(rows.SelectMany(row => row[..(2 * C)]).Max(Math.Abs)).IsLessThan(1e-5f);
    }
}

/// <summary>The model's tests on the GPU in fp32.</summary>
[Category("gpu"), RequiresGpu, NotInParallel("gpu"), InheritsTests]
[MethodDataSource(typeof(GpuModelTests), nameof(Devices))]
public sealed class GpuModelTests(DeviceUnderTest deviceUnderTest) : ModelTests(deviceUnderTest) {
    public static IEnumerable<DeviceUnderTest> Devices() => [new("CUDA fp32", GpuUnderTest.Fp32.Open)];
}

/// <summary>Training on the GPU: against PyTorch, the CPU and itself, with heads of 64 channels where it has kernels
/// for them alone.</summary>
[Category("gpu"), RequiresGpu, NotInParallel("gpu")]
[MethodDataSource(typeof(GpuUnderTest), nameof(GpuUnderTest.All))]
public sealed class GpuTrainingTests(GpuUnderTest gpu) {
    static readonly Config Small = new(MaxT: 128, V: 300, Vp: 304, L: 2, NH: 2, C: 128);

    const int B = 2, T = 100;

    /// <summary>A model with a batch of random tokens, and with random weights of which none is zero or one.</summary>
    static Model RandomModel(IDevice device, Purpose purpose, int recompute = 0, int B = B, int T = T) {
        var model = new Model(Small, device, B, T, purpose, recompute);
        foreach (var parameters in (Parameters[])[model.Weights, model.Master]) {
            var seed = 1;
            foreach (var tensor in parameters.Tensors) {
                var values = Floats(seed++, tensor.Count, 0.1);
                // The weights of layer norms are near one.
                foreach (ref var value in values.AsSpan())
                    value += seed - 1 is 3 or 9 or 15 ? 1 : 0;
                device.Write(tensor, Rounded(values, DataType.Bf16));
            }
        }
        Tokens(21, B * T, Small.V).CopyTo(model.Tokens, 0);
        Tokens(22, B * T, Small.V).CopyTo(model.Targets, 0);
        return model;
    }

    /// <summary>The logits, the losses and the gradients of the mean loss of the model's batch.</summary>
    static (float[] Logits, float[] Losses, Parameters Gradients) Pass(Model model) {
        model.Forward();
        var logits = model.Device.Values(model.Logits(0));
        model.Loss(1f / model.Tokens.Length);
        model.Backward();
        model.MeanLoss();
        return (logits, model.Losses, model.Gradients!);
    }

    // ---- PyTorch and the CPU

    [Test]
    public async Task LogitsLossAndGradientsEqualPyTorchs() {
        var results = Verification.Run(Golden("model.bin"), Golden("state.bin"), gpu.Shared).ToArray();
        await Assert.That(results.Length).IsEqualTo(18);
        foreach (var (name, largest, relative) in results) {
            await Assert.That(relative < Verification.Tolerance(gpu.Precision)).IsTrue()
                .Because($"{name} differs by {relative:g3}, at most by {largest:g3}");
        }
    }

    [Test]
    public Task TenStepsOfTrainingEqualPyTorchs() => ModelTests.TenStepsOfTrainingEqualPyTorchs(gpu.Shared);

    [Test]
    public async Task LogitsLossesAndGradientsEqualTheCpus() {
        using var cpu = new Cpu();
        var (expected, found) = (Pass(RandomModel(cpu, Purpose.Train)), Pass(RandomModel(gpu.Shared, Purpose.Train)));
        async Task Near(float[] found, float[] expected, string name) => await Assert.That(
            RelativeError(found, expected)).IsLessThan(Verification.Tolerance(gpu.Precision)).Because(name);
        static float[] Known(float[] logits) => [.. logits.Chunk(Small.Vp).SelectMany(row => row[..Small.V])];
        await Near(Known(found.Logits), Known(expected.Logits), "logits");
        await Near(found.Losses, expected.Losses, "losses");
        foreach (var (i, shape) in Small.Parameters.Index()) {
            var (left, right) = (found.Gradients.Tensors[i], expected.Gradients.Tensors[i]);
            await Near(gpu.Shared.Values(left), cpu.Values(right), shape.Name);
        }
    }

    // ---- Two ways to one result

    [Test]
    public async Task TwoTrainingsGiveTheSameBits() {
        float[][] Train() {
            using var device = gpu.Open();
            var model = RandomModel(device, Purpose.Train);
            var optimizer = new Optimizer(model);
            var (losses, norm) = (new List<float>(), 0f);
            for (var step = 1; step <= 3; step++) {
                losses.AddRange(Pass(model).Losses);
                norm = optimizer.GradientNorm();
                optimizer.Update(step, 1e-3f, 0.1f, norm);
            }
            Parameters[] all = [model.Weights, model.Master, optimizer.M, optimizer.V];
            return [[.. losses, norm], .. all.Select(parameters => device.Values(parameters.All))];
        }
        var (first, second) = (Train(), Train());
        foreach (var (i, values) in first.Index())
            await Assert.That(GpuUnderTest.SameBits(second[i], values)).IsTrue().Because($"{i}");
    }

    [Test]
    [Arguments(1)]
    [Arguments(2)]
    public async Task RecomputationGivesTheSameGradients(int recompute) {
        var kept = Pass(RandomModel(gpu.Shared, Purpose.Train)).Gradients;
        var recomputed = Pass(RandomModel(gpu.Shared, Purpose.Train, recompute)).Gradients;
        foreach (var (i, shape) in Small.Parameters.Index()) {
            var (left, right) = (gpu.Shared.Values(recomputed.Tensors[i]), gpu.Shared.Values(kept.Tensors[i]));
            await Assert.That(GpuUnderTest.SameBits(left, right)).IsTrue().Because(shape.Name);
        }
    }

    [Test]
    public async Task EvaluationGivesTheSameLossesAsTraining() {
        var (train, evaluate) = (RandomModel(gpu.Shared, Purpose.Train), RandomModel(gpu.Shared, Purpose.Evaluate));
        foreach (var model in (Model[])[train, evaluate]) {
            model.Forward();
            model.Loss();
            model.MeanLoss();
        }
        await Assert.That(GpuUnderTest.SameBits(evaluate.Losses, train.Losses)).IsTrue();
    }

    [Test]
    [Arguments(1)]
    [Arguments(70)]
    public async Task GenerationPicksTheLikeliestOfAFullForwardPass(int promptLength) {
        var prompt = Tokens(5, promptLength, Small.V);
        int[] generated = [.. RandomModel(gpu.Shared, Purpose.Generate, B: 1, T: 1).Generate(prompt, new(0, 0, 1, 1))];
        await Assert.That(generated.Length).IsEqualTo(Small.MaxT - promptLength + 1);
        var whole = RandomModel(gpu.Shared, Purpose.Evaluate, B: 1, T: Small.MaxT);
        int[] sequence = [.. prompt, .. generated[..^1]];
        sequence.CopyTo(whole.Tokens, 0);
        whole.Forward();
        var rows = gpu.Shared.Values(whole.Logits(0)).Chunk(Small.Vp).Skip(promptLength - 1);
        // By other kernels two tokens may change places that are as near as this.
        var part = 1 - (float)Verification.Tolerance(gpu.Precision);
        foreach (var (row, token) in rows.Zip(generated))
            await Assert.That(row[token]).IsGreaterThan(part * row[..Small.V].Max());
    }

    // ---- Checkpoints

    [Test]
    public async Task AResumedRunEqualsAnUnbrokenOne() {
        using var folder = Inputs();
        Train(folder, gpu.Open, "whole");
        Folders.Copy(folder["whole"], folder["part"], name => !name.Contains("00000006"));
        Train(folder, gpu.Open, "part", resume: true);
        await Assert.That(Folders.Contents(folder["part"])).IsEqualTo(Folders.Contents(folder["whole"]));
    }

    internal static TemporaryFolder Inputs() {
        var folder = new TemporaryFolder();
        Folders.WriteModel(folder["model.bin"], Small.MaxT, Small.V, Small.L, Small.NH, Small.C, Small.Vp);
        WriteShard(folder["train.bin"], [.. Tokens(1, 4_000, Small.V).Select(token => (ushort)token)]);
        WriteShard(folder["val.bin"], [.. Tokens(2, 1_000, Small.V).Select(token => (ushort)token)]);
        return folder;
    }

    /// <summary>Trains in a folder, with a checkpoint every three steps.</summary>
    /// <returns>Each step's loss.</returns>
    internal static float[] Train(TemporaryFolder folder, Func<IDevice> open, string to, bool resume = false) {
        var options = new TrainOptions(folder["train.bin"], folder["val.bin"], folder["model.bin"], folder[to], B, T,
            TotalBatch: 2 * B * T, MaxSteps: 6, LearningRate: 1e-3f, Warmup: 2, FinalFraction: 0.1f,
            WeightDecay: 0.1f, Schedule.Cosine, ValEvery: 2, ValBatches: 2, SampleEvery: 2, GenTokens: 5,
            CheckpointEvery: 3, Keep: 10, resume, Recompute: 0, Overfit: false, Shuffle: true, Seed: 42);
        using var output = new StringWriter(CultureInfo.InvariantCulture);
        using var device = open();
        using (var trainer = new Trainer(options, device, output, NullLogger.Instance))
            trainer.Run();
        return [.. Regex.Matches(output.ToString(), @"step +\d+/\d+ \| loss (\S+)").Select(match =>
            float.Parse(match.Groups[1].Value, CultureInfo.InvariantCulture))];
    }
}

/// <summary>A run that goes on elsewhere than it began.</summary>
[Category("gpu"), RequiresGpu, NotInParallel("gpu")]
public sealed class GpuCheckpointTests {
    /// <summary>Pairs of devices, of which the second takes up what the first one wrote.</summary>
    public static IEnumerable<(DeviceUnderTest From, DeviceUnderTest To)> Moves() {
        DeviceUnderTest cpu = new("CPU", () => new Cpu()), fp32 = new("CUDA fp32", GpuUnderTest.Fp32.Open);
        DeviceUnderTest bf16 = new("CUDA bf16", GpuUnderTest.Bf16.Open);
        return [(bf16, cpu), (bf16, fp32), (cpu, bf16), (fp32, bf16), (fp32, cpu), (cpu, fp32)];
    }

    [Test]
    [MethodDataSource(nameof(Moves))]
    public async Task ACheckpointIsResumedOnAnotherDevice(DeviceUnderTest from, DeviceUnderTest to) {
        using var folder = GpuTrainingTests.Inputs();
        var expected = GpuTrainingTests.Train(folder, from.Open, "whole");
        Folders.Copy(folder["whole"], folder["part"], name => !name.Contains("00000006"));
        var found = GpuTrainingTests.Train(folder, to.Open, "part", resume: true);
        await Assert.That(expected.Length).IsEqualTo(6);
        await Assert.That(found.Length).IsEqualTo(3);
        for (var i = 0; i < 3; i++)
            await Assert.That(RelativeError(found[i], expected[3 + i])).IsLessThan(1e-2).Because($"step {4 + i}");
    }
}

/// <summary>What ends a process's use of the GPU, and so runs only when it is asked for by name.</summary>
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
