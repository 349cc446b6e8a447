using System.Numerics;
using System.Runtime.ExceptionServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;
using static Gpt2.Simd;

[module: SkipLocalsInit]

namespace Gpt2;

/// <summary>The operations in fp32 on the CPU: the reference for other devices, and the default without a GPU. The
/// order of every sum is independent of the number of threads, so any number gives the same bits.</summary>
public sealed unsafe class Cpu(int threads = 0) : IDevice {
    readonly Workers workers = new(threads > 0 ? threads : Environment.ProcessorCount);
    readonly List<nint> allocations = [];

    public string Name => $"CPU, {workers.Threads} threads, {Vector<float>.Count * 32}-bit vectors";
    public DataType Precision => DataType.Fp32;
    public long Workspace => 0;
    public Profile? Profile { get; set; }

    /// <summary>The memory available to new processes, or what the container's limit leaves if that is less.</summary>
    public long FreeMemory => Math.Min(
        GC.GetGCMemoryInfo().TotalAvailableMemoryBytes - Environment.WorkingSet,
        1024 * long.Parse( // "MemAvailable:   24251556 kB"
            File.ReadLines("/proc/meminfo").First(line => line.StartsWith("MemAvailable:")).Split(' ')[^2]));

    public void Synchronize() { }

    public (double Flops, double Bytes) MeasureCeilings() {
        const int n = 384;
        var rows = n * workers.Threads;
        var floats = Math.Max(1 << 25, rows * n);
        fixed (float* from = new float[floats], to = new float[floats], w = new float[n * n]) {
            Tensor x = new((nint)from, 1, 1, floats), y = new((nint)to, 1, 1, floats);
            Matrix a = new(from, rows, n, n, 1), b = new(w, n, n, n, 1), c = new(to, rows, n, n, 1);
            var copy = Best(5, () => ForParts(x.Count, FlatPart, (x, y), static (s, i, n) =>
                new Span<float>(Floats(s.x) + i, n).CopyTo(new Span<float>(Floats(s.y) + i, n))));
            var product = Best(40, () => Multiply(a, b, c)); // tries enough for each thread to get a core of its own
            return (2.0 * rows * n * n / product, 2.0 * floats * sizeof(float) / copy);
        }
    }

    static double Best(int tries, Action run) => Enumerable.Range(0, tries).Min(_ => {
        var start = Stopwatch.GetTimestamp();
        run();
        return Stopwatch.GetElapsedTime(start).TotalSeconds;
    });

    public nint Allocate(long bytes) {
        // Untouched pages cost nothing; huge ones spare the products' strided reads most TLB misses.
        const long hugePage = 2 << 20;
        const int adviseHugePages = 14;
        // Half a vector of bf16 numbers is loaded as a whole one, so there is room for one at the end.
        allocations.Add((nint)NativeMemory.AllocZeroed((nuint)(bytes + hugePage + Vector<byte>.Count)));
        var address = (nint)((allocations[^1] + hugePage - 1) & -hugePage);
        _ = MemoryAdvise(address, (nuint)bytes, adviseHugePages);
        return address;
    }

    [DllImport("libc", EntryPoint = "madvise")]
    static extern int MemoryAdvise(nint address, nuint length, int advice);

    public void Dispose() {
        workers.Dispose();
        allocations.ForEach(address => NativeMemory.Free((void*)address));
        allocations.Clear();
    }

    public void Write(Tensor to, ReadOnlySpan<float> values) {
        if (to.Type == DataType.Bf16)
            BFloat16.Round(values, new((ushort*)to.Address, (int)to.Count));
        else
            values.CopyTo(new(Floats(to), (int)to.Count));
    }

    public void Read(Tensor from, Span<float> values) {
        fixed (float* to = values)
            for (int i = 0, n = (int)from.Count; n > 0; i += Lanes, n -= Lanes)
                Store(to + i, n, Weights(from, i, n));
    }

    public void Clear(Tensor x) => NativeMemory.Clear(Floats(x), (nuint)x.Bytes);

    // ---- Embedding

    public void Embed(ReadOnlySpan<int> tokens, Tensor wte, Tensor wpe, Tensor x) {
        fixed (int* ids = tokens)
            For(x.AllRows, (ids: (nint)ids, wte, wpe, x), static (s, row) => {
                Tensor token = s.wte.Slice(((int*)s.ids)[row], 1), position = s.wpe.Slice(row % s.x.Rows, 1);
                for (int i = 0, n = s.x.Columns; n > 0; i += Lanes, n -= Lanes)
                    Store(Row(s.x, row) + i, n, Weights(token, i, n) + Weights(position, i, n));
            });
    }

    public void EmbedBackward(ReadOnlySpan<int> tokens, Tensor dx, Tensor dwte, Tensor dwpe) {
        fixed (int* ids = tokens)
            ForParts(dx.Columns, ColumnPart, (ids: (nint)ids, dx, dwte, dwpe), static (s, first, n) => {
                for (var row = 0; row < s.dx.AllRows; row++) {
                    AddTo(Row(s.dwte, ((int*)s.ids)[row]) + first, Row(s.dx, row) + first, n);
                    AddTo(Row(s.dwpe, row % s.dx.Rows) + first, Row(s.dx, row) + first, n);
                }
            });
    }

    // ---- Layer norm

    public void LayerNorm(Tensor x, Tensor w, Tensor b, Tensor y, Tensor statistics) =>
        For(x.AllRows, (x, w, b, y, statistics), static (s, row) => {
            float* x = Row(s.x, row), y = Row(s.y, row);
            var count = s.x.Columns;
            Vector<float> sum = default, squares = default;
            for (int i = 0, n = count; n > 0; i += Lanes, n -= Lanes)
                sum += Load(x + i, n);
            var mean = Vector.Sum(sum) / count;
            for (int i = 0, n = count; n > 0; i += Lanes, n -= Lanes) {
                var difference = Load(x + i, n, mean) - new Vector<float>(mean);
                squares += difference * difference;
            }
            var rstd = 1 / MathF.Sqrt(Vector.Sum(squares) / count + 1e-5f);
            for (int i = 0, n = count; n > 0; i += Lanes, n -= Lanes)
                Store(y + i, n, (Load(x + i, n) - new Vector<float>(mean)) * rstd * Weights(s.w, i, n) +
                    Weights(s.b, i, n));
            (Row(s.statistics, row)[0], Row(s.statistics, row)[1]) = (mean, rstd);
        });

