using System.Buffers;
using System.Buffers.Binary;
using System.IO.Compression;
using System.IO.Enumeration;
using System.Text.Json;
using System.Text.Unicode;
using Microsoft.Win32.SafeHandles;
using Snappier;
using ZstdSharp;

namespace Gpt2;

/// <summary>Documents that can be read apart from others. A worker calls <paramref name="Text"/>, which returns them as
/// UTF-8 in a pooled array, a mark before each; a document that has a mark itself is two.</summary>
/// <param name="Bytes">Memory in bytes that they take until then.</param>
public readonly record struct Block(int Bytes, Func<ArraySegment<byte>> Text);

/// <summary>Files of documents by kind: JSON lines (.jsonl), Parquet (.parquet), and everything else is text. Text and
/// JSON lines may be compressed by gzip (.gz) or Zstandard (.zst).</summary>
public static class Documents {
    /// <summary>Largest line of JSON, and page of Parquet, in bytes.</summary>
    internal const int Largest = 1 << 28;

    internal static ArrayPool<byte> Pool => ArrayPool<byte>.Shared;

    /// <summary>The files that paths stand for. A folder stands for its .txt, .jsonl and .parquet files, compressed ones
    /// too, and those of its folders, in ordinal order; hidden ones and links to folders are left out.</summary>
    /// <exception cref="Gpt2Exception">There is no such file, or none in a folder.</exception>
    public static string[] Find(IEnumerable<string> paths) => [.. paths.SelectMany(path =>
        Directory.Exists(path) ? In(path) is { Length: > 0 } files ? files
            : throw new Gpt2Exception($"{path}: expected .txt, .jsonl or .parquet files in the folder, found none")
        : path == "-" || File.Exists(path) ? [path]
        : throw new Gpt2Exception($"{path}: expected text, found none"))];

    static string[] In(string folder) {
        var options = new EnumerationOptions { RecurseSubdirectories = true, IgnoreInaccessible = false };
        var names = new FileSystemEnumerable<string>(
            folder, (ref entry) => entry.ToSpecifiedFullPath(), options) {
            ShouldIncludePredicate = (ref entry) => !entry.IsDirectory &&
                Regex.IsMatch(entry.FileName, @"\.((txt|jsonl)(\.gz|\.zst)?|parquet)$"),
            ShouldRecursePredicate = (ref entry) => !entry.Attributes.HasFlag(FileAttributes.ReparsePoint),
        };
        return [.. names.Order(StringComparer.Ordinal)];
    }

    /// <summary>The blocks of a file in order, or null if it is text.</summary>
    /// <param name="field">The field or column that has a document's text; where it is null there is none.</param>
    /// <param name="lossy">Whether U+FFFD replaces what is not UTF-8; otherwise that is an error.</param>
    /// <param name="progress">Takes how many more bytes of the file were read.</param>
    public static IEnumerable<Block>? Read(string path, string field, bool lossy, Action<int> progress) =>
        path.EndsWith(".parquet") ? Parquet.Pages(path, field, lossy, progress)
        : Regex.IsMatch(path, @"\.jsonl(\.gz|\.zst)?$") ? Lines(path, field, lossy, progress) : null;

    /// <summary>Opens a file, or standard input for -, and decompresses it by its name.</summary>
    public static Stream Open(string path, bool lossy, Action<int> progress) {
        var handle = path == "-" ? new SafeFileHandle(0, ownsHandle: false) : File.OpenHandle(path);
        Stream stream = new Input(handle, progress);
        stream = path.EndsWith(".gz") ? new GZipStream(stream, CompressionMode.Decompress)
            : path.EndsWith(".zst") ? new DecompressionStream(stream, leaveOpen: false) : stream;
        return lossy ? Encoding.CreateTranscodingStream(stream, Encoding.UTF8, Encoding.UTF8) : stream;
    }

    /// <summary>Fills a span from a stream that <see cref="Open"/> returned.</summary>
    /// <returns>Number of bytes, which is less than the span's only at the end.</returns>
    public static int Fill(Span<byte> bytes, Stream stream, string path) {
        try {
            return stream.ReadAtLeast(bytes, bytes.Length, throwOnEndOfStream: false);
        } catch (Exception e) when (e is InvalidDataException or EndOfStreamException or ZstdException) {
            throw new Gpt2Exception($"{path}: expected whole compressed data, found: {e.Message.TrimEnd('.')}");
        }
    }

