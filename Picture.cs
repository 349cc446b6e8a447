using System.Security;

namespace Gpt2;

/// <summary>Pictures of runs, as SVG for a light or a dark page: losses, learning rate, norm and speed.</summary>
public static class Picture {
    const int Left = 60, Width = 720, Colors = 6;

    const string Style = """
        <style>
        rect { fill: #fff } text { fill: #222 } .grid { stroke: #e2e6ec }
        @media (prefers-color-scheme: dark) {
        rect { fill: #0d1117 } text { fill: #e6e6e6 } .grid { stroke: #2b3440 } }
        polyline { fill: none; stroke-width: 2 } .raw { stroke-width: 1; opacity: .4 } .dashed { stroke-dasharray: 5 3 }
        .c0 { stroke: #3878d8 } .c1 { stroke: #e0662a } .c2 { stroke: #2c9c5e }
        .c3 { stroke: #9a5cd0 } .c4 { stroke: #b08420 } .c5 { stroke: #1a96a6 }
        </style>
        """;

    // 1, 2 and 5 times powers of ten.
    static readonly double[] round = [.. from power in Enumerable.Range(-9, 300)
        from digit in (int[])[1, 2, 5] select digit * Math.Pow(10, power)];

    /// <summary>A curve's points, tokens and a value each.</summary>
    sealed record Curve(string Class, (double X, double Y)[] Points);

    /// <summary>Draws runs over one another, against updates if the tokens of one's are not known.</summary>
    public static string Draw(RunLog[] runs) {
        var isKnown = runs.All(run => run.TotalBatch != null);
        int[] batches = [.. runs.Select(run => isKnown ? run.TotalBatch!.Value : 1)];
        var last = runs.Zip(batches, (run, batch) =>
            (double)batch * run.Train.Concat(run.Validation).Max(point => point.Step)).Max();
        var scale = new Axis(batches.Min(), Math.Max(last, 2.0 * batches.Min()));
        var isOne = runs.Length == 1;
        var title = SecurityElement.Escape(isOne ? runs[0].Name : $"{runs.Length} runs");
        var settings = isOne ? string.Join(", ", runs[0].Summary) : "solid: validation; dashed: training";
        var legend = isOne ? ["training", "validation"] : runs.Select(run =>
            runs.Count(other => other.Name == run.Name) > 1 ? run.Folder : run.Name);
        return $"""
            <svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 800 660' font-family='Arial' font-size='12'>
            <title>{title}</title>
            {Style}
            <rect width='800' height='660'/>
            <text x='{Left}' y='26' font-size='18' font-weight='bold'>{title}</text>
            <text x='{Left}' y='46'>{SecurityElement.Escape(settings)}</text>
            {Panel("loss", 84, Left, Width, 326, scale, runs.SelectMany(Losses))}
            {string.Join('\n', legend.Select((name, i) => $"<path class='c{i % Colors}' stroke-width='3' " +
                $"d='M600 {100 + 18 * i}h24'/><text x='632' y='{104 + 18 * i}'>{SecurityElement.Escape(name)}</text>"))}
            <text x='420' y='448' text-anchor='middle'>{(isKnown ? "tokens" : "updates")}</text>
            {Panel("learning rate", 490, Left, 190, 120, scale, All(run => run.Rates))}
            {Panel("norm of the gradient", 490, Left + 265, 190, 120, scale, All(run => run.Norms))}
            <g class='speed'>
            {Panel("tokens per second", 490, Left + 530, 190, 120, scale, All(run => run.Speeds))}
            </g>
            </svg>

            """;

        IEnumerable<(double X, double Y)> Points(int run, List<(int Step, double Value)> values) =>
            values.Where(point => point.Step > 0).Select(point => ((double)batches[run] * point.Step, point.Value));
        Curve Means(string name, int run, List<(int, double)> values, int parts) => new(name, [.. Points(run, values)
            .GroupBy(point => (int)(parts * scale.At(point.X)))
            .Select(part => (part.Average(point => point.X), part.Average(point => point.Y)))]);
        IEnumerable<Curve> All(Func<RunLog, List<(int, double)>> values) =>
            runs.Select((run, i) => Means($"c{i % Colors}", i, values(run), 100));
        Curve[] Losses(RunLog run, int i) => [
            Means($"c{i % Colors} raw", i, run.Train, Width),
            Means($"c{i % Colors}{(isOne ? "" : " dashed")}", i, run.Train, 150),
            new($"c{(isOne ? 1 : i) % Colors}", [.. Points(i, run.Validation)])];
    }

    /// <summary>A logarithmic axis.</summary>
    readonly record struct Axis(double From, double To) {
        /// <summary>Where a value is, from 0 to 1.</summary>
        public double At(double x) => Math.Log(x / From) / Math.Log(To / From);

        /// <summary>The round values, or as many powers of ten as have room.</summary>
        public IEnumerable<double> Ticks(double width) {
            var (axis, decade) = (this, width / Math.Log10(To / From));
            var step = 0.3 * decade >= 45 ? 1 : 3 * (int)Math.Ceiling(45 / decade);
            return round.Where((x, i) => i % step == 0 && x >= axis.From && x <= axis.To);
        }
    }

    /// <summary>Curves in a frame, with round ticks.</summary>
    static string Panel(
        string name, int top, int left, int width, int height, Axis scale, IEnumerable<Curve> all) {
        var curves = all.Where(curve => curve.Points.Length > 0).ToArray();
        // All but losses are shown from 0 on.
        var values = curves.SelectMany(curve => curve.Points).Select(point => point.Y)
            .Concat(name != "loss" || curves.Length == 0 ? [0] : []).ToArray();
        var least = Math.Max((values.Max() - values.Min()) / 4, Math.Max(1e-6, values.Max() / 20));
        var tick = round.First(x => x >= 0.999 * least);
        var (low, high) = (Math.Floor(values.Min() / tick), Math.Ceiling(values.Max() / tick - 1e-6)); // in ticks
        high = Math.Max(high, low + 1);
        double X(double x) => left + width * scale.At(x);
        double Y(double y) => top + height * (high - y / tick) / (high - low);
        return string.Join('\n', [
            $"<text x='{left}' y='{top - 8}' font-weight='bold'>{name}</text>",
            .. Enumerable.Range(0, (int)(high - low) + 1).Select(i => (low + i) * tick).Select(y =>
                $"<path class='grid' d='M{left} {Y(y):F1}h{width}'/>" +
                $"<text x='{left - 6}' y='{Y(y) + 4:F1}' text-anchor='end'>{Short(y)}</text>"),
            .. scale.Ticks(width).Select(x => $"<path class='grid' d='M{X(x):F1} {top}v{height}'/>" +
                $"<text x='{X(x):F1}' y='{top + height + 18}' text-anchor='middle'>{Short(x)}</text>"),
            .. curves.Select(curve => $"<polyline class='{curve.Class}' points='" + string.Join(' ',
                curve.Points.Select(point => $"{X(point.X):F1},{Y(point.Y):F1}")) + "'/>")]);
    }

    static string Short(double x) => x switch {
        >= 1e9 => $"{x / 1e9:0.##}B",
        >= 1e6 => $"{x / 1e6:0.##}M",
        >= 1e3 => $"{x / 1e3:0.##}k",
        _ => $"{Math.Round(x, 8):G6}",
    };
}
