using System.Collections.Concurrent;
using System.IO.Hashing;
using System.Net;
using System.Net.Sockets;
using System.Security.Cryptography;
using static Gpt2.Driver;

namespace Gpt2;

/// <summary>Collective operations among ranks: the processes that train together, each on its own device. Every sum is
/// taken in one order, so that all ranks get the same bits. Operations on tensors are queued: they follow the device's
/// earlier work, and its work after <see cref="Join"/> follows them. The defaults are a single process's.</summary>
public interface ICollective : IDisposable {
    /// <summary>This process's rank, from 0.</summary>
    int Rank => 0;
    /// <summary>Number of ranks.</summary>
    int Size => 1;
    /// <summary>Where the run is, for messages: "step 7".</summary>
    string Place { set { } }
    /// <summary>Sums numbers over ranks, in place, once every rank has called it.</summary>
    void Sum(Span<double> values) { }
    /// <summary>The sum of one number over ranks.</summary>
    double Sum(double value) {
        Sum(new Span<double>(ref value));
        return value;
    }
    /// <summary>Sums arrays of any shape over ranks, in place.</summary>
    void AllReduce(ReadOnlySpan<Tensor> arrays) { }
    /// <summary>Sums arrays over ranks, each into the parts of it that its ranks own.</summary>
    void ReduceScatter(ReadOnlySpan<Share> shares) { }
    /// <summary>Completes arrays on all ranks from the parts that their ranks own.</summary>
    void AllGather(ReadOnlySpan<Share> shares) { }
    /// <summary>Makes the device's later work wait for the operations queued so far.</summary>
    void Join() { }
    void IDisposable.Dispose() { }
}

/// <summary>An array of any shape, of which every rank owns a part (<see cref="Tensor.PartOf(int, int)"/>), or one
/// rank, the owner, all. Part is where this rank sums what it owns, flat.</summary>
public readonly record struct Share(Tensor Whole, Tensor Part, int? Owner = null);

/// <summary>A single process.</summary>
public sealed class Alone : ICollective;

/// <summary>This process's place among ranks that gpt2 itself, torchrun, mpirun or srun has started.</summary>
/// <param name="LocalRank">Its rank among those of its host: the GPU it takes.</param>
/// <param name="Host">Rank 0's. If it is a loopback address, rank 0 listens on this machine only.</param>
/// <param name="Key">A secret of the job's ranks, never sent. Whoever does not know it is turned away.</param>
internal sealed partial record Job(int Rank, int Size, int LocalRank, string Host, int Port, string Key) {
    const string Own = "GPT2_JOB_KEY", Parent = "GPT2_PARENT";
    const int Terminate = 15, Kill = 9, ParentDeathSignal = 1;

    static string? Variable(string name) =>
        Environment.GetEnvironmentVariable(name) is { Length: > 0 } text ? text : null;

    static int? Number(string name, int least = 0, int most = 1 << 22) => Variable(name) is not { } text ? null
        : int.TryParse(text, out var number) && number >= least && number <= most ? number
        : throw new Gpt2Exception($"{name}: expected a number from {least} to {most}, found '{text}'");