    public void LayerNormBackward(
        Tensor dy, Tensor x, Tensor w, Tensor statistics, Tensor dx, Tensor dw, Tensor db, Tensor dbias) {
        For(x.AllRows, (dy, x, w, statistics, dx), static (s, row) => {
            float* dy = Row(s.dy, row), x = Row(s.x, row), w = Floats(s.w), dx = Row(s.dx, row);
            Vector<float> mean = new(Row(s.statistics, row)[0]), rstd = new(Row(s.statistics, row)[1]);
            var count = s.x.Columns;
            // With g = dy·w and the normalized input z: dx = rstd·(g − mean(g) − z·mean(g·z)).
            Vector<float> sum = default, weighted = default;
            for (int i = 0, n = count; n > 0; i += Lanes, n -= Lanes) {
                var g = Load(dy + i, n) * Load(w + i, n);
                sum += g;
                weighted += g * (Load(x + i, n) - mean) * rstd;
            }
            Vector<float> meanG = new(Vector.Sum(sum) / count), meanGZ = new(Vector.Sum(weighted) / count);
            for (int i = 0, n = count; n > 0; i += Lanes, n -= Lanes) {
                var z = (Load(x + i, n) - mean) * rstd;
                Store(dx + i, n, Load(dx + i, n) + (Load(dy + i, n) * Load(w + i, n) - meanG - z * meanGZ) * rstd);
            }
        });
        ForParts(x.Columns, ColumnPart, (dy, x, statistics, dw, db), static (s, first, n) => {
            for (var row = 0; row < s.x.AllRows; row++) {
                float* dy = Row(s.dy, row) + first, x = Row(s.x, row) + first, dw = Floats(s.dw) + first;
                Vector<float> mean = new(Row(s.statistics, row)[0]), rstd = new(Row(s.statistics, row)[1]);
                AddTo(Floats(s.db) + first, dy, n);
                for (int i = 0, left = n; left > 0; i += Lanes, left -= Lanes)
                    Store(dw + i, left, Load(dw + i, left) + Load(dy + i, left) * (Load(x + i, left) - mean) * rstd);
            }
        });
        AddRows(dx, dbias);
    }

    /// <summary>sums (C) += Σ x (rows, C) over rows; a default tensor has no columns to add to.</summary>
    void AddRows(Tensor x, Tensor sums, [CallerMemberName] string operation = "") =>
        ForParts(sums.Columns, ColumnPart, (x, sums), static (s, first, n) => {
            for (var row = 0; row < s.x.AllRows; row++)
                AddTo(Floats(s.sums) + first, Row(s.x, row) + first, n);
        }, operation);

    // ---- Linear and GELU

    public void Linear(Tensor x, Tensor w, Tensor b, Tensor y) {
        if (b.Address == 0)
            Clear(y);
        Multiply(Matrix(x), Matrix(Widened(w)).Transposed, Matrix(y), b);
    }

    Tensor widened; // a matrix in fp32

    /// <summary>A matrix in fp32: itself, or a copy that lasts until the next is made.</summary>
    Tensor Widened(Tensor w) {
        if (w.Type == DataType.Fp32)
            return w;
        if (widened.Count < w.Count)
            widened = new(Allocate(w.Count * sizeof(float)), 1, w.AllRows, w.Columns);
        ForParts(w.Count, FlatPart, (w, widened), static (s, i, n) => BFloat16.Widen(
            new((ushort*)s.w.Address + i, n), new(Floats(s.widened) + i, n)));
        return w with { Address = widened.Address, Type = DataType.Fp32 };
    }

    public void LinearResidual(Tensor x, Tensor w, Tensor b, Tensor residual, Tensor y) {
        Linear(x, w, b, y);
        Combine(1, y, 1, residual, y);
    }

    public void LinearGelu(Tensor x, Tensor w, Tensor b, Tensor input, Tensor y) {
        Linear(x, w, b, input);
        Gelu(input, y);
    }

    public void LinearBackward(Tensor dy, Tensor x, Tensor w, Tensor dx, Tensor dw) {
        Clear(dx);
        Multiply(Matrix(dy), Matrix(w), Matrix(dx));
        Multiply(Matrix(dy).Transposed, Matrix(x), Matrix(dw));
    }

    public void LinearGeluBackward(Tensor dy, Tensor x, Tensor input, Tensor w, Tensor dx, Tensor dw, Tensor dbias) {
        LinearBackward(dy, x, w, dx, dw);
        ForParts(dx.Count, FlatPart, (input, dx), static (s, i, n) => {
            for (; n > 0; i += Lanes, n -= Lanes) {
                var x = Load(Floats(s.input) + i, n);
                var gate = Gate(x);
                var slope = 2 * GeluScale * (Vector<float>.One + 3 * GeluCubic * x * x);
                var derivative = gate + x * gate * (Vector<float>.One - gate) * slope;
                Store(Floats(s.dx) + i, n, Load(Floats(s.dx) + i, n) * derivative);
            }
        });
        AddRows(dx, dbias);
    }

    public void Gelu(Tensor x, Tensor y) => ForParts(x.Count, FlatPart, (x, y), static (s, i, n) => {
        for (; n > 0; i += Lanes, n -= Lanes)
            Store(Floats(s.y) + i, n, Load(Floats(s.x) + i, n) * Gate(Load(Floats(s.x) + i, n)));
    });

    const float GeluScale = 0.7978845608f; // √(2/π)
    const float GeluCubic = 0.044715f;

    /// <summary>GELU(x)/x: (1 + tanh u)/2 = 1/(1 + e^−2u) with u = √(2/π)·(x + 0.044715·x³).</summary>
    static Vector<float> Gate(Vector<float> x) => Vector<float>.One /
        (Vector<float>.One + Vector.Exp(-2 * GeluScale * x * (Vector<float>.One + GeluCubic * x * x)));

