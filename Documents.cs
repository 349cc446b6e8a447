using System.Buffers;
using System.IO.Compression;
using System.IO.Enumeration;
using System.IO.Pipelines;
using System.Text.Json;
using System.Text.Unicode;
using Microsoft.Win32.SafeHandles;
using Snappier;
using ZstdSharp;
using Fields = System.Collections.Generic.Dictionary<int, object>;

namespace Gpt2;

/// <summary>Documents that a worker reads apart from others, from so many bytes in memory: in a pooled array, a mark
/// before each.</summary>
public readonly record struct Block(int Bytes, Func<ArraySegment<byte>> Text);

/// <summary>Files of documents by kind: JSON lines (.jsonl), Parquet (.parquet), and everything else is text. Text and
/// JSON lines may be compressed by gzip (.gz) or Zstandard (.zst).</summary>
public static class Documents {
    /// <summary>Largest line of JSON, and page of Parquet, in bytes.</summary>
    internal const long Largest = 1 << 28;

    internal const string NotUtf8 = "text in UTF-8, found something else; --lossy puts U+FFFD in its place";

    internal static ArrayPool<byte> Pool => ArrayPool<byte>.Shared;

    /// <summary>The files that paths stand for. A folder stands for its .txt, .jsonl and .parquet files, compressed
    /// ones and those of its folders too, in ordinal order; hidden ones and links to folders are left out.</summary>
    /// <exception cref="Gpt2Exception">There is no such file, or none in a folder.</exception>
    public static string[] Find(IEnumerable<string> paths) => [.. paths.SelectMany(path =>
        path == "-" || File.Exists(path) ? [path]
        : !Directory.Exists(path) ? throw new Gpt2Exception($"{path}: expected text, found none")
        : FilesIn(path).Order(StringComparer.Ordinal).ToArray() is { Length: > 0 } files ? files
        : throw new Gpt2Exception($"{path}: expected .txt, .jsonl or .parquet files in the folder, found none"))];

    static FileSystemEnumerable<string> FilesIn(string folder) => new(
        folder, (ref entry) => entry.ToSpecifiedFullPath(),
        new EnumerationOptions { RecurseSubdirectories = true, IgnoreInaccessible = false }) {
        ShouldRecursePredicate = (ref entry) => !entry.Attributes.HasFlag(FileAttributes.ReparsePoint),
        ShouldIncludePredicate = (ref entry) => !entry.IsDirectory &&
            Regex.IsMatch(entry.FileName, @"\.((txt|jsonl)(\.gz|\.zst)?|parquet)$"),
    };

    /// <summary>Opens a file, or standard input for -, and decompresses it by its name.</summary>
    /// <param name="lossy">Whether U+FFFD replaces what is not UTF-8.</param>
    /// <param name="progress">Takes how many more bytes of the file were read.</param>
    public static Stream Open(string path, bool lossy, Action<int> progress) {
        var handle = path == "-" ? new SafeFileHandle(0, ownsHandle: false) : File.OpenHandle(path);
        Stream stream = new Input(handle, progress);
        stream = path.EndsWith(".gz") ? new GZipStream(stream, CompressionMode.Decompress)
            : path.EndsWith(".zst") ? new DecompressionStream(stream, leaveOpen: false) : stream;
        stream = lossy ? Encoding.CreateTranscodingStream(stream, Encoding.UTF8, Encoding.UTF8) : stream;
        return stream is Input ? stream : Ahead(stream);
    }

    /// <summary>Reads a stream on a thread of its own, so that others need not wait for decompression.</summary>
    static Stream Ahead(Stream stream) {
        var pipe = new Pipe(
            new(pauseWriterThreshold: 4 << 20, resumeWriterThreshold: 2 << 20, minimumSegmentSize: 1 << 17));
        Task.Factory.StartNew(() => {
            using var closed = stream;
            Exception? damage = null;
            try {
                for (int read; (read = stream.Read(pipe.Writer.GetSpan())) > 0;) {
                    pipe.Writer.Advance(read);
                    if (pipe.Writer.FlushAsync().AsTask().Result.IsCompleted)
                        break;
                }
            } catch (Exception e) {
                damage = e;
            }
            pipe.Writer.Complete(damage); // which the reader throws
        }, TaskCreationOptions.LongRunning);
        return pipe.Reader.AsStream();
    }

    sealed class Input(SafeFileHandle handle, Action<int> progress) : FileStream(handle, FileAccess.Read, 0) {
        public override int Read(byte[] buffer, int offset, int count) { // every other Read calls this one
            var read = base.Read(buffer, offset, count);
            progress(read);
            return read;
        }
    }

