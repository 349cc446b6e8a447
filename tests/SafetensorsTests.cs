using System.Text.Json;
using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>Models of transformers, read and written; the files are made here, without the code under test.</summary>
public class SafetensorsTests {
    /// <summary>A tensor as a safetensors file has it; Bytes are its values.</summary>
    sealed record Stored(string Name, string Type, long[] Shape, byte[] Bytes);

    static readonly string[] names = ["wte.weight", "wpe.weight", "ln_1.weight", "ln_1.bias", "attn.c_attn.weight",
        "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight",
        "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias", "ln_f.weight", "ln_f.bias"];

    static readonly Config golden = new(32, 211, 256, 2, 3, 48), tiny = new(3, 5, 128, 1, 1, 2);

    static float[] GoldenWeights =>
        MemoryMarshal.Cast<byte, float>(File.ReadAllBytes(Golden("model.bin")))[256..].ToArray();

    /// <summary>Random weights of a model, whose padded rows are zero.</summary>
    static float[] Weights(Config config) {
        var weights = Floats(1, config.ParameterCount);
        weights.AsSpan(config.V * config.C, (config.Vp - config.V) * config.C).Clear();
        return weights;
    }

    /// <summary>A model's tensors, whose weights are given in llm.c's order, as transformers has them.</summary>
    static List<Stored> Tensors(Config config, float[] weights, string type = "F32", string prefix = "transformer.") {
        var (tensors, next) = (new List<Stored>(), 0);
        foreach (var (i, shape) in config.Parameters.Index()) {
            for (var l = 0; l < shape.Layers; l++) {
                var values = weights[next..(next += shape.Rows * shape.Columns)];
                var isTransposed = i is 4 or 6 or 10 or 12;
                values = i == 0 ? values[..(config.V * config.C)] : !isTransposed ? values : [.. Enumerable
                    .Range(0, values.Length).Select(at => values[at % shape.Rows * shape.Columns + at / shape.Rows])];
                tensors.Add(new(prefix + (i is >= 2 and < 14 ? $"h.{l}." : "") + names[i], type,
                    i == 0 ? [config.V, config.C] : i == 1 ? [config.MaxT, config.C]
                    : isTransposed ? [shape.Columns, shape.Rows] : [shape.Columns], Bytes(values, type)));
            }
        }
        return tensors;
    }

    static byte[] Bytes(float[] values, string type) => type switch {
        "F32" => MemoryMarshal.AsBytes(values.AsSpan()).ToArray(),
        "F16" => [.. values.SelectMany(value => BitConverter.GetBytes((Half)value))],
        _ => [.. Rounded(values, DataType.Bf16).SelectMany(value => BitConverter.GetBytes(value)[2..])],
    };

    /// <summary>The weights of the type nearest to some.</summary>
    static float[] As(float[] values, string type) => type == "F16" ? [.. values.Select(value => (float)(Half)value)]
        : Rounded(values, type == "F32" ? DataType.Fp32 : DataType.Bf16);

    static byte[] Content(IEnumerable<Stored> tensors, string? header = null) {
        var end = 0L;
        var entries = tensors.Select(tensor => $"\"{tensor.Name}\":{{\"dtype\":\"{tensor.Type}\",\"shape\":" +
            $"[{string.Join(',', tensor.Shape)}],\"data_offsets\":[{end},{end += tensor.Bytes.Length}]}}");
        header ??= $"{{\"__metadata__\":{{\"format\":\"pt\"}},{string.Join(',', entries)}}}   ";
        byte[] text = Encoding.UTF8.GetBytes(header);
        return [.. BitConverter.GetBytes((long)text.Length), .. text, .. tensors.SelectMany(tensor => tensor.Bytes)];
    }

    /// <summary>config.json as transformers 5 writes it.</summary>
    static string ConfigJson(Config config) => $$"""
        {
          "activation_function": "gelu_new", "add_cross_attention": false, "architectures": ["GPT2LMHeadModel"],
          "attn_pdrop": 0.1, "bos_token_id": 50256, "dtype": "float32", "embd_pdrop": 0.1, "eos_token_id": 50256,
          "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_embd": {{config.C}},
          "n_head": {{config.NH}}, "n_inner": null, "n_layer": {{config.L}}, "n_positions": {{config.MaxT}},
          "pad_token_id": null, "reorder_and_upcast_attn": false, "resid_pdrop": 0.1,
          "scale_attn_by_inverse_layer_idx": false, "scale_attn_weights": true, "summary_activation": null,
          "summary_first_dropout": 0.1, "summary_proj_to_labels": true, "summary_type": "cls_index",
          "summary_use_proj": true, "tie_word_embeddings": true, "transformers_version": "5.0.0", "use_cache": true,
          "vocab_size": {{config.V}}
        }
        """;

