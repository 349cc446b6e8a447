namespace Gpt2;

/// <summary>What updates the weights: AdamW all of them, or Muon the layers' matrices and AdamW the others.</summary>
public enum OptimizerKind { AdamW, Muon }

/// <summary>A parameter tensor's name in llm.c, and shape: one layer outside of layers, one row for vectors.</summary>
public readonly record struct ParameterShape(string Name, int Layers, int Rows, int Columns) {
    /// <summary>Matrices are drawn at random and decayed; vectors are neither.</summary>
    public bool IsMatrix => Rows > 1;

    /// <summary>Number of elements, all layers together.</summary>
    public long Count => (long)Layers * Rows * Columns;
}

/// <summary>A rank's part of one layer of a parameter tensor, or whole layers of it: elements [First, First + Count) of
/// the tensor. Index is the position of the first one among all parameters. Muon updates it, or AdamW.</summary>
public readonly record struct Cut(int Tensor, int Layer, long First, long Count, long Index, bool IsMuons);

/// <summary>The sizes of a GPT-2 model: sequences of up to MaxT tokens, a vocabulary of V (Vp rows in memory, the last
/// ones padding), L layers, NH heads, C channels.</summary>
public sealed record Config(int MaxT, int V, int Vp, int L, int NH, int C) {
    public const int ModelMagic = 20240326;

    /// <summary>The parameter tensors in the order of checkpoints.</summary>
    public ParameterShape[] Parameters => [
        new("wte", 1, Vp, C), new("wpe", 1, MaxT, C),
        new("ln1w", L, 1, C), new("ln1b", L, 1, C), new("qkvw", L, 3 * C, C), new("qkvb", L, 1, 3 * C),
        new("attprojw", L, C, C), new("attprojb", L, 1, C), new("ln2w", L, 1, C), new("ln2b", L, 1, C),
        new("fcw", L, 4 * C, C), new("fcb", L, 1, 4 * C), new("fcprojw", L, C, 4 * C), new("fcprojb", L, 1, C),
        new("lnfw", 1, 1, C), new("lnfb", 1, 1, C),
    ];

    /// <summary>A rank's part of every layer's tensors, in checkpoints' order; one rank has whole tensors. Muon's
    /// tensors are cut into whole layers, as a matrix must be whole.</summary>
    public IEnumerable<Cut> Cuts(int rank, int ranks, OptimizerKind optimizer) {
        var index = 0L;
        foreach (var (i, shape) in Parameters.Index()) {
            var isMuons = optimizer == OptimizerKind.Muon && shape is { IsMatrix: true, Name: not ("wte" or "wpe") };
            var (layers, unit) = isMuons ? (1, (long)shape.Rows * shape.Columns) : (ranks == 1 ? 1 : shape.Layers, 1);
            var n = shape.Count / layers;
            var (first, count) = Tensor.PartOf(n / unit, rank, ranks);
            for (var l = 0; l < layers; l++, index += n)
                yield return new(i, l, l * n + first * unit, count * unit, index + first * unit, isMuons);
        }
    }

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
        file.Check("maximum sequence length", 2, config.MaxT is > 0 and <= IDevice.LongestT, "1 to 131072");
        file.Check("vocabulary", 3, config.V is > 1 and <= 65536, "2 to 65536");
        file.Check("number of layers", 4, config.L is > 0 and <= 1000, "1 to 1000");
        file.Check("number of heads", 5, config.NH is > 0 and <= 1000, "1 to 1000");
        file.Check("number of channels", 6, config.C is > 0 and <= 1 << 16 && config.C % config.NH == 0,
            $"a multiple of the {config.NH} heads, at most 65536");
        file.Check("padded vocabulary", 7, config.Vp >= config.V && config.Vp <= 1 << 17, $"{config.V} to 131072");
        file.CheckSize(BinaryFile.HeaderBytes + config.ParameterCount * (header[1] == 3 ? 4 : 2));
        return (file, config);
    }

    /// <summary>The header of a checkpoint of this model.</summary>
    public int[] Header(DataType type) =>
        [ModelMagic, type == DataType.Fp32 ? 3 : 5, MaxT, V, L, NH, C, Vp, .. new int[BinaryFile.HeaderLength - 8]];
}

