namespace Gpt2;

/// <summary>Which device computes.</summary>
public enum DeviceKind { Auto, Cuda, Cpu }

/// <summary>What an element is: IEEE single precision, or its upper half.</summary>
public enum DataType { Fp32, Bf16 }

/// <summary>A row-major array of three dimensions in a device's memory; the default stands for none.</summary>
/// <param name="Address">Of its first element, in the device's own address space.</param>
public readonly record struct Tensor(
    nint Address, int Depth, int Rows, int Columns, DataType Type = DataType.Fp32) {
    /// <summary>Bytes of an element.</summary>
    public static int SizeOf(DataType type) => type == DataType.Bf16 ? 2 : 4;
    public int ElementSize => SizeOf(Type);

    /// <summary>Number of elements, and their size in memory.</summary>
    public long Count => (long)Depth * Rows * Columns;
    public long Bytes => Count * ElementSize;

    /// <summary>Rows of all depths together.</summary>
    public int AllRows => Depth * Rows;

    /// <summary>The (Rows, Columns) part at index <paramref name="i"/> of the first dimension.</summary>
    public Tensor this[int i] => Part((long)i * Rows * Columns, Rows, Columns);

    /// <summary>Rows [first, first + count) of all depths together.</summary>
    public Tensor Slice(int first, int count) => Part((long)first * Columns, count, Columns);

    /// <summary>One rank's part of all elements, as <see cref="Cut.Of"/> cuts them.</summary>
    public Tensor PartOf(int rank, int ranks) {
        var (first, count) = Cut.Of(Count, rank, ranks);
        return Flat(first, (int)count);
    }

    /// <summary>The flat part of <paramref name="count"/> elements from <paramref name="first"/> on.</summary>
    public Tensor Flat(long first, int count) => Part(first, 1, count);

    Tensor Part(long first, int rows, int columns) =>
        this with { Address = Address + (nint)(first * ElementSize), Depth = 1, Rows = rows, Columns = columns };

    /// <summary>Elements that pass through the host at a time.</summary>
    public const int ChunkSize = 1 << 20;

    /// <summary>Everything in flat parts of that size.</summary>
    public IEnumerable<Tensor> Chunks() {
        for (long first = 0; first < Count; first += ChunkSize)
            yield return Flat(first, (int)Math.Min(ChunkSize, Count - first));
    }
}

/// <summary>One update of AdamW (Loshchilov and Hutter, 2019), whose gradient is first multiplied by a scale.</summary>
/// <param name="Seed">Of the stochastic rounding of master weights to bf16.</param>
public readonly record struct AdamWStep(int Number, float LearningRate, float WeightDecay, float GradientScale,
    float Beta1, float Beta2, float Epsilon, uint Seed);

/// <summary>What AdamW updates together: flat arrays of one length, from the parameter with index First on; W is a
/// rounded copy of Master, or Master itself.</summary>
public readonly record struct AdamWPart(
    long First, bool Decays, Tensor W, Tensor Master, Tensor Dw, Tensor M, Tensor V);

/// <summary>Calls, seconds, floating-point operations and bytes read and written, by operation.</summary>
public sealed class Profile {
    public Dictionary<string, (int Calls, double Seconds, double Flops, double Bytes)> Operations { get; } = [];

    public void Add(string operation, double seconds, double flops, double bytes) {
        var sum = Operations.GetValueOrDefault(operation);
        Operations[operation] = (sum.Calls + 1, sum.Seconds + seconds, sum.Flops + flops, sum.Bytes + bytes);
    }
}