    /// <summary>Writes a folder as transformers does.</summary>
    static void Write(string folder, Config config, IEnumerable<Stored> tensors) {
        Directory.CreateDirectory(folder);
        File.WriteAllText(Path.Combine(folder, "config.json"), ConfigJson(config));
        File.WriteAllBytes(Path.Combine(folder, "model.safetensors"), Content(tensors));
    }

    /// <summary>Writes a folder with a file for every few tensors, and an index.</summary>
    static void WriteShards(string folder, Config config, IEnumerable<Stored> tensors, int each) {
        var shards = tensors.Chunk(each)
            .Select((part, i) => (Name: $"model-{i + 1:d5}-of-99999.safetensors", part)).ToArray();
        Write(folder, config, []);
        File.Delete(Path.Combine(folder, "model.safetensors"));
        foreach (var (name, part) in shards)
            File.WriteAllBytes(Path.Combine(folder, name), Content(part));
        var map = shards.SelectMany(shard => shard.part.Select(tensor => $"\"{tensor.Name}\": \"{shard.Name}\""));
        File.WriteAllText(Path.Combine(folder, "model.safetensors.index.json"),
            $"{{\"metadata\": {{\"total_size\": 1}}, \"weight_map\": {{{string.Join(", ", map)}}}}}");
    }

    /// <summary>A model's weights in llm.c's order, as many at a time as given.</summary>
    static float[] Read(string path, Config expected, int chunk = 1 << 20) {
        var (file, config) = Checkpoints.Open(path);
        using var _ = file;
        if (config != expected)
            throw new InvalidOperationException($"{config}, not {expected}");
        var weights = new float[config.ParameterCount];
        for (var i = 0; i < weights.Length; i += chunk)
            file.ReadWeights(weights.AsSpan(i, Math.Min(chunk, weights.Length - i)));
        return weights;
    }

    // ---- Good files

    [Test]
    [Arguments("F32", "transformer.", 1 << 20), Arguments("F16", "", 1000), Arguments("BF16", "transformer.", 7)]
    public async Task Weights_of_every_type_are_read_and_transposed(string type, string prefix, int chunk) {
        using var folder = new TemporaryFolder();
        Write(folder["hf"], golden, Tensors(golden, GoldenWeights, type, prefix));
        await SameBits(Read(folder["hf"], golden, chunk), As(GoldenWeights, type));
        await SameBits(Read(folder["hf/model.safetensors"], golden, chunk), As(GoldenWeights, type));
    }

    [Test]
    public async Task Matrices_larger_than_a_chunk_are_read() {
        using var folder = new TemporaryFolder();
        var config = new Config(2, 4099, 4224, 1, 8, 544);
        var weights = Weights(config);
        Write(folder["hf"], config, Tensors(config, weights));
        await SameBits(Read(folder["hf"], config), weights);
    }

    [Test]
    public async Task Shards_buffers_and_a_tied_head_are_accepted() {
        using var folder = new TemporaryFolder();
        var tensors = Tensors(golden, GoldenWeights);
        var wte = tensors[0];
        tensors.AddRange([
            new("h.0.attn.bias", "BOOL", [1, 1, 4, 4], new byte[16]), wte with { Name = "lm_head.weight" },
            new("transformer.h.1.attn.bias", "F32", [1], new byte[4]),
            new("h.0.attn.masked_bias", "F32", [], new byte[4]),
        ]);
        WriteShards(folder["hf"], golden, tensors.AsEnumerable().Reverse(), 5);
        await SameBits(Read(folder["hf"], golden), GoldenWeights);
        await SameBits(Read(folder["hf/model.safetensors.index.json"], golden), GoldenWeights);
    }

    [Test]
    public async Task Without_a_configuration_heads_have_64_channels() {
        using var folder = new TemporaryFolder();
        var config = new Config(5, 130, 256, 1, 2, 128);
        File.WriteAllBytes(folder["any.safetensors"], Content(Tensors(config, Weights(config))));
        await SameBits(Read(folder["any.safetensors"], config), Weights(config));
    }

