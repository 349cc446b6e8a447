using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>Every operation of a device against the float64 formulas: results, and gradients by finite differences.
/// Sizes are such that vectors, tiles and blocks end raggedly; what an operation overwrites holds no number
/// before.</summary>
[MethodDataSource(typeof(Support), nameof(Support.Devices))]
public sealed class OperationTests(DeviceUnderTest deviceUnderTest) : IDisposable {
    /// <summary>The largest ‖found − expected‖/‖expected‖: some fifty roundings of fp32.</summary>
    const double Bound = 1e-5;

    /// <summary>Elements of an array whose derivatives are checked, when it has more.</summary>
    const int Samples = 200;

    readonly IDevice device = deviceUnderTest.Open();

    public void Dispose() => device.Dispose();

    static async Task Near(ReadOnlyMemory<float> found, double[] expected, double bound = Bound) =>
        await Assert.That(RelativeError(found.Span, expected)).IsLessThan(bound);

    /// <summary>Compares a gradient, or what was added to one, with differences of a function of x.</summary>
    static async Task NearGradient(float[] found, double[] x, Func<double> function, float[]? before = null) {
        int[] indices = [.. Enumerable.Range(0, x.Length)];
        if (x.Length > Samples) {
            new Random(1).Shuffle(indices);
            indices = indices[..Samples];
        }
        var added = indices.Select(i => found[i] - (before?[i] ?? 0)).ToArray();
        await Near(added, Reference.Gradient(x, function, indices));
    }

    // ---- Memory

    [Test]
    [Arguments(1)]
    [Arguments(67)]
    [Arguments(70_001)]
    public async Task ClearFillsWithZerosAndNoFurther(int count) {
        var x = device.Upload(Floats(1, count));
        device.Clear(x);
        await Assert.That(device.Download(x).All(value => value == 0)).IsTrue();
    }

    [Test]
    public async Task AllocatedMemoryIsZero() {
        const int count = 3_000_000;
        var values = Floats(1, count);
        device.Read(new Tensor(device.Allocate(count * sizeof(float)), 1, 1, count), values);
        await Assert.That(values.All(value => value == 0)).IsTrue();
    }

    // ---- Embedding

    [Test]
    [Arguments(1, 1, 5, 0)]
    [Arguments(2, 5, 20, 0)]
    [Arguments(3, 7, 67, 0)]
    [Arguments(1, 3, 48, 4)]
    public async Task Embed(int B, int T, int C, int start) {
        const int V = 11;
        var (wte, wpe, tokens) = (Floats(1, V * C), Floats(2, (start + T) * C), Tokens(3, B * T, V));
        var x = device.Poisoned(B, T, C);
        device.Embed(tokens, device.Upload(wte, 1, V, C), device.Upload(wpe, 1, start + T, C), start, x);
        await Near(device.Download(x), Reference.Embed(tokens, Doubles(wte), Doubles(wpe), start, T, C));
    }

    [Test]
    [Arguments(1, 1, 5)]
    [Arguments(2, 5, 20)]
    [Arguments(3, 7, 67)]
    [Arguments(2, 3, 130)]
    public async Task EmbedBackward(int B, int T, int C) {
        // Few tokens, so that some repeat and others do not occur; positions past T get no gradient.
        const int V = 5;
        var maxT = T + 2;
        var (tokens, dx) = (Tokens(3, B * T, V), Floats(4, B * T * C));
        var (dwte, dwpe) = (Floats(5, V * C), Floats(6, maxT * C));
        var (dwteOnDevice, dwpeOnDevice) = (device.Upload(dwte, 1, V, C), device.Upload(dwpe, 1, maxT, C));
        device.EmbedBackward(tokens, device.Upload(dx, B, T, C), dwteOnDevice, dwpeOnDevice);
        var (wte, wpe, r) = (new double[V * C], new double[maxT * C], Doubles(dx));
        double Function() => Reference.Dot(Reference.Embed(tokens, wte, wpe, 0, T, C), r);
        await NearGradient(device.Download(dwteOnDevice), wte, Function, dwte);
        await NearGradient(device.Download(dwpeOnDevice), wpe, Function, dwpe);
    }

    // ---- Layer norm

    [Test]
    [Arguments(1, 5)]
    [Arguments(3, 20)]
    [Arguments(5, 48)]
    [Arguments(7, 67)]
    [Arguments(130, 768)]
    [Arguments(400, 33)]
    public async Task LayerNorm(int rows, int C) {
        var (x, w, b) = (Floats(1, rows * C, 2), Floats(2, C), Floats(3, C));
        var (y, statistics) = (device.Poisoned(1, rows, C), device.Poisoned(1, rows, 2));
        device.LayerNorm(device.Upload(x, 1, rows, C), device.Upload(w), device.Upload(b), y, statistics);
        var input = Doubles(x);
        await Near(device.Download(y), Reference.LayerNorm(input, Doubles(w), Doubles(b)));
        await Near(device.Download(statistics), Reference.Statistics(input, C));
    }

