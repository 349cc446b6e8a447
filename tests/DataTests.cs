using System.IO.Compression;
using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>The Mersenne Twister against published values and torch's.</summary>
public class Mt19937Tests {
    /// <summary>bfloat16: the nearest one of fp32, and back.</summary>
public class BFloat16Tests {
    [Test]
    // Halfway goes to the even one, up or down; a little more or less decides; numbers too large are infinite.
    [Arguments(0x3f808000u, 0x3f80)]
    [Arguments(0x3f818000u, 0x3f82)]
    [Arguments(0x3f808001u, 0x3f81)]
    [Arguments(0xbf817fffu, 0xbf81)]
    [Arguments(0x7f7fffffu, 0x7f80)]
    [Arguments(0xff800000u, 0xff80)]
    [Arguments(0x80000000u, 0x8000)]
    [Arguments(0x00000001u, 0x0000)]
    // What is not a number stays so, even if its lower half alone says that.
    [Arguments(0x7f800001u, 0x7fc0)]
    [Arguments(0xffffffffu, 0xffff)]
    public async Task RoundsToTheNearest(uint bits, int expected) {
        var half = new ushort[1];
        BFloat16.Round([BitConverter.UInt32BitsToSingle(bits)], half);
        await Assert.That((int)half[0]).IsEqualTo(expected);
    }

    [Test]
    public async Task EveryNumberWidensAndRoundsToItself() {
        ushort[] all = [.. Enumerable.Range(0, 1 << 16).Select(i => (ushort)i)];
        var (wide, back) = (new float[all.Length], new ushort[all.Length]);
        BFloat16.Widen(all, wide);
        BFloat16.Round(wide, back);
        // Of those that are no numbers, the quiet ones.
        await Same(back, all.Select(half => (half & 0x7fff) > 0x7f80 ? (ushort)(half | 0x40) : half));
    }
}

/// <summary>The numbers of a line of the golden file.</summary>
    static float[] Numbers(string name) =>
        [.. File.ReadLines(Golden("normals.txt")).Single(line => line.StartsWith(name + " ")).Split(' ').Skip(1)
            .Select(number => float.Parse(number, CultureInfo.InvariantCulture))];

    [Test]
    public async Task DrawsThePublishedNumbers() {
        // The C++ standard requires the 10,000th one for this seed.
        var random = new Mt19937(5489);
        await Assert.That(random.NextUInt32()).IsEqualTo(3499211612u);
        for (var i = 2; i < 10_000; i++)
            random.NextUInt32();
        await Assert.That(random.NextUInt32()).IsEqualTo(4123659995u);
    }

    [Test]
    public async Task DrawsTorchsNumbersForSeed42() {
        var random = new Mt19937(42);
        uint[] drawn = [random.NextUInt32(), random.NextUInt32(), random.NextUInt32(), random.NextUInt32()];
        await Same<uint>(drawn, [1608637542, 3421126067, 4083286876, 787846414]);
        await Same(Numbers("raw"), drawn.Select(number => (float)number));
    }

    [Test]
    public async Task ReproducesTheExampleInLlmc() {
        // llm.c's rand.h shows these for seed 137: 5 numbers, 8 normals made of 16 numbers, 1 number, 16 normals, 1.
        var random = new Mt19937(137);
        uint[] drawn = [.. Enumerable.Range(0, 22).Select(_ => random.NextUInt32())];
        await Same<uint>(drawn[..5], [4053805790, 2173880614, 380293709, 1237255315, 2986595568]);
        await Assert.That(drawn[21]).IsEqualTo(2186503452u);
        var normals = new float[16];
        random.Normal(normals, 1);
        double[] expected = [
            -1.2813878059387207, -2.646395683288574, -0.06569503247737885, 0.2180829495191574, -0.46536165475845337,
            -0.33108410239219666, 2.5485482215881348, 0.10425379872322083, 0.8460659980773926, 0.9462448358535767,
            -0.2913765013217926, 0.34313806891441345, -1.1186704635620117, -0.18305328488349915, -2.3153159618377686,
            0.3961987793445587,
        ];
        await Assert.That(RelativeError(normals, expected)).IsLessThan(1e-6);
        await Assert.That(random.NextUInt32()).IsEqualTo(2756748748u);
    }

    [Test]
    [Arguments("normal16", 16, 0.02f)]
    // Not a multiple of 16: the last 16 are drawn anew.
    [Arguments("normal100", 100, 1f)]
    public async Task NormalEqualsTorch(string name, int count, float std) {
        var values = new float[count];
        new Mt19937(42).Normal(values, std);
        await Assert.That(RelativeError(values, Numbers(name))).IsLessThan(1e-6);
    }

    [Test]
    public async Task NormalsOfALargeArrayAreThoseOfEachSixteen() {
        const int count = 300_016;
        var values = new float[count];
        new Mt19937(1).Normal(values, 0.5f);
        var (random, expected, x) = (new Mt19937(1), new double[count], new double[16]);
        for (var block = 0; block < count; block += 16) {
            foreach (ref var value in x.AsSpan())
                value = (random.NextUInt32() & 0xffffff) / Math.Pow(2, 24);
            for (var t = 0; t < 8; t++) {
                var (radius, angle) = (Math.Sqrt(-2 * Math.Log(1 - x[t] + 1e-12)), 2 * Math.PI * x[t + 8]);
                expected[block + t] = 0.5 * radius * Math.Cos(angle);
                expected[block + t + 8] = 0.5 * radius * Math.Sin(angle);
            }
        }
        await Assert.That(RelativeError(values, expected)).IsLessThan(1e-6);
    }

    [Test]
    public async Task PermutesAsByHand() {
        // 1608637542 mod 5 = 2, 3421126067 mod 4 = 3, 4083286876 mod 3 = 1, 787846414 mod 2 = 0.
        int[] values = [0, 1, 2, 3, 4];
        new Mt19937(42).Permute(values);
        await Same(values, [4, 0, 1, 3, 2]);
    }
}

