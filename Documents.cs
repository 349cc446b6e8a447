using System.Buffers;
using System.Buffers.Binary;
using System.IO.Compression;
using System.IO.Enumeration;
using System.Text.Json;
using System.Text.Unicode;
using Microsoft.Win32.SafeHandles;
using Snappier;
using ZstdSharp;
using Fields = System.Collections.Generic.Dictionary<int, object>;

namespace Gpt2;

/// <summary>Documents that a worker reads apart from others. <paramref name="Text"/> returns them as UTF-8 in a pooled
/// array, a mark before each; <paramref name="Bytes"/> is the memory that they take until then.</summary>
public readonly record struct Block(int Bytes, Func<ArraySegment<byte>> Text);

/// <summary>Files of documents by kind: JSON lines (.jsonl), Parquet (.parquet), and everything else is text. Text and
/// JSON lines may be compressed by gzip (.gz) or Zstandard (.zst).</summary>
public static class Documents {
    /// <summary>Largest line of JSON, and page of Parquet, in bytes.</summary>
    internal const int Largest = 1 << 28;

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

    /// <summary>The blocks of a file in order, or null if it is text.</summary>
    /// <param name="field">The field or column that has a document's text; null is no document.</param>
    /// <param name="lossy">Whether U+FFFD replaces what is not UTF-8; otherwise that is an error.</param>
    /// <param name="progress">Takes how many more bytes of the file were read.</param>
    public static IEnumerable<Block>? Read(string path, string field, bool lossy, Action<int> progress) =>
        path.EndsWith(".parquet") ? Parquet.Read(path, field, lossy, progress)
        : Regex.IsMatch(path, @"\.jsonl(\.gz|\.zst)?$") ? Lines(path, field, lossy, progress) : null;

    /// <summary>Opens a file, or standard input for -, and decompresses it by its name.</summary>
    public static Stream Open(string path, bool lossy, Action<int> progress) {
        var handle = path == "-" ? new SafeFileHandle(0, ownsHandle: false) : File.OpenHandle(path);
        Stream stream = new Input(handle, progress);
        stream = path.EndsWith(".gz") ? new GZipStream(stream, CompressionMode.Decompress)
            : path.EndsWith(".zst") ? new DecompressionStream(stream, leaveOpen: false) : stream;
        return lossy ? Encoding.CreateTranscodingStream(stream, Encoding.UTF8, Encoding.UTF8) : stream;
    }

    /// <summary>Fills a span from a stream of <see cref="Open"/>; the result is less only at the end.</summary>
    public static int Fill(Span<byte> bytes, Stream stream, string path) {
        try {
            return stream.ReadAtLeast(bytes, bytes.Length, throwOnEndOfStream: false);
        } catch (Exception e) when (e is InvalidDataException or EndOfStreamException or ZstdException) {
            throw new Gpt2Exception($"{path}: expected whole compressed data, found: {e.Message.TrimEnd('.')}");
        }
    }

    sealed class Input(SafeFileHandle handle, Action<int> progress) : FileStream(handle, FileAccess.Read, 0) {
        public override int Read(byte[] buffer, int offset, int count) { // every other Read calls this one
            var read = base.Read(buffer, offset, count);
            progress(read);
            return read;
        }
    }

    /// <summary>Reads lines of JSON, in blocks of some 256 KB.</summary>
    static IEnumerable<Block> Lines(string path, string field, bool lossy, Action<int> progress) {
        const int size = 1 << 18;
        using var stream = Open(path, lossy, progress);
        var (bytes, length, line) = (Pool.Rent(size), 0, 1L);
        for (var goesOn = true; goesOn;) {
            length += Fill(bytes.AsSpan(length), stream, path);
            goesOn = length == bytes.Length;
            var (block, first, end) = (bytes, line, goesOn ? bytes.AsSpan().LastIndexOf((byte)'\n') + 1 : length);
            length -= end;
            if (length >= Largest)
                throw new Gpt2Exception($"{path}: line {line}: expected less than {Largest} bytes, found more");
            bytes = Pool.Rent(Math.Max(size, 2 * length));
            block.AsSpan(end, length).CopyTo(bytes);
            var breaks = block.AsSpan(0, end).Count((byte)'\n');
            line += breaks;
            yield return new(end, () => Parse(path, block, end, first, breaks + 1, field));
        }
    }