    /// <summary>Reads the launcher's environment variables, unless --gpus or --device settle it.</summary>
    /// <returns>Null for a single process.</returns>
    public static Job? OfEnvironment(int? gpus, DeviceKind device) {
        var parent = Number(Parent);
        if (parent != null) {
            _ = prctl(ParentDeathSignal, Kill); // a child ends with its parent
            // A child that took itself for a parent would start children that start children.
            if (getppid() != parent || Number("RANK") == null || Number("WORLD_SIZE") is null or 1)
                throw new Gpt2Exception($"{Parent}: expected nothing (gpt2 sets it for its children), found {parent}");
            _ = setpgid(0, 0); // signals of the terminal reach the parent alone, which passes them on
        } else if (gpus != null || device == DeviceKind.Cpu) {
            return null;
        }
        // A batch script has SLURM_PROCID too, but no step; the steps of shells are numbered from the top down.
        var isStep = uint.TryParse(Variable("SLURM_STEP_ID"), out var step) && step < 0xffff_fff0;
        // MPICH and Intel MPI set PMI_*; but srun --mpi=pmi2 sets the first two as well.
        var isTorch = Variable("RANK") != null && Variable("WORLD_SIZE") != null;
        string[] names = isTorch ? ["RANK", "WORLD_SIZE", "LOCAL_RANK"] // of torchrun and ourselves
            : Variable("OMPI_COMM_WORLD_RANK") != null ? ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"]
            : Variable("PMI_RANK") != null && (!isStep || Variable("MPI_LOCALRANKID") != null)
                ? ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]
            : isStep ? ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"] : ["", ""];
        if (Number(names[1], 1) is not (> 1 and var size) || Number(names[0], 0, size - 1) is not { } rank)
            return null;
        var isSlurm = names[0] == "SLURM_PROCID";
        var host = Variable("MASTER_ADDR") ?? (isSlurm && Variable("SLURM_STEP_NODELIST") is { } hosts
            ? Regex.Replace(hosts, @"^([^,\[]*)\[?(\d*).*", "$1$2") : null); // of node[03-05,9],other it is node03
        if (host == null && names is [_, _, _, var localSize] && Number(localSize) != size)
            throw new Gpt2Exception("MASTER_ADDR: expected rank 0's host (mpirun -x or -genv sets it), found none");
        host ??= "127.0.0.1";
        if (host is "0.0.0.0" or "::" || !IPAddress.TryParse(host, out _) && !Regex.IsMatch(host, @"^[\w.-]{1,253}$"))
            throw new Gpt2Exception($"MASTER_ADDR: expected rank 0's host name or address, found '{host}'");
        var id = (isTorch ? Variable("TORCHELASTIC_RUN_ID") : isSlurm ? $"{Variable("SLURM_JOB_ID")}.{step}"
            : Variable("PMIX_NAMESPACE") ?? Variable("OMPI_MCA_ess_base_jobid")) ?? "";
        var next = isTorch && id != "" ? 1 : 0; // torchrun itself listens at MASTER_PORT
        var port = Number("MASTER_PORT", 1, ushort.MaxValue - next) + next ?? // or one of 10,000, by the job's id
            20_000 + (int)(XxHash3.HashToUInt64(Encoding.UTF8.GetBytes(id)) % 10_000);
        return new Job(rank, size, Number(names[2]) ?? rank, host, port, Variable(Own) ?? id);
    }

    /// <summary>Number of processes to start: as many as asked for, or one for each GPU.</summary>
    public static int Gpus(int? asked, DeviceKind device) {
        Require(device != DeviceKind.Cpu || asked is null or 1, "--gpus", "1 for the CPU", asked ?? 0);
        if (asked == 1 || device == DeviceKind.Cpu || asked == null && device == DeviceKind.Auto && !Cuda.IsAvailable)
            return 1;
        var found = Cuda.Count();
        // Several ranks on one GPU are good for tests alone.
        var most = Variable("GPT2_SHARE_GPUS") == null ? found : int.MaxValue;
        Require(asked is null || asked <= most, "--gpus", $"at most {found}", asked ?? 0);
        return asked ?? found;
    }

    /// <summary>Connects the ranks.</summary>
    public Peers Meet(TimeSpan timeout) => new(this, timeout, why => {
        // Only one rank reports the loss: rank 0, the lost rank itself, or rank 1 if rank 0 is the one lost.
        if (Rank == 0 || why.StartsWith($"rank {Rank}:") || Rank == 1 && why.StartsWith("rank 0 "))
            Console.Error.WriteLine($"gpt2: {why}");
        _exit(1); // at once: another thread may wait for a GPU that waits for the lost rank
    });

    /// <summary>Starts this program once for each rank and waits for all of them. If one fails, all end.</summary>
    /// <returns>The exit status of the first that failed, or 0.</returns>
    public static async Task<int> Start(int ranks) {
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        var port = ((IPEndPoint)listener.LocalEndpoint).Port;
        listener.Stop();
        var start = new ProcessStartInfo(Environment.ProcessPath!, Environment.GetCommandLineArgs()[1..]);
        var variables = start.Environment;
        variables.Keys.Where(name => Regex.IsMatch(name, "^(TORCHELASTIC|OMPI|PMIX?|MPI|SLURM)_"))
            .ToList().ForEach(name => variables.Remove(name));
        (variables["MASTER_ADDR"], variables["MASTER_PORT"]) = ("127.0.0.1", $"{port}");
        variables["WORLD_SIZE"] = $"{ranks}";
        (variables[Own], variables[Parent]) = ($"{Guid.NewGuid():N}", $"{Environment.ProcessId}");
        var processes = new List<Process>();
        void Send(int signal) {
            lock (processes)
                processes.FindAll(process => !process.HasExited).ForEach(process => kill(process.Id, signal));
        }
        void Pass(PosixSignalContext signal) {
            signal.Cancel = true;
            Send(Terminate);
        }
        using var terminate = PosixSignalRegistration.Create(PosixSignal.SIGTERM, Pass);
        using var hangUp = PosixSignalRegistration.Create(PosixSignal.SIGHUP, Pass);
        using var interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, Pass);
        lock (processes) { // a signal waits here until every process is there to receive it
            for (var rank = 0; rank < ranks; rank++) {
                variables["RANK"] = variables["LOCAL_RANK"] = $"{rank}";
                // NCCL refuses two ranks on one GPU of one host: ranks that share a GPU pretend to be on several hosts.
                if (Variable("GPT2_SHARE_GPUS") != null)
                    variables["NCCL_HOSTID"] = $"rank {rank}";
                processes.Add(Process.Start(start)!);
            }
        }
        var patience = TimeSpan.FromSeconds(2); // in which the other ranks should notice by themselves
        using var killer = new Timer(_ => Send(Kill));
        var result = 0;
        var ends = processes.ConvertAll(process => process.WaitForExitAsync());
        await foreach (var end in Task.WhenEach(ends)) {
            var rank = ends.IndexOf(end);
            var status = processes[rank].ExitCode;
            if (status == 0 || result != 0)
                continue;
            if (status > 128) // and the signal's number
                Console.Error.WriteLine($"gpt2: rank {rank} was ended by signal {status - 128}");
            result = status > 128 ? 1 : status;
            killer.Change(patience, Timeout.InfiniteTimeSpan);
        }
        return result;
    }

    [LibraryImport("libc")] private static partial void _exit(int status);
    [LibraryImport("libc")] private static partial int getppid();
    [LibraryImport("libc")] private static partial int setpgid(int process, int group);
    [LibraryImport("libc")] private static partial int prctl(int option, nint argument);
    [LibraryImport("libc")] private static partial int kill(int process, int signal);
}

