using System.Security;

namespace Gpt2;

/// <summary>Pictures of runs, as SVG for a light or a dark background: losses against tokens, with learning rate, norm
/// and speed below.</summary>
public static class Picture {
    const int Left = 60, Width = 720, Colors = 6;

    const string Style = """
        <style>
        rect { fill: #fff } text { fill: #222 } .grid { stroke: #e2e6ec } polyline { fill: none; stroke-width: 2 }
        .raw { stroke-width: 1; opacity: .4 } .dashed { stroke-dasharray: 5 3 }
        .c0 { stroke: #2050a0 } .c1 { stroke: #d05020 } .c2 { stroke: #2a8a50 }
        .c3 { stroke: #8a3fb0 } .c4 { stroke: #a87a00 } .c5 { stroke: #00808f }
        @media (prefers-color-scheme: dark) {
        rect { fill: #0d1117 } text { fill: #e6e6e6 } .grid { stroke: #2b3440 }
        .c0 { stroke: #6ea8ff } .c1 { stroke: #ff9566 } .c2 { stroke: #6fd19a }
        .c3 { stroke: #cf9cf5 } .c4 { stroke: #e0b84a } .c5 { stroke: #50cfe0 } }
        </style>
        """;

    /// <summary>Points of a curve: tokens and a value.</summary>
    sealed record Curve(string Class, IEnumerable<(double X, double Y)> Points);

    /// <summary>Draws runs over one another. Tokens are updates times the settings' --total-batch.</summary>
    public static string Draw(RunLog[] runs) {
        int[] batches = [.. runs.Select(run => run.Summary.FirstOrDefault(line => line.StartsWith("total-batch ")) is
            { } line && int.TryParse(line.Split(' ')[1], out var batch) ? Math.Max(1, batch) : 1)];
        var unit = batches.Contains(1) ? "updates" : "tokens";
        var (from, to) = (batches.Min(), runs.Zip(batches, (run, batch) => (double)batch *
            run.Train.Concat(run.Validation).Append((1, 0)).Max(point => point.Item1 + 1)).Max());
        var scale = new Axis(from, Math.Max(to, 2.0 * from));

        var title = runs.Length == 1 ? runs[0].Name : $"{runs.Length} runs";
        var settings = runs.Length > 1 ? "solid: validation; dashed: training" : string.Join(", ", runs[0].Summary);
        var legend = runs.Length == 1 ? ["training", "validation"] : runs.Select(run => run.Name).ToArray();
        return $"""
            <svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 660" font-family="Arial" font-size="12">
            <title>{SecurityElement.Escape(title)}</title>
            {Style}
            <rect width="800" height="660"/>
            <text x="{Left}" y="26" font-size="18" font-weight="bold">{SecurityElement.Escape(title)}</text>
            <text x="{Left}" y="46">{SecurityElement.Escape(settings)}</text>
            {Panel("loss", 84, Left, Width, 326, scale, Losses())}
            {string.Concat(legend.Select((name, i) => $"""
                <path class="c{i % Colors}" stroke-width="3" d="M600 {100 + 18 * i}h24"/>
                <text x="632" y="{104 + 18 * i}">{SecurityElement.Escape(name)}</text>

                """))}<text x="420" y="448" text-anchor="middle">{unit}</text>
            {Panel("learning rate", 490, Left, 190, 120, scale, All(run => run.Rates))}
            {Panel("norm of the gradient", 490, Left + 265, 190, 120, scale, All(run => run.Norms))}
            <g class="speed">
            {Panel("tokens per second", 490, Left + 530, 190, 120, scale, All(run => run.Speeds))}
            </g>
            </svg>

            """;

        IEnumerable<(double, double)> Points(int run, List<(int Step, double Value)> values, int before = 1) =>
            values.Select(point => ((double)batches[run] * Math.Max(1, point.Step + before), point.Value));
        IEnumerable<Curve> All(Func<RunLog, List<(int, double)>> values) =>
            runs.Select((run, i) => new Curve($"c{i % Colors}", scale.Means(Points(i, values(run)), 100)));
        IEnumerable<Curve> Losses() => runs.SelectMany((run, i) => (Curve[])[
            new($"c{i % Colors} raw", scale.Means(Points(i, run.Train), Width)),
            new($"c{i % Colors}{(runs.Length > 1 ? " dashed" : "")}", scale.Means(Points(i, run.Train), 150)),
            new($"c{(runs.Length > 1 ? i : 1) % Colors}",
                Points(i, [.. run.Validation.Where(point => point.Step > 0)], before: 0))]);
    }