    /// <summary>The text of a block's lines.</summary>
    static ArraySegment<byte> Parse(string path, byte[] block, int end, long number, int lines, string field) {
        var (text, length) = (Pool.Rent(end + lines * Tokenizer.Mark.Length), 0); // a string is no longer than its JSON
        foreach (var range in block.AsSpan(0, end).Split((byte)'\n')) {
            var line = block.AsSpan(range);
            line = number == 1 && line.StartsWith(Encoding.UTF8.Preamble) ? line[3..] : line;
            try {
                length += line.TrimStart(" \t\r"u8).Length > 0 ? Parse(line, field, text.AsSpan(length)) : 0;
            } catch (Exception e) when (e is Gpt2Exception or JsonException or InvalidOperationException) {
                throw new Gpt2Exception($"{path}: line {number}: expected " + (e switch {
                    Gpt2Exception => e.Message,
                    JsonException { BytePositionInLine: var at } =>
                        $"JSON, found at byte {at + 1}: {e.Message.Split(" LineNumber")[0].TrimEnd('.')}",
                    _ => Utf8.IsValid(line) ? "characters, found half a surrogate pair" : NotUtf8,
                }));
            }
            number++;
        }
        Pool.Return(block);
        return new(text, 0, length);
    }

    /// <summary>Writes a mark and the text of a line's field, or nothing if that is null; the last counts of several.
    /// The result is the number of bytes.</summary>
    static int Parse(ReadOnlySpan<byte> line, string field, Span<byte> to) {
        var length = -1;
        var json = new Utf8JsonReader(line);
        if (!json.Read() || json.TokenType != JsonTokenType.StartObject)
            throw new Gpt2Exception($"an object, found {json.TokenType}");
        while (json.Read() && json.TokenType == JsonTokenType.PropertyName) {
            var isText = json.ValueTextEquals(field);
            json.Read();
            length = !isText ? length : json.TokenType switch {
                JsonTokenType.Null => 0,
                JsonTokenType.String => json.CopyString(to[Tokenizer.Mark.Length..]) + Tokenizer.Mark.Length,
                _ => throw new Gpt2Exception($"a string in '{field}', found {json.TokenType}"),
            };
            json.Skip();
        }
        json.Read(); // throws if there is more
        Tokenizer.Mark.CopyTo(to);
        return length >= 0 ? length : throw new Gpt2Exception($"a field '{field}' (--field names another), found none");
    }
}

/// <summary>A column of strings in a Parquet file (parquet.apache.org/docs/file-format): pages of version 1 and 2,
/// plain or by dictionary, compressed by Snappy, gzip, Zstandard or not at all. Hostile files end in a sentence.
/// (Parquet.Net 6.1.0 never returns from a footer that is cut off, and a deep one overflows its stack.)</summary>
static class Parquet {
    const long Strings = 6, Optional = 1, Repeated = 2; // a type, and repetitions
    const long DataPage = 0, DictionaryPage = 2, DataPageV2 = 3;

    /// <summary>Reads a column page by page; workers decompress and decode them.</summary>
    public static IEnumerable<Block> Read(string path, string column, bool lossy, Action<int> progress) {
        using var blocks = Pages(path, column, progress).GetEnumerator();
        while (Whole(() => blocks.MoveNext())) {
            var (bytes, read) = blocks.Current;
            yield return new(bytes, () => {
                var text = Whole(read);
                if (Utf8.IsValid(text))
                    return text;
                var valid = lossy ? Documents.Pool.Rent(3 * text.Count)
                    : throw new Gpt2Exception($"{path}: expected {Documents.NotUtf8}");
                return new(valid, 0, Encoding.UTF8.GetBytes(Encoding.UTF8.GetString(text), valid));
            });
        }

        // Damage ends in all kinds of exceptions.
        T Whole<T>(Func<T> read) {
            try {
                return read();
            } catch (Exception e) when (e is not (Gpt2Exception or UnauthorizedAccessException)) {
                throw new Gpt2Exception($"{path}: expected whole Parquet data, found: {e.Message.TrimEnd('.')}");
            }
        }
    }

