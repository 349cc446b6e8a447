using System.Xml.Linq;

namespace Gpt2.Tests;

/// <summary>The commands as a user meets them: what they print, and where, and what they leave.</summary>
public partial class BinaryTests {
    // golden.py's ten steps: three micro-batches each, in order.
    const string TenSteps = "train -i train.bin -j val.bin -e model.bin -b 2 -t 21 -d 126 -x 10 -l 1e-2 -u 4 -q 0.1 " +
        "-c 0.1 --no-shuffle -m 5 --optimizer adamw -o out";

    [Test]
    public async Task Ten_steps_equal_PyTorchs() {
        using var folder = Folders.Goldens();
        var result = await Gpt2Process.Succeed(folder.Path, TenSteps);
        var expected = File.ReadAllLines(Support.Golden("train.txt"));
        var steps = result.Lines.Where(line => line.StartsWith("step")).ToArray();
        await Assert.That(steps).Count().IsEqualTo(10);
        for (var i = 0; i < steps.Length; i++) {
            await Assert.That(steps[i]).Matches(StepLine());
            var fields = StepLine().Match(steps[i]).Groups;
            var numbers = expected[i].Split(' ');
            await Near(fields["step"].Value, numbers[0], 0);
            await Near(fields["loss"].Value, numbers[1], 1e-4);
            await Near(fields["norm"].Value, numbers[2], 1e-4);
            await Near(fields["rate"].Value, numbers[3], 5e-3);
        }
        await Assert.That(result.Lines).Count(line => line.StartsWith("val loss ")).IsEqualTo(2);
        var validation = result.Lines.Last(line => line.StartsWith("val loss "));
        await Assert.That(validation).Matches(@"^val loss \d+\.\d{6} \| better by \d\.\d{4}$");
        await Near(validation.Split(' ')[2], expected[^1]["val ".Length..], 1e-4);

        var log = File.ReadAllLines(Path.Combine(folder["out"], "main.log"));
        await Assert.That(log).Count().IsEqualTo(12);
        await Assert.That(log[0]).Matches(@"^s:0 tel:\d\.\d{4}$");
        for (var i = 0; i < 10; i++) {
            await Assert.That(log[i + 1]).Matches($@"^s:{i} trl:\d\.\d{{4}} lr:0\.\d{{6}} norm:\d\.\d\d$");
            await Near(log[i + 1].Split(':', ' ')[3], expected[i].Split(' ')[1], 1e-4);
            await Near(log[i + 1].Split(':', ' ')[5], expected[i].Split(' ')[3], 1e-4);
        }
        await Assert.That(log[11]).IsEqualTo($"s:10 tel:{double.Parse(validation.Split(' ')[2]):F4}");

        static async Task Near(string found, string expected, double tolerance) {
            var (a, b) = (double.Parse(found), double.Parse(expected));
            await Assert.That(a).IsBetween(b * (1 - tolerance), b * (1 + tolerance));
        }
    }

    [GeneratedRegex(@"^step (?<step>[ \d]{4})/10 \| loss (?<loss>\d+\.\d{6}) \| norm (?<norm>\d+\.\d{4}) \| " +
        @"lr (?<rate>\d\.\d\de-\d\d) \| \d+\.\d\d ms \| \d+ tok/s$")]
    private static partial Regex StepLine();

    [Test]
    public async Task Steps_go_to_standard_output_and_the_rest_to_standard_error() {
        using var folder = Folders.Goldens();
        var result = await Gpt2Process.Succeed(folder.Path, $"{TenSteps} -s 5 -g 4");
        var samples = result.Lines.Where(line => Regex.IsMatch(line, @"^sample:( \d+){4}$")).ToArray();
        await Assert.That(samples).Count().IsEqualTo(2);
        var others = result.Lines.Except(samples).Where(line => !line.StartsWith("val loss "));
        await Assert.That(others).All(line => StepLine().IsMatch(line));
        // No live line in a pipe: nothing is ever written over.
        await Assert.That(result.Output).DoesNotContain("\r").And.DoesNotContain("\e").And.EndsWith("\n");
        await Assert.That(result.Sentences).IsEmpty();
        foreach (var word in "2 layers,3 heads,48 channels,211,train.bin,val.bin,2 x 21,126,CPU,MB".Split(','))
            await Assert.That(result.Error).Contains(word);
    }

    // A pseudo-terminal for standard output and standard error.
    const string Terminal = "exec script -qec \"$*\" /dev/null";

    [Test]
    public async Task On_a_terminal_a_live_line_shows_progress() {
        using var folder = Folders.Goldens();
        var result = await Gpt2Process.RunIn(Terminal, folder.Path, TenSteps);
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        await Assert.That(result.Output).Matches(@"10\.0% \| loss \d\.\d+ \| \d+ tok/s \| \S+ left");
        // Once each live line has been wiped, none is left over.
        foreach (var line in result.Output.Split("\r\n"))
            await Assert.That(line.Split("\e[K")[^1]).DoesNotContain("left");
    }

