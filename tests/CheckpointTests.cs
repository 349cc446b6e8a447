namespace Gpt2.Tests;

/// <summary>The real binary killed, stopped, out of disk space and resumed: nothing is lost.</summary>
public partial class CheckpointTests {
    // Three batches an update, 36 an epoch: it ends, and both shards are left, between checkpoints.
    const string Train = "train -i train_*.bin -j val.bin -e model.bin -b 2 -t 16 -d 96 -l 1e-2 -u 4 -m 3 -g 8 " +
        "--optimizer adamw";
    const string Run = $"{Train} -x 20 -v 4 -s 6 -n 5 --keep 10";

    [Test]
    [Arguments("--seed 42")]
    [Arguments("--seed 7")]
    [Arguments("--no-shuffle")]
    [Arguments("--overfit")]
    [Arguments("--recompute 2")]
    [Arguments("--schedule wsd")]
    [Arguments("--optimizer muon")]
    [Arguments("--keep-best")]
    public async Task A_resumed_run_equals_an_unbroken_one(string option) {
        using var folder = Folders.Inputs();
        var whole = await Gpt2Process.Succeed(folder.Path, $"{Run} {option} -o whole");
        foreach (var step in (int[])[5, 10, 15]) {
            // main.log goes on to step 20, as if the run had been killed just before its last checkpoint.
            Folders.Copy(folder["whole"], folder[$"part{step}"], name => StepOf(name) <= step);
            var part = await Gpt2Process.Succeed(folder.Path, $"{Run} {option} -o part{step} --resume");
            await Same(folder["whole"], folder[$"part{step}"], $"resumed at {step}");
            await Assert.That(Untimed(part.Lines)).IsEqualTo(Untimed(whole.Lines[^part.Lines.Length..]));
            await Assert.That(part.Lines.Count(line => line.StartsWith("step"))).IsEqualTo(20 - step);
        }
    }

    [Test]
    public async Task Outliers_are_skipped_once_there_are_128_updates_and_a_resumed_run_skips_the_same() {
        // Any loss or norm above the mean stands out, so that some do and some do not.
        const string run = $"{Train} -k constant -v 0 -n 1 --keep 200 -x 140 --skip-outliers 1e-9";
        using var folder = Folders.Inputs();
        var whole = await Gpt2Process.Succeed(folder.Path, $"{run} -o whole");
        var skipped = new List<int>();
        foreach (var line in whole.Lines.Where(line => line.StartsWith("step"))) {
            var step = int.Parse(Regex.Match(line, @"\d+").Value);
            if (line.EndsWith("outlier, not updated"))
                skipped.Add(step);
            if (step > 1) {
                var (before, after) = (folder[$"whole/model_{step - 1:d8}.bin"], folder[$"whole/model_{step:d8}.bin"]);
                var same = File.ReadAllBytes(before).AsSpan().SequenceEqual(File.ReadAllBytes(after));
                await Assert.That(same).IsEqualTo(skipped.Contains(step)).Because($"step {step}");
            }
        }
        await Assert.That(skipped.Count).IsBetween(1, 11);
        await Assert.That(skipped[0]).IsGreaterThan(128);
        Folders.Copy(folder["whole"], folder["part"], name => StepOf(name) <= 133);
        await Gpt2Process.Succeed(folder.Path, $"{run} -o part --resume");
        await Same(folder["whole"], folder["part"], "resumed at 133");
    }

    [Test]
    public async Task A_finished_run_goes_on_when_it_is_given_more_steps() {
        using var folder = Folders.Inputs();
        await Gpt2Process.Succeed(folder.Path, $"{Train} -k constant -n 4 --keep 10 -v 4 -x 20 -o whole");
        await Gpt2Process.Succeed(folder.Path, $"{Train} -k constant -n 4 --keep 10 -v 4 -x 12 -o part");
        var before = Folders.Contents(folder["part"]);
        var none = await Gpt2Process.Succeed(folder.Path, $"{Train} -k constant -n 4 --keep 10 -v 4 -x 12 -o part -y");
        await Assert.That(none.Output).DoesNotContain("step ");
        await Assert.That(Folders.Contents(folder["part"])).IsEqualTo(before);
        await Gpt2Process.Succeed(folder.Path, $"{Train} -k constant -n 4 --keep 10 -v 4 -x 20 -o part -y");
        await Same(folder["whole"], folder["part"], "20 steps");
    }