    [Test]
    [Arguments(1, 5)]
    [Arguments(3, 20)]
    [Arguments(5, 48)]
    [Arguments(7, 67)]
    [Arguments(130, 100)]
    public async Task LayerNormBackward(int rows, int C) {
        var (x, w, b) = (Floats(1, rows * C, 2), Floats(2, C), new double[C]);
        var (dy, dx) = (Floats(3, rows * C), Floats(4, rows * C));
        var (dw, db) = (Floats(5, C), Floats(6, C));
        var (input, weights, r) = (Doubles(x), Doubles(w), Doubles(dy));
        var statistics = Reference.Statistics(input, C).Select(value => (float)value).ToArray();
        var dxOnDevice = device.Upload(dx, 1, rows, C);
        var (dwOnDevice, dbOnDevice) = (device.Upload(dw), device.Upload(db));
        var dbias = Floats(7, C);
        var dbiasOnDevice = device.Upload(dbias);
        device.LayerNormBackward(device.Upload(dy, 1, rows, C), device.Upload(x, 1, rows, C), device.Upload(w),
            device.Upload(statistics, 1, rows, 2), dxOnDevice, dwOnDevice, dbOnDevice, dbiasOnDevice);
        var sums = Enumerable.Range(0, C).Select(i => dbias[i] +
            device.Download(dxOnDevice).Chunk(C).Sum(row => (double)row[i])).ToArray();
        await Near(device.Download(dbiasOnDevice), sums);
        double Function() => Reference.Dot(Reference.LayerNorm(input, weights, b), r);
        await NearGradient(device.Download(dxOnDevice), input, Function, dx);
        await NearGradient(device.Download(dwOnDevice), weights, Function, dw);
        await NearGradient(device.Download(dbOnDevice), b, Function, db);
    }

    [Test]
    [Arguments(20, 0f)]
    [Arguments(67, 3f)]
    [Arguments(48, -1000f)]
    public async Task LayerNormOfAConstantRowIsTheBias(int C, float value) {
        // Whole numbers, so that the mean is exact and nothing remains to be divided by √1e-5.
        var (x, b) = (Enumerable.Repeat(value, 3 * C).ToArray(), Floats(2, C));
        var (y, statistics) = (device.Poisoned(1, 3, C), device.Poisoned(1, 3, 2));
        device.LayerNorm(device.Upload(x, 1, 3, C), device.Upload(Floats(1, C)), device.Upload(b), y, statistics);
        await Same(device.Download(y), [.. b, .. b, .. b]);
        await Near(device.Download(statistics), Reference.Statistics(Doubles(x), C));
    }

    // ---- Linear and GELU

    /// <summary>Rows, C and OC of the products: in each of the three layouts of training, some are ragged.</summary>
    public static IEnumerable<(int Rows, int C, int OC)> Products() => [
        (1, 1, 1), (5, 7, 3), (1, 1000, 768), (3, 50, 33), (2, 300, 400), (7, 67, 20), (97, 96, 384), (130, 400, 300),
        (385, 33, 97), (400, 257, 385), (13, 1025, 31),
    ];

    [Test]
    [MethodDataSource(nameof(Products))]
    public async Task Linear(int rows, int C, int OC) {
        var (x, w, b) = (Floats(1, rows * C), Floats(2, OC * C), Floats(3, OC));
        var (xOnDevice, wOnDevice) = (device.Upload(x, 1, rows, C), device.Upload(w, 1, OC, C));
        var (y, withoutBias) = (device.Poisoned(1, rows, OC), device.Poisoned(1, rows, OC));
        device.Linear(xOnDevice, wOnDevice, device.Upload(b), y);
        device.Linear(xOnDevice, wOnDevice, default, withoutBias);
        var (input, weights) = (Doubles(x), Doubles(w));
        await Near(device.Download(y), Reference.Linear(input, weights, Doubles(b), C));
        await Near(device.Download(withoutBias), Reference.Linear(input, weights, null, C));
        var (residual, sum) = (Floats(4, rows * OC), device.Poisoned(1, rows, OC));
        var residualOnDevice = device.Upload(residual, 1, rows, OC);
        device.LinearResidual(xOnDevice, wOnDevice, device.Upload(b), residualOnDevice, sum);
        var expected = Reference.Linear(input, weights, Doubles(b), C);
        await Near(device.Download(sum), Reference.Add(expected, Doubles(residual)));
        await Same(device.Download(residualOnDevice), residual);
    }

