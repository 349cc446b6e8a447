using Microsoft.Extensions.Logging.Abstractions;

namespace Gpt2.Tests;

/// <summary>What a month of use brings upon a run: its folder shared, spoiled or continued, numbers that are none, and
/// terminals, pipes and limits of every kind. All by the real binary.</summary>
public partial class RunTests {
    const string Train = "train -i train_*.bin -j val.bin -e model.bin -b 2 -t 16 -d 96 -g 8";

    static string InRun(TemporaryFolder folder, string name) => Path.Combine(folder["out"], name);

    static int FirstStep(Result result) => int.Parse(Regex.Match(result.Output, @"step +(\d+)/").Groups[1].Value);

    static string Losses(Result result) =>
        string.Join('\n', result.Lines.Select(line => Regex.Replace(line, @" \| lr .*", "")));

    static async Task Refuses(Result result, params string[] parts) {
        await Assert.That(result.ExitCode).IsEqualTo(1).Because(result.ToString());
        await Assert.That(result.Sentences).Count().IsEqualTo(1).Because(result.ToString());
        foreach (var part in parts)
            await Assert.That(result.Sentences[0]).Contains(part);
        await Assert.That(result.Error).DoesNotContain("   at ");
    }

    // ---- Validation

    [Test]
    public async Task A_validation_does_not_depend_on_the_batch_size() {
        using var folder = Folders.Inputs();
        string[] sizes = ["-b 1", "-b 2", "-b 5", "-b 31"];
        foreach (var command in (string[])["eval -e model.bin -j val.bin -t 7", "train -i train_*.bin -j val.bin -e " +
            "model.bin -t 7 -x 1 -v 1 -l 1e-9 -u 0 -o {0}"]) {
            var losses = new HashSet<string>();
            foreach (var (i, size) in sizes.Index()) {
                var result = await Gpt2Process.Succeed(folder.Path, $"{string.Format(command, $"out{i}")} {size}");
                losses.Add(Regex.Match(result.Output, @"^(val )?loss (\d\.\d{5})", RegexOptions.Multiline)
                    .Groups[2].Value);
            }
            await Assert.That(losses).Count().IsEqualTo(1).Because(string.Join(' ', losses));
        }
    }

    [Test]
    [Arguments(1)]
    [Arguments(2)]
    [Arguments(3)]
    [Arguments(8)]
    public async Task A_validation_does_not_depend_on_the_number_of_ranks(int ranks) {
        using var folder = Folders.Inputs();
        var losses = new double[ranks];
        ThreadRanks.Run(ranks, collective => {
            using var cpu = new Cpu(1);
            var (file, config) = Config.Open(folder["model.bin"]);
            var model = new Model(config, cpu, 2, 7, Purpose.Evaluate);
            model.Load(file);
            using var shards = new TokenShards(folder["val.bin"], config.V);
            losses[collective.Rank] = Evaluation.Loss(model, shards, shards.Rows(7, 1, 0), collective);
        });
        var alone = await Gpt2Process.Succeed(folder.Path, "eval -e model.bin -j val.bin -b 1 -t 7");
        foreach (var loss in losses)
            await Assert.That(loss - double.Parse(alone.Output.Split(' ')[1])).IsBetween(-2e-6, 2e-6);
    }

    [Test]
    public async Task A_shard_without_a_sample_is_named_and_passed_over() {
        using var folder = Folders.Inputs();
        Support.WriteShard(folder["train_2.bin"], 1, 2, 3);
        var result = await Gpt2Process.Succeed(folder.Path, $"{Train} -x 40 -o out");
        await Assert.That(result.Error.Split('\n').Count(line => line.Contains("train_2.bin"))).IsEqualTo(1);
        await Assert.That(result.Error).Contains("train_2.bin is passed over");
        await Assert.That(result.Error).DoesNotContain("train_1.bin");
    }

    // ---- The folder