/// <summary>All parameters, or a rank's part of them, in one array: weights, gradients or moments.</summary>
public sealed class Parameters {
    /// <summary>Lays out the tensors from an address on, or as parts of <paramref name="whole"/>.</summary>
    public Parameters(
        Config config, DataType type, nint address, Cut[] cuts, Parameters? whole = null) {
        // Whole tensors follow each other, in rows of C elements; a part begins at a multiple of 8, as kernels want it.
        var (shapes, groups) = (config.Parameters, 0);
        var isWhole = cuts.All(cut => cut.Count == shapes[cut.Tensor].Count);
        var group = isWhole ? config.C : 8;
        Cuts = cuts;
        Tensors = [.. Cuts.Select(cut => {
            if (whole != null)
                return whole.Tensors[cut.Tensor].Flat(cut.First, (int)cut.Count);
            var (shape, start) = (shapes[cut.Tensor], address + (nint)groups * group * Tensor.SizeOf(type));
            groups += (int)((cut.Count + group - 1) / group);
            return isWhole ? new Tensor(start, shape.Layers, shape.Rows, shape.Columns, type)
                : new Tensor(start, 1, 1, (int)cut.Count, type);
        })];
        All = whole?.All ?? new Tensor(address, 1, groups, group, type);
    }

    /// <summary>What part of the model's parameters each tensor holds.</summary>
    public Cut[] Cuts { get; }

    /// <summary>The tensors in the order of checkpoints: 16 whole ones, or a rank's flat parts.</summary>
    public Tensor[] Tensors { get; }

    /// <summary>The whole array.</summary>
    public Tensor All { get; }

    public Tensor Wte => Tensors[0];
    public Tensor Wpe => Tensors[1];
    public Tensor Lnfw => Tensors[14];
    public Tensor Lnfb => Tensors[15];

    /// <summary>One layer's tensors by name.</summary>
    public LayerParameters this[int l] => new(Tensors[2][l], Tensors[3][l], Tensors[4][l], Tensors[5][l], Tensors[6][l],
        Tensors[7][l], Tensors[8][l], Tensors[9][l], Tensors[10][l], Tensors[11][l], Tensors[12][l], Tensors[13][l]);
}

/// <summary>One layer's parameters, or their gradients.</summary>
public readonly record struct LayerParameters(
    Tensor Ln1w, Tensor Ln1b, Tensor Qkvw, Tensor Qkvb, // (C), (C), (3C, C), (3C)
    Tensor Attprojw, Tensor Attprojb, Tensor Ln2w, Tensor Ln2b, // (C, C), (C), (C), (C)
    Tensor Fcw, Tensor Fcb, Tensor Fcprojw, Tensor Fcprojb); // (4C, C), (4C), (C, 4C), (C)

/// <summary>Which activations are kept: all layers' for a backward pass, one layer's for a loss, or one layer's and all
/// keys and values for the tokens that follow.</summary>
public enum Purpose { Train, Evaluate, Generate }

/// <summary>The activations of a forward pass over (B, T) tokens, and the buffers of its backward pass, in one piece of
/// memory; laid out at address 0, they tell its size.</summary>
public sealed class Activations {
    public readonly Tensor Encoded, Final, DResidual, DBranch; // (B, T, C)
    public readonly Tensor DQkv, DFch; // (B, T, 3C), (B, T, 4C)
    public readonly Tensor FinalStatistics, Losses; // (B, T, 2), (B, T, 1), both in fp32
    public readonly Tensor Logits; // (rows, Vp)
    public readonly Layer[] Layers;
    public readonly long Bytes;

