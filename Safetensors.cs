using System.Text.Json;

namespace Gpt2;

/// <summary>GPT-2 as Hugging Face's transformers keeps it: config.json, and model.safetensors or several such files with
/// an index. Matrices of layers are (in, out), the transpose of llm.c's.</summary>
public static class Safetensors {
    const string Model = "model.safetensors", Prefix = "transformer.";

    static readonly string[] types = ["F32", "BF16", "F16"]; // by StoredType
    static readonly string[] names = [
        "wte.weight", "wpe.weight", "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
        "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
        "mlp.c_proj.weight", "mlp.c_proj.bias", "ln_f.weight", "ln_f.bias",
    ];

    static string NameOf(int tensor, int layer) =>
        tensor is >= 2 and < 14 ? $"h.{layer}.{names[tensor]}" : names[tensor];

    static bool IsByColumns(int tensor) => names[tensor].Contains(".c_") && names[tensor].EndsWith(".weight");

    static long[] ShapeOf(int tensor, Config config) {
        var (rows, columns) = (config.Parameters[tensor].Rows, config.Parameters[tensor].Columns);
        return tensor == 0 ? [config.V, columns] : tensor == 1 ? [rows, columns]
            : IsByColumns(tensor) ? [columns, rows] : [columns];
    }

    // ---- Reading, where any of the files may be malicious

    /// <summary>The file to open in a folder, null if there is none.</summary>
    public static string? In(string folder) => ((string[])[Model, $"{Model}.index.json"])
        .Select(name => Path.Combine(folder, name)).FirstOrDefault(File.Exists);

    /// <summary>Opens a model by its file or its index. The sizes are those of the tensors; config.json beside them adds
    /// the number of heads (without it, each has 64 channels), and must agree with GPT-2 in all else.</summary>
    /// <exception cref="Gpt2Exception">It is no GPT-2, or a file is not what its header says.</exception>
    public static (ModelFile File, Config Config) Open(string path) {
        var (folder, tensors, L) = ($"{Path.GetDirectoryName(path)}", new Dictionary<string, Entry>(), 0);
        foreach (var entry in (path.EndsWith(".json") ? ReadIndex(path, folder) : [path]).SelectMany(ReadHeader)) {
            var name = entry.Name.StartsWith(Prefix) ? entry.Name[Prefix.Length..] : entry.Name;
            entry.File.Require(tensors.TryAdd(name, entry), "each tensor once", $"{Short(entry.Name)} again");
        }
        while (tensors.ContainsKey(NameOf(2, L)))
            L++;
        var (wte, wpe) = (Find("wte.weight").Shape, Find("wpe.weight").Shape);
        if (wte is not [> 1 and <= 65536, > 0 and <= 65536] || wpe is not [> 0 and <= IDevice.LongestT, _] || L > 1000)
            throw Fail("2 to 65536 tokens, up to 131072 positions, 1000 layers and 65536 channels",
                $"wte.weight {Text(wte)}, wpe.weight {Text(wpe)}, {L} layers");
        var config = new Config((int)wpe[0], (int)wte[0], ((int)wte[0] + 127) / 128 * 128, Math.Max(1, L), 0, (int)wte[1]);
        config = config with { NH = ReadHeads(Path.Combine(folder, "config.json"), config) };
        Stored[][] places = [.. config.Parameters.Select((shape, i) => Enumerable.Range(0, shape.Layers).Select(l =>
            Take(NameOf(i, l), ShapeOf(i, config), i == 0 ? config.V : shape.Rows, IsByColumns(i))).ToArray())];
        if (tensors.ContainsKey("lm_head.weight"))
            CheckHead(places[0][0], Take("lm_head.weight", wte, config.V, false), wte[0] * wte[1]);
        var other = tensors.Keys.FirstOrDefault(name => !Regex.IsMatch(name, @"^h\.\d+\.attn\.(masked_)?bias\z"));
        return other == null ? (new ModelFile(config, places), config) : throw Fail("GPT-2's tensors alone", Short(other));

        Gpt2Exception Fail(string expected, string found) => new($"{path}: expected {expected}, found {found}");

        Entry Find(string name) => tensors.TryGetValue(name, out var entry) ? entry : throw Fail($"a tensor {name}", "none");

        Stored Take(string name, long[] shape, int rows, bool byColumns) {
            var entry = Find(name);
            tensors.Remove(name);
            var type = Array.IndexOf(types, entry.Type);
            entry.File.Require(entry.Shape.SequenceEqual(shape) && type >= 0,
                $"{name} {Text(shape)} in F32, F16 or BF16", $"{Text(entry.Shape)} in {entry.Type}");
            return new(entry.File, entry.First, (StoredType)type, rows, byColumns);
        }
    }