    sealed class Input(SafeFileHandle handle, Action<int> progress) : FileStream(handle, FileAccess.Read, bufferSize: 0) {
        // Every kind of reading ends here.
        public override int Read(byte[] buffer, int offset, int count) {
            var read = base.Read(buffer, offset, count);
            progress(read);
            return read;
        }
    }

    /// <summary>Reads lines of JSON, in blocks of some 256 KB.</summary>
    static IEnumerable<Block> Lines(string path, string field, bool lossy, Action<int> progress) {
        const int size = 1 << 18;
        using var stream = Open(path, lossy, progress);
        var (bytes, length, first) = (Pool.Rent(size), 0, 1L);
        for (var goesOn = true; goesOn;) {
            length += Fill(bytes.AsSpan(length), stream, path);
            goesOn = length == bytes.Length;
            var (block, number) = (bytes, first);
            var end = goesOn ? bytes.AsSpan().LastIndexOf((byte)'\n') + 1 : length;
            length -= end;
            if (length > Largest)
                throw new Gpt2Exception($"{path}: line {first}: expected {Largest} bytes or fewer, found more");
            bytes = Pool.Rent(Math.Max(size, 2 * length));
            block.AsSpan(end, length).CopyTo(bytes);
            var lines = block.AsSpan(0, end).Count((byte)'\n') + 1;
            first += lines - 1;
            if (end == 0)
                Pool.Return(block);
            else
                yield return new Block(end, () => Parse(path, block, end, number, lines, field));
        }
    }

    static ArraySegment<byte> Parse(string path, byte[] block, int end, long number, int lines, string field) {
        // A string is no longer than its JSON.
        var (text, length) = (Pool.Rent(end + lines * Tokenizer.Mark.Length), 0);
        foreach (var range in block.AsSpan(0, end).Split((byte)'\n')) {
            var line = block.AsSpan(range);
            line = number == 1 && line.StartsWith(Encoding.UTF8.Preamble) ? line[3..] : line;
            if (line.TrimStart(" \t\r"u8).Length > 0)
                length += Parse($"{path}: line {number}", line, field, text.AsSpan(length));
            number++;
        }
        Pool.Return(block);
        return new(text, 0, length);
    }

    /// <summary>Writes a mark and the text of a line's field; nothing if that is null. The last counts of several.</summary>
    /// <returns>Number of bytes.</returns>
    static int Parse(string where, ReadOnlySpan<byte> line, string field, Span<byte> to) {
        Tokenizer.Mark.CopyTo(to);
        to = to[Tokenizer.Mark.Length..];
        try {
            var json = new Utf8JsonReader(line);
            var length = -1;
            json.Read();
            if (json.TokenType != JsonTokenType.StartObject)
                throw new Gpt2Exception($"{where}: expected an object with '{field}', found {json.TokenType}");
            while (json.Read() && json.TokenType == JsonTokenType.PropertyName) {
                var named = json.ValueTextEquals(field);
                json.Read();
                if (named && json.TokenType is not (JsonTokenType.String or JsonTokenType.Null))
                    throw new Gpt2Exception($"{where}: expected a string in '{field}', found {json.TokenType}");
                if (named)
                    length = json.TokenType == JsonTokenType.Null ? 0 : Tokenizer.Mark.Length + json.CopyString(to);
                json.Skip();
            }
            json.Read(); // throws if there is more
            if (length > 0 && !Utf8.IsValid(to[..(length - Tokenizer.Mark.Length)]))
                throw new Gpt2Exception($"{where}: expected text in UTF-8, found something else; " +
                    "--lossy puts U+FFFD in its place");
            return length >= 0 ? length
                : throw new Gpt2Exception($"{where}: expected '{field}' or another --field, found none");
        } catch (JsonException e) {
            var found = e.Message.Split(" LineNumber")[0].TrimEnd('.');
            throw new Gpt2Exception($"{where}: expected JSON, found at byte {e.BytePositionInLine + 1}: {found}");
        } catch (InvalidOperationException) {
            throw new Gpt2Exception($"{where}: expected characters, found half a surrogate pair");
        }
    }
}

/// <summary>A column of text in a Parquet file, page by page: plain or dictionary encoding, pages of version 1 and 2,
/// compressed by Snappy, gzip, Zstandard or not at all (parquet.apache.org/docs/file-format).</summary>
static class Parquet {
    /// <summary>A row group's part of the column: where its pages begin, how many values they have, their codec.</summary>
    readonly record struct Chunk(long First, long Values, long Codec, long Bytes);