    /// <summary>c = a·b + bias, or c += a·b without a bias, in tiles that the threads take one by one.</summary>
    void Multiply(Matrix a, Matrix b, Matrix c, Tensor bias = default, [CallerMemberName] string operation = "") {
        // Full-height strips pack each part of b once. If a must be packed too (it is transposed), squares are best.
        var (rows, columns) = (a.RowStride == 1 ? 384 : c.Rows, 384);
        while (Tiles(c.Rows, rows) * Tiles(c.Columns, columns) < 4 * workers.Threads && Math.Max(rows, columns) > 96)
            (rows, columns) = columns > 96 ? (rows, columns / 2) : (rows / 2, columns);
        var name = Profile == null ? "" : $"{operation} {c.Rows} x {c.Columns} x {a.Columns}";
        For(Tiles(c.Rows, rows) * Tiles(c.Columns, columns), (a, b, c, bias, rows, columns), static (s, tile) => {
            var down = Tiles(s.c.Rows, s.rows);
            var (i, j) = (tile % down * s.rows, tile / down * s.columns);
            var c = s.c.Part(i, j, s.rows, s.columns);
            for (var row = 0; s.bias.Address != 0 && row < c.Rows; row++) {
                for (int k = 0, n = c.Columns; n > 0; k += Lanes, n -= Lanes)
                    Store(c.Row(row) + k, n, Weights(s.bias, j + k, n));
            }
            Product.Add(s.a.RowsFrom(i, c.Rows), s.b.Part(0, j, s.b.Rows, s.columns), c);
        }, 2.0 * c.Rows * c.Columns * a.Columns, name);
    }

    static int Tiles(long count, int size) => (int)((count + size - 1) / size);

    // ---- Attention

    /// <summary>Scores that a thread has room for on its stack, and queries that it takes at once if their scores fit,
    /// enough to repay packing the keys.</summary>
    const int ScoreCount = IDevice.LongestT, QueryBlock = 128;

    public void Attention(Tensor qkv, int heads, Tensor y, Tensor lse) =>
        For(qkv.Depth * heads, (qkv, heads, y, lse), static (s, head) => {
            var scratch = stackalloc float[ScoreCount];
            var ((q, k, v), y) = (Heads(s.qkv, s.heads, head), Head(s.y, 1, 0, s.heads, head));
            var (scale, block) = (1 / MathF.Sqrt(q.Columns), Math.Clamp(ScoreCount / s.qkv.Rows, 1, QueryBlock));
            for (var first = 0; first < y.Rows; first += block) {
                var (queries, result) = (q.RowsFrom(first, block), y.RowsFrom(first, block));
                var keys = first + queries.Rows;
                var p = new Matrix(scratch, queries.Rows, keys, keys, 1);
                Product.Add(queries, k.RowsFrom(0, keys).Transposed, p.Cleared());
                for (var row = 0; row < p.Rows; row++) {
                    var visible = first + row + 1;
                    var max = Maximum(p.Row(row), visible) * scale;
                    var sum = Exponentials(p.Row(row), visible, keys, scale, max);
                    Row(s.lse, head)[first + row] = max + MathF.Log(sum);
                    for (int i = 0, n = visible; n > 0; i += Lanes, n -= Lanes)
                        Store(p.Row(row) + i, n, Load(p.Row(row) + i, n) * (1 / sum));
                }
                Product.Add(p, v.RowsFrom(0, keys), result.Cleared());
            }
        }, 2.0 * qkv.Depth * qkv.Rows * (qkv.Rows + 1) * (qkv.Columns / 3));

    public void AttentionBackward(
        Tensor dy, Tensor qkv, Tensor y, Tensor lse, int heads, Tensor dqkv, Tensor dbias) {
        Clear(dqkv);
        For(qkv.Depth * heads, (dy, qkv, y, lse, heads, dqkv), static (s, head) => {
            var scratch = stackalloc float[2 * ScoreCount];
            var ((q, k, v), (dq, dk, dv)) = (Heads(s.qkv, s.heads, head), Heads(s.dqkv, s.heads, head));
            var (y, dy) = (Head(s.y, 1, 0, s.heads, head), Head(s.dy, 1, 0, s.heads, head));
            var (scale, block) = (1 / MathF.Sqrt(q.Columns), Math.Clamp(ScoreCount / s.qkv.Rows, 1, QueryBlock));
            for (var first = 0; first < y.Rows; first += block) {
                var (qs, dqs, dys) = (q.RowsFrom(first, block), dq.RowsFrom(first, block), dy.RowsFrom(first, block));
                var keys = first + qs.Rows;
                var (ks, vs) = (k.RowsFrom(0, keys), v.RowsFrom(0, keys));
                var p = new Matrix(scratch, qs.Rows, keys, keys, 1);
                var ds = new Matrix(scratch + ScoreCount, qs.Rows, keys, keys, 1);
                Product.Add(qs, ks.Transposed, p.Cleared());
                Product.Add(dys, vs.Transposed, ds.Cleared());
                for (var row = 0; row < p.Rows; row++) {
                    // P = e^(scale·s − lse); dS = scale·P·(dP − dy·y).
                    Exponentials(p.Row(row), first + row + 1, keys, scale, Row(s.lse, head)[first + row]);
                    Vector<float> delta = new(Product.Dot(dys.Row(row), y.Row(first + row), y.Columns));
                    for (int i = 0, n = keys; n > 0; i += Lanes, n -= Lanes)
                        Store(ds.Row(row) + i, n, Load(p.Row(row) + i, n) * (Load(ds.Row(row) + i, n) - delta) * scale);
                }
                Product.Add(p.Transposed, dys, dv.RowsFrom(0, keys));
                Product.Add(ds, ks, dqs);
                Product.Add(ds.Transposed, qs, dk.RowsFrom(0, keys));
            }
        }, 5.0 * qkv.Depth * qkv.Rows * (qkv.Rows + 1) * (qkv.Columns / 3));
        AddRows(dqkv, dbias);
    }

    /// <summary>One part of one head of one sequence, (T, HS), of x (B, T, parts·NH·HS).</summary>
    static Matrix Head(Tensor x, int parts, int part, int heads, int index) {
        var size = x.Columns / parts / heads;
        return Matrix(x).Part(index / heads * x.Rows, (part * heads + index % heads) * size, x.Rows, size);
    }

    static (Matrix Q, Matrix K, Matrix V) Heads(Tensor qkv, int heads, int index) =>
        (Head(qkv, 3, 0, heads, index), Head(qkv, 3, 1, heads, index), Head(qkv, 3, 2, heads, index));

    static float Maximum(float* x, int count) {
        var max = new Vector<float>(float.NegativeInfinity);
        for (int i = 0, n = count; n > 0; i += Lanes, n -= Lanes)
            max = Vector.Max(max, Load(x + i, n, float.NegativeInfinity));
        var result = max[0];
        for (var lane = 1; lane < Lanes; lane++)
            result = MathF.Max(result, max[lane]);
        return result;
    }

    /// <summary>x = e^(scale·x − shift) up to count, and 0 from there to length; returns the sum.</summary>
    static float Exponentials(float* x, int count, int length, float scale, float shift) {
        new Span<float>(x + count, length - count).Clear();
        Vector<float> sum = default;
        for (int i = 0, n = count; n > 0; i += Lanes, n -= Lanes) {
            var e = Vector.Exp(Load(x + i, n, float.NegativeInfinity) * scale - new Vector<float>(shift));
            sum += e;
            Store(x + i, n, e);
        }
        return Vector.Sum(sum);
    }

