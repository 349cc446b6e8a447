namespace Gpt2;

/// <summary>What is written down of a run: main.log as llm.c has it, metrics.jsonl, and loss.svg, a picture.</summary>
public sealed partial class RunLog {
    const string Log = "main.log", Metrics = "metrics.jsonl";
    readonly string folder;
    long tokens; // of all updates so far, and the seconds they took
    double seconds;

    /// <summary>Reads a run's log.</summary>
    /// <param name="firstStep">Given if the run goes on from there: what was written later is dropped.</param>
    public RunLog(string folder, int? firstStep = null) {
        this.folder = folder;
        foreach (var name in (string[])[Log, Metrics]) {
            // A run that starts anew validates anew too.
            var path = Path.Combine(folder, name);
            string[] kept = firstStep == 0 || !File.Exists(path) ? []
                : [.. File.ReadAllLines(path).Where(line => Add(name, line, firstStep))];
            if (firstStep != null)
                Files.Write(path, string.Concat(kept.Select(line => line + "\n")));
        }
    }

    /// <summary>This log, if it has an update.</summary>
    /// <exception cref="Gpt2Exception">It has none.</exception>
    public RunLog Begun() => Train.Count > 0 ? this
        : throw new Gpt2Exception($"{Path.Combine(folder, Log)}: expected a log as llm.c has it, found none");

    /// <summary>The run's folder, as it was given, and its name.</summary>
    public string Folder => folder;
    public string Name => new DirectoryInfo(folder).Name;

    /// <summary>Losses, learning rates, norms before clipping, and tokens a second, after so many updates.</summary>
    public List<(int Step, double Value)> Train { get; } = [];
    public List<(int Step, double Value)> Validation { get; } = [];
    public List<(int Step, double Value)> Rates { get; } = [];
    public List<(int Step, double Value)> Norms { get; } = [];
    public List<(int Step, double Value)> Speeds { get; } = [];

    [GeneratedRegex("^s:(?<step>[0-9]{1,9}) (trl:(?<trl>-?[0-9]+\\.[0-9]{4})|tel:(?<tel>-?[0-9]+\\.[0-9]{4})|" +
        "eval:[0-9]+\\.[0-9]{4})( lr:(?<lr>[0-9]+\\.[0-9]{6}) norm:(?<norm>[0-9]+\\.[0-9]{2}))?$")]
    private static partial Regex LogLine();

    [GeneratedRegex("^\\{\"step\":(?<step>[0-9]{1,9}),.*\"tokens\":(?<tokens>[0-9]{1,18})," +
        "\"seconds\":(?<seconds>[0-9]{1,9}\\.[0-9]{3})(,\"tokens_per_second\":(?<speed>[0-9]{1,15}),.*)?\\}$")]
    private static partial Regex MetricsLine();

    /// <summary>Adds a line's numbers to the curves, rounded as they are: a resumed run draws the same.</summary>
    /// <returns>False if it is no line of such a file, or tells what followed the last step.</returns>
    bool Add(string name, string line, int? last = null) {
        var groups = (name == Log ? LogLine() : MetricsLine()).Match(line).Groups;
        if (!groups[0].Success)
            return false;
        // In main.log an update has the number of those before it.
        var step = int.Parse(groups["step"].Value) + (groups["trl"].Success ? 1 : 0);
        if (step > last)
            return false;
        foreach (var (curve, points) in ((string, List<(int, double)>)[])[
            ("trl", Train), ("tel", Validation), ("lr", Rates), ("norm", Norms), ("speed", Speeds)]) {
            if (groups[curve].Success)
                points.Add((step, double.Parse(groups[curve].Value)));
        }
        if (groups["tokens"].Success)
            (tokens, seconds) = (long.Parse(groups["tokens"].Value), double.Parse(groups["seconds"].Value));
        return true;
    }

    void Append(string name, string line) {
        Add(name, line);
        File.AppendAllText(Path.Combine(folder, name), line + "\n");
    }

    /// <summary>The best validation up to a step, if any; of equal ones the first.</summary>
    public (int Step, double Loss)? BestAt(int step) => Validation.Where(point => point.Step <= step)
        .Select(point => ((int, double)?)point).MinBy(point => point?.Item2);

    /// <summary>How many standard deviations a loss or norm is above the last 128 in the log, rounded as those are: the
    /// larger of the two, or 0 while there are fewer.</summary>
    public double Deviation(double loss, double norm) {
        const int window = 128;
        return Norms.Count < window ? 0
            : Math.Max(Above(double.Parse($"{loss:F4}"), Train), Above(double.Parse($"{norm:F2}"), Norms));

        static double Above(double value, List<(int Step, double Value)> all) {
            var last = all.TakeLast(window).Select(point => point.Value).ToArray();
            var mean = last.Average();
            return (value - mean) / Math.Sqrt(last.Average(x => (x - mean) * (x - mean)) + 1e-10);
        }
    }

