from longnet.plots.names import name_count, name_length


def test_lengths_have_names():
    assert [name_length(tokens) for tokens in (512, 1000, 2048, 2049, 32768, 2**20, 3 * 2**20)] == [
        "512", "1,000", "2K", "2,049", "32K", "1M", "3M",
    ]  # fmt: skip


def test_counts_have_names():
    assert [name_count(number) for number in (0, 12, 1500, 2_000_000, 3.3e9, 2e15)] == [
        "0", "12", "1.5k", "2M", "3.3B", "2e15",
    ]  # fmt: skip