/// <summary>Shards and the order of batches, which is worked out here once more from formats.md.</summary>
public class TokenLoaderTests {
    const int B = 2, T = 3, AnyVocabulary = 1 << 16;

    /// <summary>Tokens in the shards: 2, 4, 1 and 3 samples; the second lacks one token for a fifth sample.</summary>
    static readonly int[] Counts = [13, 30, 12, 20];

    static int[] Samples => [.. Counts.Select(count => (count - 1) / (B * T))];

    /// <summary>Shards whose tokens are their shard's number times 100 and their position, under names whose ordinal
    /// order is another one than that of the numbers in them.</summary>
    static string WriteShards(TemporaryFolder folder) {
        string[] names = ["X_train_9", "x_train_10", "x_train_2", "x_train_2b"];
        for (var shard = 0; shard < Counts.Length; shard++) {
            var tokens = Enumerable.Range(shard * 100, Counts[shard]).Select(token => (ushort)token);
            WriteShard(folder[names[shard] + ".bin"], [.. tokens]);
        }
        WriteShard(folder["x_val_1.bin"], new ushort[20]);
        return folder["*_train_*.bin"];
    }

    static void Permute(int[] values, Mt19937 random) {
        for (var i = values.Length - 1; i >= 1; i--) {
            var j = random.NextUInt32() % (i + 1);
            (values[i], values[j]) = (values[j], values[i]);
        }
    }

    /// <summary>The first token of each batch, for ever.</summary>
    static IEnumerable<int> FirstTokens(bool shuffle) {
        var random = new Mt19937(42);
        int[] shards = [.. Enumerable.Range(0, Counts.Length)];
        while (true) {
            if (shuffle)
                Permute(shards, random);
            foreach (var shard in shards) {
                int[] samples = [.. Enumerable.Range(0, Samples[shard])];
                if (shuffle)
                    Permute(samples, random);
                foreach (var sample in samples)
                    yield return shard * 100 + sample * B * T;
            }
        }
    }

    static int[] Next(TokenLoader loader) {
        var (inputs, targets) = (new int[B * T], new int[B * T]);
        loader.Next(inputs, targets);
        return [.. inputs, .. targets];
    }

    static int[] Batch(int first) => [.. Enumerable.Range(first, B * T), .. Enumerable.Range(first + 1, B * T)];

    [Test]
    [Arguments(false)]
    [Arguments(true)]
    public async Task BatchesComeInTheDocumentedOrder(bool shuffle) {
        using var folder = new TemporaryFolder();
        using var loader = new TokenLoader(WriteShards(folder), B, T, AnyVocabulary, shuffle);
        await Assert.That(loader.Shards.Tokens).IsEqualTo(Counts.Sum());
        await Assert.That(loader.Samples).IsEqualTo(Samples.Sum());
        foreach (var first in FirstTokens(shuffle).Take(5 * Samples.Sum()))
            await Same(Next(loader), Batch(first));
    }

    [Test]
    public async Task ResetBeginsAtTheFirstBatch() {
        using var folder = new TemporaryFolder();
        using var loader = new TokenLoader(WriteShards(folder), B, T, AnyVocabulary, shuffle: false);
        for (var i = 0; i < 4; i++)
            Next(loader);
        loader.Reset();
        await Same(Next(loader), Batch(0));
    }

    /// <summary>A file with a header and what a loader saves.</summary>
    static void Save(TokenLoader loader, string path) {
        using var content = new MemoryStream();
        using (var writer = new BinaryWriter(content, Encoding.UTF8, leaveOpen: true))
            loader.Save(writer);
        WriteFile(path, [7, 1], content.ToArray());
    }

    static BinaryFile OpenState(string path) => new(path, "a loader's state", 7, 1);

    [Test]
    [Arguments(false)]
    [Arguments(true)]
    public async Task ALoadedStateGoesOnAtAnyPosition(bool shuffle) {
        using var folder = new TemporaryFolder();
        var pattern = WriteShards(folder);
        using var saved = new TokenLoader(pattern, B, T, AnyVocabulary, shuffle);
        for (var done = 0; done <= 3 * Samples.Sum(); done++) {
            Save(saved, folder["state"]);
            // Another seed, so that all that decides the order has to come from the state.
            using var loaded = new TokenLoader(pattern, B, T, AnyVocabulary, shuffle, seed: 1);
            using (var state = OpenState(folder["state"])) {
                loaded.Load(state, shuffle, saved.Position);
                state.CheckEnd();
            }
            foreach (var first in FirstTokens(shuffle).Skip(done).Take(2 * Samples.Sum()))
                await Same(Next(loaded), Batch(first));
            Next(saved);
        }
    }

