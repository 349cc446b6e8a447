namespace Gpt2;

/// <summary>Which device computes; Auto is a GPU if there is one.</summary>
public enum DeviceKind { Auto, Cuda, Cpu }

/// <summary>Type of an array's elements: IEEE single precision, or its upper 16 bits.</summary>
public enum DataType { Fp32, Bf16 }

/// <summary>A row-major array (Depth, Rows, Columns) in a device's memory; the default value means no array.</summary>
/// <param name="Address">Address of the first element, in the device's address space.</param>
public readonly record struct Tensor(
    nint Address, int Depth, int Rows, int Columns, DataType Type = DataType.Fp32) {
    /// <summary>Bytes per element.</summary>
    public static int SizeOf(DataType type) => type == DataType.Bf16 ? 2 : 4;
    public int ElementSize => SizeOf(Type);

    /// <summary>Number of elements, and their size in bytes.</summary>
    public long Count => (long)Depth * Rows * Columns;
    public long Bytes => Count * ElementSize;

    /// <summary>Depth · Rows: the array seen as one matrix.</summary>
    public int AllRows => Depth * Rows;

    /// <summary>The matrix (Rows, Columns) at index <paramref name="i"/> of the first dimension.</summary>
    public Tensor this[int i] => Part((long)i * Rows * Columns, Rows, Columns);

    /// <summary>Rows [first, first + count) of <see cref="AllRows"/>, (count, Columns).</summary>
    public Tensor Slice(int first, int count) => Part((long)first * Columns, count, Columns);

    /// <summary>A rank's part of n elements: [rank·n/ranks, (rank + 1)·n/ranks), as in llm.c's states.</summary>
    public static (long First, long Count) PartOf(long n, int rank, int ranks) =>
        (n * rank / ranks, n * (rank + 1) / ranks - n * rank / ranks);

    /// <summary>A rank's part of this array's elements, flat.</summary>
    public Tensor PartOf(int rank, int ranks) {
        var (first, count) = PartOf(Count, rank, ranks);
        return Flat(first, (int)count);
    }

    /// <summary>Elements [first, first + count), flat.</summary>
    public Tensor Flat(long first, int count) => Part(first, 1, count);

    Tensor Part(long first, int rows, int columns) =>
        this with { Address = Address + (nint)(first * ElementSize), Depth = 1, Rows = rows, Columns = columns };

    /// <summary>This array at an address, which then moves past it to a multiple of 256 bytes.</summary>
    public Tensor Place(ref nint address) {
        const int alignment = 256;
        var placed = this with { Address = address };
        address += (nint)((Bytes + alignment - 1) / alignment * alignment);
        return placed;
    }

    /// <summary>Most elements copied between host and device at a time.</summary>
    public const int ChunkSize = 1 << 20;

    /// <summary>All elements as flat arrays of at most <see cref="ChunkSize"/> elements.</summary>
    public IEnumerable<Tensor> Chunks() {
        for (long first = 0; first < Count; first += ChunkSize)
            yield return Flat(first, (int)Math.Min(ChunkSize, Count - first));
    }
}

/// <summary>Settings of one AdamW update (Loshchilov and Hutter, 2019). Number counts from 1; gradients are first
/// multiplied by GradientScale; Seed is for rounding master weights to bf16 stochastically.</summary>
public readonly record struct AdamWStep(int Number, float LearningRate, float WeightDecay, float GradientScale,
    float Beta1, float Beta2, float Epsilon, uint Seed);

/// <summary>Parameters that AdamW updates together, as flat arrays (n): weights, their fp32 master copy (the same array
/// if W is fp32), gradients, and both moments. First is the first one's index among all of the model's.</summary>
public readonly record struct AdamWPart(
    long First, bool Decays, Tensor W, Tensor Master, Tensor Dw, Tensor M, Tensor V);

/// <summary>Settings of one update of Muon (Jordan et al., 2024); Momentum is the old momentum's weight in the new one,
/// and the new one's in the update (Nesterov). The others are as in <see cref="AdamWStep"/>.</summary>
public readonly record struct MuonStep(
    float LearningRate, float WeightDecay, float GradientScale, float Momentum, uint Seed) {
    /// <summary>Coefficients of a Newton-Schulz step.</summary>
    public const float A = 3.4445f, B = -4.7750f, C = 2.0315f;

    /// <summary>Memory that a GPU takes for Muon at the first update, unless one matrix needs more.</summary>
    public const int ScratchBytes = 256 << 20;

    /// <summary>What x is multiplied by: it gives updates the size that AdamW's have.</summary>
    public float RateOf(Tensor w) => LearningRate * 0.2f * MathF.Sqrt(Math.Max(w.Rows, w.Columns));
}

/// <summary>Matrices of one shape that Muon updates together, as arrays (matrices, rows, columns): weights, their fp32
/// master copy (the same array if W is fp32), gradients and momentum, both fp32. First is as in AdamWPart.</summary>
public readonly record struct MuonPart(long First, Tensor W, Tensor Master, Tensor Dw, Tensor M);

