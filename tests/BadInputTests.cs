using System.Runtime.Versioning;

namespace Gpt2.Tests;

/// <summary>All that can be wrong with a command line or a file, each with its sentence and exit status, on the real
/// binary.</summary>
public partial class BadInputTests {
    const string Data = "-i train.bin -j val.bin -b 2 -t 21";
    const string Train = $"train {Data} -e model.bin -x 1 -o out";
    const string Sample = "sample -e model.bin --prompt-ids 1";
    const string Eval = "eval -e model.bin -j val.bin -b 2 -t 21";
    const string Bench = "bench -e model.bin -b 1 -t 21 -x 1";

    /// <summary>A command line that must fail.</summary>
    /// <param name="Name">What is wrong.</param>
    /// <param name="ExitCode">1 for a file or the machine, 2 for the command line.</param>
    /// <param name="Words">What the sentence must hold, divided by spaces.</param>
    /// <param name="Prepare">Makes the folder of goldens in which the command runs what it should be.</param>
    sealed record BadInput(
        string Name, string Command, int ExitCode, string Words, Action<TemporaryFolder>? Prepare = null);

    static readonly Dictionary<string, BadInput> inputs = ((IEnumerable<BadInput>[])
        [Models(), Shards(), DebugStates(), Choices(), States(), Checkpoints(), Options(), Usage(), Files(), Texts()])
        .SelectMany(group => group).ToDictionary(input => input.Name);

    public static IEnumerable<string> Names => inputs.Keys;

    [Test]
    [MethodDataSource(nameof(Names))]
    public async Task Is_refused_in_one_sentence(string name) {
        var input = inputs[name];
        using var folder = Folders.Goldens();
        input.Prepare?.Invoke(folder);
        var before = Folders.Contents(folder.Path);
        var watch = Stopwatch.StartNew();
        var result = await Gpt2Process.Run(folder.Path, [.. input.Command.Split(' ').Select(word => word.Trim('\''))]);
        await Assert.That(result.ExitCode).IsEqualTo(input.ExitCode).Because(result.ToString());
        await Assert.That(result.Sentences).Count().IsEqualTo(1).Because(result.ToString());
        await Assert.That(result.Sentences[0]).StartsWith("gpt2: ").And.DoesNotMatch(RuntimesOwnWords());
        foreach (var word in input.Words.Split(' '))
            await Assert.That(result.Sentences[0]).Contains(word);
        await Assert.That(Folders.Contents(folder.Path)).IsEqualTo(before).Because("nothing should be written");
        // A header that lies about gigabytes is seen through before anything is allocated.
        await Assert.That(watch.Elapsed).IsLessThan(TimeSpan.FromSeconds(10));
    }

    [GeneratedRegex(@"\bat Gpt2|\bException\b|\(Parameter '|Argument '|Access to the path|Could not find")]
    private static partial Regex RuntimesOwnWords();

    // ---- Formats. In the tables a line is an index into the file as int32, the value put there, and words.

    static IEnumerable<BadInput> Models() {
        const string sample = "sample -e bad.bin --prompt-ids 1";
        const string fields = """
            0 20240520 magic 20240326 20240520
            0 0 magic 0
            1 1 version 3 5 1
            1 5 bytes 282880
            2 0 sequence 0
            2 -1 sequence -1
            2 31 bytes 282880
            2 2147483647 sequence 2147483647
            3 0 vocabulary 0
            3 -1 vocabulary -1
            3 257 vocabulary 257
            3 2147483647 vocabulary 2147483647
            4 0 layers 0
            4 -2 layers -2
            4 3 bytes 282880
            4 1048576 layers 1048576
            5 0 heads 0
            5 -3 heads -3
            5 7 channels heads 48 7
            5 1048576 heads 1048576
            6 0 channels 0
            6 -48 channels -48
            6 50 channels 50
            6 96 bytes 282880
            6 1073741824 channels 1073741824
            7 0 vocabulary 0
            7 210 vocabulary 210
            7 384 bytes 282880
            7 2147483647 vocabulary 2147483647
            """;
        foreach (var input in Fields("model", fields, "model.bin", sample).Concat(Sizes("model", "model.bin", sample)))
            yield return input;
        yield return new("model of absurd sizes", sample, 1, "bad.bin bytes 282880", folder => {
            (int, int)[] sizes = [(2, 1 << 17), (3, 65536), (7, 65536), (4, 1000), (5, 64), (6, 65536)];
            File.Copy(folder["model.bin"], folder["bad.bin"]);
            foreach (var (index, value) in sizes)
                Set(folder["bad.bin"], index, value);
        });
        string[] commands = [
            $"train {Data} -o out -e bad.bin", "bench -t 21 -e bad.bin", "eval -j val.bin -b 2 -t 21 -e bad.bin",
            "verify --state state.bin -e bad.bin",
        ];
        foreach (var command in commands)
            yield return new($"model for {command}", command, 1, "bad.bin magic 1", Change("model.bin", 0, 1));
    }