    [Test]
    [MethodDataSource(nameof(Products))]
    public async Task LinearBackwardEqualsTransposedProducts(int rows, int C, int OC) {
        var (dy, x, w, dw) = (Floats(1, rows * OC), Floats(2, rows * C), Floats(3, OC * C), Floats(4, OC * C));
        var (dx, dwOnDevice) = (device.Poisoned(1, rows, C), device.Upload(dw, 1, OC, C));
        device.LinearBackward(device.Upload(dy, 1, rows, OC), device.Upload(x, 1, rows, C), device.Upload(w, 1, OC, C),
            dx, dwOnDevice);
        var (r, input, weights) = (Doubles(dy), Doubles(x), Doubles(w));
        await Near(device.Download(dx), Reference.Linear(r, Reference.Transpose(weights, C), null, OC));
        var product = Reference.Linear(Reference.Transpose(r, OC), Reference.Transpose(input, C), null, rows);
        await Near(device.Download(dwOnDevice), Reference.Add(Doubles(dw), product));
    }

    [Test]
    [Arguments(1, 5, 7)]
    [Arguments(3, 20, 9)]
    [Arguments(7, 9, 67)]
    [Arguments(5, 20, 48)]
    public async Task LinearBackward(int rows, int C, int OC) {
        var (dy, x, w, dw) = (Floats(1, rows * OC), Floats(2, rows * C), Floats(3, OC * C), Floats(4, OC * C));
        var (dx, dwOnDevice) = (device.Poisoned(1, rows, C), device.Upload(dw, 1, OC, C));
        device.LinearBackward(device.Upload(dy, 1, rows, OC), device.Upload(x, 1, rows, C), device.Upload(w, 1, OC, C),
            dx, dwOnDevice);
        var (r, input, weights) = (Doubles(dy), Doubles(x), Doubles(w));
        double Function() => Reference.Dot(Reference.Linear(input, weights, null, C), r);
        await NearGradient(device.Download(dx), input, Function);
        await NearGradient(device.Download(dwOnDevice), weights, Function, dw);
    }

    [Test]
    [Arguments(1, 5, 20)]
    [Arguments(3, 48, 67)]
    [Arguments(130, 20, 80)]
    public async Task LinearGelu(int rows, int C, int OC) {
        var (x, w, b) = (Floats(1, rows * C), Floats(2, OC * C), Floats(3, OC));
        var (input, y) = (device.Poisoned(1, rows, OC), device.Poisoned(1, rows, OC));
        device.LinearGelu(device.Upload(x, 1, rows, C), device.Upload(w, 1, OC, C), device.Upload(b), input, y);
        var expected = Reference.Linear(Doubles(x), Doubles(w), Doubles(b), C);
        await Near(device.Download(input), expected);
        await Near(device.Download(y), Reference.Gelu(expected));
    }

    [Test]
    [Arguments(1, 20, 5)]
    [Arguments(3, 67, 9)]
    [Arguments(7, 48, 20)]
    public async Task LinearGeluBackward(int rows, int C, int OC) {
        var (dy, input, w) = (Floats(1, rows * OC), Floats(2, rows * C, 2), Floats(3, OC * C));
        var (dw, dbias) = (Floats(4, OC * C), Floats(5, C));
        var (x, weights, bias, r) = (Doubles(input), Doubles(w), new double[C], Doubles(dy));
        var gelu = Reference.Gelu(x).Select(value => (float)value).ToArray();
        var dx = device.Poisoned(1, rows, C);
        var (dwOnDevice, dbiasOnDevice) = (device.Upload(dw, 1, OC, C), device.Upload(dbias));
        device.LinearGeluBackward(device.Upload(dy, 1, rows, OC), device.Upload(gelu, 1, rows, C),
            device.Upload(input, 1, rows, C), device.Upload(w, 1, OC, C), dx, dwOnDevice, dbiasOnDevice);
        double Function() {
            double[] sum = [.. x.Select((value, i) => value + bias[i % C])]; // the bias of the product before
            return Reference.Dot(Reference.Linear(Reference.Gelu(sum), weights, new double[OC], C), r);
        }
        await NearGradient(device.Download(dx), x, Function);
        await NearGradient(device.Download(dwOnDevice), weights, Function, dw);
        await NearGradient(device.Download(dbiasOnDevice), bias, Function, dbias);
    }

