using System.Diagnostics;
using System.Numerics;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

[module: SkipLocalsInit]

namespace Gpt2;

/// <summary>The operations in fp32 on the CPU: the reference for every other device, and the default where there is no GPU.
/// Each one splits its output over the threads in a way that does not depend on their number, so that the same input
/// gives the same bits on any number of cores.</summary>
public sealed unsafe class Cpu : IDevice {
    /// <summary>Columns that one thread sums over all rows at a time: whole cache lines, no two threads in one.</summary>
    const int ColumnBlock = 64;

    /// <summary>Scores that a thread holds on its stack at once.</summary>
    const int ScoreCount = 1 << 17;

    /// <summary>Query rows whose scores are held at once, unless the keys are too many: enough to repay packing these.</summary>
    const int QueryBlock = 128;

    /// <summary>Elements of a flat array that one thread takes at a time.</summary>
    const int Chunk = 1 << 16;

    readonly Workers workers;
    readonly List<nint> allocations = [];

    /// <summary>Starts the worker threads.</summary>
    /// <param name="threads">Threads that compute, this one included; 0 takes one a core.</param>
    public Cpu(int threads = 0) {
        workers = new Workers(threads > 0 ? threads : Environment.ProcessorCount);
    }

    public string Name => $"CPU, {workers.Threads} threads, {Vector<float>.Count * 32}-bit vectors";

    public nint Allocate(long bytes) {
        // Zeroed by the system as pages are first touched; huge pages spare the products' strided reads most TLB misses.
        const long hugePage = 2 << 20;
        const int madviseHugePage = 14;
        var address = (nint)NativeMemory.AllocZeroed((nuint)(bytes + hugePage));
        allocations.Add(address);
        var aligned = (nint)((address + hugePage - 1) & -hugePage);
        _ = MemoryAdvise(aligned, (nuint)bytes, madviseHugePage);
        return aligned;
    }

    [DllImport("libc", EntryPoint = "madvise")]
    static extern int MemoryAdvise(nint address, nuint length, int advice);

    public void Dispose() {
        workers.Dispose();
        allocations.ForEach(address => NativeMemory.Free((void*)address));
        allocations.Clear();
    }

    public void Write(Tensor to, ReadOnlySpan<float> values) => values.CopyTo(Span(to));

    public void Read(Tensor from, Span<float> values) => Span(from).CopyTo(values);

    public void Clear(Tensor x) => NativeMemory.Clear(Floats(x), (nuint)x.Bytes);

    // ---- Embedding

    public void Embed(ReadOnlySpan<int> tokens, Tensor wte, Tensor wpe, int start, Tensor x) {
        fixed (int* ids = tokens) {
            For(x.Depth * x.Rows, (ids: (nint)ids, wte, wpe, start, x), static (s, row) => {
                var token = Row(s.wte, ((int*)s.ids)[row]);
                var position = Row(s.wpe, s.start + row % s.x.Rows);
                var y = Row(s.x, row);
                for (var i = 0; i < s.x.Columns; i += Lanes) {
                    var n = s.x.Columns - i;
                    Store(y + i, n, Load(token + i, n) + Load(position + i, n));
                }
            });
        }
    }

    public void EmbedBackward(ReadOnlySpan<int> tokens, Tensor dx, Tensor dwte, Tensor dwpe) {
        fixed (int* ids = tokens) {
            ForColumns(dx, (ids: (nint)ids, dx, dwte, dwpe), static (s, begin, end) => {
                for (var row = 0; row < s.dx.Depth * s.dx.Rows; row++) {
                    var from = Row(s.dx, row);
                    AddTo(Row(s.dwte, ((int*)s.ids)[row]), from, begin, end);
                    AddTo(Row(s.dwpe, row % s.dx.Rows), from, begin, end);
                }
            });
        }
    }

    // ---- Layer norm

    public void LayerNorm(Tensor x, Tensor w, Tensor b, Tensor y, Tensor statistics) =>
        For(x.Depth * x.Rows, (x, w, b, y, statistics), static (s, row) =>
            Normalize(Row(s.x, row), Floats(s.w), Floats(s.b), s.x.Columns, Row(s.y, row), Row(s.statistics, row)));

    public void ResidualLayerNorm(Tensor residual, Tensor x, Tensor w, Tensor b, Tensor sum, Tensor y, Tensor statistics) {
        For(x.Depth * x.Rows, (residual, x, w, b, sum, y, statistics), static (s, row) => {
            float* left = Row(s.residual, row), right = Row(s.x, row), sum = Row(s.sum, row);
            for (var i = 0; i < s.x.Columns; i += Lanes) {
                var n = s.x.Columns - i;
                Store(sum + i, n, Load(left + i, n) + Load(right + i, n));
            }
            Normalize(sum, Floats(s.w), Floats(s.b), s.x.Columns, Row(s.y, row), Row(s.statistics, row));
        });
    }