    static IEnumerable<BadInput> Shards() {
        const string eval = "eval -e model.bin -b 2 -t 21 -j bad.bin";
        const string train = "train -e model.bin -b 2 -t 21 -x 1 -o out";
        const string fields = """
            0 20240326 magic 20240520 20240326
            1 2 version 1 2
            2 -1 tokens -1
            2 499 2022 2024 bytes
            2 501 2026 2024 bytes
            2 2147483647 4294968318 2024 bytes
            """;
        foreach (var input in Fields("shard", fields, "val.bin", eval).Concat(Sizes("shard", "val.bin", eval)))
            yield return input;
        foreach (var option in (string[])["-j val.bin -i bad.bin", "-i train.bin -j bad.bin"])
            yield return new($"shard for {option}", $"{train} {option}", 1, "bad.bin magic 1", Change("val.bin", 0, 1));
        yield return new("token out of range", eval, 1, "bad.bin vocabulary 211 position 100", WriteTokenOutOfRange);
        yield return new("shard shorter than a batch", $"{train} -b 20 -t 25 -i val.bin -j train.bin", 1,
            "val.bin expected found 500");
        yield return new("no such shards, -i", $"{train} -i no*.bin -j val.bin", 1, "no*.bin expected found tokenize");
        yield return new("no such shards, -j", $"{train} -i train.bin -j no*.bin", 1, "no*.bin expected found");
        yield return new("no such folder of shards", $"{train} -i none/*.bin -j val.bin", 1, "none/*.bin expected");
        yield return new("no data at all", train, 1, "data/*train_*.bin make data");
    }

    static IEnumerable<BadInput> DebugStates() {
        const string verify = "verify -e model.bin --state bad.bin";
        // Tokens begin at 256, targets 42 after them.
        const string fields = """
            0 20240326 magic 20240327 20240326
            1 1 version 2 1
            2 0 batch 0
            2 -2 batch -2
            2 3 bytes 318668
            2 2147483647 batch 2147483647
            3 0 sequence 0
            3 -21 sequence -21
            3 20 bytes 318668
            3 33 sequence 33
            256 211 vocabulary 211
            257 -1 vocabulary -1
            298 5000 vocabulary 5000
            """;
        var sizes = Sizes("debug state", "state.bin", verify);
        foreach (var input in Fields("debug state", fields, "state.bin", verify).Concat(sizes))
            yield return input;
        yield return new("debug state of another model", "verify -e bad.bin --state state.bin", 1,
            "state.bin bytes 318668", folder => Folders.WriteModel(folder["bad.bin"], 32, 211, 1, 3, 48, 256));
    }

    static IEnumerable<BadInput> Choices() {
        const string eval = "eval -e model.bin -j val.bin -b 4 -t 32 --hellaswag bad.bin";
        const string fields = """
            0 1 magic 20240522 1
            1 2 version 1 2
            2 -1 examples -1
            2 1 bytes
            2 3 end
            2 2147483647 end
            3 0 longest 0
            3 -1 longest -1
            3 20 example 0
            3 70000 longest 70000
            """;
        var sizes = Sizes("choices", "choices.bin", eval);
        foreach (var input in Fields("choices", fields, "choices.bin", eval).Concat(sizes))
            yield return input;
        // Words of each example: as its name says, where, and what is put there.
        const string words = """
            mark 0 7
            odd-size 1 41
            tiny-size 1 2
            size-past-the-end 1 44
            index 2 5
            label 3 4
            no-completions 4 0
            one-completion-more 4 5
            one-completion-less 4 3
            no-context 5 0
            context-longer-than-the-example 5 1000
            token-out-of-range 6 211
            completion-longer-than-the-rest 9 40
            """;
        foreach (var line in words.Split('\n')) {
            var parts = line.Split(' ');
            var (word, value) = (int.Parse(parts[1]), ushort.Parse(parts[2]));
            yield return new($"choices, {parts[0]}", eval, 1, "bad.bin expected found", folder =>
                Folders.WriteChoices(folder["bad.bin"], 2, example => example[word] = value));
        }
        // The third completion takes two words of the last one, of which nothing but a length of 0 is left.
        yield return new("choices, completion of no tokens", eval, 1, "bad.bin expected found", folder =>
            Folders.WriteChoices(folder["bad.bin"], 2, example => (example[15], example[20]) = (4, 0)));
        // Each is seen before anything is computed, whatever the number of batches before it.
        yield return new("choices longer than --seq", eval.Replace("-t 32", "-t 4"), 2, "bad.bin --seq 5 4", folder =>
            Folders.WriteChoices(folder["bad.bin"], 2));
        yield return new("choices longer than the model's longest sequence", eval.Replace("-t 32", "-t 4")
            .Replace("model.bin", "short.bin"), 2, "bad.bin at most 4 tokens (the model's longest sequence), found 5",
            folder => {
                Folders.WriteModel(folder["short.bin"], 4, 211, 1, 3, 48, 256);
                Folders.WriteChoices(folder["bad.bin"], 2);
            });
    }