/// <summary>What the model asks of a device: memory, and the dozen operations that GPT-2 is made of. Gradients of
/// parameters (dw, db) are added to; all other outputs are overwritten, unless said otherwise.</summary>
public interface IDevice : IDisposable {
    /// <summary>The device in words.</summary>
    string Name { get; }
    /// <summary>The type of weights and activations; statistics, losses and gradients of weights are fp32.</summary>
    DataType Precision { get; }
    /// <summary>Memory that can still be allocated.</summary>
    long FreeMemory { get; }
    /// <summary>Memory that the device has taken for itself.</summary>
    long Workspace { get; }
    /// <summary>Floating-point operations a second at best, of which MFU is a share: a GPU's data sheet's.</summary>
    double PeakFlops();
    /// <summary>Floating-point operations a second of a large product, and bytes read and written a second of a large
    /// copy, as measured now.</summary>
    (double Flops, double Bytes) MeasureCeilings();
    /// <summary>Takes the time of every operation while it is there.</summary>
    Profile? Profile { get; set; }
    /// <summary>Waits for all work before.</summary>
    void Synchronize();
    /// <summary>Zeroed memory, released with the device.</summary>
    nint Allocate(long bytes);
    /// <summary>Copies host values to the device.</summary>
    void Write(Tensor to, ReadOnlySpan<float> values);
    /// <summary>Copies device values to the host, after all work before it.</summary>
    void Read(Tensor from, Span<float> values);
    void Clear(Tensor x);
    /// <summary>x (B, T, C) = wte[token] + wpe[start + t].</summary>
    void Embed(ReadOnlySpan<int> tokens, Tensor wte, Tensor wpe, int start, Tensor x);
    /// <summary>dwte[token] += dx; dwpe[t] += dx.</summary>
    void EmbedBackward(ReadOnlySpan<int> tokens, Tensor dx, Tensor dwte, Tensor dwpe);
    /// <summary>y (B, T, C) = (x − mean)·rstd·w + b; statistics (B, T, 2) = mean, rstd. Epsilon is 1e-5.</summary>
    void LayerNorm(Tensor x, Tensor w, Tensor b, Tensor y, Tensor statistics);
    /// <summary>dx += the layer norm's gradient, where x is its input; then dbias += Σ dx over rows, unless dbias is
    /// none: the gradient of the bias of what was added to x last.</summary>
    void LayerNormBackward(
        Tensor dy, Tensor x, Tensor w, Tensor statistics, Tensor dx, Tensor dw, Tensor db, Tensor dbias);
    /// <summary>y (B, T, OC) = x (B, T, C)·wᵀ + b with w (OC, C); b may be none.</summary>
    void Linear(Tensor x, Tensor w, Tensor b, Tensor y);
    /// <summary>y = residual + x·wᵀ + b.</summary>
    void LinearResidual(Tensor x, Tensor w, Tensor b, Tensor residual, Tensor y);
    /// <summary>input = x·wᵀ + b; y = GELU(input).</summary>
    void LinearGelu(Tensor x, Tensor w, Tensor b, Tensor input, Tensor y);
    /// <summary>dx = dy·w; dw += dyᵀ·x. The bias's gradient, Σ dy over rows, is added to where dy is made.</summary>
    void LinearBackward(Tensor dy, Tensor x, Tensor w, Tensor dx, Tensor dw);
    /// <summary>The same for x = GELU(input), where dx is the gradient of input and dbias += Σ dx over rows.</summary>
    void LinearGeluBackward(Tensor dy, Tensor x, Tensor input, Tensor w, Tensor dx, Tensor dw, Tensor dbias);
    /// <summary>y = x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))).</summary>
    void Gelu(Tensor x, Tensor y);
    /// <summary>Causal attention of the rows from start on. qkv (B, T, 3·NH·HS) packs queries, keys and values;
    /// y (B, T − start, NH·HS); lse (B, NH, T − start) is the log-sum-exp of each query's scaled scores.</summary>
    void Attention(Tensor qkv, int start, int heads, Tensor y, Tensor lse);
    /// <summary>dqkv from dy, for start 0; dbias += Σ dqkv over rows.</summary>
    void AttentionBackward(Tensor dy, Tensor qkv, Tensor y, Tensor lse, int heads, Tensor dqkv, Tensor dbias);
    /// <summary>losses (B, T) = cross-entropy of each row of logits (B, T, Vp) against its target; the logits become
    /// (softmax − one-hot)·gradientScale, but may stay if the scale is 0. Columns from the vocabulary on take no part
    /// and become zero.</summary>
    void Classify(Tensor logits, ReadOnlySpan<int> targets, int vocabulary, Tensor losses, float gradientScale);
    /// <summary>The losses of logits = x·wᵀ, for which there is room but which need not be there afterwards, and unless
    /// the scale is 0 the whole's backward pass: dx, and dw +=. Then a loss above 115 may count as that.</summary>
    void LinearClassify(Tensor x, Tensor w, ReadOnlySpan<int> targets, int vocabulary, Tensor logits, Tensor losses,
        float gradientScale, Tensor dx, Tensor dw) =>
        LinearClassify(this, x, w, targets, vocabulary, logits, losses, gradientScale, dx, dw);
    /// <summary>That, by the other operations.</summary>
    protected static void LinearClassify(IDevice device, Tensor x, Tensor w, ReadOnlySpan<int> targets, int vocabulary,
        Tensor logits, Tensor losses, float gradientScale, Tensor dx, Tensor dw) {
        device.Linear(x, w, default, logits);
        device.Classify(logits, targets, vocabulary, losses, gradientScale);
        if (gradientScale != 0)
            device.LinearBackward(logits, x, w, dx, dw);
    }
    /// <summary>Σ x².</summary>
    double SumOfSquares(Tensor x);
    /// <summary>Updates weights and moments, and leaves the gradients zero for the next step.</summary>
    void AdamW(ReadOnlySpan<AdamWPart> parts, in AdamWStep step);
}
