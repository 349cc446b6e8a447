using System.Text.Json;

namespace Gpt2;

/// <summary>Types of weights in files: DataType's, and IEEE half precision.</summary>
public enum StoredType { Fp32, Bf16, Fp16 }

/// <summary>A GPT-2 of Hugging Face's transformers: model.safetensors, or several such files and an index, beside
/// config.json. Layers' matrices are (in, out), the transpose of llm.c's.</summary>
public sealed class Safetensors : BinaryFile {
    const string FileName = "model.safetensors", Kind = "a model in safetensors";

    // By StoredType; and the parameter tensors, # being the layer.
    static readonly string[] types = ["F32", "BF16", "F16"], dtypes = ["float32", "bfloat16", "float16"];
    static readonly string[] names = [
        "wte.weight", "wpe.weight", "h.#.ln_1.weight", "h.#.ln_1.bias", "h.#.attn.c_attn.weight",
        "h.#.attn.c_attn.bias", "h.#.attn.c_proj.weight", "h.#.attn.c_proj.bias", "h.#.ln_2.weight", "h.#.ln_2.bias",
        "h.#.mlp.c_fc.weight", "h.#.mlp.c_fc.bias", "h.#.mlp.c_proj.weight", "h.#.mlp.c_proj.bias",
        "ln_f.weight", "ln_f.bias"];

    readonly Dictionary<string, Entry> tensors = [];
    readonly Queue<Part> parts; // that are still to be read, in llm.c's order
    ReadOnlyMemory<float> weights; // that are left of the last one

    /// <summary>A tensor in bytes [First, End) of a file, and how many that should be; 0 for another type.</summary>
    sealed record Entry(string Path, string Name, string Type, long[] Shape, long First, long End, long Bytes);

    /// <summary>A layer (rows, columns) of a parameter tensor, and its name and shape here.</summary>
    sealed record Part(string Name, int Rows, int Columns, long[] Shape) {
        public bool IsTransposed => Shape.Length == 2 && Name.StartsWith("h.");
        public int Count => checked(Rows * Columns);
    }

    static IEnumerable<Part> PartsOf(Config config) => config.Parameters.Zip(names).SelectMany(each => {
        var ((tensor, layers, rows, columns), name) = each;
        long[] shape = tensor == "wte" ? [config.V, columns] : tensor == "wpe" ? [rows, columns]
            : tensor.StartsWith("ln") || tensor.EndsWith('b') ? [columns] : [columns, rows];
        return Enumerable.Range(0, layers).Select(l => new Part(name.Replace("#", $"{l}"), rows, columns, shape));
    });

    static long Product(long[] shape) => shape.Aggregate(1L, (product, n) => checked(product * n));

    static string Text(long[] shape) => shape.Length == 0 ? "none" : $"[{string.Join(", ", shape)}]";

    /// <summary>The transpose (columns, rows) of a matrix (rows, columns).</summary>
    static float[] Transposed(float[] matrix, int rows, int columns) {
        var transposed = new float[matrix.Length];
        Parallel.For(0, columns, column => {
            for (var row = 0; row < rows; row++)
                transposed[column * rows + row] = matrix[row * columns + column];
        });
        return transposed;
    }

    // ---- Reading. Any of the files may be malicious.

    /// <summary>The file to open in a folder, or null.</summary>
    public static string? In(string folder) => ((string[])[FileName, $"{FileName}.index.json"])
        .Select(name => Path.Combine(folder, name)).FirstOrDefault(File.Exists);

