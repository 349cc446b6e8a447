using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>Operations whose results are known without another device, on any device.</summary>
/// <param name="multiple">The device takes sizes that are multiples of this.</param>
public abstract class KnownResultTests(IDevice device, DataType precision, Func<IDevice> open, int multiple) {
    protected readonly IDevice device = device;

    /// <summary>The largest ‖found − expected‖/‖expected‖: some fifty roundings of fp32.</summary>
    protected const double Bound = 1e-5;

    protected async Task Near(Tensor found, double[] expected, double bound = Bound,
        [CallerArgumentExpression(nameof(found))] string name = "") =>
        await Assert.That(RelativeError(device.Download(found), expected)).IsLessThan(bound).Because(name);

    /// <summary>Updates 1 to 3: the second has another rate, and the third no decay.</summary>
    protected static AdamWStep Step(int number) => new(number, LearningRate: number == 2 ? 0.1f : 0.05f,
        WeightDecay: number == 3 ? 0 : 0.1f, GradientScale: 0.7f, Beta1: 0.9f, Beta2: 0.95f, Epsilon: 1e-8f, Seed: 42);

    int Multiple(int size) => (size + multiple - 1) / multiple * multiple;

    [Test, Arguments(1), Arguments(67), Arguments(70_001)]
    public async Task ClearFillsWithZerosAndNoFurther(int count) {
        foreach (var type in (DataType[])[precision, DataType.Fp32]) {
            var x = device.Upload(Floats(1, count), type);
            device.Clear(x);
            await Assert.That(device.Download(x).All(value => value == 0)).IsTrue();
        }
    }

    [Test, Arguments(8, 1_000_001), Arguments(1, 3_000_000)]
    public async Task AllocatedMemoryIsZero(int blocks, int count) {
        var ones = Enumerable.Repeat(1f, count).ToArray();
        // The memory of closed devices is likely to be allocated again.
        for (var round = 0; round < 3; round++) {
            using var own = open();
            for (var i = 0; i < blocks; i++) {
                var (x, values) = (new Tensor(own.Allocate(count * sizeof(float)), 1, 1, count), ones.ToArray());
                own.Read(x, values);
                await Assert.That(values.AsSpan().ContainsAnyExcept(0)).IsFalse();
                own.Write(x, ones);
            }
        }
    }

    [Test, Arguments(20, 0f), Arguments(67, 3f), Arguments(48, -1000f)]
    public async Task LayerNormOfAConstantRowIsTheBias(int columns, float value) {
        // Whole numbers: the mean is exact, and nothing remains to be divided by √1e-5.
        var C = Multiple(columns);
        float[] values = [.. Enumerable.Repeat(value, 3 * C)], b = Rounded(Floats(2, C), precision);
        Tensor x = device.Upload(values, [3, C], precision), bias = device.Upload(b, precision);
        var w = device.Upload(Floats(1, C), precision);
        var (y, statistics) = (device.Poisoned([3, C], precision), device.Poisoned([3, 2]));
        device.LayerNorm(x, w, bias, y, statistics);
        await Same(device.Download(y), [.. b, .. b, .. b]);
        await Near(statistics, Reference.Statistics(Doubles(values), C));
    }

    [Test]
    public async Task GeluOfLargeNumbersIsTheNumberOrZeroAndSoIsItsGradient() {
        var n = Multiple(6);
        float[] numbers = [-8192, -100, -20, 20, 100, 8192, -0f, 64];
        var x = device.Upload(numbers.AsSpan(0, n), precision);
        var (y, dx) = (device.Poisoned([n], precision), device.Poisoned([n], precision));
        device.Gelu(x, y);
        // With the unit matrix for weights, dx is the derivative itself.
        float[] unit = [.. Enumerable.Range(0, n * n).Select(i => i % (n + 1) == 0 ? 1f : 0)];
        var ones = device.Upload([.. Enumerable.Repeat(1f, n)], precision);
        device.LinearGeluBackward(ones, y, x, device.Upload(unit, [n, n], precision), dx, device.Upload(unit, [n, n]),
            device.Poisoned([n]));
        await Near(y, ((double[])[0, 0, 0, 20, 100, 8192, 0, 64])[..n]);
        await Near(dx, ((double[])[0, 0, 0, 1, 1, 1, 0.5, 1])[..n]);
    }

