namespace Gpt2;

/// <summary>Continues texts, and writes each sample while its tokens are made.</summary>
/// <param name="model">It makes as many samples at a time as its batch has sequences.</param>
/// <param name="tokenizer">Null to write ids.</param>
/// <param name="count">Samples of each text.</param>
/// <param name="tokens">Tokens to add at most.</param>
/// <param name="stopAtContext">Whether a sample ends where the context is full.</param>
public sealed class Sampler(
    Model model, Tokenizer? tokenizer, Choice choice, int count, int tokens, bool stopAtContext, TextWriter output) {
    readonly List<int[]> made = []; // the tokens of all samples of this batch, row by row
    IEnumerator<int[]> steps = Enumerable.Empty<int[]>().GetEnumerator();
    DateTime since;
    TimeSpan first;
    long more; // tokens after the first ones

    /// <summary>Writes all samples of a text, whose ids are given, with --- between them.</summary>
    /// <param name="since">When the time to the first token began.</param>
    /// <returns>The speed in words.</returns>
    public string Write(string text, int[] ids, DateTime since) {
        (this.since, first, more) = (since, default, 0);
        var room = model.Config.MaxT + 1 - ids.Length;
        if (tokens > room)
            Console.Error.WriteLine($"context {model.Config.MaxT} tokens, fewer than {ids.Length} and {tokens} more: " +
                (stopAtContext ? "the text ends there" : "then it goes on from the newest half"));
        for (var i = 0; i < count; i++) {
            if (i % model.B == 0) {
                steps = model.Generate(ids, choice with { Sample = i }, stopAtContext
                    ? Math.Min(tokens, Math.Max(room, 0)) : tokens, Math.Min(model.B, count - i)).GetEnumerator();
                made.Clear();
            }
            var sample = Tokens(i % model.B);
            output.Write((i > 0 ? "---\n" : "") + (tokenizer != null ? text : string.Join(' ', ids)));
            foreach (var part in tokenizer?.Decode(sample.TakeWhile(Tokenizer.IsText)) ??
                sample.Select(id => $" {id}"))
                output.Write(part);
            output.WriteLine();
        }
        return $"speed   {first.TotalSeconds:f2} s to the first token" +
            (more == 0 ? "" : $"; then {more / (DateTime.Now - since - first).TotalSeconds:f0} tokens/s");
    }

    /// <summary>One sample's tokens; whoever needs more than were made makes all samples' next ones.</summary>
    IEnumerable<int> Tokens(int sample) {
        for (var n = 0; n < made.Count || steps.MoveNext(); n++) {
            if (n == made.Count) {
                made.Add(steps.Current);
                (first, more) = first == default ? (DateTime.Now - since, 0) : (first, more + steps.Current.Length);
            }
            yield return made[n][sample];
        }
    }
}