    // ---- Checkpoints: a run of two steps, to be resumed

    const string Resume = $"train {Data} -x 3 -o run --resume";
    const string Model = "model_00000002.bin", State = "state_00000002_00000.bin", Done = "DONE_00000002";

    static readonly Lazy<Task<TemporaryFolder>> twoSteps = new(async () => {
        var folder = Folders.Goldens();
        await Gpt2Process.Succeed(folder.Path, $"train {Data} -e model.bin -x 2 -d 42 -o run --optimizer adamw");
        return folder;
    });

    [After(Class)]
    public static async Task RemoveTwoSteps() {
        if (twoSteps.IsValueCreated)
            (await twoSteps.Value).Dispose();
    }

    /// <summary>Puts the run of two steps into the folder "run".</summary>
    static void CopyRun(TemporaryFolder folder) => Folders.Copy(twoSteps.Value.Result["run"], folder["run"]);

    /// <summary>A run with a file changed unnoticed: as llm.c writes it, an empty DONE vouches for nothing.</summary>
    static Action<TemporaryFolder> Unnoticed(string name, Action<string> change) => folder => {
        CopyRun(folder);
        File.WriteAllText(Path.Combine(folder["run"], Done), "");
        change(Path.Combine(folder["run"], name));
    };

    /// <summary>A run with a file that is changed.</summary>
    static Action<TemporaryFolder> Changed(string name, Action<string> change) => folder => {
        CopyRun(folder);
        change(Path.Combine(folder["run"], name));
    };

    static IEnumerable<BadInput> States() {
        // After the header and both moments: number of shards, their order, number of batches, their order, generator.
        const int shards = (282880 - 1024) / 4 * 2 + 256, batches = shards + 3, generator = batches + 2 + 95;
        var fields = $"""
            0 20240520 magic 20240527 20240520
            1 2 version 1 2
            2 0 ranks 0
            2 2 ranks 2
            2 -1 ranks -1
            3 1 rank 1
            3 -1 rank -1
            4 1 expected
            4 2 master 2
            5 0 shuffle
            5 2 shuffl 2
            10 3 step 2 3
            10 -1 step -1
            30 1 shard 1
            30 -1 shard -1
            31 1 shard
            32 96 96
            32 -1 -1
            33 1 expected
            41 1 --optimizer AdamW Muon
            41 2 optimizer AdamW 2
            41 -1 optimizer AdamW -1
            {shards} 2 shards 2
            {shards} -1 shards
            {shards + 2} 1 permutation
            {batches} 94 95 94
            {batches} 2147483647 95 2147483647
            {batches + 2} 95 permutation
            {batches + 2} -1 permutation
            {generator + 2} 0 generator 0
            {generator + 2} 1000 generator 1000
            {generator + 3} 1000 generator 1000
            """;
        foreach (var (index, value, words) in Lines(fields)) {
            yield return new($"state, {index} = {value}", Resume, 1, $"{State} expected found {words}",
                Unnoticed(State, path => Set(path, index, value)));
        }
        foreach (var bytes in (int[])[0, 100, 1024, 300_000, shards * 4, generator * 4 + 20]) {
            yield return new($"state of {bytes} bytes", Resume, 1, $"{State} expected found",
                Unnoticed(State, path => Resize(path, bytes)));
        }
        yield return new("state, one byte more", Resume, 1, $"{State} expected found bytes",
            Unnoticed(State, path => File.AppendAllText(path, "x")));
    }

    static IEnumerable<BadInput> Checkpoints() {
        foreach (var name in (string[])[Model, State]) {
            yield return new($"a bit of {name} flipped", Resume, 1, $"{Done} {name} expected found",
                Changed(name, path => Set(path, 50_000, BitConverter.ToInt32(File.ReadAllBytes(path), 200_000) ^ 1)));
            yield return new($"{name} cut short", Resume, 1, $"{Done} {name} expected found",
                Changed(name, path => Resize(path, 200_000)));
            yield return new($"{name} deleted", Resume, 1, name, Changed(name, File.Delete));
            yield return new($"{name} deleted, DONE empty", Resume, 1, name, Unnoticed(name, File.Delete));
        }
        foreach (var text in (string[])["garbage", "\n", $"{Model} 282880"]) {
            yield return new($"DONE that holds '{text}'", Resume, 1, "run",
                Changed(Done, path => File.WriteAllText(path, text)));
        }
        yield return new("resuming with another descriptor", $"{Resume} -e d6", 1, $"{Model} --init 48 384", CopyRun);
        yield return new("resuming with another model", $"{Resume} -e other.bin", 1, $"{Model} --init expected found",
            folder => {
                CopyRun(folder);
                Folders.WriteModel(folder["other.bin"], 32, 211, 1, 3, 48, 256);
            });
        yield return new(
            "resuming with another batch size", $"{Resume} -b 3", 2, "--batch 3 --total-batch 42", CopyRun);
        yield return new(
            "resuming with another sequence length", $"{Resume} -t 20", 2, "--seq 20 --total-batch 42", CopyRun);
        yield return new("resuming with --no-shuffle", $"{Resume} --no-shuffle", 1, $"{State} shuffle", CopyRun);
        yield return new("resuming with --overfit", $"{Resume} --overfit", 1, $"{State} shuffle", CopyRun);
        const string others = $"{State} shards --out others";
        yield return new("resuming with more shards", $"{Resume} -i *a*n.bin", 1, others, folder => {
            CopyRun(folder);
            File.Copy(folder["train.bin"], folder["again.bin"]);
        });

        const string anew = $"train {Data} -x 3 -o run -e model.bin";
        yield return new("output folder of another run", anew, 1, "run --resume 2", CopyRun);
        foreach (var name in (string[])["main.log", Model, Done]) {
            yield return new($"output folder with {name} of another run", anew, 1, "run --resume", folder =>
                Folders.Copy(twoSteps.Value.Result["run"], folder["run"], other => other == name));
        }
    }