    [Test]
    public async Task ClassifyTakesExtremeLogits() {
        const int V = 5, Vp = 8;
        float[] numbers = [8192, -8192, 0, 1, 2, 0, 0, 0, 8192, -8192, 0, 1, 2, 0, 0, 0, .. new float[8]];
        var (logits, losses) = (device.Upload(numbers, [3, Vp], precision), device.Poisoned([3]));
        device.Classify(logits, [0, 1, 4], V, losses, 1);
        await Near(losses, [0, 16384, Math.Log(5)], 1e-6);
        double[] gradient = [0, 0, 0, 0, 0, 0, 0, 0, 1, -1, 0, 0, 0, 0, 0, 0, 0.2, 0.2, 0.2, 0.2, -0.8, 0, 0, 0];
        await Near(logits, gradient, precision == DataType.Bf16 ? Arrays.Bf16Bound : Bound);
    }

    [Test, Arguments(1), Arguments(67), Arguments(1_023), Arguments(5_000_001)]
    public async Task SumOfSquares(int count) {
        var draws = Floats(1, Math.Min(count, 70_001));
        float[] values = [.. Enumerable.Range(0, count).Select(i => draws[i % draws.Length])];
        var x = device.Upload(values);
        var (found, again) = (device.SumOfSquares(x), device.SumOfSquares(x));
        await Assert.That(RelativeError(found, values.Sum(value => (double)value * value))).IsLessThan(1e-6);
        await Assert.That(again).IsEqualTo(found);
    }
}

/// <summary>An array on a device, and the values it was made of.</summary>
/// <param name="Values">Those values in float64; finite differences change them one by one.</param>
/// <param name="IsAddedTo">False if the operation overwrites it.</param>
sealed record Operand(Tensor Tensor, double[] Values, bool IsAddedTo = true) {
    public static implicit operator Tensor(Operand operand) => operand.Tensor;
}