    [Test]
    [Arguments("\"gelu_new\"", "\"gelu_pytorch_tanh\""), Arguments("\"n_inner\": null", "\"n_inner\": 192")]
    [Arguments("1e-05", "0.00001"), Arguments("upcast_attn\": false", "upcast_attn\": true")]
    [Arguments("\"n_layer\": 2,", ""), Arguments("\"tie_word_embeddings\": true,", "")]
    public async Task Other_words_for_the_same_architecture_are_accepted(string word, string other) {
        using var folder = new TemporaryFolder();
        Write(folder["hf"], golden, Tensors(golden, GoldenWeights));
        var path = folder["hf/config.json"];
        var text = File.ReadAllText(path);
        await Assert.That(text).Contains(word);
        File.WriteAllText(path, text.Replace(word, other));
        await SameBits(Read(folder["hf"], golden), GoldenWeights);
    }

    // ---- Export

    [Test]
    [Arguments("fp32", 3, "F32"), Arguments("bf16", 5, "BF16")]
    public async Task What_is_exported_and_read_again_is_the_same(string type, int version, string stored) {
        using var folder = new TemporaryFolder();
        var (file, config) = Config.Open(Golden("model.bin"));
        using (file)
            Safetensors.ExportFolder(folder["hf"], file, config, Enum.Parse<StoredType>(type, ignoreCase: true));
        // Byte by byte what this test would write, but for the header.
        var (found, expected) = (File.ReadAllBytes(folder["hf/model.safetensors"]),
            Tensors(golden, GoldenWeights, stored).SelectMany(tensor => tensor.Bytes).ToArray());
        await Same(found[^expected.Length..], expected);
        await Assert.That((found.Length - expected.Length) % 8).IsEqualTo(0);
        await SameBits(Read(folder["hf"], golden), As(GoldenWeights, stored));

        (file, config) = Checkpoints.Open(folder["hf"]);
        using (file)
            Safetensors.ExportFile(folder["again.bin"], file, config, Enum.Parse<DataType>(type, ignoreCase: true));
        var header = File.ReadAllBytes(Golden("model.bin"))[..1024];
        header[4] = (byte)version;
        await Same(File.ReadAllBytes(folder["again.bin"]), [.. header, .. Bytes(GoldenWeights, stored)]);
    }

    [Test]
    public async Task Weights_beyond_the_type_are_an_error_and_leave_nothing() {
        using var folder = new TemporaryFolder();
        var weights = GoldenWeights;
        weights[^1] = 70000;
        Write(folder["hf"], golden, Tensors(golden, weights));
        foreach (var wrong in (float[])[70000, float.NaN]) {
            weights[^1] = wrong;
            Write(folder["hf"], golden, Tensors(golden, weights));
            var (file, config) = Checkpoints.Open(folder["hf"]);
            using var _ = file;
            var error = Assert.Throws<Gpt2Exception>(() =>
                Safetensors.ExportFolder(folder["out"], file, config, StoredType.Fp16));
            await Assert.That(error.Message).Contains("ln_f.bias").And.Contains("65504");
            await Assert.That(Directory.GetDirectories(folder.Path)).Count().IsEqualTo(1);
        }
    }

