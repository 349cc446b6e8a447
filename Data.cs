using System.Buffers;
using System.IO.Compression;
using System.IO.Hashing;
using System.Runtime.Intrinsics;
using System.Text.Unicode;

namespace Gpt2;

/// <summary>An error that one sentence explains to the user: what was expected, and what was found.</summary>
/// <param name="usage">Whether the command line is at fault (exit status 2), not a file or the machine (1).</param>
public sealed class Gpt2Exception(string message, bool usage = false) : Exception(message) {
    public int ExitCode => usage ? 2 : 1;

    /// <summary>Throws unless a command-line option is right.</summary>
    public static void Require(bool right, string option, string expected, object found) {
        if (!right)
            throw new Gpt2Exception($"{option}: expected {expected}, found {found}", usage: true);
    }

    /// <summary>An exception's sentence. .NET's messages have the path in quotes; ours begin with it.</summary>
    public static string Sentence(Exception e) => (e, e.Message.Split('\'')) switch {
        (DecoderFallbackException, _) => "--prompt: expected UTF-8 on standard input, found bytes that are not",
        (FileNotFoundException or DirectoryNotFoundException, [_, var path, _]) =>
            $"{path}: expected a file of this name, found none",
        (UnauthorizedAccessException, [_, var path, _]) => Directory.Exists(path)
            ? $"{path}: expected a file, found a folder" : $"{path}: expected permission to use it, found none",
        (IOException, [_, var path, " already exists."]) => $"{path}: expected a folder, found a file",
        (IOException, [var cause, var path, var end]) =>
            $"{path}: expected to use it, found: {cause.TrimEnd(' ', ':')}{end.TrimEnd('.')}",
        (OutOfMemoryException, _) => "memory: expected more of it, found none left (is there a limit by ulimit -v?)",
        _ => e.Message,
    };
}

/// <summary>A binary file of llm.c, opened for reading: a header of 256 int32, which begins with a magic number and a
/// version, then data. All of it is little-endian.</summary>
public class BinaryFile : IDisposable {
    public const int HeaderLength = 256, HeaderBytes = HeaderLength * sizeof(int);

    readonly FileStream stream;

    /// <summary>Opens a file of another format.</summary>
    /// <param name="kind">What the file should be, for error messages.</param>
    public BinaryFile(string path, string kind) {
        stream = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read);
        Require(stream.CanSeek, $"{kind} in a file", "a pipe");
    }

    /// <summary>Opens a file and reads its header.</summary>
    /// <exception cref="Gpt2Exception">It is something else.</exception>
    public BinaryFile(string path, string kind, int magic, params ReadOnlySpan<int> versions) : this(path, kind) {
        Require(Length >= HeaderBytes, $"{kind} with a header of {HeaderBytes} bytes", $"a file of {Length} bytes");
        Read(Header.AsSpan());
        Check("magic number", 0, Header[0] == magic, $"of {kind} ({magic})");
        Check("version", 1, versions.Contains(Header[1]), $"of {kind} ({string.Join(" or ", versions.ToArray())})");
    }

    public int[] Header { get; } = new int[HeaderLength];

    /// <summary>Size of the file in bytes.</summary>
    public long Length => stream.Length;

    /// <summary>Throws unless a header field is right.</summary>
    public void Check(string name, int index, bool right, string expected) =>
        Require(right, $"{name} {expected}", $"{Header[index]}");

    /// <summary>Throws unless the file has exactly the size that its header implies.</summary>
    public void CheckSize(long bytes) => Require(Length == bytes, $"{bytes} bytes by its header", $"{Length} bytes");

    /// <summary>Throws unless everything has been read.</summary>
    public void CheckEnd() => CheckSize(stream.Position);

    /// <summary>Throws unless something about this file is right.</summary>
    public void Require(bool right, string expected, string found) {
        if (!right)
            throw Fail(expected, found);
    }

    /// <summary>Closes the file, and returns the exception that says what is wrong with it.</summary>
    /// <param name="found">May be any text from the file: its beginning becomes part of a line.</param>
    public Gpt2Exception Fail(string expected, string found) {
        Dispose();
        found = Regex.Replace(found.Length <= 200 ? found : $"{found[..200]}...", @"[\s\p{C}]+", " ");
        return new Gpt2Exception($"{stream.Name}: expected {expected}, found {found}");
    }

    /// <summary>Fills a span with the values that come next, or with those at a byte offset.</summary>
    public void Read<T>(Span<T> values, long? offset = null) where T : unmanaged {
        stream.Position = offset ?? stream.Position;
        var bytes = MemoryMarshal.AsBytes(values);
        if (stream.ReadAtLeast(bytes, bytes.Length, throwOnEndOfStream: false) < bytes.Length)
            throw Fail("more data", $"its end at byte {Length}");
    }

    /// <summary>Fills a span with the weights that come next in a model, whatever their type.</summary>
    public virtual void ReadWeights(Span<float> values) {
        if (Header[1] != 5) {
            Read(values);
            return;
        }
        // bf16 is read into the second half of the span, and widened from the front, before it is overwritten.
        var halves = MemoryMarshal.Cast<float, ushort>(values)[values.Length..];
        Read(halves);
        BFloat16.Widen(halves, values);
    }

    public void Dispose() => stream.Dispose();
}

