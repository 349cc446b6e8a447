namespace Gpt2;

/// <summary>Continues texts, and writes each sample while its tokens are made.</summary>
/// <param name="model">It makes as many samples at a time as its batch has sequences.</param>
/// <param name="tokenizer">Null to write ids.</param>
/// <param name="count">Samples of each text.</param>
/// <param name="tokens">Tokens to add at most.</param>
/// <param name="stopAtContext">Whether a sample ends where the context is full.</param>
public sealed class Sampler(
    Model model, Tokenizer? tokenizer, Choice choice, int count, int tokens, bool stopAtContext, TextWriter output) {
    /// <summary>Writes all samples of a text, whose ids are given, with --- between them.</summary>
    /// <param name="since">When the time to the first token began.</param>
    /// <returns>The speed in words.</returns>
    public string Write(string text, int[] ids, DateTime since) {
        var room = model.Config.MaxT + 1 - ids.Length;
        if (tokens > room)
            Console.Error.WriteLine($"context {model.Config.MaxT} tokens, fewer than {ids.Length} and {tokens} more: " +
                (stopAtContext ? "the text ends there" : "then it goes on from the newest half"));
        var most = stopAtContext ? Math.Min(tokens, Math.Max(room, 0)) : tokens;
        var (first, more) = (TimeSpan.Zero, 0L); // tokens after the first ones
        for (var i = 0; i < count; i += model.B) {
            var made = new List<int[]>(); // the tokens of all samples of this batch, row by row
            var rows = Math.Min(model.B, count - i);
            using var steps = model.Generate(ids, choice with { Sample = i }, most, rows).GetEnumerator();
            for (var row = 0; row < rows; row++) {
                output.Write((i + row > 0 ? "---\n" : "") + (tokenizer != null ? text : string.Join(' ', ids)));
                var sample = Tokens(row);
                foreach (var part in tokenizer?.Decode(sample.TakeWhile(id => id != Tokenizer.EndOfTextId)) ??
                    sample.Select(id => $" {id}"))
                    output.Write(part);
                output.WriteLine();
            }

            // One sample's tokens; whoever needs more than were made makes all samples' next ones.
            IEnumerable<int> Tokens(int row) {
                for (var n = 0; n < made.Count || steps.MoveNext(); n++) {
                    if (n == made.Count) {
                        made.Add(steps.Current);
                        (first, more) = first == default ? (DateTime.Now - since, 0) : (first, more + rows);
                    }
                    yield return made[n][row];
                }
            }
        }
        return $"speed   {first.TotalSeconds:f2} s to the first token" +
            (more == 0 ? "" : $"; then {more / (DateTime.Now - since - first).TotalSeconds:f0} tokens/s");
    }
}
