using System.Text.Json;

namespace Gpt2;

/// <summary>Types of weights in files: IEEE single precision, its upper half, IEEE half precision.</summary>
public enum StoredType { Fp32, Bf16, Fp16 }

/// <summary>A GPT-2 of Hugging Face's transformers: model.safetensors, or several such files and an index, and
/// config.json. Layers' matrices are (in, out), the transpose of llm.c's.</summary>
public sealed class Safetensors : BinaryFile {
    const string Model = "model.safetensors";

    static readonly string[] names = [
        "wte.weight", "wpe.weight", "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
        "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
        "mlp.c_proj.weight", "mlp.c_proj.bias", "ln_f.weight", "ln_f.bias",
    ];
    static readonly string[] types = ["F32", "BF16", "F16"]; // by StoredType

    readonly Dictionary<string, Entry> tensors = [];
    readonly Queue<Part> parts; // what is yet to be read, in the order of llm.c
    float[] matrix = []; // of the first of them, transposed
    long done; // weights read of it

    /// <summary>A tensor: where a file has it, and how many weights it has.</summary>
    sealed record Entry(string Path, string Name, string Type, long[] Shape, long First, long End, long Count);

    /// <summary>One layer of a parameter tensor (rows, columns) of the model.</summary>
    readonly record struct Part(string Name, int Rows, int Columns, long[] Shape) {
        public long Count => (long)Rows * Columns;
        public bool IsTransposed => Name.Contains(".c_") && Shape.Length == 2;
    }

    /// <summary>The layers of all tensors in the order of llm.c, with transformers' names and shapes.</summary>
    static IEnumerable<Part> PartsOf(Config config) => config.Parameters.Index().SelectMany(each => {
        var ((i, (_, layers, rows, columns)), name) = (each, names[each.Index]);
        long[] shape = i == 0 ? [config.V, columns] : i == 1 ? [rows, columns]
            : name.Contains(".c_") && name.EndsWith("weight") ? [columns, rows] : [columns];
        return Enumerable.Range(0, layers).Select(l => new Part(i is 0 or 1 or > 13 ? name : $"h.{l}.{name}", rows, columns, shape));
    });

    // ---- Reading, where each file may be malicious

    /// <summary>The file to open in a folder, null if there is none.</summary>
    public static string? In(string folder) => ((string[])[Model, $"{Model}.index.json"])
        .Select(name => Path.Combine(folder, name)).FirstOrDefault(File.Exists);

    /// <summary>Opens a model by its file or index. Tensors tell the sizes, and config.json beside them the number of
    /// heads; without it, heads have 64 channels.</summary>
    /// <exception cref="Gpt2Exception">It is no GPT-2, or a file is not what its header says.</exception>
    public static (BinaryFile File, Config Config) Open(string path) {
        var file = new Safetensors(path);
        return (file, file.config);
    }

    readonly Config config;

    Safetensors(string path) : base(path, "a model in safetensors") {
        var folder = $"{Path.GetDirectoryName(path)}";
        foreach (var entry in (path.EndsWith(".json") ? ReadIndex(folder) : [path]).SelectMany(ReadHeader)) {
            var name = entry.Name.StartsWith("transformer.") ? entry.Name["transformer.".Length..] : entry.Name;
            if (!Regex.IsMatch(name, @"^h\.\d+\.attn\.(masked_)?bias\z")) // buffers
                Require(tensors.TryAdd(name, entry), "each tensor once", $"{Short(entry.Name)} again");
        }
        long[] ShapeOf(string name) => tensors.TryGetValue(name, out var entry) ? entry.Shape : [];
        var (wte, wpe, L) = (ShapeOf("wte.weight"), ShapeOf("wpe.weight"), 1);
        while (tensors.ContainsKey($"h.{L}.ln_1.weight"))
            L++;
        Require(wte is [> 1 and <= 65536, > 0 and <= 65536] && wpe is [> 0 and <= IDevice.LongestT, _] && L <= 1000,
            "wte.weight [2 to 65536, 1 to 65536], wpe.weight [1 to 131072, ...], 1 to 1000 layers",
            $"{Text(wte)}, {Text(wpe)}, {L} layers");
        var (V, C) = ((int)wte[0], (int)wte[1]);
        config = new((int)wpe[0], V, (V + 127) / 128 * 128, L, 0, C);
        config = config with { NH = ReadHeads(Path.Combine(folder, "config.json"), config) };
        parts = new(PartsOf(config));
        foreach (var part in parts) {
            Require(ShapeOf(part.Name).SequenceEqual(part.Shape) && types.Contains(tensors[part.Name].Type),
                $"{part.Name} {Text(part.Shape)} in F32, F16 or BF16", !tensors.TryGetValue(part.Name, out var found)
                ? "none" : $"{Text(found.Shape)} in {found.Type}");
        }
        CheckHead();
        if (tensors.Keys.Except(parts.Select(part => part.Name)).FirstOrDefault() is { } other)
            throw Fail("GPT-2's tensors alone", Short(other));
    }

