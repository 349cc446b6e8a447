namespace Gpt2.Tests;

public class OperationTests {
    [Test]
    public async Task Placeholder() => await Assert.That(new Mt19937(5489).NextUInt32()).IsEqualTo(3499211612u);
}
