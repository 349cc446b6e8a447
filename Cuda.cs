using System.Reflection;
using static Gpt2.CublasLt;
using static Gpt2.Driver;

namespace Gpt2;

/// <summary>The operations on an NVIDIA GPU: kernels from the embedded fatbin, and products by cuBLASLt. All work is
/// queued on one stream and nothing depends on timing, so the same calls give the same bits.</summary>
public sealed unsafe class Cuda : IDevice {
    const int StagingBytes = 32 << 20, WorkspaceBytes = 32 << 20, ScratchBytes = 64 << 20, MailBytes = 8 << 20;
    const int LargestColumns = 4096, LargestHead = 256; // a block's width in layer_norm_backward and attention_any
    const int MostSequences = 65_535; // the largest z dimension of a grid
    const int Width = 8; // elements that a thread loads or stores at a time
    const int MapBytes = 128; // size of a CUtensorMap

    readonly int device, multiprocessors, largestShared;
    readonly bool verbose, hopper;
    readonly nint context, module, stream, pinned, staging, workspace, scratch, mail, maps;
    readonly List<nint> allocations = [];
    readonly Dictionary<string, (nint Function, int Shared)> kernels = []; // with the dynamic shared memory allowed
    readonly Products products;
    int staged;

    /// <summary>Opens a GPU and loads the kernels.</summary>
    /// <param name="portable">Uses the kernels for any GPU, even on a Hopper.</param>
    /// <param name="verbose">Waits after each operation, so that a fault is reported where it happens.</param>
    /// <exception cref="Gpt2Exception">The driver, the GPU, kernels for it or cuBLASLt are missing.</exception>
    public Cuda(DataType precision, bool portable = false, bool verbose = false, int ordinal = 0) {
        (Precision, this.verbose) = (precision, verbose);
        using var fatbin = Fatbin(precision);
        _ = Task.Run(() => cublasLtGetStatusName(0)); // loads the library while CUDA starts
        Initialize();
        Check(cuDeviceGet(out device, ordinal), $"opening GPU {ordinal}");
        var name = stackalloc byte[256];
        Check(cuDeviceGetName(name, 256, device), "reading the GPU's name");
        int Attribute(int attribute) {
            Check(cuDeviceGetAttribute(out var value, attribute, device), "reading the GPU's properties");
            return value;
        }
        const int multiprocessorCount = 16, major = 75, minor = 76, sharedPerBlock = 97;
        (multiprocessors, largestShared) = (Attribute(multiprocessorCount), Attribute(sharedPerBlock));
        var capability = 10 * Attribute(major) + Attribute(minor);
        Name = Marshal.PtrToStringUTF8((nint)name) ?? "";
        Check(cuDevicePrimaryCtxRetain(out context, device), "starting CUDA");
        Enter();
        var status = cuModuleLoadData(out module, (nint)fatbin.PositionPointer);
        if (status == NoBinaryForGpu) {
            var remedy = capability < 80 ? "a GPU of 8.0 or more is needed"
                : $"make ARCH={capability}{(capability == 90 ? "a" : "")} compiles them";
            throw new Gpt2Exception($"--device cuda: expected kernels for {Name} (compute capability " +
                $"{capability / 10}.{capability % 10}), found none in this build; {remedy}");
        }
        Check(status, "loading the kernels");
        const int nonBlocking = 1;
        Check(cuStreamCreateWithPriority(out stream, nonBlocking, 0), "creating a stream");
        Check(cuMemAllocHost_v2(out pinned, StagingBytes), "allocating host memory");
        (staging, workspace) = (Allocate(StagingBytes), Allocate(WorkspaceBytes));
        (scratch, mail) = (Allocate(ScratchBytes), Allocate(MailBytes));
        hopper = precision == DataType.Bf16 && !portable && cuModuleGetFunction(out _, module, "attention_hopper") == 0;
        maps = (nint)NativeMemory.AlignedAlloc(4 * MapBytes, 64);
        products = new Products(stream, workspace, WorkspaceBytes);
    }

    /// <summary>True if this build has kernels, and this machine a GPU with a driver.</summary>
    public static bool IsAvailable => Obstacle == null;

    /// <summary>Why this build cannot use this machine's GPU: null if it can, empty if there is no GPU.</summary>
    public static string? Obstacle {
        get {
            var hidden = Environment.GetEnvironmentVariable("CUDA_VISIBLE_DEVICES") is "" or "-1";
            var present = !hidden && Directory.EnumerateFiles("/dev", "nvidia?").Any(); // made by the kernel module
            try {
                present = Initialize() > 0;
                using var fatbin = Fatbin(DataType.Bf16);
                return present ? null : "";
            } catch (Gpt2Exception e) {
                return present ? e.Message : "";
            }
        }
    }

    /// <summary>The number of GPUs.</summary>
    public static int Count() {
        using var fatbin = Fatbin(DataType.Bf16);
        return Initialize();
    }

    static UnmanagedMemoryStream Fatbin(DataType precision) => (UnmanagedMemoryStream?)
        typeof(Cuda).Assembly.GetManifestResourceStream($"Kernels.{precision.ToString().ToLowerInvariant()}.fatbin") ??
        throw new Gpt2Exception("--device cuda: expected GPU kernels (make toolkit, then make), found a build without");

    static int Initialize() {
        const int oldestDriver = 12000;
        try {
            Check(cuInit(0), "starting CUDA");
            Check(cuDriverGetVersion(out var version), "starting CUDA");
            if (version < oldestDriver)
                throw new Gpt2Exception("--device cuda: expected a driver for CUDA 12.0 or newer, found one for " +
                    $"{version / 1000}.{version / 10 % 100}");
            Check(cuDeviceGetCount(out var count), "counting GPUs");
            return count;
        } catch (DllNotFoundException) {
            throw new Gpt2Exception("--device cuda: expected NVIDIA's driver (libcuda.so.1), found none");
        }
    }

    public string Name { get; }
    public DataType Precision { get; }
    public long Workspace => StagingBytes + WorkspaceBytes + ScratchBytes + MailBytes;

    /// <summary>The stream that all work is queued on.</summary>
    public nint Stream => stream;

    /// <summary>While set, NVIDIA's profilers record, too.</summary>
    public Profile? Profile { get; set => _ = (field = value) == null ? cuProfilerStop() : cuProfilerStart(); }

    // ---- Memory

    public long FreeMemory {
        get {
            Enter();
            Check(cuMemGetInfo_v2(out var free, out _), "reading the GPU's free memory");
            return (long)free;
        }
    }

    public nint Allocate(long bytes) {
        Enter();
        Check(cuMemAlloc_v2(out var address, (nuint)Math.Max(1, bytes)), $"allocating {bytes} bytes on the GPU");
        allocations.Add(address);
        Check(cuMemsetD8Async(address, 0, (nuint)bytes, stream), "clearing memory");
        return address;
    }