/// <summary>Checks of arrays of numbers.</summary>
public static class Numbers {
    /// <summary>A value that is infinite or NaN, or null if there is none.</summary>
    public static float? NotFinite(ReadOnlySpan<float> values) {
        // Read as integers, infinity and NaN are the largest ones; with a sign, the last ones below 0.
        var bits = MemoryMarshal.Cast<float, int>(values);
        var i = Math.Max(bits.IndexOfAnyInRange(0x7f800000, int.MaxValue), bits.IndexOfAnyInRange(-0x800000, -1));
        return i < 0 ? null : values[i];
    }
}

/// <summary>Conversion between fp32 and bfloat16, which is the upper half of an fp32.</summary>
public static class BFloat16 {
    /// <summary>Converts to fp32, from the first value to the last.</summary>
    public static void Widen(ReadOnlySpan<ushort> from, Span<float> to) {
        for (var i = 0; i < to.Length; i++)
            to[i] = BitConverter.Int32BitsToSingle(from[i] << 16);
    }

    /// <summary>Rounds to the nearest bfloat16, ties to even.</summary>
    public static void Round(ReadOnlySpan<float> from, Span<ushort> to) {
        for (var i = 0; i < from.Length; i++) {
            var bits = BitConverter.SingleToUInt32Bits(from[i]);
            var up = 0x7fff + (bits >> 16 & 1);
            to[i] = (ushort)((float.IsNaN(from[i]) ? bits | 0x400000 : bits + up) >> 16);
        }
    }
}

/// <summary>Globbing, hashing, and atomic writes: a file appears under its name only when complete.</summary>
public static class Files {
    /// <summary>The files that match a path with * and ? in its last part, in ordinal order.</summary>
    public static string[] Glob(string pattern) {
        var folder = Path.GetDirectoryName(pattern) ?? "/";
        var directory = new DirectoryInfo(Path.Combine(".", folder));
        var options = new EnumerationOptions { MatchType = MatchType.Simple };
        var files = directory.Exists ? directory.GetFiles(Path.GetFileName(pattern), options) : [];
        return [.. files.Select(file => Path.Combine(folder, file.Name)).Order(StringComparer.Ordinal)];
    }

    /// <summary>Writes a file, or what a link to one leads to, under a temporary name, flushes it to disk, and renames
    /// it. Creates its folder.</summary>
    public static void Write(string path, Action<Stream> content) {
        var target = File.Exists(path) ? File.ResolveLinkTarget(path, returnFinalTarget: true)?.FullName ?? path : path;
        var (temporary, full) = (target + ".tmp", Path.GetFullPath(target));
        if (full.StartsWith("/dev/") || full.StartsWith("/proc/"))
            throw new Gpt2Exception($"{path}: expected a file to write, found a device");
        Directory.CreateDirectory(Path.GetDirectoryName(full)!);
        try {
            using (var stream = new FileStream(temporary, FileMode.Create, FileAccess.Write, FileShare.None, 1 << 16)) {
                content(stream);
                stream.Flush(flushToDisk: true);
            }
            File.Move(temporary, target, overwrite: true);
        } catch (Exception e) {
            File.Delete(temporary); // makes room on a full disk
            // .NET reports EFBIG as ArgumentOutOfRangeException, without the path.
            if (e is ArgumentOutOfRangeException)
                throw new Gpt2Exception($"{path}: expected room for it, found a limit on the size of files");
            throw;
        }
    }

    /// <summary>Writes a text file likewise.</summary>
    public static void Write(string path, string text) => Write(path, to => to.Write(Encoding.UTF8.GetBytes(text)));

    /// <summary>A file's fingerprint in a line: its name, size, and XXH3 hash.</summary>
    public static string Describe(string path) {
        using var stream = File.OpenRead(path);
        var hash = new XxHash3();
        hash.Append(stream);
        return $"{Path.GetFileName(path)} {stream.Length} {hash.GetCurrentHashAsUInt64():x16}";
    }
}

/// <summary>The Mersenne Twister (Matsumoto and Nishimura, 1998). It draws what torch's CPU generator draws from the
/// same seed, and saves its state as llm.c does.</summary>
public sealed class Mt19937 {
    const int N = 624, M = 397, Eight = 8;
    const uint Matrix = 0x9908b0df;

    readonly uint[] state = new uint[N + Eight]; // the last eight repeat the first, for vectors that wrap around
    ulong seed;
    int next = N; // number drawn since the state was made

    public Mt19937(uint seed) {
        this.seed = state[0] = seed;
        for (var i = 1u; i < N; i++)
            state[i] = 1812433253 * (state[i - 1] ^ state[i - 1] >> 30) + i;
    }

    /// <summary>Draws a uniform 32-bit number.</summary>
    public uint NextUInt32() {
        if (next == N)
            Twist();
        return Temper(Vector256.Create(state[next++]))[0];
    }

    void Twist() {
        for (var i = 0; i < N; i += Eight) {
            var (high, low) = (Vector256.Create(state, i), Vector256.Create(state, i + 1));
            var bits = high & Vector256.Create(0x80000000) | low & Vector256.Create(0x7fffffffu);
            var far = Vector256.Create(state, i + M < N ? i + M : i + M - N);
            (far ^ bits >> 1 ^ Vector256.Create(Matrix) & -(bits & Vector256<uint>.One)).CopyTo(state, i);
            if (i == 0)
                state.AsSpan(0, Eight).CopyTo(state.AsSpan(N));
        }
        next = 0;
    }

    static Vector256<uint> Temper(Vector256<uint> y) {
        y ^= y >> 11;
        y ^= y << 7 & Vector256.Create(0x9d2c5680);
        y ^= y << 15 & Vector256.Create(0xefc60000);
        return y ^ y >> 18;
    }