    // ---- The command line

    static IEnumerable<BadInput> Options() {
        // Values that are numbers, but not right ones.
        const string wrong = """
            train -b --batch 0 -2 1000000000
            train -t --seq 0 -21 33
            train -d --total-batch -42 41 43 63
            train -x --max-steps 0 -1
            train -l --lr 0 -1 NaN Infinity 1e39
            train -u --warmup -1
            train -q --final-lr-frac -0.1 1.1 NaN
            train -c --weight-decay -1 NaN Infinity
            train -v --val-every -1
            train -m --val-batches -1
            train -s --sample-every -1
            train -g --gen-tokens -1
            train -n --checkpoint-every -1
            train --keep --keep 0 -1
            train -r --recompute -1 3
            train --skip-outliers --skip-outliers -1 NaN Infinity
            train -z --zero 2
            train --gpus --gpus 0 -1
            train --timeout --timeout 0 1000001
            train --precision --precision bf16
            sample -n --tokens 0 -1
            sample --temperature --temperature -1 NaN
            sample --top-k --top-k -1
            sample --top-p --top-p 2 0 -1 NaN
            sample --num --num 0 -1
            eval -b --batch 0 -1
            eval -t --seq -1 33
            eval -m --val-batches -1
            bench -b --batch 0 -1
            bench -t --seq 0 -1 33
            bench -x --steps 0 -1
            bench -d --total-batch 0 -42 41 2147483647
            bench --precision --precision bf16
            bench -r --recompute -1 3
            tokenize --val-tokens --val-tokens -1 100000001
            tokenize --shard-tokens --shard-tokens 0 1000000001
            """;
        foreach (var line in wrong.Split('\n')) {
            var fields = line.Split(' ');
            foreach (var value in fields[3..]) {
                yield return new($"{fields[0]} {fields[1]} {value}", Full(fields[0], $"{fields[1]} {value}"), 2,
                    $"{fields[2]} expected found {value}", WriteText);
            }
        }
        // Values that are none at all, and then nothing in their place.
        const string unreadable = """
            train batch x 1.5 '' 99999999999 1,000 0x10 4_0
            train seq x
            train total-batch x
            train max-steps 1e3 1,0
            train lr x 0,001 1e-3,5 0.001f
            train warmup x
            train final-lr-frac x 0,1
            train weight-decay x 0,1
            train schedule cos 7 0 ''
            train optimizer sgd 0 ''
            train val-every x
            train val-batches x
            train sample-every x
            train gen-tokens x
            train checkpoint-every x
            train keep x
            train recompute x
            train skip-outliers x 1,5
            train seed -1 x 4294967296
            train gpus x
            train zero x
            train timeout x
            train device tpu 9 0
            train precision fp16 1
            train out '' -b
            train train-data '' -j
            train val-data ''
            train init ''
            sample init '' -n
            sample tokens x
            sample temperature x 0,7
            sample top-k x 1,0
            sample top-p x 0,9
            sample num x
            sample seed -1
            sample prompt-ids x 1,x 1,,2 '' [1 [1,2] 1;2 1.5,2
            eval val-batches x
            eval val-data ''
            eval hellaswag ''
            eval gpus x
            verify state '' -e
            tokenize out ''
            tokenize val-tokens x 1,000
            tokenize shard-tokens x
            tokenize field ''
            bench steps x
            bench optimizer sgd
            """;
        foreach (var line in unreadable.Split('\n')) {
            var fields = line.Split(' ');
            var (command, option) = (fields[0], $"--{fields[1]}");
            foreach (var value in fields[2..]) {
                yield return new($"{command} {option} {value}", Full(command, $"{option} {value}"), 2,
                    $"gpt2: {option}: expected found '{value.Trim('\'')}'", WriteText);
            }
            yield return new($"{command} {option} without a value", $"{Full(command, "")}{option}", 2,
                $"gpt2: {option}: expected found nothing", WriteText);
        }

        static string Full(string command, string option) => command switch {
            "train" => $"{Train} {option}",
            "sample" => $"{Sample} {option}",
            "eval" => $"{Eval} {option}",
            "bench" => $"{Bench} {option}",
            "verify" => $"verify -e model.bin {option}",
            _ => $"tokenize text.txt -o new {option}",
        };
    }

