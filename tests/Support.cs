namespace Gpt2.Tests;

/// <summary>What several tests need: files, random numbers, and how far arrays are apart.</summary>
static class Support {
    /// <summary>The repository's root: the folder above the tests' binary that holds tests/golden.</summary>
    public static string Root { get; } = FindRoot();

    static string FindRoot() {
        for (var folder = new DirectoryInfo(AppContext.BaseDirectory); folder != null; folder = folder.Parent) {
            if (Directory.Exists(Path.Combine(folder.FullName, "tests", "golden")))
                return folder.FullName;
        }
        throw new DirectoryNotFoundException($"tests/golden is in no folder above {AppContext.BaseDirectory}");
    }

    /// <summary>The path of a file in tests/golden.</summary>
    public static string Golden(string name) => Path.Combine(Root, "tests", "golden", name);

    /// <summary>Writes a file without the code under test: a header that begins with these integers, then content.
    /// </summary>
    public static void WriteFile(string path, ReadOnlySpan<int> header, params ReadOnlySpan<byte> content) {
        using var file = File.Create(path);
        var all = new int[256];
        header.CopyTo(all);
        file.Write(MemoryMarshal.AsBytes(all.AsSpan()));
        file.Write(content);
    }

    /// <summary>Writes a token shard.</summary>
    public static void WriteShard(string path, params ReadOnlySpan<ushort> tokens) =>
        WriteFile(path, [20240520, 1, tokens.Length], MemoryMarshal.AsBytes(tokens));

    /// <summary>Normal draws; a seed always gives the same.</summary>
    public static float[] Floats(int seed, long count, double std = 1) {
        var random = new Random(seed);
        var values = new float[count];
        foreach (ref var value in values.AsSpan()) {
            var radius = std * Math.Sqrt(-2 * Math.Log(1 - random.NextDouble()));
            value = (float)(radius * Math.Cos(Math.Tau * random.NextDouble()));
        }
        return values;
    }

    /// <summary>The nearest numbers of a type, which a device of that type holds unchanged; ties go to even.</summary>
    public static float[] Rounded(float[] values, DataType type) =>
        type == DataType.Fp32 ? values : [.. values.Select(value => {
            var bits = BitConverter.SingleToUInt32Bits(value);
            return float.IsNaN(value) ? value
                : BitConverter.UInt32BitsToSingle((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
        })];

    /// <summary>Uniform ids below a vocabulary; a seed always gives the same.</summary>
    public static int[] Tokens(int seed, int count, int vocabulary) {
        var random = new Random(seed);
        return [.. Enumerable.Range(0, count).Select(_ => random.Next(vocabulary))];
    }

    /// <summary>‖found − expected‖/‖expected‖; infinite if the lengths differ, or if anything found is NaN, for which
    /// IsLessThan would hold.</summary>
    public static double RelativeError(ReadOnlySpan<float> found, ReadOnlySpan<double> expected) {
        if (found.Length != expected.Length)
            return double.PositiveInfinity;
        double squares = 0, norm = 0;
        for (var i = 0; i < found.Length; i++) {
            squares += (found[i] - expected[i]) * (found[i] - expected[i]);
            norm += expected[i] * expected[i];
        }
        var error = squares == 0 ? 0 : Math.Sqrt(squares / norm);
        return double.IsNaN(error) ? double.PositiveInfinity : error;
    }

    /// <summary>The same of fp32 values.</summary>
    public static double RelativeError(ReadOnlySpan<float> found, ReadOnlySpan<float> expected) =>
        RelativeError(found, Doubles(expected));

    /// <summary>The same of single numbers.</summary>
    public static double RelativeError(double found, double expected) {
        var error = found == expected ? 0 : Math.Abs((found - expected) / expected);
        return double.IsNaN(error) ? double.PositiveInfinity : error;
    }

    /// <summary>Requires equal sequences, and shows the first difference.</summary>
    public static async Task Same<T>(IEnumerable<T> found, IEnumerable<T> expected) {
        T[] left = [.. found], right = [.. expected];
        var same = 0;
        while (same < left.Length && same < right.Length && EqualityComparer<T>.Default.Equals(left[same], right[same]))
            same++;
        static string At(T[] values, int i) => i < values.Length ? $"{values[i]}" : "the end";
        await Assert.That(same == left.Length && same == right.Length).IsTrue()
            .Because($"element {same} is {At(left, same)} and should be {At(right, same)}");
    }

    /// <summary>Requires all bits to be equal.</summary>
    public static async Task SameBits(ReadOnlyMemory<float> found, ReadOnlyMemory<float> expected, string name = "") {
        static ReadOnlySpan<int> Bits(ReadOnlyMemory<float> values) => MemoryMarshal.Cast<float, int>(values.Span);
        var same = Bits(found).CommonPrefixLength(Bits(expected));
        await Assert.That(same == found.Length && same == expected.Length).IsTrue()
            .Because($"{name}: the bits of element {same} should be the same");
    }

    /// <summary>The values in float64.</summary>
    public static double[] Doubles(ReadOnlySpan<float> values) =>
        Array.ConvertAll(values.ToArray(), value => (double)value);
}

/// <summary>A temporary folder, deleted with everything in it.</summary>
sealed class TemporaryFolder : IDisposable {
    /// <summary>Its path.</summary>
    public string Path { get; } = Directory.CreateTempSubdirectory("gpt2-tests-").FullName;

    /// <summary>The path of something in it.</summary>
    public string this[string name] => System.IO.Path.Combine(Path, name);

    /// <summary>Removes it.</summary>
    public void Dispose() => Directory.Delete(Path, recursive: true);
}
