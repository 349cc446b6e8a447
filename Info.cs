namespace Gpt2;

/// <summary>What a file or a folder is, in a few rows.</summary>
public static class Info {
    /// <summary>The rows, with names, of a model, a training state, a shard, a run, or a folder of shards.</summary>
    /// <exception cref="Gpt2Exception">It is something else, or is damaged.</exception>
    public static IEnumerable<(string Name, string Text)> Of(string path) {
        if (Path.GetFileName(path).Contains(".safetensors") || Safetensors.In(path) != null)
            return OfModel(path);
        if (Directory.Exists(path))
            return File.Exists(Path.Combine(path, "settings.txt")) ? OfRun(path, new RunLog(path))
                : new Checkpoints(path).HasRun ? OfRun(path, new RunLog(path).Begun())
                : OfShards(Path.Combine(path, "*.bin"));
        using var file = new BinaryFile(path, "a file of llm.c or gpt2");
        int[] magic = [0];
        file.Read(magic.AsSpan());
        return magic[0] switch {
            Config.ModelMagic => OfModel(path),
            Checkpoints.Magic => Checkpoints.Describe(path),
            TokenShards.Magic => OfShards(path),
            _ => throw file.Fail("a model, a training state, or a token shard", $"a file that begins with {magic[0]}"),
        };
    }

    static IEnumerable<(string, string)> OfModel(string path) {
        var (file, config) = Checkpoints.Open(path);
        using var _ = file;
        yield return ("model", config.Summary);
        yield return ("weights", $"{config.ParameterCount} numbers, {Safetensors.TypeOf(file)}".ToLowerInvariant());
    }

    static IEnumerable<(string, string)> OfRun(string path, RunLog log) {
        var run = new Checkpoints(path);
        yield return ("run", $"{log.Train.Count} updates in its log; " +
            (run.Last is { } newest ? $"the newest checkpoint is of step {newest}" : "no checkpoint"));
        yield return ("options", string.Join(", ", log.Summary));
        if (log.Train.Count > 0)
            yield return ("loss", $"{log.Train[^1].Value} in training at the end" +
                (log.BestAt(int.MaxValue) is not { } best ? ""
                    : $"; {best.Loss} in validation after step {best.Step}, the best"));
        foreach (var row in run.Last != null ? OfModel(path) : [])
            yield return row;
    }

    static IEnumerable<(string, string)> OfShards(string pattern) {
        using var shards = new TokenShards(pattern, 1 << 16);
        yield return ("shards", $"{shards.Counts.Length} with {shards.Tokens} tokens");
        var tokens = new int[Math.Clamp(shards.Counts[0] - 1, 0, 60)];
        if (tokens.Length == 0)
            yield break;
        shards.Read(0, 0, tokens, new int[tokens.Length]);
        var words = new Tokenizer().Decode(tokens.Where(token => token < Tokenizer.EndOfTextId));
        yield return ("text", Regex.Replace(string.Concat(words), @"[\s\p{C}]+", " ") + "...");
    }
}