    [Test]
    public async Task A_second_run_in_a_folder_is_told_of_the_first_and_touches_nothing() {
        using var folder = Folders.Inputs();
        var alone = await Gpt2Process.Succeed(folder.Path, $"{Train} -x 60 -n 5 -v 10 -o alone");
        using var first = Gpt2Process.Start(folder.Path, $"{Train} -x 60 -n 5 -v 10 -o out");
        await first.ReadToStep(1);
        foreach (var options in (string[])["--seed 3", "-y"]) {
            var second = await Gpt2Process.Run(folder.Path, $"{Train} -x 60 -o out {options}");
            if (second.Sentences[0].Contains("--resume"))
                continue; // the first has a checkpoint by now
            await Assert.That(second.ExitCode).IsEqualTo(1);
            await Assert.That(second.Sentences[^1]).Contains("out: expected no other run in this folder")
                .And.EndsWith($"process {first.Id}");
        }
        await Assert.That((await first.End()).ExitCode).IsEqualTo(0);
        await Assert.That(alone.ExitCode).IsEqualTo(0);
        await Assert.That(Folders.Contents(folder["out"])).IsEqualTo(Folders.Contents(folder["alone"]));
    }

    [Test]
    public async Task Of_many_runs_started_at_once_in_a_folder_one_goes_on() {
        using var folder = Folders.Inputs();
        var results = await Task.WhenAll(Enumerable.Range(0, 6).Select(seed =>
            Gpt2Process.Run(folder.Path, $"{Train} -x 50 -o out --seed {seed}")));
        await Assert.That(results.Count(result => result.ExitCode == 0)).IsEqualTo(1);
        foreach (var refused in results.Where(result => result.ExitCode != 0))
            await Refuses(refused, "out: expected");
        await Assert.That(File.ReadLines(InRun(folder, "main.log")).Count(line => line.Contains("trl"))).IsEqualTo(50);
    }

    [Test]
    public async Task The_lock_goes_with_its_process() {
        using var folder = Folders.Inputs();
        using (var killed = Gpt2Process.Start(folder.Path, $"{Train} -x 1000 -n 1 -o out")) {
            await killed.ReadToStep(3);
            killed.Signal(Gpt2Process.Kill);
            await killed.End();
        }
        await Gpt2Process.Succeed(folder.Path, $"{Train} -x 6 -o out -y");
    }

    [Test, Arguments("000(08|12)", 5), Arguments("00000", 1)] // without the last checkpoints, or any
    public async Task A_bare_resume_is_the_same_run(string lost, int firstStep) {
        using var folder = Folders.Inputs();
        const string options = "-b 3 -d 288 -x 12 -l 3e-3 -u 2 -q 0.5 -c 0.2 -k linear -v 3 -m 2 -n 4 --keep 5 -r 1 " +
            "--no-shuffle --seed 9 -s 5";
        await Gpt2Process.Succeed(folder.Path, $"{Train} {options} -o whole");
        Folders.Copy(folder["whole"], folder["out"], name => !Regex.IsMatch(name, lost));
        var resumed = await Gpt2Process.Succeed(folder.Path, "train -y -o out");
        await Assert.That(FirstStep(resumed)).IsEqualTo(firstStep);
        await Assert.That(resumed.Error).DoesNotContain("changed");
        await Assert.That(Folders.Contents(folder["out"])).IsEqualTo(Folders.Contents(folder["whole"]));
    }

    [Test]
    public async Task An_option_given_again_wins_and_one_line_says_what_changed() {
        using var folder = Folders.Inputs();
        await Gpt2Process.Succeed(folder.Path, $"{Train} -l 3e-3 -x 4 -k linear -o out");
        var resumed = await Gpt2Process.Succeed(folder.Path, "train -y -o out -x 8 --lr=0.001 -k linear");
        await Assert.That(resumed.Error.Split('\n').Where(line => line.StartsWith("changed"))).Count().IsEqualTo(1);
        await Assert.That(resumed.Error).Contains("changed --max-steps 4, --lr 0.003 to --max-steps 8, --lr 0.001\n");
        await Assert.That(File.ReadAllText(InRun(folder, "settings.txt"))).Contains("--lr 0.001\n")
            .And.Contains("--total-batch 96\n");
        // And so it stays.
        var again = await Gpt2Process.Succeed(folder.Path, "train -y -o out -x 9");
        await Assert.That(again.Error).Contains("changed --max-steps 8 to --max-steps 9\n");
    }

