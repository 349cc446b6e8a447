namespace Gpt2.Tests;

/// <summary>The forward pass of each operation in float64, from its formula; tests take derivatives by differences.
/// Arrays are row-major.</summary>
static class Reference {
    /// <summary>x (B, T, C) = wte[token] + wpe[t].</summary>
    public static double[] Embed(int[] tokens, double[] wte, double[] wpe, int T, int C) {
        var x = new double[tokens.Length * C];
        for (var row = 0; row < tokens.Length; row++) {
            for (var i = 0; i < C; i++)
                x[row * C + i] = wte[tokens[row] * C + i] + wpe[row % T * C + i];
        }
        return x;
    }

    /// <summary>The mean and 1/√(variance + 1e-5) of each row of x (…, C), in pairs.</summary>
    public static double[] Statistics(double[] x, int C) => [.. x.Chunk(C).SelectMany(row => {
        var mean = row.Average();
        return (double[])[mean, 1 / Math.Sqrt(row.Average(value => (value - mean) * (value - mean)) + 1e-5)];
    })];

    /// <summary>y = (x − mean)·rstd·w + b.</summary>
    public static double[] LayerNorm(double[] x, double[] w, double[] b) {
        var (C, statistics, y) = (w.Length, Statistics(x, w.Length), new double[x.Length]);
        for (var i = 0; i < x.Length; i++)
            y[i] = (x[i] - statistics[i / C * 2]) * statistics[i / C * 2 + 1] * w[i % C] + b[i % C];
        return y;
    }

    /// <summary>x + y, where a shorter y is added to each row of x.</summary>
    public static double[] Add(double[] x, double[] y) => [.. x.Select((value, i) => value + y[i % y.Length])];

    /// <summary>y (rows, OC) = x (rows, C)·wᵀ + b with w (OC, C); b may be null.</summary>
    public static double[] Linear(double[] x, double[] w, double[]? b, int C) {
        var (rows, OC) = (x.Length / C, w.Length / C);
        var y = new double[rows * OC];
        for (var row = 0; row < rows; row++) {
            for (var o = 0; o < OC; o++) {
                var sum = b?[o] ?? 0;
                for (var i = 0; i < C; i++)
                    sum += x[row * C + i] * w[o * C + i];
                y[row * OC + o] = sum;
            }
        }
        return y;
    }

    /// <summary>x (rows, columns) as (columns, rows).</summary>
    public static double[] Transpose(double[] x, int columns) {
        var (rows, y) = (x.Length / columns, new double[x.Length]);
        for (var i = 0; i < x.Length; i++)
            y[i % columns * rows + i / columns] = x[i];
        return y;
    }

    /// <summary>x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))).</summary>
    public static double[] Gelu(double[] x) =>
        [.. x.Select(v => v / 2 * (1 + Math.Tanh(Math.Sqrt(2 / Math.PI) * (v + 0.044715 * v * v * v))))];

    /// <summary>Causal attention: y (B, T − start, NH·HS) and the log-sum-exp (B, NH, T − start) of each query's
    /// scores, from qkv (B, T, 3·NH·HS).</summary>
    public static (double[] Y, double[] Lse) Attention(double[] qkv, int B, int T, int start, int NH, int HS) {
        var C = NH * HS;
        var (y, lse) = (new double[B * (T - start) * C], new double[B * NH * (T - start)]);
        // The query, key or value of a head at time t: part 0, 1 or 2.
        Span<double> Packed(int part, int b, int t, int head) =>
            qkv.AsSpan((b * T + t) * 3 * C + part * C + head * HS, HS);
        for (var b = 0; b < B; b++) {
            for (var head = 0; head < NH; head++) {
                for (var t = start; t < T; t++) {
                    var scores = new double[t + 1];
                    for (var s = 0; s <= t; s++)
                        scores[s] = Dot(Packed(0, b, t, head), Packed(1, b, s, head)) / Math.Sqrt(HS);
                    var logSum = LogSumExp(scores);
                    lse[(b * NH + head) * (T - start) + t - start] = logSum;
                    var output = y.AsSpan((b * (T - start) + t - start) * C + head * HS, HS);
                    for (var s = 0; s <= t; s++) {
                        var value = Packed(2, b, s, head);
                        var weight = Math.Exp(scores[s] - logSum);
                        for (var i = 0; i < HS; i++)
                            output[i] += weight * value[i];
                    }
                }
            }
        }
        return (y, lse);
    }

