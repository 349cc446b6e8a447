using Gpt2;

/// <summary>An option, from its line "  -e, --init &lt;string?&gt;   MODEL: A model. [Required]".</summary>
/// <param name="Names">As in -e, --init: a letter if it has one, then its name.</param>
/// <param name="Type">The value's type in C#; empty for a flag.</param>
/// <param name="Text">Its comment: a number's has the range in parentheses, (1 or more), (0 to 1) or (above 0), and
/// an enumeration's first sentence ends with the values, as in "Type of the weights: fp32 or bf16."</param>
internal sealed record Option(string[] Names, string Type, string Group, string Text, string Default, bool IsRequired) {
    /// <summary>Its name, which begins with --.</summary>
    public string Name => Names.First(name => name.StartsWith("--"));

    /// <summary>The values of an enumeration; of other types none.</summary>
    public string[] Values => Type is not [>= 'A' and <= 'Z', ..] ? []
        : Text.Split('.')[0].Split(": ")[^1].Split([", ", " or "], default);

    /// <summary>Its names and what stands for its value: "-e, --init NAME".</summary>
    public string Usage => (Names[0] == Name ? "    " : $"{Names[0]}, ") + Name + Type switch {
        "" => "",
        "int" or "uint" => " N",
        "float" => " X",
        "int[]" => " IDS",
        _ => Name == "--prompt" ? " TEXT" : " NAME",
    };

    /// <summary>Throws unless a value is of the type and in the range. Numbers have no separators.</summary>
    public void Check(string? value) {
        var range = Text.Split('(', ')') is [_, var text, ..] ? text : "";
        double[] bounds = [.. range.Split(' ').Where(word => word is [>= '0' and <= '9', ..]).Select(double.Parse)];
        bool InRange(double x) => double.IsFinite(x) && (bounds.Length == 1 || x <= bounds[1]) &&
            (x > bounds[0] || x == bounds[0] && !range.StartsWith("above"));
        var (right, expected) = Type switch {
            "int" => (int.TryParse(value, out var number) && InRange(number),
                $"a whole number, {range.Replace("or more", $"to {int.MaxValue}")}"),
            "uint" => (uint.TryParse(value, out _), $"a whole number, 0 to {uint.MaxValue}"),
            "int[]" => ($"{value}".Split(',').All(id => int.TryParse(id, out _)), "token ids such as 1,2,3"),
            "float" => (float.TryParse(value, NumberStyles.Float, null, out var x) && InRange(x), $"a number, {range}"),
            "string" => Name == "--prompt" ? (value != null, "a text") : (value is [not '-', ..], "a name"),
            "" => (value == null, "no value"),
            _ => (Values.Contains(value?.ToLowerInvariant()), string.Join(" or ", Values)),
        };
        Require(right, Name, expected, value == null ? "nothing" : $"'{value}'");
    }
}

/// <summary>The help, rewritten from what ConsoleAppFramework makes of the commands' comments.</summary>
/// <param name="textOf">The framework's text for a command, or for none.</param>
internal sealed partial class Help(Func<string[], string> textOf) {
    [GeneratedRegex("^  (-[^<\n]*?)(?: <([^>\n]+?)\\??>)?  +(?:([A-Z]+): )?" +
        "(.*?)(?: \\[(?:Default: (.*)|(Required))\\])?$", RegexOptions.Multiline)]
    private static partial Regex OptionLine();

    /// <summary>The commands, what they do, and an example of each.</summary>
    public (string Name, string About, string Example)[] Commands => [.. textOf([]).Split('\n')
        .Select(line => line.Split(" Example: ")).Where(parts => parts.Length == 2).Select(parts => (parts[0].Split(' ',
            StringSplitOptions.RemoveEmptyEntries)[0], parts[0].Trim().Split("  ", 2)[1].Trim(), parts[1]))];

    /// <summary>A command's options in their order.</summary>
    public Option[] OptionsOf(string command) => [.. OptionLine().Matches(textOf([command])).Select(match => {
        string Part(int i) => match.Groups[i].Value;
        var value = Part(5) == "null" ? "" : Part(5).Trim('@', '"');
        return new Option(Part(1).Split(", "), Part(2), Part(3), Part(4),
            Part(2) is [>= 'A' and <= 'Z', ..] ? value.ToLowerInvariant() : value, Part(6) != "");
    }).Where(option => option.Name is not ("--device" or "--precision") ||
        command is not ("tokenize" or "export" or "info" or "plot" or "completion"))];

    /// <summary>What a command takes besides options, as in "FILE...", and what these are; empty if nothing.</summary>
    public (string Name, string About) FilesOf(string command) {
        var groups = Regex.Match(textOf([command]), @"\[0\] <string(\[\])?> +([A-Z]+): (.*)").Groups;
        return (groups[2].Value + (groups[1].Success ? "..." : ""), groups[3].Value);
    }