    [Test]
    [Arguments(3, 0)]
    [Arguments(8, 5)]
    [Arguments(13, 10)]
    public async Task A_killed_run_equals_an_unbroken_one(int killedAfter, int checkpoint) {
        using var folder = Folders.Inputs();
        await Gpt2Process.Succeed(folder.Path, $"{Run} -o whole");
        using (var killed = Gpt2Process.Start(folder.Path, $"{Run} -o part")) {
            await killed.ReadToStep(killedAfter);
            killed.Signal(Gpt2Process.Kill);
            await Assert.That((await killed.End()).ExitCode).IsEqualTo(128 + Gpt2Process.Kill);
        }
        // It may have got further than the line that was read here: back to where it was killed.
        foreach (var path in Directory.GetFiles(folder["part"])) {
            if (StepOf(Path.GetFileName(path)) > checkpoint)
                File.Delete(path);
        }
        var resumed = await Gpt2Process.Succeed(folder.Path, $"{Run} -o part --resume");
        await Assert.That(FirstStep(resumed.Lines)).IsEqualTo(checkpoint + 1);
        await Assert.That(resumed.Error.Contains("no complete checkpoint")).IsEqualTo(checkpoint == 0);
        await Same(folder["whole"], folder["part"], "resumed");
    }

    [Test]
    public async Task Killed_at_thirty_random_moments_it_always_finds_a_complete_checkpoint() {
        const int kills = 30, seed = 20261123;
        const string run = $"{Train} -x 90 -v 10 -n 1 --keep 2 --keep-best";
        Console.WriteLine($"moments of the kills: seed {seed}");
        var random = new Random(seed);
        using var folder = Folders.Inputs();
        // 2 MB of weights and 4 MB of moments, so that a good part of a step is the writing of its checkpoint.
        Folders.WriteModel(folder["model.bin"], 32, 211, 2, 4, 128, 256);
        var watch = Stopwatch.StartNew();
        await Gpt2Process.Succeed(folder.Path, $"{run} -o whole");
        var stepTime = watch.Elapsed / 90;
        var done = 0;
        for (var kill = 0; kill < kills; kill++) {
            using var process = Gpt2Process.Start(folder.Path, $"{run} -o part --resume");
            // Most kills hit the loop, within two steps of the first line; every fifth one hits the start-up.
            if (kill % 5 == 4) {
                await Task.Delay(random.Next(80));
            } else if (await FirstStep(process) is { } first) {
                await Assert.That(first).IsEqualTo(done + 1).Because($"kill {kill}");
                await Task.Delay(stepTime * 2 * random.NextDouble());
            }
            process.Signal(Gpt2Process.Kill);
            var result = await process.End();
            await Assert.That(result.ExitCode).IsEqualTo(128 + Gpt2Process.Kill).Because($"kill {kill}: {result}");
            await Assert.That(result.Sentences.Where(line => line.StartsWith("gpt2: "))).IsEmpty();
            var last = LastDone(folder["part"]);
            await Assert.That(last).IsGreaterThanOrEqualTo(done);
            done = last;
        }
        await Assert.That(done).IsBetween(kills / 3, 89).Because("it should have got on, and not ended");
        await Gpt2Process.Succeed(folder.Path, $"{run} -o part --resume");
        // The very same files: nothing that a kill left lies about.
        await Same(folder["whole"], folder["part"], $"after {kills} kills");

        static async Task<int?> FirstStep(Gpt2Process process) {
            while (await process.ReadLine() is { } line) {
                if (line.StartsWith("step"))
                    return StepOfLine(line);
            }
            return null;
        }
    }