    /// <summary>The blocks of a file in order, read within <see cref="Whole"/>; or null if it is text.</summary>
    /// <param name="field">The field or column that has a document's text; null is no document.</param>
    /// <param name="lossy">Whether U+FFFD replaces what is not UTF-8 in JSON lines.</param>
    /// <param name="progress">Takes how many more bytes of the file were read.</param>
    public static IEnumerable<Block>? Read(string path, string field, bool lossy, Action<int> progress) =>
        path.EndsWith(".parquet") ? Parquet.Read(path, field, progress)
        : Regex.IsMatch(path, @"\.jsonl(\.gz|\.zst)?$") ? Lines(path, field, lossy, progress) : null;

    /// <summary>A block's text, if it is UTF-8.</summary>
    public static ArraySegment<byte> Text(string path, Block block) => Whole(path, () =>
        block.Text() is var text && Utf8.IsValid(text) ? text
            : throw new InvalidDataException("text that is not UTF-8"));

    /// <summary>Puts documents into a pooled array, a mark before each.</summary>
    internal static ArraySegment<byte> Join(IEnumerable<ReadOnlyMemory<byte>> documents) {
        var (bytes, length) = (documents.Sum(document => (long)Tokenizer.Mark.Length + document.Length), 0);
        var text = Pool.Rent(bytes <= 2 * Largest ? (int)bytes : throw new InvalidDataException($"a page of {bytes}"));
        foreach (var document in documents) {
            Tokenizer.Mark.CopyTo(text.AsSpan(length));
            document.Span.CopyTo(text.AsSpan(length + Tokenizer.Mark.Length));
            length += Tokenizer.Mark.Length + document.Length;
        }
        return new(text, 0, length);
    }

    /// <summary>Reads from a file, whose damage ends in all kinds of exceptions.</summary>
    /// <exception cref="Gpt2Exception">It did.</exception>
    public static T Whole<T>(string path, Func<T> read) {
        try {
            return read();
        } catch (Exception e) when (e is not (Gpt2Exception or UnauthorizedAccessException or OutOfMemoryException)) {
            throw new Gpt2Exception($"{path}: expected whole data, found: {e.Message.TrimEnd('.')}");
        }
    }

    /// <summary>Reads lines of JSON, in blocks of some 256 KB.</summary>
    static IEnumerable<Block> Lines(string path, string field, bool lossy, Action<int> progress) {
        using var stream = Open(path, lossy, progress);
        byte[] rest = []; // the beginning of a line
        for (var (number, goesOn) = (0L, true); goesOn;) {
            var (bytes, before) = (Pool.Rent(Math.Max(1 << 18, 2 * rest.Length)), number);
            rest.CopyTo(bytes, 0);
            var length = rest.Length + stream.ReadAtLeast(
                bytes.AsSpan(rest.Length), bytes.Length - rest.Length, throwOnEndOfStream: false);
            goesOn = length == bytes.Length;
            var end = goesOn ? bytes.AsSpan().LastIndexOf((byte)'\n') + 1 : length;
            rest = bytes[end..length];
            number += bytes.AsSpan(0, end).Count((byte)'\n');
            if (rest.Length >= Largest)
                throw new Gpt2Exception($"{path}: line {number + 1}: expected less than {Largest} bytes, found more");
            yield return new(end, () => {
                var text = Parse(path, bytes.AsSpan(0, end), before, field);
                Pool.Return(bytes);
                return text;
            });
        }
    }

    /// <summary>Puts the documents of some lines, before which there are others, into a pooled array, marks between.
    /// </summary>
    static ArraySegment<byte> Parse(string path, ReadOnlySpan<byte> lines, long number, string field) {
        var mark = Tokenizer.Mark.Length;
        var (text, length) = (Pool.Rent(lines.Length + mark * (lines.Count((byte)'\n') + 1)), 0);
        foreach (var range in lines.Split((byte)'\n')) {
            var line = lines[range];
            line = line[(line.StartsWith(Encoding.UTF8.Preamble) ? 3 : 0)..].TrimStart(" \t\r"u8);
            number++;
            if (line.IsEmpty)
                continue;
            try {
                if (CopyField(line, field, text.AsSpan(length + mark)) is { } size) {
                    Tokenizer.Mark.CopyTo(text.AsSpan(length));
                    length += mark + size;
                }
            } catch (Exception e) when (e is JsonException or InvalidOperationException) {
                throw new Gpt2Exception($"{path}: line {number}: expected " + (!Utf8.IsValid(line) ? NotUtf8
                    : $"an object of JSON with a string '{field}' (or another --field), found: " +
                    e.Message.Replace("LineNumber: 0 | BytePositionInLine:", "At byte").TrimEnd('.')));
            }
        }
        return new(text, 0, length);
    }

