using Microsoft.Extensions.Logging.Abstractions;
using static Gpt2.Tests.Support;

namespace Gpt2.Tests;

/// <summary>Models with random weights and tokens, and short trainings.</summary>
static class Models {
    /// <summary>A model with a batch of random tokens and with random weights, biases included; no weight is zero.
    /// Weights are bf16 numbers, so that they are the same in any precision.</summary>
    public static Model Random(Config config, IDevice device, int B, int T, Purpose purpose, int recompute = 0,
        OptimizerKind optimizer = OptimizerKind.AdamW) {
        var model = new Model(config, device, B, T, purpose, recompute, optimizer: optimizer);
        foreach (var parameters in (Parameters[])[model.Weights, model.Master]) {
            foreach (var (i, tensor) in parameters.Tensors.Index()) {
                var values = Floats(i + 1, tensor.Count, 0.1);
                // The weights of layer norms are near one.
                foreach (ref var value in values.AsSpan())
                    value += config.Parameters[i].Name is "ln1w" or "ln2w" or "lnfw" ? 1 : 0;
                device.Write(tensor, Rounded(values, DataType.Bf16));
            }
            // Padded rows of wte must not matter.
            device.Write(parameters.Wte[0].Slice(config.V, config.Vp - config.V),
                Enumerable.Repeat(1000f, (config.Vp - config.V) * config.C).ToArray());
        }
        Tokens(21, B * T, config.V).CopyTo(model.Tokens, 0);
        Tokens(22, B * T, config.V).CopyTo(model.Targets, 0);
        return model;
    }

    /// <summary>The logits of each of the batch's tokens, without the padding, by a forward pass.</summary>
    public static float[][] ForwardLogits(this Model model) {
        model.Forward();
        var rows = Enumerable.Range(0, model.LogitParts)
            .SelectMany(part => model.Device.Values(model.Logits(part)).Chunk(model.Config.Vp));
        return [.. rows.Select(row => row[..model.Config.V])];
    }

    /// <summary>Passes forward and backward over the model's batch.</summary>
    /// <returns>The losses, and the gradients of their mean.</returns>
    public static (float[] Losses, float[] Gradients) Pass(this Model model) {
        model.Forward();
        model.Loss(1f / model.Tokens.Length);
        model.Backward();
        model.MeanLoss();
        return (model.Losses, model.Device.Values(model.Gradients!.All));
    }

    /// <summary>Makes a few updates with the model's batch.</summary>
    /// <returns>The norm, the losses and the gradients of each, and the weights and moments at the end.</returns>
    public static float[] Update(this Model model, int updates) {
        var (optimizer, all) = (new Optimizer(model), new List<float>());
        for (var number = 1; number <= updates; number++) {
            var (losses, gradients) = model.Pass();
            var norm = optimizer.GradientNorm();
            optimizer.Update(number, 1e-3f, 0.1f, norm);
            all.AddRange([norm, .. losses, .. gradients]);
        }
        foreach (var parameters in (Parameters[])[model.Weights, model.Master, optimizer.M, optimizer.V])
            all.AddRange(model.Device.Values(parameters.All));
        return [.. all];
    }

    /// <summary>The options of a short run, each test's own apart.</summary>
    public static TrainOptions Options { get; } = new(TrainData: "", ValData: "", Init: null, Out: "", B: 1, T: 1,
        TotalBatch: 1, MaxSteps: 10, LearningRate: 0.1f, Warmup: 0, FinalFraction: 0.1f, WeightDecay: 0.1f,
        Schedule.Cosine, ValEvery: 0, ValBatches: 5, SampleEvery: 0, GenTokens: 4, CheckpointEvery: 0, Keep: 1,
        Resume: false, Recompute: 0, Overfit: false, Shuffle: false, Seed: 42);

    /// <summary>Trains.</summary>
    /// <returns>The number, loss, norm and learning rate of each step, and the first validation loss.</returns>
    public static (double[][] Steps, double Validation) Train(TrainOptions options, IDevice device) {
        using var output = new StringWriter(CultureInfo.InvariantCulture);
        using (var trainer = new Trainer(options, device, output, NullLogger.Instance))
            trainer.Run();
        var steps = Regex.Matches(output.ToString(),
            $@"step +(\d+)/{options.MaxSteps} \| loss (\S+) \| norm (\S+) \| lr (\S+) ");
        return ([.. steps.Select(Numbers)], Numbers(Regex.Match(output.ToString(), @"val loss (\S+)"))[0]);

        static double[] Numbers(Match match) =>
            [.. match.Groups.Values.Skip(1).Select(group => double.Parse(group.Value, CultureInfo.InvariantCulture))];
    }
}