    static void CheckHead(Stored wte, Stored head, long count) {
        float[] left = new float[Tensor.ChunkSize], right = new float[Tensor.ChunkSize];
        for (var i = 0L; i < count; i += left.Length) {
            var part = (int)Math.Min(left.Length, count - i);
            wte.Read(left.AsSpan(0, part), i);
            head.Read(right.AsSpan(0, part), i);
            head.File.Require(left.AsSpan().SequenceEqual(right), "lm_head.weight equal to wte.weight", "another");
        }
    }

    /// <summary>Checks config.json against a model, and returns the number of heads.</summary>
    static int ReadHeads(string path, Config config) {
        var (C, heads) = (config.C, File.Exists(path) ? 12 : config.C / 64); // 12 is what transformers leaves out
        if (File.Exists(path)) {
            using var file = new BinaryFile(path, "a configuration");
            ReadJson(file, 0, file.Length, "a GPT-2's configuration in JSON", (name, value) => {
                var (expected, right) = name switch {
                    "model_type" => ("\"gpt2\"", value.GetString() == "gpt2"),
                    "activation_function" => ("\"gelu_new\"", value.GetString() is "gelu_new" or "gelu_pytorch_tanh"),
                    "layer_norm_epsilon" => ("1e-5", value.GetDouble() == 1e-5),
                    "scale_attn_weights" or "tie_word_embeddings" => ("true", value.GetBoolean()),
                    "scale_attn_by_inverse_layer_idx" or "add_cross_attention" => ("false", !value.GetBoolean()),
                    "n_inner" => ($"null or {4 * C}", value.ValueKind == JsonValueKind.Null || value.GetInt32() == 4 * C),
                    "vocab_size" => ($"{config.V}", value.GetInt32() == config.V),
                    "n_positions" => ($"{config.MaxT}", value.GetInt32() == config.MaxT),
                    "n_embd" => ($"{C}", value.GetInt32() == C),
                    "n_layer" => ($"{config.L}", value.GetInt32() == config.L),
                    "n_head" => ("1 to 1000", (heads = value.GetInt32()) is > 0 and <= 1000),
                    _ => ("", true),
                };
                file.Require(right, $"{name} {expected}", Short(value.GetRawText()));
                return 0;
            });
        }
        return heads > 0 && C % heads == 0 ? heads : throw new Gpt2Exception(
            $"{path}: expected n_head to divide {C} channels, found {(File.Exists(path) ? heads : "no such file")}");
    }

    /// <summary>The paths of the files that an index names, which must be beside it.</summary>
    static string[] ReadIndex(string path, string folder) {
        using var file = new BinaryFile(path, "an index");
        string[] files = [.. ReadJson(file, 0, file.Length, "a weight_map in JSON", (name, value) => name != "weight_map" ? []
            : value.EnumerateObject().Select(entry => $"{entry.Value.GetString()}").Distinct().ToArray()).SelectMany(all => all)];
        var bad = files.Length == 0 ? "none" : files.FirstOrDefault(name => !Regex.IsMatch(name, @"^[\w.-]+\.safetensors\z"));
        file.Require(bad == null, "a weight_map with names of .safetensors files beside it", Short($"{bad}"));
        return [.. files.Select(name => Path.Combine(folder, name))];
    }

    /// <summary>A tensor of a file, in which it begins at byte First.</summary>
    sealed record Entry(string Name, BinaryFile File, string Type, long[] Shape, long First, long End);

    /// <summary>The tensors of a file; they must follow each other to its end.</summary>
    static IEnumerable<Entry> ReadHeader(string path) {
        var (file, size) = (new BinaryFile(path, "a model in safetensors"), new long[1]);
        file.Require(file.Length >= sizeof(long), "a model in safetensors", $"a file of {file.Length} bytes");
        file.Read(size.AsSpan());
        var data = sizeof(long) + size[0];
        file.Require(size[0] >= 0 && data <= file.Length, $"a header of at most {file.Length - 8} bytes", $"{size[0]}");
        var entries = ReadJson(file, sizeof(long), size[0], "dtype, shape and data_offsets of each tensor in JSON", Read);
        var end = data;
        foreach (var entry in entries.OfType<Entry>().OrderBy(entry => entry.First).ThenBy(entry => entry.End)) {
            file.Require(entry.First == end, $"a tensor at byte {end}", $"{Short(entry.Name)} at byte {entry.First}");
            end = entry.End;
        }
        file.CheckSize(end);
        return entries.OfType<Entry>();

        Entry? Read(string name, JsonElement value) {
            if (name == "__metadata__")
                return null;
            var type = value.GetProperty("dtype").GetString()!;
            long[] shape = [.. value.GetProperty("shape").EnumerateArray().Select(n => (long)n.GetUInt32())];
            long[] offsets = [.. value.GetProperty("data_offsets").EnumerateArray().Select(n => n.GetInt64())];
            var bytes = shape.Aggregate(type switch {
                "BOOL" or "U8" or "I8" or "F8_E4M3" or "F8_E5M2" => 1L,
                "U16" or "I16" or "F16" or "BF16" => 2,
                "U32" or "I32" or "F32" => 4,
                "U64" or "I64" or "F64" => 8,
                _ => throw new FormatException(),
            }, (product, n) => checked(product * n));
            return offsets is [>= 0 and var first, var last] && last <= file.Length - data && last == checked(first + bytes)
                ? new(name, file, type, shape, data + first, data + last) : throw new FormatException();
        }
    }