    // ---- Classifier

    public void Classify(Tensor logits, ReadOnlySpan<int> targets, int vocabulary, Tensor losses, float gradientScale) {
        fixed (int* ids = targets)
            For(logits.AllRows, (logits, ids: (nint)ids, vocabulary, losses, gradientScale), static (s, row) => {
                var logits = Row(s.logits, row);
                var target = ((int*)s.ids)[row];
                var (max, picked) = (Maximum(logits, s.vocabulary), logits[target]);
                var sum = Exponentials(logits, s.vocabulary, s.logits.Columns, 1, max);
                Floats(s.losses)[row] = MathF.Log(sum) + max - picked;
                for (int i = 0, n = s.vocabulary; n > 0; i += Lanes, n -= Lanes)
                    Store(logits + i, n, Load(logits + i, n) * (s.gradientScale / sum));
                logits[target] -= s.gradientScale;
            });
    }

    public void LinearClassify(Tensor x, Tensor w, ReadOnlySpan<int> targets, int vocabulary, Tensor logits,
        Tensor losses, float gradientScale, Tensor dx, Tensor dw) {
        Linear(x, w, default, logits);
        Classify(logits, targets, vocabulary, losses, gradientScale);
        if (gradientScale != 0)
            LinearBackward(logits, x, w, dx, dw);
    }

    // ---- Optimizer

    public double SumOfSquares(Tensor x) {
        const int parts = 1024;
        var sums = stackalloc double[parts];
        For(parts, (x, sums: (nint)sums), static (s, part) => {
            var (from, end, total) = (s.x.Count * part / parts, s.x.Count * (part + 1) / parts, 0.0);
            for (; from < end; from += 4096)
                total += Product.Dot(Floats(s.x) + from, Floats(s.x) + from, (int)Math.Min(4096, end - from));
            ((double*)s.sums)[part] = total;
        });
        var sum = 0.0;
        for (var part = 0; part < parts; part++)
            sum += sums[part];
        return sum;
    }

    public void AdamW(ReadOnlySpan<AdamWPart> parts, in AdamWStep step) {
        var rate = step.LearningRate / (1 - MathF.Pow(step.Beta1, step.Number));
        var correction = 1 / (1 - MathF.Pow(step.Beta2, step.Number));
        foreach (var part in parts)
            ForParts(part.W.Count, FlatPart, (part, step, rate, correction), static (s, i, n) => {
                float* w = Floats(s.part.W) + i, dw = Floats(s.part.Dw) + i;
                float* m = Floats(s.part.M) + i, v = Floats(s.part.V) + i;
                var (beta1, beta2) = (s.step.Beta1, s.step.Beta2);
                var decay = s.part.Decays ? s.step.LearningRate * s.step.WeightDecay : 0;
                for (; n > 0; w += Lanes, dw += Lanes, m += Lanes, v += Lanes, n -= Lanes) {
                    var g = Load(dw, n) * s.step.GradientScale;
                    var mean = beta1 * Load(m, n) + (1 - beta1) * g;
                    var square = beta2 * Load(v, n) + (1 - beta2) * g * g;
                    var root = Vector.SquareRoot(square * s.correction) + new Vector<float>(s.step.Epsilon);
                    Store(m, n, mean);
                    Store(v, n, square);
                    Store(w, n, Load(w, n) * (1 - decay) - s.rate * mean / root);
                    Store(dw, n, Vector<float>.Zero);
                }
            });
    }

    Tensor scratch; // of Muon: two matrices, then two squares of their shorter side

    public void Muon(ReadOnlySpan<MuonPart> parts, in MuonStep step) {
        const float a = MuonStep.A, b = MuonStep.B, c = MuonStep.C;
        foreach (var (_, w, _, dw, m) in parts) {
            var (least, isTall, momentum) = (Math.Min(w.Rows, w.Columns), w.Rows > w.Columns, step.Momentum);
            var size = new Tensor(0, 2, w.Rows + w.Columns, least);
            if (scratch.Count < size.Count)
                scratch = size with { Address = Allocate(size.Bytes) };
            Tensor x = w[0] with { Address = scratch.Address }, y = x with { Address = x.Address + (nint)x.Bytes };
            var square = new Tensor(y.Address + (nint)y.Bytes, 2, least, least);
            var (X, Y, A, B) = (Matrix(x), Matrix(y), Matrix(square[0]), Matrix(square[1]));
            for (var i = 0; i < w.Depth; i++) {
                Combine(momentum, m[i], (1 - momentum) * step.GradientScale, dw[i], m[i]);
                Combine(momentum, m[i], (1 - momentum) * step.GradientScale, dw[i], y);
                Clear(dw[i]);
                Combine(1 / MathF.Max((float)Math.Sqrt(SumOfSquares(y)), 1e-7f), y, 0, y, x);
                for (var left = 5; left > 0; left--) {
                    // y = (a/c)·x + (b/c·A + A²)·x; x = c·y.
                    Clear(square[0]);
                    Multiply(isTall ? X.Transposed : X, isTall ? X : X.Transposed, A);
                    Combine(b / c, square[0], 0, square[0], square[1]);
                    Multiply(A, A, B);
                    Combine(a / c, x, 0, x, y);
                    Multiply(isTall ? X : B, isTall ? B : X, Y);
                    Combine(c, y, 0, y, x);
                }
                Combine(1 - step.LearningRate * step.WeightDecay, w[i], -step.RateOf(w), x, w[i]);
            }
        }
    }

    /// <summary>z = p·x + q·y.</summary>
    void Combine(float p, Tensor x, float q, Tensor y, Tensor z, [CallerMemberName] string operation = "") =>
        ForParts(z.Count, FlatPart, (p, x, q, y, z), static (s, i, n) => {
            for (; n > 0; i += Lanes, n -= Lanes)
                Store(Floats(s.z) + i, n, s.p * Load(Floats(s.x) + i, n) + s.q * Load(Floats(s.y) + i, n));
        }, operation);

    // ---- Generation

    Tensor normalized; // (rows, C), then statistics