    /// <summary>The help that a person asked for: about a command, or about all.</summary>
    public string Of(string[] words) {
        var (commands, width, text) = (Commands, Math.Min(80, Terminal.Width), new StringBuilder());
        void Row(string name, string about, int column) => text.AppendLine(width < 60 && name.Length > 4
            ? $"{name.Replace("      --", "  --")}\n      {Terminal.Wrap(about, 6, width)}"
            : $"{name.PadRight(column)}{Terminal.Wrap(about, column, width)}");
        if (words is not [var command, ..]) {
            text.AppendLine("Usage: gpt2 COMMAND [OPTIONS]\n\nFrom a text to a sample:");
            foreach (var name in (string[])["tokenize", "train", "sample"])
                Row("  ", commands.First(each => each.Name == name).Example, 2);
            text.AppendLine("\nCommands:");
            foreach (var (name, about, _) in commands)
                Row($"  {name}", about, 14);
            Row("\n", "gpt2 COMMAND --help lists a command's options.", 0);
            return $"{text}";
        }
        var (_, summary, example) = commands.First(each => each.Name == command);
        var (options, files) = (OptionsOf(command), FilesOf(command));
        Row("", summary, 0);
        text.AppendLine($"\nUsage: gpt2 {command} [OPTIONS] {files.Name}".TrimEnd() + $"\nExample: {example}");
        if (files.Name != "")
            Row($"\n{files.Name}  ", files.About, files.Name.Length + 2);
        var (heading, longest) = ("", options.Max(option => option.Usage.Length));
        foreach (var option in options) {
            if (option.Group != "" && option.Group != heading)
                text.AppendLine($"\n{heading = option.Group}");
            Row($"  {option.Usage}", option.Text + (option.IsRequired ? " [required]"
                : option.Default != "" ? $" [{option.Default}]" : ""), longest + 4);
        }
        Row("\n", "Defaults are in brackets.", 0);
        return $"{text}";
    }

    /// <summary>What a shell reads, so that it asks this program with the line so far in COMP_LINE.</summary>
    public static string Completion(string shell) => (shell, Environment.ProcessPath + " completion") switch {
        ("bash", var program) => $"complete -o default -C '{program}' gpt2\n",
        ("zsh", _) => "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n" + Completion("bash"),
        ("fish", var program) => $"complete -c gpt2 -a '(COMP_LINE=(commandline -cp) {program})'\n",
        _ => throw new Gpt2Exception($"SHELL: expected bash, zsh or fish, found '{shell}'", usage: true),
    };

    /// <summary>What the last word of a line may become, each in a line: commands, options or their values.</summary>
    public string Complete(string line) {
        var (words, commands) = (line.Split(' '), Commands.Select(command => command.Name));
        var options = words.Length > 2 && commands.Contains(words[1]) ? OptionsOf(words[1]) : [];
        var all = words.Length < 3 ? commands : words is [_, "completion", _] ? ["bash", "zsh", "fish"]
            : options.FirstOrDefault(option => option.Names.Contains(words[^2]))?.Values is [_, ..] values ? values
            : words[^1].StartsWith('-') ? options.SelectMany(option => option.Names) : [];
        return string.Concat(all.Where(word => word.StartsWith(words[^1])).Select(word => $"{word}\n"));
    }
}

/// <summary>The command line, checked against the help before ConsoleAppFramework parses it.</summary>
internal static class CommandLine {
    /// <summary>Checks the command, the names of its options and their values.</summary>
    /// <returns>The command, each option once under its long name (the last one counts), then the files; or the
    /// command, if any, and --help.</returns>
    internal static string[] Normalize(string[] args, Help help) {
        if (args is [] or ["-h" or "--help" or "--version", ..])
            return args is ["--version", ..] ? ["--version"] : [];
        var command = args[0];
        var exists = help.Commands.Any(each => each.Name == command);
        Require(exists, "COMMAND", "one that gpt2 --help lists", $"'{command}'");
        var (options, takesFiles) = (help.OptionsOf(command), help.FilesOf(command).Name != "");
        var (given, files) = (new Dictionary<string, string?>(), new List<string>());
        for (var i = 1; i < args.Length; i++) {
            var word = args[i];
            if (word is "-h" or "--help" or "--version")
                return [command, word == "-h" ? "--help" : word];
            string[] parts = word.StartsWith("--") ? word.Split('=', 2) : [word];
            if (options.FirstOrDefault(option => word.StartsWith('-') &&
                option.Names.Contains(parts[0], StringComparer.OrdinalIgnoreCase)) is { } option) {
                var value = parts.Length > 1 ? parts[1] : option.Type == "" ? null : args.ElementAtOrDefault(++i);
                option.Check(value);
                given[option.Name] = option.Name == "--prompt" ? '\0' + value : value; // lest the framework acts on --
            } else {
                var isFile = takesFiles && word is "-" or [not '-', ..];
                Require(isFile, command, $"what gpt2 {command} --help lists (quote patterns and texts)", $"'{word}'");
                files.Add(word);
            }
        }
        foreach (var option in options.Where(option => option.IsRequired))
            Require(given.ContainsKey(option.Name), command, $"{option.Name} (see gpt2 {command} --help)", "none");
        return [command, .. given.SelectMany(pair => (string?[])[pair.Key, pair.Value]).OfType<string>(), .. files];
    }

    /// <summary>Runs a command that succeeds unless it throws.</summary>
    internal static int Guard(bool verbose, Action command) => Guard(verbose, () => {
        command();
        return 0;
    });

    /// <summary>Runs a command and turns its exception, if any, into a sentence and an exit status.</summary>
    /// <param name="speaker">Names this process among several, as the sentence's prefix.</param>
    internal static int Guard(bool verbose, Func<int> command, Func<string>? speaker = null) {
        try {
            return command();
        } catch (Exception e) {
            e = (e as AggregateException)?.InnerException ?? e;
            var who = e.Message.StartsWith("rank ") ? "" : speaker?.Invoke();
            Console.Error.WriteLine($"gpt2: {who}{Sentence(e)}{(verbose ? $"\n{e}" : "")}");
            return (e as Gpt2Exception)?.ExitCode ?? 1;
        }
    }
}