    [Test]
    public async Task TheStateHasTheDocumentedLayout() {
        using var folder = new TemporaryFolder();
        using var loader = new TokenLoader(WriteShards(folder), B, T, AnyVocabulary, shuffle: true);
        Next(loader);
        Save(loader, folder["state"]);
        using var reader = new BinaryReader(File.OpenRead(folder["state"]));
        reader.BaseStream.Position = 1024;
        int[] ReadOrder() => [.. Enumerable.Range(0, (int)reader.ReadUInt64()).Select(_ => reader.ReadInt32())];
        var (shards, samples) = (ReadOrder(), ReadOrder());
        await Same(shards.Order(), [0, 1, 2, 3]);
        await Assert.That(shards[0] * 100 + samples[0] * B * T).IsEqualTo(FirstTokens(shuffle: true).First());
        await Assert.That(samples.Length).IsEqualTo(Samples[shards[0]]);
        await Assert.That(reader.BaseStream.Length - reader.BaseStream.Position).IsEqualTo(2520);
        await Assert.That(reader.ReadUInt64()).IsEqualTo(42ul);
        // Two permutations took one number for each element but the first.
        var taken = shards.Length - 1 + samples.Length - 1;
        await Assert.That(reader.ReadInt32()).IsEqualTo(624 - taken + 1);
        await Assert.That(reader.ReadUInt32()).IsEqualTo((uint)taken);
        var random = new Mt19937(42);
        for (var i = 0; i < 624; i++) {
            // A tempered word of the state is the number drawn.
            var y = reader.ReadUInt32();
            y ^= y >> 11;
            y ^= y << 7 & 0x9d2c5680;
            y ^= y << 15 & 0xefc60000;
            y ^= y >> 18;
            await Assert.That(y).IsEqualTo(random.NextUInt32());
        }
        await Assert.That(reader.ReadUInt32()).IsEqualTo(0u);
        await Assert.That(reader.ReadUInt32()).IsEqualTo(0x9908b0dfu);
    }

    [Test]
    // Offsets count from the state's first byte, 8 + 4·4 for the shards and then the samples, or from its end.
    [Arguments("number of shards", 0, 5)]
    [Arguments("a shard twice", 8, -1)]
    [Arguments("a shard of none", 12, 4)]
    [Arguments("number of samples", 24, 99)]
    [Arguments("a sample of none", 32, 99)]
    [Arguments("numbers left", -2520 + 8, 0)]
    [Arguments("numbers left", -2520 + 8, 625)]
    [Arguments("numbers left, more than there are", -2520 + 8, 623)]
    [Arguments("next number", -2520 + 12, 625)]
    public async Task AWrongStateIsRefused(string what, int offset, int value) {
        using var folder = new TemporaryFolder();
        var pattern = WriteShards(folder);
        using var saved = new TokenLoader(pattern, B, T, AnyVocabulary, shuffle: true);
        Save(saved, folder["state"]);
        using (var file = File.Open(folder["state"], FileMode.Open)) {
            file.Position = offset < 0 ? file.Length + offset : 1024 + offset;
            // A negative value stands for that of the neighbor.
            var bytes = BitConverter.GetBytes(value);
            if (value < 0) {
                file.Position += 4;
                file.ReadExactly(bytes);
                file.Position -= 8;
            }
            file.Write(bytes);
        }
        using var loaded = new TokenLoader(pattern, B, T, AnyVocabulary, shuffle: true);
        using var state = OpenState(folder["state"]);
        var error = Assert.Throws<Gpt2Exception>(() => loaded.Load(state, true, saved.Position));
        await Assert.That(error.Message).Contains(folder["state"]).Because(what);
    }

    [Test]
    [Arguments(-1, 0)]
    [Arguments(4, 0)]
    [Arguments(0, -1)]
    [Arguments(0, 3)]
    public async Task AWrongPositionIsRefused(int shard, int sample) {
        using var folder = new TemporaryFolder();
        using var loader = new TokenLoader(WriteShards(folder), B, T, AnyVocabulary, shuffle: false);
        Save(loader, folder["state"]);
        using var state = OpenState(folder["state"]);
        await Assert.That(() => loader.Load(state, false, (shard, sample))).Throws<Gpt2Exception>();
    }

    [Test]
    public async Task ATokenOutsideTheVocabularyIsNamed() {
        using var folder = new TemporaryFolder();
        WriteShard(folder["shard.bin"], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 42, 41, 0);
        using var loader = new TokenLoader(folder["shard.bin"], B, T, 42, shuffle: false);
        Next(loader);
        var error = Assert.Throws<Gpt2Exception>(() => Next(loader));
        await Assert.That(error.Message).Contains(folder["shard.bin"]).And.Contains("42 at position 10");
    }

    [Test]
    public async Task AShardWithoutASampleAndTheTokenAfterItIsPassedOver() {
        using var folder = new TemporaryFolder();
        foreach (var count in (int[])[0, 3, B * T])
            WriteShard(folder[$"a{count}.bin"], new ushort[count]);
        var error = Assert.Throws<Gpt2Exception>(() => new TokenLoader(folder["*.bin"], B, T, 9, shuffle: true));
        await Assert.That(error.Message).Contains(folder["*.bin"]).And.Contains("6 tokens a shard, found 6");
        WriteShard(folder["long.bin"], [.. Enumerable.Range(1, B * T + 1).Select(token => (ushort)token)]);
        foreach (var shuffle in (bool[])[false, true]) {
            using var loader = new TokenLoader(folder["*.bin"], B, T, 9, shuffle);
            await Assert.That(loader.Samples).IsEqualTo(1);
            await Same(loader.Shards.TooShort(loader.SampleTokens),
                [folder["a0.bin"], folder["a3.bin"], folder["a6.bin"]]);
            for (var i = 0; i < 5; i++)
                await Same(Next(loader), Batch(1));
        }
    }

    [Test]
    public async Task OneShardIsOpenAtATime() {
        using var folder = new TemporaryFolder();
        for (var i = 0; i < 20; i++)
            WriteShard(folder[$"{i:d2}.bin"], new ushort[B * T + 1]);
        using var loader = new TokenLoader(folder["*.bin"], B, T, 1, shuffle: true);
        for (var i = 0; i < 60; i++) {
            Next(loader);
            var open = Directory.GetFiles("/proc/self/fd").Count(fd =>
                new FileInfo(fd).LinkTarget?.StartsWith(folder.Path) ?? false);
            await Assert.That(open).IsEqualTo(1);
        }
    }