    /// <param name="recompute">What the backward pass computes again: 1 for GELU, 2 for layer norms too.</param>
    /// <param name="qkv">Each layer's queries, keys and values if they have a place already.</param>
    public Activations(Config config, DataType type, int B, int T, Purpose purpose, int recompute, nint address,
        Tensor[]? qkv = null) {
        var (C, L, NH, start) = (config.C, config.L, config.NH, address);
        Tensor New(int columns) => new Tensor(0, B, T, columns, type).Place(ref address);
        Tensor Fp32(int rows, int columns) => new Tensor(0, B, rows, columns).Place(ref address);
        qkv ??= [.. Enumerable.Range(0, L).Select(_ => New(3 * C))];
        (Encoded, Final, FinalStatistics, Losses) = (New(C), New(C), Fp32(T, 2), Fp32(T, 1));
        Layers = new Layer[L];
        for (var l = 0; l < L; l++) {
            // What is not kept for the backward pass lies where the first layer has it.
            bool Kept(int level) => l == 0 || recompute < level;
            var residual = l == 0 ? Encoded : Layers[l - 1].Residual3;
            Layers[l] = l > 0 && purpose != Purpose.Train ? Layers[0] with { Residual1 = residual, Qkv = qkv[l] }
                : new Layer(residual, Kept(2) ? New(C) : Layers[0].Ln1, Fp32(T, 2), qkv[l], New(C), Fp32(NH, T), New(C),
                    Kept(2) ? New(C) : Layers[0].Ln2, Fp32(T, 2), New(4 * C),
                    Kept(1) ? New(4 * C) : Layers[0].FchGelu, New(C));
        }
        if (purpose == Purpose.Train)
            (DResidual, DBranch) = (New(C), New(C));
        // The logits, at most so many rows at a time, share memory with what the backward pass needs after them.
        const int logitRows = 1 << 14;
        Logits = new(address, 1, purpose == Purpose.Generate ? 0 : Math.Min(B * T, logitRows), config.Vp, type);
        if (purpose == Purpose.Train)
            (DQkv, DFch) = (New(3 * C), New(4 * C));
        Bytes = Math.Max(address, Logits.Address + (nint)Logits.Bytes) - start;
    }

    /// <summary>One layer's activations, in the order of their computation.</summary>
    public sealed record Layer(
        Tensor Residual1, Tensor Ln1, Tensor Ln1Statistics, // (B, T, C), (B, T, C), (B, T, 2) in fp32
        Tensor Qkv, Tensor Atty, Tensor Lse, // (B, T, 3C), (B, T, C), (B, NH, T) in fp32
        Tensor Residual2, Tensor Ln2, Tensor Ln2Statistics, // (B, T, C), (B, T, C), (B, T, 2) in fp32
        Tensor Fch, Tensor FchGelu, Tensor Residual3); // (B, T, 4C), (B, T, 4C), (B, T, C)
}

/// <summary>GPT-2 (Radford et al., 2019) on a device: its parameters, forward and backward pass.</summary>
public sealed class Model {
    readonly Activations activations;
    readonly nint cache; // memory of generation
    readonly Purpose purpose;
    readonly DataType weightType;
    readonly int recompute;
    readonly Cut[] wholes, cuts; // all parameters, and those that this rank updates

    /// <summary>Allocates a model for batches of (B, T) tokens, with all weights zero.</summary>
    /// <param name="rank">Which of <paramref name="ranks"/> parts of the parameters this process updates.</param>
    /// <param name="optimizer">Decides how the parameters are cut, and which have second moments.</param>
    /// <param name="type">Type of the weights, else the device's; a CPU generates from bf16, too.</param>
    /// <exception cref="Gpt2Exception">The device has too little memory.</exception>
    public Model(Config config, IDevice device, int B, int T, Purpose purpose, int recompute = 0, int rank = 0,
        int ranks = 1, OptimizerKind optimizer = OptimizerKind.AdamW, DataType? type = null) {
        (Config, Device, this.B, this.T, this.purpose, this.recompute) = (config, device, B, T, purpose, recompute);
        (IsCut, Optimizer) = (ranks > 1, optimizer);
        (wholes, cuts) = ([.. config.Cuts(0, 1, optimizer)], [.. config.Cuts(rank, ranks, optimizer)]);
        weightType = type ?? device.Precision;
        Memory = Plan(B, recompute);
        CheckMemory();
        Weights = Allocate(weightType, wholes);
        WeightParts = IsCut ? new Parameters(config, weightType, 0, cuts, Weights) : Weights;
        Master = purpose == Purpose.Train && device.Precision == DataType.Bf16 ? AllocateParts() : WeightParts;
        Gradients = purpose == Purpose.Train ? Allocate(DataType.Fp32, wholes) : null;
        GradientParts = IsCut ? AllocateParts() : Gradients;
        activations = Layout(B, recompute, device.Allocate(Layout(B, recompute, 0).Bytes));
        cache = purpose == Purpose.Evaluate ? 0 : device.Allocate(Cache(B).Bytes);
        (Tokens, Targets, Losses) = (new int[B * T], new int[B * T], new float[B * T]);
    }