    public void Decode(ReadOnlySpan<Operation> program, in Choice choice, int position, int shared,
        ReadOnlySpan<int> tokens, Span<int> next) {
        for (var (n, B) = (0, tokens.Length); n < next.Length; n += B, position++) {
            foreach (var op in program) {
                if (op.Kind == OperationKind.Embed)
                    Embed(n == 0 ? tokens : next[(n - B)..n], op.X, op.B.Slice(position, 1), op.Y);
                else if (op.Kind == OperationKind.Attention)
                    Attend(op, position, shared);
                else if (op.Kind == OperationKind.Choose)
                    Choose(op.X, choice with { Drawn = choice.Drawn + n / B }, next.Slice(n, B));
                else
                    MultiplyRows(op, position);
            }
        }
    }

    /// <summary>One product of a program, y = f(x·wᵀ + b).</summary>
    void MultiplyRows(Operation op, int position) {
        var (x, y) = (op.X, op.Y.Rows > 1 ? op.Y with { Address = (nint)Row(op.Y, position) } : op.Y);
        if (op.NormW.Address != 0) {
            if (normalized.Count < x.Count + 2 * x.AllRows)
                normalized = new(Allocate(4 * (x.Count + 2 * x.AllRows)), 1, x.AllRows, x.Columns + 2);
            var to = x with { Address = normalized.Address };
            LayerNorm(x, op.NormW, op.NormB, to, to with { Address = to.Address + (nint)to.Bytes, Columns = 2 });
            x = to;
        }
        For(Tiles(op.W.AllRows, WeightRows), op with { X = x, Y = y },
            op.W.Type == DataType.Bf16 ? MultiplyPart<ushort> : MultiplyPart<float>, 2.0 * op.W.Count * x.AllRows,
            Profile == null ? "" : $"{nameof(Decode)} {x.AllRows} x {op.W.AllRows} x {op.W.Columns}");
    }

    /// <summary>Rows of w that a thread takes at a time: their sums fill whole cache lines.</summary>
    const int WeightRows = 48;

    /// <summary>One part of the columns of y. Its rows of w come from memory once, for all rows of x.</summary>
    static void MultiplyPart<T>(Operation op, int part) where T : unmanaged {
        const int block = 4;
        var (x, first, columns) = (op.X, part * WeightRows, Math.Min(WeightRows, op.W.AllRows - part * WeightRows));
        var sums = stackalloc float[block * WeightRows];
        for (var b = 0; b < x.AllRows; b++) {
            if (b % block == 0)
                Product.Dots(x.Slice(b, Math.Min(block, x.AllRows - b)), (T*)op.W.Address + (long)first * x.Columns,
                    columns, sums, WeightRows);
            float* from = sums + b % block * WeightRows, to = Row(op.Y, b * op.Y.Rows) + first;
            for (int i = 0, n = columns; n > 0; i += Lanes, n -= Lanes) {
                var sum = Load(from + i, n) + (op.B.Address == 0 ? default : Weights(op.B, first + i, n));
                Store(to + i, n, op.Kind == OperationKind.Residual ? Load(to + i, n) + sum
                    : op.Kind == OperationKind.Gelu ? sum * Gate(sum) : sum);
            }
        }
    }

    /// <summary>Attention of one query in each sequence.</summary>
    void Attend(Operation op, int position, int shared) =>
        For(op.X.Depth * op.Heads, (op, position, shared), static (s, head) => {
            var (b, own) = (head / s.op.Heads, Heads(s.op.X, s.op.Heads, head));
            var (first, y) = (Heads(s.op.X, s.op.Heads, head % s.op.Heads), Head(s.op.Y, 1, 0, s.op.Heads, head));
            var (count, scale) = (s.position + 1, 1 / MathF.Sqrt(y.Columns));
            var scores = stackalloc float[count];
            for (var key = 0; key < count; key++)
                scores[key] = Product.Dot(own.Q.Row(s.position), (key < s.shared ? first : own).K.Row(key), y.Columns);
            var sum = Exponentials(scores, count, count, scale, Maximum(scores, count) * scale);
            y.Cleared();
            for (var key = 0; key < count; key++)
                AddTo(y.Row(0), (key < s.shared ? first : own).V.Row(key), y.Columns, scores[key] / sum);
        });

    /// <summary>Chooses a token for each row of logits (B, 1, V), as the choice says.</summary>
    void Choose(Tensor logits, Choice choice, Span<int> next) {
        fixed (int* to = next)
            For(logits.Depth, (logits, choice, to: (nint)to), static (s, row) => {
                var logits = new ReadOnlySpan<float>(Row(s.logits, row), s.logits.Columns);
                if (Numbers.NotFinite(logits) is { } value)
                    throw new Gpt2Exception(
                        $"--init: expected finite logits, found {value}: the weights are too large");
                ((int*)s.to)[row] = Next(logits, s.choice with { Sample = s.choice.Sample + row });
            });
    }

    /// <summary>The token to choose, given its logits (V). Top-k and top-p are thresholds: tokens as likely as the last
    /// one let through are let through, too. The largest logit/T + Gumbel is a draw from the softmax.</summary>
    internal static int Next(ReadOnlySpan<float> logits, Choice choice) {
        var (T, topK, topP, V) = (choice.Temperature, choice.TopK, choice.TopP, logits.Length);
        fixed (float* x = logits) {
            var some = stackalloc float[V + Lanes];
            // No token below the k-th largest of the maxima of 4·k groups is among the k largest.
            var groups = Maxima(x, V, topK > 0 ? Math.Max(1, V / (4 * topK)) : V, some);
            var max = Maximum(some, groups);
            if (T == 0)
                return logits.IndexOf(max);
            // Tokens of less than (1 − topP)/V of the likeliest one's probability are out, all together.
            var least = topP < 1 ? max + T * MathF.Log((1 - topP) / V) : float.NegativeInfinity;
            if (topK > 0 && choice.Selects(V)) {
                least = MathF.Max(least, Threshold(new(some, groups), (ulong)topK, static _ => 1));
                least = Threshold(AtLeast(x, V, least, some), (ulong)topK, static _ => 1);
            }
            if (topP < 1) {
                ulong Weight(float logit) => (ulong)(MathF.Exp((logit - max) / T) * (1L << 40));
                var candidates = AtLeast(x, V, least, some);
                var all = 0ul;
                foreach (var logit in candidates)
                    all += Weight(logit);
                least = Threshold(candidates, Math.Max(1, (ulong)(topP * (double)all)), Weight);
            }
            return Draw(x, V, least, T, RandomBits(choice.Drawn, RandomBits(choice.Sample, choice.Seed)[0])[0]);
        }
    }