/// <summary>TCP connections of rank 0 to all others, for small messages, and to see who is gone or silent.</summary>
public sealed class Peers : IDisposable {
    const int LongestMessage = 1024; // bytes; NCCL's id takes 128, a sum of numbers fewer
    const int End = -1; // in place of a number of meetings
    static readonly TimeSpan Patience = TimeSpan.FromSeconds(5); // with a greeting; and before we say whom we wait for

    readonly Job job;
    readonly Link[] links; // rank 0's to every other rank; any other's to rank 0
    readonly TimeSpan timeout;
    readonly Action<string> lost;
    readonly Timer heartbeat;
    Func<string> awaited = () => ""; // whom this rank waits for at the start
    volatile int quiet; // 1 once there is nothing left to report

    /// <summary>A connection to another rank. A message is its length and the sender's number of meetings, as int32,
    /// then its bytes; a heartbeat has none. No rank sends a second message before the first is taken.</summary>
    sealed record Link(int Rank, TcpClient Client) {
        public BlockingCollection<byte[]> Messages { get; } = new(boundedCapacity: 1);
        public int Meetings { get; set; }

        /// <returns>False if the connection is gone; its listening thread reports that.</returns>
        public bool Send(ReadOnlySpan<byte> message, int meetings) {
            byte[] all = [.. BitConverter.GetBytes(message.Length), .. BitConverter.GetBytes(meetings), .. message];
            try {
                lock (Client)
                    Client.GetStream().Write(all);
                return true;
            } catch (Exception e) when (e is IOException or InvalidOperationException) {
                return false;
            }
        }
    }