    [Test]
    public async Task An_optimizer_goes_on_as_it_was_without_being_named() {
        using var folder = Folders.Inputs();
        foreach (var optimizer in (string[])["muon", "adamw"]) {
            await Gpt2Process.Succeed(folder.Path, $"{Train} -x 4 -k constant -n 2 --optimizer {optimizer} -o whole");
            Folders.Copy(folder["whole"], folder["out"], name => !name.Contains("00000004"));
            // Earlier versions, which have AdamW alone, do not write it down.
            if (optimizer == "adamw")
                File.WriteAllText(InRun(folder, "settings.txt"), File.ReadAllText(InRun(folder, "settings.txt"))
                    .Replace("--optimizer AdamW\n", ""));
            var resumed = await Gpt2Process.Succeed(folder.Path, "train -y -o out");
            await Assert.That(resumed.Error).DoesNotContain("changed");
            await Assert.That(Folders.Contents(folder["out"])).IsEqualTo(Folders.Contents(folder["whole"]));
            var other = optimizer == "muon" ? "AdamW" : "Muon";
            await Refuses(await Gpt2Process.Run(folder.Path, $"train -y -o out -x 5 --optimizer {other}"),
                "state_00000004_00000.bin: expected a state of --optimizer " + other);
            // As llm.c leaves a run.
            if (optimizer == "adamw") {
                File.Delete(InRun(folder, "settings.txt"));
                await Gpt2Process.Succeed(folder.Path, $"{Train} -x 5 -y -o out");
            }
            Directory.Delete(folder["out"], recursive: true);
            Directory.Delete(folder["whole"], recursive: true);
        }
    }

    [Test]
    [Arguments("--lr x\n")]
    [Arguments("--nonsense 1\n")]
    [Arguments("\0\0\0")]
    public async Task Settings_that_cannot_be_read_are_an_error_or_passed_over(string text) {
        using var folder = Folders.Inputs();
        await Gpt2Process.Succeed(folder.Path, $"{Train} -x 2 -o out");
        File.WriteAllText(InRun(folder, "settings.txt"), text);
        var result = await Gpt2Process.Run(folder.Path, $"{Train} -y -x 3 -o out");
        await Assert.That(result.ExitCode is 0 or 1 or 2).IsTrue();
        await Assert.That(result.Error).DoesNotContain("   at ");
        if (text.StartsWith("--lr"))
            await Assert.That(result.Error).Contains("--lr").And.Contains("'x'");
    }

    // ---- Checkpoints

    [Test]
    [Arguments("model_00000008.bin")]
    [Arguments("state_00000008_00000.bin")]
    [Arguments("DONE_00000008")]
    public async Task From_a_corrupt_checkpoint_it_goes_back_to_the_one_before(string name) {
        using var folder = Folders.Inputs();
        await Gpt2Process.Succeed(folder.Path, $"{Train} -k constant -x 8 -n 4 -o out");
        var whole = await Gpt2Process.Succeed(folder.Path, $"{Train} -k constant -x 6 -n 4 -o whole");
        var bytes = File.ReadAllBytes(InRun(folder, name));
        bytes[bytes.Length / 2] ^= 1;
        File.WriteAllBytes(InRun(folder, name), bytes);
        // With one checkpoint to keep, the useless one must not be taken for the newest.
        var resumed = await Gpt2Process.Succeed(folder.Path, $"{Train} -k constant -x 6 -n 1 --keep 1 -v 0 -o out -y");
        await Assert.That(FirstStep(resumed)).IsEqualTo(5);
        await Assert.That(resumed.Sentences).Count().IsEqualTo(1);
        await Assert.That(resumed.Sentences[0]).Contains("DONE_00000008").And.Contains("checkpoint of step 4");
        await Assert.That(resumed.Lines[^3].Split(" | lr")[0]).IsEqualTo(whole.Lines[^3].Split(" | lr")[0]);
        await Assert.That(Folders.Names(folder["out"])).IsEqualTo(
            "DONE_00000006 lock loss.svg main.log metrics.jsonl model_00000006.bin settings.txt " +
            "state_00000006_00000.bin");
    }

