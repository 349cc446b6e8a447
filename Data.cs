using System.IO.Hashing;
using System.Runtime.InteropServices;
using System.Text;
using SharpToken;

namespace Gpt2;

/// <summary>A little-endian file that begins with llm.c's header: 256 int32, a magic number and a version first. Every
/// error names the file, what was expected and what was found.</summary>
public sealed class BinaryFile : IDisposable {
    /// <summary>Number of int32 in a header.</summary>
    public const int HeaderLength = 256;

    /// <summary>Size of a header.</summary>
    public const int HeaderBytes = HeaderLength * sizeof(int);

    readonly FileStream stream;

    /// <summary>Opens a file and reads its header.</summary>
    /// <param name="kind">What the file should be, for messages.</param>
    /// <exception cref="Gpt2Exception">It cannot be read, or is not of this kind.</exception>
    public BinaryFile(string path, string kind, int magic, params ReadOnlySpan<int> versions) {
        Path = path;
        try {
            stream = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read);
        } catch (Exception e) when (e is IOException or UnauthorizedAccessException) {
            throw new Gpt2Exception($"{path}: expected {kind}, found {Files.Reason(e)}");
        }
        if (stream.Length < HeaderBytes)
            throw Fail($"{kind} with a header of {HeaderBytes} bytes", $"a file of {stream.Length} bytes");
        Read(Header.AsSpan());
        if (Header[0] != magic)
            throw Fail($"{kind} (magic number {magic})", $"magic number {Header[0]}");
        if (!versions.Contains(Header[1]))
            throw Fail($"{kind} of version {string.Join(" or ", versions.ToArray())}", $"version {Header[1]}");
    }

    public string Path { get; }
    public int[] Header { get; } = new int[HeaderLength];

    /// <summary>Requires a header field to be right.</summary>
    public void Check(string name, int index, bool right, string expected) {
        if (!right)
            throw Fail($"{name} {expected}", $"{Header[index]}");
    }

    /// <summary>Requires the file to have exactly the size that its header implies.</summary>
    public void CheckSize(long bytes) {
        if (stream.Length != bytes)
            throw Fail($"{bytes} bytes by its header", $"{stream.Length} bytes");
    }

    /// <summary>Requires everything to have been read.</summary>
    public void CheckEnd() => CheckSize(stream.Position);

    /// <summary>The exception for something wrong in this file, which is closed.</summary>
    public Gpt2Exception Fail(string expected, string found) {
        Dispose();
        return new Gpt2Exception($"{Path}: expected {expected}, found {found}");
    }

    /// <summary>Fills a span with the values that follow.</summary>
    public void Read<T>(Span<T> values) where T : unmanaged {
        try {
            stream.ReadExactly(MemoryMarshal.AsBytes(values));
        } catch (EndOfStreamException) {
            throw Fail("more data", "its end");
        }
    }

    /// <summary>The value that follows.</summary>
    public T Read<T>() where T : unmanaged {
        Span<T> value = stackalloc T[1];
        Read(value);
        return value[0];
    }

    /// <summary>Fills a span from the bfloat16 values that follow.</summary>
    public void ReadBFloat16(Span<float> values) {
        // Read into the second half, so that widening from the front overwrites nothing unread.
        var halves = MemoryMarshal.Cast<float, ushort>(values)[values.Length..];
        Read(halves);
        for (var i = 0; i < values.Length; i++)
            values[i] = BitConverter.Int32BitsToSingle(halves[i] << 16);
    }

    /// <summary>Moves to a byte from the file's start.</summary>
    public void Seek(long offset) => stream.Position = offset;

    /// <summary>Closes the file.</summary>
    public void Dispose() => stream.Dispose();
}

/// <summary>Files as a whole: finding them, and writing them so that a name always stands for a complete file.</summary>
public static class Files {
    /// <summary>What went wrong with a file, in words.</summary>
    public static string Reason(Exception e) => e switch {
        FileNotFoundException or DirectoryNotFoundException => "no such file",
        UnauthorizedAccessException => "a file that may not be read or written, or a directory",
        // The runtime appends the path, which the sentence already has.
        _ => e.Message.Split(" : '")[0],
    };