    /// <summary>Draws uniform numbers in [0, 1) with 24 random bits.</summary>
    void NextFloats(Span<float> values) {
        while (values.Length >= Eight) {
            if (next == N)
                Twist();
            var bits = Temper(Vector256.Create(state, next)) & Vector256.Create(0xffffffu);
            (Vector256.ConvertToSingle(bits.AsInt32()) / 16777216f).CopyTo(values);
            var count = Math.Min(Eight, N - next); // more than that is overwritten
            next += count;
            values = values[count..];
        }
        foreach (ref var value in values)
            value = (NextUInt32() & 0xffffff) / 16777216f;
    }

    /// <summary>Number of normal draws that are made together, from as many uniform ones.</summary>
    public const int Group = 2 * Eight;

    /// <summary>Fills 16 values or more with Normal(0, std) draws as torch's normal_ does: where their number is no
    /// multiple of 16, the last 16 are drawn again. Of an array's parts, all but the last must be multiples.</summary>
    public void Normal(Memory<float> values, float std) {
        NextFloats(values.Span);
        const int block = 1 << 14;
        Parallel.For(0, (values.Length + block - 1) / block, i =>
            BoxMuller(values.Span.Slice(i * block, Math.Min(block, values.Length - i * block)), std));
        if (values.Length % Group == 0)
            return;
        NextFloats(values.Span[^Group..]);
        BoxMuller(values.Span[^Group..], std);
    }

    static void BoxMuller(Span<float> x, float std) {
        for (; x.Length >= Group; x = x[Group..]) {
            var (u1, u2) = (Vector256<float>.One - Vector256.Create<float>(x), Vector256.Create<float>(x[Eight..]));
            var radius = Vector256.Sqrt(-2 * Vector256.Log(u1 + Vector256.Create(1e-12f))) * std;
            var (sine, cosine) = Vector256.SinCos(u2 * MathF.Tau);
            (radius * cosine).CopyTo(x);
            (radius * sine).CopyTo(x[Eight..]);
        }
    }

    /// <summary>Shuffles in place: for i from n − 1 down to 1, swaps i with the next number mod (i + 1).</summary>
    public void Permute(int[] values) {
        for (var i = values.Length - 1; i > 0; i--) {
            var j = (int)(NextUInt32() % (uint)(i + 1));
            (values[i], values[j]) = (values[j], values[i]);
        }
    }

    /// <summary>The state, with the memory layout of llm.c's C struct.</summary>
    public uint[] Save() =>
        [(uint)seed, (uint)(seed >> 32), (uint)(N + 1 - next), (uint)next, .. state[..N], 0, Matrix];

    /// <summary>Reads a state that <see cref="Save"/> returned.</summary>
    public void Load(BinaryFile from) {
        var words = new uint[Save().Length];
        from.Read(words.AsSpan());
        var (left, taken) = (words[2], words[3]);
        // A new generator of llm.c has one number left and none taken.
        from.Require(left is >= 1 and <= N && (left == 1 || left + taken == N + 1),
            "a random generator's state", $"{left} numbers left and number {taken} next");
        (seed, next) = (words[0] | (ulong)words[1] << 32, N + 1 - (int)left);
        words.AsSpan(4, N).CopyTo(state);
    }
}

/// <summary>The token shards that match a pattern. There may be thousands, so only one is open at a time.</summary>
public sealed class TokenShards : IDisposable {
    public const int Magic = 20240520;

    readonly string pattern;
    readonly string[] paths;
    readonly int vocabulary;
    BinaryFile? file;
    int opened = -1; // index of the open shard

    /// <summary>Finds the shards, and checks each one's header against its size.</summary>
    /// <exception cref="Gpt2Exception">No file matches, or one that does is no shard.</exception>
    public TokenShards(string pattern, int vocabulary) {
        (this.pattern, this.vocabulary, paths) = (pattern, vocabulary, Files.Glob(pattern));
        if (paths.Length == 0)
            throw new Gpt2Exception($"{pattern}: expected token shards, found none; run make data or gpt2 tokenize");
        Counts = [.. paths.Select((_, shard) => Open(shard).Header[2])];
    }

    /// <summary>Number of tokens in each shard. Shards are in ordinal order of their paths.</summary>
    public int[] Counts { get; }

    /// <summary>Number of tokens in all shards together.</summary>
    public long Tokens => Counts.Sum(count => (long)count);

    /// <summary>A hash of each shard's header and first tokens, and never 0; names do not count.</summary>
    public ulong Fingerprint() {
        var hash = new XxHash3();
        for (var shard = 0; shard < paths.Length; shard++) {
            var beginning = new byte[Math.Min(Open(shard).Length, BinaryFile.HeaderBytes + 2048)];
            file!.Read(beginning.AsSpan(), 0);
            hash.Append(beginning);
        }
        return Math.Max(1, hash.GetCurrentHashAsUInt64());
    }

    BinaryFile Open(int shard) {
        if (shard != opened) {
            file?.Dispose();
            (file, opened) = (new BinaryFile(paths[shard], "a token shard", Magic, 1), shard);
            file.Check("number of tokens", 2, file.Header[2] >= 0, "0 or more");
            file.CheckSize(BinaryFile.HeaderBytes + (long)file.Header[2] * sizeof(ushort));
        }
        return file!;
    }

    /// <summary>Number of whole samples in a shard; a sample is so many tokens, and the token after them.</summary>
    public int Samples(int shard, int tokens) => Math.Max(0, Counts[shard] - 1) / tokens;

