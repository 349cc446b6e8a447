using System.Collections.Concurrent;
using System.Diagnostics;
using System.Globalization;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Text.RegularExpressions;
using Microsoft.Extensions.Logging.Abstractions;
using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>Ranks as threads, each with a CPU of its own; arrays are fp32 in this process's memory.</summary>
sealed class ThreadRanks : ICollective {
    /// <summary>What the ranks share.</summary>
    sealed class Meeting(int size) {
        public readonly Barrier Barrier = new(size);
        public readonly Tensor[][] Arrays = new Tensor[size][];
        public readonly double[][] Numbers = new double[size][];
        public readonly CancellationTokenSource Lost = new();
    }

    readonly Meeting meeting;

    ThreadRanks(Meeting meeting, int rank) => (this.meeting, Rank) = (meeting, rank);

    /// <summary>Runs every rank to its end; the first error ends all.</summary>
    public static void Run(int size, Action<ICollective> body) {
        var meeting = new Meeting(size);
        Exception? first = null;
        var threads = Enumerable.Range(0, size).Select(rank => new Thread(() => {
            try {
                body(new ThreadRanks(meeting, rank));
            } catch (Exception e) {
                Interlocked.CompareExchange(ref first, e, null);
                meeting.Lost.Cancel();
            }
        })).ToArray();
        Array.ForEach(threads, thread => thread.Start());
        Array.ForEach(threads, thread => thread.Join());
        if (first != null)
            throw new Gpt2Exception(first.Message);
    }

    public int Rank { get; }
    public int Size => meeting.Arrays.Length;
    public string Place { set { } }

    void Meet() => meeting.Barrier.SignalAndWait(meeting.Lost.Token);

    public void Sum(Span<double> values) {
        meeting.Numbers[Rank] = values.ToArray();
        Meet();
        values.Clear();
        foreach (var numbers in meeting.Numbers) {
            for (var i = 0; i < values.Length; i++)
                values[i] += numbers[i];
        }
        Meet();
    }

    static unsafe Span<float> Floats(Tensor x) => new((void*)x.Address, (int)x.Count);

    // The rule of formats.md, written anew: the code under test must agree with it.
    (int First, int End) Part(Tensor x, int rank) => ((int)(x.Count * rank / Size), (int)(x.Count * (rank + 1) / Size));

    public void AllReduce(ReadOnlySpan<Tensor> arrays) {
        meeting.Arrays[Rank] = arrays.ToArray();
        Meet();
        var sums = new float[arrays.Length][];
        for (var a = 0; a < arrays.Length; a++)
            sums[a] = SumOver(a, 0, (int)arrays[a].Count);
        Meet();
        for (var a = 0; a < arrays.Length; a++)
            sums[a].CopyTo(Floats(arrays[a]));
        Meet();
    }

    public void ReduceScatter(ReadOnlySpan<Tensor> arrays, ReadOnlySpan<Tensor> parts) {
        meeting.Arrays[Rank] = arrays.ToArray();
        Meet();
        for (var a = 0; a < arrays.Length; a++) {
            var (first, end) = Part(arrays[a], Rank);
            SumOver(a, first, end).CopyTo(Floats(parts[a]));
        }
        Meet();
    }

    float[] SumOver(int array, int first, int end) {
        var sum = new float[end - first];
        foreach (var arrays in meeting.Arrays) {
            var values = Floats(arrays[array])[first..end];
            for (var i = 0; i < sum.Length; i++)
                sum[i] += values[i];
        }
        return sum;
    }

    public void AllGather(ReadOnlySpan<Tensor> arrays) {
        meeting.Arrays[Rank] = arrays.ToArray();
        Meet();
        for (var a = 0; a < arrays.Length; a++) {
            for (var rank = 0; rank < Size; rank++) {
                var (first, end) = Part(arrays[a], rank);
                if (rank != Rank)
                    Floats(meeting.Arrays[rank][a])[first..end].CopyTo(Floats(arrays[a])[first..end]);
            }
        }
        Meet();
    }

