using System.Runtime.InteropServices;

namespace Gpt2;

/// <summary>A row-major fp32 array of three dimensions in a device's memory; the default stands for none.</summary>
/// <param name="Address">Of its first element, in the device's own address space.</param>
public readonly record struct Tensor(nint Address, int Depth, int Rows, int Columns) {
    /// <summary>Number of elements.</summary>
    public long Count => (long)Depth * Rows * Columns;

    /// <summary>Rows of all depths together.</summary>
    public int AllRows => Depth * Rows;

    /// <summary>Size in memory.</summary>
    public long Bytes => Count * sizeof(float);

    /// <summary>The (Rows, Columns) part at index <paramref name="i"/> of the first dimension.</summary>
    public Tensor this[int i] => new(Address + (nint)((long)i * Rows * Columns * sizeof(float)), 1, Rows, Columns);

    /// <summary>Rows [first, first + count) of an array of depth 1.</summary>
    public Tensor Slice(int first, int count) =>
        new(Address + (nint)((long)first * Columns * sizeof(float)), 1, count, Columns);

    /// <summary>The flat part of <paramref name="count"/> elements from <paramref name="first"/> on.</summary>
    public Tensor Flat(long first, int count) => new(Address + (nint)(first * sizeof(float)), 1, 1, count);

    /// <summary>Everything in flat parts of a size that can pass through the host.</summary>
    public IEnumerable<Tensor> Chunks() {
        const int size = 1 << 20;
        for (long first = 0; first < Count; first += size)
            yield return Flat(first, (int)Math.Min(size, Count - first));
    }
}

/// <summary>One update of AdamW (Loshchilov and Hutter, 2019), whose gradient is first multiplied by a scale.</summary>
public readonly record struct AdamWStep(
    int Number, float LearningRate, float WeightDecay, float GradientScale, float Beta1, float Beta2, float Epsilon);

/// <summary>Calls, seconds and floating-point operations by operation.</summary>
public sealed class Profile {
    public Dictionary<string, (int Calls, double Seconds, double Flops)> Operations { get; } = [];

    public void Add(string operation, double seconds, double flops) {
        var sum = Operations.GetValueOrDefault(operation);
        Operations[operation] = (sum.Calls + 1, sum.Seconds + seconds, sum.Flops + flops);
    }
}

/// <summary>What the model asks of a device: memory, and the dozen operations that GPT-2 is made of. Gradients of
/// parameters (dw, db) are added to; all other outputs are overwritten, unless said otherwise.</summary>
public interface IDevice : IDisposable {
    /// <summary>The device in words.</summary>
    string Name { get; }
    /// <summary>Floating-point operations a second at best, for the share that training reaches.</summary>
    double PeakFlops();
    /// <summary>Takes the time of every operation while it is there.</summary>
    Profile? Profile { get; set; }
    /// <summary>Zeroed memory, released with the device.</summary>
    nint Allocate(long bytes);
    /// <summary>Copies host values to the device.</summary>
    void Write(Tensor to, ReadOnlySpan<float> values);
    /// <summary>Copies device values to the host, after all work before it.</summary>
    void Read(Tensor from, Span<float> values);
    /// <summary>Fills with zeros.</summary>
    void Clear(Tensor x);
    /// <summary>x (B, T, C) = wte[token] + wpe[start + t].</summary>
    void Embed(ReadOnlySpan<int> tokens, Tensor wte, Tensor wpe, int start, Tensor x);
    /// <summary>dwte[token] += dx; dwpe[t] += dx.</summary>
    void EmbedBackward(ReadOnlySpan<int> tokens, Tensor dx, Tensor dwte, Tensor dwpe);
    /// <summary>y (B, T, C) = (x − mean)·rstd·w + b; statistics (B, T, 2) = mean, rstd. Epsilon is 1e-5.</summary>
    void LayerNorm(Tensor x, Tensor w, Tensor b, Tensor y, Tensor statistics);
    /// <summary>sum = residual + x; y = layer norm of sum.</summary>
    void ResidualLayerNorm(Tensor residual, Tensor x, Tensor w, Tensor b, Tensor sum, Tensor y, Tensor statistics);
    /// <summary>dx += the layer norm's gradient, where x is its input.</summary>
    void LayerNormBackward(Tensor dy, Tensor x, Tensor w, Tensor statistics, Tensor dx, Tensor dw, Tensor db);
    /// <summary>y (B, T, OC) = x (B, T, C)·wᵀ + b with w (OC, C); b may be none.</summary>
    void Linear(Tensor x, Tensor w, Tensor b, Tensor y);
    /// <summary>input = x·wᵀ + b; y = GELU(input).</summary>
    void LinearGelu(Tensor x, Tensor w, Tensor b, Tensor input, Tensor y);
    /// <summary>dx = dy·w; dw += dyᵀ·x; db += Σ dy over rows, unless db is none.</summary>
    void LinearBackward(Tensor dy, Tensor x, Tensor w, Tensor dx, Tensor dw, Tensor db);
    /// <summary>The same for x = GELU(input), where dx is the gradient of input.</summary>
    void LinearGeluBackward(Tensor dy, Tensor x, Tensor input, Tensor w, Tensor dx, Tensor dw, Tensor db);
    /// <summary>y = x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))).</summary>
    void Gelu(Tensor x, Tensor y);
    /// <summary>Causal attention of the rows from start on. qkv (B, T, 3·NH·HS) packs queries, keys and values;
    /// y (B, T − start, NH·HS); lse (B, NH, T − start) is the log-sum-exp of each query's scaled scores.</summary>
    void Attention(Tensor qkv, int start, int heads, Tensor y, Tensor lse);
    /// <summary>dqkv from dy, for start 0.</summary>
    void AttentionBackward(Tensor dy, Tensor qkv, Tensor y, Tensor lse, int heads, Tensor dqkv);
    /// <summary>losses (B, T) = cross-entropy of each row of logits (B, T, Vp) against its target; the logits become
    /// (softmax − one-hot)·gradientScale. Columns from the vocabulary on take no part and become zero.</summary>
    void Classify(Tensor logits, ReadOnlySpan<int> targets, int vocabulary, Tensor losses, float gradientScale);
    /// <summary>Σ x².</summary>
    double SumOfSquares(Tensor x);
    /// <summary>Updates w and the moments m and v, and leaves dw zero for the next step.</summary>
    void AdamW(Tensor w, Tensor dw, Tensor m, Tensor v, in AdamWStep step);
}

