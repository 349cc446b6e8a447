using System.IO.Hashing;

namespace Gpt2.Tests;

/// <summary>What a finished run of the binary left: its exit status, standard output and standard error.</summary>
sealed record Result(int ExitCode, string Output, string Error) {
    /// <summary>Standard output, line by line.</summary>
    public string[] Lines => Output.Split('\n', StringSplitOptions.RemoveEmptyEntries);

    /// <summary>Standard error without the tables of training and sampling.</summary>
    public string[] Sentences =>
        [.. Error.Split('\n', StringSplitOptions.RemoveEmptyEntries).Where(line => !IsTable(line))];

    /// <summary>Everything, for the message of a test that fails.</summary>
    public override string ToString() => $"exit status {ExitCode}\n{Output}{Error}";

    static bool IsTable(string line) =>
        Regex.IsMatch(line, "^(model|data|batch|steps|rate|device|memory|time|done|best|next|changed|speed|context) ");
}

/// <summary>The real binary at work: ./gpt2 in the repository's root, or what the environment's GPT2 names.</summary>
sealed partial class Gpt2Process : IDisposable {
    /// <summary>Signals by their numbers on Linux.</summary>
    public const int HangUp = 1, Interrupt = 2, Kill = 9, Terminate = 15, Stop = 19;

    readonly Process process;
    readonly Task<string> error;

    static Gpt2Process() {
        // A shell without job control has what it starts in the background, and so all that this starts, ignore it.
        var ignored = File.ReadLines("/proc/self/status").First(line => line.StartsWith("SigIgn:"))["SigIgn:".Length..];
        if ((Convert.ToUInt64(ignored.Trim(), 16) >> (Interrupt - 1) & 1) == 1)
            _ = SetSignal(Interrupt, 0);
    }

    Gpt2Process(string folder, string program, IEnumerable<string> arguments) {
        process = Process.Start(new ProcessStartInfo(program, arguments) {
            WorkingDirectory = folder,
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            // Most tests are about the binary and not about a device, and some of them count on fp32.
            Environment = { ["CUDA_VISIBLE_DEVICES"] = "" },
        })!;
        process.StandardInput.Close();
        error = process.StandardError.ReadToEndAsync();
    }

    /// <summary>The binary's path.</summary>
    /// <exception cref="FileNotFoundException">It has not been built.</exception>
    public static string Binary {
        get {
            var path = Environment.GetEnvironmentVariable("GPT2") ?? Path.Combine(Support.Root, "gpt2");
            return File.Exists(path) ? Path.GetFullPath(path)
                : throw new FileNotFoundException($"{path} is missing: run `make`, or set GPT2 to the binary's path");
        }
    }

    /// <summary>Starts a command in a folder.</summary>
    public static Gpt2Process Start(string folder, params string[] arguments) => new(folder, Binary, arguments);

    /// <summary>Starts a command whose arguments stand in one line, with single spaces between them.</summary>
    public static Gpt2Process Start(string folder, string arguments) => Start(folder, arguments.Split(' '));

    /// <summary>Runs a command to its end.</summary>
    public static async Task<Result> Run(string folder, params string[] arguments) {
        using var process = Start(folder, arguments);
        return await process.End();
    }

    /// <summary>Runs a command whose arguments stand in one line, with single spaces between them.</summary>
    public static Task<Result> Run(string folder, string arguments) => Run(folder, arguments.Split(' '));

    /// <summary>Runs a command to its end, which must be a good one.</summary>
    public static async Task<Result> Succeed(string folder, params string[] arguments) {
        var result = await Run(folder, arguments);
        await Assert.That(result.ExitCode).IsEqualTo(0).Because($"gpt2 {string.Join(' ', arguments)}: {result}");
        return result;
    }

    /// <summary>The same for arguments in one line.</summary>
    public static Task<Result> Succeed(string folder, string arguments) => Succeed(folder, arguments.Split(' '));