    /// <summary>Reads each property of a JSON object in some bytes of a file.</summary>
    /// <exception cref="Gpt2Exception">It is not JSON, or a property is not as <paramref name="read"/> takes it.</exception>
    static List<T> ReadJson<T>(
        BinaryFile file, long first, long count, string expected, Func<string, JsonElement, T> read) {
        const int most = 100_000_000; // as in the safetensors library
        file.Require(count <= most, $"at most {most} bytes of JSON", $"{count}");
        var (text, result, last) = (new byte[count], new List<T>(), default(JsonProperty?));
        file.Read(text.AsSpan(), first);
        try {
            var json = JsonDocument.Parse(text, new JsonDocumentOptions { AllowDuplicateProperties = false });
            foreach (var property in json.RootElement.EnumerateObject()) {
                last = property;
                result.Add(read(property.Name, property.Value));
            }
            return result;
        } catch (Exception e) when (e is JsonException or InvalidOperationException or FormatException
            or OverflowException or KeyNotFoundException) {
            throw file.Fail(expected, last is not { } bad ? Short(e.Message)
                : Short(Encoding.UTF8.GetString(JsonMarshal.GetRawUtf8PropertyName(bad)))
                + ": " + Short(Encoding.UTF8.GetString(JsonMarshal.GetRawUtf8Value(bad.Value))));
        }
    }

    // ---- Writing

    /// <summary>Writes a model as a file of llm.c.</summary>
    public static void ExportFile(string path, ModelFile file, Config config, DataType type) => Files.Write(path, to => {
        to.Write(MemoryMarshal.AsBytes(config.Header(type).AsSpan()));
        var (shapes, start) = (config.Parameters, to.Position);
        foreach (var (tensor, first, values) in file.ReadAll()) {
            // The padding of wte may not be there, and then stays zero.
            to.Position = start + (shapes.Take(tensor).Sum(shape => shape.Count) + first) * Tensor.SizeOf(type);
            Write(to, values.Span, (StoredType)type);
        }
    });

    /// <summary>Writes a model as a folder that transformers loads, which appears complete; of a folder that is there,
    /// and holds nothing else, each file is replaced.</summary>
    /// <returns>Whether it has a tokenizer: the vocabulary is GPT-2's.</returns>
    public static bool ExportFolder(string folder, ModelFile file, Config config, StoredType type) {
        var (last, isText) = (config.V - 1, config.V == Tokenizer.EndOfTextId + 1);
        var end = isText ? $"{last}" : "null";
        var tokenizer = isText ? new Tokenizer() : null;
        (string Name, Action<Stream>? Write)[] files = [
            (Model, to => WriteTensors(to, file, config, type)),
            ("config.json", Utf8($$"""
                {
                  "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "torch_dtype": "{{torchTypes[(int)type]}}",
                  "vocab_size": {{config.V}}, "n_positions": {{config.MaxT}}, "n_ctx": {{config.MaxT}}, "n_layer": {{config.L}},
                  "n_head": {{config.NH}}, "n_embd": {{config.C}}, "n_inner": null, "activation_function": "gelu_new",
                  "layer_norm_epsilon": 1e-05, "scale_attn_weights": true, "scale_attn_by_inverse_layer_idx": false,
                  "tie_word_embeddings": true, "bos_token_id": {{end}}, "eos_token_id": {{end}}
                }

                """)),
            ("generation_config.json", Utf8($$"""{ "bos_token_id": {{end}}, "eos_token_id": {{end}} }""" + "\n")),
            ("tokenizer_config.json", tokenizer == null ? null : Utf8($$"""
                {
                  "tokenizer_class": "GPT2Tokenizer", "model_max_length": {{config.MaxT}}, "add_prefix_space": false,
                  "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"
                }

                """)),
            ("tokenizer.json", tokenizer == null ? null : Utf8(TokenizerJson(tokenizer))),
        ];
        string[] ours = [.. files.Select(part => part.Name)];
        var other = File.Exists(folder) ? "a file" : !Directory.Exists(folder) ? null : Directory
            .EnumerateFileSystemEntries(folder).Select(path => $"{Path.GetFileName(path)}".Replace(".tmp", ""))
            .FirstOrDefault(name => !ours.Contains(name));
        if (other != null)
            throw new Gpt2Exception($"{folder}: expected a new folder, an export, or a name in .bin, found {other}");
        folder = Path.TrimEndingDirectorySeparator(folder);
        var target = Directory.Exists(folder) ? folder : $"{folder}.{Environment.ProcessId}.tmp";
        try {
            foreach (var (name, write) in files) {
                if (write == null)
                    File.Delete(Path.Combine(target, name));
                else
                    Files.Write(Path.Combine(target, name), write);
            }
            if (target != folder)
                Directory.Move(target, folder);
        } catch when (target != folder) {
            Directory.Delete(target, recursive: true);
            throw;
        }
        return isText;
    }