    static void Normalize(float* x, float* w, float* b, int count, float* y, float* statistics) {
        var sum = Vector<float>.Zero;
        for (var i = 0; i < count; i += Lanes)
            sum += Load(x + i, count - i);
        var mean = Vector.Sum(sum) / count;
        var squares = Vector<float>.Zero;
        for (var i = 0; i < count; i += Lanes) {
            var d = Load(x + i, count - i, mean) - new Vector<float>(mean);
            squares += d * d;
        }
        var rstd = 1 / MathF.Sqrt(Vector.Sum(squares) / count + 1e-5f);
        for (var i = 0; i < count; i += Lanes) {
            var n = count - i;
            Store(y + i, n, (Load(x + i, n) - new Vector<float>(mean)) * rstd * Load(w + i, n) + Load(b + i, n));
        }
        (statistics[0], statistics[1]) = (mean, rstd);
    }

    public void LayerNormBackward(Tensor dy, Tensor x, Tensor w, Tensor statistics, Tensor dx, Tensor dw, Tensor db) {
        For(x.Depth * x.Rows, (dy, x, w, statistics, dx), static (s, row) => {
            float* dy = Row(s.dy, row), x = Row(s.x, row), w = Floats(s.w), dx = Row(s.dx, row);
            var (mean, rstd) = (Row(s.statistics, row)[0], Row(s.statistics, row)[1]);
            var count = s.x.Columns;
            // With g = dy·w and the normalized input n: dx = rstd·(g − mean(g) − n·mean(g·n)).
            Vector<float> sum = Vector<float>.Zero, weighted = Vector<float>.Zero;
            for (var i = 0; i < count; i += Lanes) {
                var g = Load(dy + i, count - i) * Load(w + i, count - i);
                sum += g;
                weighted += g * (Load(x + i, count - i) - new Vector<float>(mean)) * rstd;
            }
            var (meanG, meanGN) = (Vector.Sum(sum) / count, Vector.Sum(weighted) / count);
            for (var i = 0; i < count; i += Lanes) {
                var n = count - i;
                var normalized = (Load(x + i, n) - new Vector<float>(mean)) * rstd;
                var g = Load(dy + i, n) * Load(w + i, n);
                Store(dx + i, n, Load(dx + i, n) + (g - new Vector<float>(meanG) - normalized * meanGN) * rstd);
            }
        });
        ForColumns(x, (dy, x, statistics, dw, db), static (s, begin, end) => {
            for (var row = 0; row < s.x.Depth * s.x.Rows; row++) {
                float* dy = Row(s.dy, row), x = Row(s.x, row), dw = Floats(s.dw);
                var (mean, rstd) = (Row(s.statistics, row)[0], Row(s.statistics, row)[1]);
                for (var i = begin; i < end; i += Lanes) {
                    var n = end - i;
                    var normalized = (Load(x + i, n) - new Vector<float>(mean)) * rstd;
                    Store(dw + i, n, Load(dw + i, n) + Load(dy + i, n) * normalized);
                }
                AddTo(Floats(s.db), dy, begin, end);
            }
        });
    }

    // ---- Linear and GELU

    public void Linear(Tensor x, Tensor w, Tensor b, Tensor y) {
        if (b.Address == 0)
            Clear(y);
        Multiply(Matrix(x), Matrix(w).Transposed, Matrix(y), b);
    }

    public void LinearGelu(Tensor x, Tensor w, Tensor b, Tensor input, Tensor y) {
        Linear(x, w, b, input);
        Gelu(input, y);
    }

    public void LinearBackward(Tensor dy, Tensor x, Tensor w, Tensor dx, Tensor dw, Tensor db) {
        Clear(dx);
        Multiply(Matrix(dy), Matrix(w), Matrix(dx));
        Multiply(Matrix(dy).Transposed, Matrix(x), Matrix(dw));
        if (db.Address != 0) {
            ForColumns(dy, (dy, db), static (s, begin, end) => {
                for (var row = 0; row < s.dy.Depth * s.dy.Rows; row++)
                    AddTo(Floats(s.db), Row(s.dy, row), begin, end);
            });
        }
    }

    public void LinearGeluBackward(Tensor dy, Tensor x, Tensor input, Tensor w, Tensor dx, Tensor dw, Tensor db) {
        LinearBackward(dy, x, w, dx, dw, db);
        ForChunks(dx.Count, (input, dx), static (s, begin, end) => {
            for (var i = begin; i < end; i += Lanes) {
                var n = (int)(end - i);
                var x = Load(Floats(s.input) + i, n);
                var gate = Sigmoid(x);
                var slope = GeluScale * 2 * (Vector<float>.One + 3 * GeluCubic * x * x);
                var derivative = gate + x * gate * (Vector<float>.One - gate) * slope;
                Store(Floats(s.dx) + i, n, Load(Floats(s.dx) + i, n) * derivative);
            }
        });
    }