    /// <summary>Opens a model by its file or index. Tensors tell its sizes, and config.json its heads; without one,
    /// heads have 64 channels.</summary>
    /// <exception cref="Gpt2Exception">It is no GPT-2, or a file is not what its header says.</exception>
    public Safetensors(string path) : base(path, Kind) {
        var folder = $"{Path.GetDirectoryName(path)}";
        foreach (var entry in (path.EndsWith(".json") ? ReadIndex(folder) : [path]).SelectMany(ReadHeader))
            Require(Regex.IsMatch(entry.Name, @"^h\.\d+\.attn\.(masked_)?bias\z") || tensors.TryAdd(entry.Name, entry),
                "each tensor once", $"{entry.Name} again");
        var L = tensors.Keys.Count(name => name.EndsWith(".ln_1.weight"));
        var (wte, wpe) = (ShapeOf("wte.weight"), ShapeOf("wpe.weight"));
        Require(wte is [> 1 and <= 65536, > 0 and <= 16384] &&
            wpe is [> 0 and <= IDevice.LongestT, _] && L is > 0 and <= 1000,
            "a GPT-2: wte.weight [2 to 65536, 1 to 16384], wpe.weight [1 to 131072, ...], 1 to 1000 layers",
            $"{Text(wte)}, {Text(wpe)}, {L} layers");
        Config = new((int)wpe[0], (int)wte[0], ((int)wte[0] + 127) / 128 * 128, L, 1, (int)wte[1]);
        parts = new(PartsOf(Config));
        var shapes = parts.ToDictionary(part => part.Name, part => part.Shape);
        foreach (var name in shapes.Keys.Union(tensors.Keys)) {
            var shape = shapes.GetValueOrDefault(name == "lm_head.weight" ? "wte.weight" : name);
            Require(shape != null, "GPT-2's tensors alone", name);
            Require(ShapeOf(name).SequenceEqual(shape!), $"{name} {Text(shape!)}", Text(ShapeOf(name)));
            Require(types.Contains(tensors[name].Type), $"{name} in F32, F16 or BF16", tensors[name].Type);
        }
        Config = Config with { NH = ReadHeads(Path.Combine(folder, "config.json")) };

        long[] ShapeOf(string name) => tensors.GetValueOrDefault(name)?.Shape ?? [];
    }

    /// <summary>The model's sizes.</summary>
    public Config Config { get; }

    /// <summary>The type of its embedding.</summary>
    public StoredType Type => (StoredType)Array.IndexOf(types, tensors["wte.weight"].Type);

    /// <summary>The type of the weights in a model's file of either format.</summary>
    public static StoredType TypeOf(BinaryFile file) =>
        file is Safetensors model ? model.Type : file.Header[1] == 5 ? StoredType.Bf16 : StoredType.Fp32;

    /// <summary>Reads the number of heads from config.json, whose other fields must be GPT-2's.</summary>
    int ReadHeads(string path) {
        var (heads, exists) = (Config.C / 64, File.Exists(path));
        if (exists) {
            using var file = new BinaryFile(path, "a configuration");
            using var right = JsonDocument.Parse($"{{{Fields(Config)}}}");
            heads = ReadJson<int>(file, 0, file.Length, "a configuration in JSON", (name, value) =>
                name == "n_head" ? [value.GetInt32()] : !right.RootElement.TryGetProperty(name, out var expected) ||
                JsonElement.DeepEquals(value, expected) || name == "n_inner" && $"{value}" == $"{4 * Config.C}" ||
                name == "activation_function" && $"{value}" == "gelu_pytorch_tanh" ? []
                : throw file.Fail($"{name} {expected.GetRawText()}", value.GetRawText())).FirstOrDefault(12);
        }
        return heads is > 0 and <= 1000 && Config.C % heads == 0 ? heads : throw new Gpt2Exception(
            $"{path}: expected n_head to divide {Config.C} channels, found {(exists ? heads : "no such file")}");
    }

    /// <summary>The paths of the files that an index names, which must be beside it.</summary>
    IEnumerable<string> ReadIndex(string folder) {
        var files = ReadJson<string>(this, 0, Length, "a weight_map in JSON", (name, value) => name != "weight_map" ? []
            : value.EnumerateObject().Select(entry => $"{entry.Value.GetString()}")).Distinct().DefaultIfEmpty("none");
        var bad = files.FirstOrDefault(name => !Regex.IsMatch(name, @"^[\w.-]+\.safetensors\z"));
        Require(bad == null, "a weight_map of .safetensors files beside it", $"{bad}");
        return files.Select(name => Path.Combine(folder, name));
    }

    /// <summary>The tensors of a file, which must follow each other to its end.</summary>
    static Entry[] ReadHeader(string path) {
        using var file = new BinaryFile(path, Kind);
        var size = new long[1];
        file.Read(size.AsSpan());
        var (end, entries) = (8 + size[0], ReadJson(
            file, 8, size[0], "dtype, shape and data_offsets of each tensor in JSON", Read));
        foreach (var entry in entries.OrderBy(entry => entry.First).ThenBy(entry => entry.End)) {
            file.Require(entry.First == end && entry.End >= end && (entry.Bytes == 0 || entry.Bytes == entry.End - end),
                $"{entry.Name} from byte {end} on, as many as its shape has", $"{entry.First} to {entry.End}");
            end = entry.End;
        }
        file.CheckSize(end);
        return entries;

        IEnumerable<Entry> Read(string name, JsonElement value) {
            if (name == "__metadata__")
                return [];
            long[] Numbers(string of) => [.. value.GetProperty(of).EnumerateArray().Select(n => n.GetInt64())];
            var (type, shape) = (value.GetProperty("dtype").GetString(), Numbers("shape"));
            var bytes = Product([.. shape, type == "F32" ? 4 : type is "F16" or "BF16" ? 2 : 0]);
            return Numbers("data_offsets") is not [var first, var last] ? throw new FormatException()
                : [new(path, Regex.Replace(name, @"^transformer\.", ""), $"{type}", shape, 8 + size[0] + first,
                    8 + size[0] + last, bytes)];
        }
    }