    [Test]
    public async Task DONE_must_list_every_file() {
        using var folder = Folders.Inputs();
        await Gpt2Process.Succeed(folder.Path, $"{Train} -x 2 -o out");
        var lines = File.ReadAllLines(InRun(folder, "DONE_00000002"));
        await Assert.That(lines).Count().IsEqualTo(2);
        foreach (var line in lines) {
            File.WriteAllText(InRun(folder, "DONE_00000002"), line + "\n");
            await Refuses(await Gpt2Process.Run(folder.Path, $"{Train} -x 3 -o out -y"), "DONE_00000002",
                lines.Single(other => other != line).Split(' ')[0]);
        }
    }

    [Test]
    [Arguments("-l 3e38 -n 1 --keep 1 -v 0", "step 3")]
    [Arguments("-l 1e30 -n 1 --keep 1 -v 0", "step")]
    [Arguments("-l 1e30 -n 0 --keep 1 -v 1", "step 3")]
    public async Task A_useless_checkpoint_takes_no_good_ones_place(string options, string place) {
        using var folder = Folders.Inputs();
        await Gpt2Process.Succeed(folder.Path, $"{Train} -x 2 -o out");
        var before = Folders.Contents(folder["out"]).Split('\n').Where(line => line.Contains("00000002")).ToArray();
        await Refuses(await Gpt2Process.Run(folder.Path, $"{Train} -x 9 -u 0 -k constant -o out -y {options}"), place,
            "expected a finite", "the checkpoint of step 2 stands", "model_00000002.bin");
        var after = Folders.Contents(folder["out"]).Split('\n').Where(line => line.Contains("000000")).ToArray();
        await Support.Same(after, before);
        await Gpt2Process.Succeed(folder.Path, $"{Train} -x 3 -l 1e-3 -o out -y");
    }

    [Test]
    [Arguments(float.NaN)]
    [Arguments(float.NegativeInfinity)]
    public async Task Weights_that_are_not_finite_are_never_written(float value) {
        using var folder = Folders.Inputs();
        using var cpu = new Cpu();
        var (file, config) = Config.Open(folder["model.bin"]);
        var model = new Model(config, cpu, 1, 1, Purpose.Evaluate);
        model.Load(file);
        cpu.Write(model.Weights.Lnfb.Flat(config.C - 1, 1), [value]);
        var error = Assert.Throws<Gpt2Exception>(() => Files.Write(folder["out.bin"], model.Save));
        await Assert.That(error.Message).Contains("finite").And.Contains($"{value}");
        await Assert.That(Directory.GetFiles(folder.Path, "out.bin*")).IsEmpty();
    }

    [Test]
    public async Task A_gradient_that_is_not_finite_updates_nothing_though_the_loss_is() {
        using var folder = Folders.Inputs();
        // Final layer norm's weights so large that the loss is finite, and the square of the gradient is not.
        var bytes = File.ReadAllBytes(folder["model.bin"]);
        foreach (ref var weight in MemoryMarshal.Cast<byte, float>(bytes.AsSpan())[^96..^48])
            weight = 1e-30f;
        foreach (ref var weight in MemoryMarshal.Cast<byte, float>(bytes.AsSpan(1024))[..(211 * 48)])
            weight *= 1e29f;
        File.WriteAllBytes(folder["large.bin"], bytes);
        await Refuses(await Gpt2Process.Run(folder.Path, $"{Train} -e large.bin -x 3 -v 0 -o out"), "step 1",
            "norm of the gradient", "nothing was updated");
    }

    /// <summary>Reports every flush and rename to a file.</summary>
    const string Watcher = """
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <unistd.h>
        static void note(const char *what, const char *path) {
            FILE *f = fopen(getenv("WATCHED"), "a"); fprintf(f, "%s %s\n", what, path); fclose(f);
        }
        int fsync(int fd) {
            char link[64], path[4096]; snprintf(link, 64, "/proc/self/fd/%d", fd);
            ssize_t n = readlink(link, path, 4095); path[n < 0 ? 0 : n] = 0; note("fsync", path);
            return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
        }
        int rename(const char *from, const char *to) {
            note("rename", from);
            return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(from, to);
        }
        """;