    public void Gelu(Tensor x, Tensor y) {
        ForChunks(x.Count, (x, y), static (s, begin, end) => {
            for (var i = begin; i < end; i += Lanes) {
                var n = (int)(end - i);
                var x = Load(Floats(s.x) + i, n);
                Store(Floats(s.y) + i, n, x * Sigmoid(x));
            }
        });
    }

    const float GeluScale = 0.7978845608f; // √(2/π)
    const float GeluCubic = 0.044715f;

    /// <summary>The factor of x in the tanh GELU: (1 + tanh u)/2 = 1/(1 + e^−2u) with u = √(2/π)·(x + 0.044715·x³).</summary>
    static Vector<float> Sigmoid(Vector<float> x) {
        var u = GeluScale * x * (Vector<float>.One + GeluCubic * x * x);
        return Vector<float>.One / (Vector<float>.One + Vector.Exp(-2 * u));
    }

    /// <summary>c = bias + a·b, or c += a·b without a bias, in tiles that the threads take one by one.</summary>
    void Multiply(Matrix a, Matrix b, Matrix c, Tensor bias = default) {
        // Strips of columns pack b once; where a's rows must be packed too (a is transposed), squares balance the two.
        var rows = a.RowStride == 1 ? 384 : c.Rows;
        var columns = 384;
        while (Tiles(c.Rows, rows) * Tiles(c.Columns, columns) < 4 * workers.Threads && Math.Max(rows, columns) > 96)
            (rows, columns) = columns > 96 ? (rows, columns / 2) : (rows / 2, columns);
        For(Tiles(c.Rows, rows) * Tiles(c.Columns, columns), (a, b, c, bias, rows, columns), static (s, tile) => {
            var down = Tiles(s.c.Rows, s.rows);
            var (i, j) = (tile % down * s.rows, tile / down * s.columns);
            var c = s.c.Part(i, j, s.rows, s.columns);
            for (var row = 0; s.bias.Address != 0 && row < c.Rows; row++)
                Buffer.MemoryCopy(Floats(s.bias) + j, c.Address + row * c.RowStride, c.Columns * 4, c.Columns * 4);
            Product.Add(s.a.Part(i, 0, s.rows, s.a.Columns), s.b.Part(0, j, s.b.Rows, s.columns), c);
        });
    }

    static int Tiles(int count, int size) => (count + size - 1) / size;

    // ---- Attention

    public void Attention(Tensor qkv, int start, int heads, Tensor y, Tensor lse) {
        For(qkv.Depth * heads, (qkv, start, heads, y, lse), static (s, head) => {
            var scratch = stackalloc float[ScoreCount];
            var block = Math.Clamp(ScoreCount / s.qkv.Rows, 1, QueryBlock);
            var (q, k, v) = Head(s.qkv, s.heads, head);
            var y = HeadOutput(s.y, s.heads, head);
            var scale = 1 / MathF.Sqrt(q.Columns);
            for (var first = 0; first < y.Rows; first += block) {
                var queries = Math.Min(block, y.Rows - first);
                var keys = s.start + first + queries;
                var scores = new Matrix(scratch, queries, keys, keys, 1);
                Product.Add(q.Part(s.start + first, 0, queries, q.Columns), k.Part(0, 0, keys, k.Columns).Transposed,
                    scores.Cleared());
                for (var row = 0; row < queries; row++) {
                    var visible = s.start + first + row + 1;
                    var p = scores.Address + row * keys;
                    var logSum = Softmax(p, visible, keys, scale);
                    Floats(s.lse)[(long)head * y.Rows + first + row] = logSum;
                }
                Product.Add(scores, v.Part(0, 0, keys, v.Columns), y.Part(first, 0, queries, y.Columns).Cleared());
            }
        });
    }

    /// <summary>Replaces the first <paramref name="visible"/> scores by their softmax and the rest by zero.</summary>
    /// <returns>The log-sum-exp of the scaled scores.</returns>
    static float Softmax(float* scores, int visible, int count, float scale) {
        var max = Maximum(scores, visible) * scale;
        var sum = ExponentialsOf(scores, visible, scale, max);
        var norm = 1 / sum;
        for (var i = 0; i < visible; i += Lanes)
            Store(scores + i, visible - i, Load(scores + i, visible - i) * norm);
        new Span<float>(scores + visible, count - visible).Clear();
        return max + MathF.Log(sum);
    }

