using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>Skips a test, visibly, where the binary is a build without kernels.</summary>
sealed class RequiresKernelsAttribute() : SkipAttribute("./gpt2 is a build without GPU kernels") {
    static readonly Lazy<Task<Result>> version = new(() => Gpt2Process.Run(Root, "--version"));

    /// <summary>True if the binary has kernels, as it says itself.</summary>
    public static async Task<bool> AreThere() => !(await version.Value).Output.Contains("CPU only");

    public override async Task<bool> ShouldSkip(TestRegisteredContext context) => !await AreThere();
}

/// <summary>Which device the binary takes, and what it says about a GPU that it cannot use. The driver and /dev are
/// fakes.</summary>
public sealed class DeviceTests {
    const string Driver = """
        #include <stdlib.h>
        int cuInit(unsigned flags) { return atoi(getenv("STATUS")); }
        int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
        int cuDeviceGetCount(int *count) { *count = 2; return 0; }
        int cuDeviceGet(int *device, int ordinal) { return 101; }
        int cuGetErrorName(int status, char **text) { *text = "CUDA_ERROR_OF_THE_TESTS"; return 0; }
        int cuGetErrorString(int status, char **text) { *text = "no such thing"; return 0; }
        """;
    const string NoKernels = "--device cuda: expected GPU kernels (make toolkit, then make), found a build without";
    const string NotStarted =
        "--device cuda: starting CUDA: expected success, found CUDA_ERROR_OF_THE_TESTS (no such thing)";

    /// <summary>Runs the binary with the fake driver and a /dev that holds only the named device.</summary>
    /// <param name="status">The driver's status at its start; null for a driver that cannot be loaded.</param>
    static async Task<Result> Run(int? status, string device, string environment, string arguments) {
        using var folder = Folders.Goldens();
        File.WriteAllText(folder["driver.c"], Driver);
        File.WriteAllText(folder["libcuda.so.1"], "not a library");
        if (status != null &&
            (await Gpt2Process.RunIn("gcc -shared -fPIC -o libcuda.so.1 driver.c", folder.Path, "")).ExitCode != 0)
            Skip.Test("there is no gcc for the tests' driver");
        const string isolated = "exec unshare --map-root-user --mount sh -ec";
        const string mount = "mkdir -p dev; mount --rbind /dev dev; mount -t tmpfs none /dev; touch /dev/urandom; " +
            "mount --bind dev/urandom /dev/urandom";
        if ((await Gpt2Process.RunIn($"{isolated} '{mount}'", folder.Path, "")).ExitCode != 0)
            Skip.Test("this machine does not let the tests have a /dev of their own");
        return await Gpt2Process.RunIn($"unset CUDA_VISIBLE_DEVICES; export LD_LIBRARY_PATH=$PWD STATUS={status} " +
            $"{environment}; {isolated} '{mount}; touch $PWD {device}; exec \"$@\"' sh \"$@\"",
            folder.Path, arguments);
    }

    [Test]
    [Arguments(null, "", "", "")]
    [Arguments(null, "/dev/nvidia0", "", "--device cuda: expected NVIDIA's driver (libcuda.so.1), found none")]
    [Arguments(100, "", "", "")]
    [Arguments(803, "/dev/nvidia1", "", NotStarted)]
    [Arguments(803, "/dev/nvidia1", "CUDA_VISIBLE_DEVICES=0", NotStarted)]
    [Arguments(100, "/dev/nvidia0", "CUDA_VISIBLE_DEVICES=", "")]
    [Arguments(100, "/dev/nvidia0", "CUDA_VISIBLE_DEVICES=-1", "")]
    // A CPU that is asked for needs no mention.
    [Arguments(803, "/dev/nvidia0", "", "", " --device cpu")]
    public async Task AGpuThatCannotBeUsedIsMentionedOnce(int? status, string device, string environment, string why,
        string option = "") {
        var result = await Run(status, device, environment, $"sample -e model.bin --prompt-ids 1 -n 1{option}");
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        await Assert.That(string.Join('\n', result.Sentences))
            .IsEqualTo(why == "" ? "" : $"gpt2: using the CPU although there is a GPU: {why}");
    }

    [Test]
    [Arguments("train -i train.bin -j val.bin -e model.bin -b 1 -t 8 -x 1")]
    [Arguments("sample -e model.bin --prompt-ids 1 -n 1")]
    public async Task ABuildWithoutKernelsMentionsTheGpu(string arguments) {
        var result = await Run(0, "", "", arguments);
        if (await RequiresKernelsAttribute.AreThere()) {
            await Assert.That(result.ExitCode).IsEqualTo(1).Because(result.ToString());
            await Assert.That(result.Error).Contains("opening GPU ");
        } else {
            await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
            await Assert.That(result.Sentences).Count().IsEqualTo(1).Because(result.ToString());
            await Assert.That(result.Sentences[0])
                .IsEqualTo($"gpt2: using the CPU although there is a GPU: {NoKernels}");
        }
    }

    [Test]
    public async Task ABuildWithoutKernelsStartsNoRanks() {
        var result = await Run(0, "", "", "train -i train.bin -j val.bin --gpus 3");
        await Assert.That((result.ExitCode, result.Error)).IsEqualTo(await RequiresKernelsAttribute.AreThere()
            ? (2, "gpt2: --gpus: expected at most 2, found 3\n") : (1, $"gpt2: {NoKernels}\n"));
    }
}