    public Config Config { get; }
    public IDevice Device { get; }
    public int B { get; }
    public int T { get; }

    /// <summary>The weights, and the part of them that this rank updates, in the same memory.</summary>
    public Parameters Weights { get; }
    public Parameters WeightParts { get; }

    /// <summary>That part in fp32: the same unless weights are bf16.</summary>
    public Parameters Master { get; }

    /// <summary>In training, the sum of the gradients of all backward passes since the last update.</summary>
    public Parameters? Gradients { get; }

    /// <summary>Their sum over ranks, for the part that this rank updates; for one rank, the same.</summary>
    public Parameters? GradientParts { get; }

    /// <summary>True under ZeRO-1: this rank updates a part of the parameters.</summary>
    public bool IsCut { get; }
    public OptimizerKind Optimizer { get; }

    /// <summary>Called when the gradients of a layer are complete, or with −1 those outside of layers.</summary>
    public Action<int>? Completed { get; set; }

    /// <summary>The batch: tokens and the one after each, (B, T).</summary>
    public int[] Tokens { get; }
    public int[] Targets { get; }

    /// <summary>The cross-entropy at each position, (B, T), as <see cref="MeanLoss"/> last read it.</summary>
    public float[] Losses { get; }

    /// <summary>What takes how many bytes, the optimizer's moments included.</summary>
    public (string Name, long Bytes)[] Memory { get; }

    // ---- Memory

    (string Name, long Bytes)[] Plan(int B, int recompute) {
        var (type, training) = (Device.Precision, purpose == Purpose.Train ? 1 : 0);
        var (whole, part) = (Config.ParameterCount, new Parameters(Config, DataType.Fp32, 0, cuts).All.Bytes);
        (string Name, long Bytes)[] all = [
            ("parameters", whole * Tensor.SizeOf(weightType)),
            ("master weights", training * (type == DataType.Fp32 ? 0 : part)),
            ("gradients", training * (whole * sizeof(float) + (IsCut ? part : 0))),
            ("moments", training * (part + new Parameters(Config, DataType.Fp32, 0, AdamWs(cuts)).All.Bytes)),
            // A GPU takes so much, and any device what its largest matrix needs.
            ("Muon's scratch", Optimizer == OptimizerKind.AdamW ? 0 : Math.Max(
                Device.Workspace > 0 ? MuonStep.ScratchBytes : 0, 14L * Config.C * Config.C * Tensor.SizeOf(type))),
            ("activations", Layout(B, recompute, 0).Bytes),
            ("keys and values", purpose == Purpose.Evaluate ? 0 : Cache(B).Bytes),
        ];
        return [.. all.Where(each => each.Bytes > 0)];
    }

    /// <summary>Requires the plan to fit into memory; if it does not, the error says what would.</summary>
    void CheckMemory() {
        long Total(int batch, int level) => Plan(batch, level).Sum(each => each.Bytes);
        var (available, total) = (Device.FreeMemory, Total(B, recompute));
        if (total <= available)
            return;
        var (fits, largest, levels) = (new List<string>(), 0, purpose == Purpose.Train ? 2 : recompute);
        for (var level = recompute; level <= levels && largest < B; level++) {
            // A higher level fits at least what a lower one does, so the search goes on from there.
            for (var more = 1 << 30; more > 0; more /= 2) {
                var batch = Math.Min(largest + more, B);
                largest = Total(batch, level) <= available ? batch : largest;
            }
            if (largest > 0)
                fits.Add($"--batch {largest}{(level > recompute ? $" with --recompute {level}" : "")}");
        }
        throw new Gpt2Exception($"memory: expected {total / 1e9:F2} GB free on {Device.Name}, found " +
            $"{available / 1e9:F2} GB, {(total - available) / 1e9:F2} GB too little" +
            (fits.Count > 0 ? $"; {string.Join(", or ", fits)} fits" : ""));
    }