    static float Maximum(float* x, int count) {
        var max = new Vector<float>(float.NegativeInfinity);
        for (var i = 0; i < count; i += Lanes)
            max = Vector.Max(max, Load(x + i, count - i, float.NegativeInfinity));
        var result = max[0];
        for (var lane = 1; lane < Lanes; lane++)
            result = MathF.Max(result, max[lane]);
        return result;
    }

    /// <summary>Replaces x by e^(scale·x − shift) and returns the sum.</summary>
    static float ExponentialsOf(float* x, int count, float scale, float shift) {
        var sum = Vector<float>.Zero;
        for (var i = 0; i < count; i += Lanes) {
            var e = Vector.Exp(Load(x + i, count - i, float.NegativeInfinity) * scale - new Vector<float>(shift));
            sum += e;
            Store(x + i, count - i, e);
        }
        return Vector.Sum(sum);
    }

    public void AttentionBackward(Tensor dy, Tensor qkv, Tensor y, Tensor lse, int heads, Tensor dqkv) {
        Clear(dqkv);
        For(qkv.Depth * heads, (dy, qkv, y, lse, heads, dqkv), static (s, head) => {
            var scratch = stackalloc float[2 * ScoreCount];
            var block = Math.Clamp(ScoreCount / s.qkv.Rows, 1, QueryBlock);
            var (q, k, v) = Head(s.qkv, s.heads, head);
            var (dq, dk, dv) = Head(s.dqkv, s.heads, head);
            var (y, dy) = (HeadOutput(s.y, s.heads, head), HeadOutput(s.dy, s.heads, head));
            var scale = 1 / MathF.Sqrt(q.Columns);
            for (var first = 0; first < y.Rows; first += block) {
                var queries = Math.Min(block, y.Rows - first);
                var keys = first + queries;
                var (kBlock, vBlock) = (k.Part(0, 0, keys, k.Columns), v.Part(0, 0, keys, v.Columns));
                var (qBlock, dyBlock) = (q.Part(first, 0, queries, q.Columns), dy.Part(first, 0, queries, dy.Columns));
                var p = new Matrix(scratch, queries, keys, keys, 1);
                var ds = new Matrix(scratch + ScoreCount, queries, keys, keys, 1);
                Product.Add(qBlock, kBlock.Transposed, p.Cleared());
                Product.Add(dyBlock, vBlock.Transposed, ds.Cleared());
                for (var row = 0; row < queries; row++) {
                    // P = e^(scale·s − lse); dS = scale·P·(dP − dy·y).
                    float* pRow = p.Address + row * keys, dsRow = ds.Address + row * keys;
                    var visible = first + row + 1;
                    ExponentialsOf(pRow, visible, scale, Floats(s.lse)[(long)head * y.Rows + first + row]);
                    new Span<float>(pRow + visible, keys - visible).Clear();
                    var delta = Product.Dot(dy.Row(first + row), y.Row(first + row), y.Columns);
                    for (var i = 0; i < keys; i += Lanes) {
                        var difference = Load(dsRow + i, keys - i) - new Vector<float>(delta);
                        Store(dsRow + i, keys - i, Load(pRow + i, keys - i) * difference * scale);
                    }
                }
                Product.Add(p.Transposed, dyBlock, dv.Part(0, 0, keys, dv.Columns));
                Product.Add(ds, kBlock, dq.Part(first, 0, queries, dq.Columns));
                Product.Add(ds.Transposed, qBlock, dk.Part(0, 0, keys, dk.Columns));
            }
        });
    }

    /// <summary>Queries, keys and values, (T, HS) each, of one head of one row of a packed (B, T, 3·NH·HS) array.</summary>
    static (Matrix Q, Matrix K, Matrix V) Head(Tensor qkv, int heads, int index) {
        var (batch, head) = (index / heads, index % heads);
        var channels = qkv.Columns / 3;
        var all = Matrix(qkv).Part(batch * qkv.Rows, 0, qkv.Rows, qkv.Columns);
        var size = channels / heads;
        return (all.Part(0, head * size, all.Rows, size), all.Part(0, channels + head * size, all.Rows, size),
            all.Part(0, 2 * channels + head * size, all.Rows, size));
    }

    static Matrix HeadOutput(Tensor y, int heads, int index) =>
        Matrix(y).Part(index / heads * y.Rows, index % heads * (y.Columns / heads), y.Rows, y.Columns / heads);

    // ---- Classifier