    [Test]
    public async Task RowsAreThoseOfEveryShardOrWholeGroupsOfThem() {
        using var folder = new TemporaryFolder();
        foreach (var (name, count) in ((string, int)[])[("a", 10), ("b", 3), ("c", 14)])
            WriteShard(folder[$"{name}.bin"], new ushort[count]);
        using var shards = new TokenShards(folder["*.bin"], 1);
        (int, long)[] all = [(0, 0), (0, 3), (0, 6), (2, 0), (2, 3), (2, 6), (2, 9)];
        (int, long)[] pairs = [.. all[..2], .. all[3..]];
        await Same(shards.Rows(3, 2, 0), all);
        await Same(shards.Rows(3, 2, 0, rows: 4), all[..4]);
        await Same(shards.Rows(3, 2, 2), pairs[..4]);
        await Same(shards.Rows(3, 2, int.MaxValue), pairs);
        await Assert.That(() => shards.Rows(7, 2, 1)).Throws<Gpt2Exception>();
    }

    [Test]
    public async Task AShardMayBeLargerThan2GiB() {
        // 2.2 GB of a sparse file, of which two blocks are written.
        const int count = 1_100_000_000, rows = 1 << 10, columns = 1 << 10;
        using var folder = new TemporaryFolder();
        WriteFile(folder["shard.bin"], [20240520, 1, count]);
        var (last, beyond) = ((count - 1) / (rows * columns) - 1, (1 << 30) + 7L);
        using (var file = File.OpenWrite(folder["shard.bin"])) {
            file.SetLength(1024 + 2L * count);
            file.Position = 1024 + 2L * last * rows * columns;
            file.Write([11, 0, 12, 0]);
            file.Position = 1024 + 2 * beyond;
            file.Write([13, 0, 14, 0]);
            file.Position = file.Length - 4;
            file.Write([15, 0, 16, 0]);
        }
        using (var shards = new TokenShards(folder["shard.bin"], AnyVocabulary)) {
            await Assert.That(shards.Counts[0]).IsEqualTo(count);
            int[] Read(long first, int tokens) {
                var (values, next) = (new int[tokens], new int[tokens]);
                shards.Read(0, first, values, next);
                return [values[0], .. next];
            }
            await Same(Read(beyond - 1, 3), [0, 13, 14, 0]);
            await Same(Read(count - 3, 2), [0, 15, 16]);
        }
        WriteFile(folder["state"], [7, 1]);
        using var loader = new TokenLoader(folder["shard.bin"], rows, columns, AnyVocabulary, shuffle: false);
        using (var state = OpenState(folder["state"]))
            loader.Load(state, false, (0, last));
        var (inputs, targets) = (new int[rows * columns], new int[rows * columns]);
        loader.Next(inputs, targets);
        await Same(inputs[..3], [11, 12, 0]);
        await Same(targets[..2], [12, 0]);
        loader.Next(inputs, targets);
        await Assert.That(loader.Position).IsEqualTo((0, 1));
    }

    [Test]
    public async Task AWrittenShardIsOneByHand() {
        using var folder = new TemporaryFolder();
        ushort[] tokens = [1, 2, 65535, 0];
        var rest = tokens.AsMemory();
        // Two at a time, of which a shard of three takes one the second time.
        TokenShards.Write(folder["ours.bin"], 3, most => {
            var next = rest[..Math.Min(2, most)];
            rest = rest[next.Length..];
            return next;
        });
        WriteShard(folder["by_hand.bin"], tokens[..3]);
        await Same(File.ReadAllBytes(folder["ours.bin"]), File.ReadAllBytes(folder["by_hand.bin"]));
    }
}

/// <summary>Files with llm.c's header, and multiple-choice evaluations among them.</summary>
public class BinaryFileTests {
    [Test]
    [Arguments(1)]
    [Arguments(2)]
    [Arguments(7)]
    [Arguments(1000)]
    public async Task BFloat16IsTheUpperHalfOfAFloat(int count) {
        using var folder = new TemporaryFolder();
        // One, −0, infinity, not a number, the smallest and the largest number among others.
        ushort[] halves = [0x3f80, 0x8000, 0x7f80, 0x7fc0, 0x0001, 0x7f7f];
        halves = [.. Tokens(1, count, 1 << 16).Select(half => (ushort)half).Concat(halves).TakeLast(count)];
        WriteFile(folder["file"], [7, 5], MemoryMarshal.AsBytes(halves.AsSpan()));
        using var file = new BinaryFile(folder["file"], "a test", 7, 5);
        var values = new float[count];
        file.ReadWeights(values);
        file.CheckEnd();
        await Same(values.Select(BitConverter.SingleToUInt32Bits), halves.Select(half => (uint)half << 16));
    }

    /// <summary>The words of an example, from its mark on.</summary>
    static ushort[] Example(int index, int label, ushort[] context, params ushort[][] completions) {
        ushort[] words = [.. completions.Prepend(context).SelectMany(part => (ushort[])[(ushort)part.Length, .. part])];
        int[] before = [65535, 2 * (words.Length + 5), index, label, completions.Length];
        return [.. before.Select(word => (ushort)word), .. words];
    }

    static void WriteChoices(string path, int[] header, params ushort[][] examples) =>
        WriteFile(path, header, MemoryMarshal.AsBytes(examples.SelectMany(words => words).ToArray().AsSpan()));

    [Test]
    public async Task MultipleChoicesAreReadAsRowsOfContextAndCompletion() {
        using var folder = new TemporaryFolder();
        WriteChoices(folder["file"], [20240522, 1, 2, 100], Example(0, 3, [1, 2, 3], [4], [5, 6], [7, 8, 9], [10]),
            Example(1, 0, [11], [12, 13], [14]));
        var questions = MultipleChoice.Read(folder["file"], 15).ToArray();
        await Same(questions.Select(question => (question.Label, question.ContextLength)), [(3, 3), (0, 1)]);
        var rows = questions.SelectMany(question => question.Rows).Select(row => string.Join(' ', row));
        await Same(rows, ["1 2 3 4", "1 2 3 5 6", "1 2 3 7 8 9", "1 2 3 10", "11 12 13", "11 14"]);
    }