/// <summary>One of the 16 parameter tensors: its name in llm.c, its layers (1 where it is not per layer), and the shape
/// of each layer's part; vectors have one row.</summary>
public readonly record struct ParameterShape(string Name, int Layers, int Rows, int Columns) {
    /// <summary>Matrices are drawn at random and decayed; vectors are neither.</summary>
    public bool IsMatrix => Rows > 1;

    /// <summary>Number of elements, all layers together.</summary>
    public long Count => (long)Layers * Rows * Columns;
}

/// <summary>The sizes of a GPT-2 model.</summary>
/// <param name="MaxT">Longest sequence.</param>
/// <param name="V">Vocabulary.</param>
/// <param name="Vp">Vocabulary as padded in memory.</param>
/// <param name="L">Layers.</param>
/// <param name="NH">Heads.</param>
/// <param name="C">Channels.</param>
public sealed record Config(int MaxT, int V, int Vp, int L, int NH, int C) {
    const int ModelMagic = 20240326;

    /// <summary>The longest sequence that any device must manage.</summary>
    public const int LongestT = 1 << 17;

    /// <summary>The parameter tensors in the order of checkpoints.</summary>
    public ParameterShape[] Parameters => [
        new("wte", 1, Vp, C), new("wpe", 1, MaxT, C),
        new("ln1w", L, 1, C), new("ln1b", L, 1, C), new("qkvw", L, 3 * C, C), new("qkvb", L, 1, 3 * C),
        new("attprojw", L, C, C), new("attprojb", L, 1, C), new("ln2w", L, 1, C), new("ln2b", L, 1, C),
        new("fcw", L, 4 * C, C), new("fcb", L, 1, 4 * C), new("fcprojw", L, C, 4 * C), new("fcprojb", L, 1, C),
        new("lnfw", 1, 1, C), new("lnfb", 1, 1, C),
    ];

    /// <summary>Number of parameters, the padding of wte included.</summary>
    public long ParameterCount => Parameters.Sum(shape => shape.Count);

    /// <summary>The sizes in words.</summary>
    public string Summary => $"{L} layers, {NH} heads, {C} channels, vocabulary {V}, sequences up to {MaxT}";

    /// <summary>Floating-point operations of a training step per token: 6·N + 6·L·C·T, as llm.c counts them.</summary>
    public double FlopsPerToken(int T) => 6.0 * ParameterCount + 6.0 * L * C * T;

