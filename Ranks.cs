using System.Collections;
using System.Collections.Concurrent;
using System.Diagnostics;
using System.IO.Hashing;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using System.Text.RegularExpressions;
using static Gpt2.Driver;
using static Gpt2.Gpt2Exception;
using static Gpt2.NcclApi;

namespace Gpt2;

/// <summary>Which device computes.</summary>
public enum DeviceKind { Auto, Cuda, Cpu }

/// <summary>The processes that train together, a device each. What is summed is summed in one order, and all ranks have
/// the same result. Tensors are worked on beside the device's own work: after what it was given before, and before what
/// it is given after <see cref="Join"/>.</summary>
public interface ICollective : IDisposable {
    /// <summary>This process among them, from 0 on.</summary>
    int Rank { get; }
    /// <summary>How many they are.</summary>
    int Size { get; }
    /// <summary>Where the run is, for messages: "step 7".</summary>
    string Place { set; }
    /// <summary>Sums numbers over ranks, when all have come here.</summary>
    void Sum(Span<double> values);
    /// <summary>The same for one number.</summary>
    double Sum(double value) {
        Sum(new Span<double>(ref value));
        return value;
    }
    /// <summary>Sums each array over ranks.</summary>
    void AllReduce(ReadOnlySpan<Tensor> arrays);
    /// <summary>Sums each array over ranks, of which this rank gets its part (<see cref="Config.Cuts"/>).</summary>
    void ReduceScatter(ReadOnlySpan<Tensor> arrays, ReadOnlySpan<Tensor> parts);
    /// <summary>Completes each array, of which each rank has its part.</summary>
    void AllGather(ReadOnlySpan<Tensor> arrays);
    /// <summary>Has the device's later work wait for all this.</summary>
    void Join();
}

/// <summary>One process alone.</summary>
public sealed class Alone : ICollective {
    public int Rank => 0;
    public int Size => 1;
    public string Place { set { } }
    public void Sum(Span<double> values) { }
    public void AllReduce(ReadOnlySpan<Tensor> arrays) { }
    public void ReduceScatter(ReadOnlySpan<Tensor> arrays, ReadOnlySpan<Tensor> parts) { }
    public void AllGather(ReadOnlySpan<Tensor> arrays) { }
    public void Join() { }
    public void Dispose() { }
}

/// <summary>This process among those that train together, which we, torchrun, mpirun or srun started.</summary>
internal sealed partial record Job(int Rank, int Size, int LocalRank, string Host, int Port, string Key) {
    const string Own = "GPT2_JOB_KEY", Parent = "GPT2_PARENT";
    const int Terminate = 15, Kill = 9;

    static string? Variable(string name) =>
        Environment.GetEnvironmentVariable(name) is { Length: > 0 } text ? text : null;

    static int? Number(string name, int least = 0) => Variable(name) is not { } text ? null
        : int.TryParse(text, out var number) && number >= least ? number
        : throw new Gpt2Exception($"{name}: expected a number from {least} on, found '{text}'");