    public void Dispose() {
        // After a fault all of these fail. That is ignored, so that the fault itself is reported.
        cuCtxSetCurrent(context);
        cuStreamSynchronize(stream);
        products.Dispose();
        allocations.ForEach(address => cuMemFree_v2(address));
        NativeMemory.AlignedFree((void*)maps);
        cuMemFreeHost(pinned);
        cuStreamDestroy(stream);
        cuModuleUnload(module);
        cuDevicePrimaryCtxRelease_v2(device);
    }

    /// <summary>Makes the GPU's context current for this thread.</summary>
    public void Enter() => Check(cuCtxSetCurrent(context), "entering the context");

    /// <summary>Reserves pinned memory, and the memory on the GPU at the same offset. Both are reused in turn, after
    /// waiting for the work that used them last.</summary>
    Span<T> Stage<T>(long count, out int offset) where T : unmanaged {
        const int alignment = 256;
        var bytes = count * sizeof(T);
        Enter();
        if (staged + bytes > StagingBytes) {
            Synchronize();
            staged = 0;
        }
        offset = staged;
        staged += (int)((bytes + alignment - 1) / alignment * alignment);
        return new((void*)(pinned + offset), (int)count);
    }

    /// <summary>Copies the input of the next few kernels to the GPU.</summary>
    nint Upload<T>(ReadOnlySpan<T> values) where T : unmanaged {
        var bytes = (long)values.Length * sizeof(T);
        // At most a quarter, so that one kernel's inputs are there together.
        Require(bytes <= StagingBytes / 4, "what a kernel reads", $"{StagingBytes / 4} bytes", bytes);
        values.CopyTo(Stage<T>(values.Length, out var offset));
        Check(cuMemcpyAsync(staging + offset, pinned + offset, (nuint)bytes, stream), "copying to the GPU");
        return staging + offset;
    }

    /// <summary>Copies elements to pinned memory, and waits for them.</summary>
    Span<T> Download<T>(nint from, long count) where T : unmanaged {
        var values = Stage<T>(count, out var offset);
        Check(cuMemcpyAsync(pinned + offset, from, (nuint)(count * sizeof(T)), stream), "copying from the GPU");
        Synchronize();
        return values;
    }

    public void Write(Tensor to, ReadOnlySpan<float> values) {
        foreach (var part in to.Chunks()) {
            var (count, offset) = ((int)part.Count, 0);
            if (to.Type == DataType.Fp32)
                values[..count].CopyTo(Stage<float>(count, out offset));
            else
                BFloat16.Round(values[..count], Stage<ushort>(count, out offset));
            Check(cuMemcpyAsync(part.Address, pinned + offset, (nuint)part.Bytes, stream), "copying to the GPU");
            values = values[count..];
        }
    }

    public void Read(Tensor from, Span<float> values) {
        foreach (var part in from.Chunks()) {
            var count = (int)part.Count;
            if (from.Type == DataType.Fp32)
                Download<float>(part.Address, count).CopyTo(values);
            else
                BFloat16.Widen(Download<ushort>(part.Address, count), values[..count]);
            values = values[count..];
        }
    }

    public void Clear(Tensor x) {
        Enter();
        Check(cuMemsetD8Async(x.Address, 0, (nuint)x.Bytes, stream), "clearing memory");
    }

    // ---- Launches

    /// <summary>Queues a kernel.</summary>
    /// <param name="traffic">Bytes that it must at least read and write, for its profile.</param>
    void Launch(string name, (int X, int Y, int Z) grid, int block, int shared, double flops, double traffic,
        params ReadOnlySpan<Argument> arguments) => Launch(name, name, grid, block, shared, flops, traffic, arguments);

    void Launch(string operation, string name, (int X, int Y, int Z) grid, int block, int shared, double flops,
        double traffic, params ReadOnlySpan<Argument> arguments) {
        Enter();
        if (!kernels.TryGetValue(name, out var kernel) || shared > kernel.Shared) {
            const int maxDynamicSharedBytes = 8;
            Check(cuModuleGetFunction(out kernel.Function, module, name), $"looking for the kernel {name}");
            if (shared > 0)
                Check(cuFuncSetAttribute(kernel.Function, maxDynamicSharedBytes, shared), name);
            kernels[name] = (kernel.Function, shared);
        }
        var pointers = stackalloc nint[arguments.Length];
        fixed (Argument* values = arguments) {
            for (var i = 0; i < arguments.Length; i++)
                pointers[i] = values[i].Place != 0 ? values[i].Place : (nint)(values + i);
            var start = Begin();
            Check(name.StartsWith("decode") // whose blocks wait for one another, so all must be there
                ? cuLaunchCooperativeKernel(kernel.Function, grid.X, 1, 1, block, 1, 1, shared, stream, pointers)
                : cuLaunchKernel(kernel.Function, grid.X, grid.Y, grid.Z, block, 1, 1, shared, stream, pointers, null),
                operation);
            End(start, operation, flops, traffic);
        }
    }

    readonly List<(string Name, double Flops, double Bytes, nint Start, nint End)> timed = [];

    /// <summary>Starts timing the next launch if there is a profile.</summary>
    nint Begin() => Profile == null ? 0 : Record();

    void End(nint start, string name, double flops, double traffic) {
        if (start != 0)
            timed.Add((name, flops, traffic, start, Record()));
        if (verbose)
            Check(cuStreamSynchronize(stream), name);
    }

    public void Synchronize() {
        Enter();
        Check(cuStreamSynchronize(stream), "waiting for the GPU (--verbose names the operation)");
        foreach (var (name, flops, bytes, start, end) in timed)
            Profile?.Add(name, SecondsBetween(start, end), flops, bytes);
        timed.Clear();
    }

    /// <summary>A new event that marks this point of the stream.</summary>
    nint Record() {
        Check(cuEventCreate(out var point, 0), "timing");
        Check(cuEventRecord(point, stream), "timing");
        return point;
    }

    /// <summary>Seconds between two events that have passed, which are then destroyed.</summary>
    static double SecondsBetween(nint start, nint end) {
        Check(cuEventElapsedTime(out var milliseconds, start, end), "timing");
        cuEventDestroy(start);
        cuEventDestroy(end);
        return milliseconds / 1e3;
    }

    static int Blocks(long count, int size) => checked((int)((count + size - 1) / size));

    static void Require(bool condition, string what, string expected, long found) {
        if (!condition)
            throw new Gpt2Exception($"--device cuda: expected {what} to be {expected}, found {found}");
    }

    static void RequireColumns(int columns) => Require(columns % Width == 0 && columns <= LargestColumns,
        "the number of channels", $"a multiple of {Width}, at most {LargestColumns}", columns);

    // ---- Embedding

    const int SumColumns = 256, AddColumns = 32; // columns that a block sums

    int[] order = [], firsts = [];

    public void Embed(ReadOnlySpan<int> tokens, Tensor wte, Tensor wpe, Tensor x) {
        RequireColumns(x.Columns);
        Launch("embed", (x.AllRows, 1, 1), 96, 0, 0, 3.0 * x.Bytes,
            Upload(tokens), wte, wpe, x, x.Rows, x.Columns);
    }