    [Test]
    public async Task Tokenize_shows_a_progress_bar_on_a_terminal() {
        using var folder = new TemporaryFolder();
        File.WriteAllText(folder["text.txt"], string.Concat(Enumerable.Repeat("All work and no play. ", 60_000)));
        var result = await Gpt2Process.RunIn(Terminal, folder.Path, "tokenize -o new text.txt text.txt");
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        var bars = result.Output.Split('\r', '\n').Where(line => line.Contains('#')).ToArray();
        await Assert.That(bars).IsNotEmpty();
        foreach (var bar in bars)
            await Assert.That(bar.Count(character => character == '#')).IsLessThanOrEqualTo(24).Because(bar);
        await Assert.That(bars[^1]).StartsWith(new string('#', 24));
    }

    [Test]
    public async Task Evaluation_equals_the_validation_of_training() {
        using var folder = Folders.Goldens();
        var trained = await Gpt2Process.Succeed(folder.Path, TenSteps);
        var loss = trained.Lines.Last(line => line.StartsWith("val loss ")).Split(' ')[2];
        const string eval = "eval -e out/model_00000010.bin -j val.bin -b 2 -t 21";
        var part = await Gpt2Process.Succeed(folder.Path, $"{eval} -m 5");
        await Assert.That(part.Output).StartsWith($"loss {loss} | perplexity ").And.EndsWith(" | 210 tokens\n");
        await Assert.That(part.Error).IsEmpty();
        var ratio = double.Parse(part.Output.Split(' ')[4]) / Math.Exp(double.Parse(loss));
        await Assert.That(ratio).IsBetween(0.9999, 1.0001);
        // The default is all of the 23 rows.
        await Assert.That((await Gpt2Process.Succeed(folder.Path, eval)).Output).EndsWith(" | 483 tokens\n");
    }

    [Test]
    public async Task Multiple_choices_are_scored() {
        using var folder = Folders.Goldens();
        const string eval = "eval -e model.bin -j val.bin -b 3 -t 16 --hellaswag choices.bin";
        // The same question again and again with each label in turn: one in four is right.
        Folders.WriteChoices(folder["choices.bin"], 8);
        var result = await Gpt2Process.Succeed(folder.Path, eval);
        await Assert.That(result.Lines[^1]).IsEqualTo("accuracy 0.2500 | 8 examples");
        // With the same label every time it is always right or always wrong.
        var accuracies = new List<string>();
        for (var label = 0; label < 4; label++) {
            Folders.WriteChoices(folder["choices.bin"], 8, words => words[3] = (ushort)label);
            accuracies.Add((await Gpt2Process.Succeed(folder.Path, eval)).Lines[^1].Split(' ')[1]);
        }
        await Assert.That(string.Join(' ', accuracies.Order())).IsEqualTo("0.0000 0.0000 0.0000 1.0000");
    }

    [Test]
    public async Task Multiple_choices_need_no_shards() {
        using var folder = Folders.Goldens();
        const string eval = "eval -e model.bin -b 2 --hellaswag choices.bin";
        var alone = await Gpt2Process.Succeed(folder.Path, eval);
        await Assert.That(alone.Output).Matches(@"^accuracy \d\.\d{4} \| 2 examples\n$");
        await Assert.That(alone.Error).IsEmpty();
        // Where the default's shards are, or some were asked for, the loss comes first.
        Directory.CreateDirectory(folder["data"]);
        File.Copy(folder["val.bin"], folder["data/text_val_000000.bin"]);
        foreach (var option in (string[])["", " -j val.bin"]) {
            var both = await Gpt2Process.Succeed(folder.Path, eval + option);
            await Assert.That(both.Lines[0]).Matches(@"^loss \d\.\d{6} \| perplexity .* tokens$");
            await Assert.That(both.Output).EndsWith($"\n{alone.Output}");
        }
    }

    [Test]
    public async Task Verify_tells_a_right_model_from_a_wrong_one() {
        using var folder = Folders.Goldens();
        var right = await Gpt2Process.Succeed(folder.Path, "verify -e model.bin --state state.bin");
        var names = right.Lines[1..].Select(line => line.Split(' ')[0]);
        await Assert.That(string.Join(' ', names)).IsEqualTo("logits loss wte wpe ln1w ln1b qkvw qkvb attprojw " +
            "attprojb ln2w ln2b fcw fcb fcprojw fcprojb lnfw lnfb");
        await Assert.That(right.Lines[1..]).All(line => line.EndsWith("  ok"));
        // The last of all weights is a bias of the last layer norm. Not a number is not near anything, in a state too.
        async Task Differs(string from, int index, float value, string tensor) {
            var bytes = File.ReadAllBytes(folder[from]);
            MemoryMarshal.Cast<byte, float>(bytes.AsSpan())[index < 0 ? bytes.Length / 4 + index : index] = value;
            File.WriteAllBytes(folder["wrong.bin"], bytes);
            var wrong = await Gpt2Process.Run(folder.Path, from == "model.bin"
                ? "verify -e wrong.bin --state state.bin" : "verify -e model.bin --state wrong.bin");
            await Assert.That(wrong.ExitCode).IsEqualTo(1).Because(wrong.ToString());
            await Assert.That(wrong.Lines.Single(line => line.StartsWith(tensor + " "))).EndsWith("  DIFFERS");
            await Assert.That(wrong.Error).IsEmpty();
        }
        await Differs("model.bin", -1, 1, "logits");
        await Differs("state.bin", -1, float.NaN, "lnfb");
    }