    /// <summary>The files that a pattern with * and ? in its last part names, in ordinal order.</summary>
    public static string[] Glob(string pattern) {
        var directory = Path.GetDirectoryName(pattern);
        directory = string.IsNullOrEmpty(directory) ? "." : directory;
        if (!Directory.Exists(directory))
            return [];
        var files = Directory.GetFiles(directory, Path.GetFileName(pattern));
        var found = files.Select(file => pattern.StartsWith("./") ? file : file.StartsWith("./") ? file[2..] : file).ToArray();
        Array.Sort(found, string.CompareOrdinal);
        return found;
    }

    /// <summary>Writes a file under a temporary name, flushes it to the disk and renames it.</summary>
    /// <exception cref="Gpt2Exception">It cannot be written; what had its name before is untouched.</exception>
    public static void Write(string path, Action<Stream> content) {
        var temporary = path + ".tmp";
        try {
            using (var stream = new FileStream(temporary, FileMode.Create, FileAccess.Write, FileShare.None, 1 << 16)) {
                content(stream);
                stream.Flush(flushToDisk: true);
            }
            File.Move(temporary, path, overwrite: true);
        } catch (Exception e) when (e is IOException or UnauthorizedAccessException) {
            // On a full disk this makes room again; what cannot be deleted has a name that no reader takes for a file.
            if (File.Exists(temporary))
                File.Delete(temporary);
            throw new Gpt2Exception($"{path}: expected to write it, found {Reason(e)}");
        }
    }

    /// <summary>A line that tells whether a file is still the same: its name, size, and XXH3 hash.</summary>
    public static string Describe(string path) {
        try {
            using var stream = File.OpenRead(path);
            var hash = new XxHash3();
            hash.Append(stream);
            return $"{Path.GetFileName(path)} {stream.Length} {hash.GetCurrentHashAsUInt64():x16}";
        } catch (Exception e) when (e is IOException or UnauthorizedAccessException) {
            throw new Gpt2Exception($"{path}: expected a file of the checkpoint, found {Reason(e)}");
        }
    }
}

/// <summary>The Mersenne Twister (Matsumoto and Nishimura, 1998), with the draws that torch's CPU generator makes from
/// it and the state that llm.c saves.</summary>
public sealed class Mt19937(uint seed) {
    const int N = 624, M = 397;

    ulong seed = seed;
    int left = 1;
    uint next;
    readonly uint[] state = Seeded(seed);

    static uint[] Seeded(uint seed) {
        var state = new uint[N];
        state[0] = seed;
        for (var i = 1u; i < N; i++)
            state[i] = 1812433253 * (state[i - 1] ^ state[i - 1] >> 30) + i;
        return state;
    }

    /// <summary>A uniform 32-bit number.</summary>
    public uint NextUInt32() {
        if (--left == 0)
            Twist();
        var y = state[next++];
        y ^= y >> 11;
        y ^= y << 7 & 0x9d2c5680;
        y ^= y << 15 & 0xefc60000;
        return y ^ y >> 18;
    }

    void Twist() {
        for (var i = 0; i < N; i++) {
            var bits = state[i] & 0x80000000 | state[(i + 1) % N] & 0x7fffffff;
            state[i] = state[(i + M) % N] ^ bits >> 1 ^ ((bits & 1) != 0 ? 0x9908b0df : 0);
        }
        (left, next) = (N, 0);
    }

    /// <summary>A uniform number in [0, 1) of 24 bits.</summary>
    public float NextFloat() => (NextUInt32() & 0xffffff) / 16777216f;

    /// <summary>Fills with Normal(0, std) draws as torch's normal_ does for 16 or more floats.</summary>
    public void Normal(float[] values, float std) {
        for (var i = 0; i < values.Length; i++)
            values[i] = NextFloat();
        const int blocks = 4096;
        Parallel.For(0, (values.Length / 16 + blocks - 1) / blocks, chunk => {
            for (var block = chunk * blocks; block < Math.Min(values.Length / 16, (chunk + 1) * blocks); block++)
                BoxMuller(values.AsSpan(block * 16, 16), std);
        });
        if (values.Length % 16 != 0) {
            var last = values.AsSpan(values.Length - 16);
            foreach (ref var value in last)
                value = NextFloat();
            BoxMuller(last, std);
        }
    }