    /// <summary>Starts a line of bash in which "$@" is the binary and its arguments.</summary>
    public static Gpt2Process StartIn(string bash, string folder, string arguments) =>
        new(folder, "bash", ["-c", bash, "bash", Binary, .. arguments.Split(' ')]);

    /// <summary>Runs such a line to its end.</summary>
    public static async Task<Result> RunIn(string bash, string folder, string arguments) {
        using var process = StartIn(bash, folder, arguments);
        return await process.End();
    }

    /// <summary>Runs a command none of whose files may grow beyond a size.</summary>
    public static Task<Result> RunLimited(int kilobytes, string folder, string arguments) =>
        // Without the trap a signal would end the process before the write fails.
        RunIn($"trap '' XFSZ; ulimit -f {kilobytes}; exec \"$@\"", folder, arguments);

    /// <summary>The next line of standard output, null at its end.</summary>
    public async Task<string?> ReadLine() {
        using var patience = new CancellationTokenSource(Patience);
        return await process.StandardOutput.ReadLineAsync(patience.Token);
    }

    /// <summary>Reads on to the line of a step.</summary>
    /// <returns>Everything up to it.</returns>
    public async Task<string> ReadToStep(int step) {
        var read = "";
        while (await ReadLine() is { } line) {
            read += line + "\n";
            if (line.StartsWith($"step {step,4}/"))
                return read;
        }
        throw new InvalidOperationException($"there was no step {step}:\n{read}{await error}");
    }

    /// <summary>Its process id.</summary>
    public int Id => process.Id;

    /// <summary>Sends a signal, to it or another process.</summary>
    public void Signal(int signal, int? to = null) => SendSignal(to ?? process.Id, signal);

    /// <summary>The processes that it has started.</summary>
    public int[] Children() => [.. File.ReadAllText($"/proc/{process.Id}/task/{process.Id}/children")
        .Split(' ', StringSplitOptions.RemoveEmptyEntries).Select(int.Parse)];

    /// <summary>The most memory that it has had in RAM so far; 0 once it has ended.</summary>
    public int PeakKilobytes() {
        try {
            var line = File.ReadLines($"/proc/{process.Id}/status").FirstOrDefault(line => line.StartsWith("VmHWM:"));
            return line == null ? 0 : int.Parse(line["VmHWM:".Length..^"kB".Length]);
        } catch (IOException) {
            return 0;
        }
    }

    /// <summary>Waits for the end.</summary>
    /// <returns>What has not been read yet.</returns>
    public async Task<Result> End() {
        using var patience = new CancellationTokenSource(Patience);
        var output = await process.StandardOutput.ReadToEndAsync(patience.Token);
        await process.WaitForExitAsync(patience.Token);
        return new Result(process.ExitCode, output, await error);
    }

    static readonly TimeSpan Patience = TimeSpan.FromSeconds(60);

    /// <summary>Ends it if it still runs.</summary>
    public void Dispose() {
        if (!process.HasExited)
            process.Kill(entireProcessTree: true);
        process.Dispose();
    }

    [LibraryImport("libc", EntryPoint = "signal")]
    private static partial nint SetSignal(int signal, nint handler);

    [LibraryImport("libc", EntryPoint = "kill")]
    private static partial int SendSignal(int process, int signal);
}

/// <summary>Whole folders, compared and copied.</summary>
static partial class Folders {
    /// <summary>The path, size and hash of each file in the folder, in order; not the lock of a run, and without
    /// the times in its metrics, and the speed and the run's name in its picture.</summary>
    public static string Contents(string folder) => string.Join('\n', Directory
        .EnumerateFiles(folder, "*", SearchOption.AllDirectories).Where(path => Path.GetFileName(path) != "lock")
        .Order(StringComparer.Ordinal).Select(path => {
            if (new FileInfo(path).LinkTarget is { } target)
                return $"{Path.GetRelativePath(folder, path)} -> {target}";
            var bytes = File.ReadAllBytes(path);
            if (Path.GetExtension(path) is ".jsonl" or ".svg")
                bytes = Encoding.UTF8.GetBytes(Timed().Replace(Encoding.UTF8.GetString(bytes), "")
                    .Replace($">{new DirectoryInfo(folder).Name}<", ">run<"));
            return $"{Path.GetRelativePath(folder, path)} {bytes.Length} {XxHash3.HashToUInt64(bytes):x16}";
        }));