    [Test]
    public async Task A_model_in_bf16_loads_too() {
        using var folder = Folders.Goldens();
        var bytes = File.ReadAllBytes(folder["model.bin"]);
        bytes[4] = 5; // the version
        // The upper half of each float: all of it, for these weights are such as bf16 has.
        var halves = MemoryMarshal.Cast<byte, uint>(bytes.AsSpan(1024)).ToArray()
            .Select(bits => (ushort)(bits >> 16)).ToArray();
        File.WriteAllBytes(folder["half.bin"], [.. bytes[..1024], .. MemoryMarshal.AsBytes(halves.AsSpan())]);
        var losses = new List<double>();
        foreach (var model in (string[])["model.bin", "half.bin"]) {
            var result = await Gpt2Process.Succeed(folder.Path, $"eval -e {model} -j val.bin -b 2 -t 21");
            losses.Add(double.Parse(result.Output.Split(' ')[1]));
        }
        await Assert.That(losses[1]).IsEqualTo(losses[0]);
    }

    [Test]
    public async Task Samples_of_ids_are_the_same_for_the_same_seed() {
        using var folder = Folders.Goldens();
        const string ids = "--prompt-ids 1,2,3 -n 8";
        var greedy = await Sample($"{ids} --temperature 0");
        await Assert.That(greedy).Matches(@"^1 2 3( \d+){8}\n$");
        string[] likeliest = ["--temperature 0 --seed 7", "--top-k 1", "--top-p 0.0001", "--temperature 0.0001"];
        foreach (var narrow in likeliest)
            await Assert.That(await Sample($"{ids} {narrow}")).IsEqualTo(greedy).Because(narrow);
        var three = await Sample($"{ids} --num 3");
        await Assert.That(three).Matches(@"^(1 2 3( \d+){8}\n---\n){2}1 2 3( \d+){8}\n$");
        await Assert.That(three.Split("---\n").Distinct()).Count().IsEqualTo(3);
        await Assert.That(await Sample($"{ids} --num 3 --seed 42")).IsEqualTo(three);
        await Assert.That(await Sample($"{ids} --num 3 --seed 43")).IsNotEqualTo(three);
        // A prompt that fills the context leaves room for the one token that follows it.
        var full = $"--prompt-ids {string.Join(',', Enumerable.Range(0, 32))} -n 100";
        await Assert.That((await Sample($"{full} --stop-at-context")).Split(' ')).Count().IsEqualTo(33);
        await Assert.That((await Sample(full)).Split(' ')).Count().IsEqualTo(132);

        async Task<string> Sample(string options) {
            var result = await Gpt2Process.Succeed(folder.Path, $"sample -e model.bin {options}");
            await Assert.That(result.Sentences).IsEmpty();
            return result.Output;
        }
    }

    [Test]
    // A value after = or in the next word; what is given last counts, as in make's ARGS; capitals are the same.
    [Arguments("-n 4 --seed 7 --top-k 5", "--tokens=4 --seed=7 --top-k=5", "--seed 7 --TOP-K 5 -n 9 -n 4",
        "--num 3 --seed 1 -n 4 --seed=7 --topk 5 --num=1", "-n +4 --seed 7 --top-k 5 --top-p 1e0 --temperature .8")]
    public async Task Options_are_written_in_several_ways(string first, params string[] others) {
        using var folder = Folders.Goldens();
        const string sample = "sample -e model.bin --prompt-ids 1,2,3";
        var expected = await Gpt2Process.Succeed(folder.Path, $"{sample} {first}");
        await Assert.That(expected.Output).Matches(@"^1 2 3( \d+){4}\n$");
        foreach (var options in others)
            await Assert.That((await Gpt2Process.Succeed(folder.Path, $"{sample} {options}")).Output)
                .IsEqualTo(expected.Output).Because(options);
    }

    [Test]
    public async Task Options_stand_before_and_after_files() {
        using var folder = new TemporaryFolder();
        File.WriteAllText(folder["a.txt"], "Once upon a time");
        File.WriteAllText(folder["b.txt"], "there were two");
        string[] orders = [
            "-o NAME --val-tokens 2 a.txt b.txt", "a.txt b.txt -o NAME --val-tokens 2",
            "a.txt --val-tokens=2 b.txt --verbose --out=NAME",
        ];
        foreach (var (i, order) in orders.Index()) {
            await Gpt2Process.Succeed(folder.Path, $"tokenize {order.Replace("NAME", $"text{i}")}");
            foreach (var shard in (string[])["val_000000", "train_000001"]) {
                await Assert.That(File.ReadAllBytes(folder[$"text{i}_{shard}.bin"]).AsSpan()
                    .SequenceEqual(File.ReadAllBytes(folder[$"text0_{shard}.bin"]))).IsTrue().Because(order);
            }
        }
    }