    static void BoxMuller(Span<float> x, float std) {
        for (var t = 0; t < 8; t++) {
            var radius = MathF.Sqrt(-2 * MathF.Log(1 - x[t] + 1e-12f));
            var angle = (float)(2 * Math.PI * x[t + 8]);
            (x[t], x[t + 8]) = (radius * MathF.Cos(angle) * std, radius * MathF.Sin(angle) * std);
        }
    }

    /// <summary>Permutes in place: for i from n − 1 down to 1, swap i with the next number mod (i + 1).</summary>
    public void Permute(int[] values) {
        for (var i = values.Length - 1; i > 0; i--) {
            var j = (int)(NextUInt32() % (uint)(i + 1));
            (values[i], values[j]) = (values[j], values[i]);
        }
    }

    /// <summary>Writes the state as llm.c's C struct lies in memory.</summary>
    public void Save(BinaryWriter to) {
        to.Write(seed);
        to.Write(left);
        to.Write(next);
        foreach (var word in state)
            to.Write(word);
        to.Write(0u);
        to.Write(0x9908b0dfu);
    }

    /// <summary>Reads what <see cref="Save"/> wrote.</summary>
    public void Load(BinaryFile from) {
        (seed, left, next) = (from.Read<ulong>(), from.Read<int>(), from.Read<uint>());
        from.Read<uint>(state);
        from.Read<ulong>();
        if (left is < 1 or > N || next > N)
            throw from.Fail("a generator's state", $"{left} numbers left and {next} as the next one");
    }
}

/// <summary>One file of tokens.</summary>
public sealed class TokenShard : IDisposable {
    const int Magic = 20240520;

    readonly BinaryFile file;

    /// <summary>Opens a shard and checks its header against its size.</summary>
    public TokenShard(string path) {
        file = new BinaryFile(path, "a token shard", Magic, 1);
        file.Check("number of tokens", 2, file.Header[2] >= 0, "0 or more");
        file.CheckSize(BinaryFile.HeaderBytes + (long)Count * sizeof(ushort));
    }

    /// <summary>Number of tokens.</summary>
    public int Count => file.Header[2];

    /// <summary>Reads the tokens from <paramref name="first"/> on, all below the vocabulary.</summary>
    public void Read(long first, Span<ushort> tokens, int vocabulary) {
        file.Seek(BinaryFile.HeaderBytes + first * sizeof(ushort));
        file.Read(tokens);
        for (var i = 0; i < tokens.Length; i++) {
            if (tokens[i] >= vocabulary)
                throw file.Fail($"tokens below the model's vocabulary of {vocabulary}", $"{tokens[i]} at position {first + i}");
        }
    }

    /// <summary>Writes tokens as a shard.</summary>
    public static void Write(string path, ReadOnlySpan<ushort> tokens) {
        var header = new int[BinaryFile.HeaderLength];
        (header[0], header[1], header[2]) = (Magic, 1, tokens.Length);
        byte[] bytes = [.. MemoryMarshal.AsBytes(header.AsSpan()), .. MemoryMarshal.AsBytes(tokens)];
        Files.Write(path, to => to.Write(bytes));
    }

    /// <summary>Closes the file.</summary>
    public void Dispose() => file.Dispose();
}

/// <summary>Batches of (B, T) tokens from shards, in order or shuffled, as llm.c draws them.</summary>
public sealed class TokenLoader : IDisposable {
    readonly string[] paths;
    readonly int B, T, vocabulary;
    readonly bool shuffle;
    readonly Mt19937 random;
    readonly int[] shardOrder;
    readonly ushort[] buffer;
    int[] sampleOrder = [];
    TokenShard shard;
    int shardIndex, sampleIndex, samples;