    /// <summary>Copies a string out of an object of JSON.</summary>
    /// <returns>Its size in bytes; null if the field is null.</returns>
    static int? CopyField(ReadOnlySpan<byte> line, string field, Span<byte> to) {
        var json = new Utf8JsonReader(line);
        var (found, size) = (false, (int?)null);
        if (json.Read() && json.TokenType != JsonTokenType.StartObject)
            throw new InvalidOperationException(NameOf(json));
        while (json.Read()) {
            if (json.CurrentDepth != 1 || json.TokenType != JsonTokenType.PropertyName || !json.ValueTextEquals(field))
                continue;
            (_, found) = (json.Read(), true);
            size = json.TokenType switch {
                JsonTokenType.String => json.CopyString(to),
                JsonTokenType.Null => null,
                _ => throw new InvalidOperationException($"a field of type {NameOf(json)}"),
            };
        }
        return !found ? throw new InvalidOperationException("no such field")
            : size == null || Utf8.IsValid(to[..size.Value]) ? size : throw new InvalidOperationException(NotUtf8);

        static string NameOf(Utf8JsonReader json) => $"{json.TokenType}".Replace("Start", "");
    }
}

/// <summary>A column of strings in a Parquet file (parquet.apache.org/docs/file-format): pages of version 1 and 2,
/// plain or by dictionary, compressed by Snappy, gzip, Zstandard or not at all. Damage ends in an exception.
/// (Parquet.Net 6.1.0 never returns from a footer that is cut off, and a deep one overflows its stack.)</summary>
static class Parquet {
    const long Strings = 6, Optional = 1, Repeated = 2; // a type, and repetitions
    const long DataPage = 0, DictionaryPage = 2, DataPageV2 = 3;

    /// <summary>Reads a column page by page; workers decompress and decode them.</summary>
    public static IEnumerable<Block> Read(string path, string column, Action<int> progress) {
        using var file = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read, 1 << 16);
        var (optional, chunks) = ReadFooter(path, file, column);
        var done = 0L; // with the other columns, that are skipped
        foreach (var chunk in chunks) {
            var (codec, first, entries) = (Number(chunk, 4), Number(chunk, 9), Number(chunk, 11));
            file.Position = entries > 0 ? Math.Min(first, entries) : first;
            ReadOnlyMemory<byte>[] dictionary = [];
            for (var left = Number(chunk, 5); left > 0;) {
                var header = new CompactReader(file).Struct();
                var (type, whole, page) = (Number(header, 1), Size(header, 2), new byte[Size(header, 3)]);
                file.ReadExactly(page);
                progress((int)Math.Clamp(file.Position - done, 0, int.MaxValue));
                done = Math.Max(done, file.Position);
                if (type == DictionaryPage)
                    dictionary = [.. Plain(Decompress(page, codec, whole), 0, Size((Fields)header[7], 1))];
                if (type is not (DataPage or DataPageV2))
                    continue;
                var (values, known) = ((Fields)header[type == DataPage ? 5 : 8], dictionary);
                var (count, levels) = (Size(values, 1), type == DataPage ? 0 : Size(values, 5) + Size(values, 6));
                left -= count;
                // Version 2 has levels first, which are not compressed, and the number of nulls.
                yield return new(whole, () => Documents.Join(type == DataPage
                    ? Values(Decompress(page, codec, whole), optional, count, Number(values, 2), known)
                    : Values(Decompress(page.AsSpan(levels), Number(values, 7, 1) * codec, whole - levels), false,
                        count - Size(values, 2), Number(values, 4), known)));
            }
        }
    }

    /// <summary>Whether the column may have nulls, and the metadata of its part of each row group.</summary>
    static (bool Optional, Fields[] Chunks) ReadFooter(string path, FileStream file, string column) {
        var end = new byte[8];
        file.Position = file.Length - end.Length;
        file.ReadExactly(end);
        file.Position -= end.AsSpan(4).SequenceEqual("PAR1"u8) ? end.Length + BitConverter.ToInt32(end)
            : throw new InvalidDataException("another end than PAR1");
        var footer = new CompactReader(file).Struct();
        Fields[] leaves = [.. Structs(footer[2]).Where(element => Number(element, 5) == 0)]; // in the order of columns
        Fields[][] groups = [.. Structs(footer[4])
            .Select(group => Structs(group[1]).Select(part => (Fields)part[3]).ToArray())];
        if (groups.Length == 0)
            return (false, []);
        string[] names = [.. groups[0].Select(data =>
            (List<object>)data[3] is [byte[] name] ? Encoding.UTF8.GetString(name) : "(nested)")];
        var at = Array.IndexOf(names, column);
        if (at < 0 || Number(leaves[at], 1) != Strings || Number(leaves[at], 3) == Repeated)
            throw new Gpt2Exception($"{path}: expected a column of strings '{column}' (or another --field), " +
                $"found columns {string.Join(", ", names.Take(20))}");
        return (Number(leaves[at], 3) == Optional, [.. groups.Select(group => group[at])]);
    }

    static IEnumerable<Fields> Structs(object list) => ((List<object>)list).Cast<Fields>();

    static long Number(Fields fields, int id, long without = 0) =>
        fields.TryGetValue(id, out var value) ? (long)value : without;

    /// <summary>A number of bytes or values in a page.</summary>
    static int Size(Fields fields, int id) => Number(fields, id) is >= 0 and <= Documents.Largest and var size
        ? (int)size : throw new InvalidDataException($"a page of {Number(fields, id)} bytes or values");

    static byte[] Decompress(ReadOnlySpan<byte> page, long codec, int whole) {
        var data = new byte[whole];
        using var zstd = new Decompressor();
        var length = codec switch {
            0 => page.TryCopyTo(data) ? page.Length : -1,
            1 => Snappy.Decompress(page, data),
            2 => new GZipStream(new MemoryStream([.. page]), CompressionMode.Decompress)
                .ReadAtLeast(data, whole, throwOnEndOfStream: false),
            6 => zstd.Unwrap(page, data),
            _ => throw new InvalidDataException($"compression {codec} (none, Snappy, gzip and Zstandard are read)"),
        };
        return length == whole ? data : throw new InvalidDataException($"a page of {length} bytes, not {whole}");
    }

    /// <summary>A page's values; their number counts nulls if they are optional.</summary>
    static IEnumerable<ReadOnlyMemory<byte>> Values(
        byte[] page, bool optional, int count, long encoding, ReadOnlyMemory<byte>[] dictionary) {
        var at = optional ? 4 + BitConverter.ToInt32(page) : 0;
        count = optional ? Runs(page, 4, 1, count).Sum() : count; // of 1 for each value, and 0 for null
        return encoding switch {
            0 => Plain(page, at, count),
            2 or 8 => Runs(page, at + 1, page[at], count).Select(entry => dictionary[entry]),
            _ => throw new InvalidDataException($"encoding {encoding} (plain and dictionary are read)"),
        };
    }

    /// <summary>Strings that follow each other, each after its length.</summary>
    static IEnumerable<ReadOnlyMemory<byte>> Plain(byte[] data, int at, int count) {
        for (; count > 0; count--) {
            var length = BitConverter.ToInt32(data, at);
            yield return data.AsMemory(at + 4, length);
            at += 4 + length;
        }
    }

    /// <summary>So many numbers of a width in bits, in runs: one number many times, or packed numbers.</summary>
    static IEnumerable<int> Runs(byte[] data, int at, int width, int count) {
        var from = new BinaryReader(new MemoryStream(data, at, data.Length - at));
        while (count > 0) {
            var (head, bits, held) = (from.Read7BitEncodedInt64(), 0UL, 0);
            var isPacked = (head & 1) == 1;
            var run = (int)Math.Clamp(isPacked ? head >> 1 << 3 : head >> 1, 0, count);
            for (count -= run; run > 0; run--) {
                for (; held < width; held += 8)
                    bits |= (ulong)from.ReadByte() << held;
                yield return (int)(bits & (1UL << width) - 1);
                if (isPacked)
                    (bits, held) = (bits >> width, held - width);
            }
        }
    }
}