    [Test]
    [Arguments("help", "--help")]
    [Arguments("", "--help")]
    [Arguments("-h", "--help")]
    [Arguments("help train", "train --help")]
    [Arguments("train -b 4 -h", "train --help")]
    [Arguments("tokenize a.txt --help", "tokenize --help")]
    [Arguments("train --version", "--version")]
    public async Task Help_can_be_asked_for_in_several_ways(string command, string other) {
        using var folder = new TemporaryFolder();
        var expected = await Gpt2Process.Succeed(folder.Path, other);
        var found = await Gpt2Process.Succeed(folder.Path, [.. command.Split(' ').Where(word => word != "")]);
        await Assert.That(found.Output).IsEqualTo(expected.Output).And.IsNotEmpty();
        await Assert.That(found.Error).IsEmpty();
    }

    [Test]
    public async Task A_prompt_is_any_text() {
        using var folder = new TemporaryFolder();
        Folders.WriteModel(folder["model.bin"], 32, 50257, 1, 1, 8, 50304);
        const string sample = "sample -e model.bin -n 2 --seed 5";
        string[] prompts = ["--", "-h", "--help", "-n", "-5 degrees", "--seed=7", "@model.bin", "a=b", "", "caf\u00e9"];
        foreach (var prompt in prompts) {
            var one = await Gpt2Process.Succeed(folder.Path, [.. sample.Split(' '), "-p", prompt]);
            var two = await Gpt2Process.Succeed(folder.Path, [.. sample.Split(' '), $"--prompt={prompt}"]);
            await Assert.That(one.Output).StartsWith(prompt).And.IsEqualTo(two.Output);
            // The same on standard input, without the end of its last line.
            File.WriteAllText(folder["prompt.txt"], $"{prompt}\n");
            var piped = await Gpt2Process.RunIn("cat prompt.txt | \"$@\"", folder.Path, $"{sample} -p -");
            await Assert.That(piped.Output).IsEqualTo(one.Output).Because(piped.ToString());
        }
        File.WriteAllBytes(folder["prompt.txt"], [.. "good"u8, 0xff, .. "bad"u8]);
        var bad = await Gpt2Process.RunIn("exec \"$@\" <prompt.txt", folder.Path, $"{sample} -p -");
        await Assert.That(bad.ExitCode).IsEqualTo(1).Because(bad.ToString());
        await Assert.That(bad.Sentences.Single()).Contains("--prompt").And.Contains("UTF-8");
        var tooLong = await Gpt2Process.RunIn("seq 100 | \"$@\"", folder.Path, $"{sample} -p -");
        await Assert.That(tooLong.ExitCode).IsEqualTo(0).Because(tooLong.ToString());
        await Assert.That(tooLong.Error).Contains("context 32 tokens, fewer than ");
    }

    [Test]
    public async Task A_folder_stands_for_its_newest_checkpoint_and_its_shards() {
        using var folder = Folders.Goldens();
        await Gpt2Process.Succeed(folder.Path, $"{TenSteps} -x 3 -n 1 --keep 3");
        // The third was never completed, and a fourth is just being written.
        File.Delete(folder["out/DONE_00000003"]);
        File.WriteAllText(folder["out/DONE_00000004.tmp"], "");
        string[] commands = [
            "sample --prompt-ids 1,2 -n 4 -e", "eval -j val.bin -e", "verify --state state.bin -e",
            $"{TenSteps.Replace("-o out", "-o new")} -e",
        ];
        foreach (var command in commands) {
            var outputs = new List<string>();
            foreach (var init in (string[])["out/model_00000002.bin", "out", "out/"]) {
                if (Directory.Exists(folder["new"]))
                    Directory.Delete(folder["new"], recursive: true);
                outputs.Add(Untimed(await Gpt2Process.Run(folder.Path, $"{command} {init}")));
            }
            await Assert.That(outputs[0]).IsNotEmpty();
            await Assert.That(outputs.Distinct()).Count().IsEqualTo(1).Because(command);
        }
        var timed = await Gpt2Process.Succeed(folder.Path, "bench -b 1 -t 21 -x 1 -e out");
        await Assert.That(timed.Output).Contains("2 layers, 3 heads, 48 channels");

        Directory.CreateDirectory(folder["shards"]);
        foreach (var name in (string[])["b_train_1", "a_train_2", "a_val_0", "other"]) {
            var source = name.Contains("train") ? "train.bin" : "val.bin";
            File.Copy(folder[source], folder[$"shards/{name}.bin"]);
        }
        var steps = $"{TenSteps.Replace("-i train.bin -j val.bin ", "").Replace("-o out", "-x 3 -o")}";
        var files = await Gpt2Process.Succeed(
            folder.Path, $"{steps} one -i shards/?_train_?.bin -j shards/a_val_0.bin");
        var whole = await Gpt2Process.Succeed(folder.Path, $"{steps} two -i shards -j shards/");
        await Assert.That(Untimed(whole)).IsEqualTo(Untimed(files));
        await Assert.That(whole.Error).Contains("8000 tokens");

        // Without what differs from run to run.
        static string Untimed(Result result) =>
            Regex.Replace(result.Output, @"\| \d+\.\d+ ms \| .*", "");
    }