    Activations Layout(int B, int recompute, nint address) =>
        new(Config, Device.Precision, purpose == Purpose.Generate ? 0 : B, T, purpose, recompute, address);

    /// <summary>The memory of generation: for B sequences, or in training for one.</summary>
    Generation Cache(int B) => new(Config, Device.Precision, purpose == Purpose.Generate ? B : 1, 0);

    /// <summary>Allocates an fp32 number for each parameter that this rank updates, or that it updates by AdamW.
    /// </summary>
    public Parameters AllocateParts(bool ofAdamW = false) => Allocate(DataType.Fp32, ofAdamW ? AdamWs(cuts) : cuts);

    Parameters Allocate(DataType type, Cut[] cuts) =>
        new(Config, type, Device.Allocate(new Parameters(Config, type, 0, cuts).All.Bytes), cuts);

    /// <summary>Those parts that AdamW updates.</summary>
    public static Cut[] AdamWs(Cut[] cuts) => [.. cuts.Where(cut => !cut.IsMuons)];

    // ---- Forward and backward

    /// <summary>Computes the activations of the batch, up to the last layer norm.</summary>
    public void Forward() => Forward(Tokens, activations);

    void Forward(ReadOnlySpan<int> tokens, Activations a) {
        Device.Embed(tokens, Weights.Wte, Weights.Wpe, a.Encoded);
        for (var l = 0; l < Config.L; l++) {
            var (w, x) = (Weights[l], a.Layers[l]);
            Device.LayerNorm(x.Residual1, w.Ln1w, w.Ln1b, x.Ln1, x.Ln1Statistics);
            Device.Linear(x.Ln1, w.Qkvw, w.Qkvb, x.Qkv);
            Device.Attention(x.Qkv, Config.NH, x.Atty, x.Lse);
            Device.LinearResidual(x.Atty, w.Attprojw, w.Attprojb, x.Residual1, x.Residual2);
            Device.LayerNorm(x.Residual2, w.Ln2w, w.Ln2b, x.Ln2, x.Ln2Statistics);
            Device.LinearGelu(x.Ln2, w.Fcw, w.Fcb, x.Fch, x.FchGelu);
            Device.LinearResidual(x.FchGelu, w.Fcprojw, w.Fcprojb, x.Residual2, x.Residual3);
        }
        Device.LayerNorm(a.Layers[^1].Residual3, Weights.Lnfw, Weights.Lnfb, a.Final, a.FinalStatistics);
    }

    /// <summary>The number of parts in which the logits of all positions are computed.</summary>
    public int LogitParts => (B * T + activations.Logits.Rows - 1) / activations.Logits.Rows;

    /// <summary>The logits (rows, Vp) of one part of the positions, valid until the next are computed.</summary>
    public Tensor Logits(int part) {
        var (first, size) = (part * activations.Logits.Rows, activations.Logits.Rows);
        var logits = activations.Logits.Slice(0, Math.Min(size, B * T - first));
        Device.Linear(activations.Final.Slice(first, logits.Rows), Weights.Wte, default, logits);
        return logits;
    }

    /// <summary>Computes the losses of the last forward pass and, for a scale other than 0, the classifier's gradients.
    /// </summary>
    /// <param name="gradientScale">Weight of one position's loss in the gradients.</param>
    public void Loss(float gradientScale = 0) {
        var a = activations;
        for (var first = 0; first < B * T; first += a.Logits.Rows) {
            var count = Math.Min(a.Logits.Rows, B * T - first);
            var (dx, dw) = gradientScale == 0 ? default : (a.DBranch.Slice(first, count), Gradients!.Wte);
            Device.LinearClassify(a.Final.Slice(first, count), Weights.Wte, Targets.AsSpan(first, count), Config.V,
                a.Logits.Slice(0, count), a.Losses.Slice(first, count), gradientScale, dx, dw);
        }
    }