    /// <summary>The model that a descriptor names: d6, d12 (124M), d24 (350M), d36 (774M) or d48 (1.6B).</summary>
    public static Config? Of(string descriptor) => descriptor switch {
        "d6" => new(1024, 50257, 50304, 6, 6, 384),
        "d12" => new(1024, 50257, 50304, 12, 12, 768),
        "d24" => new(1024, 50257, 50304, 24, 16, 1024),
        "d36" => new(1024, 50257, 50304, 36, 20, 1280),
        "d48" => new(1024, 50257, 50304, 48, 25, 1600),
        _ => null,
    };

    /// <summary>Opens a model checkpoint at its first parameter and reads its sizes.</summary>
    /// <exception cref="Gpt2Exception">A header field is wrong, or the file's size is not what it implies.</exception>
    public static (BinaryFile File, Config Config) Open(string path) {
        var file = new BinaryFile(path, "a GPT-2 model", ModelMagic, 3, 5);
        var header = file.Header;
        var config = new Config(header[2], header[3], header[7], header[4], header[5], header[6]);
        file.Check("maximum sequence length", 2, config.MaxT is > 0 and <= LongestT, $"1 to {LongestT}");
        file.Check("vocabulary", 3, config.V is > 1 and <= 65536, "2 to 65536");
        file.Check("number of layers", 4, config.L is > 0 and <= 1000, "1 to 1000");
        file.Check("number of heads", 5, config.NH is > 0 and <= 1000, "1 to 1000");
        file.Check("number of channels", 6, config.C is > 0 and <= 1 << 16 && config.C % config.NH == 0,
            $"a multiple of the {config.NH} heads, at most 65536");
        file.Check("padded vocabulary", 7, config.Vp >= config.V && config.Vp <= 1 << 17, $"{config.V} to 131072");
        file.CheckSize(BinaryFile.HeaderBytes + config.ParameterCount * (header[1] == 3 ? 4 : 2));
        return (file, config);
    }

    /// <summary>The header of a checkpoint of this model in fp32.</summary>
    public int[] Header() {
        var header = new int[BinaryFile.HeaderLength];
        int[] fields = [ModelMagic, 3, MaxT, V, L, NH, C, Vp];
        fields.CopyTo(header, 0);
        return header;
    }
}

/// <summary>All 16 parameter tensors, or their gradients or moments, in one piece of memory.</summary>
public sealed class Parameters {
    readonly Tensor[] tensors;

    public Parameters(Config config, nint address) {
        All = new Tensor(address, 1, checked((int)(config.ParameterCount / config.C)), config.C);
        tensors = [.. config.Parameters.Select(shape => {
            var tensor = new Tensor(address, shape.Layers, shape.Rows, shape.Columns);
            address += (nint)tensor.Bytes;
            return tensor;
        })];
    }

    /// <summary>The tensors in the order of checkpoints, each (layers, rows, columns).</summary>
    public ReadOnlySpan<Tensor> Tensors => tensors;

    /// <summary>Everything as one array of rows of C.</summary>
    public Tensor All { get; }

    public Tensor Wte => tensors[0];
    public Tensor Wpe => tensors[1];
    public Tensor Lnfw => tensors[14];
    public Tensor Lnfb => tensors[15];

    /// <summary>One layer's tensors by name.</summary>
    public LayerParameters this[int l] => new(tensors[2][l], tensors[3][l], tensors[4][l], tensors[5][l], tensors[6][l],
        tensors[7][l], tensors[8][l], tensors[9][l], tensors[10][l], tensors[11][l], tensors[12][l], tensors[13][l]);
}

/// <summary>One layer's parameters, or their gradients.</summary>
public readonly record struct LayerParameters(Tensor Ln1w, Tensor Ln1b, Tensor Qkvw, Tensor Qkvb, Tensor Attprojw,
    Tensor Attprojb, Tensor Ln2w, Tensor Ln2b, Tensor Fcw, Tensor Fcb, Tensor Fcprojw, Tensor Fcprojb);

/// <summary>What activations are kept for: all layers' for the backward pass, one layer's for a loss alone, or one
/// layer's with every layer's keys and values for the rows already generated.</summary>
public enum Purpose { Train, Evaluate, Generate }