    /// <summary>Reads each property of a JSON object in some bytes of a file.</summary>
    /// <exception cref="Gpt2Exception">It is not JSON, or not what <paramref name="read"/> takes.</exception>
    static T[] ReadJson<T>(
        BinaryFile file, long at, long size, string expected, Func<string, JsonElement, IEnumerable<T>> read) {
        const int most = 10_000_000; // several times what 1000 layers take
        file.Require(size >= 0 && size <= Math.Min(most, file.Length - at), $"JSON of up to {most} bytes", $"{size}");
        var (text, found) = (new byte[size], "");
        file.Read(text.AsSpan(), at);
        try {
            using var json = JsonDocument.Parse(text, new JsonDocumentOptions { AllowDuplicateProperties = false });
            return [.. json.RootElement.EnumerateObject().SelectMany(property => {
                found = $"{property.Name} {property.Value.GetRawText()}";
                return read(property.Name, property.Value);
            })];
        } catch (Exception e) when (e is JsonException or InvalidOperationException or FormatException
            or OverflowException or KeyNotFoundException) {
            throw file.Fail(expected, found == "" ? e.Message : found);
        }
    }

    /// <inheritdoc/>
    public override void ReadWeights(Span<float> values) {
        for (int count; values.Length > 0; values = values[count..]) {
            if (weights.IsEmpty)
                weights = Read(parts.Dequeue());
            count = Math.Min(values.Length, weights.Length);
            weights.Span[..count].CopyTo(values);
            weights = weights[count..];
        }
    }

    /// <summary>Reads a layer of a parameter tensor; its padding is zeros.</summary>
    float[] Read(Part part) {
        var values = Read(tensors[part.Name], part.Count);
        Require(part.Name != "wte.weight" || !tensors.TryGetValue("lm_head.weight", out var head) ||
            values.AsSpan().SequenceEqual(Read(head, part.Count)), "lm_head.weight to be wte.weight", "another");
        return part.IsTransposed ? Transposed(values, part.Columns, part.Rows) : values;
    }

    static float[] Read(Entry entry, int size) {
        using var file = new BinaryFile(entry.Path, Kind);
        var (values, count) = (new float[size], (int)Product(entry.Shape));
        var halves = new ushort[entry.Type == "F32" ? 0 : count];
        if (entry.Type == "F32")
            file.Read(values.AsSpan(0, count), entry.First);
        else
            file.Read(halves.AsSpan(), entry.First);
        for (var i = 0; i < halves.Length; i++)
            values[i] = entry.Type == "F16" ? (float)BitConverter.UInt16BitsToHalf(halves[i])
                : BitConverter.Int32BitsToSingle(halves[i] << 16);
        return values;
    }

    // ---- Writing

    /// <summary>What config.json must have.</summary>
    static string Fields(Config config) => $"""
        "model_type": "gpt2", "vocab_size": {config.V}, "n_positions": {config.MaxT}, "n_layer": {config.L},
          "n_head": {config.NH}, "n_embd": {config.C}, "n_inner": null, "activation_function": "gelu_new",
          "layer_norm_epsilon": 1e-05, "scale_attn_weights": true, "scale_attn_by_inverse_layer_idx": false,
          "add_cross_attention": false, "tie_word_embeddings": true
        """;

    /// <summary>Writes a model as a file of llm.c.</summary>
    public static void ExportFile(string path, BinaryFile file, Config config, DataType type) =>
        Files.Write(path, to => {
            to.Write(MemoryMarshal.AsBytes(config.Header(type).AsSpan()));
            Write(to, file, PartsOf(config).Select(part => part with { Shape = [part.Count] }), (StoredType)type);
        });

