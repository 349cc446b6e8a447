using System.Buffers;
using System.Text.Json;
using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>Documents in files of every kind, against the same ones in a text; and files that are damaged.</summary>
public class DocumentTests {
    static readonly Tokenizer Tokenizer = new();

    /// <summary>The goldens: rows.txt, and the same rows as other programs wrote them.</summary>
    public static IEnumerable<string> Rows() => Directory.GetFiles(Golden("rows"))
        .Select(path => Path.GetFileName(path)).Where(name => name != "rows.txt").Order(StringComparer.Ordinal);

    static string Row(string name) => Path.Combine(Golden("rows"), name);

    /// <summary>The tokens of files, which are one shard.</summary>
    static ushort[] Tokens(TemporaryFolder folder, bool lossy, string field, params string[] files) {
        foreach (var old in Directory.GetFiles(folder.Path, "new_*"))
            File.Delete(old);
        Tokenizer.WriteShards(folder["new"], 0, files, lossy, (_, _) => { }, field);
        return [.. MemoryMarshal.Cast<byte, ushort>(File.ReadAllBytes(folder["new_train_000001.bin"]).AsSpan(1024))];
    }

    /// <summary>The sentence that tokenizing a file ends with.</summary>
    static string Refusal(TemporaryFolder folder, string file, string field = "text", bool lossy = false) {
        try {
            _ = Tokens(folder, lossy, field, file);
        } catch (Exception e) when ((e as AggregateException)?.InnerException is Gpt2Exception || e is Gpt2Exception) {
            return (e as Gpt2Exception ?? e.InnerException!).Message;
        }
        return "nothing was refused";
    }

    [Test]
    [MethodDataSource(nameof(Rows))]
    public async Task EveryKindHasTheTokensOfItsText(string name) {
        using var folder = new TemporaryFolder();
        var expected = Tokenizer.Encode(File.ReadAllText(Row("rows.txt")).Replace("<|endoftext|> <|endoftext|>",
            "<|endoftext|>").Replace("<|endoftext|><|endoftext|>", "<|endoftext|>"));
        await Same(Tokens(folder, false, "text", Row(name)).Select(token => (int)token),
            [Tokenizer.EndOfTextId, .. expected]);
    }

    [Test]
    public async Task LinesOfAnyLengthAreReadInOrder() {
        using var folder = new TemporaryFolder();
        var random = new Random(1);
        var words = "One two 中文 \"three\"\\ \t 4 😀 é".Split(' ');
        int[] lengths = [1, 20, 300_000, 3, 40_000, 2, 900_000, 0, 5, .. Enumerable.Range(0, 3000)];
        string[] documents = [.. lengths.Select(length => string.Concat(Enumerable.Range(0, length / 4 + length % 2)
            .Select(_ => $" {words[random.Next(words.Length)]}")))];
        File.WriteAllText(folder["a.txt"], string.Join(Tokenizer.EndOfText, documents));
        var expected = Tokens(folder, false, "text", folder["a.txt"]);
        File.WriteAllLines(folder["a.jsonl"], documents.Select(text =>
            $$"""{"id": 7, "meta": {"body": "no"}, "body": "{{JsonEncodedText.Encode(text)}}", "z": [{}]}"""));
        await Same(Tokens(folder, false, "body", folder["a.jsonl"]), expected);
        await Same(Tokens(folder, true, "body", folder["a.jsonl"]), expected);
    }

    [Test]
    [Arguments("""{"text": "a", "text": "b"}""", "b")]
    [Arguments("""{"text": "a", "text": null}""", "")]
    [Arguments("\ufeff{\"text\": \"a\"}\n\n \t\r\n{\"text\": \"b\"}", "a<|endoftext|>b")]
    [Arguments("""{"te\u0078t": "\ud83d\ude00", "x": 1e999}""", "😀")]
    public async Task JsonIsReadAsOthersReadIt(string lines, string text) {
        using var folder = new TemporaryFolder();
        File.WriteAllText(folder["a.jsonl"], lines + "\n{\"text\": \"end\"}");
        await Same(Tokens(folder, false, "text", folder["a.jsonl"]).Select(token => (int)token),
            Tokenizer.Encode($"{(text == "" ? "" : Tokenizer.EndOfText)}{text}<|endoftext|>end"));
    }