    /// <summary>A page as it is in the file.</summary>
    sealed record Page(Dictionary<int, object> Header, byte[] Bytes, int Size) {
        public long this[int field] => Number(Header, field);
        public Dictionary<int, object> Of(int field) => (Dictionary<int, object>)Header[field];
    }

    const int Magic = 0x31524150; // PAR1

    /// <summary>Reads the pages of a column of strings, and leaves the rest to workers.</summary>
    public static IEnumerable<Block> Pages(string path, string column, bool lossy, Action<int> progress) {
        using var file = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read, 1 << 16);
        var (optional, chunks) = Whole(path, () => ReadFooter(path, file, column));
        var (all, read, told) = (Math.Max(1, chunks.Sum(chunk => (double)chunk.Bytes)), 0L, 0L);
        foreach (var (group, chunk) in chunks.Index()) {
            var where = $"{path}: row group {group + 1}";
            var dictionary = Array.Empty<ReadOnlyMemory<byte>>();
            file.Position = Whole(where, () => chunk.First <= file.Length ? chunk.First : throw new OverflowException());
            for (var left = chunk.Values; left > 0;) {
                var page = Whole(where, () => ReadPage(file));
                read += page.Size;
                // The other columns' bytes count in proportion.
                var done = Math.Max(told, (long)(file.Length * Math.Min(1, read / all)));
                progress((int)Math.Min(int.MaxValue, done - told));
                told = done;
                if (page[1] == 2)
                    dictionary = Whole(where, () => Plain(Decompress(page, chunk.Codec, 0), Number(page.Of(7), 1)).ToArray());
                if (page[1] is not (0 or 3))
                    continue;
                left -= Whole(where, () => Number(page.Of(page[1] == 0 ? 5 : 8), 1));
                var entries = dictionary;
                yield return new Block((int)page[2], () => Whole(where, () => {
                    var text = Text(page, chunk.Codec, optional, entries);
                    return Utf8.IsValid(text) ? text : lossy ? Replace(text)
                        : throw new Gpt2Exception($"{where}: expected text in UTF-8, found something else; " +
                            "--lossy puts U+FFFD in its place");
                }));
            }
        }
    }

    /// <summary>Puts U+FFFD in place of what is not UTF-8.</summary>
    static ArraySegment<byte> Replace(ArraySegment<byte> text) {
        var valid = Documents.Pool.Rent(3 * text.Count);
        return new(valid, 0, Encoding.UTF8.GetBytes(Encoding.UTF8.GetString(text), valid));
    }

    /// <summary>Runs an action, and turns what damaged data ends in into a sentence.</summary>
    static T Whole<T>(string where, Func<T> action) {
        try {
            return action();
        } catch (Exception e) when (e is not Gpt2Exception and not UnauthorizedAccessException) {
            throw new Gpt2Exception($"{where}: expected whole Parquet data, found: {e.Message.TrimEnd('.')}");
        }
    }

    /// <summary>A struct's field of numbers.</summary>
    static long Number(Dictionary<int, object> fields, int id, long without = 0) =>
        fields.TryGetValue(id, out var value) ? (long)value : without;

    static (bool Optional, Chunk[] Chunks) ReadFooter(string path, FileStream file, string column) {
        const int largest = 1 << 24, string_ = 6, repeated = 2;
        var ends = new byte[8];
        file.Seek(-Math.Min(8, file.Length), SeekOrigin.End);
        var isParquet = file.Length > 12 && file.ReadAtLeast(ends, 8, false) == 8 && BitConverter.ToInt32(ends, 4) == Magic;
        if (!isParquet)
            throw new Gpt2Exception($"{path}: expected a Parquet file, which ends with PAR1, found another end");
        var size = BitConverter.ToInt32(ends);
        if (size < 0 || size > Math.Min(largest, file.Length - 12))
            throw new Gpt2Exception($"{path}: expected a footer within the file, of {largest} bytes at most, found {size}");
        file.Position = file.Length - 8 - size;
        var footer = new CompactReader(file, size).Struct();
        var schema = ((List<object>)footer[2]).Cast<Dictionary<int, object>>().ToArray();
        var names = new List<string>();
        for (var i = 1; i < schema.Length;) {
            var element = schema[i];
            var children = Number(element, 5);
            names.Add(Encoding.UTF8.GetString((byte[])element[4]));
            if (names[^1] == column && (children > 0 || Number(element, 1) != string_ || Number(element, 3) == repeated))
                throw new Gpt2Exception($"{path}: expected strings in the column '{column}', found another type");
            if (names[^1] == column)
                return (Number(element, 3) == 1, [.. ((List<object>)footer[4]).Select(ReadChunk)]);
            for (i++; children > 0; children--)
                children += Number(schema[i++], 5);
        }
        throw new Gpt2Exception(
            $"{path}: expected a column '{column}' or another --field, found {string.Join(", ", names.Take(20))}");

        Chunk ReadChunk(object group) {
            foreach (Dictionary<int, object> part in (List<object>)((Dictionary<int, object>)group)[1]) {
                var data = (Dictionary<int, object>)part[3];
                if ((List<object>)data[3] is [byte[] name] && Encoding.UTF8.GetString(name) == column) {
                    var (first, entries) = (Number(data, 9), Number(data, 11));
                    first = entries > 0 && entries < first ? entries : first;
                    return new Chunk(first, Number(data, 5), Number(data, 4), Number(data, 7));
                }
            }
            throw new InvalidDataException("a row group without the column");
        }
    }

    static Page ReadPage(FileStream file) {
        var header = new CompactReader(file, 1 << 24).Struct();
        var (whole, size) = (Number(header, 2, -1), Number(header, 3, -1));
        if (whole < 0 || whole > Documents.Largest || size < 0 || size > file.Length - file.Position)
            throw new InvalidDataException($"a page of {size} bytes, and {whole} when decompressed");
        var page = new Page(header, Documents.Pool.Rent((int)size), (int)size);
        file.ReadExactly(page.Bytes, 0, page.Size);
        return page;
    }

    /// <summary>A page's data; so many bytes at its beginning are not compressed.</summary>
    static byte[] Decompress(Page page, long codec, int before) {
        var from = page.Bytes.AsSpan(0, page.Size);
        var to = new byte[page[2]];
        from[..before].CopyTo(to);
        var rest = to.AsSpan(before);
        if (codec == 2) {
            using var gzip = new GZipStream(
                new MemoryStream(page.Bytes, before, page.Size - before), CompressionMode.Decompress);
            gzip.ReadExactly(rest);
        } else if (codec is 0)
            from[before..].CopyTo(rest);
        else if ((codec switch {
            1 => Snappy.Decompress(from[before..], rest),
            6 => new Decompressor().Unwrap(from[before..], rest),
            _ => throw new InvalidDataException($"compression {codec}; 0, 1, 2 and 6 are read"),
        }) != rest.Length)
            throw new InvalidDataException("a page of another size than its header says");
        Documents.Pool.Return(page.Bytes);
        return to;
    }

    /// <summary>The text of a page's values, a mark before each.</summary>
    static ArraySegment<byte> Text(Page page, long codec, bool optional, ReadOnlyMemory<byte>[] dictionary) {
        var isV2 = page[1] == 3;
        var header = page.Of(isV2 ? 8 : 5);
        var levels = isV2 ? (int)(Number(header, 5) + Number(header, 6)) : 0;
        ReadOnlyMemory<byte> data = Decompress(page, isV2 && Number(header, 7, 1) == 0 ? 0 : codec, levels);
        var count = Number(header, 1) - (isV2 ? Number(header, 2) : 0);
        data = data[levels..];
        if (optional && !isV2) {
            // A value's definition level is 0 if it is null and takes no place, or else 1.
            var size = BinaryPrimitives.ReadInt32LittleEndian(data.Span);
            count = Reader(data.Slice(4, size)).Runs(1, count).Sum(run => run.Value * run.Count);
            data = data[(4 + size)..];
        }
        var values = Number(header, isV2 ? 4 : 2) switch {
            0 => Plain(data, count),
            2 or 8 => Reader(data[1..]).Runs(data.Span[0], count).SelectMany(run =>
                Enumerable.Repeat(dictionary[run.Value], (int)Math.Min(Documents.Largest, run.Count))),
            var encoding => throw new InvalidDataException($"encoding {encoding}; 0, 2 and 8 are read"),
        };
        var (all, bytes) = (new List<ReadOnlyMemory<byte>>(), 0L);
        foreach (var value in values) {
            all.Add(value);
            bytes += Tokenizer.Mark.Length + value.Length;
            if (bytes > 2L * Documents.Largest)
                throw new InvalidDataException($"more than {2L * Documents.Largest} bytes of text in a page");
        }
        var (text, at) = (Documents.Pool.Rent((int)bytes), 0);
        foreach (var value in all) {
            Tokenizer.Mark.CopyTo(text.AsSpan(at));
            value.Span.CopyTo(text.AsSpan(at += Tokenizer.Mark.Length));
            at += value.Length;
        }
        return new(text, 0, at);
    }

    static CompactReader Reader(ReadOnlyMemory<byte> data) =>
        MemoryMarshal.TryGetArray(data, out var array) ? new(new MemoryStream(array.Array!, array.Offset, array.Count)) : null!;

    /// <summary>Values in plain encoding: each after its length.</summary>
    static IEnumerable<ReadOnlyMemory<byte>> Plain(ReadOnlyMemory<byte> data, long count) {
        for (; count > 0; count--) {
            var length = BinaryPrimitives.ReadInt32LittleEndian(data.Span);
            yield return data.Slice(4, length);
            data = data[(4 + length)..];
        }
    }
}