    [Test]
    [Arguments(1)]
    [Arguments(67)]
    [Arguments(70_001)]
    public async Task Gelu(int count) {
        var x = Floats(1, count, 3);
        var y = device.Poisoned(1, 1, count);
        device.Gelu(device.Upload(x), y);
        await Near(device.Download(y), Reference.Gelu(Doubles(x)));
    }

    [Test]
    public async Task GeluOfLargeNumbersIsTheNumberOrZeroAndSoIsItsGradient() {
        float[] x = [-10_000, -100, -20, 20, 100, 10_000];
        var (y, dx) = (device.Poisoned(1, 1, x.Length), device.Poisoned(1, 1, x.Length));
        device.Gelu(device.Upload(x), y);
        // With the unit matrix for weights, dx is the derivative itself.
        var n = x.Length;
        var unit = Enumerable.Range(0, n * n).Select(i => i % (n + 1) == 0 ? 1f : 0).ToArray();
        var ones = Enumerable.Repeat(1f, n).ToArray();
        device.LinearGeluBackward(device.Upload(ones), y, device.Upload(x), device.Upload(unit, 1, n, n), dx,
            device.Upload(unit, 1, n, n), device.Poisoned(1, 1, n));
        await Near(device.Download(y), [0, 0, 0, 20, 100, 10_000]);
        await Near(device.Download(dx), [0, 0, 0, 1, 1, 1]);
    }

    // ---- Attention

    [Test]
    [Arguments(1, 1, 0, 1, 5)]
    [Arguments(2, 21, 0, 3, 16)]
    [Arguments(1, 65, 0, 2, 5)]
    [Arguments(2, 150, 0, 2, 64)]
    [Arguments(1, 300, 0, 3, 16)]
    [Arguments(2, 21, 4, 3, 5)]
    [Arguments(1, 65, 64, 3, 16)]
    [Arguments(1, 300, 7, 1, 64)]
    public async Task Attention(int B, int T, int start, int NH, int HS) {
        var qkv = Floats(1, B * T * 3 * NH * HS);
        var (y, lse) = (device.Poisoned(B, T - start, NH * HS), device.Poisoned(B, NH, T - start));
        device.Attention(device.Upload(qkv, B, T, 3 * NH * HS), start, NH, y, lse);
        var expected = Reference.Attention(Doubles(qkv), B, T, start, NH, HS);
        await Near(device.Download(y), expected.Y);
        await Near(device.Download(lse), expected.Lse);
    }

    [Test]
    public async Task AttentionTakesLargeScores() {
        // Scores of some ±400: without the subtraction of their maximum, their exponentials would overflow.
        const int B = 2, T = 21, NH = 3, HS = 16;
        var qkv = Floats(1, B * T * 3 * NH * HS, 10);
        var (y, lse) = (device.Poisoned(B, T, NH * HS), device.Poisoned(B, NH, T));
        device.Attention(device.Upload(qkv, B, T, 3 * NH * HS), 0, NH, y, lse);
        var expected = Reference.Attention(Doubles(qkv), B, T, 0, NH, HS);
        // A score of 400 is rounded by 1e-5 and more, and so are the weights.
        await Near(device.Download(y), expected.Y, 1e-4);
        await Near(device.Download(lse), expected.Lse);
    }

    [Test]
    [Arguments(1, 1, 1, 5)]
    [Arguments(2, 21, 3, 5)]
    [Arguments(1, 65, 1, 64)]
    [Arguments(1, 150, 2, 5)]
    [Arguments(1, 300, 1, 16)]
    public async Task AttentionBackward(int B, int T, int NH, int HS) {
        var (qkv, dy) = (Floats(1, B * T * 3 * NH * HS), Floats(2, B * T * NH * HS));
        var qkvOnDevice = device.Upload(qkv, B, T, 3 * NH * HS);
        var (y, lse) = (device.Poisoned(B, T, NH * HS), device.Poisoned(B, NH, T));
        device.Attention(qkvOnDevice, 0, NH, y, lse);
        var dbias = Floats(3, 3 * NH * HS);
        var (dqkv, dbiasOnDevice) = (device.Poisoned(B, T, 3 * NH * HS), device.Upload(dbias));
        device.AttentionBackward(device.Upload(dy, B, T, NH * HS), qkvOnDevice, y, lse, NH, dqkv, dbiasOnDevice);
        var (input, r, bias) = (Doubles(qkv), Doubles(dy), new double[dbias.Length]);
        double Function() => Reference.Dot(Reference.Attention(
            [.. input.Select((value, i) => value + bias[i % bias.Length])], B, T, 0, NH, HS).Y, r);
        await NearGradient(device.Download(dqkv), input, Function);
        await NearGradient(device.Download(dbiasOnDevice), bias, Function, dbias);
    }