    [Test]
    [Arguments("train", "-i,--train-data -j,--val-data -e,--init -o,--out -b,--batch -t,--seq -d,--total-batch " +
        "-x,--max-steps -l,--lr -u,--warmup -q,--final-lr-frac -c,--weight-decay -k,--schedule -v,--val-every " +
        "-m,--val-batches -s,--sample-every -g,--gen-tokens -n,--checkpoint-every --keep --keep-best --log-every " +
        "-y,--resume -r,--recompute -a,--overfit --no-shuffle --skip-outliers --optimizer --gpus -z,--zero --timeout " +
        "--device --precision --seed --verbose")]
    [Arguments("sample", "-e,--init -p,--prompt --prompt-ids -n,--tokens --temperature --top-k --top-p --num --seed " +
        "--stop-at-context --quiet --device --precision --verbose")]
    [Arguments("eval", "-e,--init -j,--val-data -m,--val-batches -b,--batch -t,--seq --hellaswag --gpus --timeout " +
        "--device --precision --verbose")]
    [Arguments("tokenize", "-o,--out --val-tokens --shard-tokens --field --lossy --verbose")]
    [Arguments("verify", "-e,--init --state --device --precision --verbose")]
    [Arguments("bench", "-e,--init -b,--batch -t,--seq -d,--total-batch -x,--steps -r,--recompute --device " +
        "--precision --optimizer --portable --decode --verbose")]
    [Arguments("export", "-e,--init -o,--out --type --verbose")]
    [Arguments("plot", "-o,--out --verbose")]
    [Arguments("info", "--verbose")]
    [Arguments("completion", "--verbose")]
    public async Task Help_names_every_option(string command, string options) {
        using var folder = new TemporaryFolder();
        var overview = await Gpt2Process.Succeed(folder.Path, "--help");
        await Assert.That(overview.Output).Contains($"\n  {command} ");
        var help = await Gpt2Process.Succeed(folder.Path, $"{command} --help");
        foreach (var option in options.Split(' ')) {
            // An option has a line of its own, which begins with its names and goes on to say something.
            var line = new Regex($@"^ +{option.Replace(",", ", ")}( (N|X|IDS|TEXT|NAME))?  +\S.*[a-z.]");
            await Assert.That(help.Lines.Count(line.IsMatch)).IsEqualTo(1).Because($"{command} {option}");
        }
        // And there are no others.
        await Assert.That(help.Lines.Count(line => Regex.IsMatch(line, "^ +-"))).IsEqualTo(options.Split(' ').Length);
        await Assert.That(help.Error).IsEmpty();
        await Assert.That(help.Lines).Contains(line => line.StartsWith($"Usage: gpt2 {command} "));
        await Assert.That(help.Lines).Contains(line => Regex.IsMatch(line, $"^Example: .*gpt2 {command} "));
        // A number's range is there, and an enumeration's values; nothing of C#.
        var entries = Regex.Split(help.Output, "\n(?=\n|  +-)").Select(entry => Regex.Replace(entry, @"\s+", " "));
        foreach (var entry in entries.Where(entry => Regex.IsMatch(entry, "^ (-., )?--\\S+ [NX] ")))
            await Assert.That(entry).Matches(@"\((0 or 1|(above )?\d+ (or more|to \d+|and up to \d+)|above 0)\)");
        foreach (var name in (string[])["schedule", "optimizer", "type", "device", "precision"]) {
            foreach (var entry in entries.Where(entry => entry.Contains($"--{name} NAME")))
                await Assert.That(entry).Matches(@"( |: )\w+(, \w+)* or \w+\.");
        }
        foreach (var output in (string[])[overview.Output, help.Output]) {
            await Assert.That(output.Split('\n')).All(line => line.Length <= 80);
            await Assert.That(output).DoesNotMatch(@"<(int|uint|float|string|[A-Z])|Default:|@""");
        }
    }

    [Test]
    public async Task Help_names_groups_of_options() {
        var help = await Gpt2Process.Succeed(".", "train --help");
        await Assert.That(string.Join(' ', help.Lines.Where(line => Regex.IsMatch(line, "^[A-Z]+$"))))
            .IsEqualTo("DATA MODEL OPTIMIZATION SCHEDULE OUTPUT HARDWARE OTHER");
    }

    [Test]
    public async Task Help_fits_a_narrow_terminal() {
        foreach (var command in (string[])["--help", "train --help", "tokenize --help"]) {
            var help = await Gpt2Process.RunIn("exec script -qec \"stty cols 40; $*\" /dev/null", ".", command);
            var lines = help.Output.Split("\r\n").Where(line => !line.StartsWith("Example: ")).ToArray();
            await Assert.That(lines.Length).IsGreaterThan(10);
            await Assert.That(lines).All(line => line.Length <= 40);
        }
    }

    [Test]
    [Arguments("tr", "train")]
    [Arguments("train --sc", "--schedule")]
    [Arguments("train -k l", "linear")]
    [Arguments("sample --device c", "cuda cpu")]
    [Arguments("train -i a_", "")]
    [Arguments("completion z", "zsh")]
    public async Task A_shell_completes_commands_options_and_values(string words, string offered) {
        const string bash = "COMP_LINE=\"gpt2 ${*:2}\" \"$1\" completion gpt2 -b";
        var result = await Gpt2Process.RunIn(bash, ".", words);
        await Assert.That(string.Join(' ', result.Lines)).IsEqualTo(offered).Because(result.ToString());
    }