    /// <summary>Number of whole samples in all shards together; that there are none is an error.</summary>
    public long Samples(int tokens) =>
        Counts.Select((_, shard) => (long)Samples(shard, tokens)).Sum() is > 0 and var samples ? samples
            : throw new Gpt2Exception($"{pattern}: expected more than {tokens} tokens a shard, found {Counts.Max()}");

    /// <summary>Paths of the shards that have no whole sample.</summary>
    public IEnumerable<string> TooShort(int tokens) => paths.Where((_, shard) => Samples(shard, tokens) == 0);

    /// <summary>Where rows of T tokens begin, in order: those of so many of llm.c's batches, which leave out rows at a
    /// shard's end that fill no batch; for 0 batches, so many rows, whatever the batch size.</summary>
    /// <exception cref="Gpt2Exception">There are none.</exception>
    public (int Shard, long First)[] Rows(int T, int batchRows, int batches, int rows = int.MaxValue) {
        var (group, most) = batches > 0 ? (batchRows, (long)batches * batchRows) : (1, rows);
        _ = Samples(group * T);
        return [.. Counts.SelectMany((_, shard) => Enumerable.Range(0, Samples(shard, group * T) * group)
            .Select(row => (shard, (long)row * T))).Take((int)Math.Min(int.MaxValue, most))];
    }

    /// <summary>Reads T tokens of a shard as inputs, from a position on, and as targets the token after each.</summary>
    /// <exception cref="Gpt2Exception">A token is not in the vocabulary.</exception>
    public void Read(int shard, long first, Span<int> inputs, Span<int> targets) {
        var tokens = new ushort[inputs.Length + 1];
        Open(shard).Read(tokens.AsSpan(), BinaryFile.HeaderBytes + first * sizeof(ushort));
        if (Array.FindIndex(tokens, token => token >= vocabulary) is >= 0 and var i)
            throw file!.Fail($"tokens below the vocabulary of {vocabulary}", $"{tokens[i]} at position {first + i}");
        for (var t = 0; t < inputs.Length; t++)
            (inputs[t], targets[t]) = (tokens[t], tokens[t + 1]);
    }

    /// <summary>Writes a shard of at most so many tokens.</summary>
    /// <param name="next">Returns the next tokens, at most as many as its argument says; none at the end.</param>
    public static void Write(string path, int most, Func<int, ReadOnlyMemory<ushort>> next) {
        var header = new int[BinaryFile.HeaderLength];
        (header[0], header[1]) = (Magic, 1);
        Files.Write(path, to => {
            to.Write(MemoryMarshal.AsBytes(header.AsSpan()));
            while (next(most - header[2]) is { Length: > 0 } tokens) {
                to.Write(MemoryMarshal.AsBytes(tokens.Span));
                header[2] += tokens.Length;
            }
            to.Position = 0;
            to.Write(MemoryMarshal.AsBytes(header.AsSpan()));
        });
    }

    public void Dispose() => file?.Dispose();
}

/// <summary>Batches of (B, T) tokens from shards, in order or shuffled, as llm.c draws them. A sample is a batch of all
/// ranks: ranks·B·T tokens, of which each rank takes B·T.</summary>
public sealed class TokenLoader : IDisposable {
    readonly int B, T, rank, ranks;
    readonly Mt19937 random;
    readonly int[] shardOrder;
    int[] sampleOrder = [];
    int taken; // tokens of the current sample, by all ranks

    /// <summary>Opens the shards that match a pattern.</summary>
    /// <exception cref="Gpt2Exception">There are none, one is no shard, or none has a whole sample.</exception>
    public TokenLoader(
        string pattern, int B, int T, int vocabulary, bool shuffle, uint seed = 42, int rank = 0, int ranks = 1) {
        (this.B, this.T, this.rank, this.ranks) = (B, T, rank, ranks);
        Shards = new TokenShards(pattern, vocabulary);
        (SampleTokens, Shuffles, random) = (ranks * B * T, shuffle, new Mt19937(seed));
        shardOrder = [.. Enumerable.Range(0, Shards.Counts.Length)];
        (Samples, Fingerprint) = (Shards.Samples(SampleTokens), Shards.Fingerprint());
        Reset();
    }

    /// <summary>Whether batches come in random order.</summary>
    public bool Shuffles { get; }

    /// <summary>The shards; those without a whole sample are passed over.</summary>
    public TokenShards Shards { get; }

    /// <summary>A hash of the data, <see cref="TokenShards.Fingerprint"/>.</summary>
    public ulong Fingerprint { get; }

    /// <summary>Number of samples in all shards: an epoch.</summary>
    public long Samples { get; private set; }

    /// <summary>Number of tokens in a sample. A resumed run keeps the one that it began with.</summary>
    public int SampleTokens { get; private set; }

    /// <summary>The shard being read, by its place in this epoch's order, and the next sample in it.</summary>
    public (int Shard, int Sample) Position { get; private set; }

    int Shard => shardOrder[Position.Shard];

    /// <summary>Starts an epoch.</summary>
    public void Reset() => Open(0);

    void Open(int shard) {
        if (Shuffles && shard == 0)
            random.Permute(shardOrder);
        (Position, taken) = ((shard, 0), 0);
        sampleOrder = [.. Enumerable.Range(0, Shards.Samples(Shard, SampleTokens))];
        if (Shuffles)
            random.Permute(sampleOrder);
    }