    [GeneratedRegex("""
        "(seconds|tokens_per_second|mfu)":[0-9.]+|(?s)<g class='speed'>.*</g>
        """)]
    private static partial Regex Timed();

    /// <summary>The names of the files in a folder, in order.</summary>
    public static string Names(string folder) =>
        string.Join(' ', Directory.EnumerateFiles(folder).Select(Path.GetFileName).Order(StringComparer.Ordinal));

    /// <summary>Copies the files of a folder that a predicate takes to a new folder.</summary>
    public static void Copy(string from, string to, Func<string, bool>? take = null) {
        Directory.CreateDirectory(to);
        foreach (var path in Directory.GetFiles(from)) {
            if (take?.Invoke(Path.GetFileName(path)) ?? true)
                File.Copy(path, Path.Combine(to, Path.GetFileName(path)), overwrite: true);
        }
    }

    /// <summary>A folder with the golden model.bin, state.bin, train.bin and val.bin, and two choices.bin.</summary>
    public static TemporaryFolder Goldens() {
        var folder = new TemporaryFolder();
        File.Copy(Support.Golden("model.bin"), folder["model.bin"]);
        File.Copy(Support.Golden("state.bin"), folder["state.bin"]);
        File.Copy(Support.Golden("tokens_train.bin"), folder["train.bin"]);
        File.Copy(Support.Golden("tokens_val.bin"), folder["val.bin"]);
        WriteChoices(folder["choices.bin"], 2);
        return folder;
    }

    /// <summary>A folder for tiny runs: the golden model.bin, val.bin, and train_0.bin and train_1.bin of 15 and 21
    /// batches of 2 x 16 tokens.</summary>
    public static TemporaryFolder Inputs() {
        var folder = new TemporaryFolder();
        File.Copy(Support.Golden("model.bin"), folder["model.bin"]);
        File.Copy(Support.Golden("tokens_val.bin"), folder["val.bin"]);
        var shard = File.ReadAllBytes(Support.Golden("tokens_train.bin"));
        var tokens = MemoryMarshal.Cast<byte, ushort>(shard.AsSpan(1024));
        Support.WriteShard(folder["train_0.bin"], tokens[..500]);
        Support.WriteShard(folder["train_1.bin"], tokens[1000..1700]);
        return folder;
    }

    /// <summary>Writes a random model in fp32 without the code under test.</summary>
    public static void WriteModel(string path, int maxT, int V, int L, int NH, int C, int Vp) {
        var header = new int[256];
        ((int[])[20240326, 3, maxT, V, L, NH, C, Vp]).CopyTo(header, 0);
        var weights = Support.Floats(1, (Vp + maxT + 2) * C + L * (12 * C * C + 13 * C), 0.1);
        File.WriteAllBytes(path,
            [.. MemoryMarshal.AsBytes(header.AsSpan()), .. MemoryMarshal.AsBytes(weights.AsSpan())]);
    }

    /// <summary>Writes multiple-choice examples of 42 bytes, each with three tokens of context, four completions of
    /// two, and one label after the other.</summary>
    public static void WriteChoices(string path, int count, Action<ushort[]>? change = null) {
        var header = new int[256];
        ((int[])[20240522, 1, count, 42]).CopyTo(header, 0);
        byte[] bytes = [.. MemoryMarshal.AsBytes(header.AsSpan())];
        for (var i = 0; i < count; i++) {
            ushort[] words = [
                65535, 42, (ushort)i, (ushort)(i % 4), 4, 3, 1, 2, 3, 2, 10, 11, 2, 20, 21, 2, 30, 31, 2, 40, 41,
            ];
            change?.Invoke(words);
            bytes = [.. bytes, .. MemoryMarshal.AsBytes(words.AsSpan())];
        }
        File.WriteAllBytes(path, bytes);
    }
}