    [Test]
    [Arguments("DONE_00000012.tmp")]
    [Arguments("DONE_00000012~")]
    [Arguments("DONE_12")]
    [Arguments("DONE_00000012.bin")]
    [Arguments("state_00000012_00000.bin")]
    [Arguments("model_00000012.bin")]
    [Arguments("model_00000012.bin.tmp")]
    [Arguments("state_00000012_00000.bin.tmp")]
    [Arguments("main.log.tmp")]
    [Arguments("metrics.jsonl.tmp")]
    [Arguments("best_00000012.bin")]
    public async Task What_a_kill_may_leave_is_not_taken_for_a_checkpoint(string name) {
        using var folder = Folders.Inputs();
        await Gpt2Process.Succeed(folder.Path, $"{Run} -x 10 -o part");
        File.WriteAllText(Path.Combine(folder["part"], name), "half");
        var resumed = await Gpt2Process.Succeed(folder.Path, $"{Run} -x 12 -o part -y");
        await Assert.That(FirstStep(resumed.Lines)).IsEqualTo(11);
        var loaded = await Gpt2Process.Run(folder.Path, "sample -e part/model_00000012.bin --prompt-ids 1 -n 1");
        await Assert.That(loaded.ExitCode).IsEqualTo(0);
    }

    [Test]
    public async Task A_state_says_how_it_is_to_be_read_and_how_roundings_go_on() {
        using var folder = Folders.Inputs();
        await Gpt2Process.Succeed(folder.Path, $"{Run} -o out --device cpu");
        foreach (var step in (int[])[5, 20]) {
            var state = File.ReadAllBytes(Path.Combine(folder["out"], $"state_{step:d8}_00000.bin"));
            var header = MemoryMarshal.Cast<byte, int>(state.AsSpan(0, 1024)).ToArray();
            // No master weights beside those of the model file; the seed of the next update, and of the last one.
            await Assert.That(header[4]).IsEqualTo(0);
            await Assert.That(header[10]).IsEqualTo(step);
            await Assert.That(header[20]).IsEqualTo(42 + step);
            await Assert.That(header[22]).IsEqualTo(41 + step);
            // As in llm.c's states: AdamW.
            await Assert.That(header[41]).IsEqualTo(0);
        }
    }

    [Test]
    public async Task Only_the_newest_checkpoints_are_kept() {
        using var folder = Folders.Inputs();
        await Gpt2Process.Succeed(folder.Path, $"{Train} -x 7 -n 2 --keep 2 -o out");
        await Assert.That(Folders.Names(folder["out"])).IsEqualTo("DONE_00000006 DONE_00000007 lock loss.svg " +
            "main.log metrics.jsonl " +
            "model_00000006.bin model_00000007.bin settings.txt state_00000006_00000.bin " +
            "state_00000007_00000.bin");
        await Gpt2Process.Succeed(folder.Path, $"{Train} -x 8 -n 0 --keep 1 -o out -y");
        await Assert.That(Folders.Names(folder["out"])).IsEqualTo(
            "DONE_00000008 lock loss.svg main.log metrics.jsonl model_00000008.bin settings.txt " +
            "state_00000008_00000.bin");
    }

    [Test]
    public async Task The_best_model_is_kept_besides_the_newest() {
        using var folder = Folders.Inputs();
        // The rate is so high that the validation loss soon rises.
        const string run = $"{Train} -l 5e-2 -k constant -x 24 -v 2";
        await Gpt2Process.Succeed(folder.Path, $"{run} -n 1 --keep 99 -o all");
        await Gpt2Process.Succeed(folder.Path, $"{run} -n 10 --keep 1 --keep-best -o out");
        var best = File.ReadLines(folder["out/main.log"]).Where(line => line.Contains(" tel:"))
            .Select(line => line.Split(':', ' ')).MinBy(words => double.Parse(words[3]))!;
        var name = $"best_{int.Parse(best[1]):d8}.bin";
        await Assert.That(int.Parse(best[1])).IsBetween(2, 22);
        await Assert.That(Folders.Names(folder["out"])).IsEqualTo($"DONE_00000024 {name} lock loss.svg main.log " +
            "metrics.jsonl model_00000024.bin settings.txt state_00000024_00000.bin");
        await Assert.That(File.ReadAllBytes(Path.Combine(folder["out"], name)).AsSpan()
            .SequenceEqual(File.ReadAllBytes(Path.Combine(folder["all"], name.Replace("best", "model"))))).IsTrue();
        // The folder still stands for the newest, and a run that goes on knows the best.
        var outputs = new List<string>();
        foreach (var init in (string[])["out", "out/model_00000024.bin"])
            outputs.Add((await Gpt2Process.Succeed(folder.Path, $"eval -j val.bin -b 1 -t 16 -e {init}")).Output);
        await Assert.That(outputs[0]).IsEqualTo(outputs[1]);
        var resumed = await Gpt2Process.Succeed(folder.Path, "train -y -o out -x 26");
        await Assert.That(resumed.Output).Matches($"val loss .* worse by .* than at step {best[1]}\n");
        await Assert.That(resumed.Error).Contains($" at step {best[1]}: out/{name}\n");
        await Assert.That(Folders.Names(folder["out"])).Contains(name);
    }