/// <summary>Reads Thrift's compact protocol, and Parquet's runs, from a stream.</summary>
/// <param name="most">How many bytes it may read; one more is an error, as is the stream's end.</param>
sealed class CompactReader(Stream from, int most = int.MaxValue) {
    const int Deepest = 32;

    byte Byte() => most-- > 0 && from.ReadByte() is >= 0 and var value ? (byte)value : throw new EndOfStreamException("its end");

    ulong VarInt() {
        for (var (value, shift) = (0UL, 0); shift < 64; shift += 7) {
            var part = Byte();
            value |= (ulong)(part & 127) << shift;
            if (part < 128)
                return value;
        }
        throw new InvalidDataException("a number of more than 64 bits");
    }

    long SignedVarInt() => VarInt() is var value ? (long)(value >> 1) ^ -(long)(value & 1) : 0;

    byte[] Binary() {
        var length = VarInt();
        var bytes = length <= (ulong)Math.Min(most, from.Length - from.Position) ? new byte[length]
            : throw new EndOfStreamException("a string beyond its end");
        from.ReadExactly(bytes);
        most -= bytes.Length;
        return bytes;
    }

    /// <summary>A struct's fields by number: long, byte[], List or again a Dictionary.</summary>
    public Dictionary<int, object> Struct(int depth = 0) {
        var (fields, id) = (new Dictionary<int, object>(), 0L);
        for (var head = Byte(); head != 0; head = Byte()) {
            id = head >> 4 == 0 ? SignedVarInt() : id + (head >> 4);
            fields[(int)id] = (head & 15) is 1 or 2 ? 2L - (head & 15) : Value(head & 15, depth + 1);
        }
        return fields;
    }