    /// <summary>The cross-entropy of each row of logits (rows, Vp), of which the first V columns count.</summary>
    public static double[] Losses(double[] logits, int[] targets, int V, int Vp) =>
        [.. targets.Select((target, row) => LogSumExp(logits[(row * Vp)..(row * Vp + V)]) - logits[row * Vp + target])];

    /// <summary>Updates w, m and v as AdamW does.</summary>
    public static void AdamW(double[] w, double[] dw, double[] m, double[] v, AdamWStep step, bool decays) {
        double beta1 = step.Beta1, beta2 = step.Beta2, decay = decays ? step.WeightDecay : 0;
        for (var i = 0; i < w.Length; i++) {
            var g = dw[i] * step.GradientScale;
            m[i] = beta1 * m[i] + (1 - beta1) * g;
            v[i] = beta2 * v[i] + (1 - beta2) * g * g;
            var (mean, square) = (m[i] / (1 - Math.Pow(beta1, step.Number)), v[i] / (1 - Math.Pow(beta2, step.Number)));
            w[i] -= step.LearningRate * (mean / (Math.Sqrt(square) + step.Epsilon) + decay * w[i]);
        }
    }

    /// <summary>ln Σ eˣ.</summary>
    public static double LogSumExp(double[] x) {
        var max = x.Max();
        return max + Math.Log(x.Sum(value => Math.Exp(value - max)));
    }

    /// <summary>Muon's x of an update u (rows, columns): normalized, then nearly orthogonal, by five steps of a
    /// Newton-Schulz iteration.</summary>
    public static double[] Orthogonalize(double[] u, int columns) {
        var (rows, norm) = (u.Length / columns, Math.Max(Math.Sqrt(Dot(u, u)), 1e-7));
        if (rows > columns)
            return Transpose(Orthogonalize(Transpose(u, columns), rows), rows);
        double[] x = [.. u.Select(value => value / norm)];
        for (var step = 0; step < 5; step++) {
            var A = Linear(x, x, null, columns);
            double[] B = [.. A.Zip(Linear(A, A, null, rows), (a, square) => -4.7750 * a + 2.0315 * square)];
            var product = Linear(B, Transpose(x, columns), null, rows);
            x = [.. x.Zip(product, (value, added) => 3.4445 * value + added)];
        }
        return x;
    }

    /// <summary>The derivative of a function of <paramref name="x"/> in each of its elements, or in those at
    /// <paramref name="indices"/> alone, by central differences; x is as it was afterwards.</summary>
    public static double[] Gradient(double[] x, Func<double> function, int[]? indices = null) {
        // In float64 this leaves a truncation error of 2e-9 of the third derivative, and a smaller rounding error.
        const double step = 1e-4;
        indices ??= [.. Enumerable.Range(0, x.Length)];
        var gradient = new double[indices.Length];
        for (var i = 0; i < indices.Length; i++) {
            var value = x[indices[i]];
            x[indices[i]] = value + step;
            var above = function();
            x[indices[i]] = value - step;
            gradient[i] = (above - function()) / (2 * step);
            x[indices[i]] = value;
        }
        return gradient;
    }

    /// <summary>Σ x·y.</summary>
    public static double Dot(ReadOnlySpan<double> x, ReadOnlySpan<double> y) {
        var sum = 0.0;
        for (var i = 0; i < x.Length; i++)
            sum += x[i] * y[i];
        return sum;
    }
}