    public void EmbedBackward(ReadOnlySpan<int> tokens, Tensor dx, Tensor dwte, Tensor dwpe) {
        var (vocabulary, C) = (dwte.AllRows, dx.Columns);
        // Sorting rows by token fixes the order in which each token's gradients are added.
        Array.Resize(ref firsts, vocabulary + 1);
        Array.Resize(ref order, tokens.Length);
        Array.Clear(firsts);
        foreach (var token in tokens)
            firsts[token]++;
        var sum = 0;
        for (var token = 0; token <= vocabulary; token++)
            firsts[token] = sum += firsts[token];
        for (var row = tokens.Length - 1; row >= 0; row--)
            order[--firsts[tokens[row]]] = row;
        Launch("embed_backward_tokens", (vocabulary, Blocks(C, SumColumns), 1), SumColumns, 0, 0, dx.Bytes + 8.0 * C *
            Math.Min(vocabulary, tokens.Length), Upload<int>(order), Upload<int>(firsts), dx, dwte, C);
        Launch("embed_backward_positions", (dx.Rows, Blocks(C, SumColumns), 1), SumColumns, 0, 0,
            dx.Bytes + 8.0 * C * dx.Rows, dx, dwpe, dx.Depth, dx.Rows, C);
    }

    // ---- Layer norm

    public void LayerNorm(Tensor x, Tensor w, Tensor b, Tensor y, Tensor statistics) {
        RequireColumns(x.Columns);
        var (rows, row) = (x.AllRows, x.Columns * x.ElementSize);
        var warps = Math.Clamp((48 << 10) / row, 1, 8);
        Launch("layer_norm", (Blocks(rows, warps), 1, 1), 32 * warps, warps * row, 0, 2.0 * x.Bytes,
            x, w, b, y, statistics, rows, x.Columns);
    }

    public void LayerNormBackward(
        Tensor dy, Tensor x, Tensor w, Tensor statistics, Tensor dx, Tensor dw, Tensor db, Tensor dbias) {
        RequireColumns(x.Columns);
        var (rows, C, sums) = (x.AllRows, x.Columns, dbias.Address == 0 ? 2 : 3);
        const int warpsOfBlock = 16, mostGroups = 15, together = 2;
        var row = C * sums * sizeof(float);
        var across = Blocks(C, 32 * Width);
        var groups = Math.Clamp(warpsOfBlock / across, 1, mostGroups);
        var blocks = Math.Min(Blocks(rows, groups * together), Math.Min(multiprocessors, ScratchBytes / row));
        Launch("layer_norm_backward", (blocks, 1, 1), 32 * across * groups, row, 0, 4.0 * x.Bytes,
            dy, x, w, statistics, dx, scratch, rows, C, sums);
        AddPartialSums(scratch, blocks, db, dw, dbias);
    }

    // ---- Linear and GELU

    public void Linear(Tensor x, Tensor w, Tensor b, Tensor y) => LinearResidual(x, w, b, default, y);

    public void LinearResidual(Tensor x, Tensor w, Tensor b, Tensor residual, Tensor y) {
        var operation = residual.Address == 0 ? nameof(Linear) : nameof(LinearResidual);
        if (IsForHopper(x, w))
            LaunchProduct(operation, residual.Address == 0 ? "linear" : "linear_residual", x, w, y, residual, b);
        else
            Multiply(operation, w, true, x, false, y, b, residual);
    }

    public void LinearGelu(Tensor x, Tensor w, Tensor b, Tensor input, Tensor y) {
        if (IsForHopper(x, w)) {
            LaunchProduct(nameof(LinearGelu), "linear_gelu", x, w, input, bias: b, gelu: y);
        } else {
            Linear(x, w, b, input);
            Gelu(input, y);
        }
    }

    public void LinearBackward(Tensor dy, Tensor x, Tensor w, Tensor dx, Tensor dw) {
        const string operation = nameof(LinearBackward);
        if (IsForHopper(x, w))
            LaunchProduct(operation, "linear_backward", dy, w, dx);
        else
            Multiply(operation, w, false, dy, false, dx);
        Multiply(operation, x, false, dy, true, dw, addend: dw);
    }

    public void LinearGeluBackward(Tensor dy, Tensor x, Tensor input, Tensor w, Tensor dx, Tensor dw, Tensor dbias) {
        const string operation = nameof(LinearGeluBackward);
        if (IsForHopper(x, w)) {
            LaunchProduct(operation, "linear_gelu_backward", dy, w, dx, gelu: input, partial: scratch);
            AddPartialSums(scratch, Blocks(x.AllRows, 64), dbias);
        } else {
            Multiply(operation, w, false, dy, false, dx);
            Launch("gelu_backward", (Blocks(dx.Count, 256 * Width), 1, 1), 256, 0, 0, 3.0 * dx.Bytes,
                input, dx, dx.Count);
            AddRows(dx, dbias);
        }
        Multiply(operation, x, false, dy, true, dw, addend: dw);
    }

    /// <summary>sums (C) += Σ x (rows, C) over rows.</summary>
    void AddRows(Tensor x, Tensor sums) {
        const int blocksPerMultiprocessor = 8, fewestRows = 32;
        var (rows, C) = (x.AllRows, x.Columns);
        var across = Blocks(C, SumColumns);
        var down = Math.Min(Blocks(rows, fewestRows), Blocks(blocksPerMultiprocessor * multiprocessors, across));
        down = Math.Min(down, ScratchBytes / (C * sizeof(float)));
        Launch("sum_rows_partially", (down, across, 1), SumColumns, 0, 0, x.Bytes, x, rows, C, scratch);
        AddPartialSums(scratch, down, sums);
    }

    /// <summary>Adds partial (n, rows, C), summed over rows, to the first n of db, dw and dbias (C).</summary>
    void AddPartialSums(nint partial, int rows, Tensor db, Tensor dw = default, Tensor dbias = default) {
        var (C, sums) = (db.Columns, dw.Address == 0 ? 1 : dbias.Address == 0 ? 2 : 3);
        Launch("add_row_sums", (1, Blocks(C, AddColumns), sums), SumColumns, 0, 0, 4.0 * rows * C * sums,
            partial, rows, C, db, dw, dbias);
    }

    public void Gelu(Tensor x, Tensor y) =>
        Launch("gelu", (Blocks(x.Count, 256 * Width), 1, 1), 256, 0, 0, 2.0 * x.Bytes, x, y, x.Count);

    /// <summary>c = alpha·a·b + bias + beta·addend by cuBLASLt, which takes our rows for columns: to it a is (M, K), or
    /// (K, M) if transposed; b is (K, N) or (N, K); c and addend are (M, N); bias is (M). All but bias may be batches.
    /// </summary>
    void Multiply(string operation, Tensor a, bool transposeA, Tensor b, bool transposeB, Tensor c,
        Tensor bias = default, Tensor addend = default, float alpha = 1, float beta = 1, int batch = 1) {
        Enter();
        var start = Begin();
        var kind = new ProductKind(c.Columns, c.AllRows / batch, transposeA ? a.Columns : a.AllRows / batch, transposeA,
            transposeB, bias.Address != 0, alpha, addend.Address != 0 ? beta : 0, batch, a.Type, c.Type);
        products.Multiply(kind, a, b, c, bias, addend);
        if (Profile != null || verbose)
            End(start, $"{operation} {kind.M} x {kind.N} x {kind.K}", 2.0 * batch * kind.M * kind.N * kind.K, 0);
    }