/// <summary>The activations of a forward pass over (B, T) tokens and the buffers of its backward pass, laid out from an
/// address on; laid out from 0, it tells how much memory that takes.</summary>
public sealed class Activations {
    public readonly Tensor Encoded, Branch, Final, FinalStatistics, Logits, Losses, DResidual, DBranch, DQkv, DFch;
    public readonly Layer[] Layers;

    /// <summary>Size in memory.</summary>
    public readonly long Bytes;

    /// <param name="context">Rows of queries, keys and values: T unless earlier rows are to be attended to.</param>
    /// <param name="recompute">1: GELU's output is computed anew in the backward pass; 2: layer norms' too.</param>
    public Activations(Config config, int B, int T, int context, Purpose purpose, int recompute, nint address) {
        var (C, L, start) = (config.C, config.L, address);
        Tensor New(int columns, int rows = 0) {
            const int alignment = 256;
            var tensor = new Tensor(address, B, rows > 0 ? rows : T, columns);
            address += (nint)((tensor.Bytes + alignment - 1) / alignment * alignment);
            return tensor;
        }
        // Queries, keys and values come first: generation lays out one row over the memory of a longer prompt.
        var qkv = Enumerable.Range(0, L).Select(_ => New(3 * C, context)).ToArray();
        (Encoded, Branch, Final, FinalStatistics, Losses) = (New(C), New(C), New(C), New(2), New(1));
        Logits = New(config.Vp, purpose == Purpose.Generate ? 1 : T);
        Layers = new Layer[L];
        for (var l = 0; l < L; l++) {
            // What is not kept for the backward pass lies where the first layer has it.
            bool Kept(int level) => l == 0 || recompute < level;
            Layers[l] = l > 0 && purpose != Purpose.Train ? Layers[0] with { Qkv = qkv[l] } : new Layer(
                Kept(2) ? New(C) : Layers[0].Ln1, New(2), qkv[l], New(C), New(T, config.NH), New(C),
                Kept(2) ? New(C) : Layers[0].Ln2, New(2), New(4 * C), Kept(1) ? New(4 * C) : Layers[0].FchGelu, New(C));
        }
        if (purpose == Purpose.Train)
            (DResidual, DBranch, DQkv, DFch) = (New(C), New(C), New(3 * C), New(4 * C));
        Bytes = address - start;
    }

    /// <summary>One layer's activations in the order of their computation; Residual2 and Residual3 are the residual
    /// stream after attention and after the MLP, Fch the input of GELU.</summary>
    public sealed record Layer(Tensor Ln1, Tensor Ln1Statistics, Tensor Qkv, Tensor Atty, Tensor Lse, Tensor Residual2,
        Tensor Ln2, Tensor Ln2Statistics, Tensor Fch, Tensor FchGelu, Tensor Residual3);
}

/// <summary>GPT-2 (Radford et al., 2019) on a device: its parameters, forward and backward pass.</summary>
public sealed class Model {
    readonly Activations activations;
    readonly int recompute;

    /// <summary>Allocates a model for batches of (B, T) tokens, whose weights are all zero.</summary>
    public Model(Config config, IDevice device, int B, int T, Purpose purpose, int recompute = 0) {
        (Config, Device, this.B, this.T, this.recompute) = (config, device, B, T, recompute);
        Weights = AllocateParameters("parameters");
        Gradients = purpose == Purpose.Train ? AllocateParameters("gradients") : null;
        activations = Place(B, T, T, purpose, "activations");
        (Tokens, Targets, Losses) = (new int[B * T], new int[B * T], new float[B * T]);
    }

    public Config Config { get; }
    public IDevice Device { get; }
    public int B { get; }
    public int T { get; }
    public Parameters Weights { get; }

    /// <summary>Sums of the gradients of every backward pass since the last update; only in training.</summary>
    public Parameters? Gradients { get; }

    /// <summary>The batch: tokens and the one after each, (B, T).</summary>
    public int[] Tokens { get; }
    public int[] Targets { get; }

    /// <summary>Each position's cross-entropy, (B, T), of the last <see cref="Loss"/>.</summary>
    public float[] Losses { get; }

    /// <summary>The logits (B, T, Vp) of the last forward pass, until the loss replaces them by a gradient.</summary>
    public Tensor Logits => activations.Logits;

    /// <summary>What takes how many bytes.</summary>
    public List<(string Name, long Bytes)> Memory { get; } = [];

    /// <summary>Memory of the device for something of the parameters' shapes.</summary>
    public Parameters AllocateParameters(string name) =>
        new(Config, Allocate(name, Config.ParameterCount * sizeof(float)));