    /// <summary>Opens all shards that a pattern names.</summary>
    /// <exception cref="Gpt2Exception">There are none, or one is not a shard or shorter than a batch.</exception>
    public TokenLoader(string pattern, int B, int T, int vocabulary, bool shuffle, uint seed = 42) {
        paths = Files.Glob(pattern);
        if (paths.Length == 0)
            throw new Gpt2Exception($"{pattern}: expected token shards, found no such file; `make data` prepares some, " +
                "`gpt2 tokenize` makes them from text");
        (this.B, this.T, this.vocabulary, this.shuffle) = (B, T, vocabulary, shuffle);
        random = new Mt19937(seed);
        shardOrder = [.. Enumerable.Range(0, paths.Length)];
        buffer = new ushort[B * T + 1];
        foreach (var path in paths) {
            using var shard = new TokenShard(path);
            Tokens += shard.Count;
            Batches += SamplesIn(shard, path);
        }
        shard = new TokenShard(paths[0]);
        Reset();
    }

    /// <summary>Number of shards.</summary>
    public int Shards => paths.Length;

    /// <summary>Tokens in all shards.</summary>
    public long Tokens { get; }

    /// <summary>Batches in all shards: an epoch.</summary>
    public long Batches { get; }

    /// <summary>The shard being read, in this epoch's order, and the next batch in it.</summary>
    public (int Shard, int Sample) Position => (shardIndex, sampleIndex);

    int SamplesIn(TokenShard shard, string path) => shard.Count > B * T ? (shard.Count - 1) / (B * T)
        : throw new Gpt2Exception($"{path}: expected at least {B * T + 1} tokens for a batch of {B} x {T}, found {shard.Count}");

    /// <summary>Starts an epoch.</summary>
    public void Reset() {
        shardIndex = 0;
        if (shuffle)
            random.Permute(shardOrder);
        OpenShard();
        ShuffleSamples();
    }

    void OpenShard() {
        shard.Dispose();
        var path = paths[shardOrder[shardIndex]];
        shard = new TokenShard(path);
        samples = SamplesIn(shard, path);
        sampleIndex = 0;
    }

    void ShuffleSamples() {
        if (shuffle) {
            sampleOrder = [.. Enumerable.Range(0, samples)];
            random.Permute(sampleOrder);
        }
    }

    /// <summary>Reads the next batch: B·T inputs, and as targets the token after each.</summary>
    public void Next(Span<int> inputs, Span<int> targets) {
        if (sampleIndex >= samples) {
            if (shardIndex + 1 == paths.Length) {
                Reset();
            } else {
                shardIndex++;
                OpenShard();
                ShuffleSamples();
            }
        }
        var sample = shuffle ? sampleOrder[sampleIndex] : sampleIndex;
        shard.Read((long)sample * B * T, buffer, vocabulary);
        sampleIndex++;
        for (var i = 0; i < B * T; i++)
            (inputs[i], targets[i]) = (buffer[i], buffer[i + 1]);
    }

    /// <summary>Writes the order of shards and samples and the generator's state, if this loader shuffles.</summary>
    public void Save(BinaryWriter to) {
        if (!shuffle)
            return;
        foreach (var order in (int[][])[shardOrder, sampleOrder]) {
            to.Write((long)order.Length);
            to.Write(MemoryMarshal.AsBytes(order.AsSpan()));
        }
        random.Save(to);
    }

    /// <summary>Goes on from a position, with what <see cref="Save"/> wrote there.</summary>
    public void Load(BinaryFile from, bool shuffled, (int Shard, int Sample) position) {
        if (shuffled != shuffle)
            throw from.Fail($"a run that {(shuffle ? "shuffles" : "does not shuffle")} its data", "one of the other kind");
        if (shuffle) {
            ReadOrder(shardOrder, "shards");
            if (position.Shard >= 0 && position.Shard < Shards)
                shardIndex = position.Shard;
            OpenShard();
            sampleOrder = new int[samples];
            ReadOrder(sampleOrder, $"batches of {B} x {T} in a shard");
            random.Load(from);
        }
        if (position.Shard < 0 || position.Shard >= Shards || position.Sample < 0)
            throw from.Fail($"a position in {Shards} shards", $"batch {position.Sample} of shard {position.Shard}");
        shardIndex = position.Shard;
        OpenShard();
        sampleIndex = position.Sample <= samples ? position.Sample
            : throw from.Fail($"at most {samples} batches of {B} x {T} in {paths[shardOrder[shardIndex]]}", $"{position.Sample}");

        void ReadOrder(int[] order, string what) {
            var count = from.Read<long>();
            if (count != order.Length)
                throw from.Fail($"the order of {order.Length} {what}", $"{count}");
            from.Read(order.AsSpan());
            if (!order.Order().SequenceEqual(Enumerable.Range(0, order.Length)))
                throw from.Fail($"a permutation of {count} {what}", "something else");
        }
    }