    [Test]
    public async Task The_best_models_of_all_kept_checkpoints_are_kept() {
        using var folder = Folders.Inputs();
        const string run = $"{Train} -x 20 -v 4 -n 10 --keep 2 --keep-best";
        await Gpt2Process.Succeed(folder.Path, $"{run} -o whole");
        // The loss goes down: the best up to step 10 is that of step 8, and step 20's is the best of all.
        await Assert.That(Folders.Names(folder["whole"])).Contains("best_00000008.bin best_00000020.bin");
        // So a run that must go back to step 10 has its best, and makes the later one again.
        Folders.Copy(folder["whole"], folder["part"], name => StepOf(name) <= 10);
        await Gpt2Process.Succeed(folder.Path, "train -y -o part");
        await Same(folder["whole"], folder["part"], "resumed");
    }

    [Test]
    public async Task A_signal_ends_the_run_after_its_step_with_a_checkpoint() {
        using var folder = Folders.Inputs();
        const string run = $"{Train} -x 1000 -n 0 -v 50 --keep 1";
        await Gpt2Process.Succeed(folder.Path, $"{run} -o whole");
        var step = 0;
        foreach (var signal in (int[])[Gpt2Process.Terminate, Gpt2Process.Interrupt, Gpt2Process.HangUp]) {
            using var stopped = Gpt2Process.Start(folder.Path, $"{run} -o part{(step > 0 ? " -y" : "")}");
            var output = await stopped.ReadToStep(step + 20);
            await Assert.That(FirstStep(output.Split('\n'))).IsEqualTo(step + 1);
            stopped.Signal(signal);
            var result = await stopped.End();
            await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
            step = LastStep(output + result.Output);
            await Assert.That(step).IsLessThan(1000);
            await Assert.That(LastDone(folder["part"])).IsEqualTo(step);
            await Assert.That(result.Sentences).Count().IsEqualTo(2);
            await Assert.That(result.Sentences[0]).Contains("finishing this step").And.Contains("again quits at once");
            await Assert.That(result.Sentences[1]).Contains("signal").And.Contains("--resume");
        }
        var resumed = await Gpt2Process.Succeed(folder.Path, $"{run} -o part -y");
        await Assert.That(FirstStep(resumed.Lines)).IsEqualTo(step + 1);
        await Same(folder["whole"], folder["part"], "resumed");
    }

    [Test]
    public async Task A_signal_during_a_validation_leaves_a_checkpoint_too() {
        using var folder = Folders.Inputs();
        Support.WriteShard(folder["val.bin"], [.. Support.Tokens(1, 20_000, 211).Select(token => (ushort)token)]);
        const string run = $"{Train} -x 1000 -n 0 -v 1 -m 600 -o part";
        using var stopped = Gpt2Process.Start(folder.Path, run);
        var output = await stopped.ReadToStep(1);
        await Task.Delay(50);
        stopped.Signal(Gpt2Process.Terminate);
        var result = await stopped.End();
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        await Assert.That(LastDone(folder["part"])).IsEqualTo(LastStep(output + result.Output));
    }

    [Test]
    public async Task A_second_signal_ends_it_at_once() {
        using var folder = Folders.Inputs();
        Support.WriteShard(folder["val.bin"], [.. Support.Tokens(1, 1_000_000, 211).Select(token => (ushort)token)]);
        await Gpt2Process.Succeed(folder.Path, $"{Train} -x 1 -v 0 -o part");
        using var stopped = Gpt2Process.Start(folder.Path, $"{Train} -x 1000 -n 0 -v 2 -m 31000 -o part -y");
        await stopped.ReadToStep(2);
        // A launcher passes on what the terminal has sent already: two within a second are one.
        foreach (var milliseconds in (int[])[50, 50, 1100]) {
            await Task.Delay(milliseconds);
            stopped.Signal(Gpt2Process.Terminate);
        }
        await Assert.That((await stopped.End()).ExitCode).IsEqualTo(128 + Gpt2Process.Terminate);
        var resumed = await Gpt2Process.Succeed(folder.Path, $"{Train} -x 4 -n 1 -v 0 -m 1 -o part -y");
        await Assert.That(FirstStep(resumed.Lines)).IsEqualTo(2);
    }