    [Test]
    public async Task Every_file_is_on_the_disk_before_it_gets_its_name() {
        using var folder = Folders.Inputs();
        File.WriteAllText(folder["watch.c"], Watcher);
        await Gpt2Process.RunIn("gcc -shared -fPIC -o watch.so watch.c", folder.Path, "");
        var result = await Gpt2Process.RunIn(
            "export LD_PRELOAD=$PWD/watch.so WATCHED=$PWD/watched; exec \"$@\"", folder.Path, $"{Train} -x 2 -o out");
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        var (flushed, renamed) = (new HashSet<string>(), 0);
        foreach (var line in File.ReadLines(folder["watched"])) {
            var (what, name) = (line.Split(' ')[0], Path.GetFileName(line));
            if (what == "fsync")
                flushed.Add(name);
            else
                await Assert.That(flushed).Contains(name).Because($"rename {renamed++}");
        }
        await Assert.That(renamed).IsGreaterThanOrEqualTo(6);
    }

    // ---- Numbers that are none

    [Test]
    public async Task A_validation_loss_that_is_not_finite_ends_the_run_with_its_step() {
        using var folder = Folders.Inputs();
        await Refuses(await Gpt2Process.Run(folder.Path, $"{Train} -x 20 -v 1 -l 1e10 -u 0 -o out"), "step 1:",
            "validation loss", "--lr", "there is no checkpoint yet");
    }

    [Test]
    [Arguments(float.NaN, "finite weights, found NaN in wte")]
    [Arguments(float.PositiveInfinity, "finite weights, found Infinity in wte")]
    [Arguments(3e38f, "finite")]
    public async Task Models_without_finite_numbers_are_refused_by_every_command(float value, string words) {
        using var folder = Folders.Goldens();
        var bytes = File.ReadAllBytes(folder["model.bin"]);
        MemoryMarshal.Cast<byte, float>(bytes.AsSpan(1024))[..(211 * 48)].Fill(value);
        File.WriteAllBytes(folder["bad.bin"], bytes);
        foreach (var command in (string[])["eval -e bad.bin -j val.bin -b 2 -t 21", "sample -e bad.bin --prompt-ids 1",
            "eval -e bad.bin -j val.bin -b 4 -t 32 --hellaswag choices.bin",
            "train -i train.bin -j val.bin -b 2 -t 21 -e bad.bin -x 1 -o out"])
            await Refuses(await Gpt2Process.Run(folder.Path, command), words);
    }

    [Test]
    public async Task A_log_with_minus_zero_and_strange_digits_is_read() {
        using var folder = Folders.Inputs();
        await Gpt2Process.Succeed(folder.Path, $"{Train} -x 4 -o out");
        File.AppendAllText(InRun(folder, "main.log"),
            "s:3 tel:-0.0000\ns:\u0661 trl:\u0661.\u0661\u0661\u0661\u0661 lr:0.000001 norm:1.00\n");
        await Gpt2Process.Succeed(folder.Path, $"{Train} -x 5 -o out -y");
        await Assert.That(File.ReadAllText(InRun(folder, "main.log"))).Contains("s:3 tel:-0.0000\n");
        using var log = new TemporaryFolder();
        new RunLog(log.Path, 0).Validated(0, -1e-9);
    }

    [Test]
    public async Task Outliers_are_those_of_the_log_and_skipping_them_ends() {
        using var folder = new TemporaryFolder();
        var log = new RunLog(folder.Path, 0);
        for (var step = 0; step < 128; step++)
            log.Update(step, 1e-6, 1e-3f, 1e-5f, 1, 1, null, 1);
        await Assert.That(log.Deviation(4e-5, 0.004)).IsEqualTo(0).Because("logged as 0.0000 and 0.00");
        await Assert.That(log.Deviation(4e-5, 0.02)).IsGreaterThan(6);
        // However far the norm has moved, it becomes the usual one.
        var skipped = 0;
        for (var step = 128; step < 256; step++) {
            skipped += log.Deviation(0, 1) > 6 ? 1 : 0;
            log.Update(step, 0, 1e-3f, 1, 1, 1, null, 1);
        }
        await Assert.That(skipped).IsBetween(1, 10);
    }

    // ---- Memory