    [Test]
    public async Task AttentionOfALongSequence() {
        // So many keys that fewer queries than usual are taken at once; one derivative, in a random direction, must do.
        const int T = 1500, NH = 1, HS = 5;
        var (qkv, dy) = (Floats(1, T * 3 * NH * HS), Floats(2, T * NH * HS));
        var qkvOnDevice = device.Upload(qkv, 1, T, 3 * NH * HS);
        var (y, lse) = (device.Poisoned(1, T, NH * HS), device.Poisoned(1, NH, T));
        device.Attention(qkvOnDevice, 0, NH, y, lse);
        var expected = Reference.Attention(Doubles(qkv), 1, T, 0, NH, HS);
        await Near(device.Download(y), expected.Y);
        await Near(device.Download(lse), expected.Lse);
        var dqkv = device.Poisoned(1, T, 3 * NH * HS);
        device.AttentionBackward(device.Upload(dy, 1, T, NH * HS), qkvOnDevice, y, lse, NH, dqkv,
            device.Poisoned(1, 1, 3 * NH * HS));
        var (input, r, gradient) = (Doubles(qkv), Doubles(dy), Doubles(device.Download(dqkv)));
        var direction = Doubles(Floats(3, qkv.Length));
        double Along(double[] distance) => Reference.Dot(
            Reference.Attention([.. input.Zip(direction, (x, d) => x + d * distance[0])], 1, T, 0, NH, HS).Y, r);
        double[] at = [0];
        var difference = Reference.Gradient(at, () => Along(at))[0] - Reference.Dot(gradient, direction);
        // A gradient wrong anywhere changes its product with normal draws by about the norm of what is wrong.
        var norm = Math.Sqrt(Reference.Dot(gradient, gradient));
        await Assert.That(RelativeError(norm + difference, norm)).IsLessThan(Bound);
    }

    // ---- Classifier

    [Test]
    [Arguments(1, 1, 5, 5)]
    [Arguments(2, 5, 211, 256)]
    [Arguments(1, 3, 67, 80)]
    [Arguments(2, 3, 50257, 50304)]
    public async Task Classify(int B, int T, int V, int Vp) {
        const float scale = 0.125f;
        var (logits, targets) = (Floats(1, B * T * Vp, 3), Tokens(2, B * T, V));
        targets[^1] = V - 1;
        var expected = Reference.Losses(Doubles(logits), targets, V, Vp);
        var gradient = Doubles(logits);
        for (var row = 0; row < B * T; row++) {
            var lse = Reference.LogSumExp(gradient[(row * Vp)..(row * Vp + V)]);
            for (var i = 0; i < Vp; i++) {
                ref var value = ref gradient[row * Vp + i];
                value = i < V ? scale * (Math.Exp(value - lse) - (i == targets[row] ? 1 : 0)) : 0;
                // What the padding held must take no part.
                if (i >= V)
                    logits[row * Vp + i] = float.NaN;
            }
        }
        var (logitsOnDevice, losses) = (device.Upload(logits, B, T, Vp), device.Poisoned(1, B, T));
        device.Classify(logitsOnDevice, targets, V, losses, scale);
        await Near(device.Download(losses), expected);
        var found = device.Download(logitsOnDevice);
        await Near(found, gradient);
        foreach (var row in found.Chunk(Vp)) {
            await Assert.That(row.AsSpan(V).ContainsAnyExcept(0)).IsFalse();
            await Assert.That(row.Sum(value => (double)value)).IsBetween(-1e-6, 1e-6);
        }
    }

    [Test]
    public async Task ClassifyGradientEqualsDifferences() {
        const int B = 2, T = 3, V = 13, Vp = 16;
        var (logits, targets) = (Floats(1, B * T * Vp), Tokens(2, B * T, V));
        var (logitsOnDevice, losses) = (device.Upload(logits, B, T, Vp), device.Poisoned(1, B, T));
        device.Classify(logitsOnDevice, targets, V, losses, 1);
        var input = Doubles(logits);
        await NearGradient(device.Download(logitsOnDevice), input, () => Reference.Losses(input, targets, V, Vp).Sum());
    }