    /// <summary>The type of most weights.</summary>
    public StoredType Type => (StoredType)Array.IndexOf(types, tensors["wte.weight"].Type);

    /// <summary>Requires the head to be tied, if it is there: equal to wte.</summary>
    void CheckHead() {
        if (!tensors.Remove("lm_head.weight", out var head))
            return;
        var wte = tensors["wte.weight"];
        var equal = head.Shape.SequenceEqual(wte.Shape) && types.Contains(head.Type);
        float[] left = new float[Tensor.ChunkSize], right = new float[Tensor.ChunkSize];
        for (var i = 0L; equal && i < wte.Count; i += left.Length) {
            var count = (int)Math.Min(left.Length, wte.Count - i);
            Read(wte, i, left.AsSpan(0, count));
            Read(head, i, right.AsSpan(0, count));
            equal = left.AsSpan().SequenceEqual(right);
        }
        Require(equal, "lm_head.weight to be wte.weight", "another");
    }

    /// <summary>Reads the number of heads from config.json, in which GPT-2's other fields must be as it has them.</summary>
    static int ReadHeads(string path, Config config) {
        var (heads, exists) = (config.C / 64, File.Exists(path));
        if (exists) {
            using var file = new BinaryFile(path, "a configuration");
            using var right = JsonDocument.Parse($"{{{Fields(config)}}}");
            heads = 12; // which transformers may leave out
            ReadJson(file, 0, file.Length, "a configuration in JSON", (name, value) => {
                var text = value.GetRawText();
                heads = name == "n_head" ? value.GetInt32() : heads;
                file.Require(!right.RootElement.TryGetProperty(name, out var expected) || name == "n_head" ||
                    JsonElement.DeepEquals(value, expected) || text == "\"gelu_pytorch_tanh\"" ||
                    name == "n_inner" && text == $"{4 * config.C}", $"{name} {expected}", Short(text));
                return 0;
            });
        }
        return heads is > 0 and <= 1000 && config.C % heads == 0 ? heads : throw new Gpt2Exception($"{path}: expected " +
            $"n_head to divide {config.C} channels, found {(exists ? heads : "no such file")}");
    }

    /// <summary>The paths of the files that an index names, which must be beside it.</summary>
    string[] ReadIndex(string folder) {
        string[] files = [.. ReadJson(this, 0, Length, "a weight_map in JSON", (name, value) => name != "weight_map" ? []
            : value.EnumerateObject().Select(entry => $"{entry.Value.GetString()}")).SelectMany(all => all).Distinct()];
        var bad = files.FirstOrDefault(name => !Regex.IsMatch(name, @"^[\w.-]+\.safetensors\z"));
        Require(bad == null && files.Length > 0, "a weight_map of .safetensors files beside it", Short(bad ?? "none"));
        return [.. files.Select(name => Path.Combine(folder, name))];
    }