    public void Join() { }
    public void Dispose() { }
}

/// <summary>Training by several ranks beside training by one with the same tokens an update.</summary>
public sealed class RankTests {
    // So odd that no tensor can be cut evenly.
    static readonly Config Odd = new(MaxT: 8, V: 29, Vp: 31, L: 2, NH: 3, C: 15);

    const int Sequences = 12;

    static TemporaryFolder Inputs() => Inputs(Odd, 500);

    /// <summary>A folder with a random model.bin, train_1.bin, train_2.bin and val.bin, of so many random tokens and
    /// more.</summary>
    internal static TemporaryFolder Inputs(Config config, int count) {
        var folder = new TemporaryFolder();
        using var cpu = new Cpu();
        var model = new Model(config, cpu, 1, 1, Purpose.Train);
        model.Load(null, 3);
        Files.Write(folder["model.bin"], model.Save);
        foreach (var (i, name) in ((string[])["train_1", "train_2", "val"]).Index()) {
            var tokens = Tokens(i, count + count / 3 * i, config.V).Select(token => (ushort)token).ToArray();
            WriteShard(folder[$"{name}.bin"], tokens);
        }
        return folder;
    }

    /// <summary>The losses, norms and validation losses that a run has printed.</summary>
    internal static double[] Numbers(string output) => [.. Regex.Matches(output, @"(?:loss|norm) (\d+\.\d+)")
        .Select(match => double.Parse(match.Groups[1].Value, CultureInfo.InvariantCulture))];

    /// <summary>Trains, and gives the losses, norms and validation losses that were printed.</summary>
    static double[] Train(TemporaryFolder folder, string name, int ranks, int B, int zero, int steps = 6,
        bool resume = false, bool shuffle = true, int totalSequences = Sequences) {
        using var output = new StringWriter(CultureInfo.InvariantCulture);
        ThreadRanks.Run(ranks, collective => {
            using var cpu = new Cpu(1);
            var options = new TrainOptions(folder["train_*.bin"], folder["val.bin"],
                resume ? null : folder["model.bin"], folder[name], B, Odd.MaxT, totalSequences * Odd.MaxT, steps,
                LearningRate: 1e-2f, Warmup: 2, FinalFraction: 1, WeightDecay: 0.1f, Schedule.Constant, ValEvery: 2,
                ValBatches: 3, SampleEvery: 0, GenTokens: 4, CheckpointEvery: 0, Keep: 1, resume, Recompute: 0,
                Overfit: false, shuffle, Seed: 42, Zero: zero);
            var writer = collective.Rank == 0 ? output : TextWriter.Null;
            using var trainer = new Trainer(options, cpu, writer, NullLogger.Instance, collective);
            trainer.Run();
        });
        return Numbers(output.ToString());
    }

    static async Task Near(double[] found, double[] expected) {
        await Assert.That(found.Length).IsEqualTo(expected.Length);
        for (var i = 0; i < found.Length; i++)
            await Assert.That(Math.Abs(found[i] - expected[i])).IsLessThan(2e-4).Because($"{i}: {found[i]}");
    }

    [Test]
    [Arguments(1, 1)]
    [Arguments(2, 0)]
    [Arguments(2, 1)]
    [Arguments(3, 0)]
    [Arguments(3, 1)]
    [Arguments(4, 0)]
    [Arguments(4, 1)]
    public async Task RanksTrainAsOneDoes(int ranks, int zero) {
        using var folder = Inputs();
        var expected = Train(folder, "one", 1, Sequences, 0);
        var found = Train(folder, "many", ranks, Sequences / ranks, zero);
        await Assert.That(expected.Length).IsEqualTo(6 * 2 + 4);
        await Near(found, expected);
        await ModelTests.CompareWeights(folder["many/model_00000006.bin"], folder["one/model_00000006.bin"]);
        var states = Directory.GetFiles(folder["many"], "state_*").Length;
        await Assert.That(states).IsEqualTo(zero == 1 ? ranks : 1);
    }