    /// <summary>Reads this rank's part of the next sample: B·T inputs, and as targets the token after each.</summary>
    public void Next(Span<int> inputs, Span<int> targets) {
        for (var row = 0; row < ranks * B; row++) {
            while (Position.Sample == sampleOrder.Length)
                Open((Position.Shard + 1) % shardOrder.Length);
            if (row / B == rank) {
                var (first, here) = ((long)sampleOrder[Position.Sample] * SampleTokens + taken, row % B * T);
                Shards.Read(Shard, first, inputs.Slice(here, T), targets.Slice(here, T));
            }
            taken += T;
            if (taken == SampleTokens)
                (Position, taken) = ((Position.Shard, Position.Sample + 1), 0);
        }
    }

    /// <summary>Writes the orders and the random generator's state, if this loader shuffles.</summary>
    public void Save(BinaryWriter to) {
        if (!Shuffles)
            return;
        foreach (var order in (int[][])[shardOrder, sampleOrder]) {
            to.Write((long)order.Length);
            to.Write(MemoryMarshal.AsBytes(order.AsSpan()));
        }
        to.Write(MemoryMarshal.AsBytes(random.Save().AsSpan()));
    }

    /// <summary>Goes on from a position, with what <see cref="Save"/> wrote there. The run keeps its samples, whatever
    /// the number of ranks and their batches are now.</summary>
    /// <param name="sampleTokens">0 if the file does not say: then they are as in a new run.</param>
    public void Load(BinaryFile from, bool shuffled, (int Shard, int Sample) position, int sampleTokens = 0) {
        from.Require(sampleTokens >= 0 && sampleTokens % T == 0,
            $"samples of whole sequences of {T} tokens", $"{sampleTokens} tokens");
        SampleTokens = sampleTokens == 0 ? SampleTokens : sampleTokens;
        Samples = Shards.Samples(SampleTokens);
        from.Require(
            shuffled == Shuffles, Shuffles ? "a run that shuffles" : "a run with --no-shuffle", "the other kind");
        var shardIsValid = position.Shard >= 0 && position.Shard < shardOrder.Length;
        from.Require(shardIsValid, $"a position in {shardOrder.Length} shards", $"shard {position.Shard}");
        if (Shuffles)
            ReadOrder(shardOrder, "shards");
        (Position, taken) = (position, 0);
        sampleOrder = [.. Enumerable.Range(0, Shards.Samples(Shard, SampleTokens))];
        from.Require(position.Sample >= 0 && position.Sample <= sampleOrder.Length,
            $"at most {sampleOrder.Length} batches of {SampleTokens} tokens", $"{position.Sample}");
        if (!Shuffles)
            return;
        ReadOrder(sampleOrder, $"batches of {SampleTokens} tokens");
        random.Load(from);

        void ReadOrder(int[] order, string what) {
            Span<long> count = stackalloc long[1];
            from.Read(count);
            from.Require(count[0] == order.Length, $"the order of {order.Length} {what}", $"that of {count[0]}");
            from.Read(order.AsSpan());
            var isPermutation = order.Order().SequenceEqual(Enumerable.Range(0, order.Length));
            from.Require(isPermutation, $"a permutation of {order.Length} {what}", "something else");
        }
    }

    public void Dispose() => Shards.Dispose();
}

/// <summary>A question with several completions, one of them right. A row is the context and a completion.</summary>
public sealed record MultipleChoice(int Label, int ContextLength, ushort[][] Rows) {
    /// <summary>Reads an evaluation file of llm.c, such as hellaswag_val.bin.</summary>
    public static IEnumerable<MultipleChoice> Read(string path, int vocabulary) {
        const int mark = 65535, prefix = 5; // words before an example's context
        using var file = new BinaryFile(path, "a multiple-choice evaluation", 20240522, 1);
        file.Check("number of examples", 2, file.Header[2] > 0, "1 or more");
        file.Check("longest example in bytes", 3, file.Header[3] is > 2 * prefix and <= 65535, "11 to 65535");
        for (var i = 0; i < file.Header[2]; i++) {
            var words = new ushort[prefix];
            file.Read(words.AsSpan());
            var bytes = words[1];
            if (words[0] != mark || words[2] != i || bytes <= 2 * prefix || bytes % 2 != 0 || bytes > file.Header[3])
                throw file.Fail($"example {i} to begin with {mark}, its size and {i}", string.Join(", ", words[..3]));
            var rest = new ushort[bytes / 2 - prefix].AsMemory();
            file.Read(rest.Span);
            var context = Take();
            var rows = Enumerable.Range(0, words[4]).Select(_ => (ushort[])[.. context, .. Take()]).ToArray();
            file.Require(words[3] < rows.Length && rest.Length == 0,
                $"example {i} to have a context, a label below {rows.Length}, no more", "another one");
            yield return new MultipleChoice(words[3], context.Length, rows);

            ushort[] Take() {
                if (rest.Length == 0 || rest.Span[0] == 0 || rest.Length <= rest.Span[0])
                    throw file.Fail($"all tokens of example {i}", "its end");
                var tokens = rest.Slice(1, rest.Span[0]).ToArray();
                rest = rest[(1 + tokens.Length)..];
                file.Require(tokens.Max() < vocabulary,
                    $"tokens below the vocabulary of {vocabulary}", $"{tokens.Max()} in example {i}");
                return tokens;
            }
        }
        file.CheckEnd();
    }
}