    [Test]
    public async Task LinearClassifyGradientsEqualDifferences() {
        const int B = 2, T = 3, C = 5, V = 13, Vp = 16;
        const float scale = 0.25f;
        var (x, w, dw, targets) = (Floats(1, B * T * C), Floats(2, Vp * C), Floats(3, Vp * C), Tokens(4, B * T, V));
        var (input, weights) = (Doubles(x), Doubles(w));
        double[] Losses() => Reference.Losses(Reference.Linear(input, weights, null, C), targets, V, Vp);
        double Function() => scale * Losses().Sum();
        var (losses, dx) = (device.Poisoned(1, B, T), device.Poisoned(B, T, C));
        var dwOnDevice = device.Upload(dw, 1, Vp, C);
        device.LinearClassify(device.Upload(x, B, T, C), device.Upload(w, 1, Vp, C), targets, V,
            device.Poisoned(B, T, Vp), losses, scale, dx, dwOnDevice);
        await Near(device.Download(losses), Losses());
        await NearGradient(device.Download(dx), input, Function);
        await NearGradient(device.Download(dwOnDevice), weights, Function, dw);
    }

    [Test]
    public async Task ClassifyTakesExtremeLogits() {
        const int V = 5, Vp = 8;
        float[] logits = [10_000, -10_000, 0, 1, 2, 0, 0, 0, 10_000, -10_000, 0, 1, 2, 0, 0, 0, .. new float[8]];
        var (logitsOnDevice, losses) = (device.Upload(logits, 1, 3, Vp), device.Poisoned(1, 1, 3));
        device.Classify(logitsOnDevice, [0, 1, 4], V, losses, 1);
        await Near(device.Download(losses), [0, 20_000, Math.Log(5)]);
        double[] gradient = [0, 0, 0, 0, 0, 0, 0, 0, 1, -1, 0, 0, 0, 0, 0, 0, 0.2, 0.2, 0.2, 0.2, -0.8, 0, 0, 0];
        await Near(device.Download(logitsOnDevice), gradient);
    }

    // ---- Optimizer

    [Test]
    [Arguments(1)]
    [Arguments(67)]
    [Arguments(1_023)]
    [Arguments(5_000_001)]
    public async Task SumOfSquares(int count) {
        var x = Floats(1, count);
        var expected = x.Sum(value => (double)value * value);
        await Assert.That(RelativeError(device.SumOfSquares(device.Upload(x)), expected)).IsLessThan(1e-6);
    }

    [Test]
    [Arguments(1, 1.0)]
    [Arguments(67, 0.3)]
    [Arguments(70_001, 1.0)]
    // Gradients as small as epsilon, which then counts.
    [Arguments(20, 1e-8)]
    public async Task AdamW(int count, double gradientStd) {
        var first = new AdamWStep(1, 0.05f, 0.1f, 0.7f, 0.9f, 0.95f, 1e-8f, Seed: 42);
        // Two parts of different lengths, of which the second one does not decay.
        int[] counts = [count, count / 2 + 1];
        var w = counts.Select((n, part) => Floats(10 + part, n)).ToArray();
        var weights = w.Select(values => Doubles(values)).ToArray();
        var (m, v) = (counts.Select(n => new double[n]).ToArray(), counts.Select(n => new double[n]).ToArray());
        var wOnDevice = w.Select(values => device.Upload(values)).ToArray();
        var mOnDevice = counts.Select(n => device.Upload(new float[n])).ToArray();
        var vOnDevice = counts.Select(n => device.Upload(new float[n])).ToArray();
        for (var number = 1; number <= 3; number++) {
            // The second update has another rate, and the third one no decay.
            var step = first with {
                Number = number, LearningRate = number == 2 ? 0.1f : 0.05f, WeightDecay = number == 3 ? 0 : 0.1f,
            };
            var dw = counts.Select((n, part) => Floats(20 * number + part, n, gradientStd)).ToArray();
            var dwOnDevice = dw.Select(values => device.Upload(values)).ToArray();
            device.AdamW([.. counts.Select((_, part) => new AdamWPart(part * count, part == 0, wOnDevice[part],
                wOnDevice[part], dwOnDevice[part], mOnDevice[part], vOnDevice[part]))], step);
            var (beta1, beta2) = ((double)step.Beta1, (double)step.Beta2);
            for (var part = 0; part < 2; part++) {
                var decay = part == 0 ? (double)step.WeightDecay : 0;
                for (var i = 0; i < counts[part]; i++) {
                    ref var mean = ref m[part][i];
                    ref var square = ref v[part][i];
                    var g = dw[part][i] * (double)step.GradientScale;
                    mean = beta1 * mean + (1 - beta1) * g;
                    square = beta2 * square + (1 - beta2) * g * g;
                    var root = Math.Sqrt(square / (1 - Math.Pow(beta2, number)));
                    weights[part][i] -= step.LearningRate *
                        (mean / (1 - Math.Pow(beta1, number)) / (root + step.Epsilon) + decay * weights[part][i]);
                }
                await Assert.That(device.Download(dwOnDevice[part]).All(value => value == 0)).IsTrue();
            }
        }
        for (var part = 0; part < 2; part++) {
            await Near(device.Download(mOnDevice[part]), m[part]);
            await Near(device.Download(vOnDevice[part]), v[part]);
            await Near(device.Download(wOnDevice[part]), weights[part]);
        }
    }