    /// <summary>Closes the open shard.</summary>
    public void Dispose() => shard.Dispose();
}

/// <summary>A question with several completions, of which one is right. Each row is context and completion.</summary>
public sealed record MultipleChoice(int Label, int ContextLength, ushort[][] Rows) {
    /// <summary>Reads an evaluation file of llm.c, such as hellaswag_val.bin.</summary>
    public static IEnumerable<MultipleChoice> Read(string path, int vocabulary) {
        using var file = new BinaryFile(path, "a multiple-choice evaluation", 20240522, 1);
        file.Check("number of examples", 2, file.Header[2] >= 0, "0 or more");
        file.Check("longest example in bytes", 3, file.Header[3] is >= 12 and <= ushort.MaxValue, "12 to 65535");
        for (var i = 0; i < file.Header[2]; i++) {
            var (mark, bytes) = (file.Read<ushort>(), file.Read<ushort>());
            if (mark != ushort.MaxValue || bytes < 12 || bytes % 2 != 0 || bytes > file.Header[3])
                throw file.Fail($"example {i} to begin with 65535 and an even size of 12 to {file.Header[3]}", $"{mark}, {bytes}");
            var words = new ushort[bytes / 2 - 2];
            file.Read(words.AsSpan());
            var rest = words.AsMemory(3);
            var context = Take();
            var rows = new ushort[words[2]][];
            for (var row = 0; row < rows.Length; row++)
                rows[row] = [.. context, .. Take()];
            if (words[0] != i || words[1] >= rows.Length || rest.Length > 0 || context.Length == 0)
                throw file.Fail($"example {i} with its label and tokens", "something else");
            yield return new MultipleChoice(words[1], context.Length, rows);

            ushort[] Take() {
                var length = rest.Length > 0 ? rest.Span[0] : 0;
                if (rest.Length < 1 + length)
                    throw file.Fail($"example {i} to hold all its tokens", "its end");
                var tokens = rest.Slice(1, length).ToArray();
                rest = rest[(1 + length)..];
                return Array.TrueForAll(tokens, token => token < vocabulary) ? tokens
                    : throw file.Fail($"tokens below the model's vocabulary of {vocabulary}", $"{tokens.Max()} in example {i}");
            }
        }
        file.CheckEnd();
    }
}

/// <summary>GPT-2's byte-pair encoding between text and token ids.</summary>
public sealed class Tokenizer {
    /// <summary>Separates documents in text, and begins each one in tokens.</summary>
    public const string EndOfText = "<|endoftext|>";

    /// <summary>Its id, the last one of the vocabulary.</summary>
    public const ushort EndOfTextId = 50256;

    /// <summary>Tokens in a shard at most.</summary>
    public const int ShardTokens = 100_000_000;

    const int PieceCharacters = 1 << 18;

    readonly GptEncoding encoding = GptEncoding.GetEncoding("r50k_base");

    /// <summary>The ids of a text, in which the mark for the end of text stands for its id.</summary>
    public List<int> Encode(string text) => encoding.Encode(text, new HashSet<string> { EndOfText });

    /// <summary>Turns ids into text as they come; characters of several tokens wait until they are whole.</summary>
    public IEnumerable<string> Decode(IEnumerable<int> tokens) {
        const int longestCharacter = 4;
        var pending = new List<int>();
        foreach (var token in tokens) {
            pending.Add(token);
            var text = encoding.Decode(pending);
            if (text.EndsWith('\ufffd') && pending.Count < longestCharacter)
                continue;
            yield return text;
            pending.Clear();
        }
        yield return encoding.Decode(pending);
    }