    /// <summary>Writes a model as a new folder of transformers, with a tokenizer where the vocabulary is GPT-2's. The
    /// model's file comes last.</summary>
    public static void ExportFolder(string folder, BinaryFile file, Config config, StoredType type) {
        if (Path.Exists(folder))
            throw new Gpt2Exception($"{folder}: expected the name of a new folder, found one that is there");
        var isText = config.V == Tokenizer.EndOfTextId + 1;
        var ends = string.Format("\"bos_token_id\": {0}, \"eos_token_id\": {0}", isText ? config.V - 1 : "null");
        try {
            Write("generation_config.json", ends);
            Write("config.json", $"""
                "architectures": ["GPT2LMHeadModel"], "torch_dtype": "{dtypes[(int)type]}", {ends},
                  {Fields(config)}
                """);
            if (isText) {
                Write("tokenizer.json", TokenizerFields());
                Write("tokenizer_config.json", $"""
                    "tokenizer_class": "GPT2Tokenizer", "model_max_length": {config.MaxT},
                      "clean_up_tokenization_spaces": false
                    """);
            }
            Files.Write(Path.Combine(folder, FileName), to => WriteTensors(to, file, config, type));
        } catch when (Directory.Exists(folder)) {
            Directory.Delete(folder, recursive: true);
            throw;
        }

        void Write(string name, string fields) => Files.Write(Path.Combine(folder, name), $"{{\n  {fields}\n}}\n");
    }

    static void WriteTensors(Stream to, BinaryFile file, Config config, StoredType type) {
        var (end, size) = (0L, type == StoredType.Fp32 ? sizeof(float) : sizeof(ushort));
        var entries = PartsOf(config).Select(part =>
            $"\"transformer.{part.Name}\":{{\"dtype\":\"{types[(int)type]}\",\"shape\":{Text(part.Shape)}," +
            $"\"data_offsets\":[{end},{end += Product(part.Shape) * size}]}}");
        var header = $"{{\"__metadata__\":{{\"format\":\"pt\"}},{string.Join(',', entries)}}}";
        header = header.PadRight((header.Length + 7) / 8 * 8);
        to.Write([.. BitConverter.GetBytes((long)header.Length), .. Encoding.UTF8.GetBytes(header)]);
        Write(to, file, PartsOf(config), type);
    }

    /// <summary>Copies layers without the padding, which is beyond their shape.</summary>
    static void Write(Stream to, BinaryFile file, IEnumerable<Part> parts, StoredType type) {
        foreach (var part in parts) {
            var values = new float[part.Count];
            file.ReadWeights(values);
            var turned = part.IsTransposed ? Transposed(values, part.Rows, part.Columns) : values;
            var kept = turned.AsSpan(0, (int)Product(part.Shape));
            var halves = new ushort[type == StoredType.Fp32 ? 0 : kept.Length];
            if (type == StoredType.Bf16)
                BFloat16.Round(kept, halves);
            for (var i = 0; type == StoredType.Fp16 && i < halves.Length; i++)
                halves[i] = BitConverter.HalfToUInt16Bits((Half)(kept[i] = (float)(Half)kept[i]));
            if (Numbers.NotFinite(kept) is { } value)
                throw file.Fail("finite weights (in fp16, up to 65504)", $"{value} in {part.Name}");
            to.Write(type == StoredType.Fp32 ? MemoryMarshal.AsBytes(kept) : MemoryMarshal.AsBytes(halves.AsSpan()));
        }
    }

    /// <summary>The tokenizer in the format of Hugging Face's tokenizers.</summary>
    static string TokenizerFields() {
        var tokenizer = new Tokenizer();
        string Quoted(string text) => $"\"{Regex.Replace(text, @"[\\""]", @"\$0")}\"";
        string[] tokens = [.. Enumerable.Range(0, Tokenizer.EndOfTextId + 1).Select(tokenizer.Letters)];
        var vocabulary = tokens.Select((token, id) => $"{Quoted(token)}: {id}");
        var merges = tokenizer.Merges.Select(two => Quoted($"{tokens[two.Left]} {tokens[two.Right]}"));
        const string bytes =
            """{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true}""";
        return $$"""
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
              "pre_tokenizer": {{bytes}}, "post_processor": {{bytes}}, "decoder": {{bytes}},
              "added_tokens": [{"id": {{Tokenizer.EndOfTextId}}, "content": "{{Tokenizer.EndOfText}}", "special": true,
              "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}],
              "model": {"type": "BPE", "continuing_subword_prefix": "", "end_of_word_suffix": "",
              "vocab": {{{string.Join(",\n", vocabulary)}}}, "merges": [{{string.Join(",\n", merges)}}]}
            """;
    }
}