    static IEnumerable<BadInput> Usage() => [
        new("unknown command", "trian -b 4", 2, "COMMAND gpt2 --help 'trian'"),
        new("help about an unknown command", "help trian", 2, "COMMAND gpt2 --help 'trian'"),
        new("an option in place of a command", "-e model.bin", 2, "COMMAND gpt2 --help '-e'"),
        new("an empty command", "''", 2, "COMMAND gpt2 --help ''"),
        new("unknown option", $"{Train} --frobnicate", 2, "gpt2 train --help '--frobnicate'"),
        new("unknown option of tokenize", "tokenize -o new --frobnicate text.txt", 2, "'--frobnicate'", WriteText),
        new("a device for tokenize", "tokenize -o new --device cpu text.txt", 2, "'--device'", WriteText),
        new("unknown option with a value", $"{Train} --frobnicate=3", 2, "gpt2 train --help '--frobnicate=3'"),
        new("short option with =", $"{Train} -b=4", 2, "gpt2 train --help '-b=4'"),
        new("option of another command", $"{Train} --temperature 3", 2, "gpt2 train --help '--temperature'"),
        new("a flag's value", $"{Train} --resume=no", 2, "--resume expected found 'no'"),
        new("a bad value after =", $"{Train} --lr=0,1", 2, "--lr expected found '0,1'"),
        new("no value after =", $"{Train} --out=", 2, "--out expected found ''"),
        new("a word too many", $"{Train} more", 2, "gpt2 train --help 'more'"),
        new("an empty word", $"{Train} ''", 2, "gpt2 train --help ''"),
        new("a pattern that the shell took", $"{Train} -i a_train.bin b_train.bin", 2, "quote patterns 'b_train.bin'"),
        new("a text of two words", "sample -e model.bin -p Hello world", 2, "quote texts 'world'"),
        new("a word after --", $"{Train} -- more", 2, "gpt2 train --help '--'"),
        new("a text after --", "tokenize -o new -- text.txt", 2, "gpt2 tokenize --help '--'", WriteText),
        new("an empty name of a text", "tokenize -o new ''", 2, "gpt2 tokenize --help ''"),
        new("plot of nothing", "plot", 2, "RUN one run or more"),
        new("plot of a folder that is none", "plot none", 1, "none/main.log expected"),
        new("plot of a log that is not ours", "plot logs", 1, "logs/main.log llm.c found none", folder => {
            Directory.CreateDirectory(folder["logs"]);
            File.WriteAllText(folder["logs/main.log"], "step 1: loss 3\n\0\n");
        }),
        new("plot to a device", "plot logs -o /dev/stdout", 1, "/dev/stdout a file to write a device", folder => {
            Directory.CreateDirectory(folder["logs"]);
            File.WriteAllText(folder["logs/main.log"], "s:0 trl:3.0000 lr:0.001000 norm:1.00\n");
        }),
        new("info about nothing", "info", 2, "FILE one file or folder"),
        new("info about no file", "info none", 1, "none expected a file of this name"),
        new("info about another file", "info a.txt", 1, "a.txt a model, a training state, or a token shard", folder =>
            File.WriteAllText(folder["a.txt"], "step 1: loss 3")),
        new("info about a file of 3 bytes", "info a.txt", 1, "a.txt more data", folder =>
            File.WriteAllText(folder["a.txt"], "abc")),
        new("info about half a model", "info half.bin", 1, "half.bin bytes by its header", folder =>
            File.WriteAllBytes(folder["half.bin"], File.ReadAllBytes(folder["model.bin"])[..5000])),
        new("info about an empty folder", "info empty", 1, "empty expected token shards", folder =>
            Directory.CreateDirectory(folder["empty"])),
        new("info about a log that is not ours", "info logs", 1, "logs/main.log llm.c found none", folder => {
            Directory.CreateDirectory(folder["logs"]);
            File.WriteAllText(folder["logs/main.log"], "step 1 trl:3\n");
        }),
        new("completion for no shell", "completion", 2, "SHELL bash, zsh or fish ''"),
        new("completion for another shell", "completion tcsh", 2, "SHELL bash, zsh or fish 'tcsh'"),
        new("bench --decode with more", "bench --decode -e model.bin -b 3", 2, "--decode --init alone"),
        new("sample without a model", "sample -n 3", 2, "sample --init"),
        new("eval without a model", "eval -j val.bin", 2, "eval --init"),
        new("verify without a state", "verify -e model.bin", 2, "verify --state"),
        new("tokenize without a prefix", "tokenize text.txt", 2, "tokenize --out", WriteText),
        new("tokenize without a text", "tokenize -o new", 2, "FILE"),
        new("unknown descriptor", $"train {Data} -o out -e d7", 2, "--init d6 d48 d7"),
        // A batch of 2^27 x 32 tokens wraps around to none; an update on the CPU is two batches.
        new("2^32 tokens, eval", "eval -e model.bin -j val.bin -b 134217728", 2, "--batch 67108863 32 134217728"),
        new("2^32 tokens, train", $"{Train} -t 32 -b 134217728", 2, "--batch 33554431 32 134217728"),
        new("2^32 tokens, bench", "bench -e model.bin -t 32 -b 134217728", 2, "--batch 67108863 32 134217728"),
        new("--device cuda without kernels", $"{Train} --device cuda", 1, "--device cuda expected found"),
        new("--device cuda without kernels, sample", $"{Sample} --device cuda", 1, "--device cuda expected found"),
        new("prompt and ids", $"{Sample} -p text", 2, "--prompt-ids --prompt"),
        new("prompt for another vocabulary", "sample -e model.bin -p text", 1, "model.bin 50257 211 --prompt-ids"),
        new("no prompt for another vocabulary", "sample -e model.bin", 1, "model.bin 50257 211 --prompt-ids"),
        new("id out of range", "sample -e model.bin --prompt-ids 1,211", 2, "--prompt-ids 210 found 211"),
        new("negative id", "sample -e model.bin --prompt-ids 1,-1", 2, "--prompt-ids 210 found -1"),
        new("more memory than there is", "bench -e model.bin -b 60000000 -t 32 -x 1", 1, "memory expected found"),
    ];