/// <summary>GPT-2's byte-pair encoding of UTF-8 text, exact for all of Unicode. A pattern splits text into pieces, such
/// as a word with the space before it, and each piece is encoded on its own. Time is linear in the text's length, and
/// memory is fixed, however long a piece is.</summary>
public sealed class Tokenizer {
    /// <summary>The mark that separates documents in text.</summary>
    public const string EndOfText = "<|endoftext|>";

    /// <summary>The mark's token, the last of the vocabulary. It begins each document in a token shard.</summary>
    public const ushort EndOfTextId = 50256;

    /// <summary>How far back, in bytes, more text can change the tokens of a piece: those that end this far before the
    /// new text stay the same. A test derives 339 from the vocabulary; the rest is margin.</summary>
    public const int Reach = 360;

    /// <summary>Most tokens in a shard for training, unless told otherwise.</summary>
    public const int ShardTokens = 100_000_000;

    // A piece longer than Window bytes is encoded part by part, and a file block by block.
    const int Window = 2 * Reach, BlockBytes = 1 << 18;
    const ushort None = ushort.MaxValue;

    internal static ReadOnlySpan<byte> Mark => "<|endoftext|>"u8;

    readonly byte[][] vocabulary;
    readonly Dictionary<ulong, int> ranks; // by the hash of a token's bytes

    /// <summary>Reads the vocabulary: a line with its size, then one for each token in base64, by rank.</summary>
    public Tokenizer() {
        const string type = "Microsoft.ML.Tokenizers.R50kBaseTokenizerData, Microsoft.ML.Tokenizers.Data.R50kBase";
        using var resource = Type.GetType(type)!.Assembly.GetManifestResourceStream("r50k_base.tiktoken.deflate")!;
        using var lines = new StreamReader(new DeflateStream(resource, CompressionMode.Decompress));
        var tokens = lines.ReadToEnd().Split("\r\n").Skip(1).Take(EndOfTextId);
        vocabulary = [.. tokens.Select(Convert.FromBase64String), Mark.ToArray()];
        ranks = Enumerable.Range(0, EndOfTextId).ToDictionary(token => XxHash3.HashToUInt64(vocabulary[token]));
    }

    /// <summary>The two tokens that each one is merged from, for all but the 256 bytes and the mark.</summary>
    public IEnumerable<(int Left, int Right)> Merges => Enumerable.Range(256, EndOfTextId - 256).Select(token => {
        var (parts, count) = (new ushort[vocabulary[token].Length], 0);
        EncodePiece(vocabulary[token], parts, ref count, below: (ushort)token);
        return ((int)parts[0], (int)parts[1]);
    });

    /// <summary>A token in GPT-2's letters for bytes. The first 188 tokens are the printable bytes, which stand for
    /// themselves; the next 68 are the others, for which there are the letters from U+0100 on.</summary>
    public string Letters(int token) => string.Concat(vocabulary[token].Select(value =>
        (char)(Rank([value]) is var rank && rank < 188 ? value : 0x100 + rank - 188)));

    /// <summary>Encodes text, in which the mark becomes its token.</summary>
    public IEnumerable<int> Encode(string text) => text.Split(EndOfText)
        .SelectMany(part => (int[])[EndOfTextId, .. Encode(Encoding.UTF8.GetBytes(part))]).Skip(1);

    /// <summary>Decodes tokens as they come. A character of several tokens appears with the last of them.</summary>
    public IEnumerable<string> Decode(IEnumerable<int> tokens) {
        var (decoder, text) = (Encoding.UTF8.GetDecoder(), new char[256]);
        foreach (var token in tokens)
            yield return new string(text, 0, decoder.GetChars(vocabulary[token], text, flush: false));
        yield return new string(text, 0, decoder.GetChars([], text, flush: true));
    }

    /// <summary>Encodes text into a pooled array. A mark begins a document, unless that is only white space.</summary>
    /// <param name="first">Number of bytes to skip, as they were encoded with the block before.</param>
    /// <param name="goesOn">Whether the document goes on after this text. If so, the tokens that its next part might
    /// change are left out; the text may begin with a mark, but has no other.</param>
    ArraySegment<ushort> Encode(ReadOnlySpan<byte> text, int first = 0, bool goesOn = false) {
        var (tokens, count) = (ArrayPool<ushort>.Shared.Rent(text.Length), 0);
        foreach (var part in text.Split(Mark)) {
            var document = text[part];
            if (part.Start.Value > 0) {
                if (!goesOn && RunEnd(document, 0, ' ') == document.Length)
                    continue;
                tokens[count++] = EndOfTextId;
            }
            // A piece that begins before this end and fits Window is complete, and no part of a mark that is cut off.
            var end = goesOn ? document.Length - Window - Mark.Length : document.Length;
            for (var at = part.Start.Value == 0 ? first : 0; at < end;)
                at += EncodePiece(document.Slice(at, PieceLength(document, at)), tokens, ref count);
        }
        return new(tokens, 0, count);
    }

    /// <summary>Length in bytes of the piece that begins at a place, or some length above Window, if it is longer than
    /// that. GPT-2's pattern: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+</summary>
    static int PieceLength(ReadOnlySpan<byte> text, int at) {
        var rest = text[at..];
        if (rest[0] == '\'' && rest.Length > 1 && "stmd"u8.Contains(rest[1]))
            return 2;
        if (rest.StartsWith("'re"u8) || rest.StartsWith("'ve"u8) || rest.StartsWith("'ll"u8))
            return 3;
        var first = rest[0] == ' ' && rest.Length > 1 && KindAt(text, at + 1) != ' ' ? at + 1 : at;
        var end = RunEnd(text[..Math.Min(text.Length, at + Window + 8)], first, KindAt(text, first));
        // The last of several spaces belongs to the piece after them.
        Rune.DecodeLastFromUtf8(text[..end], out var last, out var size);
        return (Rune.IsWhiteSpace(last) && end < text.Length && end - size > at ? end - size : end) - at;
    }

