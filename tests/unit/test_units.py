import pytest

from migrationd.units import parse_size, parse_whole


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("0x1000", 4096),
        ("0XfF", 255),
        ("4k", 4096),
        ("4K", 4096),
        ("7b", 7),
        ("1M", 1 << 20),
        ("1.5k", 1536),
        ("2T", 2 << 40),
        ("1e", 1 << 60),
        (" 1", 1),
        ("-0", 0),
        ("18446744073709551615", (1 << 64) - 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "abc", "1.5", "1.5b", "0x10k", "1Z", "1K,2", "1 ", "0x", "١"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is "):
        parse_size(text)


@pytest.mark.parametrize("text", ["-1", "16E", "18446744073709551616", "9" * 60, "-0x1"])
def test_out_of_range(text: str) -> None:
    with pytest.raises(OverflowError):
        parse_size(text)


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("007", 7), ("65535", 65535)])
def test_whole_numbers(text: str, number: int) -> None:
    assert parse_whole(text, 65535) == number


@pytest.mark.parametrize(
    "text", ["", "-1", "+1", " 1", "1.0", "0x1", "65536", "²", "١", "9" * 5000]
)
def test_no_whole_numbers(text: str) -> None:
    assert parse_whole(text, 65535) is None