    [Test]
    [Arguments(1, 5, 5, 1)]
    [Arguments(3, 20, 67, 1)]
    [Arguments(2, 67, 20, 1e-5)]
    [Arguments(2, 2, 33, 1)]
    [Arguments(2, 33, 2, 1)]
    [Arguments(4, 48, 48, 1e3)]
    [Arguments(1, 130, 400, 1)]
    public async Task Muon(int matrices, int rows, int columns, double gradientStd) {
        // A second part of another shape; small weights, so that the updates make up most of them at the end.
        (int Count, int Rows, int Columns)[] shapes = [(matrices, rows, columns), (2, columns + 1, rows)];
        var w = shapes.Select((s, part) => Floats(10 + part, s.Count * s.Rows * s.Columns, 0.01)).ToArray();
        var weights = w.Select(values => Doubles(values)).ToArray();
        var m = w.Select(values => new double[values.Length]).ToArray();
        Tensor[] Upload(IEnumerable<float[]> all) =>
            [.. all.Zip(shapes, (x, s) => device.Upload(x, s.Count, s.Rows, s.Columns))];
        var (wOnDevice, mOnDevice) = (Upload(w), Upload(w.Select(values => new float[values.Length])));
        for (var number = 1; number <= 3; number++) {
            var (rate, decay) = (number == 2 ? 0.1f : 0.05f, number == 3 ? 0 : 0.1f);
            var step = new MuonStep(rate, decay, GradientScale: 0.7f, Momentum: 0.8f + 0.05f * number, Seed: 42);
            var dw = w.Select((x, part) => Floats(20 * number + part, x.Length, gradientStd)).ToArray();
            var dwOnDevice = Upload(dw);
            device.Muon([.. shapes.Select((s, part) => new MuonPart(part * w[0].Length, wOnDevice[part],
                wOnDevice[part], dwOnDevice[part], mOnDevice[part]))], step);
            foreach (var (part, s) in shapes.Index()) {
                double[] g = [.. dw[part].Select(value => value * (double)step.GradientScale)];
                m[part] = Lerp(m[part], g, 1 - (double)step.Momentum);
                var x = Lerp(g, m[part], step.Momentum).Chunk(s.Rows * s.Columns)
                    .SelectMany(u => Reference.Orthogonalize(u, s.Columns)).ToArray();
                for (var i = 0; i < x.Length; i++)
                    weights[part][i] = weights[part][i] * (1 - (double)step.LearningRate * step.WeightDecay) -
                        step.LearningRate * 0.2 * Math.Sqrt(Math.Max(s.Rows, s.Columns)) * x[i];
                await Assert.That(device.Download(dwOnDevice[part]).All(value => value == 0)).IsTrue();
            }
        }
        for (var part = 0; part < 2; part++) {
            await Near(device.Download(mOnDevice[part]), m[part]);
            // Newton-Schulz multiplies what rounding does to small singular values by up to 3.4445⁵ = 485.
            await Near(device.Download(wOnDevice[part]), weights[part], 10 * Bound);
        }

        static double[] Lerp(double[] from, double[] to, double weight) =>
            [.. from.Zip(to, (left, right) => left + weight * (right - left))];
    }