    /// <summary>What the environment says; null for a process alone.</summary>
    public static Job? OfEnvironment() {
        var (rank, size, local) = (Number("RANK"), Number("WORLD_SIZE", 1), Number("LOCAL_RANK"));
        var (port, host, id) = (Number("MASTER_PORT", 1), Variable("MASTER_ADDR"), Variable("TORCHELASTIC_RUN_ID"));
        if (rank != null && id != null)
            port++; // torchrun itself listens at the port
        if (rank == null && Number("OMPI_COMM_WORLD_RANK") is { } ompi) {
            (rank, size, local) = (ompi, Number("OMPI_COMM_WORLD_SIZE", 1), Number("OMPI_COMM_WORLD_LOCAL_RANK"));
            id = Variable("PMIX_NAMESPACE") ?? Variable("OMPI_MCA_ess_base_jobid");
            if (host == null && Number("OMPI_COMM_WORLD_LOCAL_SIZE") != size)
                throw new Gpt2Exception("MASTER_ADDR: expected rank 0's host (mpirun -x MASTER_ADDR=...), found none");
        } else if (rank == null && Number("SLURM_PROCID") is { } slurm) {
            (rank, size, local) = (slurm, Number("SLURM_NTASKS", 1), Number("SLURM_LOCALID"));
            id = Variable("SLURM_JOB_ID");
            host ??= FirstHost(Variable("SLURM_STEP_NODELIST") ?? Variable("SLURM_JOB_NODELIST"));
        }
        if (rank == null || size is null or 1)
            return null;
        if (rank >= size)
            throw new Gpt2Exception($"RANK: expected 0 to {size - 1}, found {rank}");
        id ??= "";
        const int firstPort = 20_000, ports = 10_000;
        port ??= firstPort + (int)(XxHash3.HashToUInt64(Encoding.UTF8.GetBytes(id)) % ports);
        if (Number(Parent) is { } parent) {
            const int deathSignal = 1;
            // Signals of the terminal reach the parent alone, which passes them on; the children end with it.
            _ = setpgid(0, 0);
            _ = prctl(deathSignal, Kill);
            if (getppid() != parent)
                _exit(1);
        }
        return new Job(rank.Value, size.Value, local ?? rank.Value, host ?? "127.0.0.1", port.Value,
            Variable(Own) ?? id);
    }

    /// <summary>The first of Slurm's hosts: node[03-05,9],other is node03.</summary>
    internal static string? FirstHost(string? list) =>
        list == null ? null : FirstOfList().Replace(list, "$1$2", 1).Split(',')[0];

    [GeneratedRegex(@"^([^,\[]*)\[(\d+)[^\]]*\]")]
    private static partial Regex FirstOfList();

    /// <summary>How many processes to start: as many as asked for, or as there are GPUs.</summary>
    public static int Gpus(int? asked, DeviceKind device) {
        Require(asked is null or > 0, "--gpus", "1 or more", asked ?? 0);
        Require(device != DeviceKind.Cpu || asked is null or 1, "--gpus", "1 for the CPU", asked ?? 0);
        if (asked == 1 || device is not (DeviceKind.Auto or DeviceKind.Cuda) ||
            asked == null && device == DeviceKind.Auto && !Cuda.IsAvailable)
            return 1;
        var found = Cuda.Count();
        // Several ranks on one GPU are good for tests alone.
        var fits = asked == null || asked <= found || Variable("GPT2_SHARE_GPUS") != null;
        Require(fits, "--gpus", $"at most {found}", asked ?? 0);
        return asked ?? found;
    }

    /// <summary>Connects the ranks.</summary>
    public Peers Meet(TimeSpan timeout) => new(Rank, Size, Host, Port, Key, timeout, why => {
        // One rank is enough to say it: the first, that which knows it of itself, or the second of the first.
        if (Rank == 0 || why.StartsWith($"rank {Rank}:") || Rank == 1 && why.StartsWith("rank 0 "))
            Console.Error.WriteLine($"gpt2: {why}");
        _exit(1); // at once: another thread may wait for a GPU that waits for the lost rank
    });