    object Value(int type, int depth) => type switch {
        1 or 2 or 3 => (long)Byte(),
        4 or 5 or 6 => SignedVarInt(),
        7 => (long)(Byte() + Byte() + Byte() + Byte() + Byte() + Byte() + Byte() + Byte()), // a double, which none needs
        8 => Binary(),
        9 or 10 when depth < Deepest => List(depth),
        12 when depth < Deepest => Struct(depth),
        _ => throw new InvalidDataException($"a value of type {type} at depth {depth}"),
    };

    List<object> List(int depth) {
        var (list, head) = (new List<object>(), Byte());
        for (var count = head >> 4 == 15 ? VarInt() : (ulong)head >> 4; count > 0; count--)
            list.Add(Value(head & 15, depth + 1));
        return list;
    }

    /// <summary>So many numbers of <paramref name="width"/> bits: each with how often it comes, or bit by bit.</summary>
    public IEnumerable<(int Value, long Count)> Runs(int width, long count) {
        if (width > 32)
            throw new InvalidDataException($"numbers of {width} bits");
        while (count > 0) {
            var head = VarInt();
            var (isPacked, run) = ((head & 1) == 1, (long)(head >> 1));
            run = Math.Min(count, isPacked ? run << 3 : run);
            count -= run;
            var (bits, held) = (0UL, 0);
            for (var i = 0L; i < (isPacked ? run : 1); i++) {
                for (; held < width; held += 8)
                    bits |= (ulong)Byte() << held;
                yield return ((int)(bits & (1UL << width) - 1), isPacked ? 1 : run);
                (bits, held) = (bits >> width, held - width);
            }
        }
    }
}