    [Test]
    [Arguments(2, 3, 1)]
    [Arguments(2, 1, 0)]
    [Arguments(4, 1, 1)]
    public async Task MicroStepsOfRanksEqualOneBatch(int ranks, int B, int zero) {
        using var folder = Inputs();
        var expected = Train(folder, "one", 1, Sequences, 0, shuffle: false);
        var found = Train(folder, "many", ranks, B, zero, shuffle: false);
        // Validation takes other batches.
        await Near(TrainingOf(found), TrainingOf(expected));
        static double[] TrainingOf(double[] all) => [.. all.Skip(1).Take(4), .. all.Skip(6).Take(4)];
    }

    [Test]
    [Arguments(1)]
    [Arguments(0)]
    public async Task ARunGoesOnWithAnyNumberOfRanks(int zero) {
        using var folder = Inputs();
        var expected = Train(folder, "whole", 4, 3, zero, steps: 8);
        Train(folder, "parts", 4, 3, zero, steps: 2);
        foreach (var (ranks, steps) in ((int, int)[])[(2, 4), (1, 6), (3, 7)]) {
            var B = ranks == 3 ? 4 : 3;
            Train(folder, "parts", ranks, B, zero, steps, resume: true);
        }
        var found = Train(folder, "parts", 4, 3, 1 - zero, steps: 8, resume: true);
        await Near(found, expected[^3..]);
        await ModelTests.CompareWeights(folder["parts/model_00000008.bin"], folder["whole/model_00000008.bin"]);
    }

    [Test]
    public async Task StatesOfACheckpointThatWasNotCompletedDoNotCount() {
        using var folder = Inputs();
        Train(folder, "run", 4, 3, 1, steps: 4);
        Train(folder, "other", 2, 6, 1, steps: 2);
        foreach (var rank in (int[])[2, 3]) // as if four ranks had been killed while they wrote step 4
            File.Copy(folder[$"run/state_00000004_0000{rank}.bin"], folder[$"other/state_00000004_0000{rank}.bin"]);
        Train(folder, "other", 2, 6, 1, steps: 4, resume: true);
        await Assert.That(Directory.GetFiles(folder["other"], "state_*").Length).IsEqualTo(2);
        var found = Train(folder, "other", 3, 4, 1, steps: 5, resume: true);
        await Near(found, Train(folder, "run", 4, 3, 1, steps: 5, resume: true));
    }

    [Test]
    public async Task ARunWhoseSamplesDoNotFitIsRefused() {
        using var folder = Inputs();
        Train(folder, "run", 2, 6, 1, steps: 1);
        var error = Assert.Throws<Gpt2Exception>(() =>
            Train(folder, "run", 1, 1, 1, steps: 2, resume: true, totalSequences: 7));
        await Assert.That(error.Message).IsEqualTo(
            "--total-batch: expected a multiple of the 96 tokens of this run's samples, found 56");
    }

    [Test]
    public async Task RanksHaveOnlyTheirPartOfTheOptimizersState() {
        using var cpu = new Cpu();
        var config = Config.Of("d6")!;
        long Bytes(int ranks) => new Model(config, cpu, 1, 8, Purpose.Train, 0, ranks - 1, ranks).Memory
            .Single(part => part.Name == "moments").Bytes;
        var (whole, part) = (Bytes(1), Bytes(4));
        await Assert.That(whole).IsEqualTo(8 * config.ParameterCount);
        await Assert.That(part).IsEqualTo(2 * config.ParameterCount);
    }
}

/// <summary>The connections between ranks, here between threads of one process.</summary>
public sealed class PeersTests {
    internal static int FreePort() {
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        return ((IPEndPoint)listener.LocalEndpoint).Port;
    }

    static readonly TimeSpan Long = TimeSpan.FromSeconds(30), Short = TimeSpan.FromSeconds(1);