    public void Classify(Tensor logits, ReadOnlySpan<int> targets, int vocabulary, Tensor losses, float gradientScale) {
        fixed (int* ids = targets) {
            For(logits.Depth * logits.Rows, (logits, ids: (nint)ids, vocabulary, losses, gradientScale), static (s, row) => {
                var logits = Row(s.logits, row);
                var target = ((int*)s.ids)[row];
                var (max, picked) = (Maximum(logits, s.vocabulary), logits[target]);
                var sum = ExponentialsOf(logits, s.vocabulary, 1, max);
                Floats(s.losses)[row] = MathF.Log(sum) + max - picked;
                var scale = s.gradientScale / sum;
                for (var i = 0; i < s.vocabulary; i += Lanes)
                    Store(logits + i, s.vocabulary - i, Load(logits + i, s.vocabulary - i) * scale);
                logits[target] -= s.gradientScale;
                new Span<float>(logits + s.vocabulary, s.logits.Columns - s.vocabulary).Clear();
            });
        }
    }

    // ---- Optimizer

    public double SumOfSquares(Tensor x) {
        const int parts = 1024;
        var sums = stackalloc double[parts];
        For(parts, (x, sums: (nint)sums), static (s, part) => {
            var (begin, end) = (s.x.Count * part / parts, s.x.Count * (part + 1) / parts);
            var total = 0.0;
            for (var from = begin; from < end; from += 4096) {
                var count = (int)Math.Min(4096, end - from);
                total += Product.Dot(Floats(s.x) + from, Floats(s.x) + from, count);
            }
            ((double*)s.sums)[part] = total;
        });
        var sum = 0.0;
        for (var part = 0; part < parts; part++)
            sum += sums[part];
        return sum;
    }

    public void AdamW(Tensor w, Tensor dw, Tensor m, Tensor v, in AdamWStep step) {
        ForChunks(w.Count, (w, dw, m, v, step), static (s, begin, end) => {
            float* w = Floats(s.w), dw = Floats(s.dw), m = Floats(s.m), v = Floats(s.v);
            var rate = s.step.LearningRate / (1 - MathF.Pow(s.step.Beta1, s.step.Number));
            var correction = 1 / (1 - MathF.Pow(s.step.Beta2, s.step.Number));
            var (beta1, beta2) = (s.step.Beta1, s.step.Beta2);
            var keep = 1 - s.step.LearningRate * s.step.WeightDecay;
            for (var i = begin; i < end; i += Lanes) {
                var n = (int)(end - i);
                var g = Load(dw + i, n) * s.step.GradientScale;
                var mean = beta1 * Load(m + i, n) + (1 - beta1) * g;
                var square = beta2 * Load(v + i, n) + (1 - beta2) * g * g;
                Store(m + i, n, mean);
                Store(v + i, n, square);
                var root = Vector.SquareRoot(square * correction) + new Vector<float>(s.step.Epsilon);
                Store(w + i, n, Load(w + i, n) * keep - rate * mean / root);
                Store(dw + i, n, Vector<float>.Zero);
            }
        });
    }

    // ---- Threads, rows and lanes

    /// <summary>Fused multiply-adds that all threads manage in registers: the ceiling of every product.</summary>
    /// <returns>Floating-point operations a second.</returns>
    public double PeakFlops() {
        const int rounds = 100_000;
        var start = Stopwatch.GetTimestamp();
        For(workers.Threads, 0, static (_, _) => Product.Spin(rounds));
        return workers.Threads * Product.Spin(1) * (double)rounds / Stopwatch.GetElapsedTime(start).TotalSeconds;
    }

    void For<T>(int count, T state, Action<T, int> body) => workers.Run(count, state, body);

    /// <summary>Splits a flat array of <paramref name="count"/> elements: body(state, begin, end).</summary>
    void ForChunks<T>(long count, T state, Action<T, long, long> body) =>
        For((int)((count + Chunk - 1) / Chunk), (state, body, count), static (s, i) =>
            s.body(s.state, (long)i * Chunk, Math.Min(s.count, (long)(i + 1) * Chunk)));

    /// <summary>Splits the columns of <paramref name="x"/>: body(state, begin, end).</summary>
    void ForColumns<T>(Tensor x, T state, Action<T, int, int> body) =>
        For(Tiles(x.Columns, ColumnBlock), (state, body, x.Columns), static (s, i) =>
            s.body(s.state, i * ColumnBlock, Math.Min(s.Columns, (i + 1) * ColumnBlock)));

    static float* Floats(Tensor x) => (float*)x.Address;

    static float* Row(Tensor x, int row) => (float*)x.Address + (long)row * x.Columns;

    static Span<float> Span(Tensor x) => new(Floats(x), checked((int)x.Count));

    static Matrix Matrix(Tensor x) => new(Floats(x), x.Depth * x.Rows, x.Columns, x.Columns, 1);

    static int Lanes => Vector<float>.Count;