    /// <summary>Writes the largest numbers of groups of at most so many; returns how many groups there are.</summary>
    static int Maxima(float* x, int count, int most, float* to) {
        var groups = 0;
        for (var (first, part) = (0, most * (long)Lanes); first < count; first += (int)part, groups += Lanes) {
            var max = new Vector<float>(float.NegativeInfinity); // each lane is a group
            for (int i = first, n = (int)Math.Min(part, count - first); n > 0; i += Lanes, n -= Lanes)
                max = Vector.Max(max, Load(x + i, n, float.NegativeInfinity));
            Store(to + groups, Lanes, max);
        }
        return groups;
    }

    /// <summary>Copies the numbers that are at least so large.</summary>
    static Span<float> AtLeast(float* x, int count, float least, float* to) {
        var found = 0;
        for (int i = 0, n = count; n > 0; i += Lanes, n -= Lanes) {
            if (Vector.LessThanAll(Load(x + i, n, float.NegativeInfinity), new(least)))
                continue;
            for (var lane = 0; lane < Math.Min(n, Lanes); lane++) {
                if (x[i + lane] >= least)
                    to[found++] = x[i + lane];
            }
        }
        return new(to, found);
    }

    /// <summary>The largest number that, with all larger ones, weighs at least the target; or else the smallest. Keeps,
    /// in place, the side of a pivot on which it is (Hoare's quickselect).</summary>
    static float Threshold(Span<float> x, ulong target, Func<float, ulong> weight) {
        while (true) {
            var (pivot, over, equal, kept) = (x[x.Length / 2], 0ul, 0ul, 0);
            foreach (var value in x) {
                over += value > pivot ? weight(value) : 0;
                equal += value == pivot ? weight(value) : 0;
            }
            if (over < target && over + equal >= target)
                return pivot;
            var isLarger = over >= target;
            foreach (var value in x) { // without a branch that cannot be predicted
                x[kept] = value;
                kept += (isLarger ? value > pivot : value < pivot) ? 1 : 0;
            }
            if (kept == 0)
                return pivot;
            x = x[..kept];
            target -= isLarger ? 0 : over + equal;
        }
    }

    /// <summary>Of the tokens whose logits are at least so large, the one whose logit/T + Gumbel is largest.</summary>
    static int Draw(float* logits, int V, float least, float T, uint seed) {
        var (best, token) = (float.NegativeInfinity, 0);
        for (int i = 0, n = V; n > 0; i += Lanes, n -= Lanes) {
            var x = Load(logits + i, n, float.NegativeInfinity);
            if (Vector.LessThanAll(x, new(least)))
                continue;
            var bits = Vector.AsVectorInt32(RandomBits(i, seed) >> 9);
            var uniform = Vector.ConvertToSingle(bits) + new Vector<float>(0.5f);
            var score = x / T - Vector.Log(-Vector.Log(uniform / (1 << 23)));
            for (var lane = 0; lane < Lanes && Vector.GreaterThanAny(score, new(best)); lane++) {
                if (x[lane] >= least && score[lane] > best)
                    (best, token) = (score[lane], i + lane);
            }
        }
        return token;
    }

    /// <summary>32 random bits for a seed and each counter from the first on: MurmurHash3's finalizer, twice.</summary>
    static Vector<uint> RandomBits(int first, uint seed) {
        var counter = Vector<uint>.Indices + new Vector<uint>((uint)first);
        for (var round = 0; round < 2; round++) {
            counter = (counter ^ new Vector<uint>(seed)) * 0x9e3779b9;
            counter = (counter ^ counter >> 16) * 0x85ebca6b;
            counter = (counter ^ counter >> 13) * 0xc2b2ae35;
            counter ^= counter >> 16;
        }
        return counter;
    }

    // ---- Threads, rows and lanes

    /// <summary>body(state, i) for each i below <paramref name="count"/>, shared by the threads.</summary>
    void For<T>(int count, T state, Action<T, int> body, double flops = 0, [CallerMemberName] string operation = "") {
        var start = Stopwatch.GetTimestamp();
        workers.Run(count, state, body);
        Profile?.Add(operation, Stopwatch.GetElapsedTime(start).TotalSeconds, flops, 0);
    }

    /// <summary>Elements or columns that a thread takes at a time: columns fill cache lines, shared by none.</summary>
    const int FlatPart = 1 << 16, ColumnPart = 64;

    /// <summary>body(state, first, n) for each part [first, first + n) of <paramref name="count"/> elements.</summary>
    void ForParts<T>(
        long count, int size, T state, Action<T, long, int> body, [CallerMemberName] string operation = "") =>
        For(Tiles(count, size), (state, body, count, size), static (s, i) =>
            s.body(s.state, (long)i * s.size, (int)Math.Min(s.size, s.count - (long)i * s.size)), 0, operation);

    static float* Floats(Tensor x) => (float*)x.Address;

    static float* Row(Tensor x, int row) => (float*)x.Address + (long)row * x.Columns;

    static Matrix Matrix(Tensor x) => new(Floats(x), x.AllRows, x.Columns, x.Columns, 1);
}

/// <summary>Vector loads and stores for arrays of any length: at the end only the first n lanes count.</summary>
static unsafe class Simd {
    public static int Lanes => Vector<float>.Count;

    /// <summary>to += scale·from.</summary>
    public static void AddTo(float* to, float* from, int count, float scale = 1) {
        for (int i = 0, n = count; n > 0; i += Lanes, n -= Lanes)
            Store(to + i, n, Load(to + i, n) + Load(from + i, n) * scale);
    }

    /// <summary>Loads from an array with n elements left; lanes past its end get the filler.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector<float> Load(float* x, int n, float filler = 0) =>
        n >= Lanes ? *(Vector<float>*)x : LoadPart(x, n, filler);

    /// <summary>Loads a vector of fp32, or of bf16 (ushort); of these, as many again are read.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector<float> Weights<T>(T* w) where T : unmanaged => typeof(T) == typeof(float)
        ? *(Vector<float>*)w : Vector.AsVectorSingle(Vector.WidenLower(*(Vector<ushort>*)w) << 16);

    /// <summary>Loads from weights of any type, with n left from i on.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector<float> Weights(Tensor w, long i, int n) => w.Type == DataType.Bf16
        ? Weights((ushort*)w.Address + i) : Load((float*)w.Address + i, n);

    static Vector<float> LoadPart(float* x, int n, float filler) {
        var value = new Vector<float>(filler);
        new Span<float>(x, n).CopyTo(new Span<float>(&value, Lanes));
        return value;
    }

