using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>Arrays on a device, between guards of NaN: reading past an array's end spoils the result, and writing there
/// is found by Download. A shape has one to three dimensions.</summary>
static class DeviceArrays {
    // A few rows, and a multiple of a GPU's alignment of allocations.
    const int GuardBytes = 1 << 14;

    static int Guard(DataType type) => GuardBytes / Tensor.SizeOf(type);

    static Tensor Shaped(nint address, ReadOnlySpan<int> shape, DataType type) => shape switch {
        [var columns] => new(address, 1, 1, columns, type),
        [var rows, var columns] => new(address, 1, rows, columns, type),
        [var depth, var rows, var columns] => new(address, depth, rows, columns, type),
        _ => throw new ArgumentException($"{shape.Length} dimensions"),
    };

    /// <summary>The number of elements of an array.</summary>
    public static int Count(ReadOnlySpan<int> shape) => (int)Shaped(0, shape, DataType.Fp32).Count;

    /// <summary>An array of given values.</summary>
    public static Tensor Upload(this IDevice device, ReadOnlySpan<float> values, ReadOnlySpan<int> shape,
        DataType type = DataType.Fp32) {
        var guarded = new float[values.Length + 2 * Guard(type)];
        Array.Fill(guarded, float.NaN);
        values.CopyTo(guarded.AsSpan(Guard(type)));
        var address = device.Allocate((long)guarded.Length * Tensor.SizeOf(type));
        device.Write(new Tensor(address, 1, 1, guarded.Length, type), guarded);
        return Shaped(address + GuardBytes, shape, type);
    }

    /// <summary>An array of one row.</summary>
    public static Tensor Upload(this IDevice device, ReadOnlySpan<float> values, DataType type = DataType.Fp32) =>
        device.Upload(values, [values.Length], type);

    /// <summary>An array for output, filled with NaN.</summary>
    public static Tensor Poisoned(this IDevice device, ReadOnlySpan<int> shape, DataType type = DataType.Fp32) {
        var values = new float[Count(shape)];
        Array.Fill(values, float.NaN);
        return device.Upload(values, shape, type);
    }

    /// <summary>The values of any array.</summary>
    public static float[] Values(this IDevice device, Tensor tensor) {
        var values = new float[tensor.Count];
        device.Read(tensor, values);
        return values;
    }

    /// <summary>The values of an array made here, whose guards must be intact.</summary>
    public static float[] Download(this IDevice device, Tensor tensor) {
        var guard = Guard(tensor.Type);
        var values = device.Values(tensor.Flat(-guard, (int)tensor.Count + 2 * guard));
        if (values[..guard].Concat(values[^guard..]).Any(value => !float.IsNaN(value)))
            throw new InvalidOperationException("something was written outside an array");
        return values[guard..^guard];
    }
}

/// <summary>The arrays of one operation on one device. Values depend on seeds and shapes alone, and are rounded to the
/// GPU's precision; the CPU holds them in fp32.</summary>
sealed class Arrays(IDevice device, DataType precision, Dictionary<(int, int, double), float[]> draws) {
    /// <summary>Bounds of ‖a − b‖/‖b‖: some fifty roundings to fp32; one or two to bf16, of 0.0017 each.</summary>
    public const double Fp32Bound = 1e-5, Bf16Bound = 3e-3;

    readonly List<Func<IEnumerable<(string Name, float[] Values, double Bound)>>> results = [];

    public IDevice Device => device;

    float[] Draw(int seed, int count, double std) {
        if (!draws.TryGetValue((seed, count, std), out var values))
            draws[(seed, count, std)] = values = Floats(seed, count, std);
        return values;
    }

    /// <summary>Normal draws.</summary>
    public Tensor Input(int seed, ReadOnlySpan<int> shape, double std = 1) =>
        Input(Draw(seed, DeviceArrays.Count(shape), std), shape);

    /// <summary>Given values, rounded.</summary>
    public Tensor Input(float[] values, ReadOnlySpan<int> shape) =>
        device.Upload(Rounded(values, precision), shape, device.Precision);

    /// <summary>An array to be overwritten, and then compared.</summary>
    /// <param name="names">One, or those of equal parts of the columns, separated by spaces.</param>
    public Tensor Output(string names, ReadOnlySpan<int> shape, double bf16 = Bf16Bound, double fp32 = Fp32Bound) =>
        Result(names, device.Poisoned(shape, device.Precision), bf16, fp32);

    /// <summary>The same for an array that is always fp32.</summary>
    public Tensor Fp32Output(string names, ReadOnlySpan<int> shape, double bound = Fp32Bound) =>
        Result(names, device.Poisoned(shape), bound, bound);

    /// <summary>An array in fp32 that is added to, and then compared.</summary>
    public Tensor Sum(string name, int seed, ReadOnlySpan<int> shape, double bound = Fp32Bound, double? bf16 = null) =>
        Result(name, device.Upload(Draw(seed, DeviceArrays.Count(shape), 1), shape), bf16 ?? bound, bound);

    /// <summary>An array to be compared: whole, by equal parts of its columns, or by the parts that a function
    /// makes.</summary>
    public Tensor Result(string names, Tensor tensor, double bf16 = Bf16Bound, double fp32 = Fp32Bound,
        Func<float[], float[][]>? split = null) {
        var (each, bound) = (names.Split(' '), precision == DataType.Bf16 ? bf16 : fp32);
        split ??= values => Columns(values, tensor.Columns, each.Length);
        results.Add(() => each.Zip(split(device.Download(tensor)), (name, values) => (name, values, bound)));
        return tensor;
    }

    /// <summary>The columns of an array in equal parts, each an array of its own.</summary>
    public static T[][] Columns<T>(T[] values, int columns, int parts) => parts == 1 ? [values]
        : [.. Enumerable.Range(0, parts).Select(part =>
            values.Where((_, i) => i % columns / (columns / parts) == part).ToArray())];

    /// <summary>The values of the arrays to be compared, after the operation.</summary>
    public Dictionary<string, (float[] Values, double Bound)> Results() => results.SelectMany(result => result())
        .ToDictionary(result => result.Name, result => (result.Values, result.Bound));
}