    /// <summary>True if products of x and w are for Hopper's own kernels: large ones, with rows that TMA can copy and
    /// scratch memory for the sums of their columns.</summary>
    bool IsForHopper(Tensor x, Tensor w) => hopper && x.AllRows >= 512 && x.Columns % Width == 0 &&
        w.AllRows % Width == 0 && (long)Blocks(x.AllRows, 64) * x.Columns * sizeof(float) <= ScratchBytes;

    /// <summary>c (M, N) = a·b by one of those kernels; Kernels.cu says what each does with the rest.</summary>
    void LaunchProduct(string operation, string kernel, Tensor a, Tensor b, Tensor c, Tensor residual = default,
        Tensor bias = default, Tensor gelu = default, nint ofRows = 0, nint partial = 0, int vocabulary = 0) {
        const int rows = 128, columns = 192, depth = 64, stages = 4, threads = 480, alignment = 1 << 10;
        const int shared = alignment + (stages * (rows + columns) * depth + rows * columns) * 2;
        var (M, N, K) = (a.AllRows, c.Columns, a.Columns);
        Launch($"{operation} {M} x {N} x {K}", kernel, (multiprocessors / 2 * 2, 1, 1), threads, shared,
            2.0 * M * N * K, 0, Map(0, a), Map(1, b), Map(2, c), residual.Address == 0 ? Map(2, c) : Map(3, residual),
            bias, gelu, ofRows, partial, M, N, K, vocabulary);
    }

    /// <summary>Describes a matrix to TMA, which copies 32 rows of 64 columns at a time.</summary>
    Argument Map(int index, Tensor x) => Map(index, x, [(ulong)x.Columns, (ulong)x.AllRows], [64, 32]);

    /// <summary>Describes an array to TMA: its dimensions, and the box that is copied at a time, the fastest dimension
    /// first. There can be four descriptions at a time, with index 0 to 3.</summary>
    Argument Map(int index, Tensor x, ReadOnlySpan<ulong> dimensions, ReadOnlySpan<uint> box) {
        const int bf16 = 9, swizzle128 = 3, promote128 = 2;
        var place = maps + MapBytes * index;
        var strides = stackalloc ulong[dimensions.Length];
        var steps = stackalloc uint[dimensions.Length];
        var bytes = 2ul;
        for (var i = 0; i < dimensions.Length; i++)
            (strides[i], steps[i]) = (bytes *= dimensions[i], 1);
        fixed (ulong* sizes = dimensions)
        fixed (uint* sides = box) {
            Check(cuTensorMapEncodeTiled(place, bf16, dimensions.Length, x.Address, sizes, strides, sides, steps, 0,
                swizzle128, promote128, 0), "describing a tensor");
        }
        return new Argument(0, place);
    }

    // ---- Attention

    const int FlashHead = 64, FlashTile = 64, FlashRows = 128, FlashThreads = 256, AnyThreads = 256;

    /// <summary>Bytes of shared memory for tiles, and a ring of pairs of tiles with their statistics.</summary>
    int FlashShared(int tiles, int statistics) {
        const int tile = FlashTile * FlashHead * 2, alignment = 1 << 10;
        return alignment + tiles * tile + (hopper ? 3 : 2) * (2 * tile + statistics);
    }

    /// <summary>Describes x (B, T, heads·64) to TMA, which copies 64 rows of a head at a time.</summary>
    Argument HeadsMap(int index, Tensor x) => !hopper ? new Argument(0, maps) : Map(index, x,
        [FlashHead, (ulong)(x.Columns / FlashHead), (ulong)x.Rows, (ulong)x.Depth], [FlashHead, 1, FlashTile, 1]);

    public void Attention(Tensor qkv, int heads, Tensor y, Tensor lse) {
        var (B, T, HS) = (qkv.Depth, qkv.Rows, y.Columns / heads);
        RequireColumns(y.Columns);
        Require(HS <= LargestHead, "the channels of a head", $"at most {LargestHead}", HS);
        Require(B <= MostSequences, "the batch", $"at most {MostSequences} sequences", B);
        var flops = 2.0 * B * T * (T + 1) * y.Columns;
        if (Precision == DataType.Bf16 && HS == FlashHead) {
            Launch(hopper ? "attention_hopper" : "attention", (Blocks(T, FlashRows), heads, B), FlashThreads,
                FlashShared(2, 0), flops, 0, HeadsMap(0, qkv), qkv, y, lse, T, heads);
        } else {
            Launch("attention_any", (T, heads, B), AnyThreads, 0, flops, 0, qkv, y, lse, T, heads, HS);
        }
    }

    public void AttentionBackward(Tensor dy, Tensor qkv, Tensor y, Tensor lse, int heads, Tensor dqkv, Tensor dbias) {
        var (B, T, C, HS) = (qkv.Depth, qkv.Rows, y.Columns, y.Columns / heads);
        Require(B <= MostSequences, "the batch", $"at most {MostSequences} sequences", B);
        // Scratch memory holds two numbers a query, padded to whole tiles, and then each block's sums.
        var statistics = (long)B * heads * Blocks(T, FlashTile) * FlashTile * 2 * sizeof(float);
        var all = statistics + (long)B * Blocks(T, FlashRows) * 2 * C * sizeof(float);
        Require(all <= ScratchBytes, "attention's scratch memory", $"at most {ScratchBytes} bytes", all);
        // Scores and their gradients are computed for dq (three products) and again for dk and dv (four).
        var flops = 1.0 * B * T * (T + 1) * C;
        if (Precision != DataType.Bf16 || HS != FlashHead) {
            Launch("attention_any_backward_q", (T, heads, B), AnyThreads, 0, 3 * flops, 0,
                dy, qkv, y, lse, scratch, dqkv, T, heads, HS);
            Launch("attention_any_backward_kv", (T, heads, B), AnyThreads, 0, 4 * flops, 0,
                dy, qkv, lse, scratch, dqkv, T, heads, HS);
            AddRows(dqkv, dbias);
            return;
        }
        var (partial, map, dyMap) = (scratch + (nint)statistics, HeadsMap(0, qkv), HeadsMap(1, dy));
        var (blocks, rows) = (Blocks(T, FlashRows), hopper ? 192 : FlashRows);
        Launch(hopper ? "attention_backward_q_hopper" : "attention_backward_q", (blocks, heads, B), FlashThreads,
            FlashShared(4, 0), 3 * flops, 0, map, dyMap, dy, qkv, y, lse, scratch, dqkv, partial, T, heads);
        AddPartialSums(partial, B * blocks, dbias.Flat(0, C));
        blocks = Blocks(T, rows);
        Launch(hopper ? "attention_backward_kv_hopper" : "attention_backward_kv", (blocks, heads, B), 2 * rows,
            FlashShared(rows / 32, FlashTile * 8), 4 * flops, 0,
            map, dyMap, dy, qkv, scratch, dqkv, partial, T, heads);
        AddPartialSums(partial, B * blocks, dbias.Flat(C, 2 * C));
    }