/// <summary>Reads Thrift's compact protocol. It throws where there is more than any Parquet file needs.</summary>
sealed class CompactReader(Stream from) : BinaryReader(from) {
    int left = 1 << 22; // values

    /// <summary>A struct's fields: a number is a long, a string a byte[], a list a List, a struct Fields.</summary>
    public Fields Struct(int depth = 0) {
        var (fields, id) = (new Fields(), 0);
        for (var head = ReadByte(); head != 0; head = ReadByte()) {
            id = head >> 4 == 0 ? (int)(long)Value(5, depth) : id + (head >> 4);
            fields[id] = (head & 15) is 1 or 2 ? 2L - (head & 15) : Value(head & 15, depth);
        }
        return fields;
    }

    object Value(int type, int depth) => type switch {
        _ when depth > 32 || left-- == 0 => throw new InvalidDataException("more than 32 levels or 4194304 values"),
        1 or 2 or 3 => (long)ReadByte(),
        4 or 5 or 6 => Read7BitEncodedInt64() is var value ? (long)((ulong)value >> 1) ^ -(value & 1) : 0,
        7 => ReadInt64(),
        8 => ReadBytes(Math.Min(Read7BitEncodedInt(), (int)Documents.Largest)),
        9 or 10 => List(depth + 1),
        12 => Struct(depth + 1),
        _ => throw new InvalidDataException($"a value of type {type}"),
    };

    List<object> List(int depth) {
        var (list, head) = (new List<object>(), ReadByte());
        for (var count = head >> 4 == 15 ? Read7BitEncodedInt() : head >> 4; count > 0; count--)
            list.Add(Value(head & 15, depth));
        return list;
    }
}