    static readonly string[] torchTypes = ["float32", "bfloat16", "float16"];

    static Action<Stream> Utf8(string text) => to => to.Write(Encoding.UTF8.GetBytes(text));

    static void WriteTensors(Stream to, ModelFile file, Config config, StoredType type) {
        (int Tensor, int Layer)[] all = [.. config.Parameters.Index().SelectMany(each =>
            Enumerable.Range(0, each.Item.Layers).Select(l => (each.Index, l)))];
        var end = 0L;
        var header = string.Join(",", all.Select(at => {
            var (shape, first) = (ShapeOf(at.Tensor, config), end);
            end += shape.Aggregate(type == StoredType.Fp32 ? 4L : 2, (product, n) => product * n);
            return $$"""
                "{{Prefix}}{{NameOf(at.Tensor, at.Layer)}}":{"dtype":"{{types[(int)type]}}","shape":{{Text(shape)}},"data_offsets":[{{first}},{{end}}]}
                """;
        }));
        header = $$$"""{"__metadata__":{"format":"pt"},{{{header}}}}""";
        header = header.PadRight((header.Length + 7) / 8 * 8);
        to.Write(BitConverter.GetBytes((long)header.Length));
        to.Write(Encoding.UTF8.GetBytes(header));
        foreach (var (tensor, layer) in all) {
            var left = ShapeOf(tensor, config).Aggregate((product, n) => product * n); // without wte's padding
            foreach (var values in file.Read(tensor, layer, IsByColumns(tensor))) {
                Write(to, values.Span[..(int)Math.Min(values.Length, left)], type);
                left -= Math.Min(values.Length, left);
            }
        }
    }

    static void Write(Stream to, ReadOnlySpan<float> values, StoredType type) {
        var halves = new ushort[type == StoredType.Fp32 ? 0 : values.Length];
        if (type == StoredType.Bf16)
            BFloat16.Round(values, halves);
        for (var i = 0; type == StoredType.Fp16 && i < values.Length; i++) {
            halves[i] = BitConverter.HalfToUInt16Bits((Half)values[i]);
            if (!Half.IsFinite((Half)values[i]))
                throw new Gpt2Exception($"--type: expected weights up to 65504 for fp16, found {values[i]}", usage: true);
        }
        to.Write(type == StoredType.Fp32 ? MemoryMarshal.AsBytes(values) : MemoryMarshal.AsBytes(halves.AsSpan()));
    }

    static string TokenizerJson(Tokenizer tokenizer) {
        string Json(string text) => '"' + text.Replace("\\", "\\\\").Replace("\"", "\\\"") + '"';
        var vocabulary = Enumerable.Range(0, Tokenizer.EndOfTextId + 1).Select(id => $"{Json(tokenizer.Letters(id))}:{id}");
        var merges = tokenizer.Merges.Select(two => Json($"{tokenizer.Letters(two.Left)} {tokenizer.Letters(two.Right)}"));
        return $$"""
            {
              "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
              "added_tokens": [{"id": {{Tokenizer.EndOfTextId}}, "content": "{{Tokenizer.EndOfText}}", "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
              "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
              "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
              "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
              "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false,
                "vocab": {{{string.Join(",\n", vocabulary)}}},
                "merges": [{{string.Join(",\n", merges)}}]}
            }

            """;
    }

    static string Text(long[] shape) => $"[{string.Join(", ", shape.Take(8))}]";

    /// <summary>A text that can stand in a sentence.</summary>
    static string Short(string text) =>
        Regex.Replace(text.Length <= 100 ? text : $"{text[..100]}...", @"[\s\p{C}]+", " ");
}