    nint Allocate(string name, long bytes) {
        Memory.Add((name, bytes));
        try {
            return Device.Allocate(bytes);
        } catch (OutOfMemoryException) {
            throw new Gpt2Exception($"memory: expected {bytes / 1e9:F1} GB for {name}, found less; a smaller --batch " +
                "takes less");
        }
    }

    Activations Place(int B, int T, int context, Purpose purpose, string name) {
        Activations Layout(nint address) => new(Config, B, T, context, purpose, recompute, address);
        return Layout(Allocate(name, Layout(0).Bytes));
    }

    /// <summary>Computes the logits of the batch.</summary>
    public void Forward() {
        ForwardBlocks(Tokens, activations, 0);
        Device.Linear(activations.Final, Weights.Wte, default, activations.Logits);
    }

    void ForwardBlocks(ReadOnlySpan<int> tokens, Activations a, int start) {
        Device.Embed(tokens, Weights.Wte, Weights.Wpe, start, a.Encoded);
        Device.LayerNorm(a.Encoded, Weights[0].Ln1w, Weights[0].Ln1b, a.Layers[0].Ln1, a.Layers[0].Ln1Statistics);
        var residual = a.Encoded;
        for (var l = 0; l < Config.L; l++) {
            var (w, x) = (Weights[l], a.Layers[l]);
            var (rows, context) = a.Encoded.Depth > 1 ? (x.Qkv, x.Qkv)
                : (x.Qkv.Slice(start, a.Encoded.Rows), x.Qkv.Slice(0, start + a.Encoded.Rows));
            Device.Linear(x.Ln1, w.Qkvw, w.Qkvb, rows);
            Device.Attention(context, start, Config.NH, x.Atty, x.Lse);
            Device.Linear(x.Atty, w.Attprojw, w.Attprojb, a.Branch);
            Device.ResidualLayerNorm(residual, a.Branch, w.Ln2w, w.Ln2b, x.Residual2, x.Ln2, x.Ln2Statistics);
            Device.LinearGelu(x.Ln2, w.Fcw, w.Fcb, x.Fch, x.FchGelu);
            Device.Linear(x.FchGelu, w.Fcprojw, w.Fcprojb, a.Branch);
            var (lnw, lnb, ln, statistics) = l + 1 < Config.L
                ? (Weights[l + 1].Ln1w, Weights[l + 1].Ln1b, a.Layers[l + 1].Ln1, a.Layers[l + 1].Ln1Statistics)
                : (Weights.Lnfw, Weights.Lnfb, a.Final, a.FinalStatistics);
            Device.ResidualLayerNorm(x.Residual2, a.Branch, lnw, lnb, x.Residual3, ln, statistics);
            residual = x.Residual3;
        }
    }

    /// <summary>The mean loss of the last forward pass.</summary>
    /// <param name="gradientScale">What one position's loss counts for in the gradients.</param>
    public double Loss(float gradientScale) {
        Device.Classify(activations.Logits, Targets, Config.V, activations.Losses, gradientScale);
        Device.Read(activations.Losses, Losses);
        var sum = 0.0;
        foreach (var loss in Losses)
            sum += loss;
        return sum / Losses.Length;
    }