    // ---- Classifier

    public void Classify(Tensor logits, ReadOnlySpan<int> targets, int vocabulary, Tensor losses, float gradientScale) {
        const int threads = 512, ownShared = 1 << 10;
        Require(logits.Columns % Width == 0, "the padded vocabulary", $"a multiple of {Width}", logits.Columns);
        var row = logits.Columns * logits.ElementSize;
        var keeps = row <= largestShared - ownShared && Precision == DataType.Bf16;
        Launch("classify", (logits.AllRows, 1, 1), threads, keeps ? row : 0, 0, (gradientScale == 0 ? 1.0 : 2) *
            logits.Bytes, logits, Upload(targets), losses, gradientScale, vocabulary, logits.Columns, keeps ? 1 : 0);
    }

    public void LinearClassify(Tensor x, Tensor w, ReadOnlySpan<int> targets, int vocabulary, Tensor logits,
        Tensor losses, float gradientScale, Tensor dx, Tensor dw) {
        const string operation = nameof(LinearClassify);
        // Rounding small exponentials pays, and does no harm, where there are many.
        const int rowsOfBlock = 32, threads = 256, chunk = 64, manyClasses = 10_000;
        var (rows, C, Vp, chunks) = (x.AllRows, x.Columns, w.AllRows, Blocks(w.AllRows, chunk));
        if (gradientScale == 0 || vocabulary < manyClasses || !IsForHopper(x, w) ||
            (chunks + 2L) * rows * sizeof(float) > ScratchBytes) {
            Linear(x, w, default, logits);
            Classify(logits, targets, vocabulary, losses, gradientScale);
            if (gradientScale != 0)
                LinearBackward(logits, x, w, dx, dw);
            return;
        }
        // Scratch memory holds two numbers a row, and then each row's sums over the chunks of columns.
        var (places, partial) = (Upload(targets), scratch + 2 * rows * sizeof(float));
        Launch("target_logits", (Blocks(rows, threads / 32), 1, 1), threads, 0, 0, 2.0 * x.Bytes,
            x, w, places, scratch, rows, C, vocabulary);
        LaunchProduct(
            operation, "linear_exponentials", x, w, logits, ofRows: scratch, partial: partial, vocabulary: vocabulary);
        Launch("normalize_classes", (Blocks(rows, rowsOfBlock), 1, 1), threads, 0, 0,
            2.0 * x.Bytes + (double)chunks * rows * sizeof(float),
            partial, chunks, places, logits, x, dx, scratch, losses, gradientScale, rows, Vp, C);
        // Until the last product, dx holds x, each row multiplied by the factor that its exponentials lack.
        Multiply(operation, dx, false, logits, true, dw, addend: dw);
        LaunchProduct(operation, "linear_backward_scaled", logits, w, dx, ofRows: scratch);
    }

    // ---- Optimizer

    public double SumOfSquares(Tensor x) {
        const int blocks = 1024, threads = 256;
        Launch("sum_of_squares", (blocks, 1, 1), threads, 0, 0, x.Bytes, x, x.Count, scratch);
        var sum = 0.0;
        foreach (var part in Download<double>(scratch, blocks))
            sum += part;
        return sum;
    }

    /// <summary>An AdamWPart as the kernel's struct.</summary>
    readonly record struct PartArguments(
        long First, long Count, long Decays, nint W, nint Master, nint Dw, nint M, nint V);

    public void AdamW(ReadOnlySpan<AdamWPart> parts, in AdamWStep step) {
        const int threads = 256, blocksPerMultiprocessor = 8;
        Span<PartArguments> arguments = stackalloc PartArguments[parts.Length];
        var bytes = 0.0;
        for (var i = 0; i < parts.Length; i++) {
            var part = parts[i];
            arguments[i] = new(part.First, part.W.Count, part.Decays ? 1 : 0, part.W.Address, part.Master.Address,
                part.Dw.Address, part.M.Address, part.V.Address);
            bytes += part.W.Count * (8.0 * sizeof(float) + (Precision == DataType.Bf16 ? 2 : 0));
        }
        Launch("adamw", (blocksPerMultiprocessor * multiprocessors, parts.Length, 1), threads, 0, 0, bytes,
            Upload<PartArguments>(arguments), step.LearningRate, step.WeightDecay,
            step.GradientScale, step.Beta1, step.Beta2, step.Epsilon, 1 / (1 - MathF.Pow(step.Beta1, step.Number)),
            1 / (1 - MathF.Pow(step.Beta2, step.Number)), (int)step.Seed);
    }

    (nint Address, long Bytes) muon; // scratch memory, from the first update on

    public void Muon(ReadOnlySpan<MuonPart> parts, in MuonStep step) {
        const int threads = 256, blocks = 64, steps = 5, usualBytes = MuonStep.ScratchBytes;
        const float a = MuonStep.A, b = MuonStep.B, c = MuonStep.C;
        foreach (var (index, w, master, dw, m) in parts) {
            var (isTall, size, side) = (w.Rows > w.Columns, w.Rows * w.Columns, Math.Min(w.Rows, w.Columns));
            var bytes = 2L * (size + side * side) * w.ElementSize; // of a matrix's x, next x, A and b·A + c·A²
            if (bytes > muon.Bytes)
                muon = (Allocate(Math.Max(bytes, usualBytes)), Math.Max(bytes, usualBytes));
            var (most, sums) = ((int)(muon.Bytes / bytes), Blocks(size, threads * Width));
            for (var first = 0; first < w.Depth; first += most) {
                var n = Math.Min(most, w.Depth - first);
                var x = w with { Address = muon.Address, Depth = n };
                var next = x with { Address = x.Address + (nint)x.Bytes };
                var A = new Tensor(next.Address + (nint)x.Bytes, n, side, side, w.Type);
                var B = A with { Address = A.Address + (nint)A.Bytes };
                Launch("muon_momentum", (sums, n, 1), threads, 0, 0, 4.0 * sizeof(float) * x.Count + x.Bytes,
                    dw[first], m[first], x, scratch, size, step.GradientScale, step.Momentum);
                Launch("muon_normalize", (blocks, n, 1), threads, 0, 0, 2.0 * x.Bytes, x, scratch, sums, size);
                for (var i = 0; i < steps; i++) {
                    Multiply(nameof(Muon), x, !isTall, x, isTall, A, batch: n);
                    Multiply(nameof(Muon), A, false, A, false, B, default, A, c, b, n);
                    Multiply(nameof(Muon), isTall ? B : x, false, isTall ? x : B, false, next, default, x, 1, a, n);
                    (x, next) = (next, x);
                }
                Launch("muon", (Blocks(x.Count, threads * Width), 1, 1), threads, 0, 0,
                    2.0 * sizeof(float) * x.Count + 2.0 * x.Bytes, x, master[first], w[first], x.Count,
                    index + (long)first * size, 1 - step.LearningRate * step.WeightDecay, step.RateOf(w),
                    (int)step.Seed);
            }
        }
    }