    /// <summary>The tensors of a file, which must follow each other to its end.</summary>
    static Entry[] ReadHeader(string path) {
        using var file = new BinaryFile(path, "a model in safetensors");
        var size = new long[1];
        file.Require(file.Length >= 8, "a model in safetensors", $"{file.Length} bytes");
        file.Read(size.AsSpan());
        file.Require(size[0] >= 0 && size[0] <= file.Length - 8, "its header in the file", $"a header of {size[0]} bytes");
        var data = 8 + size[0];
        Entry[] entries = [.. ReadJson(file, 8, size[0], "dtype, shape and data_offsets of each tensor in JSON",
            (name, value) => name == "__metadata__" ? null : ReadEntry(name, value)).OfType<Entry>()
            .OrderBy(entry => entry.First).ThenBy(entry => entry.End)];
        var end = data;
        foreach (var entry in entries) {
            file.Require(entry.First == end, $"a tensor at byte {end}", $"{Short(entry.Name)} at byte {entry.First}");
            end = entry.End;
        }
        file.CheckSize(end);
        return entries;

        Entry ReadEntry(string name, JsonElement value) {
            long[] Numbers(string of) => [.. value.GetProperty(of).EnumerateArray().Select(n => n.GetInt64())];
            var (type, shape, offsets) = ($"{value.GetProperty("dtype").GetString()}", Numbers("shape"), Numbers("data_offsets"));
            var count = shape.Aggregate(1L, (product, n) => checked(product * n));
            var bytes = type is "BOOL" ? 1 : int.Parse(Regex.Match(type, @"\d+").Value) / 8;
            return offsets is [>= 0 and var first, var last] && last <= file.Length && bytes is 1 or 2 or 4 or 8
                && shape.All(n => n >= 0) && count <= file.Length && last - first == count * bytes
                ? new(path, name, type, shape, data + first, data + last, count) : throw new FormatException();
        }
    }

    /// <summary>Reads each property of a JSON object in some bytes of a file.</summary>
    /// <exception cref="Gpt2Exception">It is not JSON, or a property is not as <paramref name="read"/> takes it.</exception>
    static List<T> ReadJson<T>(BinaryFile file, long at, long count, string expected, Func<string, JsonElement, T> read) {
        const int most = 100_000_000; // as in the safetensors library
        file.Require(count <= most, $"at most {most} bytes of JSON", $"{count}");
        var (text, result, last) = (new byte[count], new List<T>(), default(JsonProperty?));
        file.Read(text.AsSpan(), at);
        try {
            var json = JsonDocument.Parse(text, new JsonDocumentOptions { AllowDuplicateProperties = false });
            foreach (var property in json.RootElement.EnumerateObject()) {
                last = property;
                result.Add(read(property.Name, property.Value));
            }
            return result;
        } catch (Exception e) when (e is JsonException or InvalidOperationException or FormatException
            or OverflowException or KeyNotFoundException) {
            throw file.Fail(expected, Short(last is not { } bad ? e.Message
                : $"{Encoding.UTF8.GetString(JsonMarshal.GetRawUtf8PropertyName(bad))}: " +
                Encoding.UTF8.GetString(JsonMarshal.GetRawUtf8Value(bad.Value))));
        }
    }

    /// <summary>A text that can stand in a sentence.</summary>
    static string Short(string text) =>
        Regex.Replace(text.Length <= 200 ? text : $"{text[..200]}...", @"[\s\p{C}]+", " ");

    static string Text(long[] shape) => $"[{string.Join(", ", shape.Take(8))}]";

    /// <summary>Reads weights of a tensor from one on; there are zeros after its end.</summary>
    static void Read(Entry entry, long first, Span<float> values) {
        using var file = new BinaryFile(entry.Path, Model);
        values[(int)Math.Clamp(entry.Count - first, 0, values.Length)..].Clear();
        values = values[..(int)Math.Clamp(entry.Count - first, 0, values.Length)];
        var halves = new ushort[entry.Type == "F32" ? 0 : values.Length];
        file.Read(entry.Type == "F32" ? MemoryMarshal.AsBytes(values) : MemoryMarshal.AsBytes(halves.AsSpan()),
            entry.First + first * (entry.Type == "F32" ? 4 : 2));
        if (entry.Type == "BF16")
            BFloat16.Widen(halves, values);
        for (var i = 0; entry.Type == "F16" && i < values.Length; i++)
            values[i] = (float)BitConverter.UInt16BitsToHalf(halves[i]);
    }