    [Test]
    public async Task Every_shell_gets_a_script() {
        foreach (var shell in (string[])["bash", "zsh", "fish"])
            await Assert.That((await Gpt2Process.Succeed(".", $"completion {shell}")).Output)
                .Contains($"{Gpt2Process.Binary} completion").And.Contains("gpt2").And.EndsWith("\n");
        var bash = await Gpt2Process.RunIn("bash -c \"$(\"$1\" completion bash)\"' && complete -p gpt2'", ".", "");
        await Assert.That(bash.Output).IsEqualTo($"complete -o default -C '{Gpt2Process.Binary} completion' gpt2\n");
    }

    [Test]
    [NotInParallel]
    public async Task It_is_small_and_starts_at_once() {
        await Assert.That(new FileInfo(Gpt2Process.Binary).Length).IsLessThanOrEqualTo(15_000_000);
        var best = TimeSpan.MaxValue;
        for (var i = 0; i < 10; i++) {
            var watch = Stopwatch.StartNew();
            using var process = Gpt2Process.Start(".", "--help");
            await process.End();
            best = watch.Elapsed < best ? watch.Elapsed : best;
        }
        await Assert.That(best).IsLessThan(TimeSpan.FromMilliseconds(20));
    }

    [Test]
    public async Task The_curves_are_a_picture() {
        using var folder = Folders.Goldens();
        await Gpt2Process.Succeed(folder.Path, $"{TenSteps} -v 5");
        XNamespace svg = "http://www.w3.org/2000/svg";
        var root = XDocument.Load(Path.Combine(folder["out"], "loss.svg")).Root!;
        await Assert.That(root.Name).IsEqualTo(svg + "svg");
        var size = ((string)root.Attribute("viewBox")!).Split(' ').Select(double.Parse).ToArray();
        var curves = root.Elements(svg + "polyline").Select(line => ((string)line.Attribute("points")!).Split(' ')
            .Select(point => point.Split(',').Select(double.Parse).ToArray()).ToArray()).ToArray();
        // The training losses, their means, which for so few are the same, the validation losses, rates and norms.
        await Assert.That(string.Join(' ', curves.Select(curve => curve.Length))).IsEqualTo("10 10 2 10 10");
        await Assert.That(curves.SelectMany(curve => curve)).All(point =>
            point[0] > 0 && point[0] < size[2] && point[1] > 0 && point[1] < size[3]);
        // Time goes to the right, and these losses go down from first to last.
        foreach (var (i, curve) in curves.Index()) {
            await Assert.That(curve.Zip(curve.Skip(1))).All(pair => pair.First[0] < pair.Second[0]);
            if (i < 3)
                await Assert.That(curve[^1][1]).IsGreaterThan(curve[0][1]);
        }
        var texts = root.Elements(svg + "text").Select(text => text.Value).ToArray();
        foreach (var label in (string[])["out", "tokens", "loss", "training", "validation", "learning rate", "norm",
            "init model.bin, total-batch 126, max-steps 10, lr 0.01, "])
            await Assert.That(texts).Contains(text => text.StartsWith(label));
        await Assert.That(texts).Contains("200").And.Contains("1k");
    }

    [Test]
    public async Task Several_runs_are_drawn_over_one_another() {
        using var folder = Folders.Goldens();
        await Gpt2Process.Succeed(folder.Path, $"{TenSteps} -v 5");
        await Gpt2Process.Succeed(folder.Path, $"{TenSteps.Replace("-o out", "-o <b>")} -v 5 -l 1e-3");
        // A run of llm.c, of which there is a log alone.
        Directory.CreateDirectory(folder["c"]);
        File.Copy(folder["out/main.log"], folder["c/main.log"]);
        await Gpt2Process.Succeed(folder.Path, "plot out <b> c/");
        var root = XDocument.Load(folder["plot.svg"]).Root!;
        XNamespace svg = "http://www.w3.org/2000/svg";
        var texts = root.Elements(svg + "text").Select(text => text.Value).ToArray();
        foreach (var label in (string[])["3 runs", "out", "<b>", "c"])
            await Assert.That(texts).Contains(label);
        await Assert.That(root.Elements(svg + "polyline").Count()).IsEqualTo(3 * 3 + 2 * 3);
        await Gpt2Process.Succeed(folder.Path, "plot c -o c.svg");
        await Assert.That(File.ReadAllText(folder["c.svg"])).Contains(">updates<").And.DoesNotContain("NaN");
    }

    [Test]
    public async Task The_end_says_what_came_of_the_run_and_what_to_type_next() {
        using var folder = Folders.Goldens();
        var first = await Gpt2Process.Succeed(folder.Path, TenSteps);
        await Assert.That(first.Error).Matches(@"\ntime    about \S+, until \d\d:\d\d\n");
        await Assert.That(first.Error).Matches(@"\ndone    10 steps in \S+, \d+ tokens/s: out/model_00000010.bin\n" +
            @"best    validation loss \d\.\d{4} at step 10\nnext    \S+ sample -e out --prompt-ids 1,2,3\n$");
        await Gpt2Process.Succeed(folder.Path, "sample -e out --prompt-ids 1,2,3 -n 2");
        var second = await Gpt2Process.Succeed(folder.Path, $"{TenSteps} -y -x 20 --log-every 4");
        await Assert.That(string.Join(' ', second.Lines.Where(line => line.StartsWith("step"))
            .Select(line => line[5..9].Trim()))).IsEqualTo("11 12 16 20");
    }

