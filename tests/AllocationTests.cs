using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>A training step leaves nothing for the garbage collector.</summary>
public sealed class AllocationTests {
    [Test, NotInParallel]
    [Arguments(1, OptimizerKind.AdamW)]
    [Arguments(2, OptimizerKind.AdamW)]
    [Arguments(2, OptimizerKind.Muon)]
    public async Task AStepAllocatesNothing(int threads, OptimizerKind kind) {
        using var device = new Cpu(threads);
        var config = new Config(MaxT: 32, V: 211, Vp: 256, L: 2, NH: 3, C: 48);
        var model = new Model(config, device, 2, 21, Purpose.Train, recompute: 2, optimizer: kind);
        var optimizer = new Optimizer(model);
        model.Load(null, 42);
        Tokens(1, 42, config.V).CopyTo(model.Tokens, 0);
        Tokens(2, 42, config.V).CopyTo(model.Targets, 0);
        void Step(int number) {
            model.Forward();
            model.Loss(1f / 42);
            model.Backward();
            optimizer.Update(number, 1e-3f, 0.1f, optimizer.GradientNorm());
        }
        for (var number = 1; number <= 100; number++) // the first ones compile the code
            Step(number);
        // A few bytes in a step or two are the runtime's own, such as a lock's first contention.
        var least = long.MaxValue;
        for (var number = 101; number <= 120; number++) {
            var before = GC.GetTotalAllocatedBytes(precise: true);
            Step(number);
            least = Math.Min(least, GC.GetTotalAllocatedBytes(precise: true) - before);
        }
        await Assert.That(least).IsEqualTo(0);
    }
}