    /// <summary>Evaluations with one thing wrong: a name, the header's fields, the words of two examples.</summary>
    public static IEnumerable<Func<(string Name, int[] Header, ushort[] Words)>> WrongChoices() {
        int[] header = [20240522, 1, 2, 100];
        ushort[] first = Example(0, 1, [1, 2], [3], [4, 5]), second = Example(1, 1, [6], [7], [8]);
        ushort[] words = [.. first, .. second];
        int[] WithField(int index, int value) => [.. header[..index], value, .. header[(index + 1)..]];
        ushort[] With(int index, int value) => [.. words[..index], (ushort)value, .. words[(index + 1)..]];
        yield return () => ("magic number", WithField(0, 20240520), words);
        yield return () => ("version", WithField(1, 2), words);
        yield return () => ("negative number of examples", WithField(2, -1), words);
        yield return () => ("more examples than there are", WithField(2, 3), words);
        yield return () => ("fewer examples than there are", WithField(2, 1), words);
        yield return () => ("longest example too short", WithField(3, 2 * first.Length - 2), words);
        yield return () => ("longest example too long", WithField(3, 65536), words);
        yield return () => ("no mark", header, With(0, 0));
        yield return () => ("size of zero", header, With(1, 0));
        yield return () => ("odd size", header, With(1, words[1] + 1));
        yield return () => ("size too small", header, With(1, words[1] - 2));
        yield return () => ("size too large", header, With(1, words[1] + 2));
        yield return () => ("index", header, With(2, 1));
        yield return () => ("label", header, With(3, 2));
        yield return () => ("no completions", header, With(4, 0));
        yield return () => ("more completions than there are", header, With(4, 3));
        yield return () => ("empty context", header, With(5, 0));
        yield return () => ("context longer than the example", header, With(5, 1000));
        yield return () => ("token of the context", header, With(6, 9));
        yield return () => ("empty completion", header, [.. Example(0, 1, [1, 2], [3], []), .. second]);
        yield return () => ("last completion longer than the example", header, With(words.Length - 2, 2));
        yield return () => ("token of the last completion", header, With(words.Length - 1, 9));
        yield return () => ("truncated", header, words[..^1]);
        yield return () => ("something after", header, [.. words, 0]);
    }

    [Test]
    [MethodDataSource(nameof(WrongChoices))]
    public async Task WrongMultipleChoicesAreRefused(string name, int[] header, ushort[] words) {
        using var folder = new TemporaryFolder();
        WriteChoices(folder["file"], header, words);
        var error = Assert.Throws<Gpt2Exception>(() => MultipleChoice.Read(folder["file"], 9).ToArray());
        await Assert.That(error.Message).Contains(folder["file"]).Because(name);
    }
}

/// <summary>The tokenizer against another implementation's ids, and shards of text in blocks against text in
/// one.</summary>
public class TokenizerTests {
    static readonly Tokenizer Tokenizer = new();

    static string Text => File.ReadAllText(Golden("tokenizer.txt"));

    static int[] Ids => [.. File.ReadAllText(Golden("tokenizer.ids"))
        .Split((char[])[' ', '\n'], StringSplitOptions.RemoveEmptyEntries).Select(int.Parse)];

    [Test]
    public async Task EncodesAsTiktokenDoes() => await Same(Tokenizer.Encode(Text), Ids);

    [Test]
    public async Task DecodesToTheSameBytes() {
        var bytes = Encoding.UTF8.GetBytes(string.Concat(Tokenizer.Decode(Ids)));
        await Same(bytes, File.ReadAllBytes(Golden("tokenizer.txt")));
    }

    [Test]
    public async Task StreamsWholeCharactersAsSoonAsTheyAre() {
        // Each emoji is two tokens or more; the rare Han characters are such that tokens end one and begin the next.
        const string text = "Hi 😀😁🤖👩‍👩‍👧‍👦 日本語の漢字 𝔘𝔫𝔦 e\u0301 " +
            "鴧◢醚釲蝫 咶溛 槈虦誅 豝踫鯏鑎疛ॉ呚擶殺 🦄";
        int[] ids = [.. Tokenizer.Encode(text)];
        var (taken, streamed) = (0, "");
        IEnumerable<int> Count() {
            foreach (var id in ids) {
                taken++;
                yield return id;
            }
        }
        foreach (var part in Tokenizer.Decode(Count())) {
            await Assert.That(part.Contains('\ufffd')).IsFalse();
            streamed += part;
            // No character is held back once its last token is there.
            await Assert.That(string.Concat(Tokenizer.Decode(ids[..taken])).TrimEnd('\ufffd')).IsEqualTo(streamed);
        }
        await Assert.That(streamed).IsEqualTo(text);
        var cut = string.Concat(Tokenizer.Decode(ids[..^1]));
        await Assert.That(cut.StartsWith(text[..^2]) && cut.EndsWith('\ufffd')).IsTrue();
    }

    [Test]
    [Arguments("a<|endoftext|>", (int[])[64, 50256])]
    [Arguments("<|endoftext|> <|endoftext|>b", (int[])[50256, 220, 50256, 65])]
    [Arguments("", (int[])[])]
    // Half a surrogate pair is U+FFFD.
    [Arguments("\ud800", (int[])[4210])]
    public async Task PromptsMayHaveMarksAndLoneSurrogates(string prompt, int[] ids) =>
        await Same(Tokenizer.Encode(prompt), ids);