    // ---- Generation

    /// <summary>The kernel's structs, which Kernels.cu describes.</summary>
    readonly record struct OperationArguments(int Kind, int N, int K, int T, int Heads, int Turn, nint X, nint NormW,
        nint NormB, nint B, nint W, nint Y);
    readonly record struct DecodeArguments(nint Program, nint Tokens, nint Maxima, nint Sums, nint Normed,
        nint Arrivals, nint Mail, int BoxWords, int Slots, int Length, int Rows, int Position, int Shared, int Count,
        int Drawn, int First, int TopK, int Selects, float Temperature, float TopP, uint Seed, uint Time);

    public int DecodeSteps => 64;

    uint decodeTime; // of the last operation of the last launch

    public void Decode(ReadOnlySpan<Operation> program, in Choice choice, int position, int shared,
        ReadOnlySpan<int> tokens, Span<int> next) {
        const int warps = 8, threads = 32 * warps, channels = 8, slice = 768, mostSlots = 16;
        var arguments = new OperationArguments[program.Length];
        var blocks = Math.Min(multiprocessors, program.ToArray().Max(op => Blocks(op.W.AllRows, channels)));
        var (bytes, turn, V, wholeHeads) = (0.0, 0, program[^1].X.Columns, true);
        foreach (var (i, (kind, x, w, b, y, normW, normB, heads)) in program.ToArray().Index()) {
            Require(w.Columns % Width == 0, "the number of channels", $"a multiple of {Width}", w.Columns);
            var headSize = heads == 0 ? 0 : y.Columns / heads;
            Require(headSize <= LargestHead, "the channels of a head", $"at most {LargestHead}", headSize);
            wholeHeads &= headSize % Width == 0;
            var K = kind == OperationKind.Attention ? y.Columns : w.Address != 0 ? w.Columns : x.Columns;
            arguments[i] = new((int)kind, y.Columns, K, kind == OperationKind.Attention ? x.Rows : y.Rows, heads, turn,
                x.Address, normW.Address, normB.Address, b.Address, w.Address, y.Address);
            (bytes, turn) = (bytes + w.Bytes, (turn + Blocks(w.AllRows, channels)) % blocks);
        }
        // Few rows go by mail, if it has room for them: a box for each kind of operation, and parts of attention.
        const int few = 8, kinds = 7, partKeys = 128;
        var (rows, count, C) = (tokens.Length, next.Length / tokens.Length, program[0].Y.Columns);
        var widest = arguments.Max(op => op.W == 0 || op.N == V ? 0 : Math.Max(op.N, op.K));
        var mailWords = (long)rows * (widest / 4 * kinds + C * Blocks(arguments.Max(op => op.T), partKeys));
        var byMail = Precision == DataType.Bf16 && program[0].Kind == OperationKind.Embed && wholeHeads &&
            rows * Blocks(C, 4 * threads) <= few && C <= 2 * 4 * threads && mailWords * 16 <= MailBytes;
        // Shared memory has slots for weights, sums, the program and, with mail, the rows of a product.
        const int rowBytes = 64, slotHeader = 16, sums = threads * 4 * warps * sizeof(float), own = 1024;
        var slot = slotHeader + channels * (slice * Tensor.SizeOf(Precision) + rowBytes);
        var others = sums + (program.Length * sizeof(OperationArguments) + 15) / 16 * 16;
        var room = largestShared - own - others;
        byMail &= room - rows * widest * 2 >= slot;
        room -= byMail ? rows * widest * 2 : 0;
        Require(room >= slot, "the layers' shared memory", $"at most {largestShared}", others + own + slot);
        var slots = Math.Min(mostSlots, room / slot);
        // Staging memory has the arrivals, then the tokens, the known ones first.
        var places = Upload<int>([0, .. tokens, .. next]);
        var run = new DecodeArguments(Upload<OperationArguments>(arguments), places + sizeof(int), scratch,
            scratch + ScratchBytes / 2, scratch + ScratchBytes / 4 * 3, places, mail, rows * widest / 4, slots,
            arguments.Length, rows, position, shared, count, choice.Drawn, choice.Sample, choice.TopK,
            choice.Selects(V) ? 1 : 0, choice.Temperature, choice.TopP, choice.Seed, decodeTime);
        decodeTime += (uint)(count * program.Length);
        Launch(byMail ? "decode" : "decode_many", (blocks, 1, 1), threads + 32,
            largestShared - own - room + slots * slot, 2.0 * count * rows * bytes / Tensor.SizeOf(Precision),
            count * bytes, new Argument(0, (nint)(&run)));
        Download<int>(places + sizeof(int) * (1 + rows), next.Length).CopyTo(next);
        if (next.ContainsAnyInRange(V, int.MaxValue))
            throw new Gpt2Exception("--init: expected finite logits, found others: the weights are too large");
    }

    // ---- What the GPU can do

    /// <summary>Dense bf16 operations a second by the data sheets; the first match of a GPU's name counts.</summary>
    static readonly (string Name, double Flops)[] DataSheets = [
        ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H200", 989e12), ("GH200", 989e12),
        ("A100", 312e12), ("A800", 312e12), ("A6000", 155e12), ("A40", 150e12), ("A10", 125e12), ("L40S", 362e12),
        ("L40", 181e12), ("L4", 121e12), ("RTX 4090", 165e12), ("RTX 3090", 71e12),
    ];

    public double PeakFlops() {
        var known = DataSheets.FirstOrDefault(sheet => Name.Contains(sheet.Name)).Flops;
        return Precision == DataType.Bf16 && known > 0 ? known : MeasureCeilings().Flops;
    }

    public (double Flops, double Bytes) MeasureCeilings() {
        const int rounds = 10;
        var n = Precision == DataType.Bf16 ? 8192 : 2048;
        var all = new Tensor(0, 4, n, n, Precision);
        Check(cuMemAlloc_v2(out var memory, (nuint)all.Bytes), "allocating memory to measure with");
        all = all with { Address = memory };
        var (x, w, y) = (all[0], all[1], all[2]);
        var (random, values) = (new Mt19937(1), new float[Tensor.ChunkSize]);
        foreach (var part in (all with { Depth = 2 }).Chunks()) {
            random.Normal(values, 1); // products of zeros, or of repeated rows, would take less power and time
            Write(part, values);
        }
        Linear(x, w, default, y);
        var (copied, multiplied) = (new double[rounds], new double[rounds]);
        for (var round = 0; round < rounds; round++) {
            multiplied[round] = Time(() => Linear(x, w, default, y));
            copied[round] =
                Time(() => Check(cuMemcpyAsync(y.Address, memory, (nuint)all.Bytes / 2, stream), "copying"));
        }
        cuMemFree_v2(memory);
        Array.Sort(multiplied);
        Array.Sort(copied);
        return (2.0 * n * n * n / multiplied[rounds / 2], all.Bytes / copied[rounds / 2]);

        double Time(Action queue) {
            var start = Record();
            queue();
            var end = Record();
            Check(cuStreamSynchronize(stream), "timing");
            return SecondsBetween(start, end);
        }
    }
}