    /// <summary>Starts this program once for each of so many GPUs, and waits for all. If one fails, all end.</summary>
    public static int Start(int ranks) {
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        var port = ((IPEndPoint)listener.LocalEndpoint).Port;
        listener.Stop();
        var key = $"{Guid.NewGuid():N}";
        string?[] arguments = [.. Environment.GetCommandLineArgs(), null];
        var inherited = Environment.GetEnvironmentVariables().Cast<DictionaryEntry>().Select(e => $"{e.Key}={e.Value}");
        var running = new Dictionary<int, int>(); // ranks by process
        for (var rank = 0; rank < ranks; rank++) {
            // NCCL takes one GPU of a host but once, so that ranks which share it say that they are on several.
            string[] shared = Variable("GPT2_SHARE_GPUS") == null ? [] : [$"NCCL_HOSTID=rank {rank}"];
            string?[] environment = [.. inherited, .. shared, $"RANK={rank}", $"LOCAL_RANK={rank}",
                $"WORLD_SIZE={ranks}", "MASTER_ADDR=127.0.0.1", $"MASTER_PORT={port}", $"{Own}={key}",
                $"{Parent}={Environment.ProcessId}", null];
            var error = posix_spawn(out var process, Environment.ProcessPath!, 0, 0, arguments, environment);
            if (error != 0)
                throw new Gpt2Exception($"--gpus: expected to start rank {rank}, found error {error}");
            running[process] = rank;
        }
        void Send(int signal) {
            lock (running) {
                foreach (var process in running.Keys)
                    _ = kill(process, signal);
            }
        }
        void Pass(PosixSignalContext signal) {
            signal.Cancel = true;
            Send(Terminate);
        }
        using var terminate = PosixSignalRegistration.Create(PosixSignal.SIGTERM, Pass);
        using var interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, Pass);
        const int patience = 2_000; // with those who should have noticed by themselves
        using var killer = new Timer(_ => Send(Kill));
        var result = 0;
        while (running.Count > 0) {
            var process = waitpid(-1, out var status, 0);
            const int noChild = 10; // somebody above us has children reaped unseen, and their statuses with them
            if (process < 0 && Marshal.GetLastPInvokeError() == noChild)
                return 1;
            if (!running.TryGetValue(process, out var rank))
                continue;
            lock (running)
                running.Remove(process);
            var (signal, code) = (status & 0x7f, status >> 8 & 0xff);
            if (signal != 0 && result == 0)
                Console.Error.WriteLine($"gpt2: rank {rank} was ended by signal {signal}");
            if (status != 0 && result == 0) {
                result = signal != 0 ? 1 : code;
                killer.Change(patience, Timeout.Infinite);
            }
        }
        return result;
    }

    [LibraryImport("libc", StringMarshalling = StringMarshalling.Utf8)]
    private static partial int posix_spawn(
        out int process, string path, nint actions, nint attributes, string?[] arguments, string?[] environment);
    [LibraryImport("libc", SetLastError = true)]
    private static partial int waitpid(int process, out int status, int options);
    [LibraryImport("libc")] private static partial void _exit(int status);
    [LibraryImport("libc")] private static partial int getppid();
    [LibraryImport("libc")] private static partial int setpgid(int process, int group);
    [LibraryImport("libc")] private static partial int prctl(int option, nint argument);
    [LibraryImport("libc")] private static partial int kill(int process, int signal);
}

/// <summary>The connections between a job's ranks, a star around the first. They carry what the hosts agree on, and
/// tell when a rank is gone or silent.</summary>
public sealed class Peers : IDisposable {
    const int KeyBytes = 64, HelloBytes = KeyBytes + 2 * sizeof(int); // the key, rank, size
    const int End = -1; // in place of the meetings

    readonly Link[] links; // to every other rank for the first, to the first for every other
    readonly TimeSpan timeout;
    readonly Action<string> lost;
    readonly Timer heartbeat;
    volatile bool closing;
    int reported;

    /// <summary>A connection, whose messages are read as they come: a length, how far the sender is, and so many
    /// bytes; none is a heartbeat.</summary>
    sealed record Link(int Rank, TcpClient Client) {
        public BlockingCollection<byte[]> Messages { get; } = [];
        public int Meetings { get; private set; }

        public void Send(ReadOnlySpan<byte> message, int meetings) {
            lock (Client) {
                int[] header = [message.Length, meetings];
                Client.GetStream().Write(MemoryMarshal.AsBytes(header.AsSpan()));
                Client.GetStream().Write(message);
            }
        }

        public byte[] Receive() {
            var header = new byte[2 * sizeof(int)];
            Client.GetStream().ReadExactly(header);
            Meetings = BitConverter.ToInt32(header, sizeof(int));
            var message = new byte[BitConverter.ToInt32(header)];
            Client.GetStream().ReadExactly(message);
            return message;
        }
    }

