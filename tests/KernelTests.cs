using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>Cuda.cs looks kernels up when it first launches them: the names in the two sources must agree.</summary>
public sealed class KernelTests {
    [Test]
    public async Task EveryKernelLaunchedExistsAndEveryKernelIsLaunched() {
        string host = Path.Combine(Root, "Cuda.cs"), device = Path.Combine(Root, "Kernels.cu");
        if (!File.Exists(host) || !File.Exists(device))
            Skip.Test("the sources are not here");
        static IEnumerable<string> Names(string text, string pattern) =>
            Regex.Matches(text, pattern).Select(match => match.Groups[1].Value);
        var launched = Regex.Matches(File.ReadAllText(host), @"\bLaunch(Product)?\([^;]*;")
            .SelectMany(call => Names(call.Value, @"""([a-z_]+)"""));
        var kernels = File.ReadAllText(device);
        var flash = Names(kernels, @"\nFLASH_KERNEL\((\w+)");
        var defined = Names(kernels, @"\nKERNEL (?:__\w+__\([^)]*\) )?(\w+)\(")
            .Concat(Names(kernels, @"\nPRODUCT_KERNEL\((\w+)"))
            .Concat(flash).Concat(flash.Select(name => $"{name}_hopper"));
        await Same(launched.Distinct().Order(), defined.Order());
    }
}