    /// <summary>End of the run of characters of one kind that begins at a place.</summary>
    static int RunEnd(ReadOnlySpan<byte> text, int at, char kind) {
        while (at < text.Length && KindAt(text, at) == kind)
            at++;
        return at;
    }

    /// <summary>Kind of a byte's character: L is a letter, N a number, a space white space, a dot another.</summary>
    static char KindAt(ReadOnlySpan<byte> text, int at) {
        while (at > 0 && (text[at] & 0xc0) == 0x80) // a byte that continues a character
            at--;
        Rune.DecodeFromUtf8(text[at..], out var rune, out _);
        return Rune.IsLetter(rune) ? 'L' : Rune.IsNumber(rune) ? 'N' : Rune.IsWhiteSpace(rune) ? ' ' : '.';
    }

    /// <summary>Encodes a piece: as long as two neighbors form a token, merges the two whose token has the lowest rank,
    /// leftmost first. Of a piece longer than Window, keeps only the tokens in the first Window − Reach bytes, as the
    /// bytes after Window might change the others. The rest can be encoded as a piece of its own: merges on one side of
    /// a place between two tokens do not depend on the other side.</summary>
    /// <param name="below">Uses only the tokens below this one.</param>
    /// <returns>Number of bytes encoded.</returns>
    int EncodePiece(ReadOnlySpan<byte> piece, Span<ushort> tokens, ref int count, ushort below = None) {
        ushort Rank(ReadOnlySpan<byte> bytes) => this.Rank(bytes) is var rank && rank < below ? rank : None;
        if (Rank(piece) is var whole and not None) {
            tokens[count++] = whole;
            return piece.Length;
        }
        // Where each part begins, and the rank of the token that it forms with the next. The last part is empty.
        Span<(ushort Start, ushort Rank)> parts = stackalloc (ushort, ushort)[piece.Length + 1];
        for (var i = 0; i <= piece.Length; i++)
            parts[i] = ((ushort)i, i + 2 <= piece.Length ? Rank(piece.Slice(i, 2)) : None);
        while (true) {
            var (lowest, rank) = (0, None);
            for (var i = 0; i < parts.Length; i++) {
                if (parts[i].Rank < rank)
                    (lowest, rank) = (i, parts[i].Rank);
            }
            if (rank == None)
                break;
            parts[(lowest + 2)..].CopyTo(parts[(lowest + 1)..]);
            parts = parts[..^1];
            for (var i = Math.Max(0, lowest - 1); i <= lowest; i++)
                parts[i].Rank = i + 2 < parts.Length ? Rank(piece[parts[i].Start..parts[i + 2].Start]) : None;
        }
        var (end, next) = (piece.Length <= Window ? piece.Length : Window - Reach, 1);
        for (; next < parts.Length && parts[next].Start <= end; next++)
            tokens[count++] = Rank(piece[parts[next - 1].Start..parts[next].Start]);
        return parts[next - 1].Start;
    }

    /// <summary>The token of these bytes, or None.</summary>
    ushort Rank(ReadOnlySpan<byte> bytes) => ranks.TryGetValue(XxHash3.HashToUInt64(bytes), out var rank)
        && bytes.SequenceEqual(vocabulary[rank]) ? (ushort)rank : None;

    /// <summary>Encodes documents as token shards PREFIX_val_000000.bin and PREFIX_train_000001.bin, …: the mark's
    /// token comes before each of them. A mark divides a document of any file. What is less than 256 KB of white space
    /// alone is left out.</summary>
    /// <param name="valTokens">How many of the first tokens are held out for validation.</param>
    /// <param name="files">Their paths; - is standard input.</param>
    /// <param name="lossy">Whether U+FFFD replaces what is not UTF-8; otherwise that is an error.</param>
    /// <param name="progress">Takes a file, and how many bytes of it were read; null if none came for 5 s.</param>
    /// <param name="field">The field, or column, that has a document's text, in files that have fields.</param>
    /// <param name="shardTokens">Most tokens in a shard for training.</param>
    /// <returns>Number of tokens, and of shards for training.</returns>
    public (long Tokens, int Shards) WriteShards(string prefix, int valTokens, string[] files, bool lossy,
        Action<string, int?> progress, string field = "text", int shardTokens = ShardTokens) {
        if (Files.Glob($"{prefix}_*.bin") is [var old, ..])
            throw new Gpt2Exception($"{old}: expected no shards of this name yet, found some; remove them first");
        var (written, number, paths) = (0L, valTokens > 0 ? 0 : 1, new List<string>());
        var (running, rest) = (new Queue<(int Bytes, Task<ArraySegment<ushort>> Tokens)>(), ArraySegment<ushort>.Empty);
        using var blocks = files.SelectMany(file => Read(file, field, lossy, progress)).GetEnumerator();
        using var interrupted = PosixSignalRegistration.Create(PosixSignal.SIGINT, _ => Remove());
        using var terminated = PosixSignalRegistration.Create(PosixSignal.SIGTERM, _ => Remove());
        try {
            for (; More(); number++) {
                paths.Add($"{prefix}_{(number == 0 ? "val" : "train")}_{number:d6}.bin");
                TokenShards.Write(paths[^1], number == 0 ? valTokens : shardTokens, Next);
            }
            return number > 1 ? (written, number - 1)
                : throw new Gpt2Exception($"{files[^1]}: expected more than {valTokens} tokens, found {written}");
        } catch {
            Remove();
            throw;
        }

        bool More() {
            var cores = Environment.ProcessorCount;
            while (rest.Count == 0) {
                // Documents may be large: for those two blocks a core may be one block in all.
                while (running.Count <= 2 * cores &&
                    running.Sum(block => (long)block.Bytes) <= (long)cores * 8 * BlockBytes && blocks.MoveNext())
                    running.Enqueue(blocks.Current);
                if (running.Count == 0)
                    return false;
                ArrayPool<ushort>.Shared.Return(rest.Array!);
                rest = running.Dequeue().Tokens.Result;
            }
            return true;
        }

        ReadOnlyMemory<ushort> Next(int most) {
            var next = More() ? rest[..Math.Min(most, rest.Count)] : rest;
            (rest, written) = (rest[next.Count..], written + next.Count);
            return next;
        }

        void Remove() {
            foreach (var path in paths.Concat(paths.Select(path => path + ".tmp")).Where(File.Exists))
                File.Delete(path);
        }
    }