    // ---- Files as such

    static IEnumerable<BadInput> Files() {
        string[] commands = [
            "sample --prompt-ids 1 -e bad", $"train {Data} -o out -e ./bad", "verify -e model.bin --state bad",
            $"{Eval} --hellaswag bad", "eval -e model.bin -b 2 -t 21 -j bad", "tokenize -o new bad",
        ];
        foreach (var command in commands) {
            BadInput Bad(string what, string found, Action<TemporaryFolder>? prepare) =>
                new($"{what}: {command}", command, 1, $"bad expected found {found}", prepare);
            yield return Bad("no such file", "none", null);
            yield return Bad("a directory", "", folder => Directory.CreateDirectory(folder["bad"]));
            yield return Bad("a dangling link", "none", folder => File.CreateSymbolicLink(folder["bad"], "nowhere"));
            yield return Bad("a link to itself", "", folder => File.CreateSymbolicLink(folder["bad"], "bad"));
            yield return Bad("a device", "", folder => File.CreateSymbolicLink(folder["bad"], "/dev/null"));
        }
        const string noCheckpoint = "sub expected a folder with complete checkpoint found none";
        (string Command, string Words)[] folders = [
            ("sample --prompt-ids 1 -e sub", noCheckpoint), ("eval -j val.bin -e sub", noCheckpoint),
            ("verify --state state.bin -e sub", noCheckpoint), ("bench -t 21 -e sub", noCheckpoint),
            ($"train {Data} -o out -e sub", noCheckpoint), ("verify -e model.bin --state sub", "found a folder"),
            ($"{Eval} --hellaswag sub", "found a folder"), ("tokenize -o new sub", "sub expected parquet found none"),
            ($"{Train} -i sub", "sub/*train*.bin: shards"), ($"{Train} -j sub", "sub/*val*.bin: shards"),
        ];
        foreach (var (command, words) in folders) {
            yield return new($"a folder: {command}", command, 1, words, folder =>
                Directory.CreateDirectory(folder["sub"]));
        }
        yield return new("a name that is too long", $"sample --prompt-ids 1 -e {new string('a', 300)}", 1,
            "aaa: expected to use it, found: the too long");
        // Standard input is a closed pipe here.
        yield return new("a pipe", "sample --prompt-ids 1 -e /dev/stdin", 1, "/dev/stdin expected found");
        foreach (var options in (string[])["-o val.bin", "-o val.bin/out", "-v 0 -o val.bin/out"])
            yield return new($"a file in the way of {options}", $"{Train} {options}", 1, "val.bin expected found");
    }