    [Test]
    [Arguments("""{"text": "a" "b": 1}""", "invalid after a value. Expected either ',', '}', or ']'. At byte 13")]
    [Arguments("""{"text": "a"} {"text": "b"}""", "At byte 14")]
    [Arguments("""{"text": "a""", "At byte 11")]
    [Arguments("plain text", "'p' is an invalid start of a value. At byte 0")]
    [Arguments("[1]", "found: Array")]
    [Arguments("""{"body": "a"}""", "found: no such field")]
    [Arguments("""{"text": ["a"]}""", "found: a field of type Array")]
    [Arguments("""{"text": 1}""", "found: a field of type Number")]
    [Arguments("""{"text": "\ud83d x"}""", "Cannot read incomplete UTF-16 JSON text")]
    [Arguments("{\"text\": \"a\u0001\"}", "The string should be correctly escaped. At byte 11")]
    [Arguments("{\"text\": \"a\u00ff\"}", "text in UTF-8, found something else; --lossy")] // as Latin-1
    [Arguments("{\"text\": \"a\\n\u00ff\"}", "text in UTF-8, found something else; --lossy")]
    [Arguments("\u00bf\u00ef{\"text\": \"a\"}", "text in UTF-8, found something else; --lossy")] // bytes of a mark
    public async Task ABadLineIsNamed(string line, string words) {
        using var folder = new TemporaryFolder();
        foreach (var before in (int[])[0, 2, 40_000]) {
            var good = string.Concat(Enumerable.Repeat("{\"text\": \"a good one\"}\n", before));
            File.WriteAllBytes(folder["a.jsonl"], Encoding.Latin1.GetBytes($"{good}{line}\n{{\"text\": 1}}\n"));
            var sentence = Refusal(folder, folder["a.jsonl"]);
            await Assert.That(sentence).StartsWith($"{folder["a.jsonl"]}: line {before + 1}: expected ")
                .And.Contains(words);
            await Assert.That(words.Contains("UTF-8,") || sentence.Contains("an object of JSON with a string 'text'"))
                .IsTrue();
        }
        await Assert.That(Directory.GetFiles(folder.Path).Length).IsEqualTo(1);
    }

    [Test]
    [Arguments("arrow_none.parquet", "body",
        "expected a column of strings 'body' (or another --field), found columns (nested), text, score")]
    [Arguments("arrow_none.parquet", "tags",
        "expected a column of strings 'tags' (or another --field), found columns (nested), text, score")]
    [Arguments("arrow_none.parquet", "score",
        "expected a column of strings 'score' (or another --field), found columns (nested), text, score")]
    [Arguments("arrow.jsonl", "id", "line 1: expected an object of JSON with a string 'id' (or another --field), " +
        "found: a field of type Number")]
    public async Task AFieldWithoutTextIsNamed(string name, string field, string words) {
        using var folder = new TemporaryFolder();
        await Assert.That(Refusal(folder, Row(name), field)).IsEqualTo($"{Row(name)}: {words}");
    }

    [Test]
    public async Task BytesOfParquetThatAreNotUtf8AreRefused() {
        using var folder = new TemporaryFolder();
        var bytes = File.ReadAllBytes(Row("arrow_none.parquet"));
        var at = bytes.AsSpan().IndexOf("three"u8);
        bytes[at] = 0xff;
        File.WriteAllBytes(folder["a.parquet"], bytes);
        await Assert.That(Refusal(folder, folder["a.parquet"])).EndsWith("found: text that is not UTF-8");
    }

    /// <summary>A file that is cut off is never taken for a whole one.</summary>
    [Test]
    [MethodDataSource(nameof(Rows))]
    public async Task AFileThatIsCutOffIsRefused(string name) {
        using var folder = new TemporaryFolder();
        var bytes = File.ReadAllBytes(Row(name));
        for (var length = 1; length < bytes.Length; length++) {
            if (bytes[length - 1] is (byte)'}' or (byte)' ' or (byte)'\n' or (byte)'\r' && name == "arrow.jsonl")
                continue;
            File.WriteAllBytes(folder[name], bytes[..length]);
            await Assert.That(Refusal(folder, folder[name])).StartsWith($"{folder[name]}: ").Because($"{length} bytes");
        }
    }