    /// <summary>Reads a file in blocks, and starts a task for each that encodes it. A block ends where text is divided
    /// in any case, so that the next can be encoded at the same time. A block without such a place (256 KB of letters)
    /// is encoded at once, and the next begins where its last token ends.</summary>
    IEnumerable<(int Bytes, Task<ArraySegment<ushort>> Tokens)> Read(
        string path, string field, bool lossy, Action<string, int?> progress) {
        using var patience = new Timer(_ => progress(path, null), null, 5000, Timeout.Infinite);
        // .NET opens this where standard input is closed.
        if (path == "-" && new FileInfo("/proc/self/fd/0").LinkTarget == "/dev/urandom")
            throw new Gpt2Exception("standard input: expected text, found it closed");
        if (Documents.Read(path, field, lossy, Progress) is { } blocks) {
            using var each = blocks.GetEnumerator();
            while (Documents.Whole(path, each.MoveNext)) {
                var some = each.Current;
                yield return (some.Bytes, Task.Run(() => {
                    var documents = Documents.Text(path, some);
                    var tokens = Encode(documents);
                    Documents.Pool.Return(documents.Array!);
                    return tokens;
                }));
            }
            yield break;
        }
        using var stream = Documents.Open(path, lossy, Progress);
        // Every document follows a mark, even the first one.
        byte[] text = [.. Mark, .. new byte[BlockBytes - Mark.Length]];
        // The text's length, its place in the file, and how many of its bytes are encoded already.
        var (length, position, encoded) = (Mark.Length, -(long)Mark.Length, 0);
        for (var goesOn = true; goesOn;) {
            var read = Documents.Whole(path, () =>
                stream.ReadAtLeast(text.AsSpan(length), BlockBytes - length, throwOnEndOfStream: false));
            (length, goesOn) = (length + read, length + read == BlockBytes);
            if (position < 0 && text.AsSpan(Mark.Length, read).StartsWith(Encoding.UTF8.Preamble))
                (text, length, position) = ([.. Mark, .. text[(Mark.Length + 3)..], 0, 0, 0], length - 3, position + 3);
            var cut = goesOn ? LastCut(text.AsSpan(0, length)) : length;
            var (open, size, first) = (cut == 0, cut == 0 ? length : cut, encoded);
            var bytes = text.AsSpan(0, size);
            // The end of an open block may cut off a character.
            if (!Utf8.IsValid(bytes) && Utf8.ToUtf16(bytes, new char[size], out var valid, out _,
                replaceInvalidSequences: false, isFinalBlock: !open) == OperationStatus.InvalidData)
                throw new Gpt2Exception($"{path}: expected text in UTF-8, found something else at byte " +
                    $"{position + valid}; --lossy puts U+FFFD in its place");
            var block = MemoryPool<byte>.Shared.Rent(size);
            bytes.CopyTo(block.Memory.Span);
            var encoding = Task.Run(() => {
                using (block)
                    return Encode(block.Memory.Span[..size], first, open);
            });
            cut = open ? first + encoding.Result.Sum(token => vocabulary[token].Length) : cut;
            yield return (size, encoding);
            // If the last token ends within a character, the next block begins with that character.
            for (encoded = 0; cut < length && (text[cut] & 0xc0) == 0x80; encoded++)
                cut--;
            text.AsSpan(cut, length - cut).CopyTo(text);
            (length, position) = (length - cut, position + cut);
        }

        void Progress(int bytes) {
            patience.Dispose();
            progress(path, bytes);
        }
    }

    /// <summary>The last place where text is divided whatever comes before and after it, 0 if there is none: before a
    /// mark, or between two characters of different kinds. Not after white space, for a piece may begin with a space;
    /// not after an apostrophe, which may begin a contraction; not near the end, where a mark may be cut off.</summary>
    static int LastCut(ReadOnlySpan<byte> text) {
        var mark = text.LastIndexOf(Mark);
        for (var cut = text.Length - Mark.Length; cut > mark + Mark.Length; cut--) {
            if (KindAt(text, cut - 1) is var kind and not ' ' && kind != KindAt(text, cut) && text[cut - 1] != '\'')
                return cut;
        }
        return Math.Max(0, mark);
    }
}