    [Test]
    public async Task Info_says_what_a_file_or_a_folder_is() {
        using var folder = Folders.Goldens();
        await Gpt2Process.Succeed(folder.Path, $"{TenSteps} -n 5");
        await Gpt2Process.Succeed(folder.Path, "export -e model.bin -o hf --type bf16");
        File.WriteAllText(folder["a.txt"], "Once upon a time,\n\nthere were two");
        await Gpt2Process.Succeed(folder.Path, "tokenize -o shards/a --val-tokens 4 a.txt");
        Directory.CreateDirectory(folder["begun"]);
        File.WriteAllText(folder["begun/settings.txt"], "--init d6\n");
        const string sizes = "model   2 layers, 3 heads, 48 channels, vocabulary 211, sequences up to 32\n";
        foreach (var (path, expected) in ((string, string)[])[
            ("model.bin", $"{sizes}weights 70464 numbers, fp32\n"), ("hf", $"{sizes}weights 70464 numbers, bf16\n"),
            ("hf/model.safetensors", $"{sizes}weights 70464 numbers, bf16\n"),
            ("out/state_00000005_00000.bin", "state   of step 5, part 1 of 1\n" +
                "holds   moments of AdamW, the place in the data\ndata    shard 0, sample 15, in order\n"),
            ("shards/a_val_000000.bin", "shards  1 with 4 tokens\ntext    Once upon...\n"),
            ("shards", "shards  2 with 11 tokens\ntext    time, there were...\n"),
            ("begun", "run     0 updates in its log; no checkpoint\noptions init d6\n"),
        ])
            await Assert.That((await Gpt2Process.Succeed(folder.Path, $"info {path}")).Output)
                .IsEqualTo($"{path}\n{expected}");
        var run = await Gpt2Process.Succeed(folder.Path, "info out/ model.bin");
        await Assert.That(run.Output).Matches(@"^out/\nrun     10 updates in its log; the newest checkpoint is of " +
            @"step 10\noptions init model.bin, total-batch 126, max-steps 10, lr 0.01, .*\n" +
            @"loss    \d\.\d+ in training at the end; \d\.\d+ in validation after step 10, the best\n" +
            @"model   2 layers.*\nweights .*\nmodel.bin\nmodel ");
    }

    [Test]
    public async Task Other_programs_can_read_the_metrics() {
        using var folder = Folders.Goldens();
        await Gpt2Process.Succeed(folder.Path, $"{TenSteps} -v 5");
        var lines = File.ReadAllLines(folder["out/metrics.jsonl"])
            .Select(line => System.Text.Json.JsonDocument.Parse(line).RootElement).ToArray();
        await Assert.That(string.Join(' ', lines.Select(line => line.GetProperty("step").GetInt32())))
            .IsEqualTo("0 1 2 3 4 5 5 6 7 8 9 10 10");
        var log = File.ReadAllLines(folder["out/main.log"]);
        foreach (var (line, metrics) in log.Zip(lines)) {
            var loss = metrics.GetProperty(line.Contains("tel") ? "val" : "loss").GetDouble();
            await Assert.That(line).Contains($":{loss:F4}");
            await Assert.That(metrics.GetProperty("seconds").GetDouble()).IsGreaterThanOrEqualTo(0);
            if (line.Contains("tel"))
                continue;
            await Assert.That(line).Contains($"norm:{metrics.GetProperty("norm").GetDouble():F2}");
            await Assert.That(metrics.GetProperty("tokens").GetInt64())
                .IsEqualTo(126 * metrics.GetProperty("step").GetInt32());
            foreach (var name in (string[])["lr", "tokens_per_second", "memory"])
                await Assert.That(metrics.GetProperty(name).GetDouble()).IsGreaterThan(0);
        }
    }

    [Test]
    public async Task A_loss_that_is_no_number_ends_the_run() {
        using var folder = Folders.Goldens();
        var result = await Gpt2Process.Run(folder.Path, $"{TenSteps} -l 1e30 -u 0 -n 1 --keep 9");
        await Assert.That(result.ExitCode).IsEqualTo(1).Because(result.ToString());
        await Assert.That(result.Sentences).Count().IsEqualTo(1);
        await Assert.That(result.Sentences[0]).StartsWith("gpt2: step 1: expected a finite loss");
        await Assert.That(Folders.Names(folder["out"])).DoesNotContain("DONE").And.DoesNotContain("model");
        await Assert.That(File.ReadAllText(Path.Combine(folder["out"], "main.log"))).DoesNotContain("NaN");
    }