    /// <summary>Adds the gradients of the last <see cref="Loss"/> to <see cref="Gradients"/>.</summary>
    public void Backward() {
        var (a, g) = (activations, Gradients!);
        var last = a.Layers[^1].Residual3;
        Device.LinearBackward(a.Logits, a.Final, Weights.Wte, a.DBranch, g.Wte, default);
        Device.Clear(a.DResidual);
        Device.LayerNormBackward(a.DBranch, last, Weights.Lnfw, a.FinalStatistics, a.DResidual, g.Lnfw, g.Lnfb);
        for (var l = Config.L - 1; l >= 0; l--) {
            var (w, dw, x) = (Weights[l], g[l], a.Layers[l]);
            var residual = l > 0 ? a.Layers[l - 1].Residual3 : a.Encoded;
            if (recompute >= 1)
                Device.Gelu(x.Fch, x.FchGelu);
            Device.LinearGeluBackward(a.DResidual, x.FchGelu, x.Fch, w.Fcprojw, a.DFch, dw.Fcprojw, dw.Fcprojb);
            if (recompute >= 2)
                Device.LayerNorm(x.Residual2, w.Ln2w, w.Ln2b, x.Ln2, x.Ln2Statistics);
            Device.LinearBackward(a.DFch, x.Ln2, w.Fcw, a.DBranch, dw.Fcw, dw.Fcb);
            Device.LayerNormBackward(a.DBranch, x.Residual2, w.Ln2w, x.Ln2Statistics, a.DResidual, dw.Ln2w, dw.Ln2b);
            Device.LinearBackward(a.DResidual, x.Atty, w.Attprojw, a.DBranch, dw.Attprojw, dw.Attprojb);
            Device.AttentionBackward(a.DBranch, x.Qkv, x.Atty, x.Lse, Config.NH, a.DQkv);
            if (recompute >= 2)
                Device.LayerNorm(residual, w.Ln1w, w.Ln1b, x.Ln1, x.Ln1Statistics);
            Device.LinearBackward(a.DQkv, x.Ln1, w.Qkvw, a.DBranch, dw.Qkvw, dw.Qkvb);
            Device.LayerNormBackward(a.DBranch, residual, w.Ln1w, x.Ln1Statistics, a.DResidual, dw.Ln1w, dw.Ln1b);
        }
        Device.EmbedBackward(Tokens, a.DResidual, g.Wte, g.Wpe);
    }

    // ---- Generation

    Activations? cache;

    /// <summary>Continues a prompt, one token at a time, until the context is full.</summary>
    public IEnumerable<int> Generate(int[] prompt, Sampler sampler) {
        cache ??= Place(1, Config.MaxT, Config.MaxT, Purpose.Generate, "keys and values");
        var logits = new float[Config.V];
        var tokens = prompt;
        for (var start = 0; start + tokens.Length <= Config.MaxT; ) {
            var memory = cache.Layers[0].Qkv.Address;
            var a = new Activations(Config, 1, tokens.Length, Config.MaxT, Purpose.Generate, 0, memory);
            ForwardBlocks(tokens, a, start);
            Device.Linear(a.Final.Slice(tokens.Length - 1, 1), Weights.Wte, default, a.Logits);
            Device.Read(a.Logits.Flat(0, Config.V), logits);
            start += tokens.Length;
            tokens = [sampler.Next(logits)];
            yield return tokens[0];
        }
    }

    // ---- Weights

    /// <summary>Draws the weights as llm.c and PyTorch do from the same seed: Normal(0, 0.02), the residual projections
    /// scaled by 1/√(2L); biases 0, layer-norm weights 1.</summary>
    void Initialize(uint seed) {
        var random = new Mt19937(seed);
        var shapes = Config.Parameters;
        for (var l = 0; l < Config.L; l++) {
            for (var i = 0; i < shapes.Length; i++) {
                var shape = shapes[i];
                if (l >= shape.Layers)
                    continue;
                // The padded rows of wte stay zero.
                var values = new float[(shape.Name == "wte" ? Config.V : shape.Rows) * shape.Columns];
                if (shape.IsMatrix)
                    random.Normal(values, shape.Name.EndsWith("projw") ? 0.02f / MathF.Sqrt(2 * Config.L) : 0.02f);
                else if (shape.Name is "ln1w" or "ln2w" or "lnfw")
                    Array.Fill(values, 1);
                Device.Write(Weights.Tensors[i][l].Flat(0, values.Length), values);
            }
        }
    }

    /// <summary>Reads the weights of an opened checkpoint of this model, fp32 or bf16, and closes it; without one,
    /// draws them from a seed.</summary>
    public void Load(BinaryFile? file, uint seed = 0) {
        using var closed = file;
        if (file == null)
            Initialize(seed);
        else
            Read(file, Weights, file.Header[1] == 5);
    }

    /// <summary>Reads all 16 tensors.</summary>
    public void Read(BinaryFile file, Parameters to, bool bfloat16 = false) {
        foreach (var part in to.All.Chunks()) {
            var values = new float[part.Count];
            if (bfloat16)
                file.ReadBFloat16(values);
            else
                file.Read(values.AsSpan());
            Device.Write(part, values);
        }
    }

    /// <summary>Writes the weights as an fp32 checkpoint.</summary>
    public void Save(Stream to) {
        to.Write(MemoryMarshal.AsBytes(Config.Header().AsSpan()));
        Write(to, Weights);
    }