/// <summary>What one operation of a program does; <see cref="Operation"/> says how.</summary>
public enum OperationKind { Embed, Linear, Gelu, Residual, Logits, Attention, Choose }

/// <summary>One operation of the program that makes the next token of B sequences, in <see cref="IDevice.Decode"/>.
/// Its arrays have one row for each sequence; a y of Linear may have one for each position, of which one is written.
/// Embed: y (B, 1, C) = x (Vp, C) at the sequence's last token + b (MaxT, C) at its position.
/// Linear: y = x·wᵀ + b, with x (B, 1, K), w (N, K), b (N) or default, y (B, 1, N) or (B, MaxT, N). With normW and
/// normB (K), x, which Embed or Residual wrote last, goes through layer norm first.
/// Gelu: y = GELU(x·wᵀ + b). Residual: y += x·wᵀ + b. Logits: Linear with y (B, 1, V) in fp32.
/// Attention: y (B, 1, C) = attention of the query at the position, for x (B, MaxT, 3C), as in IDevice.Attention.
/// Choose: the next token, from logits x (B, 1, V).</summary>
public readonly record struct Operation(OperationKind Kind, Tensor X, Tensor W, Tensor B, Tensor Y,
    Tensor NormW = default, Tensor NormB = default, int Heads = 0);

/// <summary>How the next token is chosen: the likeliest for temperature 0, or a random one of the topK likeliest (0 for
/// all) and, of these, of the likeliest with probability topP together (Holtzman et al., 2020); tokens as likely as the
/// last of them count as well. What is drawn depends on the seed, the number of the sample (of the first sequence here)
/// and how many tokens of it were drawn before, on nothing else.</summary>
public readonly record struct Choice(
    float Temperature, int TopK, float TopP, uint Seed, int Sample = 0, int Drawn = 0) {
    /// <summary>True if some tokens are out of the question.</summary>
    public bool Selects(int vocabulary) => Temperature > 0 && (TopP < 1 || TopK > 0 && TopK < vocabulary);
}

/// <summary>Calls, seconds, floating-point operations and bytes read and written, by operation.</summary>
public sealed class Profile {
    public Dictionary<string, (int Calls, double Seconds, double Flops, double Bytes)> Operations { get; } = [];

    public void Add(string operation, double seconds, double flops, double bytes) {
        var sum = Operations.GetValueOrDefault(operation);
        Operations[operation] = (sum.Calls + 1, sum.Seconds + seconds, sum.Flops + flops, sum.Bytes + bytes);
    }
}