    static Task<Peers> Join(int rank, int size, int port, TimeSpan timeout, Action<string>? lost = null,
        string key = "key") => Task.Factory.StartNew(() => new Peers(rank, size, "127.0.0.1", port, key, timeout,
            lost ?? (_ => { })), TaskCreationOptions.LongRunning);

    static async Task<Peers[]> All(int size, TimeSpan timeout, ConcurrentQueue<string>? lost = null) {
        var port = FreePort();
        return await Task.WhenAll(Enumerable.Range(0, size)
            .Select(rank => Join(rank, size, port, timeout, why => lost?.Enqueue($"{rank}: {why}"))));
    }

    static Task OnEach(Peers[] all, Action<Peers> action) => Task.WhenAll(all.Select(peers =>
        Task.Factory.StartNew(() => action(peers), TaskCreationOptions.LongRunning)));

    [Test]
    [Arguments(2)]
    [Arguments(5)]
    public async Task NumbersAreSummedOverRanks(int size) {
        var lost = new ConcurrentQueue<string>();
        var all = await All(size, Long, lost);
        var found = new double[size][];
        await OnEach(all, peers => {
            for (var round = 1; round <= 50; round++) {
                double[] values = [0.1 * (peers.Rank + round), round];
                peers.Sum(values);
                found[peers.Rank] = values;
                peers.Sum([]);
            }
            peers.Leave();
            peers.Dispose();
        });
        var expected = Enumerable.Range(0, size).Aggregate(0.0, (sum, rank) => sum + 0.1 * (rank + 50));
        foreach (var values in found)
            await Same(values, [expected, size * 50.0]);
        await Assert.That(lost).IsEmpty();
    }

    [Test]
    public async Task WhoDoesNotKnowTheKeyIsTurnedAway() {
        var port = FreePort();
        var first = Join(0, 2, port, Long);
        var stranger = await Join(1, 2, port, Long, key: "another");
        await Assert.That(() => stranger.Sum([])).Throws<Gpt2Exception>();
        using (var client = new TcpClient("127.0.0.1", port))
            client.GetStream().Write(new byte[3]);
        var second = await Join(1, 2, port, Long);
        Peers[] both = [await first, second];
        await OnEach(both, peers => peers.Sum([]));
        Array.ForEach([.. both, stranger], peers => peers.Dispose());
    }

    [Test]
    public async Task ARankThatNeverComesIsNamed() {
        var port = FreePort();
        var first = Join(0, 3, port, Short);
        using var second = await Join(1, 3, port, Short);
        var error = await Assert.That(async () => await first).Throws<Gpt2Exception>();
        await Assert.That(error!.Message).IsEqualTo(
            $"rank 0: expected rank 2 of 3 on port {port} within 1 s, found 2 ranks");
        error = await Assert.That(async () => await Join(2, 3, FreePort(), Short)).Throws<Gpt2Exception>();
        await Assert.That(error!.Message).StartsWith("rank 2: expected rank 0 on 127.0.0.1:");
    }

    [Test]
    [Arguments(0)]
    [Arguments(2)]
    public async Task ARankThatIsLostIsNamed(int gone) {
        var lost = new ConcurrentQueue<string>();
        var all = await All(3, Long, lost);
        foreach (var peers in all)
            peers.Place = "step 7";
        all[gone].Dispose();
        await Assert.That(() => all[1 - gone / 2].Sum([])).Throws<Gpt2Exception>();
        while (lost.Count < 2)
            await Task.Delay(10);
        // The first rank says it for all; when it is gone itself, each of the others does.
        string[] said = [.. lost.Where(why => why.Length > "0: ".Length)];
        await Assert.That(said.Length).IsEqualTo(gone == 0 ? 2 : 1);
        await Assert.That(said).All(why => why.Contains($"rank {gone} was lost at step 7"));
        Array.ForEach(all, peers => peers.Dispose());
    }