    static void AddTo(float* to, float* from, int begin, int end) {
        for (var i = begin; i < end; i += Lanes)
            Store(to + i, end - i, Load(to + i, end - i) + Load(from + i, end - i));
    }

    /// <summary>The next lanes of an array of which <paramref name="n"/> elements are left; those past its end read as
    /// <paramref name="fill"/>.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    static Vector<float> Load(float* x, int n, float fill = 0) => n >= Lanes ? *(Vector<float>*)x : LoadPart(x, n, fill);

    /// <summary>Stores lanes to an array of which <paramref name="n"/> elements are left.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    static void Store(float* x, int n, Vector<float> value) {
        if (n >= Lanes) {
            *(Vector<float>*)x = value;
        } else {
            StorePart(x, n, value);
        }
    }

    [MethodImpl(MethodImplOptions.NoInlining)]
    static Vector<float> LoadPart(float* x, int n, float fill) {
        var value = new Vector<float>(fill);
        new Span<float>(x, n).CopyTo(new Span<float>(&value, Lanes));
        return value;
    }

    [MethodImpl(MethodImplOptions.NoInlining)]
    static void StorePart(float* x, int n, Vector<float> value) => new Span<float>(&value, n).CopyTo(new Span<float>(x, n));
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

    /// <summary>This matrix, filled with zeros; its columns must be contiguous.</summary>
    public Matrix Cleared() {
        for (var i = 0; i < Rows; i++)
            new Span<float>(Row(i), Columns).Clear();
        return this;
    }
}

/// <summary>The matrix product of one thread: a tile of 6 rows by two vectors stays in registers while it runs down the
/// depth, b is packed so that each step's two vectors are adjacent, and a is packed only where its rows are strided.
/// (Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008.)</summary>
static unsafe class Product {
    const int TileRows = 6;
    const int DepthBlock = 256;
    const int StripColumns = 384; // × DepthBlock: b's strip stays in the second-level cache
    const int BlockRows = 120;

    static int TileColumns => 2 * Vector<float>.Count;

    /// <summary>c += a·b for c with contiguous columns.</summary>
    public static void Add(Matrix a, Matrix b, Matrix c) {
        if (a.Rows < 4 && a.ColumnStride == 1 && b.RowStride == 1) {
            AddDots(a, b, c);
        } else if (a.Rows < 4 && b.ColumnStride == 1) {
            AddRows(a, b, c);
        } else {
            AddTiles(a, b, c);
        }
    }

    /// <summary>Few rows, b's columns contiguous: packing b would cost more than reading it once.</summary>
    static void AddDots(Matrix a, Matrix b, Matrix c) {
        for (var j = 0; j < c.Columns; j++) {
            for (var i = 0; i < c.Rows; i++)
                c.Row(i)[j] += Dot(a.Row(i), b.Address + j * b.ColumnStride, a.Columns);
        }
    }

    /// <summary>Few rows, b's rows contiguous.</summary>
    static void AddRows(Matrix a, Matrix b, Matrix c) {
        for (var k = 0; k < b.Rows; k++) {
            for (var i = 0; i < c.Rows; i++) {
                float* from = b.Row(k), to = c.Row(i);
                var factor = a.Row(i)[k * a.ColumnStride];
                var j = 0;
                for (; j <= c.Columns - Vector<float>.Count; j += Vector<float>.Count)
                    *(Vector<float>*)(to + j) += *(Vector<float>*)(from + j) * factor;
                for (; j < c.Columns; j++)
                    to[j] += from[j] * factor;
            }
        }
    }

    /// <summary>Σ x·y.</summary>
    public static float Dot(float* x, float* y, int count) {
        Vector<float> even = Vector<float>.Zero, odd = Vector<float>.Zero;
        var i = 0;
        for (; i <= count - 2 * Vector<float>.Count; i += 2 * Vector<float>.Count) {
            even = Vector.FusedMultiplyAdd(*(Vector<float>*)(x + i), *(Vector<float>*)(y + i), even);
            odd = Vector.FusedMultiplyAdd(((Vector<float>*)(x + i))[1], ((Vector<float>*)(y + i))[1], odd);
        }
        var sum = Vector.Sum(even + odd);
        for (; i < count; i++)
            sum += x[i] * y[i];
        return sum;
    }