    /// <summary>Meets the other ranks.</summary>
    /// <param name="host">Of the first rank, which listens there: to this machine alone if it is 127.0.0.1.</param>
    /// <param name="key">What every rank of the job knows; who does not is turned away.</param>
    /// <param name="timeout">How long another may be silent.</param>
    /// <param name="lost">Is told once, on another thread, which rank is gone, or nothing if the first rank has said
    /// it already; must end the process.</param>
    /// <exception cref="Gpt2Exception">A rank did not come in time.</exception>
    public Peers(int rank, int size, string host, int port, string key, TimeSpan timeout, Action<string> lost) {
        (Rank, Size, this.timeout, this.lost) = (rank, size, timeout, lost);
        byte[] Hello(int rank) => [.. Encoding.UTF8.GetBytes(key.PadRight(KeyBytes)).Take(KeyBytes),
            .. BitConverter.GetBytes(rank), .. BitConverter.GetBytes(size)];
        links = rank == 0 ? Gather(host, port, Hello) : [Reach(host, port, Hello(rank))];
        foreach (var link in links)
            new Thread(() => Listen(link)) { IsBackground = true }.Start();
        heartbeat = new Timer(_ => Array.ForEach(links, link => Beat(link, Meetings)), null, TimeSpan.Zero, timeout / 8);
    }

    public int Rank { get; }
    public int Size { get; }

    /// <summary>Where the run is, for messages: "step 7".</summary>
    public string Place { get; set; } = "the start";

    /// <summary>To how many meetings elsewhere, in NCCL, this rank has come.</summary>
    public int Meetings { get; set; }

    /// <summary>A rank that has not come to the last of them, by what the others have said; null if none is known.
    /// </summary>
    public int? Absent => Array.Find(links, link => link.Meetings < Meetings)?.Rank;

    Link[] Gather(string host, int port, Func<int, byte[]> hello) {
        var found = new Link?[Size];
        var listener = new TcpListener(host is "127.0.0.1" or "localhost" ? IPAddress.Loopback : IPAddress.Any, port);
        try {
            listener.Start();
        } catch (SocketException e) {
            throw new Gpt2Exception($"rank 0: expected port {port} to be free, found: {e.Message}");
        }
        using var _ = listener;
        var begin = Stopwatch.GetTimestamp();
        while (Array.IndexOf(found, null, 1) is var missing and > 0) {
            var left = timeout - Stopwatch.GetElapsedTime(begin);
            if (left < TimeSpan.Zero || !listener.Server.Poll(left, SelectMode.SelectRead))
                throw new Gpt2Exception($"rank 0: expected rank {missing} of {Size} on port {port} within " +
                    $"{timeout.TotalSeconds:F0} s, found {found.Count(link => link != null) + 1} ranks");
            const int patience = 5_000; // with a stranger who says nothing, while ours wait
            var client = listener.AcceptTcpClient();
            (client.NoDelay, client.ReceiveTimeout) = (true, patience);
            var said = new byte[HelloBytes];
            try {
                client.GetStream().ReadExactly(said);
            } catch (IOException) {
                // Nobody of ours, as below: its rank is 0.
            }
            var rank = BitConverter.ToInt32(said, KeyBytes);
            if (rank > 0 && rank < Size && found[rank] == null && hello(rank).AsSpan().SequenceEqual(said)) {
                client.ReceiveTimeout = (int)timeout.TotalMilliseconds;
                found[rank] = new(rank, client);
            } else {
                client.Dispose();
            }
        }
        return [.. found.Skip(1).Select(link => link!)];
    }

    Link Reach(string host, int port, byte[] hello) {
        var begin = Stopwatch.GetTimestamp();
        while (true) {
            var client = new TcpClient { NoDelay = true, ReceiveTimeout = (int)timeout.TotalMilliseconds };
            try {
                client.Connect(host, port);
                client.GetStream().Write(hello);
                return new(0, client);
            } catch (Exception e) when (e is SocketException or IOException) {
                client.Dispose();
                if (Stopwatch.GetElapsedTime(begin) > timeout)
                    throw new Gpt2Exception($"rank {Rank}: expected rank 0 on {host}:{port} within " +
                        $"{timeout.TotalSeconds:F0} s, found: {e.Message}");
                Thread.Sleep(50); // it may not listen yet
            }
        }
    }