    [Test]
    public async Task ARankThatIsSilentIsNamed() {
        var port = FreePort();
        var lost = new BlockingCollection<string>();
        var first = Join(0, 2, port, Short, lost.Add);
        using var client = new TcpClient();
        while (!client.Connected) {
            try {
                client.Connect("127.0.0.1", port);
            } catch (SocketException) {
                await Task.Delay(10); // it does not listen yet
            }
        }
        client.GetStream().Write([.. Encoding.UTF8.GetBytes("key".PadRight(64)), .. BitConverter.GetBytes(1),
            .. BitConverter.GetBytes(2)]);
        using var peers = await first;
        var begin = Stopwatch.GetTimestamp();
        await Assert.That(lost.TryTake(out var why, Long)).IsTrue();
        await Assert.That(why).IsEqualTo("rank 1 has said nothing for 1 s at the start");
        await Assert.That(Stopwatch.GetElapsedTime(begin)).IsLessThan(1.5 * Short);
    }

    [Test]
    public async Task ARankThatDoesNotComeToAMeetingIsKnown() {
        var all = await All(4, Short);
        foreach (var peers in all)
            peers.Meetings = peers.Rank == 2 ? 6 : 7;
        await Task.Delay(Short / 2); // a few heartbeats
        await Assert.That(all[0].Absent).IsEqualTo(2);
        await Assert.That(all[1].Absent).IsNull(); // all that it knows is the first
        all[0].Meetings = 5;
        await Task.Delay(Short / 2);
        await Assert.That(all[2].Absent).IsEqualTo(0);
        Array.ForEach(all, peers => peers.Dispose());
    }

    [Test]
    public async Task ARankElsewhereIsNotWaitedForForever() {
        // It lives, so that its heart beats, but never comes to where the others agree.
        var all = await All(2, Short);
        var error = Assert.Throws<Gpt2Exception>(() => all[0].Sum([]));
        await Assert.That(error.Message).IsEqualTo("rank 0: expected rank 1 at the start, found it elsewhere for 1 s");
        Array.ForEach(all, peers => peers.Dispose());
    }
}

/// <summary>The binary among others, as far as that goes without a GPU.</summary>
public sealed class JobTests {
    const string Train = "train -i train_*.bin -j val.bin -b 1 -t 8 --device cpu";

    static Task<Result> Run(TemporaryFolder folder, string environment, string arguments = "") =>
        Gpt2Process.RunIn($"export {environment}; exec \"$@\"", folder.Path, $"{Train} {arguments}".Trim());

    static async Task IsRefused(Result result, params string[] parts) {
        await Assert.That(result.ExitCode).IsEqualTo(1).Because(result.ToString());
        await Assert.That(result.Sentences).Count().IsEqualTo(1).Because(result.ToString());
        foreach (var part in parts)
            await Assert.That(result.Sentences[0]).Contains(part);
    }

    [Test]
    [Arguments("RANK={0} WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={1}")]
    [Arguments("RANK={0} WORLD_SIZE=2 LOCAL_RANK={0} MASTER_ADDR=127.0.0.1 MASTER_PORT={1} TORCHELASTIC_RUN_ID=none")]
    [Arguments("OMPI_COMM_WORLD_RANK={0} OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK={0} " +
        "OMPI_COMM_WORLD_LOCAL_SIZE=2 PMIX_NAMESPACE=job{1}")]
    [Arguments("SLURM_PROCID={0} SLURM_NTASKS=2 SLURM_LOCALID={0} SLURM_JOB_ID={1} SLURM_STEP_NODELIST=localhost")]
    public async Task RanksMeetHoweverTheyAreStarted(string environment) {
        using var folder = new TemporaryFolder();
        var port = PeersTests.FreePort();
        var both = await Task.WhenAll(Enumerable.Range(0, 2)
            .Select(rank => Run(folder, string.Format(environment, rank, port), "--timeout 20")));
        // Each says that it has no GPU, or that the other is gone for that reason; the second not that the first is.
        var sentences = both.SelectMany(result => result.Sentences).ToArray();
        await Assert.That(sentences).Contains(sentence => sentence.Contains("expected a GPU for each of 2 ranks"));
        foreach (var result in both)
            await Assert.That(result.ExitCode).IsEqualTo(1).Because(result.ToString());
    }