    /// <summary>Of a matrix with known singular vectors and values, Muon's update has the same vectors, and values near
    /// 1 where those of the normalized matrix are above 0.005.</summary>
    [Test]
    [Arguments(24, 24)]
    [Arguments(24, 70)]
    [Arguments(70, 24)]
    public async Task MuonsUpdateHasTheGradientsSingularVectors(int rows, int columns) {
        var n = Math.Min(rows, columns);
        var (left, right) = (Orthonormal(1, n, rows), Orthonormal(2, n, columns));
        double[] values = [.. Enumerable.Range(0, n).Select(i => Math.Pow(0.74, i))]; // from 1 to 0.001
        var norm = Math.Sqrt(Reference.Dot(values, values));
        var g = new float[rows * columns];
        for (var i = 0; i < g.Length; i++)
            g[i] = (float)values.Select((value, k) => value * left[k][i / columns] * right[k][i % columns]).Sum();
        var w = device.Upload(new float[g.Length], 1, rows, columns);
        var rate = -5 / MathF.Sqrt(Math.Max(rows, columns)); // such that w becomes Newton-Schulz's result
        device.Muon([new MuonPart(0, w, w, device.Upload(g, 1, rows, columns),
            device.Upload(new float[g.Length], 1, rows, columns))], new MuonStep(rate, 0, 1, 0.95f, 42));
        var x = Doubles(device.Download(w));
        for (var i = 0; i < n; i++) {
            for (var j = 0; j < n; j++) {
                var row = Enumerable.Range(0, rows).Sum(r =>
                    left[i][r] * Reference.Dot(x.AsSpan(r * columns, columns), right[j]));
                if (i != j)
                    await Assert.That(Math.Abs(row)).IsLessThan(1e-3).Because($"{i}, {j}");
                else if (values[i] / norm > 0.005)
                    await Assert.That(row).IsBetween(0.65, 1.25).Because($"{values[i] / norm}");
            }
        }

        static double[][] Orthonormal(int seed, int count, int size) {
            var vectors = Floats(seed, count * size).Chunk(size).Select(v => Doubles(v)).ToArray();
            for (var i = 0; i < count; i++) {
                for (var k = 0; k < 2 * i; k++) { // twice, against rounding
                    var along = Reference.Dot(vectors[i], vectors[k % i]);
                    vectors[i] = [.. vectors[i].Zip(vectors[k % i], (value, other) => value - along * other)];
                }
                var length = Math.Sqrt(Reference.Dot(vectors[i], vectors[i]));
                vectors[i] = [.. vectors[i].Select(value => value / length)];
            }
            return vectors;
        }
    }
}

/// <summary>What only the CPU promises: the same bits on any number of threads.</summary>
public class CpuTests {
    [Test]
    [Arguments(1, 1000, 768)]
    [Arguments(3, 50, 33)]
    // Halved and halved again, 97 rows leave one; they do so on some numbers of threads alone.
    [Arguments(97, 48, 384)]
    [Arguments(97, 384, 384)]
    [Arguments(384, 384, 97)]
    [Arguments(130, 400, 300)]
    [Arguments(400, 257, 385)]
    public async Task ProductsHaveTheSameBitsOnAnyNumberOfThreads(int rows, int C, int OC) =>
        await SameBitsOnAnyNumberOfThreads(device => {
            var (x, w) = (device.Upload(Floats(1, rows * C), 1, rows, C), device.Upload(Floats(2, OC * C), 1, OC, C));
            var (b, y) = (device.Upload(Floats(3, OC)), device.Poisoned(1, rows, OC));
            device.Linear(x, w, b, y);
            var (dx, dw) = (device.Poisoned(1, rows, C), device.Upload(new float[OC * C], 1, OC, C));
            device.LinearBackward(y, x, w, dx, dw);
            return [.. device.Download(y), .. device.Download(dx), .. device.Download(dw)];
        });

    [Test]
    [Arguments(1, 97, 3, 96)]
    [Arguments(2, 65, 5, 100)]
    [Arguments(3, 1, 1, 68)]
    public async Task ATrainingStepHasTheSameBitsOnAnyNumberOfThreads(int B, int T, int NH, int C) =>
        await SameBitsOnAnyNumberOfThreads(device => {
            // Recomputation, so that every operation takes part.
            var model = new Model(new Config(T, 300, 384, 2, NH, C), device, B, T, Purpose.Train, 2);
            model.Load(null, 1);
            Tokens(1, B * T, 300).CopyTo(model.Tokens, 0);
            Tokens(2, B * T, 300).CopyTo(model.Targets, 0);
            model.Forward();
            model.Loss(1f / (B * T));
            model.Backward();
            var gradients = device.Values(model.Gradients!.All);
            var optimizer = new Optimizer(model);
            var norm = optimizer.GradientNorm();
            optimizer.Update(1, 1e-3f, 0.1f, norm);
            return [norm, .. model.Losses, .. gradients, .. device.Values(model.Weights.All),
                .. device.Values(optimizer.M.All), .. device.Values(optimizer.V.All)];
        });

    static async Task SameBitsOnAnyNumberOfThreads(Func<IDevice, float[]> run) {
        float[] Run(int threads) {
            using var device = new Cpu(threads);
            return run(device);
        }
        var expected = Run(1);
        foreach (var threads in (int[])[2, 3, 7]) {
            var found = Run(threads);
            var different = found.Zip(expected).Count(pair =>
                BitConverter.SingleToInt32Bits(pair.First) != BitConverter.SingleToInt32Bits(pair.Second));
            await Assert.That(different).IsEqualTo(0).Because($"{threads} threads give the same as one");
        }
    }
}