    void Listen(Link link) {
        try {
            while (true) {
                var message = link.Receive();
                if (link.Meetings == End)
                    Report(""); // it has said why
                else if (message.Length > 0)
                    link.Messages.Add(message);
            }
        } catch (Exception e) when (e is IOException or SocketException or ObjectDisposedException or
            InvalidOperationException) {
            var isSilent = e.InnerException is SocketException { SocketErrorCode: SocketError.TimedOut };
            Report(isSilent ? $"rank {link.Rank} has said nothing for {timeout.TotalSeconds:F0} s at {Place}"
                : $"rank {link.Rank} was lost at {Place}: its connection ended");
            Array.ForEach(links, other => other.Messages.CompleteAdding()); // nobody need wait for any of them now
        }
    }

    void Beat(Link link, int meetings) {
        try {
            link.Send([], meetings);
        } catch (Exception e) when (e is IOException or ObjectDisposedException or InvalidOperationException) {
            // The thread that listens says so.
        }
    }

    /// <summary>Says once why the job cannot go on; the first rank ends the others with it.</summary>
    public void Report(string why) {
        if (closing || Interlocked.Exchange(ref reported, 1) != 0)
            return;
        if (Rank == 0)
            Array.ForEach(links, link => Beat(link, End));
        lost(why);
    }

    byte[] Take(Link link) {
        if (link.Messages.TryTake(out var message, timeout))
            return message;
        throw new Gpt2Exception($"rank {Rank}: expected rank {link.Rank} at {Place}, found it " +
            (link.Messages.IsCompleted ? "gone" : $"elsewhere for {timeout.TotalSeconds:F0} s"));
    }

    void Send(Link link, ReadOnlySpan<byte> message) {
        try {
            link.Send(message, Meetings);
        } catch (Exception e) when (e is IOException or ObjectDisposedException or InvalidOperationException) {
            throw new Gpt2Exception($"rank {Rank}: expected rank {link.Rank} at {Place}, found it gone");
        }
    }

    /// <summary>What the first rank says, once all have come here.</summary>
    public byte[] Exchange(Func<byte[][], byte[]> combine, ReadOnlySpan<byte> own) {
        byte[] answer;
        if (Rank == 0) {
            byte[][] all = [own.ToArray(), .. links.Select(Take)];
            answer = combine(all);
            foreach (var link in links)
                Send(link, answer);
        } else {
            Send(links[0], own);
            answer = Take(links[0]);
        }
        return answer;
    }

    /// <summary>Sums numbers over ranks, in the order of ranks, when all have come here.</summary>
    public void Sum(Span<double> values) {
        var count = values.Length;
        var sums = Exchange(all => {
            var sum = new double[count + 1]; // one more, for no message is empty
            foreach (var numbers in all) {
                for (var i = 0; i < count; i++)
                    sum[i] += BitConverter.ToDouble(numbers, i * sizeof(double));
            }
            return MemoryMarshal.AsBytes(sum.AsSpan()).ToArray();
        }, MemoryMarshal.AsBytes<double>([.. values, 0]));
        MemoryMarshal.Cast<byte, double>(sums)[..count].CopyTo(values);
    }

    /// <summary>Parts from the others, once all have come here.</summary>
    public void Leave() {
        closing = Rank > 0; // the first may be gone as soon as it has answered
        Exchange(all => {
            closing = true;
            return [1];
        }, [1]);
    }

    public void Dispose() {
        closing = true;
        heartbeat.Dispose();
        Array.ForEach(links, link => link.Client.Dispose());
    }
}

/// <summary>NCCL (libnccl.so.2) among ranks with a GPU each, on a stream beside the device's.</summary>
public sealed unsafe class Nccl : ICollective {
    readonly Cuda device;
    readonly Peers peers;
    readonly nint communicator, stream, before, after;
    readonly Timer watch;
    long begun; // when what is under way was, or 0