/// <summary>Every operation of a device against the float64 formulas: results, and gradients by finite differences.
/// Sizes leave ragged ends of vectors, tiles and blocks; arrays to be overwritten hold NaN before.</summary>
[InheritsTests]
public sealed class OperationTests()
    : KnownResultTests(new Cpu(), DataType.Fp32, () => new Cpu(), multiple: 1), IDisposable {
    /// <summary>The most derivatives of an array that are checked.</summary>
    const int Samples = 200;

    public void Dispose() => device.Dispose();

    /// <summary>An array of normal draws.</summary>
    Operand Input(int seed, ReadOnlySpan<int> shape, double std = 1) =>
        Input(Floats(seed, DeviceArrays.Count(shape), std), shape);

    Operand Input(float[] values, ReadOnlySpan<int> shape) => new(device.Upload(values, shape), Doubles(values));

    Operand Input(double[] values, ReadOnlySpan<int> shape) =>
        Input(values.Select(value => (float)value).ToArray(), shape);

    /// <summary>An array to be overwritten.</summary>
    Operand Output(params ReadOnlySpan<int> shape) => new(device.Poisoned(shape), [], IsAddedTo: false);

    /// <summary>Compares what the operation wrote to a gradient, or added to it, with differences of a function of
    /// x.</summary>
    async Task NearGradient(Operand gradient, double[] x, Func<double> function,
        [CallerArgumentExpression(nameof(gradient))] string name = "") {
        int[] indices = [.. Enumerable.Range(0, x.Length)];
        if (x.Length > Samples) {
            new Random(1).Shuffle(indices);
            indices = indices[..Samples];
        }
        var found = device.Download(gradient);
        float[] added = [.. indices.Select(i => found[i] - (gradient.IsAddedTo ? (float)gradient.Values[i] : 0))];
        await Assert.That(RelativeError(added, Reference.Gradient(x, function, indices))).IsLessThan(Bound)
            .Because(name);
    }

    // ---- Embedding

    [Test, Arguments(1, 1, 5), Arguments(2, 5, 20), Arguments(3, 7, 67), Arguments(1, 3, 48)]
    public async Task Embed(int B, int T, int C) {
        const int V = 11;
        var (tokens, wte, wpe) = (Tokens(3, B * T, V), Input(1, [V, C]), Input(2, [T, C]));
        var x = Output(B, T, C);
        device.Embed(tokens, wte, wpe, x);
        await Near(x, Reference.Embed(tokens, wte.Values, wpe.Values, T, C));
    }

    [Test, Arguments(1, 1, 5), Arguments(2, 5, 20), Arguments(3, 7, 67), Arguments(2, 3, 130)]
    public async Task EmbedBackward(int B, int T, int C) {
        // Few tokens, so that some repeat and others do not occur; positions from T on get no gradient.
        const int V = 5;
        var maxT = T + 2;
        var (tokens, dx) = (Tokens(3, B * T, V), Input(4, [B, T, C]));
        var (dwte, dwpe) = (Input(5, [V, C]), Input(6, [maxT, C]));
        device.EmbedBackward(tokens, dx, dwte, dwpe);
        var (wte, wpe) = (new double[V * C], new double[maxT * C]);
        double Function() => Reference.Dot(Reference.Embed(tokens, wte, wpe, T, C), dx.Values);
        await NearGradient(dwte, wte, Function);
        await NearGradient(dwpe, wpe, Function);
    }

    // ---- Layer norm

    [Test]
    [Arguments(1, 5), Arguments(3, 20), Arguments(5, 48), Arguments(7, 67), Arguments(130, 768), Arguments(400, 33)]
    public async Task LayerNorm(int rows, int C) {
        var (x, w, b) = (Input(1, [rows, C], 2), Input(2, [C]), Input(3, [C]));
        var (y, statistics) = (Output(rows, C), Output(rows, 2));
        device.LayerNorm(x, w, b, y, statistics);
        await Near(y, Reference.LayerNorm(x.Values, w.Values, b.Values));
        await Near(statistics, Reference.Statistics(x.Values, C));
    }

    [Test, Arguments(1, 5), Arguments(3, 20), Arguments(5, 48), Arguments(7, 67), Arguments(130, 100)]
    public async Task LayerNormBackward(int rows, int C) {
        var (dy, x, w, b) = (Input(3, [rows, C]), Input(1, [rows, C], 2), Input(2, [C]), new double[C]);
        var statistics = Input(Reference.Statistics(x.Values, C), [rows, 2]);
        var (dx, dw, db, dbias) = (Input(4, [rows, C]), Input(5, [C]), Input(6, [C]), Input(7, [C]));
        device.LayerNormBackward(dy, x, w, statistics, dx, dw, db, dbias);
        double Function() => Reference.Dot(Reference.LayerNorm(x.Values, w.Values, b), dy.Values);
        await NearGradient(dx, x.Values, Function);
        await NearGradient(dw, w.Values, Function);
        await NearGradient(db, b, Function);
        var sums = Doubles(device.Download(dx)).Chunk(C).Aggregate(dbias.Values, Reference.Add);
        await Near(dbias, sums);
    }

    // ---- Linear and GELU

    /// <summary>Rows, C and OC of the products: some are ragged in each of the three layouts of training.</summary>
    public static IEnumerable<(int Rows, int C, int OC)> Products() => [
        (1, 1, 1), (5, 7, 3), (1, 5, 7), (3, 20, 9), (7, 9, 67), (5, 20, 48), (7, 67, 20), (1, 1000, 768), (3, 50, 33),
        (2, 300, 400), (97, 96, 384), (130, 400, 300), (385, 33, 97), (400, 257, 385), (13, 1025, 31),
    ];

    [Test, MethodDataSource(nameof(Products))]
    public async Task Linear(int rows, int C, int OC) {
        var (x, w, b, residual) = (Input(1, [rows, C]), Input(2, [OC, C]), Input(3, [OC]), Input(4, [rows, OC]));
        var (y, withoutBias, sum) = (Output(rows, OC), Output(rows, OC), Output(rows, OC));
        device.Linear(x, w, b, y);
        device.Linear(x, w, default, withoutBias);
        device.LinearResidual(x, w, b, residual, sum);
        var product = Reference.Linear(x.Values, w.Values, null, C);
        await Near(withoutBias, product);
        await Near(y, Reference.Add(product, b.Values));
        await Near(sum, Reference.Add(Reference.Add(product, b.Values), residual.Values));
        await Same(Doubles(device.Download(residual)), residual.Values);
    }

    [Test, MethodDataSource(nameof(Products))]
    public async Task LinearBackward(int rows, int C, int OC) {
        var (dy, x, w) = (Input(1, [rows, OC]), Input(2, [rows, C]), Input(3, [OC, C]));
        var (dx, dw) = (Output(rows, C), Input(4, [OC, C]));
        device.LinearBackward(dy, x, w, dx, dw);
        await Near(dx, Reference.Linear(dy.Values, Reference.Transpose(w.Values, C), null, OC));
        var (dyT, xT) = (Reference.Transpose(dy.Values, OC), Reference.Transpose(x.Values, C));
        await Near(dw, Reference.Add(dw.Values, Reference.Linear(dyT, xT, null, rows)));
        // Each difference takes two products.
        if (rows * C * OC > 10_000)
            return;
        double Function() => Reference.Dot(Reference.Linear(x.Values, w.Values, null, C), dy.Values);
        await NearGradient(dx, x.Values, Function);
        await NearGradient(dw, w.Values, Function);
    }

    [Test, Arguments(1, 5, 20), Arguments(3, 48, 67), Arguments(130, 20, 80)]
    public async Task LinearGelu(int rows, int C, int OC) {
        var (x, w, b) = (Input(1, [rows, C]), Input(2, [OC, C]), Input(3, [OC]));
        var (input, y) = (Output(rows, OC), Output(rows, OC));
        device.LinearGelu(x, w, b, input, y);
        var expected = Reference.Linear(x.Values, w.Values, b.Values, C);
        await Near(input, expected);
        await Near(y, Reference.Gelu(expected));
    }

    [Test, Arguments(1, 20, 5), Arguments(3, 67, 9), Arguments(7, 48, 20)]
    public async Task LinearGeluBackward(int rows, int C, int OC) {
        var (dy, input, w) = (Input(1, [rows, OC]), Input(2, [rows, C], 2), Input(3, [OC, C]));
        var (x, bias) = (Input(Reference.Gelu(input.Values), [rows, C]), new double[C]);
        var (dx, dw, dbias) = (Output(rows, C), Input(4, [OC, C]), Input(5, [C]));
        device.LinearGeluBackward(dy, x, input, w, dx, dw, dbias);
        // The bias is that of the product before.
        double Function() => Reference.Dot(dy.Values,
            Reference.Linear(Reference.Gelu(Reference.Add(input.Values, bias)), w.Values, null, C));
        await NearGradient(dx, input.Values, Function);
        await NearGradient(dw, w.Values, Function);
        await NearGradient(dbias, bias, Function);
    }

    [Test, Arguments(1), Arguments(67), Arguments(70_001)]
    public async Task Gelu(int count) {
        var (x, y) = (Input(1, [count], 3), Output(count));
        device.Gelu(x, y);
        await Near(y, Reference.Gelu(x.Values));
    }

    // ---- Attention

    [Test]
    [Arguments(1, 1, 1, 5, 1), Arguments(2, 21, 3, 16, 1), Arguments(1, 65, 2, 5, 1), Arguments(2, 150, 2, 64, 1)]
    [Arguments(1, 300, 3, 16, 1)]
    // Scores of about ±400: unless their maximum is subtracted, their exponentials overflow.
    [Arguments(2, 21, 3, 16, 10)]
    public async Task Attention(int B, int T, int NH, int HS, double std) {
        var qkv = Input(1, [B, T, 3 * NH * HS], std);
        var (y, lse) = (Output(B, T, NH * HS), Output(B, NH, T));
        device.Attention(qkv, NH, y, lse);
        var expected = Reference.Attention(qkv.Values, B, T, 0, NH, HS);
        // A score of 400 is rounded by 1e-5 and more, and so are the weights.
        await Near(y, expected.Y, std > 1 ? 1e-4 : Bound);
        await Near(lse, expected.Lse);
    }

    [Test]
    [Arguments(1, 1, 1, 5), Arguments(2, 21, 3, 5), Arguments(1, 65, 1, 64), Arguments(1, 150, 2, 5)]
    [Arguments(1, 300, 1, 16)]
    public async Task AttentionBackward(int B, int T, int NH, int HS) {
        var C = NH * HS;
        var (qkv, dy, bias) = (Input(1, [B, T, 3 * C]), Input(2, [B, T, C]), new double[3 * C]);
        var (y, lse, dqkv, dbias) = (Output(B, T, C), Output(B, NH, T), Output(B, T, 3 * C), Input(3, [3 * C]));
        device.Attention(qkv, NH, y, lse);
        device.AttentionBackward(dy, qkv, y, lse, NH, dqkv, dbias);
        double Function() =>
            Reference.Dot(Reference.Attention(Reference.Add(qkv.Values, bias), B, T, 0, NH, HS).Y, dy.Values);
        await NearGradient(dqkv, qkv.Values, Function);
        await NearGradient(dbias, bias, Function);
    }

    [Test]
    public async Task AttentionOfALongSequence() {
        // So many keys that fewer queries are taken at once. One derivative in a random direction must do.
        const int T = 1500, HS = 5;
        var (qkv, dy) = (Input(1, [T, 3 * HS]), Input(2, [T, HS]));
        var (y, lse, dqkv) = (Output(1, T, HS), Output(1, 1, T), Output(1, T, 3 * HS));
        device.Attention(qkv, 1, y, lse);
        var expected = Reference.Attention(qkv.Values, 1, T, 0, 1, HS);
        await Near(y, expected.Y);
        await Near(lse, expected.Lse);
        device.AttentionBackward(dy, qkv, y, lse, 1, dqkv, device.Poisoned([3 * HS]));
        var (gradient, direction) = (Doubles(device.Download(dqkv)), Doubles(Floats(3, T * 3 * HS)));
        double[] at = [0];
        double Along() => Reference.Dot(dy.Values, Reference.Attention(
            [.. qkv.Values.Zip(direction, (x, d) => x + d * at[0])], 1, T, 0, 1, HS).Y);
        var difference = Reference.Gradient(at, Along)[0] - Reference.Dot(gradient, direction);
        // An error in the gradient changes its product with normal draws by about the error's norm.
        var norm = Math.Sqrt(Reference.Dot(gradient, gradient));
        await Assert.That(RelativeError(norm + difference, norm)).IsLessThan(Bound);
    }

    // ---- Classifier

    [Test]
    [Arguments(1, 1, 5, 5), Arguments(2, 3, 13, 16), Arguments(2, 5, 211, 256), Arguments(1, 3, 67, 80)]
    [Arguments(2, 3, 50257, 50304)]
    public async Task Classify(int B, int T, int V, int Vp) {
        const float scale = 0.125f;
        var (values, targets) = (Floats(1, B * T * Vp, 3), Tokens(2, B * T, V));
        targets[^1] = V - 1;
        // The padding must take no part.
        for (var row = 0; row < B * T; row++)
            values.AsSpan(row * Vp + V, Vp - V).Fill(float.NaN);
        var (logits, losses) = (Input(values, [B, T, Vp]), Output(B, T));
        device.Classify(logits, targets, V, losses, scale);
        double[] Losses() => Reference.Losses(logits.Values, targets, V, Vp);
        await Near(losses, Losses());
        var gradient = new double[B * T * Vp];
        for (var row = 0; row < B * T; row++) {
            var lse = Losses()[row] + logits.Values[row * Vp + targets[row]];
            for (var i = 0; i < V; i++)
                gradient[row * Vp + i] = scale * Math.Exp(logits.Values[row * Vp + i] - lse);
            gradient[row * Vp + targets[row]] -= scale;
        }
        await Near(logits, gradient);
        // The gradients of a large vocabulary are too small for differences.
        if (V < 100)
            await NearGradient(logits with { IsAddedTo = false }, logits.Values, () => scale * Losses().Sum());
        foreach (var row in device.Download(logits).Chunk(Vp)) {
            await Assert.That(row.AsSpan(V).ContainsAnyExcept(0)).IsFalse();
            await Assert.That(row.Sum(value => (double)value)).IsBetween(-1e-6, 1e-6);
        }
    }

    [Test]
    public async Task LinearClassifyGradientsEqualDifferences() {
        const int B = 2, T = 3, C = 5, V = 13, Vp = 16;
        const float scale = 0.25f;
        var (x, w, targets) = (Input(1, [B, T, C]), Input(2, [Vp, C]), Tokens(4, B * T, V));
        var (losses, dx, dw) = (Output(B, T), Output(B, T, C), Input(3, [Vp, C]));
        device.LinearClassify(x, w, targets, V, Output(B, T, Vp), losses, scale, dx, dw);
        double[] Losses() => Reference.Losses(Reference.Linear(x.Values, w.Values, null, C), targets, V, Vp);
        await Near(losses, Losses());
        await NearGradient(dx, x.Values, () => scale * Losses().Sum());
        await NearGradient(dw, w.Values, () => scale * Losses().Sum());
    }

    // ---- Optimizer

    [Test]
    [Arguments(1, 1.0), Arguments(67, 0.3), Arguments(70_001, 1.0)]
    // Gradients as small as epsilon, so that epsilon matters.
    [Arguments(20, 1e-8)]
    public async Task AdamW(int count, double gradientStd) {
        // Two parts of different lengths, of which the second does not decay.
        int[] counts = [count, count / 2 + 1];
        Operand Zeros(int n) => Input(new float[n], [n]);
        var parts = counts.Select((n, i) => (W: Input(10 + i, [n]), Dw: Zeros(n), M: Zeros(n), V: Zeros(n))).ToArray();
        for (var number = 1; number <= 3; number++) {
            var step = Step(number);
            float[] Gradient(int i) => Floats(20 * number + i, counts[i], gradientStd);
            foreach (var (i, part) in parts.Index())
                device.Write(part.Dw, Gradient(i));
            device.AdamW([.. parts.Select((part, i) =>
                new AdamWPart(i * count, i == 0, part.W, part.W, part.Dw, part.M, part.V))], step);
            foreach (var (i, (w, dw, m, v)) in parts.Index()) {
                Reference.AdamW(w.Values, Doubles(Gradient(i)), m.Values, v.Values, step, decays: i == 0);
                await Assert.That(device.Download(dw).All(value => value == 0)).IsTrue();
            }
        }
        foreach (var (w, _, m, v) in parts) {
            await Near(m, m.Values);
            await Near(v, v.Values);
            await Near(w, w.Values);
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
        double[][] weights = [.. w.Select(values => Doubles(values))], m = [.. w.Select(x => new double[x.Length])];
        Tensor[] Upload(IEnumerable<float[]> all) =>
            [.. all.Zip(shapes, (x, s) => device.Upload(x, [s.Count, s.Rows, s.Columns]))];
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
            await Near(mOnDevice[part], m[part]);
            // Newton-Schulz multiplies what rounding does to small singular values by up to 3.4445⁵ = 485.
            await Near(wOnDevice[part], weights[part], 10 * Bound);
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
        var w = device.Upload(new float[g.Length], [rows, columns]);
        var rate = -5 / MathF.Sqrt(Math.Max(rows, columns)); // such that w becomes Newton-Schulz's result
        device.Muon([new MuonPart(0, w, w, device.Upload(g, [rows, columns]),
            device.Upload(new float[g.Length], [rows, columns]))], new MuonStep(rate, 0, 1, 0.95f, 42));
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

/// <summary>The same bits on any number of threads.</summary>
public class CpuTests {
    [Test]
    [Arguments(1, 1000, 768), Arguments(3, 50, 33)]
    // On some numbers of threads, halving 97 rows again and again leaves one.
    [Arguments(97, 48, 384), Arguments(97, 384, 384), Arguments(384, 384, 97), Arguments(130, 400, 300)]
    [Arguments(400, 257, 385)]
    public async Task ProductsHaveTheSameBitsOnAnyNumberOfThreads(int rows, int C, int OC) =>
        await SameBitsOnAnyNumberOfThreads(device => {
            var (x, w) = (device.Upload(Floats(1, rows * C), [rows, C]), device.Upload(Floats(2, OC * C), [OC, C]));
            var (b, y) = (device.Upload(Floats(3, OC)), device.Poisoned([rows, OC]));
            device.Linear(x, w, b, y);
            var (dx, dw) = (device.Poisoned([rows, C]), device.Upload(new float[OC * C], [OC, C]));
            device.LinearBackward(y, x, w, dx, dw);
            return [.. device.Download(y), .. device.Download(dx), .. device.Download(dw)];
        });

    [Test, Arguments(1, 97, 3, 96), Arguments(2, 65, 5, 100), Arguments(3, 1, 1, 68)]
    public async Task ATrainingStepHasTheSameBitsOnAnyNumberOfThreads(int B, int T, int NH, int C) =>
        await SameBitsOnAnyNumberOfThreads(device => {
            // Recomputation, so that every operation takes part.
            var config = new Config(T, 300, 384, 2, NH, C);
            return Models.Random(config, device, B, T, Purpose.Train, recompute: 2).Update(1);
        });

    static async Task SameBitsOnAnyNumberOfThreads(Func<IDevice, float[]> run) {
        float[] Run(int threads) {
            using var device = new Cpu(threads);
            return run(device);
        }
        var expected = Run(1);
        foreach (var threads in (int[])[2, 3, 7])
            await SameBits(Run(threads), expected, $"{threads} threads");
    }
}