    /// <summary>Connects to the other ranks.</summary>
    /// <param name="timeout">How long another rank may be silent.</param>
    /// <param name="lost">Must end the process; told, on another thread, who is gone, or "" if rank 0 said it.</param>
    /// <exception cref="Gpt2Exception">A rank did not come in time.</exception>
    internal Peers(Job job, TimeSpan timeout, Action<string> lost) {
        (this.job, this.timeout, this.lost) = (job, timeout, lost);
        // .NET takes HMAC and random bytes from OpenSSL, and aborts where there is none.
        if (!NativeLibrary.TryLoad("libssl.so.3", out _) && !NativeLibrary.TryLoad("libssl.so.1.1", out _))
            throw new Gpt2Exception("--gpus: expected OpenSSL (libssl.so.3, on the loader's path), found none");
        using var end = new CancellationTokenSource(timeout);
        using var waiting = new Timer(_ => Console.Error.WriteLine($"gpt2: rank {Rank}: waiting for {awaited()}"),
            null, Patience, Timeout.InfiniteTimeSpan);
        links = (Rank == 0 ? Gather(end) : Reach(end.Token)).GetAwaiter().GetResult();
        if (links.Length < (Rank == 0 ? Size - 1 : 1))
            throw new Gpt2Exception($"rank {Rank}: expected {awaited()} in {timeout.TotalSeconds:F0} s, found none");
        Array.ForEach(links, link => new Thread(() => Listen(link)) { IsBackground = true }.Start());
        heartbeat = new(_ => Array.ForEach(links, link => link.Send([], Meetings)), null, TimeSpan.Zero, timeout / 8);
    }

    public int Rank => job.Rank;
    public int Size => job.Size;

    /// <summary>Where the run is, for messages: "step 7".</summary>
    public string Place { get; set; } = "the start";

    /// <summary>Number of meetings elsewhere, in NCCL, that this rank has come to.</summary>
    public int Meetings { get; set; }

    /// <summary>A rank that has not come to the last meeting, as far as this rank knows; null for none.</summary>
    public int? Absent => Array.Find(links, link => link.Meetings < Meetings)?.Rank;

    byte[] Proof(byte[] sender, byte[] receiver) =>
        HMACSHA256.HashData(Encoding.UTF8.GetBytes(job.Key), (byte[])[.. sender, .. receiver]);

    /// <summary>Makes sure that the other end is a rank of this job. Each side sends its rank, the number of ranks and
    /// a random challenge, and then the HMAC of both greetings under the key; rank 0 sends its own last.</summary>
    /// <returns>The other's rank.</returns>
    async Task<int> Greet(TcpClient client, Predicate<int> admits, CancellationToken end) {
        using var patience = CancellationTokenSource.CreateLinkedTokenSource(end);
        patience.CancelAfter(Patience);
        (client.NoDelay, client.ReceiveTimeout) = (true, (int)timeout.TotalMilliseconds);
        var stream = client.GetStream();
        var challenge = RandomNumberGenerator.GetBytes(32);
        byte[] own = [.. BitConverter.GetBytes(Rank), .. BitConverter.GetBytes(Size), .. challenge];
        await stream.WriteAsync(own, patience.Token);
        var (other, proof) = (new byte[own.Length], new byte[HMACSHA256.HashSizeInBytes]);
        await stream.ReadExactlyAsync(other, patience.Token);
        if (Rank > 0)
            await stream.WriteAsync(Proof(own, other), patience.Token);
        await stream.ReadExactlyAsync(proof, patience.Token);
        var (rank, size) = (BitConverter.ToInt32(other), BitConverter.ToInt32(other, sizeof(int)));
        if (size != Size || !admits(rank) || !CryptographicOperations.FixedTimeEquals(proof, Proof(other, own)))
            throw new IOException();
        if (Rank == 0)
            await stream.WriteAsync(Proof(own, other), patience.Token);
        return rank;
    }

    /// <summary>Rank 0's side: accepts connections until every other rank is admitted or the time is up.</summary>
    async Task<Link[]> Gather(CancellationTokenSource end) {
        var found = new Link?[Size];
        var room = new SemaphoreSlim(256); // so that strangers cannot use up this process's file descriptors
        int[] Missing() => [.. Enumerable.Range(1, Size - 1).Where(rank => found[rank] == null)];
        awaited = () => {
            var missing = Missing();
            var some = string.Join(", ", missing.Take(8)) + (missing.Length > 8 ? ", ..." : "");
            return $"rank{(missing.Length > 1 ? "s" : "")} {some} of {Size} on port {job.Port}";
        };
        bool Admits(int rank) => !end.IsCancellationRequested && Missing().Contains(rank);
        async Task Admit(TcpClient client) {
            try {
                var rank = await Greet(client, Admits, end.Token);
                lock (found) {
                    found[rank] = Admits(rank) ? new(rank, client) : throw new IOException();
                    if (Missing() is [])
                        _ = end.CancelAsync();
                }
            } catch (Exception) {
                client.Dispose(); // whatever it sent, it ends its own greeting alone
            } finally {
                room.Release();
            }
        }
        using var listener = StartListener();
        while (!end.IsCancellationRequested) {
            try {
                var client = await listener.AcceptTcpClientAsync(end.Token);
                await room.WaitAsync(end.Token);
                _ = Admit(client);
            } catch (Exception e) when (e is OperationCanceledException or SocketException) {
                // All have come, or the time is up, or a connection ended before it was accepted.
            }
        }
        return [.. found.OfType<Link>()];
    }