/// <summary>A kernel's argument: its bits, from the lowest, or the address of one larger than 8 bytes.</summary>
readonly record struct Argument(long Bits, nint Place = 0) {
    public static implicit operator Argument(Tensor tensor) => new(tensor.Address);
    public static implicit operator Argument(long value) => new(value); // and int and nint
    public static implicit operator Argument(float value) => new(BitConverter.SingleToInt32Bits(value));
}

/// <summary>A kind of product, with columns contiguous: c (Batch, M, N) = a (Batch, M, K)·b (Batch, K, N).</summary>
readonly record struct ProductKind(int M, int N, int K, bool TransposeA, bool TransposeB, bool HasBias, float Alpha,
    float Beta, int Batch, DataType Input, DataType Output);

/// <summary>Products by cuBLASLt.</summary>
sealed unsafe class Products(nint stream, nint workspace, long workspaceBytes) : IDisposable {
    readonly Dictionary<ProductKind, Plan> plans = [];
    readonly nint handle = Start();

    static nint Start() {
        try {
            CheckProducts(cublasLtCreate(out var handle), "starting cuBLASLt");
            return handle;
        } catch (DllNotFoundException) {
            throw new Gpt2Exception("--device cuda: expected cuBLASLt (libcublasLt.so.13 or .12, on the loader's " +
                "path or in $CUDA_HOME/lib64), found none");
        }
    }

    /// <summary>cuBLASLt's descriptions of a product and its matrices, and the algorithm it proposes.</summary>
    sealed record Plan(nint Operation, nint A, nint B, nint C, Heuristic Algorithm);

    /// <summary>c = Alpha·a·b + bias + Beta·addend.</summary>
    public void Multiply(ProductKind kind, Tensor a, Tensor b, Tensor c, Tensor bias, Tensor addend) {
        if (!plans.TryGetValue(kind, out var plan))
            plans[kind] = plan = NewPlan(kind, a, b, c);
        if (kind.HasBias)
            Set(plan.Operation, Attribute.Bias, bias.Address);
        var (alpha, beta, algorithm) = (kind.Alpha, kind.Beta, plan.Algorithm);
        var status = cublasLtMatmul(handle, plan.Operation, &alpha, a.Address, plan.A, b.Address, plan.B, &beta,
            beta != 0 ? addend.Address : c.Address, plan.C, c.Address, plan.C, &algorithm, workspace,
            (nuint)workspaceBytes, stream);
        if (status != 0)
            CheckProducts(status, $"the product {kind}");
    }

    Plan NewPlan(ProductKind kind, Tensor a, Tensor b, Tensor c) {
        const int computeFp32 = 68, fp32 = 0, bf16 = 14, addBias = 4;
        CheckProducts(cublasLtMatmulDescCreate(out var operation, computeFp32, fp32), "describing a product");
        Set(operation, Attribute.TransposeA, kind.TransposeA ? 1 : 0);
        Set(operation, Attribute.TransposeB, kind.TransposeB ? 1 : 0);
        if (kind.HasBias)
            Set(operation, Attribute.Epilogue, addBias);
        nint Layout(Tensor x) {
            const int batchCount = 5, batchStride = 6;
            var (batch, rows) = (kind.Batch, x.AllRows / kind.Batch);
            var stride = (long)rows * x.Columns;
            CheckProducts(cublasLtMatrixLayoutCreate(out var layout, x.Type == DataType.Fp32 ? fp32 : bf16,
                (ulong)x.Columns, (ulong)rows, x.Columns), "describing a product");
            CheckProducts(cublasLtMatrixLayoutSetAttribute(layout, batchCount, &batch, 4), "describing a batch");
            CheckProducts(cublasLtMatrixLayoutSetAttribute(layout, batchStride, &stride, 8), "describing a batch");
            return layout;
        }
        var plan = new Plan(operation, Layout(a), Layout(b), Layout(c), default);
        const int largestWorkspace = 1, reductionSchemes = 3, throughWorkspace = 6; // which fixes the order of sums
        CheckProducts(cublasLtMatmulPreferenceCreate(out var preference), "preferences");
        var (bytes, schemes) = (workspaceBytes, throughWorkspace);
        CheckProducts(cublasLtMatmulPreferenceSetAttribute(preference, largestWorkspace, &bytes, 8), "preferences");
        CheckProducts(cublasLtMatmulPreferenceSetAttribute(preference, reductionSchemes, &schemes, 4), "preferences");
        Heuristic proposal;
        CheckProducts(cublasLtMatmulAlgoGetHeuristic(handle, operation, plan.A, plan.B, plan.C, plan.C, preference, 1,
            &proposal, out var found), $"finding an algorithm for the product {kind}");
        cublasLtMatmulPreferenceDestroy(preference);
        return found > 0 ? plan with { Algorithm = proposal }
            : throw new Gpt2Exception($"cuBLASLt: expected an algorithm for the product {kind}, found none");
    }

    enum Attribute { TransposeA = 3, TransposeB = 4, Epilogue = 7, Bias = 8 }

    static void Set<T>(nint operation, Attribute attribute, T value) where T : unmanaged => CheckProducts(
        cublasLtMatmulDescSetAttribute(operation, (int)attribute, &value, (nuint)sizeof(T)), "describing a product");

    public void Dispose() {
        foreach (var plan in plans.Values) {
            cublasLtMatmulDescDestroy(plan.Operation);
            cublasLtMatrixLayoutDestroy(plan.A);
            cublasLtMatrixLayoutDestroy(plan.B);
            cublasLtMatrixLayoutDestroy(plan.C);
        }
        cublasLtDestroy(handle);
    }
}

/// <summary>The driver API, as far as we call it; in cuda.h macros hide the suffix _v2.</summary>
static unsafe partial class Driver {
    const string Library = "cuda";
    public const int NoBinaryForGpu = 209;

    /// <exception cref="Gpt2Exception">The call failed: what we were doing, and CUDA's name for the error.</exception>
    public static void Check(int status, string doing) {
        if (status == 0)
            return;
        cuGetErrorName(status, out var name);
        cuGetErrorString(status, out var text);
        throw new Gpt2Exception($"--device cuda: {doing}: expected success, found {Marshal.PtrToStringUTF8(name)} " +
            $"({Marshal.PtrToStringUTF8(text)})");
    }