    [Test]
    public async Task A_signal_at_any_moment_of_the_start_leaves_a_folder_that_resumes() {
        using var folder = Folders.Inputs();
        const string run = $"{Train} -x 100 -n 0 -v 0 --keep 1";
        for (var milliseconds = 0; milliseconds < 100; milliseconds += 12) {
            using var stopped = Gpt2Process.Start(folder.Path, $"{run} -o part -y");
            await Task.Delay(milliseconds);
            stopped.Signal(Gpt2Process.Terminate);
            var result = await stopped.End();
            // Before the loop takes charge of signals they end the process as usual.
            var training = result.Output.Contains("step ") || result.Error.Contains("signal");
            await Assert.That(result.ExitCode).IsEqualTo(training ? 0 : 128 + Gpt2Process.Terminate)
                .Because($"{milliseconds} ms: {result}");
            await Assert.That(result.Sentences.Where(line => line.StartsWith("gpt2: "))).IsEmpty();
        }
        await Gpt2Process.Succeed(folder.Path, $"{run} -o part -y");
        await Gpt2Process.Succeed(folder.Path, $"{run} -o whole");
        await Same(folder["whole"], folder["part"], "resumed");
    }

    // The model has 283 kB and its state 566 kB and more, loss.svg about 2 kB.
    [Test]
    [Arguments(1, "loss.svg")]
    [Arguments(200, "model_00000005.bin")]
    [Arguments(500, "state_00000005_00000.bin")]
    public async Task A_file_that_may_not_grow_is_an_error_that_names_it(int kilobytes, string name) {
        using var folder = Folders.Inputs();
        var result = await Gpt2Process.RunLimited(kilobytes, folder.Path, $"{Run} -o out");
        await FailedToWrite(result, name);
        await NothingIsHalfWritten(folder["out"]);
    }

    [Test]
    public async Task A_full_disk_is_an_error_and_the_last_checkpoint_stays_whole() {
        using var folder = Folders.Inputs();
        await Gpt2Process.Succeed(folder.Path, $"{Run} -o whole");
        // Room for the checkpoint of step 5, and for no other.
        using var disk = new Disk(folder["disk"], 1300, fileKilobytes: 200);
        Folders.Copy(folder["whole"], folder["disk/part"], name => StepOf(name) <= 5);
        await FailedToWrite(await disk.Run(folder.Path, $"{Run} -o disk/part -y"), "0000010");
        await NothingIsHalfWritten(folder["disk/part"]);
        await Assert.That(LastDone(folder["disk/part"])).IsEqualTo(5);
        // On a disk that is still full it fails again in the same way; elsewhere it goes on as if nothing had happened.
        await FailedToWrite(await disk.Run(folder.Path, $"{Run} -o disk/part -y"), "0000010");
        Folders.Copy(folder["disk/part"], folder["part"]);
        await Gpt2Process.Succeed(folder.Path, $"{Run} -o part -y");
        await Same(folder["whole"], folder["part"], "resumed");
    }

    [Test]
    public async Task Wherever_the_disk_gets_full_a_sentence_names_the_file() {
        using var folder = Folders.Inputs();
        var failed = new HashSet<string>();
        // Room for the log, the curves, the model, the state: about the size of each the steps are small.
        int[] sizes = [4, 8, 12, 16, 40, 288, 292, 296, 300, 304, 600, 850, 856, 860, 864, 868, 872, 876];
        foreach (var kilobytes in sizes) {
            using var disk = new Disk(folder["disk"], kilobytes, fileKilobytes: kilobytes);
            var result = await disk.Run(folder.Path, $"{Train} -x 6 -v 1 -n 6 -o disk/out");
            if (result.ExitCode == 0)
                continue;
            failed.Add(await FailedToWrite(result, "disk/out"));
            await NothingIsHalfWritten(folder["disk/out"]);
        }
        await Assert.That(failed).Contains("model_00000006.bin").And.Contains("state_00000006_00000.bin");
    }