    /// <summary>Meets the other ranks in NCCL.</summary>
    /// <param name="timeout">How long all this may wait for a rank.</param>
    public Nccl(Cuda device, Peers peers, TimeSpan timeout) {
        (this.device, this.peers) = (device, peers);
        device.Enter();
        try {
            var id = new NcclId();
            if (Rank == 0)
                CheckNccl(ncclGetUniqueId(&id), "starting");
            var bytes = MemoryMarshal.AsBytes(new Span<NcclId>(ref id));
            peers.Exchange(all => all[0], bytes).CopyTo(bytes);
            CheckNccl(ncclCommInitRank(out communicator, Size, id, Rank), "meeting the other ranks");
        } catch (DllNotFoundException) {
            throw new Gpt2Exception("--gpus: expected NCCL (libnccl.so.2, on the loader's path), found none");
        }
        const int nonBlocking = 1, highest = -100, withoutTiming = 2;
        Check(cuStreamCreateWithPriority(out stream, nonBlocking, highest), "creating a stream");
        Check(cuEventCreate(out before, withoutTiming), "creating an event");
        Check(cuEventCreate(out after, withoutTiming), "creating an event");
        watch = new Timer(_ => {
            try {
                Watch(timeout);
            } catch (Gpt2Exception e) {
                peers.Report($"rank {Rank}: {e.Message}"); // or else a fault here would end in a stack trace
            }
        }, null, timeout / 8, timeout / 8);
    }

    public int Rank => peers.Rank;
    public int Size => peers.Size;
    public string Place { set => peers.Place = value; }

    public void Sum(Span<double> values) => peers.Sum(values);

    public void AllReduce(ReadOnlySpan<Tensor> arrays) {
        Begin();
        foreach (var x in arrays)
            CheckNccl(ncclAllReduce(x.Address, x.Address, (nuint)x.Count, Type(x), Sums, communicator, stream),
                "summing");
        End();
    }

    public void ReduceScatter(ReadOnlySpan<Tensor> arrays, ReadOnlySpan<Tensor> parts) {
        Begin();
        for (var i = 0; i < arrays.Length; i++) {
            var (x, to) = (arrays[i], parts[i].Address);
            if (x.Count % Size == 0)
                CheckNccl(ncclReduceScatter(x.Address, to, (nuint)parts[i].Count, Type(x), Sums, communicator, stream),
                    "summing");
            for (var rank = 0; rank < Size && x.Count % Size != 0; rank++) {
                var part = x.PartOf(rank, Size);
                CheckNccl(ncclReduce(part.Address, to, (nuint)part.Count, Type(x), Sums, rank, communicator, stream),
                    "summing");
            }
        }
        End();
    }

    public void AllGather(ReadOnlySpan<Tensor> arrays) {
        Begin();
        foreach (var x in arrays) {
            var own = x.PartOf(Rank, Size);
            if (x.Count % Size == 0)
                CheckNccl(ncclAllGather(own.Address, x.Address, (nuint)own.Count, Type(x), communicator, stream),
                    "gathering");
            for (var rank = 0; rank < Size && x.Count % Size != 0; rank++) {
                var part = x.PartOf(rank, Size);
                CheckNccl(ncclBroadcast(part.Address, part.Address, (nuint)part.Count, Type(x), rank, communicator,
                    stream), "gathering");
            }
        }
        End();
    }

    const int Sums = 0;

    static int Type(Tensor x) => x.Type == DataType.Bf16 ? 9 : 7;

    void Begin() {
        device.Enter();
        Check(cuEventRecord(before, device.Stream), "ordering streams");
        Check(cuStreamWaitEvent(stream, before, 0), "ordering streams");
        CheckNccl(ncclGroupStart(), "grouping");
    }

    void End() {
        CheckNccl(ncclGroupEnd(), "grouping");
        Check(cuEventRecord(after, stream), "ordering streams");
        peers.Meetings++;
        Volatile.Write(ref begun, Stopwatch.GetTimestamp());
    }