    static void AddTiles(Matrix a, Matrix b, Matrix c) {
        var buffer = stackalloc float[DepthBlock * (StripColumns + BlockRows) + 2 * 16];
        var packedB = (float*)(((nint)buffer + 63) & ~63);
        var packedA = packedB + DepthBlock * StripColumns;
        var edge = stackalloc float[TileRows * 2 * 16];
        for (var j = 0; j < c.Columns; j += StripColumns) {
            for (var k = 0; k < a.Columns; k += DepthBlock) {
                var bPart = b.Part(k, j, DepthBlock, StripColumns);
                Pack(bPart.Transposed, TileColumns, packedB);
                for (var i = 0; i < c.Rows; i += BlockRows) {
                    var aPart = a.Part(i, k, BlockRows, DepthBlock);
                    var packed = a.RowStride == 1;
                    if (packed)
                        Pack(aPart, TileRows, packedA);
                    AddBlock(aPart, packed ? packedA : null, packedB, c.Part(i, j, BlockRows, StripColumns), edge);
                }
            }
        }
    }

    /// <summary>c += a·b for one packed strip of b and one block of a, packed too or read in place.</summary>
    static void AddBlock(Matrix a, float* packedA, float* packedB, Matrix c, float* edge) {
        var depth = a.Columns;
        for (var j = 0; j < c.Columns; j += TileColumns) {
            for (var i = 0; i < c.Rows; i += TileRows) {
                var rows = packedA != null
                    ? new Matrix(packedA + i * depth, TileRows, depth, 1, TileRows)
                    : a.Part(i, 0, TileRows, depth);
                var tile = c.Part(i, j, TileRows, TileColumns);
                if (tile.Rows == TileRows && tile.Columns == TileColumns) {
                    AddTile(rows, packedB + j * depth, tile.Address, tile.RowStride);
                    continue;
                }
                new Span<float>(edge, TileRows * TileColumns).Clear();
                AddTile(rows, packedB + j * depth, edge, TileColumns);
                for (var row = 0; row < tile.Rows; row++) {
                    for (var column = 0; column < tile.Columns; column++)
                        tile.Row(row)[column] += edge[row * TileColumns + column];
                }
            }
        }
    }