    /// <summary>Reads the last losses into <see cref="Losses"/>, and returns their mean.</summary>
    public double MeanLoss() {
        Device.Read(activations.Losses, Losses);
        var sum = 0.0;
        foreach (var loss in Losses)
            sum += loss;
        return sum / Losses.Length;
    }

    /// <summary>The mean loss of the batch, without gradients.</summary>
    public double Evaluate() {
        Forward();
        Loss();
        return MeanLoss();
    }

    /// <summary>Adds the gradients of the last <see cref="Loss"/> to <see cref="Gradients"/>.</summary>
    public void Backward() {
        // dx is the gradient of the residual stream, dy that of what a branch takes from it.
        var (a, g, dx, dy) = (activations, Gradients!, activations.DResidual, activations.DBranch);
        Device.Clear(dx);
        Device.LayerNormBackward(dy, a.Layers[^1].Residual3, Weights.Lnfw, a.FinalStatistics, dx, g.Lnfw,
            g.Lnfb, g[Config.L - 1].Fcprojb);
        for (var l = Config.L - 1; l >= 0; l--) {
            var (w, dw, x) = (Weights[l], g[l], a.Layers[l]);
            if (recompute >= 1)
                Device.Gelu(x.Fch, x.FchGelu);
            Device.LinearGeluBackward(dx, x.FchGelu, x.Fch, w.Fcprojw, a.DFch, dw.Fcprojw, dw.Fcb);
            if (recompute >= 2)
                Device.LayerNorm(x.Residual2, w.Ln2w, w.Ln2b, x.Ln2, x.Ln2Statistics);
            Device.LinearBackward(a.DFch, x.Ln2, w.Fcw, dy, dw.Fcw);
            Device.LayerNormBackward(dy, x.Residual2, w.Ln2w, x.Ln2Statistics, dx, dw.Ln2w, dw.Ln2b, dw.Attprojb);
            Device.LinearBackward(dx, x.Atty, w.Attprojw, dy, dw.Attprojw);
            Device.AttentionBackward(dy, x.Qkv, x.Atty, x.Lse, Config.NH, a.DQkv, dw.Qkvb);
            if (recompute >= 2)
                Device.LayerNorm(x.Residual1, w.Ln1w, w.Ln1b, x.Ln1, x.Ln1Statistics);
            Device.LinearBackward(a.DQkv, x.Ln1, w.Qkvw, dy, dw.Qkvw);
            var dbias = l > 0 ? g[l - 1].Fcprojb : default;
            Device.LayerNormBackward(dy, x.Residual1, w.Ln1w, x.Ln1Statistics, dx, dw.Ln1w, dw.Ln1b, dbias);
            Completed?.Invoke(l);
        }
        Device.EmbedBackward(Tokens, dx, g.Wte, g.Wpe);
        Completed?.Invoke(-1);
    }

    // ---- Generation

    /// <summary>What makes the next token of each sequence: the forward pass for one more position.</summary>
    Operation[] Program(Generation g) {
        Operation Linear(OperationKind kind, Tensor x, Tensor w, Tensor b, Tensor y) => new(kind, x, w, b, y);
        var blocks = Enumerable.Range(0, Config.L).SelectMany(l => {
            var (w, qkv) = (Weights[l], g.Qkv[l]);
            return (Operation[])[
                Linear(OperationKind.Linear, g.X, w.Qkvw, w.Qkvb, qkv) with { NormW = w.Ln1w, NormB = w.Ln1b },
                new(OperationKind.Attention, qkv, default, default, g.Atty, Heads: Config.NH),
                Linear(OperationKind.Residual, g.Atty, w.Attprojw, w.Attprojb, g.X),
                Linear(OperationKind.Gelu, g.X, w.Fcw, w.Fcb, g.FchGelu) with { NormW = w.Ln2w, NormB = w.Ln2b },
                Linear(OperationKind.Residual, g.FchGelu, w.Fcprojw, w.Fcprojb, g.X),
            ];
        });
        var head = Linear(OperationKind.Logits, g.X, Weights.Wte.Slice(0, Config.V), default, g.Logits);
        return [
            new(OperationKind.Embed, Weights.Wte, default, Weights.Wpe, g.X),
            .. blocks,
            head with { NormW = Weights.Lnfw, NormB = Weights.Lnfb },
            new(OperationKind.Choose, g.Logits, default, default, default),
        ];
    }