    /// <summary>A small file system, or, where none may be mounted, a limit on the size of each file.</summary>
    sealed class Disk : IDisposable {
        readonly string path;
        readonly int fileKilobytes;
        readonly bool mounted;

        public Disk(string path, int kilobytes, int fileKilobytes) {
            (this.path, this.fileKilobytes) = (path, fileKilobytes);
            Directory.CreateDirectory(path);
            mounted = Execute("mount", "-t", "tmpfs", "-o", $"size={kilobytes}k", "tmpfs", path);
        }

        public Task<Result> Run(string folder, string arguments) =>
            mounted ? Gpt2Process.Run(folder, arguments) : Gpt2Process.RunLimited(fileKilobytes, folder, arguments);

        static bool Execute(string program, params string[] arguments) {
            using var process = Process.Start(
                new ProcessStartInfo(program, arguments) { RedirectStandardError = true })!;
            process.WaitForExit();
            return process.ExitCode == 0;
        }

        public void Dispose() {
            if (mounted)
                Execute("umount", path);
            Directory.Delete(path, recursive: true);
        }
    }

    /// <summary>Requires a failure in one sentence about a file in an output folder.</summary>
    /// <returns>The file's name.</returns>
    static async Task<string> FailedToWrite(Result result, string name) {
        await Assert.That(result.ExitCode).IsEqualTo(1).Because(result.ToString());
        await Assert.That(result.Sentences).Count().IsEqualTo(1).Because(result.ToString());
        await Assert.That(result.Sentences[0]).StartsWith("gpt2: ").And.Contains(name).And.Matches(OutputFile());
        return OutputFile().Match(result.Sentences[0]).Value;
    }

    [GeneratedRegex(@"(model|best)_\d{8}\.bin|state_\d{8}_00000\.bin|DONE_\d{8}|main\.log|metrics\.jsonl|loss\.svg|" +
        @"settings\.txt")]
    private static partial Regex OutputFile();

    /// <summary>Requires every model and state under its own name to have its whole size, every DONE to be true, and
    /// nothing under a temporary name.</summary>
    static async Task NothingIsHalfWritten(string folder) {
        if (!Directory.Exists(folder))
            return;
        foreach (var path in Directory.GetFiles(folder)) {
            var name = Path.GetFileName(path);
            var size = new FileInfo(path).Length;
            await Assert.That(name).DoesNotContain(".tmp");
            if (name.StartsWith("model_") || name.StartsWith("best_"))
                await Assert.That(size).IsEqualTo(new FileInfo(Support.Golden("model.bin")).Length);
            else if (name.StartsWith("state_"))
                await Assert.That(size).IsGreaterThan(2 * (new FileInfo(Support.Golden("model.bin")).Length - 1024));
            else if (name.StartsWith("DONE_"))
                await Assert.That(File.ReadLines(path).Select(line => line.Split(' '))).All(fields =>
                    new FileInfo(Path.Combine(folder, fields[0])).Length == long.Parse(fields[1]));
            else if (name == "loss.svg")
                await Assert.That(File.ReadAllText(path)).EndsWith("</svg>\n");
        }
    }

    static async Task Same(string expected, string found, string when) =>
        await Assert.That(Folders.Contents(found)).IsEqualTo(Folders.Contents(expected)).Because(when);

    /// <summary>The step in a checkpoint file's name, 0 in any other.</summary>
    static int StepOf(string name) =>
        name.Split('_', '.') is [_, var step, ..] && int.TryParse(step, out var number) ? number : 0;

    static int LastDone(string folder) => !Directory.Exists(folder) ? 0 : Directory.GetFiles(folder, "DONE_????????")
        .Select(path => StepOf(Path.GetFileName(path))).Append(0).Max();

    static int StepOfLine(string line) => int.Parse(line[4..line.IndexOf('/')]);

    static int FirstStep(string[] lines) => StepOfLine(lines.First(line => line.StartsWith("step")));

    static int LastStep(string output) => StepOfLine(output.Split('\n').Last(line => line.StartsWith("step")));

    /// <summary>Lines of output without the times, which differ from run to run.</summary>
    static string Untimed(string[] lines) => string.Join('\n',
        lines.Select(line => line.StartsWith("step") ? string.Join('|', line.Split('|')[..4]) : line));
}