    /// <inheritdoc/>
    public override void ReadWeights(Span<float> values) {
        while (values.Length > 0) {
            var part = parts.Peek();
            var next = values[..(int)Math.Min(values.Length, part.Count - done)];
            if (part.IsTransposed && done == 0) {
                var stored = new float[part.Count];
                Read(tensors[part.Name], 0, stored);
                matrix = Transpose(stored, part.Columns, part.Rows);
            }
            if (part.IsTransposed)
                matrix.AsSpan((int)done, next.Length).CopyTo(next);
            else
                Read(tensors[part.Name], done, next);
            values = values[next.Length..];
            done += next.Length;
            if (done == part.Count)
                (done, _) = (0, parts.Dequeue());
        }
    }

    /// <summary>The transpose (columns, rows) of a matrix (rows, columns).</summary>
    static float[] Transpose(float[] from, int rows, int columns) {
        const int band = 16; // a cache line
        var to = new float[from.Length];
        Parallel.For(0, (columns + band - 1) / band, i => {
            for (var row = 0; row < rows; row++) {
                for (var column = i * band; column < Math.Min(columns, (i + 1) * band); column++)
                    to[column * rows + row] = from[row * columns + column];
            }
        });
        return to;
    }

    // ---- Writing

    /// <summary>The fields of config.json that make a model a GPT-2.</summary>
    static string Fields(Config config) => $"""
        "model_type": "gpt2", "vocab_size": {config.V}, "n_positions": {config.MaxT}, "n_layer": {config.L},
          "n_head": {config.NH}, "n_embd": {config.C}, "n_inner": null, "activation_function": "gelu_new",
          "layer_norm_epsilon": 1e-05, "scale_attn_weights": true, "scale_attn_by_inverse_layer_idx": false,
          "add_cross_attention": false, "tie_word_embeddings": true
        """;

    /// <summary>Writes a model as a file of llm.c.</summary>
    public static void ExportFile(string path, BinaryFile file, Config config, DataType type) => Files.Write(path, to => {
        to.Write(MemoryMarshal.AsBytes(config.Header(type).AsSpan()));
        Copy(file, config.ParameterCount, config.ParameterCount, to, (StoredType)type);
    });

    /// <summary>Writes a model as a new folder that transformers loads.</summary>
    /// <returns>True if it has a tokenizer, because the vocabulary is GPT-2's.</returns>
    public static bool ExportFolder(string folder, BinaryFile file, Config config, StoredType type) {
        var (temporary, isText) = ($"{folder}.tmp", config.V == Tokenizer.EndOfTextId + 1);
        foreach (var path in (string[])[folder, temporary])
            if (Path.Exists(path))
                throw new Gpt2Exception($"{path}: expected a new folder, found this one; remove it first");
        var dtype = ((string[])["float32", "bfloat16", "float16"])[(int)type];
        var mark = isText ? $"{Tokenizer.EndOfTextId}" : "null";
        var ends = $"\"bos_token_id\": {mark}, \"eos_token_id\": {mark}";
        void Write(string name, Action<Stream> content) => Files.Write(Path.Combine(temporary, name), content);
        void WriteJson(string name, string fields) =>
            Write(name, to => to.Write(Encoding.UTF8.GetBytes($"{{\n  {fields}\n}}\n")));
        try {
            Write(Model, to => WriteTensors(to, file, config, type));
            WriteJson("config.json", $"""
                "architectures": ["GPT2LMHeadModel"], "torch_dtype": "{dtype}", {ends},
                  {Fields(config)}
                """);
            WriteJson("generation_config.json", ends);
            if (isText) {
                WriteJson("tokenizer.json", TokenizerFields());
                WriteJson("tokenizer_config.json", $"""
                    "tokenizer_class": "GPT2Tokenizer", "model_max_length": {config.MaxT}, "add_prefix_space": false,
                      "clean_up_tokenization_spaces": false, "bos_token": "{Tokenizer.EndOfText}",
                      "eos_token": "{Tokenizer.EndOfText}", "unk_token": "{Tokenizer.EndOfText}"
                    """);
            }
            Directory.Move(temporary, folder);
        } catch when (Directory.Exists(temporary)) {
            Directory.Delete(temporary, recursive: true);
            throw;
        }
        return isText;
    }