    static IEnumerable<Block> Pages(string path, string column, Action<int> progress) {
        using var file = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read, 1 << 16);
        var (optional, chunks) = ReadFooter(path, file, column);
        // The other columns' bytes count in proportion.
        var share = file.Length / Math.Max(1, chunks.Sum(chunk => (double)Number(chunk, 7)));
        foreach (var chunk in chunks) {
            var (codec, first, entries) = (Number(chunk, 4), Number(chunk, 9), Number(chunk, 11));
            file.Position = entries > 0 ? Math.Min(first, entries) : first;
            ReadOnlyMemory<byte>[] dictionary = [];
            for (var left = Number(chunk, 5); left > 0;) {
                var header = new CompactReader(file, 1 << 24).Struct();
                var (type, whole, size) = (Number(header, 1), Number(header, 2), Number(header, 3));
                if (whole is < 0 or > Documents.Largest || size < 0 || size > file.Length - file.Position)
                    throw new InvalidDataException($"a page of {size} bytes, {whole} when decompressed");
                var page = new byte[size];
                file.ReadExactly(page);
                progress((int)(share * size));
                if (type == DictionaryPage)
                    dictionary = [.. Plain(Decompress(page, codec, 0, whole), Number((Fields)header[7], 1))];
                if (type is not (DataPage or DataPageV2))
                    continue;
                var (values, known) = ((Fields)header[type == DataPage ? 5 : 8], dictionary);
                left -= Number(values, 1);
                yield return new((int)whole, () => {
                    var count = Number(values, 1);
                    if (type == DataPage)
                        return Text(Decompress(page, codec, 0, whole), 0, optional, count, Number(values, 2), known);
                    var levels = (int)(Number(values, 5) + Number(values, 6)); // which are not compressed
                    var data = Decompress(page, Number(values, 7, 1) == 0 ? 0 : codec, levels, whole);
                    return Text(data, levels, false, count - Number(values, 2), Number(values, 4), known);
                });
            }
        }
    }

    /// <summary>Whether the column may have nulls, and the metadata of its part of each row group.</summary>
    static (bool Optional, Fields[] Chunks) ReadFooter(string path, FileStream file, string column) {
        var (end, names) = (new byte[8], new List<string>());
        file.Position = Math.Max(0, file.Length - 8);
        file.ReadExactly(end);
        if (!end.AsSpan(4).SequenceEqual("PAR1"u8))
            throw new InvalidDataException("another end than PAR1");
        var size = BitConverter.ToInt32(end);
        file.Position = file.Length - 8 - size;
        var footer = new CompactReader(file, Math.Min(size, 1 << 24)).Struct();
        Fields[] schema = [.. ((List<object>)footer[2]).Cast<Fields>()];
        for (var i = 1; i < schema.Length;) {
            var (element, children) = (schema[i], Number(schema[i++], 5));
            names.Add(Encoding.UTF8.GetString((byte[])element[4]));
            if (names[^1] == column) {
                var repetition = Number(element, 3);
                return children == 0 && Number(element, 1) == Strings && repetition != Repeated
                    ? (repetition == Optional, [.. ((List<object>)footer[4]).Select(ChunkOf)])
                    : throw new Gpt2Exception($"{path}: expected strings in '{column}', found another type");
            }
            for (; children > 0; children--)
                children += Number(schema[i++], 5);
        }
        throw new Gpt2Exception($"{path}: expected a column '{column}' or another --field, " +
            $"found {string.Join(", ", names.Take(20))}");

        Fields ChunkOf(object group) => ((List<object>)((Fields)group)[1]).Select(part => (Fields)((Fields)part)[3])
            .First(data => (List<object>)data[3] is [byte[] name] && Encoding.UTF8.GetString(name) == column);
    }

    static long Number(Fields fields, int id, long without = 0) =>
        fields.TryGetValue(id, out var value) ? (long)value : without;

    /// <summary>A page's data, of which so many bytes at its beginning are not compressed.</summary>
    static byte[] Decompress(byte[] page, long codec, int before, long whole) {
        var (data, from) = (new byte[whole], page.AsMemory(before));
        page.AsSpan(0, before).CopyTo(data);
        var to = data.AsMemory(before);
        using var gzip = new GZipStream(new MemoryStream(page[before..]), CompressionMode.Decompress);
        using var zstd = new Decompressor();
        var length = codec switch {
            0 => from.TryCopyTo(to) ? from.Length : -1,
            1 => Snappy.Decompress(from.Span, to.Span),
            2 => gzip.ReadAtLeast(to.Span, to.Length, throwOnEndOfStream: false),
            6 => zstd.Unwrap(from.Span, to.Span),
            _ => throw new InvalidDataException($"compression {codec} (none, Snappy, gzip and Zstandard are read)"),
        };
        return length == to.Length ? data
            : throw new InvalidDataException($"a page of {length} bytes, not {to.Length}");
    }

    /// <summary>The text of a page's values, from a place on; their number counts nulls if they are optional.</summary>
    static ArraySegment<byte> Text(
        byte[] page, int at, bool optional, long count, long encoding, ReadOnlyMemory<byte>[] dictionary) {
        if (optional) {
            count = Reader(4).Runs(1, count).Sum(run => run.Value * run.Count); // of each value: 1, or 0 for null
            at = 4 + BinaryPrimitives.ReadInt32LittleEndian(page);
        }
        if (count > Documents.Largest / Tokenizer.Mark.Length)
            throw new InvalidDataException($"{count} values in a page");
        var values = encoding switch {
            0 => Plain(page.AsMemory(at), count),
            2 or 8 => Entries(),
            _ => throw new InvalidDataException($"encoding {encoding} (plain and dictionary are read)"),
        };
        var bytes = values.Sum(value => (long)Tokenizer.Mark.Length + value.Length);
        if (bytes > 2L * Documents.Largest)
            throw new InvalidDataException($"{bytes} bytes of text in a page");
        var (text, length) = (Documents.Pool.Rent((int)bytes), 0);
        foreach (var value in values) {
            Tokenizer.Mark.CopyTo(text.AsSpan(length));
            value.Span.CopyTo(text.AsSpan(length + Tokenizer.Mark.Length));
            length += Tokenizer.Mark.Length + value.Length;
        }
        return new(text, 0, length);

        IEnumerable<ReadOnlyMemory<byte>> Entries() {
            foreach (var (entry, times) in Reader(at + 1).Runs(page[at], count)) {
                for (var i = 0L; i < times; i++)
                    yield return dictionary[entry];
            }
        }

        CompactReader Reader(int from) => new(new MemoryStream(page, from, page.Length - from), page.Length);
    }

    /// <summary>Strings that follow each other, each after its length.</summary>
    static IEnumerable<ReadOnlyMemory<byte>> Plain(ReadOnlyMemory<byte> data, long count) {
        for (; count > 0; count--) {
            var length = BinaryPrimitives.ReadInt32LittleEndian(data.Span);
            yield return data.Slice(4, length);
            data = data[(4 + length)..];
        }
    }
}