    [Test]
    public async Task The_exported_tokenizer_has_every_token_and_merge() {
        using var folder = new TemporaryFolder();
        Folders.WriteModel(folder["model.bin"], 4, 50257, 1, 1, 2, 50304);
        var (file, config) = Config.Open(folder["model.bin"]);
        using (file)
            Safetensors.ExportFolder(folder["hf"], file, config, StoredType.Bf16);
        using var json = JsonDocument.Parse(File.ReadAllBytes(folder["hf/tokenizer.json"]));
        // Some readers need these although they are null or the default.
        foreach (var name in (string[])["truncation", "padding", "normalizer", "post_processor", "decoder"])
            await Assert.That(json.RootElement.TryGetProperty(name, out _)).IsTrue().Because(name);
        await Assert.That(json.RootElement.GetProperty("pre_tokenizer").GetProperty("use_regex").GetBoolean()).IsTrue();
        var model = json.RootElement.GetProperty("model");
        var ids = model.GetProperty("vocab").EnumerateObject()
            .ToDictionary(each => each.Name, each => each.Value.GetInt32());
        var merges = model.GetProperty("merges").EnumerateArray().Select(each => each.GetString()!).ToArray();
        await Same(ids.Values, Enumerable.Range(0, 50257));
        await Same(merges.Select(merge => ids[merge.Replace(" ", "")]), Enumerable.Range(256, 50000));
        // GPT-2's own letters for bytes, as its encoder.py has them.
        var letters = new char[256];
        for (var (value, next) = (0, 256); value < 256; value++)
            letters[value] = (char)(value is >= '!' and <= '~' or >= 0xa1 and <= 0xac or >= 0xae ? value : next++);
        await Same(letters.Select(letter => ids[$"{letter}"]).Order(), Enumerable.Range(0, 256));
        // Merges in the order of their ranks, the first one first, make each token of its bytes, and our ids of a text.
        var ranks = merges.Index().ToDictionary(merge => merge.Item, merge => merge.Index);
        foreach (var token in ids.Keys.Where((_, id) => id % 50 == 0 && id < 50256))
            await Assert.That(Merged([.. token.Select(letter => $"{letter}")])).IsEqualTo(token);
        const string text = "Transformers' tokenizers: unbelievable, naïve \u4f60\u597d 1234567 \ud83d\ude00!";
        var found = Regex.Matches(text, @"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
            .SelectMany(piece => Merged([.. Encoding.UTF8.GetBytes(piece.Value).Select(value => $"{letters[value]}")])
            .Split(' ')).Select(token => ids[token]);
        await Same(found, new Tokenizer().Encode(text));

        string Merged(List<string> parts) {
            while (true) {
                var best = Enumerable.Range(0, parts.Count - 1)
                    .OrderBy(i => ranks.GetValueOrDefault($"{parts[i]} {parts[i + 1]}", int.MaxValue)).FirstOrDefault();
                if (parts.Count == 1 || !ranks.ContainsKey($"{parts[best]} {parts[best + 1]}"))
                    return string.Join(' ', parts);
                parts[best] += parts[best + 1];
                parts.RemoveAt(best + 1);
            }
        }
    }

    // ---- Bad files

    /// <summary>What is wrong, and words of the sentence about it; a change of the tiny model's folder.</summary>
    static readonly Dictionary<string, (string Words, Action<string> Change)> faults = new() {
        ["empty"] = ("model.safetensors 0", folder => File.WriteAllBytes(Model(folder), [])),
        ["header of 2^63 bytes"] = ("JSON bytes", Header(long.MinValue)),
        ["header of 2^62 bytes"] = ("JSON 4611686018427387904", Header(1L << 62)),
        ["header past the end"] = ("JSON 1000000", Header(1_000_000)),
        ["header of 11 MB"] = ("10000000 11000000", Text(new string(' ', 11_000_000))),
        ["header of 0 bytes"] = ("JSON", Header(0)),
        ["header cut off"] = ("JSON", Header(50)),
        ["header that is a list"] = ("JSON", Text("[1, 2]")),
        ["header too deep"] = ("JSON", Text(new string('[', 100_000))),
        ["header that is not UTF-8"] = ("JSON", folder => File.WriteAllBytes(Model(folder),
            [8, 0, 0, 0, 0, 0, 0, 0, (byte)'{', (byte)'"', 0xff, 0xfe, (byte)'"', (byte)':', (byte)'1', (byte)'}'])),
        ["header without tensors"] = ("wte.weight", Text("{}")),
        ["name twice"] = ("JSON h.0.ln_1.bias", Replaced("h.0.ln_2.bias", "h.0.ln_1.bias")),
        ["name with and without prefix"] = ("ln_f.bias again", Tensor("transformer.ln_f.bias", "F32", 2)),
        ["type unknown"] = ("ln_f.bias F32 Q77",
            Replaced("ln_f.bias\":{\"dtype\":\"F32", "ln_f.bias\":{\"dtype\":\"Q77")),
        ["type unknown of another tensor"] = ("more.ln_f.bias", Tensor("more.ln_f.bias", "Q77", 2)),
        ["type that is no string"] = ("wpe.weight",
            Replaced("wpe.weight\":{\"dtype\":\"F32\"", "wpe.weight\":{\"dtype\":32")),
        ["weights of integers"] = ("ln_f.bias F32 I32",
            Replaced("ln_f.bias\":{\"dtype\":\"F", "ln_f.bias\":{\"dtype\":\"I")),
        ["shape that overflows"] = ("wpe.weight", Replaced("[3,2]", "[4294967296,4294967296,4]")),
        ["shape that overflows to its size"] = ("wpe.weight", Replaced("[3,2]", "[9223372036854775807,2,3]")),
        ["shape below 0"] = ("wpe.weight", Replaced("[3,2]", "[-3,-2]")),
        ["shape of fractions"] = ("wpe.weight", Replaced("[3,2]", "[3.5,2]")),
        ["shape that is not the offsets'"] = ("wpe.weight", Replaced("[3,2]", "[3,3]")),
        ["shape of too many channels"] = ("wpe.weight [2, 3]", Replaced("[3,2]", "[2,3]")),
        ["offsets that overlap"] = ("byte wpe.weight", Offsets("[40,64]", "[36,60]")),
        ["offsets with a gap"] = ("byte wpe.weight", Offsets("[40,64]", "[44,68]")),
        ["offsets beyond the end"] = ("h.0.ln_1.weight byte", Offsets("[40,64]", "[4000,4024]")),
        ["offsets that overflow"] = ("wpe.weight", Offsets("[40,64]", "[9223372036854775800,9223372036854775807]")),
        ["offsets below 0"] = ("wpe.weight", Offsets("[40,64]", "[-24,0]")),
        ["offsets reversed"] = ("wpe.weight", Offsets("[40,64]", "[64,40]")),
        ["one offset"] = ("wpe.weight", Offsets("[40,64]", "[40]")),
        ["no offsets"] = ("wpe.weight", Replaced("\"data_offsets\":[40,64]", "\"x\":1")),
        ["bytes after the tensors"] = ("bytes", folder => File.AppendAllText(Model(folder), "x")),
        ["bytes missing"] = ("bytes", folder =>
            File.WriteAllBytes(Model(folder), File.ReadAllBytes(Model(folder))[..^1])),
        ["tensor missing"] = ("ln_f.weight none", Replaced("ln_f.weight", "ln_g.weight")),
        ["layer missing"] = ("h.0.ln_1.bias none", Replaced("h.0.ln_1.bias", "h.1.ln_1.bias")),
        ["tensor of another model"] = ("score.weight", Tensor("score.weight", "F32", 2)),
        ["name that is no text"] = (@"GPT-2 found", Tensor(@"\u001b[31m\n\u0000", "F32", 2)),
        ["surrogate in a name"] = ("JSON", Tensor(@"\ud800", "F32", 2)),
        ["head of another size"] = ("lm_head.weight", Tensor("lm_head.weight", "F32", 2)),
        ["head that is not tied"] = ("lm_head.weight wte", folder => Write(folder, tiny,
            [.. Tensors(tiny, Weights(tiny)), new("lm_head.weight", "F32", [5, 2], new byte[40])])),
        ["weight that is not finite"] = ("lnfb finite Infinity", folder => {
            var weights = Weights(tiny);
            weights[^1] = float.PositiveInfinity;
            Write(folder, tiny, Tensors(tiny, weights));
        }),
        ["vocabulary of one"] = ("wte.weight [1, 2]", folder =>
            File.WriteAllBytes(Model(folder), Content([new("wte.weight", "F32", [1, 2], new byte[8])]))),
        ["no model"] = ("hf DONE model.safetensors", folder => File.Delete(Model(folder))),
        ["index without files"] = ("weight_map", Index("{}")),
        ["index of a list"] = ("weight_map", Index("{\"weight_map\": []}")),
        ["index of nothing"] = ("weight_map", Index("{\"weight_map\": {\"a\": null}}")),
        ["index of a number"] = ("weight_map", Index("{\"weight_map\": {\"a\": 1}}")),
        ["index that escapes"] = ("weight_map ../a.safetensors",
            Index("{\"weight_map\": {\"a\": \"../a.safetensors\"}}")),
        ["index that escapes far"] = ("weight_map /a.safetensors",
            Index("{\"weight_map\": {\"a\": \"/a.safetensors\"}}")),
        ["index with a null"] = ("weight_map", Index("{\"weight_map\": {\"a\": \"a\\u0000.safetensors\"}}")),
        ["index with a line feed"] = ("weight_map", Index("{\"weight_map\": {\"a\": \"a.safetensors\\n\"}}")),
        ["index of other files"] = ("weight_map config.json", Index("{\"weight_map\": {\"a\": \"config.json\"}}")),
        ["index of no such file"] = ("a.safetensors none", Index("{\"weight_map\": {\"a\": \"a.safetensors\"}}")),
        ["configuration that is not JSON"] = ("config.json JSON", folder =>
            File.WriteAllText($"{folder}/config.json", "{")),
        ["no configuration, nor 64 channels"] = ("config.json n_head", folder =>
            File.Delete($"{folder}/config.json")),
        ["config of other heads"] = ("config.json n_head 3", Configured("\"n_head\": 1", "\"n_head\": 3")),
        ["config of no heads"] = ("config.json n_head 0", Configured("\"n_head\": 1", "\"n_head\": 0")),
        ["config of words"] = ("config.json n_head one", Configured("\"n_head\": 1", "\"n_head\": \"one\"")),
        ["config of another activation"] = ("config.json activation_function relu", Configured("gelu_new", "relu")),
        ["config of another n_inner"] = ("n_inner 9", Configured("\"n_inner\": null", "\"n_inner\": 9")),
        ["config of another scale"] = ("scale_attn_weights false", Configured("weights\": true", "weights\": false")),
        ["config of scaled layers"] = ("scale_attn_by_inverse_layer_idx true",
            Configured("idx\": false", "idx\": true")),
        ["config of another epsilon"] = ("layer_norm_epsilon 1e-06", Configured("1e-05", "1e-06")),
        ["config of another head"] = ("tie_word_embeddings false", Configured("dings\": true", "dings\": false")),
        ["config of another model"] = ("model_type gpt_neo", Configured("\"gpt2\"", "\"gpt_neo\"")),
        ["config of an encoder"] = ("add_cross_attention true", Configured("attention\": false", "attention\": true")),
        ["config of another vocabulary"] = ("vocab_size 5 6", Configured("size\": 5", "size\": 6")),
        ["config of other layers"] = ("n_layer 1 2", Configured("layer\": 1", "layer\": 2")),
        ["config of a longer context"] = ("n_positions 3 4", Configured("positions\": 3", "positions\": 4")),
    };

    static string Model(string folder) => $"{folder}/model.safetensors";

    static Action<string> Header(long size) => folder => {
        var bytes = File.ReadAllBytes(Model(folder));
        BitConverter.TryWriteBytes(bytes, size);
        File.WriteAllBytes(Model(folder), bytes);
    };

    static Action<string> Text(string header) => folder => File.WriteAllBytes(Model(folder), Content([], header));

    /// <summary>Another text in the header.</summary>
    static Action<string> Replaced(string text, string by) => folder => {
        var all = Content(Tensors(tiny, Weights(tiny), prefix: ""));
        var header = Encoding.UTF8.GetString(all, 8, (int)BitConverter.ToInt64(all));
        if (!header.Contains(text))
            throw new InvalidOperationException(header);
        File.WriteAllBytes(Model(folder), [.. Content([], header.Replace(text, by)), .. all[(8 + header.Length)..]]);
    };

    static Action<string> Offsets(string text, string by) =>
        Replaced($"\"data_offsets\":{text}", $"\"data_offsets\":{by}");

    /// <summary>One tensor more.</summary>
    static Action<string> Tensor(string name, string type, int count) => folder => File.WriteAllBytes(Model(folder),
        Content([.. Tensors(tiny, Weights(tiny), prefix: ""), new(name, type, [count], new byte[4 * count])]));

    static Action<string> Index(string text) => folder => {
        File.Delete(Model(folder));
        File.WriteAllText($"{folder}/model.safetensors.index.json", text);
    };

    static Action<string> Configured(string text, string by) => folder => {
        var json = ConfigJson(tiny);
        if (!json.Contains(text))
            throw new InvalidOperationException(json);
        File.WriteAllText($"{folder}/config.json", json.Replace(text, by));
    };

    public static IEnumerable<string> Faults => faults.Keys;

    [Test]
    [MethodDataSource(nameof(Faults))]
    public async Task A_bad_file_is_refused_in_one_sentence(string fault) {
        using var folder = new TemporaryFolder();
        Write(folder["hf"], tiny, Tensors(tiny, Weights(tiny)));
        LoadTiny(folder["hf"]);
        faults[fault].Change(folder["hf"]);
        var error = Gpt2Exception.Sentence(Assert.Throws<Exception>(() => LoadTiny(folder["hf"])));
        foreach (var word in faults[fault].Words.Split(' '))
            await Assert.That(error).Contains(word);
        await Assert.That(error).DoesNotMatch(@"[\p{C}]").And.Contains(": expected ").And.Contains("found ");
        await Assert.That(error.Length).IsLessThan(600);
    }

    /// <summary>Opens a model and loads it.</summary>
    static void LoadTiny(string path) {
        var (file, config) = Checkpoints.Open(path);
        using var closed = file;
        using var device = new Cpu();
        new Model(config, device, 1, 1, Purpose.Evaluate).Load(file);
    }

    [Test]
    [Arguments("model.safetensors", 4000), Arguments("model.safetensors.index.json", 1500)]
    [Arguments("config.json", 1500)]
    public async Task A_mutated_file_loads_or_is_refused(string name, int count) {
        using var folder = new TemporaryFolder();
        if (name.EndsWith("index.json"))
            WriteShards(folder["hf"], tiny, Tensors(tiny, Weights(tiny)), 8);
        else
            Write(folder["hf"], tiny, Tensors(tiny, Weights(tiny)));
        var (path, random, refused) = (folder[$"hf/{name}"], new Random(1), 0);
        var whole = File.ReadAllBytes(path);
        var length = name == "model.safetensors" ? 8 + (int)BitConverter.ToInt64(whole) : whole.Length; // of the JSON
        string[] words =
            ["0", "-1", "1e99", "null", "[]", "{}", "\"", ",", "9223372036854775807", "\\u0000", "\\ud800", ".."];
        for (var i = 0; i < count; i++) {
            var bytes = whole.ToList();
            for (var changes = random.Next(1, 4); changes > 0; changes--) {
                var at = random.Next(Math.Min(length, bytes.Count));
                var size = random.Next(1, Math.Min(30, bytes.Count - at + 1));
                switch (random.Next(6)) {
                    case 0: bytes[at] = (byte)random.Next(256); break;
                    case 1: bytes[at] ^= (byte)(1 << random.Next(8)); break;
                    case 2: bytes.RemoveRange(at, size); break;
                    case 3: bytes.InsertRange(random.Next(at + 1), bytes.GetRange(at, size)); break;
                    case 4: bytes.InsertRange(at, Encoding.UTF8.GetBytes(words[random.Next(words.Length)])); break;
                    default: bytes[at] = (byte)"0123456789[]{}\",:"[random.Next(17)]; break;
                }
                if (bytes.Count == 0)
                    break;
            }
            if (length < whole.Length && random.Next(2) == 0) // the header's size is right, so that more of it is read
                bytes = [.. BitConverter.GetBytes((long)(bytes.Count - whole.Length + length - 8)), .. bytes.Skip(8)];
            File.WriteAllBytes(path, [.. bytes]);
            var (watch, before) = (Stopwatch.StartNew(), GC.GetAllocatedBytesForCurrentThread());
            try {
                LoadTiny(folder["hf"]);
            } catch (Exception e) when (e is Gpt2Exception or IOException) {
                refused++;
                await Assert.That(Gpt2Exception.Sentence(e)).Contains(": expected ").And.DoesNotMatch(@"[\p{C}]");
            } catch (Exception e) {
                throw new InvalidOperationException($"mutation {i}: {Encoding.UTF8.GetString([.. bytes])}", e);
            }
            await Assert.That(watch.Elapsed).IsLessThan(TimeSpan.FromSeconds(5)).Because($"mutation {i}");
            var allocated = GC.GetAllocatedBytesForCurrentThread() - before;
            await Assert.That(allocated).IsLessThan(64 << 20).Because($"mutation {i}");
        }
        await Assert.That(refused).IsBetween(count / 10, count - 1);
    }
}

/// <summary>Such models on the real binary.</summary>
public class SafetensorsCommandTests {
    [Test]
    public async Task Every_command_takes_an_exported_model() {
        using var folder = Folders.Goldens();
        var exported = await Gpt2Process.Succeed(folder.Path, "export -e model.bin -o hf/");
        await Assert.That(exported.Sentences.Single()).Contains("no tokenizer").And.Contains("211");
        await Assert.That(Folders.Names(folder["hf"]))
            .IsEqualTo("config.json generation_config.json model.safetensors");
        foreach (var command in (string[])["sample --prompt-ids 1,2 -n 9", "eval -j val.bin -b 2 -t 21"]) {
            var expected = await Gpt2Process.Succeed(folder.Path, $"{command} -e model.bin");
            foreach (var path in (string[])["hf", "hf/model.safetensors"]) {
                var found = await Gpt2Process.Succeed(folder.Path, $"{command} -e {path}");
                await Assert.That(found.Output).IsEqualTo(expected.Output);
            }
        }
        await Gpt2Process.Succeed(folder.Path, "verify -e hf --state state.bin");
        await Gpt2Process.Succeed(folder.Path, "bench -e hf -b 1 -t 21 -x 1");
        // Finetuning from either gives the same model, and resumes with either.
        foreach (var (model, run) in ((string, string)[])[("model.bin", "one"), ("hf", "two")]) {
            const string train = "train -i train.bin -j val.bin -b 2 -t 21 -d 42";
            await Gpt2Process.Succeed(folder.Path, $"{train} -x 2 -e {model} -o {run}");
            await Gpt2Process.Succeed(folder.Path, $"{train} -x 3 -e {model} -o {run} --resume");
            await Gpt2Process.Succeed(folder.Path, $"export -e {run} -o {run}.bin --type bf16");
        }
        await Same(File.ReadAllBytes(folder["two.bin"]), File.ReadAllBytes(folder["one.bin"]));
    }

