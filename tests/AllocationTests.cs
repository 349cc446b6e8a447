namespace Gpt2.Tests;

/// <summary>A training step allocates no managed memory.</summary>
public sealed class AllocationTests {
    [Test, NotInParallel]
    [Arguments(1, OptimizerKind.AdamW)]
    [Arguments(2, OptimizerKind.AdamW)]
    [Arguments(2, OptimizerKind.Muon)]
    public async Task AStepAllocatesNothing(int threads, OptimizerKind kind) {
        using var device = new Cpu(threads);
        var config = new Config(MaxT: 32, V: 211, Vp: 256, L: 2, NH: 3, C: 48);
        var model = Models.Random(config, device, 2, 21, Purpose.Train, recompute: 2, kind);
        var optimizer = new Optimizer(model);
        void Step(int number) {
            model.Forward();
            model.Loss(1f / 42);
            model.Backward();
            optimizer.Update(number, 1e-3f, 0.1f, optimizer.GradientNorm());
        }
        for (var number = 1; number <= 100; number++) // the first steps compile the code
            Step(number);
        // In some steps the runtime allocates a few bytes itself, as for a lock's first contention.
        var least = long.MaxValue;
        for (var number = 101; number <= 120; number++) {
            var before = GC.GetTotalAllocatedBytes(precise: true);
            Step(number);
            least = Math.Min(least, GC.GetTotalAllocatedBytes(precise: true) - before);
        }
        await Assert.That(least).IsEqualTo(0);
    }
}