    /// <summary>Damaged files load or end in a sentence, in bounded memory and time.</summary>
    [Test]
    [MethodDataSource(nameof(Rows))]
    public async Task DamagedFilesAreReadOrRefused(string name) {
        using var folder = new TemporaryFolder();
        var (whole, random, refused) = (File.ReadAllBytes(Row(name)), new Random(1), 0);
        for (var i = 0; i < 2000; i++) {
            var bytes = whole.ToList();
            for (var changes = random.Next(1, 4); changes > 0; changes--) {
                var at = random.Next(bytes.Count);
                switch (random.Next(5)) {
                    case 0: bytes[at] ^= (byte)(1 << random.Next(8)); break;
                    case 1: bytes[at] = (byte)random.Next(256); break;
                    case 2: bytes[at] = (byte)(random.Next(2) * 255); break;
                    case 3: bytes.Insert(at, bytes[random.Next(bytes.Count)]); break;
                    case 4: bytes.RemoveRange(at, Math.Min(random.Next(1, 9), bytes.Count - at - 1)); break;
                }
            }
            File.WriteAllBytes(folder[name], [.. bytes]);
            var (clock, before) = (Stopwatch.StartNew(), GC.GetTotalAllocatedBytes());
            try {
                Read(folder[name]);
            } catch (Gpt2Exception e) {
                refused++;
                await Assert.That(e.Message).StartsWith($"{folder[name]}: ");
            } catch (Exception e) {
                throw new InvalidOperationException($"mutation {i} of {name}: {e}");
            }
            await Assert.That(clock.Elapsed.TotalSeconds).IsLessThan(20).Because($"mutation {i}");
            await Assert.That(GC.GetTotalAllocatedBytes() - before).IsLessThan(3L << 30).Because($"mutation {i}");
        }
        await Assert.That(refused).IsGreaterThan(100);

        static void Read(string path) {
            if (Documents.Read(path, "text", lossy: false, _ => { }) is { } blocks) {
                using var each = blocks.GetEnumerator();
                while (Documents.Whole(path, each.MoveNext))
                    ArrayPool<byte>.Shared.Return(Documents.Text(path, each.Current).Array!);
                return;
            }
            using var stream = Documents.Open(path, lossy: false, _ => { });
            var bytes = new byte[1 << 16];
            for (var total = 0L; Documents.Whole(path, () => stream.Read(bytes)) > 0 && total < 1 << 30;)
                total += bytes.Length;
        }
    }

    /// <summary>Files of a few bytes that ask for much: depth, size, and numbers without an end.</summary>
    [Test]
    [Arguments("15", 1)]
    [Arguments("19", 2_000_000)]
    [Arguments("c9 19", 2_000_000)]
    [Arguments("29 fc ff ff ff ff 0f", 1)]
    [Arguments("28 ff ff ff ff 0f", 1)]
    [Arguments("1c", 1_000_000)]
    public async Task AHostileFooterIsRefused(string hex, int times) {
        using var folder = new TemporaryFolder();
        var footer = Convert.FromHexString(hex.Replace(" ", ""));
        byte[] all = [.. footer, .. Enumerable.Repeat(footer[^1], times - 1)];
        var length = BitConverter.GetBytes(all.Length);
        File.WriteAllBytes(folder["a.parquet"], [.. "PAR1"u8, .. all, .. length, .. "PAR1"u8]);
        await Assert.That(Refusal(folder, folder["a.parquet"]))
            .StartsWith($"{folder["a.parquet"]}: expected whole data, found: ");
    }