    /// <summary>The bytes of each token, as characters: those of the NuGet package.</summary>
    static string[] Vocabulary() {
        const string type = "Microsoft.ML.Tokenizers.R50kBaseTokenizerData, Microsoft.ML.Tokenizers.Data.R50kBase";
        using var resource = Type.GetType(type)!.Assembly.GetManifestResourceStream("r50k_base.tiktoken.deflate")!;
        using var reader = new StreamReader(new DeflateStream(resource, CompressionMode.Decompress));
        return [.. reader.ReadToEnd().Split("\r\n").Skip(1).Take(50256)
            .Select(line => Encoding.Latin1.GetString(Convert.FromBase64String(line)))];
    }

    [Test]
    public async Task TextReachesNoFartherBackThanTheTokenizerCountsOn() {
        // Merges come in order of rank, leftmost first. Take two texts of which one begins the other. Whatever has been
        // merged, they have the same tokens up to some place, and then different ones. A merge can move that place back
        // only by joining the token before it to the one after it in one text alone; then it moves to where that token
        // begins, and the ones after it begin with that token. So a chain of such merges has rising ranks, and the
        // right half of each begins with the left half of the one before. The longest chain is the reach.
        var vocabulary = Vocabulary();
        var ranks = vocabulary.Select((token, rank) => (token, rank)).ToDictionary();
        var reach = new Dictionary<string, int>();
        for (var rank = 256; rank < vocabulary.Length; rank++) {
            string[] halves = [.. vocabulary[rank].Select(character => $"{character}")];
            var highest = 0;
            while (halves.Length > 2) {
                var best = Enumerable.Range(0, halves.Length - 1)
                    .MinBy(i => ranks.GetValueOrDefault(halves[i] + halves[i + 1], int.MaxValue));
                halves = [.. halves[..best], halves[best] + halves[best + 1], .. halves[(best + 2)..]];
                highest = Math.Max(highest, ranks.GetValueOrDefault(halves[best], rank));
            }
            // A token's bytes are merged to it by lower ranks, without which ranks would not rise.
            if (highest >= rank)
                Assert.Fail($"token {rank} is merged by rank {highest}");
            var before = Enumerable.Range(1, halves[1].Length).Max(i => reach.GetValueOrDefault(halves[1][..i]));
            reach[halves[0]] = Math.Max(reach.GetValueOrDefault(halves[0]), before + halves[0].Length);
        }
        await Assert.That(reach.Values.Max()).IsEqualTo(339);
        await Assert.That(reach.Values.Max() + Tokenizer.EndOfText.Length + 4).IsLessThanOrEqualTo(Tokenizer.Reach);
    }

    /// <summary>Seven million bytes of what must not be divided in the wrong place, so that some of the blocks of 2^18
    /// end at each kind of place, and pieces that fill several blocks.</summary>
    static string TextAroundBlocks() {
        var random = new Random(1);
        const string marks = "'<|endoftext|>'<|endoftext|>";
        string[] parts = [
            " ", "  ", "\r\n", "\t\u3000", "\u00a0", "x", "word", "'s", "'ll", "'", "''t", "!?", "12", "\u0bf0", "é",
            "漢字", "ー", "𝐚", "😀", "<|", "<|endof", "text|>", Tokenizer.EndOfText, "<|endoftext|> \n", marks,
        ];
        string[] runs = ["a", "7", "' !", "ー ヺ", "é ' s", "\u00a0", "😀", "\u2003 \u3000 \n", "'s"];
        var text = new StringBuilder();
        for (var block = 0; block < 2 * runs.Length; block++) {
            for (var length = text.Length + 100_000 + random.Next(1000); text.Length < length;)
                text.Append(parts[random.Next(parts.Length)]);
            if (block % 2 == 0)
                continue;
            // A run of one kind goes on in a document, or begins one.
            text.Append(block % 4 == 1 ? "" : Tokenizer.EndOfText);
            var alphabet = runs[block / 2].Split(' ');
            for (var length = text.Length + 200_000 + random.Next(1000); text.Length < length;)
                text.Append(alphabet[random.Next(alphabet.Length)]);
            text.Append(random.Next(2) == 0 ? "x" : Tokenizer.EndOfText);
        }
        return text.Append("  \n").ToString();
    }

    [Test]
    public async Task ShardsOfAFileInBlocksEqualItsTextInOne() {
        using var folder = new TemporaryFolder();
        string[] texts = [TextAroundBlocks(), "\ufeff", "\ufeff A second file.\n"];
        string[] files = [folder["1.txt"], folder["2.txt"], folder["3.txt"]];
        var expected = new List<int>();
        for (var i = 0; i < texts.Length; i++) {
            File.WriteAllText(files[i], texts[i]);
            foreach (var document in texts[i].TrimStart('\ufeff').Split(Tokenizer.EndOfText)) {
                // White space is no document, unless it fills a block.
                if (Encoding.UTF8.GetByteCount(document) > 1 << 18 || !string.IsNullOrWhiteSpace(document))
                    expected.AddRange([Tokenizer.EndOfTextId, .. Tokenizer.Encode(document)]);
            }
        }
        var read = 0L;
        var (tokens, shards) =
            Tokenizer.WriteShards(folder["shard"], 1000, files, lossy: false, (_, bytes) => read += bytes!.Value);
        await Assert.That((tokens, shards)).IsEqualTo((expected.Count, 1));
        await Assert.That(read).IsEqualTo(files.Sum(file => new FileInfo(file).Length));
        var (val, train) = (ReadShard(folder["shard_val_000000.bin"]), ReadShard(folder["shard_train_000001.bin"]));
        await Assert.That(val.Length).IsEqualTo(1000);
        await Same(val.Concat(train), expected);
    }