    /// <summary>Encodes text files as shards PREFIX_val_000000.bin and PREFIX_train_000001.bin, …: each file is split into
    /// documents at the mark for the end of text, whose id is written before each one.</summary>
    /// <param name="valTokens">How many of the first tokens are held out for validation.</param>
    /// <param name="progress">Is told the bytes read so far.</param>
    /// <returns>Number of tokens, and of shards for training.</returns>
    public (long Tokens, int Shards) WriteShards(string prefix, int valTokens, string[] files, Action<long> progress) {
        var old = Files.Glob($"{prefix}_*.bin");
        if (old.Length > 0)
            throw new Gpt2Exception($"{old[0]}: expected no shards of that name yet; remove them first");
        var (tokens, written, shards) = (new List<ushort>(), 0L, 0);
        var pieces = files.SelectMany(file => Pieces(file, progress));
        foreach (var piece in pieces.AsParallel().AsOrdered().Select(EncodePiece)) {
            tokens.AddRange(piece);
            while (written == 0 && valTokens > 0 && tokens.Count >= valTokens)
                WriteShard("val", valTokens);
            while (tokens.Count >= ShardTokens)
                WriteShard("train", ShardTokens);
        }
        if (written < valTokens || tokens.Count + written == valTokens)
            throw new Gpt2Exception($"{files[^1]}: expected text of more than {valTokens} tokens, which are held out for " +
                $"validation, found {written + tokens.Count}");
        if (tokens.Count > 0)
            WriteShard("train", tokens.Count);
        return (written, shards);

        void WriteShard(string split, int count) {
            var path = $"{prefix}_{split}_{(split == "val" ? 0 : ++shards):d6}.bin";
            TokenShard.Write(path, CollectionsMarshal.AsSpan(tokens)[..count]);
            tokens.RemoveRange(0, count);
            written += count;
        }
    }

    /// <summary>A file in pieces that can be encoded apart, and whether each begins a document. No token of GPT-2's pattern
    /// has white space after something else, so any place between the two divides the text.</summary>
    static IEnumerable<(string Text, bool Begins)> Pieces(string path, Action<long> progress) {
        using var reader = Open();
        var (rest, begins, block) = ("", true, new char[PieceCharacters]);
        while (true) {
            var count = Read();
            var text = rest + new string(block, 0, count);
            var cut = text.Length;
            if (count > 0) {
                for (cut--; cut > 0 && (char.IsWhiteSpace(text[cut - 1]) || !char.IsWhiteSpace(text[cut])); cut--);
                progress(reader.BaseStream.Position);
            }
            if (cut > 0)
                yield return (text[..cut], begins);
            begins = cut > 0 ? text.AsSpan(0, cut).EndsWith(EndOfText) : begins;
            rest = text[cut..];
            if (count == 0)
                yield break;
        }

        StreamReader Open() {
            try {
                return new StreamReader(path, new UTF8Encoding(false, throwOnInvalidBytes: true));
            } catch (Exception e) when (e is IOException or UnauthorizedAccessException) {
                throw new Gpt2Exception($"{path}: expected a text file, found {Files.Reason(e)}");
            }
        }

        int Read() {
            try {
                return reader.ReadBlock(block);
            } catch (DecoderFallbackException) {
                throw new Gpt2Exception($"{path}: expected text in UTF-8, found bytes that are not");
            }
        }
    }

    List<ushort> EncodePiece((string Text, bool Begins) piece) {
        var tokens = new List<ushort>();
        var begins = piece.Begins;
        foreach (var document in piece.Text.Split(EndOfText)) {
            if (begins ? !string.IsNullOrWhiteSpace(document) : document.Length > 0) {
                if (begins)
                    tokens.Add(EndOfTextId);
                foreach (var token in encoding.Encode(document))
                    tokens.Add((ushort)token);
            }
            begins = true;
        }
        return tokens;
    }
}