    [Test]
    public async Task A_text_model_samples_text_and_has_a_tokenizer() {
        using var folder = new TemporaryFolder();
        Folders.WriteModel(folder["model.bin"], 32, 50257, 1, 1, 8, 50304);
        var exported = await Gpt2Process.Succeed(folder.Path, "export -e model.bin -o hf --type fp16");
        await Assert.That(exported.Output + exported.Error).IsEmpty();
        await Assert.That(Folders.Names(folder["hf"])).IsEqualTo(
            "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json");
        foreach (var name in (string[])["config", "generation_config", "tokenizer", "tokenizer_config"])
            JsonDocument.Parse(File.ReadAllBytes(folder[$"hf/{name}.json"])).Dispose();
        var sample = await Gpt2Process.Succeed(folder.Path, "sample -e hf -n 2 -p Hello");
        await Assert.That(sample.Output).StartsWith("Hello");
    }

    [Test]
    [Arguments("export -e model.bin -o old", 1, "old expected new folder")]
    [Arguments("export -e model.bin -o val.bin/new", 1, "val.bin expected")]
    [Arguments("export -e model.bin -o new.bin --type fp16", 2, "--type fp16")]
    [Arguments("export -e model.bin -o new --type int8", 2, "--type fp32 int8")]
    [Arguments("export -e model.bin", 2, "--out")]
    [Arguments("export -o new", 2, "--init")]
    [Arguments("export -e d12 -o new", 1, "d12 expected")]
    [Arguments("export -e old -o new", 1, "old model.safetensors DONE")]
    [Arguments("export -e nan.bin -o new", 1, "ln_f.bias finite NaN")]
    [Arguments("export -e nan.bin -o new.bin", 1, "ln_f.bias finite NaN")]
    [Arguments("export -e nan.bin -o new --device cpu", 2, "--device")]
    [Arguments("sample -e bad.safetensors --prompt-ids 1", 1, "bad.safetensors JSON")]
    public async Task Bad_words_are_refused_and_leave_nothing(string command, int status, string words) {
        using var folder = Folders.Goldens();
        Directory.CreateDirectory(folder["old"]);
        File.WriteAllText(folder["old/file"], "");
        File.Copy(folder["model.bin"], folder["bad.safetensors"]);
        var nan = File.ReadAllBytes(folder["model.bin"]);
        BitConverter.TryWriteBytes(nan.AsSpan(nan.Length - 4), float.NaN);
        File.WriteAllBytes(folder["nan.bin"], nan);
        var before = Folders.Contents(folder.Path);
        var result = await Gpt2Process.Run(folder.Path, command);
        await Assert.That(result.ExitCode).IsEqualTo(status).Because(result.ToString());
        foreach (var word in words.Split(' '))
            await Assert.That(result.Sentences.Single()).Contains(word);
        await Assert.That(Folders.Contents(folder.Path)).IsEqualTo(before);
        await Assert.That(Directory.GetDirectories(folder.Path)).Count().IsEqualTo(1);
    }

    [Test]
    public async Task A_full_disk_leaves_nothing() {
        using var folder = Folders.Goldens();
        var result = await Gpt2Process.RunLimited(100, folder.Path, "export -e model.bin -o hf");
        await Assert.That(result.ExitCode).IsEqualTo(1);
        await Assert.That(result.Sentences.Single()).Contains("model.safetensors: expected ");
        await Assert.That(Directory.GetDirectories(folder.Path)).IsEmpty();
    }

    [Test]
    public async Task Help_names_every_option() {
        var help = await Gpt2Process.Succeed(".", "export --help");
        foreach (var option in (string[])["-e, --init NAME", "-o, --out NAME", "    --type NAME", "    --verbose"])
            await Assert.That(help.Output).Contains($"  {option}");
        await Assert.That(help.Output).DoesNotContain("--device").And.DoesNotContain("--precision");
    }
}