    /// <summary>Logs an update, <paramref name="step"/> others after the start.</summary>
    /// <param name="batch">Its tokens.</param>
    /// <param name="time">The seconds it took.</param>
    /// <param name="mfu">Model FLOPs utilization, if the device's peak is known.</param>
    /// <param name="memory">Bytes of memory that training takes.</param>
    public void Update(
        int step, double loss, float rate, float norm, int batch, double time, double? mfu, long memory) {
        tokens = tokens == 0 ? (long)step * batch : tokens; // of a run that had no metrics yet
        Append(Log, $"s:{step} trl:{loss:F4} lr:{rate:F6} norm:{norm:F2}");
        Append(Metrics, $"{{\"step\":{step + 1},\"loss\":{loss:F6},\"lr\":{rate:G6}," +
            $"\"norm\":{norm:F4},\"tokens\":{tokens + batch},\"seconds\":{seconds + time:F3}," +
            $"\"tokens_per_second\":{batch / time:F0}," + (mfu == null ? "" : $"\"mfu\":{mfu:F4},") +
            $"\"memory\":{memory}}}");
    }

    /// <summary>Logs a validation after <paramref name="step"/> updates, and draws the curves.</summary>
    /// <returns>What it is compared with the best one before, in words.</returns>
    public string Validated(int step, double loss) {
        var best = BestAt(int.MaxValue);
        Append(Log, $"s:{step} tel:{loss:F4}");
        Append(Metrics, $"{{\"step\":{step},\"val\":{loss:F6},\"tokens\":{tokens},\"seconds\":{seconds:F3}}}");
        Files.Write(Path.Combine(folder, "loss.svg"), Picture.Draw([this]));
        var by = Validation[^1].Value - best?.Loss;
        return by == null ? "" : by < 0 ? $" | better by {-by:F4}" : $" | worse by {by:F4} than at step {best?.Step}";
    }

    /// <summary>The settings that matter most, as in "lr 0.001"; none for a run of llm.c.</summary>
    public IEnumerable<string> Summary => Path.Combine(folder, "settings.txt") is var path && !File.Exists(path) ? []
        : File.ReadLines(path).Where(line => SummaryLine().IsMatch(line)).Select(line => line[2..]);

    /// <summary>Tokens in an update; null if the settings do not tell.</summary>
    public int? TotalBatch => Summary.FirstOrDefault(line => line.StartsWith("total-batch ")) is { } line &&
        int.TryParse(line.Split(' ')[1], out var batch) && batch > 0 ? batch : null;

    [GeneratedRegex("^--(init|optimizer|lr|schedule|total-batch|max-steps|seed) ")]
    private static partial Regex SummaryLine();
}

/// <summary>Lines that fit into the terminal, and overwrite the live line before them.</summary>
public static class Terminal {
    /// <summary>True if lines can be overwritten. Standard output alone may be a terminal that mpirun gives to its
    /// processes, while its own goes elsewhere.</summary>
    public static bool IsLive => !Console.IsOutputRedirected && !Console.IsErrorRedirected &&
        Environment.GetEnvironmentVariable("TERM") != "dumb" &&
        string.IsNullOrEmpty(Environment.GetEnvironmentVariable("NO_COLOR"));

    /// <summary>Hours, minutes and seconds.</summary>
    public static string Time(TimeSpan time) => $"{(int)time.TotalHours}:{time:mm\\:ss}";

    /// <summary>Columns of standard output; very many if it is no terminal.</summary>
    public static int Width =>
        Console.IsOutputRedirected || Console.WindowWidth <= 0 ? int.MaxValue : Console.WindowWidth;

    /// <summary>Breaks a text that begins in a column into lines of less than a width, which begin there too.</summary>
    public static string Wrap(string text, int column, int width) => string.Join("\n" + new string(' ', column),
        Regex.Matches(text, $@"\S.{{0,{Math.Max(0, width - column - 2)}}}(?= |$)|\S+"));

    /// <summary>A line of fields between bars, without the last ones if the terminal is too narrow.</summary>
    public static string Over(string line) {
        while (line.Length >= Width && line.LastIndexOf(" | ") is > 0 and var bar)
            line = line[..bar];
        return IsLive ? $"\r\e[K{line}" : line;
    }
}