    [Test]
    public async Task AFolderStandsForItsFilesInOrder() {
        using var folder = new TemporaryFolder();
        const string names = "b/2.jsonl.zst b.txt a.parquet .hidden.txt c.md .git/x.txt b/1.txt.gz";
        foreach (var name in names.Split(' ')) {
            Directory.CreateDirectory(Path.GetDirectoryName(folder[name])!);
            File.WriteAllText(folder[name], "x");
        }
        File.CreateSymbolicLink(folder["linked.txt"], folder["c.md"]);
        Directory.CreateSymbolicLink(folder["b/loop"], folder.Path);
        await Same(Documents.Find([folder.Path, "-", folder["c.md"]]), [folder["a.parquet"], folder["b.txt"],
            folder["b/1.txt.gz"], folder["b/2.jsonl.zst"], folder["linked.txt"], "-", folder["c.md"]]);
    }
}

/// <summary>The real binary's tokenize on files of documents, and training on other data than before.</summary>
public class DocumentBinaryTests {
    [Test]
    public async Task EveryKindIsReadNatively() {
        using var folder = new TemporaryFolder();
        string[] files = [.. DocumentTests.Rows().Select(name => Path.Combine(Golden("rows"), name))];
        foreach (var (i, file) in files.Prepend(Path.Combine(Golden("rows"), "rows.txt")).Index()) {
            await Gpt2Process.Succeed(folder.Path, "tokenize", "-o", $"{i}", file);
            var expected = File.ReadAllBytes(folder["0_train_000001.bin"]);
            await Same(File.ReadAllBytes(folder[$"{i}_train_000001.bin"]), expected);
            if (file.EndsWith("rows.txt"))
                continue;
            // The runtime takes a gzip file that is cut off for a whole one, unless it is built otherwise.
            var name = Path.GetFileName(file);
            File.WriteAllBytes(folder[name], File.ReadAllBytes(file)[..^9]);
            var cut = await Gpt2Process.Run(folder.Path, $"tokenize -o cut {name}");
            await Assert.That(cut.ExitCode).IsEqualTo(1).Because(name);
            await Assert.That(cut.Sentences.Single()).StartsWith($"gpt2: {name}: ");
        }
        await Assert.That(Folders.Names(folder.Path)).DoesNotContain("cut_");
    }

    [Test]
    public async Task AFolderIsReadIntoShardsOfAsManyTokensAsAsked() {
        using var folder = new TemporaryFolder();
        Directory.CreateDirectory(folder["texts"]);
        File.WriteAllText(folder["texts/b.txt"], "One two three.");
        File.WriteAllText(folder["texts/a.jsonl"], """{"body": "four five"}""");
        await Gpt2Process.Succeed(folder.Path, "tokenize -o new --shard-tokens 4 --field body --val-tokens 1 texts");
        int[] Tokens(string name) => [.. MemoryMarshal.Cast<byte, ushort>(File.ReadAllBytes(folder[name]).AsSpan(1024))
            .ToArray().Select(token => (int)token)];
        await Same(Tokens("new_val_000000.bin"), [50256]);
        await Same(Tokens("new_train_000001.bin"), [14337, 1936, 50256, 3198]);
        await Same(Tokens("new_train_000002.bin"), [734, 1115, 13]);
    }

    [Test]
    public async Task ARunGoesOnWithItsDataAlone() {
        using var folder = Folders.Goldens();
        const string train = "train -j val.bin -o out -e model.bin -b 2 -t 21 -d 42 --resume";
        await Gpt2Process.Succeed(folder.Path, $"{train} -i train.bin -x 1");
        File.Move(folder["train.bin"], folder["moved.bin"]);
        await Gpt2Process.Succeed(folder.Path, $"{train} -i moved.bin -x 2");
        var bytes = File.ReadAllBytes(folder["moved.bin"]);
        bytes[1024] ^= 1;
        File.WriteAllBytes(folder["other.bin"], bytes);
        var other = await Gpt2Process.Run(folder.Path, $"{train} -i other.bin -x 3");
        await Assert.That(other.ExitCode).IsEqualTo(1).Because(other.ToString());
        await Assert.That(other.Sentences[^1]).Contains("out/state_00000002_00000.bin: ")
            .And.Contains("expected the shards of --train-data").And.Contains("another --out");
    }
}