    [LibraryImport(Library)] public static partial int cuInit(uint flags);
    [LibraryImport(Library)] public static partial int cuDriverGetVersion(out int version);
    [LibraryImport(Library)] public static partial int cuGetErrorName(int status, out nint text);
    [LibraryImport(Library)] public static partial int cuGetErrorString(int status, out nint text);
    [LibraryImport(Library)] public static partial int cuDeviceGetCount(out int count);
    [LibraryImport(Library)] public static partial int cuDeviceGet(out int device, int ordinal);
    [LibraryImport(Library)] public static partial int cuDeviceGetName(byte* name, int length, int device);
    [LibraryImport(Library)] public static partial int cuDeviceGetAttribute(out int value, int attribute, int device);
    [LibraryImport(Library)] public static partial int cuDevicePrimaryCtxRetain(out nint context, int device);
    [LibraryImport(Library)] public static partial int cuDevicePrimaryCtxRelease_v2(int device);
    [LibraryImport(Library)] public static partial int cuCtxSetCurrent(nint context);
    [LibraryImport(Library)] public static partial int cuModuleLoadData(out nint module, nint image);
    [LibraryImport(Library)] public static partial int cuModuleUnload(nint module);
    [LibraryImport(Library, StringMarshalling = StringMarshalling.Utf8)]
    public static partial int cuModuleGetFunction(out nint function, nint module, string name);
    [LibraryImport(Library)] public static partial int cuFuncSetAttribute(nint function, int attribute, int value);
    [LibraryImport(Library)]
    public static partial int cuLaunchKernel(nint function, int gridX, int gridY, int gridZ, int blockX, int blockY,
        int blockZ, int shared, nint stream, nint* parameters, nint* extra);
    [LibraryImport(Library)]
    public static partial int cuLaunchCooperativeKernel(nint function, int gridX, int gridY, int gridZ, int blockX,
        int blockY, int blockZ, int shared, nint stream, nint* parameters);
    [LibraryImport(Library)]
    public static partial int cuTensorMapEncodeTiled(nint map, int type, int rank, nint address, ulong* dimensions,
        ulong* strides, uint* box, uint* steps, int interleave, int swizzle, int promotion, int fill);
    [LibraryImport(Library)]
    public static partial int cuStreamCreateWithPriority(out nint stream, uint flags, int priority);
    [LibraryImport(Library)] public static partial int cuStreamWaitEvent(nint stream, nint @event, uint flags);
    [LibraryImport(Library)] public static partial int cuEventQuery(nint @event);
    [LibraryImport(Library)] public static partial int cuProfilerStart();
    [LibraryImport(Library)] public static partial int cuProfilerStop();
    [LibraryImport(Library)] public static partial int cuStreamSynchronize(nint stream);
    [LibraryImport(Library, EntryPoint = "cuStreamDestroy_v2")] public static partial int cuStreamDestroy(nint stream);
    [LibraryImport(Library)] public static partial int cuEventCreate(out nint @event, uint flags);
    [LibraryImport(Library)] public static partial int cuEventRecord(nint @event, nint stream);
    [LibraryImport(Library)] public static partial int cuEventElapsedTime(out float milliseconds, nint start, nint end);
    [LibraryImport(Library, EntryPoint = "cuEventDestroy_v2")] public static partial int cuEventDestroy(nint @event);
    [LibraryImport(Library)] public static partial int cuMemAlloc_v2(out nint address, nuint bytes);
    [LibraryImport(Library)] public static partial int cuMemFree_v2(nint address);
    [LibraryImport(Library)] public static partial int cuMemAllocHost_v2(out nint address, nuint bytes);
    [LibraryImport(Library)] public static partial int cuMemFreeHost(nint address);
    [LibraryImport(Library)] public static partial int cuMemGetInfo_v2(out nuint free, out nuint total);
    [LibraryImport(Library)] public static partial int cuMemsetD8Async(nint to, byte value, nuint bytes, nint stream);
    [LibraryImport(Library)] public static partial int cuMemcpyAsync(nint to, nint from, nuint bytes, nint stream);
}

/// <summary>cuBLASLt, as far as we call it.</summary>
static unsafe partial class CublasLt {
    const string Library = "cublasLt";

    /// <exception cref="Gpt2Exception">The call failed: what we were doing, and the error by its name.</exception>
    public static void CheckProducts(int status, string doing) {
        if (status != 0)
            throw new Gpt2Exception($"--device cuda: {doing}: expected success, found " +
                $"{Marshal.PtrToStringUTF8(cublasLtGetStatusName(status))}");
    }

    /// <summary>An algorithm (64 bytes), the size of its workspace, and more.</summary>
    [StructLayout(LayoutKind.Sequential, Size = 96)]
    public struct Heuristic;

    [LibraryImport(Library)] public static partial nint cublasLtGetStatusName(int status);
    [LibraryImport(Library)] public static partial int cublasLtCreate(out nint handle);
    [LibraryImport(Library)] public static partial int cublasLtDestroy(nint handle);
    [LibraryImport(Library)]
    public static partial int cublasLtMatmulDescCreate(out nint operation, int compute, int scale);
    [LibraryImport(Library)] public static partial int cublasLtMatmulDescDestroy(nint operation);
    [LibraryImport(Library)]
    public static partial int cublasLtMatmulDescSetAttribute(nint operation, int attribute, void* value, nuint bytes);
    [LibraryImport(Library)] public static partial int cublasLtMatrixLayoutCreate(
        out nint layout, int type, ulong rows, ulong columns, long stride);
    [LibraryImport(Library)] public static partial int cublasLtMatrixLayoutDestroy(nint layout);
    [LibraryImport(Library)] public static partial int cublasLtMatrixLayoutSetAttribute(
        nint layout, int attribute, void* value, nuint bytes);
    [LibraryImport(Library)] public static partial int cublasLtMatmulPreferenceCreate(out nint preference);
    [LibraryImport(Library)] public static partial int cublasLtMatmulPreferenceDestroy(nint preference);
    [LibraryImport(Library)] public static partial int cublasLtMatmulPreferenceSetAttribute(
        nint preference, int attribute, void* value, nuint bytes);
    [LibraryImport(Library)]
    public static partial int cublasLtMatmulAlgoGetHeuristic(nint handle, nint operation, nint a, nint b, nint c,
        nint d, nint preference, int wanted, Heuristic* results, out int found);
    [LibraryImport(Library)] public static partial int cublasLtMatmul(
        nint handle, nint operation, void* alpha, nint a, nint aLayout, nint b, nint bLayout, void* beta, nint c,
        nint cLayout, nint d, nint dLayout, Heuristic* algorithm, nint workspace, nuint workspaceBytes, nint stream);
}

/// <summary>Finds the files of NVIDIA's libraries.</summary>
static class Libraries {
    [ModuleInitializer]
    public static void Register() => NativeLibrary.SetDllImportResolver(typeof(Libraries).Assembly, Resolve);

    static nint Resolve(string name, Assembly assembly, DllImportSearchPath? path) {
        string[] files = name switch {
            "cuda" => ["libcuda.so.1"],
            "cublasLt" => ["libcublasLt.so.13", "libcublasLt.so.12"],
            "nccl" => ["libnccl.so.2"],
            _ => [],
        };
        var home = Environment.GetEnvironmentVariable("CUDA_HOME") ?? "/usr/local/cuda";
        foreach (var file in files.Concat(files.Select(file => Path.Combine(home, "lib64", file)))) {
            if (NativeLibrary.TryLoad(file, out var library))
                return library;
        }
        return 0;
    }
}