/// <summary>A device: its memory, and the operations that GPT-2 is made of. Gradients of parameters (dw, db, dbias,
/// dwte, dwpe) are added to; every other output is overwritten unless stated otherwise. Weights and activations are in
/// the device's precision; statistics, lse, losses and gradients of parameters are fp32. rows means B·T.</summary>
public interface IDevice : IDisposable {
    /// <summary>The longest sequence that every device takes.</summary>
    const int LongestT = 1 << 17;
    /// <summary>What the device is called.</summary>
    string Name { get; }
    /// <summary>Type of weights and activations.</summary>
    DataType Precision { get; }
    /// <summary>Bytes that can still be allocated.</summary>
    long FreeMemory { get; }
    /// <summary>Bytes that the device uses for itself.</summary>
    long Workspace { get; }
    /// <summary>Peak floating-point operations a second, from the data sheet or else measured; MFU is relative to
    /// it.</summary>
    double PeakFlops() => MeasureCeilings().Flops;
    /// <summary>Measures a large product, in floating-point operations a second, and a large copy, in bytes read and
    /// written a second.</summary>
    (double Flops, double Bytes) MeasureCeilings();
    /// <summary>When set, every operation is timed into it.</summary>
    Profile? Profile { get; set; }
    /// <summary>Waits until all operations so far are done.</summary>
    void Synchronize();
    /// <summary>Allocates zeroed memory, which is freed with the device.</summary>
    nint Allocate(long bytes);
    /// <summary>Copies values to the device, rounding them to the array's type.</summary>
    void Write(Tensor to, ReadOnlySpan<float> values);
    /// <summary>Copies an array to the host once all operations so far are done.</summary>
    void Read(Tensor from, Span<float> values);
    /// <summary>x = 0.</summary>
    void Clear(Tensor x);
    /// <summary>x (B, T, C) = wte[token] + wpe[t], with tokens (B, T), wte (Vp, C) and wpe (MaxT, C).</summary>
    void Embed(ReadOnlySpan<int> tokens, Tensor wte, Tensor wpe, Tensor x);
    /// <summary>dwte[token] += dx; dwpe[t] += dx; shapes as in <see cref="Embed"/>.</summary>
    void EmbedBackward(ReadOnlySpan<int> tokens, Tensor dx, Tensor dwte, Tensor dwpe);
    /// <summary>y (B, T, C) = (x − mean)·rstd·w + b, with w and b (C) and statistics (B, T, 2) = mean and
    /// rstd = 1/√(variance + 1e-5).</summary>
    void LayerNorm(Tensor x, Tensor w, Tensor b, Tensor y, Tensor statistics);
    /// <summary>dx (B, T, C) += the gradient of LayerNorm's x, from dy (B, T, C); then dbias (C) += Σ dx over rows, the
    /// gradient of the bias last added to x, unless dbias is default. dw and db (C).</summary>
    void LayerNormBackward(
        Tensor dy, Tensor x, Tensor w, Tensor statistics, Tensor dx, Tensor dw, Tensor db, Tensor dbias);
    /// <summary>y (B, T, OC) = x·wᵀ + b, with x (B, T, C), w (OC, C), and b (OC) or default.</summary>
    void Linear(Tensor x, Tensor w, Tensor b, Tensor y);
    /// <summary>y = residual + x·wᵀ + b, with residual and y (B, T, OC).</summary>
    void LinearResidual(Tensor x, Tensor w, Tensor b, Tensor residual, Tensor y);
    /// <summary>input = x·wᵀ + b; y = GELU(input); both (B, T, OC).</summary>
    void LinearGelu(Tensor x, Tensor w, Tensor b, Tensor input, Tensor y);
    /// <summary>dx (B, T, C) = dy·w; dw (OC, C) += dyᵀ·x, with dy (B, T, OC). The operation that produces dy adds the
    /// bias's gradient, Σ dy over rows.</summary>
    void LinearBackward(Tensor dy, Tensor x, Tensor w, Tensor dx, Tensor dw);
    /// <summary>LinearBackward for x = GELU(input): dx (B, T, C) is the gradient of input; dbias (C) += Σ dx over
    /// rows.</summary>
    void LinearGeluBackward(Tensor dy, Tensor x, Tensor input, Tensor w, Tensor dx, Tensor dw, Tensor dbias);
    /// <summary>y = x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))), with x and y of any one shape.</summary>
    void Gelu(Tensor x, Tensor y);
    /// <summary>y (B, T, NH·HS) = causal attention. qkv (B, T, 3·NH·HS) packs queries, keys and values; lse
    /// (B, NH, T) = the log-sum-exp of each query's scaled scores.</summary>
    void Attention(Tensor qkv, int heads, Tensor y, Tensor lse);
    /// <summary>dqkv (B, T, 3·NH·HS) from dy (B, T, NH·HS), with the other arrays as Attention left them;
    /// dbias (3·NH·HS) += Σ dqkv over rows.</summary>
    void AttentionBackward(Tensor dy, Tensor qkv, Tensor y, Tensor lse, int heads, Tensor dqkv, Tensor dbias);
    /// <summary>losses (rows) = cross-entropy of logits (rows, Vp) and targets (rows), over the first
    /// <paramref name="vocabulary"/> columns. The logits become their gradient, (softmax − one-hot)·gradientScale, 0 in
    /// the padding; if gradientScale is 0, their contents are undefined.</summary>
    void Classify(Tensor logits, ReadOnlySpan<int> targets, int vocabulary, Tensor losses, float gradientScale);
    /// <summary>Linear, Classify and, unless gradientScale is 0, LinearBackward in one: losses (rows), dx (rows, C) and
    /// dw (Vp, C) from x (rows, C) and w (Vp, C). The contents of logits (rows, Vp) are undefined afterwards, and with
    /// gradients a loss above 115 may come out as about 117.</summary>
    void LinearClassify(Tensor x, Tensor w, ReadOnlySpan<int> targets, int vocabulary, Tensor logits, Tensor losses,
        float gradientScale, Tensor dx, Tensor dw);
    /// <summary>Σ x².</summary>
    double SumOfSquares(Tensor x);
    /// <summary>Updates weights and moments, and clears the gradients.</summary>
    void AdamW(ReadOnlySpan<AdamWPart> parts, in AdamWStep step);
    /// <summary>Updates weights and momentum, and clears the gradients, for each matrix w with gradient g (scaled) and
    /// momentum m: m = lerp(m, g, 1 − Momentum); u = lerp(g, m, Momentum); x = u / max(‖u‖, 1e-7); five times
    /// x = a·x + (b·A + c·A²)·x with A = x·xᵀ (x·(b·A + c·A²) with A = xᵀ·x if there are more rows than columns) and
    /// (a, b, c) = (3.4445, −4.7750, 2.0315); w = w·(1 − lr·decay) − lr·0.2·√max(rows, columns)·x. x and the products
    /// have the device's precision, with fp32 sums.</summary>
    void Muon(ReadOnlySpan<MuonPart> parts, in MuonStep step);
    /// <summary>Sequences that <see cref="Decode"/> takes at most.</summary>
    const int MostSequences = 64;
    /// <summary>How many tokens of a sequence <see cref="Decode"/> had best make at a time.</summary>
    int DecodeSteps => 1;
    /// <summary>Runs a program as often as <paramref name="next"/> (times, B) has rows, for B sequences whose last
    /// tokens are at a position. Keys and values before position <paramref name="shared"/> are those of the first.
    /// </summary>
    /// <exception cref="Gpt2Exception">Logits are not finite.</exception>
    void Decode(ReadOnlySpan<Operation> program, in Choice choice, int position, int shared, ReadOnlySpan<int> tokens,
        Span<int> next);
}