    /// <summary>A logarithmic axis.</summary>
    readonly record struct Axis(double From, double To) {
        /// <summary>Where a value is, from 0 to 1.</summary>
        public double At(double x) => Math.Log(x / From) / Math.Log(To / From);

        /// <summary>The means of the points in each of so many parts, which takes noise away.</summary>
        public IEnumerable<(double X, double Y)> Means(IEnumerable<(double X, double Y)> points, int parts) {
            var axis = this;
            return points.GroupBy(point => (int)(parts * axis.At(point.X)))
                .Select(part => (part.Average(point => point.X), part.Average(point => point.Y)));
        }

        /// <summary>Round values, 1, 2 or 5 times a power of ten, as many as have room.</summary>
        public IEnumerable<double> Ticks(double width) {
            var last = double.NegativeInfinity;
            foreach (var x in from power in Enumerable.Range(0, 18) from digit in (int[])[1, 2, 5]
                select digit * Math.Pow(10, power)) {
                if (x >= From && x <= To && At(x) * width >= last + 45) {
                    last = At(x) * width;
                    yield return x;
                }
            }
        }
    }

    /// <summary>Curves in a frame, with round ticks.</summary>
    static string Panel(
        string name, int top, int left, int width, int height, Axis scale, IEnumerable<Curve> all) {
        var curves = all.Select(curve => (curve.Class, Points: curve.Points.ToArray()))
            .Where(curve => curve.Points.Length > 0).ToArray();
        // All but losses are shown from 0 on.
        double[] values = [.. curves.SelectMany(curve => curve.Points).Select(point => point.Y),
            .. name != "loss" || curves.Length == 0 ? [0.0] : (double[])[]];
        var least = Math.Max((values.Max() - values.Min()) / 4, Math.Max(1e-6, values.Max() / 20));
        var unit = Math.Pow(10, Math.Floor(Math.Log10(least)));
        var tick = ((double[])[1, 2, 5, 10]).Select(x => x * unit).First(x => x >= 0.999 * least);
        var (low, high) = (Math.Floor(values.Min() / tick) * tick, Math.Ceiling(values.Max() / tick - 1e-6) * tick);
        high = Math.Max(high, low + tick);
        double X(double x) => left + width * scale.At(x);
        double Y(double y) => top + height * (high - y) / (high - low);
        var steps = Enumerable.Range(0, (int)Math.Round((high - low) / tick) + 1);
        var lines = steps.Select(i => low + i * tick).Select(y => $"""
            <path class="grid" d="M{left} {Y(y):F1}h{width}"/>
            <text x="{left - 6}" y="{Y(y) + 4:F1}" text-anchor="end">{Short(y)}</text>

            """).Concat(scale.Ticks(width).Select(x => $"""
            <path class="grid" d="M{X(x):F1} {top}v{height}"/>
            <text x="{X(x):F1}" y="{top + height + 18}" text-anchor="middle">{Short(x)}</text>

            """)).Concat(curves.Select(curve => $"""
            <polyline class="{curve.Class}" points="{
                string.Join(' ', curve.Points.Select(point => $"{X(point.X):F1},{Y(point.Y):F1}"))}"/>

            """));
        return $"<text x=\"{left}\" y=\"{top - 8}\" font-weight=\"bold\">{name}</text>\n{string.Concat(lines)}";
    }

    static string Short(double x) => x switch {
        >= 1e9 => $"{x / 1e9:0.##}B",
        >= 1e6 => $"{x / 1e6:0.##}M",
        >= 1e3 => $"{x / 1e3:0.##}k",
        _ => $"{Math.Round(x, 8):G6}",
    };
}