    /// <summary>Listens on the host's address alone if that is a loopback address, or else on all addresses.</summary>
    TcpListener StartListener() {
        var host = job.Host.Split('.')[0].ToLowerInvariant() == "localhost" ? "127.0.0.1" : job.Host;
        var listener = IPAddress.TryParse(host, out var address) && IPAddress.IsLoopback(address)
            ? new TcpListener(address, job.Port) : TcpListener.Create(job.Port);
        try {
            listener.Start();
            return listener;
        } catch (SocketException e) {
            throw new Gpt2Exception($"rank 0: expected port {job.Port} to be free, found: {e.Message}");
        }
    }

    /// <summary>Every other rank's side: tries to connect until rank 0 listens and admits it.</summary>
    async Task<Link[]> Reach(CancellationToken end) {
        var why = "no answer";
        awaited = () => $"rank 0 on {(job.Host.Contains(':') ? $"[{job.Host}]" : job.Host)}:{job.Port} ({why})";
        while (!end.IsCancellationRequested) {
            var client = new TcpClient();
            try {
                await client.ConnectAsync(job.Host, job.Port, end).AsTask().WaitAsync(end);
                why = $"it is another job, by GPT2_JOB_KEY or size, or has a rank {Rank} already";
                return [new(await Greet(client, rank => rank == 0, end), client)];
            } catch (Exception e) when (e is SocketException or IOException or OperationCanceledException) {
                why = (e as SocketException)?.Message ?? why;
                client.Dispose();
                await Task.Delay(50);
            }
        }
        return [];
    }

    /// <summary>Takes a link's messages as they come, until it ends.</summary>
    void Listen(Link link) {
        try {
            var reader = new BinaryReader(link.Client.GetStream());
            while (true) {
                (var length, link.Meetings) = (reader.ReadInt32(), reader.ReadInt32());
                if (length is < 0 or > LongestMessage)
                    throw new InvalidDataException($"it sent a message of {length} bytes");
                var message = new byte[length];
                reader.BaseStream.ReadExactly(message);
                if (Rank > 0 && link.Meetings == End)
                    Report(""); // rank 0 has said why
                else if (length > 0 && !link.Messages.TryAdd(message))
                    throw new InvalidDataException("it sent more than it was asked for");
            }
        } catch (Exception e) when (e is IOException or InvalidOperationException or InvalidDataException) {
            var isSilent = e.InnerException is SocketException { SocketErrorCode: SocketError.TimedOut };
            Report(isSilent ? $"rank {link.Rank} has said nothing for {timeout.TotalSeconds:F0} s at {Place}"
                : $"rank {link.Rank} was lost at {Place}: " +
                    (e is InvalidDataException ? e.Message : "its connection ended"));
            Array.ForEach(links, other => other.Messages.CompleteAdding()); // nobody need wait for any rank now
        }
    }

    /// <summary>Says once why the job cannot go on. From rank 0, it ends the other ranks too.</summary>
    public void Report(string why) {
        if (Interlocked.Exchange(ref quiet, 1) != 0)
            return;
        if (Rank == 0)
            Array.ForEach(links, link => link.Send([], End));
        lost(why);
    }

    byte[] Take(Link link, int length) {
        if (link.Messages.TryTake(out var message, timeout) && message.Length == length)
            return message;
        throw new Gpt2Exception($"rank {Rank}: expected rank {link.Rank} at {Place}, found " +
            (message != null ? $"{message.Length} bytes from it in place of {length}" : "it " +
            (link.Messages.IsCompleted ? "gone" : $"elsewhere for {timeout.TotalSeconds:F0} s")));
    }