    [Test]
    public async Task The_CPUs_free_memory_is_what_the_system_has_left() {
        using var cpu = new Cpu();
        long Kilobytes(string name) => long.Parse(Regex.Match(File.ReadAllText("/proc/meminfo"),
            $@"{name}: +(\d+)").Groups[1].Value, CultureInfo.InvariantCulture);
        await Assert.That(cpu.FreeMemory).IsLessThan(1024 * (Kilobytes("MemAvailable") + (200 << 10)));
        await Assert.That(cpu.FreeMemory).IsGreaterThan(0);
    }

    // ---- Terminals, pipes and limits

    const string Terminal = "export TERM=xterm {0}; exec script -qec \"stty cols {1}; $*\" /dev/null";

    [Test]
    [Arguments("TERM=xterm", 40)]
    [Arguments("TERM=xterm", 80)]
    [Arguments("TERM=xterm", 200)]
    [Arguments("TERM=dumb", 60)]
    [Arguments("NO_COLOR=1", 60)]
    public async Task A_terminal_keeps_its_mode_and_its_width(string environment, int columns) {
        using var folder = Folders.Inputs();
        var result = await Gpt2Process.RunIn(
            string.Format(Terminal, environment, columns), folder.Path,
            $"{Train.Replace('*', '0')} -x 5 -g 0 -o out");
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        await Assert.That(result.Output).DoesNotContain("\e[?").And.DoesNotContain("\e=");
        await Assert.That(result.Output.Contains('\e')).IsEqualTo(environment == "TERM=xterm");
        var lines = result.Output.Split("\n", StringSplitOptions.RemoveEmptyEntries)
            .SelectMany(line => line.TrimEnd('\r').Split("\r\e[K"))
            .Where(line => Regex.IsMatch(line, "^(step|val|[0-9])")).ToArray();
        // The first and the last step are shown, the others if a tenth of a second has passed.
        var steps = lines.Where(line => line.StartsWith("step ")).ToArray();
        await Assert.That(steps[0]).StartsWith("step    1/5");
        await Assert.That(steps[^1]).StartsWith("step    5/5");
        await Assert.That(lines).All(line => line.Length < columns);
        await Assert.That(lines.Any(line => line.EndsWith("tok/s") && line.StartsWith("step"))).IsEqualTo(columns > 60);
    }

    [Test]
    public async Task A_terminal_shows_at_most_ten_steps_a_second() {
        using var folder = Folders.Inputs();
        var watch = Stopwatch.StartNew();
        var result = await Gpt2Process.RunIn(string.Format(Terminal, "TERM=xterm", 80), folder.Path,
            $"{Train.Replace('*', '0')} -x 400 -v 0 -g 0 -o out");
        var shown = Regex.Count(result.Output, @"step +\d+/400 ");
        await Assert.That(shown).IsBetween(2, 2 + (int)(10 * watch.Elapsed.TotalSeconds)).Because(result.ToString());
        await Assert.That(shown).IsLessThan(400);
    }

    [Test]
    [Arguments("train -i train_*.bin -j val.bin -e model.bin -b 2 -t 16 -x 2 -o out", "exec \"$@\" >/dev/full", 1)]
    [Arguments("sample -e model.bin --prompt-ids 1", "exec \"$@\" >/dev/full", 1)]
    [Arguments("sample -e model.bin --prompt-ids 1", "exec \"$@\" >&-", 1)]
    [Arguments("train -i train_*.bin -j val.bin -e model.bin -b 2 -t 16 -x 2 -o out", "exec \"$@\" >&-", 1)]
    [Arguments("train -i train_*.bin -j val.bin -e model.bin -b 2 -t 16 -x 2 -o out", "exec \"$@\" 2>/dev/full", 0)]
    [Arguments("train -i train_*.bin -j val.bin -e model.bin -b 2 -t 16 -x 2 -o out", "exec \"$@\" 2>&-", 0)]
    [Arguments("sample -e none.bin --prompt-ids 1", "exec \"$@\" 2>/dev/full", 1)]
    [Arguments("sample -e none.bin --frobnicate", "exec \"$@\" 2>/dev/full", 2)]
    [Arguments("sample -e none.bin --prompt-ids 1", "exec \"$@\" 2>&-", 1)]
    public async Task Output_that_goes_nowhere_ends_in_a_sentence_or_quietly(string command, string bash, int status) {
        using var folder = Folders.Inputs();
        var result = await Gpt2Process.RunIn(bash, folder.Path, command);
        await Assert.That(result.ExitCode).IsEqualTo(status).Because(result.ToString());
        if (bash.Contains(" >"))
            await Assert.That(result.Sentences.Single()).StartsWith("gpt2: standard output: expected");
        // A closed stream's place is taken by no file.
        foreach (var file in Directory.GetFiles(folder.Path, "*", SearchOption.AllDirectories))
            await Assert.That(File.ReadAllText(file)).DoesNotContain("gpt2: ").And.DoesNotContain("memory  ");
    }