    static IEnumerable<BadInput> Texts() {
        const string tokenize = "tokenize -o new text.txt";
        yield return new("invalid UTF-8", tokenize, 1, "text.txt UTF-8", folder =>
            File.WriteAllBytes(folder["text.txt"], [.. "good"u8, 0xff, 0xfe, .. "bad"u8]));
        yield return new("UTF-8 cut off", tokenize, 1, "text.txt UTF-8", folder =>
            File.WriteAllBytes(folder["text.txt"], [.. "caf\u00e9"u8[..^1]]));
        // What is held out of the first file must not be left behind.
        const string two = "tokenize -o new --val-tokens 1 text.txt bad.txt";
        yield return new("invalid UTF-8 in the second file", two, 1, "bad.txt UTF-8", folder => {
            WriteText(folder);
            File.WriteAllBytes(folder["bad.txt"], [0xff]);
        });
        yield return new("no second file", two, 1, "bad.txt", WriteText);
        yield return new("empty text", tokenize, 1, "text.txt expected found 0", folder =>
            File.WriteAllText(folder["text.txt"], ""));
        yield return new("text of white space", tokenize, 1, "text.txt expected found 0", folder =>
            File.WriteAllText(folder["text.txt"], "\n \n"));
        foreach (var count in (int[])[4, 400]) {
            yield return new($"{count} of 4 tokens held out", $"tokenize -o new --val-tokens {count} text.txt", 1,
                $"text.txt {count} expected found 4", WriteText);
        }
        yield return new("prefix of shards that are there", "tokenize -o old text.txt", 1, "old_train_000001.bin",
            folder => {
                WriteText(folder);
                File.WriteAllText(folder["old_train_000001.bin"], "");
            });
        yield return new("prefix in a file", "tokenize -o val.bin/new text.txt", 1,
            "val.bin expected a folder, found a file", WriteText);
    }

    // ---- What goes on after a failure, or goes beyond one

    [Test]
    [Arguments("sample", "--init")]
    [Arguments("eval", "--init")]
    [Arguments("verify", "--init")]
    [Arguments("tokenize", "--out")]
    public async Task A_command_without_anything_is_misused(string command, string required) {
        using var folder = Folders.Goldens();
        var result = await Gpt2Process.Run(folder.Path, command);
        await Assert.That(result.ExitCode).IsEqualTo(2).Because(result.ToString());
        await Assert.That(result.Output + result.Error).Contains(required);
    }

    [Test]
    [Arguments("main.log")]
    [Arguments("loss.svg")]
    [Arguments("metrics.jsonl")]
    [Arguments("model_00000001.bin")]
    [Arguments("state_00000001_00000.bin")]
    [Arguments("DONE_00000001")]
    public async Task A_folder_in_the_place_of_an_output_file_is_an_error(string name) {
        using var folder = Folders.Goldens();
        Directory.CreateDirectory(Path.Combine(folder["out"], name));
        var result = await Gpt2Process.Run(folder.Path, $"{Train} -y");
        await Assert.That(result.ExitCode).IsEqualTo(1).Because(result.ToString());
        await Assert.That(result.Sentences[^1]).StartsWith("gpt2: ").And.Contains(name);
        await Assert.That(Folders.Names(folder["out"])).DoesNotContain(".tmp").And.DoesNotContain("DONE");
    }

    [Test]
    [SupportedOSPlatform("linux")]
    public async Task Files_that_may_not_be_read_or_written_are_errors() {
        const UnixFileMode read = UnixFileMode.UserRead | UnixFileMode.GroupRead | UnixFileMode.OtherRead;
        const UnixFileMode enter = UnixFileMode.UserExecute | UnixFileMode.GroupExecute | UnixFileMode.OtherExecute;
        using var folder = Folders.Goldens();
        // Root may do anything, so that another user has to try; the folder, made for its owner alone, is opened to it.
        File.Copy(Gpt2Process.Binary, folder["gpt2"]);
        Directory.CreateDirectory(folder["locked"]);
        File.SetUnixFileMode(folder.Path, read | enter | UnixFileMode.UserWrite);
        File.SetUnixFileMode(folder["locked"], read | enter);
        File.SetUnixFileMode(folder["state.bin"], UnixFileMode.None);
        var user = Environment.IsPrivilegedProcess ? "setpriv --reuid 65534 --regid 65534 --clear-groups " : "";
        (string, string)[] commands = [
            ("verify -e model.bin --state state.bin", "state.bin"), ("sample --prompt-ids 1 -e state.bin", "state.bin"),
            ("eval -e model.bin -b 2 -t 21 -j state.bin", "state.bin"), ("tokenize -o new state.bin", "state.bin"),
            ($"{Train} -o locked", "locked"), ($"{Train} -o locked/out", "locked/out"),
        ];
        foreach (var (command, name) in commands) {
            var result = await Gpt2Process.RunIn($"shift; exec {user}./gpt2 \"$@\"", folder.Path, command);
            await Assert.That(result.ExitCode).IsEqualTo(1).Because($"{command}: {result}");
            await Assert.That(result.Sentences).Count().IsEqualTo(1).Because($"{command}: {result}");
            await Assert.That(result.Sentences[0]).StartsWith("gpt2: ").And.Contains(name).And.Contains("permission");
        }
        File.SetUnixFileMode(folder["locked"], read | enter | UnixFileMode.UserWrite);
    }