    /// <summary>Writes each group of <paramref name="width"/> rows of x, the last one padded with zeros, column by column.</summary>
    static void Pack(Matrix x, int width, float* to) {
        for (var i = 0; i < x.Rows; i += width, to += width * x.Columns) {
            var rows = Math.Min(width, x.Rows - i);
            var from = x.Row(i);
            if (rows < width) {
                for (var k = 0; k < x.Columns; k++) {
                    for (var row = 0; row < width; row++)
                        to[k * width + row] = row < rows ? from[row * x.RowStride + k * x.ColumnStride] : 0;
                }
            } else if (x.RowStride == 1) {
                for (var k = 0; k < x.Columns; k++)
                    CopyColumn(from + k * x.ColumnStride, width, to + k * width);
            } else {
                Transpose(from, x.RowStride, x.ColumnStride, width, x.Columns, to);
            }
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    static void CopyColumn(float* from, int width, float* to) {
        var i = 0;
        for (; i + 4 <= width; i += 4)
            *(Vector128<float>*)(to + i) = *(Vector128<float>*)(from + i);
        for (; i < width; i += 2)
            *(long*)(to + i) = *(long*)(from + i);
    }

    /// <summary>Four rows at a time, so that each step's stores fill a vector. The width must be a multiple of four.</summary>
    static void Transpose(float* from, long rowStride, long columnStride, int width, int columns, float* to) {
        for (var row = 0; row < width; row += 4) {
            var x0 = from + row * rowStride;
            var x1 = x0 + rowStride;
            var x2 = x1 + rowStride;
            var x3 = x2 + rowStride;
            var next = to + row;
            for (long k = 0, end = columns * columnStride; k < end; k += columnStride, next += width)
                *(Vector128<float>*)next = Vector128.Create(x0[k], x1[k], x2[k], x3[k]);
        }
    }

    /// <summary>c (6, two vectors) += a (6, depth) · b (depth, two vectors). Rows that a does not have repeat its last one.
    /// Twelve sums cover the latency of two multiply-adds a cycle; 6 broadcasts and 2 loads feed them.</summary>
    static void AddTile(Matrix a, float* b, float* c, long stride) {
        PrefetchTile(c, stride);
        var last = a.Rows - 1;
        float* a0 = a.Address, a1 = a.Row(Math.Min(1, last)), a2 = a.Row(Math.Min(2, last));
        float* a3 = a.Row(Math.Min(3, last)), a4 = a.Row(Math.Min(4, last)), a5 = a.Row(Math.Min(5, last));
        Vector<float> c00 = default, c01 = default, c10 = default, c11 = default, c20 = default, c21 = default;
        Vector<float> c30 = default, c31 = default, c40 = default, c41 = default, c50 = default, c51 = default;
        for (long k = 0, end = a.Columns * a.ColumnStride; k != end; k += a.ColumnStride, b += TileColumns) {
            Vector<float> b0 = ((Vector<float>*)b)[0], b1 = ((Vector<float>*)b)[1];
            var x = new Vector<float>(a0[k]);
            (c00, c01) = (Vector.FusedMultiplyAdd(x, b0, c00), Vector.FusedMultiplyAdd(x, b1, c01));
            x = new Vector<float>(a1[k]);
            (c10, c11) = (Vector.FusedMultiplyAdd(x, b0, c10), Vector.FusedMultiplyAdd(x, b1, c11));
            x = new Vector<float>(a2[k]);
            (c20, c21) = (Vector.FusedMultiplyAdd(x, b0, c20), Vector.FusedMultiplyAdd(x, b1, c21));
            x = new Vector<float>(a3[k]);
            (c30, c31) = (Vector.FusedMultiplyAdd(x, b0, c30), Vector.FusedMultiplyAdd(x, b1, c31));
            x = new Vector<float>(a4[k]);
            (c40, c41) = (Vector.FusedMultiplyAdd(x, b0, c40), Vector.FusedMultiplyAdd(x, b1, c41));
            x = new Vector<float>(a5[k]);
            (c50, c51) = (Vector.FusedMultiplyAdd(x, b0, c50), Vector.FusedMultiplyAdd(x, b1, c51));
        }
        AddRow(c, c00, c01);
        AddRow(c + stride, c10, c11);
        AddRow(c + 2 * stride, c20, c21);
        AddRow(c + 3 * stride, c30, c31);
        AddRow(c + 4 * stride, c40, c41);
        AddRow(c + 5 * stride, c50, c51);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    static void AddRow(float* c, Vector<float> left, Vector<float> right) {
        ((Vector<float>*)c)[0] += left;
        ((Vector<float>*)c)[1] += right;
    }

    /// <summary>Fetches the tile of c while its sum is being computed.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    static void PrefetchTile(float* c, long stride) {
        for (var row = 0; Sse.IsSupported && row < TileRows; row++, c += stride) {
            Sse.Prefetch0(c);
            Sse.Prefetch0(c + TileColumns - 1);
        }
    }

    /// <summary>Runs the tile's inner loop <paramref name="rounds"/> times over data in the first-level cache.</summary>
    /// <returns>Floating-point operations done.</returns>
    public static long Spin(int rounds) {
        const int depth = 64;
        var data = stackalloc float[TileRows * (depth + 2 * 16) + depth * 2 * 16];
        new Span<float>(data, TileRows * (depth + 2 * 16) + depth * 2 * 16).Clear();
        var a = new Matrix(data, TileRows, depth, 1, TileRows);
        for (var round = 0; round < rounds; round++)
            AddTile(a, data + TileRows * depth, data + depth * (TileRows + TileColumns), TileColumns);
        return (long)rounds * depth * TileRows * TileColumns * 2;
    }
}

/// <summary>Threads that wait between jobs and share each one's indices; the calling thread is one of them.</summary>
sealed unsafe class Workers : IDisposable {
    readonly Barrier barrier;
    delegate*<void*, int, void> invoke;
    void* call;
    int count, next;

    public Workers(int threads) {
        Threads = threads;
        barrier = new Barrier(threads);
        for (var i = 1; i < threads; i++) {
            // The products and attention keep their blocks on the stack.
            new Thread(Work, 8 << 20) { IsBackground = true, Name = $"worker {i}" }.Start();
        }
    }

    public int Threads { get; }

    /// <summary>Calls body(state, i) once for each i below <paramref name="count"/>, on all threads, and waits.</summary>
    public void Run<T>(int count, T state, Action<T, int> body) {
        // The call lives on this stack, which outlives the job: nothing is allocated.
        var local = (state, body);
#pragma warning disable CS8500 // The address of a managed local: read only while this frame waits.
        invoke = &Invoke<T>;
        call = &local;
        (this.count, next) = (count, 0);
#pragma warning restore CS8500
        var shared = Threads > 1 && count > 1;
        if (shared)
            barrier.SignalAndWait();
        TakeAll();
        if (shared)
            barrier.SignalAndWait();
    }

    static void Invoke<T>(void* call, int index) {
#pragma warning disable CS8500
        var local = (ValueTuple<T, Action<T, int>>*)call;
#pragma warning restore CS8500
        local->Item2(local->Item1, index);
    }

    void TakeAll() {
        for (var i = Interlocked.Increment(ref next) - 1; i < count; i = Interlocked.Increment(ref next) - 1)
            invoke(call, i);
    }

    void Work() {
        while (true) {
            barrier.SignalAndWait();
            if (invoke == null)
                return;
            TakeAll();
            barrier.SignalAndWait();
        }
    }

    /// <summary>Ends the threads.</summary>
    public void Dispose() {
        if (Threads > 1) {
            invoke = null;
            barrier.SignalAndWait();
        }
    }
}
