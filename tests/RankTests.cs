using System.Collections.Concurrent;
using System.Net;
using System.Net.NetworkInformation;
using System.Net.Sockets;
using System.Security.Cryptography;
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
    (int First, int End) Part(Share share, int rank) => share.Owner == null
        ? ((int)(share.Whole.Count * rank / Size), (int)(share.Whole.Count * (rank + 1) / Size))
        : (0, share.Owner == rank ? (int)share.Whole.Count : 0);

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

    public void ReduceScatter(ReadOnlySpan<Share> shares) {
        meeting.Arrays[Rank] = [.. shares.ToArray().Select(share => share.Whole)];
        Meet();
        for (var a = 0; a < shares.Length; a++) {
            var (first, end) = Part(shares[a], Rank);
            if (shares[a].Part.Count != end - first)
                throw new InvalidOperationException($"a part of {shares[a].Part.Count} numbers, not {end - first}");
            SumOver(a, first, end).CopyTo(Floats(shares[a].Part));
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

    public void AllGather(ReadOnlySpan<Share> shares) {
        meeting.Arrays[Rank] = [.. shares.ToArray().Select(share => share.Whole)];
        Meet();
        for (var a = 0; a < shares.Length; a++) {
            for (var rank = 0; rank < Size; rank++) {
                var (first, end) = Part(shares[a], rank);
                if (rank != Rank)
                    Floats(meeting.Arrays[rank][a])[first..end].CopyTo(Floats(shares[a].Whole)[first..end]);
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
        bool resume = false, bool shuffle = true, int totalSequences = Sequences,
        OptimizerKind optimizer = OptimizerKind.AdamW) {
        using var output = new StringWriter(CultureInfo.InvariantCulture);
        ThreadRanks.Run(ranks, collective => {
            using var cpu = new Cpu(1);
            var options = new TrainOptions(folder["train_*.bin"], folder["val.bin"],
                resume ? null : folder["model.bin"], folder[name], B, Odd.MaxT, totalSequences * Odd.MaxT, steps,
                LearningRate: 1e-2f, Warmup: 2, FinalFraction: 1, WeightDecay: 0.1f, Schedule.Constant, ValEvery: 2,
                ValBatches: 3, SampleEvery: 0, GenTokens: 4, CheckpointEvery: 0, Keep: 1, resume, Recompute: 0,
                Overfit: false, shuffle, Seed: 42, Zero: zero, Optimizer: optimizer);
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
    [MatrixDataSource]
    public async Task RanksTrainAsOneDoes([Matrix(1, 2, 3, 4)] int ranks, [Matrix(0, 1)] int zero,
        [Matrix(OptimizerKind.AdamW, OptimizerKind.Muon)] OptimizerKind optimizer) {
        using var folder = Inputs();
        var expected = Train(folder, "one", 1, Sequences, 0, optimizer: optimizer);
        var found = Train(folder, "many", ranks, Sequences / ranks, zero, optimizer: optimizer);
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
    [Arguments(1, OptimizerKind.AdamW)]
    [Arguments(0, OptimizerKind.AdamW)]
    [Arguments(1, OptimizerKind.Muon)]
    [Arguments(0, OptimizerKind.Muon)]
    public async Task ARunGoesOnWithAnyNumberOfRanks(int zero, OptimizerKind optimizer) {
        using var folder = Inputs();
        var expected = Train(folder, "whole", 4, 3, zero, steps: 8, optimizer: optimizer);
        Train(folder, "parts", 4, 3, zero, steps: 2, optimizer: optimizer);
        foreach (var (ranks, steps) in ((int, int)[])[(2, 4), (1, 6), (3, 7)]) {
            var B = ranks == 3 ? 4 : 3;
            Train(folder, "parts", ranks, B, zero, steps, resume: true, optimizer: optimizer);
        }
        var found = Train(folder, "parts", 4, 3, 1 - zero, steps: 8, resume: true, optimizer: optimizer);
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
        long Bytes(int ranks, OptimizerKind optimizer) =>
            new Model(config, cpu, 1, 8, Purpose.Train, 0, ranks - 1, ranks, optimizer).Memory
                .Single(part => part.Name == "moments").Bytes;
        await Assert.That(Bytes(1, OptimizerKind.AdamW)).IsEqualTo(8 * config.ParameterCount);
        await Assert.That(Bytes(4, OptimizerKind.AdamW)).IsEqualTo(2 * config.ParameterCount);
        // Muon's matrices, 12·C² a layer, have one moment, and lie in the layers that a rank owns.
        var matrices = 12L * config.L * config.C * config.C;
        foreach (var ranks in (int[])[1, 3]) {
            await Assert.That(Bytes(ranks, OptimizerKind.Muon) * ranks)
                .IsEqualTo(8 * config.ParameterCount - 4 * matrices);
        }
    }

    [Test]
    [Arguments(OptimizerKind.Muon, OptimizerKind.AdamW)]
    [Arguments(OptimizerKind.AdamW, OptimizerKind.Muon)]
    public async Task AStateOfTheOtherOptimizerIsRefused(OptimizerKind from, OptimizerKind to) {
        using var folder = Inputs();
        Train(folder, "run", 1, 6, 1, steps: 1, optimizer: from);
        var error = Assert.Throws<Gpt2Exception>(() =>
            Train(folder, "run", 1, 6, 1, steps: 2, resume: true, optimizer: to));
        await Assert.That(error.Message).IsEqualTo($"{folder["run/state_00000001_00000.bin"]}: expected a state of " +
            $"--optimizer {to}, found one of --optimizer {from}");
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
        string key = "key", string host = "127.0.0.1") => Task.Factory.StartNew(() => new Peers(
            new Job(rank, size, rank, host, port, key), timeout, lost ?? (_ => { })), TaskCreationOptions.LongRunning);

    /// <summary>Connects as soon as somebody listens.</summary>
    static async Task<TcpClient> Connect(int port, string host = "127.0.0.1") {
        while (true) {
            var client = new TcpClient { ReceiveTimeout = (int)Long.TotalMilliseconds };
            try {
                await client.ConnectAsync(host, port);
                return client;
            } catch (SocketException) {
                client.Dispose();
                await Task.Delay(10);
            }
        }
    }

    static byte[] Greeting(int rank, int size = 2) => [.. BitConverter.GetBytes(rank), .. BitConverter.GetBytes(size),
        .. RandomNumberGenerator.GetBytes(32)];

    static byte[] Read(TcpClient client, int count) {
        var bytes = new byte[count];
        client.GetStream().ReadExactly(bytes);
        return bytes;
    }

    /// <summary>Greets by a protocol written anew: greetings both ways, then the other ranks' proof, then rank 0's.
    /// </summary>
    /// <returns>All that the other side has sent.</returns>
    static byte[] Greet(TcpClient client, int rank, int size = 2, string key = "key") {
        var own = Greeting(rank, size);
        client.GetStream().Write(own);
        var other = Read(client, own.Length);
        var proof = HMACSHA256.HashData(Encoding.UTF8.GetBytes(key), (byte[])[.. own, .. other]);
        if (rank > 0)
            client.GetStream().Write(proof);
        byte[] said = [.. other, .. Read(client, proof.Length)];
        if (rank == 0)
            client.GetStream().Write(proof);
        return said;
    }

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
    [Arguments(1, 2, "another")]
    [Arguments(1, 3, "key")]
    [Arguments(2, 3, "key")]
    public async Task WhoIsNotOfTheJobIsTurnedAway(int rank, int size, string key) {
        var port = FreePort();
        var first = Join(0, 2, port, Long);
        var error = await Assert.That(async () => await Join(rank, size, port, Short, key: key))
            .Throws<Gpt2Exception>();
        await Assert.That(error!.Message).IsEqualTo($"rank {rank}: expected rank 0 on 127.0.0.1:{port} (it is " +
            $"another job, by GPT2_JOB_KEY or size, or has a rank {rank} already) in 1 s, found none");
        await MeetsAt(port, first);
    }

    [Test]
    public async Task ARankThatIsThereAlreadyIsTurnedAway() {
        var port = FreePort();
        var first = Join(0, 3, port, Long);
        var second = await Join(1, 3, port, Long);
        await Assert.That(async () => await Join(1, 3, port, Short)).Throws<Gpt2Exception>();
        Peers[] all = [await Join(2, 3, port, Long), await first, second];
        await OnEach(all, peers => peers.Sum([]));
        Array.ForEach(all, peers => peers.Dispose());
    }

    /// <summary>Rank 1 of 2 comes, and both can work.</summary>
    static async Task MeetsAt(int port, Task<Peers> first) {
        Peers[] both = [await Join(1, 2, port, Long), await first];
        await OnEach(both, peers => peers.Sum([]));
        Array.ForEach(both, peers => peers.Dispose());
    }

    /// <summary>What strangers may send in place of a greeting, part by part.</summary>
    static byte[][] Strange(string what, byte[] recorded) => what switch {
        "nothing" => [],
        "slowly" => [.. Greeting(1).Concat(recorded).Select(value => (byte[])[value])],
        "text" => [Encoding.ASCII.GetBytes("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")],
        "long" => [new byte[1 << 20]],
        "noProof" => [Greeting(1), new byte[32]],
        "noRank" => [Greeting(int.MinValue), new byte[32]],
        "hugeRank" => [Greeting(int.MaxValue, int.MaxValue), new byte[32]],
        "replay" => [recorded],
        _ => throw new ArgumentException(what),
    };

    [Test]
    [Arguments("nothing")]
    [Arguments("slowly")]
    [Arguments("text")]
    [Arguments("long")]
    [Arguments("noProof")]
    [Arguments("noRank")]
    [Arguments("hugeRank")]
    [Arguments("replay")]
    public async Task StrangersEndTheirOwnGreetingsAlone(string what) {
        // What a true rank 1 has sent to the same rank 0.
        byte[] recorded;
        using (var listener = new TcpListener(IPAddress.Loopback, 0)) {
            listener.Start();
            var true1 = Join(1, 2, ((IPEndPoint)listener.LocalEndpoint).Port, Short);
            using var server = await listener.AcceptTcpClientAsync();
            server.GetStream().Write(Greeting(0));
            recorded = Read(server, 40 + 32);
            server.Dispose();
            await Assert.That(async () => await true1).Throws<Gpt2Exception>();
        }
        var port = FreePort();
        var first = Join(0, 2, port, Long);
        var strangers = await Task.WhenAll(Enumerable.Range(0, 100).Select(_ => Connect(port)));
        using var stop = new CancellationTokenSource();
        var sending = strangers.Select(async stranger => {
            try {
                foreach (var part in Strange(what, recorded)) {
                    await stranger.GetStream().WriteAsync(part, stop.Token);
                    await Task.Delay(500, stop.Token);
                }
            } catch (Exception e) when (e is IOException or OperationCanceledException) {
                // It was turned away, or the test is over.
            }
        }).ToArray();
        await Task.Delay(200);
        var begin = Stopwatch.GetTimestamp();
        await MeetsAt(port, first);
        await Assert.That(Stopwatch.GetElapsedTime(begin)).IsLessThan(TimeSpan.FromSeconds(2));
        stop.Cancel();
        await Task.WhenAll(sending);
        Array.ForEach(strangers, stranger => stranger.Dispose());
    }

    [Test]
    public async Task NothingThatIsSentHoldsTheKeyNorFitsAnotherGreeting() {
        var port = FreePort();
        var first = Join(0, 3, port, Long, key: "a secret of this job");
        byte[][] said = new byte[2][];
        TcpClient[] clients = [await Connect(port), await Connect(port)];
        for (var i = 0; i < 2; i++)
            said[i] = Greet(clients[i], i + 1, 3, "a secret of this job");
        using var peers = await first;
        await Assert.That(Encoding.Latin1.GetString(said[0])).DoesNotContain("secret");
        await Assert.That(said[0][8..40].SequenceEqual(said[1][8..40])).IsFalse(); // a challenge of its own
        await Assert.That(said[0][40..].SequenceEqual(said[1][40..])).IsFalse();
        Array.ForEach(clients, client => client.Dispose());
    }

    [Test]
    [Arguments("silent")]
    [Arguments("slow")]
    [Arguments("echo")]
    [Arguments("text")]
    [Arguments("anotherKey")]
    [Arguments("replay")]
    public async Task AFalseFirstRankIsNotBelieved(string what) {
        // What a true rank 0 has sent to a true rank 1.
        var truePort = FreePort();
        var first = Join(0, 2, truePort, Long);
        using var second = await Connect(truePort);
        var recorded = Greet(second, 1);
        (await first).Dispose();
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        using var stop = new CancellationTokenSource();
        async Task Serve(TcpClient client) {
            try {
                var stream = client.GetStream();
                if (what == "text")
                    await stream.WriteAsync(Encoding.ASCII.GetBytes(new string('x', 200)), stop.Token);
                if (what == "replay")
                    await stream.WriteAsync(recorded, stop.Token);
                if (what == "echo")
                    await stream.CopyToAsync(stream, stop.Token);
                for (var i = 0; what == "slow" && i < 72; i++) {
                    await stream.WriteAsync((byte[])[0], stop.Token);
                    await Task.Delay(100, stop.Token);
                }
                if (what == "anotherKey")
                    await Task.Run(() => Greet(client, 0, key: "another"), stop.Token);
                await Task.Delay(Long, stop.Token);
            } catch (Exception e) when (e is IOException or OperationCanceledException) {
                // It was turned away, or the test is over.
            }
            client.Dispose();
        }
        async Task Accept() {
            while (true)
                _ = Serve(await listener.AcceptTcpClientAsync(stop.Token));
        }
        _ = Accept();
        var begin = Stopwatch.GetTimestamp();
        var port = ((IPEndPoint)listener.LocalEndpoint).Port;
        var error = await Assert.That(async () => await Join(1, 2, port, 2 * Short)).Throws<Gpt2Exception>();
        await Assert.That(error!.Message).StartsWith("rank 1: expected rank 0 on 127.0.0.1:").And
            .Contains("(it is another job, by GPT2_JOB_KEY or size, or has a rank 1 already) in 2 s");
        await Assert.That(Stopwatch.GetElapsedTime(begin)).IsBetween(1.9 * Short, 3 * Short);
        stop.Cancel();
    }

    static byte[] Message(int length, int meetings, int bytes) =>
        [.. BitConverter.GetBytes(length), .. BitConverter.GetBytes(meetings), .. new byte[bytes]];

    /// <summary>A rank that has proved itself and then sends what no rank does ends the job with a sentence.</summary>
    [Test]
    [Arguments(0, "it sent a message of -1 bytes")]
    [Arguments(1, "it sent a message of -1 bytes")]
    [Arguments(0, "it sent a message of 2147483647 bytes")]
    [Arguments(1, "it sent a message of 2147483647 bytes")]
    [Arguments(0, "it sent a message of 1025 bytes")]
    [Arguments(1, "it sent more than it was asked for")]
    [Arguments(0, "its connection ended")]
    [Arguments(1, "its connection ended")]
    [Arguments(1, "")]
    public async Task ABrokenRankIsLost(int rank, string why) {
        var bytes = why switch {
            "" => Message(0, -1, 0), // as rank 0 tells that it has said why
            _ when why.Contains("-1") => Message(-1, 0, 0),
            _ when why.Contains("2147483647") => Message(int.MaxValue, 0, 0),
            _ when why.Contains("1025") => Message(1025, 0, 1025),
            _ when why.Contains("more") => [.. Enumerable.Repeat(Message(1024, 0, 1024), 20).SelectMany(x => x)],
            _ => Message(16, 0, 3), // and then its end
        };
        var lost = new BlockingCollection<string>();
        Peers peers;
        TcpClient broken;
        if (rank == 1) {
            var port = FreePort();
            var first = Join(0, 2, port, Long, lost.Add);
            Greet(broken = await Connect(port), 1);
            peers = await first;
        } else {
            using var listener = new TcpListener(IPAddress.Loopback, 0);
            listener.Start();
            var second = Join(1, 2, ((IPEndPoint)listener.LocalEndpoint).Port, Long, lost.Add);
            Greet(broken = await listener.AcceptTcpClientAsync(), 0);
            peers = await second;
        }
        var memory = GC.GetTotalAllocatedBytes();
        try {
            broken.GetStream().Write(bytes);
        } catch (IOException) {
            // The other side has closed.
        }
        if (why is "" or "its connection ended")
            broken.Dispose();
        await Assert.That(lost.TryTake(out var said, Long)).IsTrue();
        why = why == "" ? "its connection ended" : why;
        await Assert.That(said).IsEqualTo($"rank {rank} was lost at the start: {why}");
        await Assert.That(GC.GetTotalAllocatedBytes() - memory).IsLessThan(1 << 30); // of all tests that run now
        peers.Dispose();
        broken.Dispose();
    }

    [Test]
    public async Task AMessageOfAnotherLengthIsAnError() {
        var port = FreePort();
        var first = Join(0, 2, port, Long);
        using var client = await Connect(port);
        Greet(client, 1);
        using var peers = await first;
        client.GetStream().Write(Message(3, 0, 3));
        var error = Assert.Throws<Gpt2Exception>(() => peers.Sum([1]));
        await Assert.That(error.Message).IsEqualTo(
            "rank 0: expected rank 1 at the start, found 3 bytes from it in place of 16");
    }

    [Test]
    public async Task ALongTimeoutIsNoError() {
        var port = FreePort();
        Peers[] both = await Task.WhenAll(Enumerable.Range(0, 2)
            .Select(rank => Join(rank, 2, port, TimeSpan.FromSeconds(1_000_000))));
        await OnEach(both, peers => peers.Sum([]));
        Array.ForEach(both, peers => peers.Dispose());
    }

    [Test]
    [Arguments("127.0.0.1", "127.0.0.1")]
    [Arguments("127.0.1.1", "127.0.1.1")]
    [Arguments("localhost", "127.0.0.1")]
    [Arguments("LOCALHOST", "127.0.0.1")]
    [Arguments("::1", "::1")]
    [Arguments("[::1]", "::1")]
    [Arguments("HOST", "::")]
    public async Task LoopbackStaysLoopback(string host, string address) {
        var port = FreePort();
        host = host == "HOST" ? Dns.GetHostName() : host;
        if (host == "localhost" && address == "::" || address.Contains(':') && !File.Exists("/proc/net/if_inet6"))
            Skip.Test("this machine has no name of its own, or no IPv6");
        var first = Join(0, 2, port, Long, host: host);
        IPEndPoint[] found = [];
        while (found.Length == 0) {
            await Task.Delay(10);
            var listeners = IPGlobalProperties.GetIPGlobalProperties().GetActiveTcpListeners();
            found = [.. listeners.Where(listener => listener.Port == port)];
        }
        await Assert.That(found.Length).IsEqualTo(1);
        await Assert.That(found[0].Address).IsEqualTo(IPAddress.Parse(address));
        Peers[] both = [await Join(1, 2, port, Long, host: host), await first];
        await OnEach(both, peers => peers.Sum([]));
        Array.ForEach(both, peers => peers.Dispose());
    }

    [Test]
    public async Task ARankThatNeverComesIsNamed() {
        var port = FreePort();
        var begin = Stopwatch.GetTimestamp();
        var first = Join(0, 3, port, 2 * Short);
        using var second = await Join(1, 3, port, 2 * Short);
        // Not even those who hold their greeting back have it wait longer.
        var strangers = await Task.WhenAll(Enumerable.Range(0, 5).Select(_ => Connect(port)));
        var error = await Assert.That(async () => await first).Throws<Gpt2Exception>();
        await Assert.That(error!.Message).IsEqualTo($"rank 0: expected rank 2 of 3 on port {port} in 2 s, found none");
        await Assert.That(Stopwatch.GetElapsedTime(begin)).IsBetween(1.9 * Short, 3 * Short);
        Array.ForEach(strangers, stranger => stranger.Dispose());
        error = await Assert.That(async () => await Join(2, 3, FreePort(), Short)).Throws<Gpt2Exception>();
        await Assert.That(error!.Message).StartsWith("rank 2: expected rank 0 on 127.0.0.1:").And
            .Contains("(Connection refused)");
        error = await Assert.That(async () => await Join(0, 20, FreePort(), Short)).Throws<Gpt2Exception>();
        await Assert.That(error!.Message).StartsWith("rank 0: expected ranks 1, 2, 3, 4, 5, 6, 7, 8, ... of 20 on");
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
        using var client = await Connect(port);
        Greet(client, 1);
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
    const string Train = "train -i train_*.bin -j val.bin -b 1 -t 8";

    static Task<Result> Run(
        TemporaryFolder folder, string environment, string arguments = "", string command = Train) =>
        Gpt2Process.RunIn($"export {environment}; exec \"$@\"", folder.Path, $"{command} {arguments}".Trim());

    static async Task IsRefused(Result result, params string[] parts) {
        await Assert.That(result.ExitCode).IsEqualTo(1).Because(result.ToString());
        await Assert.That(result.Sentences).Count().IsEqualTo(1).Because(result.ToString());
        foreach (var part in parts)
            await Assert.That(result.Sentences[0]).Contains(part);
    }

    [Test]
    [Arguments("RANK={0} WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={1}")]
    [Arguments("RANK={0} WORLD_SIZE=2 LOCAL_RANK={0} MASTER_ADDR=127.0.0.1 MASTER_PORT=$(({1}-1)) " +
        "TORCHELASTIC_RUN_ID=none")]
    [Arguments("OMPI_COMM_WORLD_RANK={0} OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK={0} " +
        "OMPI_COMM_WORLD_LOCAL_SIZE=2 PMIX_NAMESPACE=job{1}")]
    [Arguments("PMI_RANK={0} PMI_SIZE=2 MPI_LOCALRANKID={0} MPI_LOCALNRANKS=2 MASTER_PORT={1}")]
    [Arguments("PMI_RANK={0} PMI_SIZE=2 MASTER_ADDR=LOCALHOST MASTER_PORT={1}")]
    [Arguments("SLURM_PROCID={0} SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID={0} SLURM_JOB_ID={1} SLURM_STEP_ID=0 " +
        "SLURM_STEP_NODELIST=localhost")]
    [Arguments("SLURM_PROCID={0} SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID={0} SLURM_JOB_ID={1} SLURM_STEP_ID=3 " +
        "SLURM_STEP_NODELIST=localhost PMI_RANK={0} PMI_SIZE=2")]
    [Arguments("PMI_RANK={0} PMI_SIZE=2 MPI_LOCALRANKID={0} MPI_LOCALNRANKS=2 MASTER_PORT={1} SLURM_PROCID=0 " +
        "SLURM_STEP_NUM_TASKS=1 SLURM_STEP_ID=0")]
    [Arguments("RANK={0} WORLD_SIZE=2 MASTER_ADDR=::1 MASTER_PORT={1} GPT2_JOB_KEY=secret")]
    [Arguments("RANK={0} WORLD_SIZE=2 MASTER_ADDR=127.0.1.1 MASTER_PORT={1} SLURM_PROCID=0 SLURM_NTASKS=1")]
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
            $"rank 0: expected ranks 1, 2 of 3 on port {port} in 1 s");
        await IsRefused(await Run(folder, "SLURM_STEP_ID=0 SLURM_PROCID=2 SLURM_STEP_NUM_TASKS=3 " +
            $"SLURM_STEP_NODELIST=127.0.0.[1-3],other MASTER_PORT={port}", "--timeout 1"),
            $"rank 2: expected rank 0 on 127.0.0.1:{port} (Connection refused) in 1 s");
        await IsRefused(await Run(folder, $"RANK=1 WORLD_SIZE=2 MASTER_ADDR=no.such.invalid MASTER_PORT={port}",
            "--timeout 1"), $"rank 1: expected rank 0 on no.such.invalid:{port} (");
    }

    [Test]
    public async Task WhoWaitsSaysSoOnce() {
        using var folder = new TemporaryFolder();
        int[] ports = [PeersTests.FreePort(), 0, PeersTests.FreePort()];
        var begin = Stopwatch.GetTimestamp();
        var results = await Task.WhenAll(((int[])[0, 2]).Select(rank =>
            Run(folder, $"RANK={rank} WORLD_SIZE=4 MASTER_PORT={ports[rank]}", "--timeout 7")));
        await Assert.That(Stopwatch.GetElapsedTime(begin).TotalSeconds).IsBetween(6.9, 9);
        await Assert.That(results[0].Sentences.Length).IsEqualTo(2).Because(results[0].ToString());
        await Assert.That(results[1].Sentences.Length).IsEqualTo(2).Because(results[1].ToString());
        await Assert.That(results[0].Error).StartsWith(
            $"gpt2: rank 0: waiting for ranks 1, 2, 3 of 4 on port {ports[0]}\n");
        await Assert.That(results[1].Error).StartsWith(
            $"gpt2: rank 2: waiting for rank 0 on 127.0.0.1:{ports[2]} (Connection refused)\n");
    }

    [Test]
    public async Task WithoutOpenSslRanksCannotMeet() {
        using var folder = new TemporaryFolder();
        foreach (var name in (string[])["libssl.so.3", "libssl.so.1.1"])
            File.WriteAllText(folder[name], "");
        await IsRefused(await Run(folder, "RANK=0 WORLD_SIZE=2 LD_LIBRARY_PATH=$PWD"), "OpenSSL", "libssl.so.3");
    }

    const string Torch = "RANK=3 WORLD_SIZE=8 LOCAL_RANK=3 MASTER_ADDR=nosuch MASTER_PORT=1 TORCHELASTIC_RUN_ID=none";
    const string OpenMpi = "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_SIZE=2";
    const string Mpich = "PMI_RANK=0 PMI_SIZE=8 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=8";
    const string Slurm = "SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=8 SLURM_JOB_ID=5 SLURM_JOB_NODELIST=localhost";

    [Test]
    [Arguments(Torch, "--gpus 1")]
    [Arguments(Torch, "--device cpu")]
    [Arguments("RANK=x WORLD_SIZE=y", "--gpus 1")]
    [Arguments(OpenMpi, "--gpus 1")]
    [Arguments(OpenMpi, "--device cpu --gpus 1")]
    [Arguments(Mpich, "--device cpu")]
    [Arguments($"{Slurm} SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=8", "--gpus 1")]
    [Arguments(Slurm, "")]
    [Arguments($"{Slurm} SLURM_STEP_ID=4294967290", "")]
    [Arguments($"{Slurm} SLURM_STEP_ID=4294967291 SLURM_STEP_NUM_TASKS=8", "")]
    [Arguments($"{Slurm} SLURM_STEP_ID=batch SLURM_STEP_NUM_TASKS=8", "")]
    [Arguments($"{Slurm} SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1", "")]
    [Arguments("RANK=5", "")]
    [Arguments("WORLD_SIZE=8", "")]
    [Arguments("PMI_RANK=0 PMI_SIZE=1", "")]
    public async Task ThisIsAnOrdinaryRun(string environment, string arguments) {
        using var folder = Folders.Inputs();
        const string run = "train -e model.bin -i train_0.bin -j val.bin -b 2 -t 16 -x 1 -v 0 -g 0 -o out";
        var result = await Run(folder, environment, $"--timeout 1 {arguments}".Trim(), run);
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        await Assert.That(result.Lines[0]).StartsWith("step    1/1");
    }

    [Test]
    [Arguments("RANK=two WORLD_SIZE=2", "RANK two")]
    [Arguments("RANK=2 WORLD_SIZE=2", "RANK 1 2")]
    [Arguments("RANK=0 WORLD_SIZE=0", "WORLD_SIZE 1 0")]
    [Arguments("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_SIZE=2", "MASTER_ADDR")]
    [Arguments("PMI_RANK=0 PMI_SIZE=4 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=2", "MASTER_ADDR")]
    [Arguments("RANK=0 WORLD_SIZE=2147483647", "WORLD_SIZE 4194304 2147483647")]
    [Arguments("RANK=0 WORLD_SIZE=2 MASTER_PORT=0", "MASTER_PORT 65535 0")]
    [Arguments("RANK=0 WORLD_SIZE=2 MASTER_PORT=65536", "MASTER_PORT 65535 65536")]
    [Arguments("RANK=0 WORLD_SIZE=2 MASTER_PORT=65535 TORCHELASTIC_RUN_ID=none", "MASTER_PORT 65534 65535")]
    [Arguments("RANK=1 WORLD_SIZE=2 MASTER_ADDR=0.0.0.0", "MASTER_ADDR 0.0.0.0")]
    [Arguments("RANK=1 WORLD_SIZE=2 MASTER_ADDR=host:123", "MASTER_ADDR host:123")]
    [Arguments("RANK=0 WORLD_SIZE=2 MASTER_ADDR=$(printf 'a%.0s' {1..300})", "MASTER_ADDR aaa")]
    [Arguments("GPT2_PARENT=1", "GPT2_PARENT")]
    [Arguments("GPT2_PARENT=$$", "GPT2_PARENT")]
    [Arguments("GPT2_PARENT=$PPID", "GPT2_PARENT")]
    [Arguments("GPT2_PARENT=x", "GPT2_PARENT x")]
    [Arguments("GPT2_PARENT=$PPID WORLD_SIZE=1 RANK=0", "GPT2_PARENT")]
    [Arguments("GPT2_PARENT=4000000 RANK=0 WORLD_SIZE=2", "GPT2_PARENT 4000000")]
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
        #include <fcntl.h>
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
            open(rank, O_CREAT | O_WRONLY, 0666); // a file that tells that this rank has come here
            if (*rank == '1' && getenv("DIES")) kill(getpid(), SIGKILL);
            if (*rank == '2' && !getenv("DIES") && !getenv("WAITS")) return 101;
            sleep(60);
            return 1;
        }
        """;

    static async Task<Gpt2Process> Start(TemporaryFolder folder, string environment, string arguments,
        string command = "exec") {
        File.WriteAllText(folder["driver.c"], Driver);
        await Gpt2Process.RunIn("gcc -shared -fPIC -o libcuda.so.1 driver.c", folder.Path, "");
        return Gpt2Process.StartIn($"export LD_LIBRARY_PATH=$PWD {environment}; {command} \"$@\"", folder.Path,
            $"train -i {Golden("tokens_train.bin")} {arguments}".Trim());
    }

    /// <summary>Whatever a launcher has left in the environment, each rank is started once and starts nothing. As many
    /// processes as a machine can bear are allowed, to a user of their own, should a child start children.</summary>
    [Test]
    [Arguments("RANK=0 WORLD_SIZE=1", "")]
    [Arguments("RANK=0", "")]
    [Arguments("RANK=7 WORLD_SIZE=1 LOCAL_RANK=7 MASTER_ADDR=nosuch MASTER_PORT=1 TORCHELASTIC_RUN_ID=none", "")]
    [Arguments("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=nosuch MASTER_PORT=1 GPT2_JOB_KEY=mine", "--gpus 3")]
    [Arguments("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1 PMIX_NAMESPACE=job", "")]
    [Arguments("PMI_RANK=0 PMI_SIZE=1 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=1", "")]
    [Arguments("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0 SLURM_JOB_ID=5", "")]
    [Arguments("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_ID=0", "")]
    [Arguments("GPT2_SHARE_GPUS=1 NCCL_HOSTID=mine RANK=0 WORLD_SIZE=1", "")]
    public async Task ChildrenNeverLaunch(string environment, string arguments) {
        using var folder = new TemporaryFolder();
        File.Copy(Gpt2Process.Binary, folder["gpt2"]);
        var threads = File.ReadAllText("/proc/loadavg").Split(' ', '/')[4];
        var user = Environment.IsPrivilegedProcess ? "setpriv --reuid 65534 --regid 65534 --clear-groups" : "";
        using var run = await Start(folder, $"WAITS=1 {environment}", arguments,
            $"chmod 777 .; ulimit -u $(({threads} + 300)); shift; exec {user} ./gpt2");
        string Come() => string.Join(' ', Directory.GetFiles(folder.Path).Select(path => Path.GetFileName(path))
            .Where(name => int.TryParse(name, out _)).Order());
        for (var i = 0; i < 200 && Come().Length < 5; i++)
            await Task.Delay(50);
        var children = run.Children();
        try {
            await Assert.That(Come()).IsEqualTo("0 1 2");
            await Assert.That(children.Length).IsEqualTo(3);
            foreach (var child in children) {
                var started = Directory.GetDirectories($"/proc/{child}/task")
                    .Select(task => File.ReadAllText($"{task}/children"));
                await Assert.That(string.Concat(started)).IsEqualTo("");
                var lines = File.ReadAllText($"/proc/{child}/environ").Split('\0', '\n');
                var variables = lines.Where(line => Regex.IsMatch(line,
                    "^(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_|GPT2_(JOB|PARENT)|NCCL_HOSTID|.*(MPI|SLURM|TORCH))"));
                var found = string.Join(' ', variables.Order(StringComparer.Ordinal));
                await Assert.That(found).Matches($"^GPT2_JOB_KEY=[0-9a-f]{{32}} GPT2_PARENT=\\d+ LOCAL_RANK=(.) " +
                    "MASTER_ADDR=127.0.0.1 MASTER_PORT=\\d+ (NCCL_HOSTID=rank \\1 )?RANK=\\1 WORLD_SIZE=3$");
            }
        } finally {
            run.Signal(Gpt2Process.Kill); // which takes the children with it
            await run.End();
        }
    }

    [Test]
    [Arguments("X=1", "rank 2: --device cuda: opening GPU 2: expected success, found CUDA_ERROR_OF_THE_TESTS")]
    [Arguments("DIES=1", "rank 1 was")]
    [Arguments("DIES=1; trap '' CHLD", "rank 1 was")] // and SIGCHLD is ignored
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
    [Arguments(1)]
    [Arguments(Gpt2Process.Interrupt)]
    [Arguments(Gpt2Process.Terminate)]
    public async Task SignalsArePassedOn(int signal) {
        using var folder = new TemporaryFolder();
        using var run = await Start(folder, "WAITS=1", "--gpus 3");
        for (var i = 0; i < 200 && !File.Exists(folder["2"]); i++)
            await Task.Delay(50);
        run.Signal(signal);
        var result = await run.End();
        await Assert.That(result.ExitCode).IsEqualTo(1).Because(result.ToString());
        await Assert.That(result.Error).Matches(@"^(gpt2: rank \d was (lost|ended) .*\n)*$"); // the first that is seen
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
    const string Data = "train -i train_*.bin -j val.bin -o run -t 64 -d 768 -l 1e-2 -u 2 -k constant -m 2 -g 0 " +
        "--optimizer adamw";

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
    [Arguments(2, 0, "bf16", "adamw")]
    [Arguments(2, 1, "fp32", "adamw")]
    [Arguments(3, 1, "bf16", "adamw")]
    [Arguments(3, 1, "fp32", "adamw")]
    [Arguments(4, 0, "fp32", "adamw")]
    [Arguments(4, 1, "bf16", "adamw")]
    [Arguments(2, 0, "fp32", "muon")]
    [Arguments(2, 1, "fp32", "muon")]
    [Arguments(2, 1, "bf16", "muon")]
    [Arguments(3, 1, "fp32", "muon")]
    [Arguments(4, 1, "bf16", "muon")]
    public async Task RanksTrainAsOneDoes(int ranks, int zero, string precision, string optimizer) {
        using var folder = Inputs();
        var common = $"-e model.bin -x 6 -v 3 -n 0 --precision {precision} --optimizer {optimizer}";
        var expected = await Train(folder, $"{common} --gpus 1 -b 12");
        Directory.Delete(folder["run"], recursive: true);
        var found = await Train(folder, $"{common} --gpus {ranks} -b {12 / ranks} -z {zero}");
        await Assert.That(expected.Length).IsEqualTo(6 * 2 + 3);
        await Near(found, expected, Bound(precision));
    }

    [Test]
    [Arguments("bf16", "adamw")]
    [Arguments("fp32", "adamw")]
    [Arguments("bf16", "muon")]
    [Arguments("fp32", "muon")]
    public async Task ARunGoesOnWithAnyNumberOfRanks(string precision, string optimizer) {
        using var folder = Inputs();
        var common = $"-v 0 -n 0 -b 3 --precision {precision} --optimizer {optimizer}";
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