    [Test]
    public async Task Resume_without_a_checkpoint_starts_fresh_and_says_so() {
        using var folder = Folders.Goldens();
        var fresh = await Gpt2Process.Succeed(folder.Path, TenSteps);
        var resumed = await Gpt2Process.Succeed(folder.Path, TenSteps.Replace("-o out", "-o again -y"));
        await Assert.That(fresh.Sentences).IsEmpty();
        await Assert.That(resumed.Sentences).Count().IsEqualTo(1);
        await Assert.That(resumed.Sentences[0]).Contains("again").And.Contains("no complete checkpoint");
        await Assert.That(Folders.Contents(folder["again"])).IsEqualTo(Folders.Contents(folder["out"]));
    }

    [Test]
    public async Task Garbage_in_the_log_does_not_hinder_resuming() {
        using var folder = Folders.Goldens();
        await Gpt2Process.Succeed(folder.Path, $"{TenSteps} -n 5 --keep 9");
        var log = File.ReadAllText(Path.Combine(folder["out"], "main.log"));
        const string garbage =
            "s:3 trl:\ns: tel:4\n\0\u00ff\n\ns:99999999999 trl:1 lr:1 norm:1\ns:4 trl:x lr:1 norm:1\ns:5 trl:5.1";
        await Assert.That(await ResumedLog("again", garbage)).IsEqualTo(log);
        // Metrics that are none go, as a line that a kill has cut off does.
        var metrics = File.ReadAllLines(folder["out/metrics.jsonl"]);
        Folders.Copy(folder["out"], folder["half"], name => !name.Contains("00000010"));
        File.WriteAllText(folder["half/metrics.jsonl"], string.Join('\n', metrics[..6]) + "\n\0\n{\"step\":3}\n[]\n" +
            metrics[6][..30]);
        await Gpt2Process.Succeed(folder.Path, TenSteps.Replace("-o out", "-o half -y"));
        await Assert.That(Folders.Contents(folder["half"])).IsEqualTo(Folders.Contents(folder["out"]));
        // Another program's lines about earlier steps are kept.
        await Assert.That(await ResumedLog("more", "s:3 eval:0.2891\n")).Contains("s:3 eval:0.2891\n");

        async Task<string> ResumedLog(string name, string added) {
            Folders.Copy(folder["out"], folder[name], name => !name.Contains("00000010"));
            var path = Path.Combine(folder[name], "main.log");
            // In the place of what followed step 5.
            File.WriteAllText(path, log[..log.IndexOf("s:5")] + added);
            await Gpt2Process.Succeed(folder.Path, TenSteps.Replace("-o out", $"-o {name} -y"));
            return File.ReadAllText(path);
        }
    }

    [Test]
    public async Task From_text_to_text() {
        using var folder = new TemporaryFolder();
        var words = Enumerable.Range(0, 300).Select(i => $"the number {i} comes before {i + 1}.");
        File.WriteAllText(folder["a.txt"], string.Join(' ', words));
        File.WriteAllText(folder["b, c.txt"], "Once<|endoftext|>twice caf\u00e9 \ud83d\ude00");
        var tokenized = await Gpt2Process.Succeed(
            folder.Path, "tokenize", "-o", "text", "--val-tokens", "100", "a.txt", "b, c.txt");
        await Assert.That(tokenized.Output).IsEmpty();
        await Assert.That(Folders.Names(folder.Path)).EndsWith(" text_train_000001.bin text_val_000000.bin");
        await Assert.That(new FileInfo(folder["text_val_000000.bin"]).Length).IsEqualTo(1024 + 200);

        var trained = await Gpt2Process.Succeed(folder.Path,
            "train -i text_train_*.bin -j text_val_*.bin -e d6 -b 1 -t 16 -x 1 -m 1 -g 4 -o out --schedule Linear");
        await Assert.That(trained.Lines.Single(line => line.StartsWith("step    1/1 "))).Contains("| loss 10.");
        await Assert.That(trained.Output).Contains("sample: ");

        // Text alone, the prompt first; the same again, but for another seed.
        const string prompt = "The caf\u00e9 \u2014";
        var first = await Sample(prompt);
        await Assert.That(first.Output).StartsWith(prompt).And.EndsWith("\n");
        await Assert.That(first.Sentences).IsEmpty();
        await Assert.That(first.Error).Matches(@"^speed   [0-9.]+ s to the first token; then \d+ tokens/s\n$");
        await Assert.That((await Sample(prompt, "--quiet")).Error).IsEmpty();
        await Assert.That((await Sample(prompt)).Output).IsEqualTo(first.Output);
        await Assert.That((await Sample(prompt, "--seed", "1")).Output).IsNotEqualTo(first.Output);
        await Assert.That((await Sample(prompt, "--num", "2")).Output).StartsWith($"{first.Output}---\n{prompt}");
        await Assert.That((await Sample("", "--temperature", "0")).ExitCode).IsEqualTo(0);
        var tooLong = await Sample(string.Concat(Enumerable.Repeat("a ", 1100)));
        await Assert.That(tooLong.ExitCode).IsEqualTo(0);
        await Assert.That(tooLong.Error).StartsWith("context 1024 tokens, fewer than ");

        Task<Result> Sample(string text, params string[] options) => Gpt2Process.Run(
            folder.Path, ["sample", "-e", "out/model_00000001.bin", "-n", "3", "-p", text, .. options]);
    }
}