    /// <summary>Gathers each rank's bytes on rank 0, and gives every rank what rank 0 makes of them.</summary>
    /// <param name="combine">From every rank's bytes, in the order of ranks, to as many bytes as each has sent.</param>
    public byte[] Exchange(Func<byte[][], byte[]> combine, ReadOnlySpan<byte> own) {
        var message = own.ToArray();
        if (Rank == 0)
            message = combine([message, .. links.Select(link => Take(link, message.Length))]);
        if (Array.Find(links, link => !link.Send(message, Meetings)) is { } gone)
            throw new Gpt2Exception($"rank {Rank}: expected rank {gone.Rank} at {Place}, found it gone");
        return Rank == 0 ? message : Take(links[0], message.Length);
    }

    /// <summary>Sums numbers over ranks, in place and in the order of ranks.</summary>
    public void Sum(Span<double> values) {
        double[] own = [.. values, 0]; // one more, for no message is empty
        var sums = Exchange(all => [.. Enumerable.Range(0, own.Length).SelectMany(i => BitConverter.GetBytes(
            all.Sum(message => BitConverter.ToDouble(message, i * sizeof(double)))))], MemoryMarshal.AsBytes(own));
        MemoryMarshal.Cast<byte, double>(sums)[..values.Length].CopyTo(values);
    }

    /// <summary>Leaves the others, once every rank has come here.</summary>
    public void Leave() {
        if (Rank > 0)
            quiet = 1; // rank 0 may be gone as soon as it has answered
        Exchange(all => {
            quiet = 1;
            return [1];
        }, [1]);
    }

    public void Dispose() {
        quiet = 1;
        heartbeat.Dispose();
        Array.ForEach(links, link => link.Client.Dispose());
    }
}

/// <summary>Collectives by NCCL (libnccl.so.2), a GPU for each rank, on a stream beside the device's own.</summary>
public sealed unsafe partial class Nccl : ICollective {
    const int Sums = 0; // the operation of a reduction

    readonly Cuda device;
    readonly Peers peers;
    readonly nint communicator, stream, before, after;
    readonly Timer watch;
    long begun; // when the last operations were queued