    /// <summary>Continues a prompt in B ways, at most as many as the model has memory for. When the context is full, it
    /// goes on from the newest half of it; a longer prompt is cut to that, too.</summary>
    /// <returns>The next token of each sequence, (B), as often as asked for.</returns>
    public IEnumerable<int[]> Generate(int[] prompt, Choice choice, int count, int B = 1) {
        var g = new Generation(Config, Device.Precision, B, cache);
        var (program, half) = (Program(g), Math.Max(1, Config.MaxT / 2));
        var texts = Enumerable.Range(0, B).Select(_ => prompt.ToList()).ToArray();
        var (position, shared, made) = (Config.MaxT, 0, 0);
        while (made < count) {
            if (position == Config.MaxT) {
                // At first all have the same text, which the first sequence's keys and values stand for.
                var length = made == 0 && prompt.Length <= Config.MaxT ? prompt.Length : half;
                (position, shared) = (length - 1, made == 0 ? length - 1 : 0);
                for (var b = 0; b < (made == 0 ? 1 : B) && position > 0; b++)
                    Forward(CollectionsMarshal.AsSpan(texts[b])[^length..^1], g.Prompt(b, position));
            }
            var together = made == 0 ? 1 : Device.DecodeSteps;
            var next = new int[Math.Min(Math.Min(together, count - made), Config.MaxT - position) * B];
            Device.Decode(program, choice with { Drawn = made }, position, shared, [.. texts.Select(text => text[^1])],
                next);
            foreach (var tokens in next.Chunk(B)) {
                foreach (var (text, token) in texts.Zip(tokens))
                    text.Add(token);
                yield return tokens;
            }
            (position, made) = (position + next.Length / B, made + next.Length / B);
        }
    }

    // ---- Weights

    /// <summary>Draws the fp32 weights as llm.c and PyTorch do from the same seed: Normal(0, 0.02), the residual
    /// projections scaled by 1/√(2L); biases 0, layer-norm weights 1.</summary>
    void Initialize(uint seed) {
        const int chunk = Tensor.ChunkSize, most = chunk + Mt19937.Group; // so that the last part is not too small
        var (random, shapes, writing, turn) = (new Mt19937(seed), Config.Parameters, Task.CompletedTask, 0);
        float[][] buffers = [new float[most], new float[most]]; // one is written while the other is filled
        var layers = Enumerable.Range(0, Config.L);
        foreach (var (l, (i, shape)) in layers.SelectMany(_ => shapes.Index(), ValueTuple.Create)) {
            // The padded rows of wte stay zero.
            var count = l >= shape.Layers ? 0 : (shape.Name == "wte" ? Config.V : shape.Rows) * shape.Columns;
            for (var done = 0; done < count;) {
                var values = buffers[turn ^= 1].AsMemory(0, count - done <= most ? count - done : chunk);
                if (shape.IsMatrix)
                    random.Normal(values, shape.Name.EndsWith("projw") ? 0.02f / MathF.Sqrt(2 * Config.L) : 0.02f);
                else
                    values.Span.Fill(shape.Name is "ln1w" or "ln2w" or "lnfw" ? 1 : 0);
                var first = (long)l * shape.Rows * shape.Columns + done;
                writing.Wait();
                writing = Task.Run(() => Set([Weights, Master], i, first, values.Span));
                done += values.Length;
            }
        }
        writing.Wait();
    }

    /// <summary>Reads the weights from a checkpoint of this model, and closes it, or draws them from a seed.</summary>
    public void Load(BinaryFile? file, uint seed = 0) {
        using var closed = file;
        if (file == null)
            Initialize(seed);
        else
            Read(file, wholes, Weights, Master);
    }