    [Test]
    public async Task ARankAloneGivesUp() {
        using var folder = new TemporaryFolder();
        var port = PeersTests.FreePort();
        await IsRefused(await Run(folder, $"RANK=0 WORLD_SIZE=3 MASTER_PORT={port}", "--timeout 1"),
            "rank 0: expected rank 1 of 3", $"{port}", "1 s");
        await IsRefused(await Run(folder, $"SLURM_PROCID=2 SLURM_NTASKS=3 SLURM_JOB_NODELIST=127.0.0.[1-3],other " +
            $"MASTER_PORT={port}", "--timeout 1"), "rank 2: expected rank 0 on 127.0.0.1", $"{port}");
    }

    [Test]
    [Arguments("RANK=two WORLD_SIZE=2", "RANK two")]
    [Arguments("RANK=2 WORLD_SIZE=2", "RANK 1 2")]
    [Arguments("RANK=0 WORLD_SIZE=0", "WORLD_SIZE 1 0")]
    [Arguments("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_SIZE=2", "MASTER_ADDR")]
    public async Task AWrongEnvironmentIsRefused(string environment, string parts) {
        using var folder = new TemporaryFolder();
        await IsRefused(await Run(folder, environment), parts.Split(' '));
    }
}

/// <summary>The binary starting itself for each of three GPUs, which a driver of the tests pretends to have.</summary>
[RequiresKernels]
public sealed class LaunchTests {
    // Rank 2's GPU cannot be opened; rank 1 sleeps there, or dies.
    const string Driver = """
        #include <signal.h>
        #include <stdlib.h>
        #include <unistd.h>
        int cuInit(unsigned flags) { return 0; }
        int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
        int cuDeviceGetCount(int *count) { *count = 3; return 0; }
        int cuGetErrorName(int status, char **text) { *text = "CUDA_ERROR_OF_THE_TESTS"; return 0; }
        int cuGetErrorString(int status, char **text) { *text = "no such thing"; return 0; }
        int cuDeviceGet(int *device, int ordinal) {
            char *rank = getenv("RANK");
            if (*rank == '1' && getenv("DIES")) kill(getpid(), SIGKILL);
            if (*rank == '2' && !getenv("DIES") && !getenv("WAITS")) return 101;
            sleep(60);
            return 1;
        }
        """;

    static async Task<Gpt2Process> Start(TemporaryFolder folder, string environment, string arguments) {
        File.WriteAllText(folder["driver.c"], Driver);
        await Gpt2Process.RunIn("gcc -shared -fPIC -o libcuda.so.1 driver.c", folder.Path, "");
        return Gpt2Process.StartIn($"export LD_LIBRARY_PATH=$PWD {environment}; exec \"$@\"", folder.Path,
            $"train -i {Golden("tokens_train.bin")} {arguments}");
    }

    [Test]
    [Arguments("X=1", "rank 2: --device cuda: opening GPU 2: expected success, found CUDA_ERROR_OF_THE_TESTS")]
    [Arguments("DIES=1", "rank 1 was")]
    public async Task ARankThatFailsEndsAll(string environment, string sentence) {
        using var folder = new TemporaryFolder();
        using var run = await Start(folder, environment, "--gpus 3");
        var result = await run.End();
        await Assert.That(result.ExitCode).IsEqualTo(1).Because(result.ToString());
        await Assert.That(result.Error).Contains($"gpt2: {sentence}");
        await Assert.That(result.Error).DoesNotContain("   at ");
    }

    [Test]
    public async Task WhereThereAreSeveralGpusAllAreTakenAndAKilledParentTakesItsChildrenWithIt() {
        using var folder = new TemporaryFolder();
        using var run = await Start(folder, "WAITS=1", "--device auto");
        int[] children = [];
        for (var i = 0; i < 200 && children.Length < 3; i++) {
            await Task.Delay(50);
            children = run.Children();
        }
        await Assert.That(children.Length).IsEqualTo(3);
        run.Signal(Gpt2Process.Kill);
        for (var i = 0; i < 200 && children.Any(child => Directory.Exists($"/proc/{child}")); i++)
            await Task.Delay(50);
        await Assert.That(children.Any(child => Directory.Exists($"/proc/{child}"))).IsFalse();
    }