    /// <summary>Connects the ranks' GPUs.</summary>
    /// <param name="timeout">How long an operation may wait for another rank.</param>
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
        watch = new Timer(_ => Watch(timeout), null, timeout / 8, timeout / 8);
    }

    public int Rank => peers.Rank;
    public int Size => peers.Size;
    public string Place { set => peers.Place = value; }

    public void Sum(Span<double> values) => peers.Sum(values);

    public void AllReduce(ReadOnlySpan<Tensor> arrays) => Group("summing", arrays, x =>
        ncclAllReduce(x.Address, x.Address, x.Count, Type(x), Sums, communicator, stream));

    public void ReduceScatter(ReadOnlySpan<Share> shares) =>
        Group("summing", shares, share => share is (var x, var own, null) && x.Count % Size == 0
            ? ncclReduceScatter(x.Address, own.Address, own.Count, Type(x), Sums, communicator, stream)
            : ForEachPart(share, (part, rank) => ncclReduce(
                part.Address, share.Part.Address, part.Count, Type(part), Sums, rank, communicator, stream)));

    public void AllGather(ReadOnlySpan<Share> shares) =>
        Group("gathering", shares, share => share is (var x, _, null) && x.Count % Size == 0
            ? ncclAllGather(x.PartOf(Rank, Size).Address, x.Address, x.Count / Size, Type(x), communicator, stream)
            : ForEachPart(share, (part, rank) =>
                ncclBroadcast(part.Address, part.Address, part.Count, Type(part), rank, communicator, stream)));

    public void Join() {
        device.Enter();
        Check(cuStreamWaitEvent(device.Stream, after, 0), "ordering streams");
    }

    static int Type(Tensor x) => x.Type == DataType.Bf16 ? 9 : 7;

    /// <summary>Queues a call for each rank's part: NCCL's own ReduceScatter and AllGather need equal parts.</summary>
    /// <returns>The first error, or 0.</returns>
    int ForEachPart(Share share, Func<Tensor, int, int> queue) => share.Owner is { } owner ? queue(share.Whole, owner)
        : Enumerable.Range(0, Size).Select(rank => queue(share.Whole.PartOf(rank, Size), rank)).FirstOrDefault(IsError);

    /// <summary>Queues a call for each array, as one group after the device's work so far.</summary>
    void Group<T>(string doing, ReadOnlySpan<T> arrays, Func<T, int> queue) {
        device.Enter();
        Check(cuEventRecord(before, device.Stream), "ordering streams");
        Check(cuStreamWaitEvent(stream, before, 0), "ordering streams");
        CheckNccl(ncclGroupStart(), "grouping");
        foreach (var array in arrays)
            CheckNccl(queue(array), doing);
        CheckNccl(ncclGroupEnd(), "grouping");
        peers.Meetings++;
        Volatile.Write(ref begun, Stopwatch.GetTimestamp()); // before Watch can find them under way
        Check(cuEventRecord(after, stream), "ordering streams");
    }

    /// <summary>Ends the job if NCCL has failed or waits too long: later than a silent rank is noticed, and sooner on
    /// rank 0, which knows of every rank, than on the others.</summary>
    void Watch(TimeSpan timeout) {
        const int notReady = 600;
        try {
            device.Enter();
            if (cuEventQuery(after) != notReady)
                return;
            if (Stopwatch.GetElapsedTime(Volatile.Read(ref begun)) > (Rank == 0 ? 1.25 : 1.5) * timeout)
                peers.Report(peers.Absent is { } absent
                    ? $"rank {absent} did not come to NCCL at {peers.Place} in {timeout.TotalSeconds:F0} s"
                    : $"rank {Rank}: expected an end of NCCL at {peers.Place} in {timeout.TotalSeconds:F0} s, " +
                        "found none");
            if (ncclCommGetAsyncError(communicator, out var error) == 0 && IsError(error))
                throw new Gpt2Exception($"NCCL at {peers.Place}: expected success, found {NcclError(error)}");
        } catch (Gpt2Exception e) { // on a timer's thread it would end in a stack trace
            peers.Report($"rank {Rank}: {e.Message}");
        }
    }

    public void Dispose() {
        watch.DisposeAsync().AsTask().Wait(); // for a callback under way, too
        device.Enter();
        ncclCommAbort(communicator);
        cuEventDestroy(before);
        cuEventDestroy(after);
        cuStreamDestroy(stream);
    }

    /// <summary>True unless the status is success or in progress.</summary>
    static bool IsError(int status) => status is not 0 and not 7;

    static string NcclError(int status) => Marshal.PtrToStringUTF8(ncclGetErrorString(status)) ?? $"{status}";

    /// <exception cref="Gpt2Exception">NCCL failed: its name for the error, and its last message.</exception>
    static void CheckNccl(int status, string doing) {
        if (IsError(status))
            throw new Gpt2Exception($"NCCL: {doing}: expected success, found {NcclError(status)} " +
                $"({Marshal.PtrToStringUTF8(ncclGetLastError(0))})");
    }

    /// <summary>Names a communicator before it exists.</summary>
    struct NcclId { fixed byte bytes[128]; }

    [LibraryImport("nccl")] private static partial nint ncclGetErrorString(int status);
    [LibraryImport("nccl")] private static partial nint ncclGetLastError(nint communicator);
    [LibraryImport("nccl")] private static partial int ncclGetUniqueId(NcclId* id);
    [LibraryImport("nccl")]
    private static partial int ncclCommInitRank(out nint communicator, int ranks, NcclId id, int rank);
    [LibraryImport("nccl")] private static partial int ncclCommGetAsyncError(nint communicator, out int error);
    [LibraryImport("nccl")] private static partial int ncclCommAbort(nint communicator);
    [LibraryImport("nccl")] private static partial int ncclGroupStart();
    [LibraryImport("nccl")] private static partial int ncclGroupEnd();
    [LibraryImport("nccl")] private static partial int ncclAllReduce(
        nint from, nint to, long count, int type, int operation, nint communicator, nint stream);
    [LibraryImport("nccl")] private static partial int ncclReduceScatter(
        nint from, nint to, long count, int type, int operation, nint communicator, nint stream);
    [LibraryImport("nccl")] private static partial int ncclReduce(
        nint from, nint to, long count, int type, int operation, int root, nint communicator, nint stream);
    [LibraryImport("nccl")] private static partial int ncclAllGather(
        nint from, nint to, long count, int type, nint communicator, nint stream);
    [LibraryImport("nccl")] private static partial int ncclBroadcast(
        nint from, nint to, long count, int type, int root, nint communicator, nint stream);
}