    /// <summary>Stores to an array with n elements left.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(float* x, int n, Vector<float> value) {
        if (n >= Lanes)
            *(Vector<float>*)x = value;
        else
            StorePart(x, n, value);

        static void StorePart(float* x, int n, Vector<float> value) =>
            new Span<float>(&value, n).CopyTo(new Span<float>(x, n));
    }
}

/// <summary>A strided view of fp32 memory: element (i, j) at address + i·rowStride + j·columnStride.</summary>
readonly unsafe struct Matrix(float* address, int rows, int columns, long rowStride, long columnStride) {
    public readonly float* Address = address;
    public readonly int Rows = rows, Columns = columns;
    public readonly long RowStride = rowStride, ColumnStride = columnStride;

    public Matrix Transposed => new(Address, Columns, Rows, ColumnStride, RowStride);

    public float* Row(int i) => Address + i * RowStride;

    /// <summary>The part from (row, column) on, of at most the given size.</summary>
    public Matrix Part(int row, int column, int rows, int columns) =>
        new(Address + row * RowStride + column * ColumnStride, Math.Min(rows, Rows - row),
            Math.Min(columns, Columns - column), RowStride, ColumnStride);

    public Matrix RowsFrom(int first, int count) => Part(first, 0, count, Columns);

    /// <summary>This matrix, of contiguous columns, filled with zeros.</summary>
    public Matrix Cleared() {
        for (var i = 0; i < Rows; i++)
            new Span<float>(Row(i), Columns).Clear();
        return this;
    }
}

/// <summary>Matrix products on one thread. A tile of c, 6 rows by two vectors, stays in registers for a whole depth
/// block; b is packed so that each step's two vectors are adjacent, and a only if its rows are not contiguous (Goto and
/// van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008).</summary>
static unsafe class Product {
    const int TileRows = 6, WidestVector = 16;
    const int DepthBlock = 384, StripColumns = 384, BlockRows = 60; // the fastest of those tried on a Zen 3

    static int TileColumns => 2 * Lanes;

    /// <summary>c += a·b, where c has contiguous columns.</summary>
    public static void Add(Matrix a, Matrix b, Matrix c) {
        var buffer = stackalloc float[DepthBlock * (StripColumns + BlockRows) + WidestVector];
        var packedB = (float*)(((nint)buffer + 63) & ~63);
        var packedA = packedB + DepthBlock * StripColumns;
        for (var j = 0; j < c.Columns; j += StripColumns) {
            for (var k = 0; k < a.Columns; k += DepthBlock) {
                Pack(b.Part(k, j, DepthBlock, StripColumns).Transposed, TileColumns, packedB);
                for (var i = 0; i < c.Rows; i += BlockRows)
                    AddBlock(
                        a.Part(i, k, BlockRows, DepthBlock), packedA, packedB, c.Part(i, j, BlockRows, StripColumns));
            }
        }
    }

    /// <summary>Σ x·w, of weights in fp32 or bf16 (ushort).</summary>
    public static float Dot<T>(float* x, T* w, int count) where T : unmanaged {
        var (sum, i) = (Vector<float>.Zero, 0);
        for (; i + Lanes <= count; i += Lanes)
            sum = Vector.FusedMultiplyAdd(*(Vector<float>*)(x + i), Weights(w + i), sum);
        var result = Vector.Sum(sum);
        for (; i < count; i++)
            result += x[i] * Weights(w + i)[0];
        return result;
    }

    /// <summary>y (rows of x, columns) = x·wᵀ: four rows by two columns at a time where there are so many, but each sum
    /// is that of <see cref="Dot"/>.</summary>
    public static void Dots<T>(Tensor x, T* w, int columns, float* y, int stride) where T : unmanaged {
        int K = x.Columns, column = 0;
        float* x0 = (float*)x.Address, x1 = x0 + K, x2 = x1 + K, x3 = x2 + K;
        for (; x.Rows == 4 && K % Lanes == 0 && column + 2 <= columns; column += 2, y += 2, w += 2 * (long)K) {
            Vector<float> y00 = default, y01 = default, y10 = default, y11 = default;
            Vector<float> y20 = default, y21 = default, y30 = default, y31 = default;
            for (var i = 0; i < K; i += Lanes) {
                Vector<float> w0 = Weights(w + i), w1 = Weights(w + K + i), u = *(Vector<float>*)(x0 + i);
                (y00, y01) = (Vector.FusedMultiplyAdd(u, w0, y00), Vector.FusedMultiplyAdd(u, w1, y01));
                u = *(Vector<float>*)(x1 + i);
                (y10, y11) = (Vector.FusedMultiplyAdd(u, w0, y10), Vector.FusedMultiplyAdd(u, w1, y11));
                u = *(Vector<float>*)(x2 + i);
                (y20, y21) = (Vector.FusedMultiplyAdd(u, w0, y20), Vector.FusedMultiplyAdd(u, w1, y21));
                u = *(Vector<float>*)(x3 + i);
                (y30, y31) = (Vector.FusedMultiplyAdd(u, w0, y30), Vector.FusedMultiplyAdd(u, w1, y31));
            }
            (y[0], y[1]) = (Vector.Sum(y00), Vector.Sum(y01));
            (y[stride], y[stride + 1]) = (Vector.Sum(y10), Vector.Sum(y11));
            (y[2 * stride], y[2 * stride + 1]) = (Vector.Sum(y20), Vector.Sum(y21));
            (y[3 * stride], y[3 * stride + 1]) = (Vector.Sum(y30), Vector.Sum(y31));
        }
        for (; column < columns; column++, y++, w += K) {
            for (var row = 0; row < x.Rows; row++)
                y[row * stride] = Dot(x0 + (long)row * K, w, K);
        }
    }

    /// <summary>c += a·b for one packed strip of b and one block of a. Contiguous rows of a that fill a tile are read
    /// in place, others are packed first.</summary>
    static void AddBlock(Matrix a, float* packedA, float* packedB, Matrix c) {
        var edge = stackalloc float[TileRows * 2 * WidestVector];
        var depth = a.Columns;
        var inPlace = a.RowStride == 1 ? 0 : c.Rows / TileRows * TileRows;
        Pack(a.RowsFrom(inPlace, c.Rows - inPlace), TileRows, packedA);
        for (var j = 0; j < c.Columns; j += TileColumns) {
            for (var i = 0; i < c.Rows; i += TileRows) {
                var rows = i < inPlace ? a.RowsFrom(i, TileRows)
                    : new Matrix(packedA + (i - inPlace) * depth, TileRows, depth, 1, TileRows);
                var tile = c.Part(i, j, TileRows, TileColumns);
                if (tile.Rows == TileRows && tile.Columns == TileColumns) {
                    AddTile(rows, packedB + j * depth, tile.Address, tile.RowStride);
                    continue;
                }
                new Span<float>(edge, TileRows * TileColumns).Clear();
                AddTile(rows, packedB + j * depth, edge, TileColumns);
                for (var row = 0; row < tile.Rows; row++)
                    AddTo(tile.Row(row), edge + row * TileColumns, tile.Columns);
            }
        }
    }