    [Test]
    public async Task MoreGpusThanThereAreAreRefused() {
        using var folder = new TemporaryFolder();
        using var run = await Start(folder, "X=1", "--gpus 4");
        var result = await run.End();
        await Assert.That(result.ExitCode).IsEqualTo(2);
        await Assert.That(result.Error).IsEqualTo("gpt2: --gpus: expected at most 3, found 4\n");
    }
}

/// <summary>Ranks with NCCL between them, which share one GPU.</summary>
[Category("gpu"), RequiresGpu, NotInParallel("gpu")]
public sealed class GpuRankTests {
    static readonly Config Small = new(MaxT: 64, V: 300, Vp: 304, L: 2, NH: 2, C: 128);

    const string Share = "export CUDA_VISIBLE_DEVICES=0 GPT2_SHARE_GPUS=1; exec \"$@\"";
    const string Data = "train -i train_*.bin -j val.bin -o run -t 64 -d 768 -l 1e-2 -u 2 -k constant -m 2 -g 0";

    static TemporaryFolder Inputs() => RankTests.Inputs(Small, 20_000);

    static async Task<double[]> Train(TemporaryFolder folder, string arguments) {
        var result = await Gpt2Process.RunIn(Share, folder.Path, $"{Data} {arguments}");
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        return RankTests.Numbers(result.Output);
    }

    static async Task Near(double[] found, double[] expected, double bound) {
        await Assert.That(found.Length).IsEqualTo(expected.Length);
        for (var i = 0; i < found.Length; i++)
            await Assert.That(RelativeError(found[i], expected[i])).IsLessThan(bound).Because($"{i}: {found[i]}");
    }

    static double Bound(string precision) => precision == "fp32" ? 1e-4 : 2e-2;

    [Test]
    [Arguments(2, 0, "bf16")]
    [Arguments(2, 1, "fp32")]
    [Arguments(3, 1, "bf16")]
    [Arguments(3, 1, "fp32")]
    [Arguments(4, 0, "fp32")]
    [Arguments(4, 1, "bf16")]
    public async Task RanksTrainAsOneDoes(int ranks, int zero, string precision) {
        using var folder = Inputs();
        var common = $"-e model.bin -x 6 -v 3 -n 0 --precision {precision}";
        var expected = await Train(folder, $"{common} --gpus 1 -b 12");
        Directory.Delete(folder["run"], recursive: true);
        var found = await Train(folder, $"{common} --gpus {ranks} -b {12 / ranks} -z {zero}");
        await Assert.That(expected.Length).IsEqualTo(6 * 2 + 3);
        await Near(found, expected, Bound(precision));
    }

    [Test]
    [Arguments("bf16")]
    [Arguments("fp32")]
    public async Task ARunGoesOnWithAnyNumberOfRanks(string precision) {
        using var folder = Inputs();
        var common = $"-v 0 -n 0 -b 3 --precision {precision}";
        var expected = await Train(folder, $"{common} -e model.bin -x 8 --gpus 4");
        Directory.Delete(folder["run"], recursive: true);
        await Train(folder, $"{common} -e model.bin -x 2 --gpus 4");
        await Train(folder, $"{common} -x 4 -y --gpus 2");
        await Train(folder, $"{common} -x 6 -y --gpus 1");
        await Near(await Train(folder, $"{common} -x 8 -y --gpus 4"), expected[^5..], Bound(precision));
    }