    [Test]
    [Arguments("-i bad.bin")]
    [Arguments("-j bad.bin")]
    [Arguments("-v 0 -i bad.bin")]
    public async Task What_failed_before_its_first_step_can_be_started_again(string option) {
        using var folder = Folders.Goldens();
        WriteTokenOutOfRange(folder);
        // All of the first 126 tokens.
        var failed = await Gpt2Process.Run(folder.Path, $"{Train} --no-shuffle -d 126 {option}");
        await Assert.That(failed.ExitCode).IsEqualTo(1).Because(failed.ToString());
        await Assert.That(failed.Sentences).Count().IsEqualTo(1).Because(failed.ToString());
        foreach (var word in (string[])["bad.bin", "211", "vocabulary", "position 100"])
            await Assert.That(failed.Sentences[0]).Contains(word);
        // No --resume: there is no run in the folder yet.
        await Gpt2Process.Succeed(folder.Path, Train);
    }

    [Test]
    [Arguments("sample -e none.bin --prompt-ids 1", 1)]
    [Arguments("sample -e model.bin --prompt-ids 1 -n 0", 2)]
    public async Task Verbose_shows_where_an_error_came_from_and_changes_no_exit_status(string command, int status) {
        using var folder = Folders.Goldens();
        var brief = await Gpt2Process.Run(folder.Path, command);
        var verbose = await Gpt2Process.Run(folder.Path, $"{command} --verbose");
        await Assert.That(brief.ExitCode).IsEqualTo(status);
        await Assert.That(verbose.ExitCode).IsEqualTo(status).Because(verbose.ToString());
        await Assert.That(verbose.Error).Contains(brief.Sentences[0]["gpt2: ".Length..]).And.Contains("   at ");
    }

    [Test]
    [Arguments("sample -e model.bin --prompt-ids 1 -n 2")]
    [Arguments(Eval)]
    [Arguments("verify -e model.bin --state state.bin")]
    [Arguments(Train)]
    public async Task Output_that_cannot_be_written_is_an_error(string command) {
        using var folder = Folders.Goldens();
        var result = await Gpt2Process.RunIn("exec \"$@\" >/dev/full", folder.Path, command);
        await Assert.That(result.ExitCode).IsEqualTo(1).Because(result.ToString());
        await Assert.That(result.Sentences).Count().IsEqualTo(1);
        await Assert.That(result.Sentences[0]).StartsWith("gpt2: ");
    }

    // ---- Making bad files

    /// <summary>Index, value and words of each line of a table.</summary>
    static IEnumerable<(int Index, int Value, string Words)> Lines(string table) => table.Split('\n')
        .Select(line => line.Split(' ', 3)).Select(fields => (int.Parse(fields[0]), int.Parse(fields[1]), fields[2]));

    /// <summary>Each line of a table as a file bad.bin, made from another one.</summary>
    static IEnumerable<BadInput> Fields(string name, string table, string source, string command) => Lines(table)
        .Select(line => new BadInput($"{name}, {line.Index} = {line.Value}", command, 1,
            $"bad.bin expected found {line.Words}", Change(source, line.Index, line.Value)));

    /// <summary>Makes bad.bin from a file by changing one int32.</summary>
    static Action<TemporaryFolder> Change(string source, int index, int value) => folder => {
        File.Copy(folder[source], folder["bad.bin"]);
        Set(folder["bad.bin"], index, value);
    };

    /// <summary>A bad.bin of each wrong size: none, within the header, the header alone, a byte less or more.</summary>
    static IEnumerable<BadInput> Sizes(string name, string source, string command) {
        foreach (var size in (string[])["0", "1023", "1024", "-1", "+1"]) {
            yield return new($"{name} of {size} bytes", command, 1, "bad.bin expected found", folder => {
                File.Copy(folder[source], folder["bad.bin"]);
                var whole = (int)new FileInfo(folder["bad.bin"]).Length;
                Resize(folder["bad.bin"], size[0] is '-' or '+' ? whole + int.Parse(size) : int.Parse(size));
            });
        }
    }

    static void Set(string path, int index, int value) {
        using var file = File.OpenWrite(path);
        file.Position = index * sizeof(int);
        file.Write(BitConverter.GetBytes(value));
    }

    static void Resize(string path, int bytes) {
        using var file = File.OpenWrite(path);
        file.SetLength(bytes);
    }

    /// <summary>Makes bad.bin from val.bin, with position 100 out of the golden model's vocabulary.</summary>
    static void WriteTokenOutOfRange(TemporaryFolder folder) {
        var bytes = File.ReadAllBytes(folder["val.bin"]);
        MemoryMarshal.Cast<byte, ushort>(bytes.AsSpan(1024))[100] = 211;
        File.WriteAllBytes(folder["bad.bin"], bytes);
    }

    /// <summary>Four tokens.</summary>
    static void WriteText(TemporaryFolder folder) => File.WriteAllText(folder["text.txt"], "one two three");
}