    /// <summary>Reads parts of the parameters into those that hold any of them.</summary>
    public void Read(BinaryFile file, Cut[] cuts, params Parameters[] holders) {
        var buffer = new float[Tensor.ChunkSize];
        foreach (var cut in cuts) {
            for (long done = 0; done < cut.Count; done += buffer.Length) {
                var values = buffer.AsSpan(0, (int)Math.Min(buffer.Length, cut.Count - done));
                file.ReadWeights(values);
                if (Numbers.NotFinite(values) is { } value)
                    throw file.Fail("finite weights", $"{value} in {Config.Parameters[cut.Tensor].Name}");
                Set(holders, cut.Tensor, cut.First + done, values);
            }
        }
    }

    /// <summary>Sets a tensor's elements from <paramref name="first"/> on, in all that hold any of them.</summary>
    void Set(Parameters[] holders, int tensor, long first, ReadOnlySpan<float> values) {
        foreach (var (cut, held) in holders.Distinct().SelectMany(holder => holder.Cuts.Zip(holder.Tensors))) {
            var begin = Math.Max(cut.First, first);
            var count = (int)(Math.Min(cut.First + cut.Count, first + values.Length) - begin);
            if (cut.Tensor == tensor && count > 0)
                Device.Write(held.Flat(begin - cut.First, count), values.Slice((int)(begin - first), count));
        }
    }

    /// <summary>Writes the weights as a checkpoint of their type.</summary>
    public void Save(Stream to) {
        to.Write(MemoryMarshal.AsBytes(Config.Header(Weights.All.Type).AsSpan()));
        Write(to, Weights);
    }

    /// <summary>Writes parameters, or a rank's part of them, in their type.</summary>
    public void Write(Stream to, Parameters from) {
        var (buffer, halves) = (new float[Tensor.ChunkSize], new ushort[Tensor.ChunkSize]);
        foreach (var part in from.Tensors.SelectMany(tensor => tensor.Chunks())) {
            var values = buffer.AsSpan(0, (int)part.Count);
            Device.Read(part, values);
            if (Numbers.NotFinite(values) is { } value)
                throw new Gpt2Exception($"checkpoint: expected finite weights and moments, found {value}; " +
                    "nothing was saved");
            if (part.Type == DataType.Bf16)
                BFloat16.Round(values, halves);
            to.Write(part.Type == DataType.Bf16 ? MemoryMarshal.AsBytes(halves.AsSpan(0, values.Length))
                : MemoryMarshal.AsBytes(values));
        }
    }
}

/// <summary>The memory of generation for B sequences; laid out at address 0, it tells its size.</summary>
public sealed class Generation {
    readonly Config config;
    readonly nint rest; // where a prompt's activations go

    public Generation(Config config, DataType type, int B, nint address) {
        (this.config, var (C, start)) = (config, (config.C, address));
        Tensor New(int rows, int columns, DataType type) =>
            new Tensor(0, B, rows, columns, type).Place(ref address);
        Qkv = [.. Enumerable.Range(0, config.L).Select(_ => New(config.MaxT, 3 * C, type))];
        (X, Atty, FchGelu) = (New(1, C, type), New(1, C, type), New(1, 4 * C, type));
        Logits = New(1, config.V, DataType.Fp32);
        rest = address;
        Bytes = address + Prompt(0, config.MaxT).Bytes - start;
    }

    /// <summary>Each layer's queries, keys and values: (B, MaxT, 3C).</summary>
    public Tensor[] Qkv { get; }

    /// <summary>Of the last position: (B, 1, C), (B, 1, C), (B, 1, 4C), and logits (B, 1, V) in fp32.</summary>
    public Tensor X { get; }
    public Tensor Atty { get; }
    public Tensor FchGelu { get; }
    public Tensor Logits { get; }

    public long Bytes { get; }

    /// <summary>The activations of a sequence's first <paramref name="T"/> tokens.</summary>
    public Activations Prompt(int sequence, int T) => new(config, X.Type, 1, T, Purpose.Generate, 0, rest,
        [.. Qkv.Select(qkv => qkv.Slice(sequence * config.MaxT, T))]);
}