    public void Join() {
        device.Enter();
        Check(cuStreamWaitEvent(device.Stream, after, 0), "ordering streams");
    }

    /// <summary>Ends the job if NCCL has failed, or waits too long: after the others' silence would have been noticed,
    /// and for the first rank, which knows them all, before the others give up.</summary>
    void Watch(TimeSpan timeout) {
        var since = Volatile.Read(ref begun);
        if (since == 0)
            return;
        device.Enter();
        const int notReady = 600;
        var state = cuEventQuery(after);
        if (state == 0)
            Interlocked.CompareExchange(ref begun, 0, since);
        else if (state == notReady && Stopwatch.GetElapsedTime(since) > (Rank == 0 ? 1.25 : 1.5) * timeout)
            peers.Report(peers.Absent is { } absent
                ? $"rank {absent} did not come to NCCL at {peers.Place} in {timeout.TotalSeconds:F0} s"
                : $"rank {Rank}: expected an end of NCCL at {peers.Place} in {timeout.TotalSeconds:F0} s, found none");
        if (ncclCommGetAsyncError(communicator, out var error) == 0 && error is not 0 and not 7)
            peers.Report($"rank {Rank}: NCCL at {peers.Place}: expected success, found {NcclError(error)}");
    }

    public void Dispose() {
        using var watched = new ManualResetEvent(false);
        watch.Dispose(watched);
        watched.WaitOne();
        device.Enter();
        ncclCommAbort(communicator);
        cuEventDestroy(before);
        cuEventDestroy(after);
        cuStreamDestroy(stream);
    }
}

/// <summary>NCCL, as far as we call it.</summary>
static unsafe partial class NcclApi {
    const string Library = "nccl";

    static NcclApi() => Libraries.Register();

    /// <summary>What names a communicator before there is one.</summary>
    public struct NcclId {
        public fixed byte Bytes[128];
    }

    public static string NcclError(int status) => Marshal.PtrToStringUTF8(ncclGetErrorString(status)) ?? $"{status}";

    /// <exception cref="Gpt2Exception">Not success: NCCL's name for it, and its last words.</exception>
    public static void CheckNccl(int status, string doing) {
        const int inProgress = 7;
        if (status is not 0 and not inProgress)
            throw new Gpt2Exception($"NCCL: {doing}: expected success, found {NcclError(status)} " +
                $"({Marshal.PtrToStringUTF8(ncclGetLastError(0))})");
    }

    [LibraryImport(Library)] public static partial nint ncclGetErrorString(int status);
    [LibraryImport(Library)] public static partial nint ncclGetLastError(nint communicator);
    [LibraryImport(Library)] public static partial int ncclGetUniqueId(NcclId* id);
    [LibraryImport(Library)]
    public static partial int ncclCommInitRank(out nint communicator, int ranks, NcclId id, int rank);
    [LibraryImport(Library)] public static partial int ncclCommGetAsyncError(nint communicator, out int error);
    [LibraryImport(Library)] public static partial int ncclCommAbort(nint communicator);
    [LibraryImport(Library)] public static partial int ncclGroupStart();
    [LibraryImport(Library)] public static partial int ncclGroupEnd();
    [LibraryImport(Library)]
    public static partial int ncclAllReduce(
        nint from, nint to, nuint count, int type, int operation, nint communicator, nint stream);
    [LibraryImport(Library)]
    public static partial int ncclReduceScatter(
        nint from, nint to, nuint count, int type, int operation, nint communicator, nint stream);
    [LibraryImport(Library)]
    public static partial int ncclReduce(
        nint from, nint to, nuint count, int type, int operation, int root, nint communicator, nint stream);
    [LibraryImport(Library)]
    public static partial int ncclAllGather(
        nint from, nint to, nuint count, int type, nint communicator, nint stream);
    [LibraryImport(Library)]
    public static partial int ncclBroadcast(
        nint from, nint to, nuint count, int type, int root, nint communicator, nint stream);
}