    /// <summary>Writes all 16 tensors.</summary>
    public void Write(Stream to, Parameters from) {
        foreach (var part in from.All.Chunks()) {
            var values = new float[part.Count];
            Device.Read(part, values);
            to.Write(MemoryMarshal.AsBytes(values.AsSpan()));
        }
    }
}

/// <summary>Picks the next token from logits.</summary>
/// <param name="temperature">0 always picks the likeliest.</param>
/// <param name="topK">How many of the likeliest tokens to choose from; 0 for all.</param>
/// <param name="topP">Chooses from the likeliest tokens of this probability together (Holtzman et al., 2020).</param>
public sealed class Sampler(float temperature, int topK, float topP, uint seed) {
    readonly Mt19937 random = new(seed);

    /// <summary>A token's index; the logits are overwritten.</summary>
    public int Next(float[] logits) {
        var max = logits.Max();
        if (temperature == 0)
            return Array.IndexOf(logits, max);
        for (var i = 0; i < logits.Length; i++)
            logits[i] = MathF.Exp((logits[i] - max) / temperature);
        int[] order = [.. Enumerable.Range(0, logits.Length)];
        var count = topK > 0 ? Math.Min(topK, logits.Length) : logits.Length;
        if (count < logits.Length || topP < 1)
            Array.Sort(logits, order, Comparer<float>.Create((x, y) => y.CompareTo(x)));
        var (total, kept) = (logits.Take(count).Sum(x => (double)x) * topP, 0.0);
        for (var i = 0; i < count; i++) {
            kept += logits[i];
            if (kept >= total)
                count = i + 1;
        }
        var threshold = random.NextFloat() * kept;
        var choice = 0;
        for (; choice < count - 1 && threshold >= logits[choice]; choice++)
            threshold -= logits[choice];
        return order[choice];
    }
}

/// <summary>A model's logits, loss and gradients beside those that PyTorch computed.</summary>
public static class Verification {
    /// <summary>The largest ‖a − b‖/‖b‖ that counts as equal in fp32.</summary>
    public const double Tolerance = 1e-4;

    /// <summary>Compares with a debug state: for each tensor the largest difference, and ‖a − b‖/‖b‖.</summary>
    public static IEnumerable<(string Name, double Largest, double Relative)> Run(
        string init, string state, IDevice device) {
        var (file, config) = Config.Open(init);
        using var reference = new BinaryFile(state, "a PyTorch debug state", 20240327, 2);
        var (B, T) = (reference.Header[2], reference.Header[3]);
        reference.Check("batch size", 2, B is > 0 and <= 1 << 16, "1 to 65536");
        reference.Check("sequence length", 3, T > 0 && T <= config.MaxT, $"1 to {config.MaxT}, the model's longest");
        reference.CheckSize(BinaryFile.HeaderBytes + 4 * ((long)B * T * (config.V + 2) + 1 + config.ParameterCount));
        var model = new Model(config, device, B, T, Purpose.Train);
        reference.Read(model.Tokens.AsSpan());
        reference.Read(model.Targets.AsSpan());
        var wrong = model.Tokens.Concat(model.Targets).FirstOrDefault(token => token < 0 || token >= config.V);
        if (wrong != 0)
            throw reference.Fail($"tokens below the model's vocabulary of {config.V}", $"{wrong}");
        model.Load(file);
        model.Forward();
        var rows = Enumerable.Range(0, B * T).Select(row => (long)row * config.Vp);
        yield return Compare("logits", rows.Select(first => Values(model.Logits.Flat(first, config.V))));
        yield return Compare("loss", [[(float)model.Loss(1f / (B * T))]]);
        model.Backward();
        for (var i = 0; i < config.Parameters.Length; i++)
            yield return Compare(config.Parameters[i].Name, model.Gradients!.Tensors[i].Chunks().Select(Values));

        float[] Values(Tensor part) {
            var values = new float[part.Count];
            device.Read(part, values);
            return values;
        }

        (string, double, double) Compare(string name, IEnumerable<float[]> parts) {
            var (largest, squares, norm) = (0.0, 0.0, double.Epsilon);
            foreach (var found in parts) {
                var expected = new float[found.Length];
                reference.Read(expected.AsSpan());
                for (var i = 0; i < found.Length; i++) {
                    var difference = (double)found[i] - expected[i];
                    largest = Math.Max(largest, Math.Abs(difference));
                    squares += difference * difference;
                    norm += (double)expected[i] * expected[i];
                }
            }
            return (name, largest, Math.Sqrt(squares / norm));
        }
    }
}