    static void WriteTensors(Stream to, BinaryFile file, Config config, StoredType type) {
        var end = 0L;
        var entries = PartsOf(config).Select(part => {
            var first = end;
            end += part.Shape.Aggregate(type == StoredType.Fp32 ? 4L : 2, (bytes, n) => bytes * n);
            return $"\"transformer.{part.Name}\":{{\"dtype\":\"{types[(int)type]}\",\"shape\":{Text(part.Shape)}," +
                $"\"data_offsets\":[{first},{end}]}}";
        });
        var header = $"{{\"__metadata__\":{{\"format\":\"pt\"}},{string.Join(',', entries)}}}";
        header = header.PadRight((header.Length + 7) / 8 * 8);
        to.Write([.. BitConverter.GetBytes((long)header.Length), .. Encoding.UTF8.GetBytes(header)]);
        foreach (var part in PartsOf(config)) {
            if (part.IsTransposed) {
                var matrix = new float[part.Count];
                file.ReadWeights(matrix);
                Write(to, Transpose(matrix, part.Rows, part.Columns), type);
            } else
                Copy(file, part.Count, part.Shape.Aggregate((count, n) => count * n), to, type);
        }
    }

    /// <summary>Reads weights, and writes the first of them.</summary>
    static void Copy(BinaryFile file, long count, long written, Stream to, StoredType type) {
        var buffer = new float[Math.Min(count, Tensor.ChunkSize)];
        for (var i = 0L; i < count; i += buffer.Length) {
            var values = buffer.AsSpan(0, (int)Math.Min(buffer.Length, count - i));
            file.ReadWeights(values);
            Write(to, values[..(int)Math.Clamp(written - i, 0, values.Length)], type);
        }
    }

    static void Write(Stream to, ReadOnlySpan<float> values, StoredType type) {
        var halves = new ushort[type == StoredType.Fp32 ? 0 : values.Length];
        if (type == StoredType.Bf16)
            BFloat16.Round(values, halves);
        for (var i = 0; type == StoredType.Fp16 && i < values.Length; i++)
            halves[i] = BitConverter.HalfToUInt16Bits((Half)values[i]);
        foreach (var value in values)
            if (!float.IsFinite(type == StoredType.Fp16 ? (float)(Half)value : value))
                throw new Gpt2Exception($"--type: expected finite weights, for fp16 up to 65504, found {value}");
        to.Write(type == StoredType.Fp32 ? MemoryMarshal.AsBytes(values) : MemoryMarshal.AsBytes(halves.AsSpan()));
    }

    /// <summary>The tokenizer in the format of Hugging Face's tokenizers.</summary>
    static string TokenizerFields() {
        var tokenizer = new Tokenizer();
        string Text(string text) => $"\"{text.Replace("\\", "\\\\").Replace("\"", "\\\"")}\"";
        var tokens = Enumerable.Range(0, Tokenizer.EndOfTextId + 1).Select(id => $"{Text(tokenizer.Letters(id))}: {id}");
        var merges = tokenizer.Merges.Select(two => Text($"{tokenizer.Letters(two.Left)} {tokenizer.Letters(two.Right)}"));
        const string bytes = "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": false, \"use_regex\": true}";
        return $$"""
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": {{bytes}},
              "post_processor": {{bytes}}, "decoder": {{bytes}}, "added_tokens": [{"id": {{Tokenizer.EndOfTextId}},
              "content": "{{Tokenizer.EndOfText}}", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
              "special": true}], "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
              "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false,
              "vocab": {{{string.Join(",\n", tokens)}}}, "merges": [{{string.Join(",\n", merges)}}]}
            """;
    }
}