    [Test]
    public async Task TheStartTableTellsWhatARankHas() {
        using var folder = Inputs();
        async Task<double> Moments(int ranks) {
            var result = await Gpt2Process.RunIn(Share, folder.Path,
                $"{Data} -e model.bin -x 1 -v 0 -n 0 -b 3 -o run{ranks} --gpus {ranks}");
            await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
            return double.Parse(Regex.Match(result.Error, @"moments +(\d+\.\d+) MB").Groups[1].Value,
                CultureInfo.InvariantCulture);
        }
        await Assert.That(RelativeError(4 * await Moments(4), await Moments(1))).IsLessThan(0.1);
    }

    /// <summary>Ends a run of four ranks in some way after some steps; none of its processes must be left.</summary>
    static async Task<Result> EndAll(TemporaryFolder folder, string arguments, Action<Gpt2Process, int[]> end) {
        using var run = Gpt2Process.StartIn(Share, folder.Path,
            $"{Data} -e model.bin -x 100000 -v 0 -n 2 -b 3 --gpus 4{arguments}");
        await run.ReadToStep(5);
        var children = run.Children();
        await Assert.That(children.Length).IsEqualTo(4);
        end(run, children);
        var result = await run.End();
        foreach (var child in children)
            await Assert.That(Directory.Exists($"/proc/{child}")).IsFalse();
        return result;
    }

    [Test]
    [Arguments(0, 0)]
    [Arguments(1, 30)]
    [Arguments(2, 150)]
    [Arguments(3, 7)]
    public async Task ARankThatIsKilledEndsAllAndTheRunGoesOn(int rank, int milliseconds) {
        using var folder = Inputs();
        var result = await EndAll(folder, "", (run, children) => {
            Thread.Sleep(milliseconds);
            run.Signal(Gpt2Process.Kill, children[rank]);
        });
        await Assert.That(result.ExitCode).IsEqualTo(1).Because(result.ToString());
        await Assert.That(result.Error).Contains($"rank {rank} was");
        await Assert.That(result.Sentences.Length).IsLessThanOrEqualTo(2).Because(result.ToString());
        await Train(folder, "-x 100 -y -v 0 -n 0 -b 3 --gpus 2");
    }

    [Test]
    [Arguments(Gpt2Process.Terminate)]
    [Arguments(Gpt2Process.Interrupt)]
    public async Task ASignalToTheParentEndsInACheckpoint(int signal) {
        using var folder = Inputs();
        var result = await EndAll(folder, "", (run, _) => run.Signal(signal));
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        await Assert.That(result.Error).Contains("--resume");
    }

    [Test]
    public async Task AKilledParentTakesAllWithIt() {
        using var folder = Inputs();
        var result = await EndAll(folder, "", (run, children) => {
            run.Signal(Gpt2Process.Kill);
            for (var i = 0; i < 100 && children.Any(child => Directory.Exists($"/proc/{child}")); i++)
                Thread.Sleep(100);
        });
        await Assert.That(result.ExitCode).IsNotEqualTo(0);
    }

    [Test]
    public async Task ARankThatIsStuckIsNamedAfterTheTimeout() {
        using var folder = Inputs();
        var result = await EndAll(folder, " --timeout 3",
            (run, children) => run.Signal(Gpt2Process.Stop, children[2]));
        await Assert.That(result.ExitCode).IsEqualTo(1).Because(result.ToString());
        await Assert.That(result.Error).Matches(@"rank 2 has said nothing for 3 s at step \d+");
    }

    [Test]
    public async Task RanksOfMpirunJoin() {
        using var folder = Inputs();
        var result = await Gpt2Process.RunIn(
            "command -v mpirun >/dev/null || exit 77; export CUDA_VISIBLE_DEVICES=0; " +
            "mpirun --allow-run-as-root --oversubscribe -np 2 " +
            "bash -c 'NCCL_HOSTID=$OMPI_COMM_WORLD_RANK exec \"$@\"' bash \"$@\"",
            folder.Path, $"{Data} -e model.bin -x 3 -v 0 -n 0 -b 3");
        if (result.ExitCode == 77)
            Skip.Test("there is no mpirun");
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        await Assert.That(result.Lines.Count(line => line.Contains("step "))).IsEqualTo(3).Because(result.ToString());
    }
}