/// <summary>Reads Thrift's compact protocol, and Parquet's runs of numbers.</summary>
/// <param name="most">How many bytes it may read; one more is an error, as is the stream's end.</param>
sealed class CompactReader(Stream from, int most) {
    const int Deepest = 32;

    byte Byte() => most-- > 0 && from.ReadByte() is >= 0 and var value ? (byte)value
        : throw new EndOfStreamException("its end");

    byte[] Bytes(ulong count) {
        var bytes = count <= (ulong)Math.Max(0, most) ? new byte[count] : throw new EndOfStreamException("its end");
        from.ReadExactly(bytes);
        most -= bytes.Length;
        return bytes;
    }

    ulong VarInt() {
        var (value, part, shift) = (0UL, (byte)0x80, 0);
        for (; part >= 0x80 && shift < 64; shift += 7) {
            part = Byte();
            value |= (part & 0x7fUL) << shift;
        }
        return value;
    }

    /// <summary>A struct's fields: a number is a long, a string a byte[], a list a List, a struct Fields.</summary>
    public Fields Struct(int depth = 0) {
        var (fields, id) = (new Fields(), 0);
        for (var head = Byte(); head != 0; head = Byte()) {
            id = head >> 4 == 0 ? (int)(long)Value(5, depth) : id + (head >> 4);
            fields[id] = (head & 15) is 1 or 2 ? 2L - (head & 15) : Value(head & 15, depth);
        }
        return fields;
    }

    object Value(int type, int depth) => type switch {
        1 or 2 or 3 => (long)Byte(),
        4 or 5 or 6 => VarInt() is var value ? (long)(value >> 1) ^ -(long)(value & 1) : 0,
        7 => Bytes(8),
        8 => Bytes(VarInt()),
        9 or 10 when depth < Deepest => List(depth + 1),
        12 when depth < Deepest => Struct(depth + 1),
        _ => throw new InvalidDataException($"a value of type {type} at depth {depth}"),
    };

    List<object> List(int depth) {
        var (list, head) = (new List<object>(), Byte());
        for (var count = head >> 4 == 15 ? VarInt() : (ulong)head >> 4; count > 0; count--)
            list.Add(Value(head & 15, depth));
        return list;
    }

    /// <summary>So many numbers of a width in bits: a run of one number, or packed numbers one by one.</summary>
    public IEnumerable<(int Value, long Count)> Runs(int width, long count) {
        if (width > 32)
            throw new InvalidDataException($"numbers of {width} bits");
        while (count > 0) {
            var head = VarInt();
            var isPacked = (head & 1) == 1;
            var run = (long)Math.Min((ulong)count, isPacked ? head >> 1 << 3 : head >> 1);
            var (bits, held) = (0UL, 0);
            for (var i = 0L; i < (isPacked ? run : 1); i++) {
                for (; held < width; held += 8)
                    bits |= (ulong)Byte() << held;
                yield return ((int)(bits & (1UL << width) - 1), isPacked ? 1 : run);
                (bits, held) = (bits >> width, held - width);
            }
            count -= run;
        }
    }
}