    [Test]
    public async Task Samples_end_with_their_reader() {
        using var folder = Folders.Inputs();
        var result = await Gpt2Process.RunIn("timeout 20 \"$@\" | head -n 1; exit ${PIPESTATUS[0]}", folder.Path,
            "sample -e model.bin --prompt-ids 1 --num 10000000");
        await Assert.That(result.ExitCode).IsEqualTo(128 + 13).Because(result.ToString());
        await Assert.That(result.Lines).Count().IsEqualTo(1);
        await Assert.That(result.Sentences).IsEmpty();
    }

    [Test]
    public async Task Training_outlives_its_reader() {
        using var folder = Folders.Inputs();
        var result = await Gpt2Process.RunIn("\"$@\" | head -n 1; exit ${PIPESTATUS[0]}", folder.Path,
            $"{Train} -x 300 -v 0 -o out");
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        await Assert.That(File.Exists(InRun(folder, "DONE_00000300"))).IsTrue();
    }

    [Test]
    public async Task More_shards_than_files_may_be_open_are_read() {
        using var folder = Folders.Inputs();
        for (var i = 0; i < 300; i++)
            Support.WriteShard(folder[$"x_train_{i:d6}.bin"], [.. Enumerable.Repeat((ushort)1, 40)]);
        var result = await Gpt2Process.RunIn("ulimit -n 100; exec \"$@\"", folder.Path,
            "train -i x_train_*.bin -j x_train_*.bin -e model.bin -b 1 -t 16 -x 700 -v 0 -o out");
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
    }

    [Test]
    [Arguments("-s 512")]
    [Arguments("-n 12")]
    [Arguments("-n 8")]
    public async Task A_limit_too_small_is_named(string limit) {
        using var folder = Folders.Inputs();
        var result = await Gpt2Process.RunIn($"ulimit {limit}; exec \"$@\"", folder.Path, $"{Train} -x 2 -o out");
        await Refuses(result, $"gpt2: ulimit {limit[..2]}", "expected", "found");
    }

    [Test]
    [Arguments("-s 2048")]
    [Arguments("-n 32")]
    [Arguments("-v 1500000")]
    public async Task A_limit_just_large_enough_will_do(string limit) {
        using var folder = Folders.Inputs();
        var result = await Gpt2Process.RunIn($"ulimit {limit}; exec \"$@\"", folder.Path, $"{Train} -x 2 -o out");
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
    }

    [Test]
    [Arguments("-o model.bin", "model.bin: expected a folder, found a file")]
    [Arguments("-o model.bin/out", "model.bin")]
    public async Task A_file_in_the_place_of_the_folder_is_named(string options, string words) {
        using var folder = Folders.Inputs();
        await Refuses(await Gpt2Process.Run(folder.Path, $"{Train} -x 2 {options}"), words);
    }

    [Test]
    public async Task A_hang_up_that_nohup_ignores_does_not_stop_a_run() {
        using var folder = Folders.Inputs();
        using var run = Gpt2Process.StartIn("trap '' HUP; exec \"$@\"", folder.Path, $"{Train} -x 400 -v 0 -o out");
        await run.ReadToStep(3);
        run.Signal(Gpt2Process.HangUp);
        var result = await run.End();
        await Assert.That(result.Error).DoesNotContain("finishing");
        await Assert.That(File.Exists(InRun(folder, "DONE_00000400"))).IsTrue();
    }
}