    /// <summary>Writes x in groups of width rows, each column by column; the last group may lack rows.</summary>
    static void Pack(Matrix x, int width, float* to) {
        for (var i = 0; i < x.Rows; i += width, to += width * x.Columns) {
            var (row, rows) = (0, Math.Min(width, x.Rows - i));
            for (; row + 4 <= rows; row += 4) {
                // Four rows at a time, so that each step stores a whole vector.
                float* next = to + row, x0 = x.Row(i + row), x1 = x.Row(i + row + 1);
                float* x2 = x.Row(i + row + 2), x3 = x.Row(i + row + 3);
                if (x.RowStride == 1) {
                    for (var k = 0; k < x.Columns; k++, x0 += x.ColumnStride, next += width)
                        *(Vector128<float>*)next = *(Vector128<float>*)x0;
                } else {
                    for (long k = 0, end = x.Columns * x.ColumnStride; k < end; k += x.ColumnStride, next += width)
                        *(Vector128<float>*)next = Vector128.Create(x0[k], x1[k], x2[k], x3[k]);
                }
            }
            for (; row < rows; row++) {
                for (var k = 0; k < x.Columns; k++)
                    to[k * width + row] = x.Row(i + row)[k * x.ColumnStride];
            }
        }
    }

    /// <summary>c (6, two vectors) += a (6, depth) · b (depth, two vectors). Twelve sums cover the latency of two
    /// multiply-adds a cycle; 6 broadcasts and 2 loads feed them.</summary>
    static void AddTile(Matrix a, float* b, float* c, long stride) {
        for (var row = 0; Sse.IsSupported && row < TileRows; row++) {
            // Fetches the tile of c while its sum is computed.
            Sse.Prefetch0(c + row * stride);
            Sse.Prefetch0(c + row * stride + TileColumns - 1);
        }
        // Three addresses and two offsets for the six rows stay in registers; six addresses would not.
        float* a0 = a.Address, a2 = a.Row(2), a4 = a.Row(4);
        var (end, step, odd) = (a.Columns * a.ColumnStride, a.ColumnStride, a.RowStride);
        Vector<float> c00 = default, c01 = default, c10 = default, c11 = default, c20 = default, c21 = default;
        Vector<float> c30 = default, c31 = default, c40 = default, c41 = default, c50 = default, c51 = default;
        for (long k = 0; k != end; k += step, odd += step, b += TileColumns) {
            Vector<float> b0 = ((Vector<float>*)b)[0], b1 = ((Vector<float>*)b)[1];
            var x = new Vector<float>(a0[k]);
            (c00, c01) = (Vector.FusedMultiplyAdd(x, b0, c00), Vector.FusedMultiplyAdd(x, b1, c01));
            x = new Vector<float>(a0[odd]);
            (c10, c11) = (Vector.FusedMultiplyAdd(x, b0, c10), Vector.FusedMultiplyAdd(x, b1, c11));
            x = new Vector<float>(a2[k]);
            (c20, c21) = (Vector.FusedMultiplyAdd(x, b0, c20), Vector.FusedMultiplyAdd(x, b1, c21));
            x = new Vector<float>(a2[odd]);
            (c30, c31) = (Vector.FusedMultiplyAdd(x, b0, c30), Vector.FusedMultiplyAdd(x, b1, c31));
            x = new Vector<float>(a4[k]);
            (c40, c41) = (Vector.FusedMultiplyAdd(x, b0, c40), Vector.FusedMultiplyAdd(x, b1, c41));
            x = new Vector<float>(a4[odd]);
            (c50, c51) = (Vector.FusedMultiplyAdd(x, b0, c50), Vector.FusedMultiplyAdd(x, b1, c51));
        }
        AddPair(c, c00, c01);
        AddPair(c + stride, c10, c11);
        AddPair(c + 2 * stride, c20, c21);
        AddPair(c + 3 * stride, c30, c31);
        AddPair(c + 4 * stride, c40, c41);
        AddPair(c + 5 * stride, c50, c51);

        static void AddPair(float* c, Vector<float> left, Vector<float> right) {
            ((Vector<float>*)c)[0] += left;
            ((Vector<float>*)c)[1] += right;
        }
    }
}

/// <summary>Threads that share the work of one job after another; the calling thread is one of them.</summary>
sealed unsafe class Workers : IDisposable {
    readonly Barrier barrier;
    delegate*<void*, int, void> invoke;
    void* job;
    int count, next;
    Exception? failure;

    public Workers(int threads) {
        barrier = new Barrier(threads);
        for (var i = 1; i < threads; i++) // with room on the stack for the blocks of products and attention
            new Thread(() => { while (Share()) { } }, 8 << 20) { IsBackground = true }.Start();
    }

    public int Threads => barrier.ParticipantCount;

    /// <summary>Calls body(state, i) for each i below <paramref name="count"/>, on all threads, and waits. One of the
    /// exceptions that it throws, if any, is thrown here, and some calls are left out then.</summary>
    public void Run<T>(int count, T state, Action<T, int> body) {
        if (count == 1) {
            body(state, 0);
            return;
        }
        var call = (state, body); // stays on this stack until all threads are done, so nothing is allocated
        job = Unsafe.AsPointer(ref call);
        invoke = &Invoke;
        (this.count, next, failure) = (count, 0, null);
        Share();
        if (failure != null)
            ExceptionDispatchInfo.Throw(failure);

        static void Invoke(void* job, int i) {
            ref var call = ref Unsafe.AsRef<(T State, Action<T, int> Body)>(job);
            call.Body(call.State, i);
        }
    }

    bool Share() {
        barrier.SignalAndWait();
        if (count < 0)
            return false;
        try {
            for (var i = Interlocked.Increment(ref next) - 1; i < count; i = Interlocked.Increment(ref next) - 1)
                invoke(job, i);
        } catch (Exception e) {
            (failure, next) = (e, count);
        }
        barrier.SignalAndWait();
        return true;
    }

    public void Dispose() {
        count = -1;
        Share();
    }
}