    [Test]
    [Arguments("7", "7", "'ll x")]
    [Arguments("7", "7", "<|endoftext|>x")]
    [Arguments("!", "!", "<|endoftext|>x")]
    // A token ends within this character.
    [Arguments("é", "鴧", " and so on")]
    // Every token ends within a character.
    [Arguments("é", "收", " and so on")]
    public async Task ABlockMayEndAnywhereAfterALongPiece(string first, string run, string end) {
        using var folder = new TemporaryFolder();
        for (var before = 1; before < 14; before++) {
            var text = new StringBuilder().Insert(0, first, before);
            var bytes = (1 << 18) - before - Encoding.UTF8.GetByteCount(text.ToString());
            text.Insert(before, run, bytes / Encoding.UTF8.GetByteCount(run)).Append(end);
            var file = folder[$"{before}.txt"];
            File.WriteAllText(file, text.ToString());
            Tokenizer.WriteShards(file, 0, [file], lossy: false, (_, _) => { });
            var expected = Tokenizer.Encode(text.ToString());
            await Same(ReadShard($"{file}_train_000001.bin"), [Tokenizer.EndOfTextId, .. expected]);
        }
    }

    static int[] ReadShard(string path) => [.. MemoryMarshal.Cast<byte, ushort>(File.ReadAllBytes(path).AsSpan(1024))
        .ToArray().Select(token => (int)token)];

    [Test]
    // A byte that only follows others, one that nothing follows, an overlong zero, half a surrogate pair, a number past
    // the last character, another encoding's mark, and one after this encoding's mark.
    [Arguments("", 0, (byte[])[0x41, 0x80, 0x41], 1, "A\ufffdA")]
    [Arguments("", 0, (byte[])[0x41, 0xc3], 1, "A\ufffd")]
    [Arguments("", 0, (byte[])[0x41, 0xe6, 0xbc], 1, "A\ufffd")]
    [Arguments("", 0, (byte[])[0x41, 0xc0, 0x80], 1, "A\ufffd\ufffd")]
    [Arguments("", 0, (byte[])[0x41, 0xed, 0xa0, 0x80, 0x41], 1, "A\ufffd\ufffd\ufffdA")]
    [Arguments("", 0, (byte[])[0xf4, 0x90, 0x80, 0x80], 0, "\ufffd\ufffd\ufffd\ufffd")]
    [Arguments("", 0, (byte[])[0xff, 0xfe, 0x41, 0x00], 0, "\ufffd\ufffdA\0")]
    [Arguments("", 0, (byte[])[0xef, 0xbb, 0xbf, 0x41, 0xff], 4, "A\ufffd")]
    // In the third block, among words and in one piece; blocks end within characters.
    [Arguments("中", 200_000, (byte[])[0xe6, 0xbc, 0x41], 0, "\ufffdA")]
    [Arguments("中 ", 150_000, (byte[])[0xe6, 0xbc, 0x20], 0, "\ufffd ")]
    public async Task TextThatIsNotUtf8IsRefusedOrReplaced(
        string before, int count, byte[] bytes, int position, string text) {
        before = string.Concat(Enumerable.Repeat(before, count));
        byte[] beforeBytes = Encoding.UTF8.GetBytes(before);
        using var folder = new TemporaryFolder();
        File.WriteAllBytes(folder["text"], [.. beforeBytes, .. bytes]);
        await Assert.That(Refusal(folder, 0, folder["text"])).Contains($"{folder["text"]}: expected text in UTF-8")
            .And.Contains($"at byte {beforeBytes.Length + position};");
        Tokenizer.WriteShards(folder["shard"], 0, [folder["text"]], lossy: true, (_, _) => { });
        await Same(
            ReadShard(folder["shard_train_000001.bin"]), [Tokenizer.EndOfTextId, .. Tokenizer.Encode(before + text)]);
    }

    [Test]
    public async Task ShardsNeedTextBeyondTheHeldOutTokensAndAFreeName() {
        using var folder = new TemporaryFolder();
        File.WriteAllText(folder["text"], "One two three four.");
        // Its mark and five tokens.
        await Assert.That(Refusal(folder, 6, folder["text"])).Contains(folder["text"]);
        await Assert.That(Directory.GetFiles(folder.Path).Length).IsEqualTo(1);
        File.WriteAllText(folder["nothing"], " \n");
        await Assert.That(Refusal(folder, 0, folder["nothing"])).Contains(folder["nothing"]);
        var written = Tokenizer.WriteShards(folder["shard"], 5, [folder["text"]], lossy: false, (_, _) => { });
        await Assert.That(written).IsEqualTo((6, 1));
        await Assert.That(Refusal(folder, 0, folder["text"])).Contains(folder["shard_train_000001.bin"]);
    }

    /// <summary>The sentence of the error that writing shards ends with; threads that encode wrap it.</summary>
    static string Refusal(TemporaryFolder folder, int valTokens, string file) {
        try {
            Tokenizer.WriteShards(folder["shard"], valTokens, [file], lossy: false, (_, _) => { });
        } catch (Exception e) when ((e as AggregateException)?.InnerException is Gpt2Exception || e is Gpt2Exception) {
            return (e as Gpt2Exception ?? e.InnerException!).Message;
        }
        return "nothing was refused";
    }
}

/// <summary>The real binary's tokenize: exactness, time and memory, and what it may be given to read.</summary>
public class TokenizeTests {
    const string Tokenize = "tokenize -o new";

    static byte[] Shard(TemporaryFolder folder) => File.ReadAllBytes(folder["new_train_000001.bin"]);

    [Test]
    public async Task DocumentsOfAllOfUnicodeAreEncodedAsGpt2Does() {
        using var folder = new TemporaryFolder();
        await Gpt2Process.Succeed(folder.Path, [.. Tokenize.Split(' '), Golden("documents.txt")]);
        await Same(Shard(folder), File.ReadAllBytes(Golden("documents.bin")));
    }

    [Test]
    [Arguments("a", 1_000_000, 250_000)]
    [Arguments("acgt", 250_000, 500_000)]
    [Arguments("中", 300_000, 300_000)]
    [Arguments("\n", 1_000_000, 500_001)]
    [Arguments("x ", 30_000_000, 30_000_000)]
    [Arguments("\n", 8_000_000, 4_000_001, "")]
    public async Task TimeAndMemoryDoNotGrowWithThePieces(string text, int count, int tokens, string first = "!") {
        using var folder = new TemporaryFolder();
        var whole = new StringBuilder(first).Insert(first.Length, text, count).Append('!').ToString();
        File.WriteAllText(folder["text.txt"], whole);
        var clock = Stopwatch.StartNew();
        using var process = Gpt2Process.Start(folder.Path, $"{Tokenize} text.txt");
        var peak = 0;
        while (process.PeakKilobytes() is > 0 and var kilobytes) {
            peak = Math.Max(peak, kilobytes);
            await Assert.That(clock.Elapsed.TotalSeconds).IsLessThan(Math.Max(10, 2e-6 * whole.Length)); // 0.5 MB/s
            await Task.Delay(10);
        }
        var result = await process.End();
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        await Assert.That(peak).IsBetween(1, 30_000 + 2_000 * Environment.ProcessorCount);
        // The mark's id and the exclamation marks.
        await Assert.That((Shard(folder).Length - 1024) / 2).IsEqualTo(tokens + first.Length + 2);
    }

    const string Text = "One two three.\n";

    [Test]
    [Arguments("exec \"$@\" - <text.txt")]
    [Arguments("cat text.txt | exec \"$@\" -")]
    [Arguments("exec \"$@\" /dev/stdin <<<'One two three.'")]
    [Arguments("exec \"$@\" <(sleep 0.1; echo One two; sleep 0.1) <(echo three.)", "One two\n<|endoftext|>three.\n")]
    [Arguments("mkfifo fifo && (cat text.txt >fifo & exec \"$@\" fifo)")]
    public async Task TextComesFromAPipeToo(string bash, string text = Text) {
        using var folder = new TemporaryFolder();
        File.WriteAllText(folder["text.txt"], Text);
        var result = await Gpt2Process.RunIn(bash, folder.Path, Tokenize);
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        File.WriteAllText(folder["text.txt"], text);
        await Gpt2Process.Succeed(folder.Path, "tokenize -o file text.txt");
        await Same(Shard(folder), File.ReadAllBytes(folder["file_train_000001.bin"]));
    }

    [Test]
    [Arguments("mkfifo fifo && (sleep 6; echo late >fifo) & until [ -p fifo ]; do :; done; exec \"$@\" fifo", "fifo")]
    [Arguments("(sleep 6; echo late) | \"$@\" -", "-")]
    public async Task APipeThatNobodyWritesToIsNamed(string bash, string name) {
        using var folder = new TemporaryFolder();
        var result = await Gpt2Process.RunIn(bash, folder.Path, Tokenize);
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        await Assert.That(result.Sentences[0]).StartsWith($"gpt2: {name}: no text for 5 seconds");
        await Assert.That(result.Sentences.Length).IsEqualTo(2).Because(result.ToString());
    }

    [Test]
    public async Task AFileWithoutASizeHasProgressToo() {
        using var folder = new TemporaryFolder();
        const string terminal = "exec script -qec \"$*\" /dev/null";
        var result = await Gpt2Process.RunIn(terminal, folder.Path, $"{Tokenize} /proc/cpuinfo");
        await Assert.That(result.ExitCode).IsEqualTo(0).Because(result.ToString());
        await Assert.That(result.Output).Contains(" 0 MiB").And.Contains(" tokens: 0 for validation");
    }

    [Test]
    public async Task AClosedStandardInputIsNamed() {
        using var folder = new TemporaryFolder();
        var result = await Gpt2Process.RunIn("exec \"$@\" - <&-", folder.Path, Tokenize);
        await Assert.That(result.ExitCode).IsEqualTo(1);
        await Assert.That(result.Sentences.Single()).IsEqualTo("gpt2: standard input: expected text, found it closed");
    }

    [Test]
    [Arguments("sub", "expected .txt, .jsonl or .parquet files in the folder, found none")]
    [Arguments("nowhere.txt", "expected text, found none")]
    public async Task WhatIsNoFileIsNamed(string path, string words) {
        using var folder = new TemporaryFolder();
        File.WriteAllText(folder["text.txt"], Text);
        Directory.CreateDirectory(folder["sub"]);
        var result = await Gpt2Process.Run(folder.Path, $"{Tokenize} text.txt {path}");
        await Assert.That(result.ExitCode).IsEqualTo(1);
        await Assert.That(result.Sentences.Single()).IsEqualTo($"gpt2: {path}: {words}");
        await Assert.That(Folders.Names(folder.Path)).IsEqualTo("text.txt");
    }

    [Test]
    [Arguments(Gpt2Process.Interrupt)]
    [Arguments(Gpt2Process.Terminate)]
    public async Task NothingIsLeftOfAnInterruptedRun(int signal) {
        using var folder = new TemporaryFolder();
        // So much that there are shards already while the second file is waited for.
        var text = new StringBuilder().Insert(0, Text, 100_000 * Environment.ProcessorCount);
        File.WriteAllText(folder["text.txt"], text.ToString());
        const string bash = "mkfifo fifo; exec \"$@\" text.txt fifo";
        using var process = Gpt2Process.StartIn(bash, folder.Path, $"{Tokenize} --val-tokens 9");
        for (var i = 0; i < 1000 && Directory.GetFiles(folder.Path, "new_*").Length < 2; i++)
            await Task.Delay(10);
        await Assert.That(Folders.Names(folder.Path)).Contains("new_train_000001.bin.tmp new_val_000000.bin");
        process.Signal(signal);
        await Assert.That((await process.End()).ExitCode).IsEqualTo(128 + signal);
        await Assert.That(Folders.Names(folder.Path)).IsEqualTo("fifo text.txt");
    }
}
