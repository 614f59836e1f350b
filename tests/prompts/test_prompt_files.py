"""Prompt files: the definition of a line, and one line for each fault."""

import io
import sys
import tracemalloc

import pytest

from ldm.prompts.dialects import read_prompt_list
from ldm.prompts.files import MAX_LINE, Faults, read_lines
from ldm.util import InputError


def read_plain(source):
    return [line.prompt for line in read_prompt_list(source, "plain")]


@pytest.fixture
def write(tmp_path):
    def write(content: bytes):
        path = tmp_path / "prompts.txt"
        path.write_bytes(content)
        return path

    return write


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        read_plain(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    return str(caught.value)


def lines_of(source) -> list[str]:
    faults = Faults("it")
    lines = list(read_lines(source, faults))
    faults.raise_any()
    return lines


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_byte_order_mark(write, end, mark, last):
    content = mark + end.join(["ein Mädchen".encode(), b"", b"  ", b"two"]) + (end if last else b"")
    assert lines_of(write(content)) == ["ein Mädchen", "", "  ", "two"]
    assert read_plain(write(content)) == ["ein Mädchen", "two"]


@pytest.mark.parametrize(
    "separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\x00", "\x1b"]
)
def test_other_separators_stay_in_the_prompt(write, separator):
    text = f"a{separator}b"
    assert read_plain(write(f"{text}\n{text}".encode())) == [text, text]


def test_text_is_literal(write):
    lines = [" leading and trailing ", "%s {} <script> [/] \"'\\n", "# no comment", "--prompt x", "东京 🌃"]
    assert read_plain(write("\n".join(lines).encode())) == lines


def test_mark_inside_the_file_is_text(write):
    assert read_plain(write("a\n\ufeffb".encode())) == ["a", "\ufeffb"]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\r", "\r\nb", "\rb"])
def test_longest_line(write, end):
    expected = ["é" * MAX_LINE] + ["b"] * end.endswith("b")
    assert read_plain(write(("é" * MAX_LINE + end).encode())) == expected


@pytest.mark.parametrize("excess", [1, 2, 3, 1_000_000])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_too_long_a_line(write, excess, end):
    message = refusal(write(("ok\n\n" + "a" * (MAX_LINE + excess) + end).encode()))
    assert message.endswith("prompts.txt, line 3: longer than 10,000 characters; shorten it")


@pytest.mark.parametrize(
    ("content", "line", "byte", "offset"),
    [
        (b"\xff", 1, 0xFF, 0),
        (b"good\r\nM\xe4dchen", 2, 0xE4, 7),
        ("é東🌃\n\n".encode() + b"ab\x80", 3, 0x80, 13),
        (b"\xef\xbb\xbfok\nx\xc3", 2, 0xC3, 7),
        (b"\xed\xa0\x80", 1, 0xED, 0),  # a surrogate
        (b"x\n" * 9000 + b"\xe9", 9001, 0xE9, 18000),
    ],
)
def test_not_utf8(write, content, line, byte, offset):
    message = refusal(write(content))
    with pytest.raises(UnicodeDecodeError) as caught:
        content.decode()
    assert caught.value.start == offset
    assert f"line {line}: byte 0x{byte:02x} at offset {offset} is not UTF-8" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a prompt\nb".encode("utf-16"), "line 1: is not UTF-8 but UTF-16; save the file as UTF-8"),
        ("a prompt\r\nb".encode("utf-16-le"), "line 1: is not UTF-8 but UTF-16;"),
        ("a prompt".encode("utf-16-be"), "line 1: is not UTF-8 but UTF-16;"),
        ("a prompt".encode("utf-32"), "line 1: is not UTF-8 but UTF-32;"),
        ("ein Mädchen".encode("cp1252"), "is not UTF-8 (ä in Windows-1252); save the file as UTF-8"),
    ],
)
def test_the_encodings_of_windows_are_named(write, content, said):
    assert said in refusal(write(content))


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \t\r\n\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_nothing_in_the_file(write, content):
    assert "holds no prompt" in refusal(write(content))


def test_missing_file_and_directory(tmp_path):
    assert "No such file" in refusal(tmp_path / "missing\x1b[31m.txt")
    assert "directory" in refusal(tmp_path)


def test_all_faults_at_once(write):
    """Also after a line that is too long, whatever its line end."""
    long = b"a" * (MAX_LINE + 70_000)
    lines = [b"ok", b"\xff", long, b"ok", long + b"\xfe", b"ok\xe4"]
    for end in (b"\n", b"\r\n", b"\r"):
        content = end.join(lines)
        with pytest.raises(InputError) as caught:
            read_plain(write(content))
        told = str(caught.value).split("\n")
        assert [line.partition("prompts.txt, ")[2].partition(":")[0] for line in told] == [
            "line 2", "line 3", "line 5", "line 6",
        ]  # fmt: skip
        assert f"byte 0xe4 at offset {len(content) - 1} is" in told[-1]


def test_a_line_end_on_the_limit_of_what_is_read_at_once(write):
    for length in range(MAX_LINE + (1 << 16) - 2, MAX_LINE + (1 << 16) + 6):
        content = b"a" * length + b"\r\n" + b"\xff"
        with pytest.raises(InputError, match=rf"line 2: byte 0xff at offset {length + 2} is"):
            read_plain(write(content))


def test_many_faults_are_counted(write):
    with pytest.raises(InputError) as caught:
        read_plain(write(b"\xff\n" * 45))
    told = str(caught.value).split("\n")
    assert len(told) == 21
    assert told[-1] == "and 25 more"


def test_a_file_of_faults_is_not_read_to_its_end(write):
    path = write(b"\xff\n" * 5_000)
    faults = Faults("it")
    with pytest.raises(InputError, match="and 980 more"):
        list(read_lines(path, faults))


def test_standard_input(monkeypatch):
    binary = io.BytesIO("\ufeffeine Straße\r\n\r\nzwei".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(binary, encoding="ascii"))
    assert read_plain("-") == ["eine Straße", "zwei"]
    assert not binary.closed


def test_standard_input_faults(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\xff")))
    with pytest.raises(InputError, match=r"^standard input, line 2: byte 0xff at offset 2 "):
        read_plain("-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(InputError, match="standard input holds no prompt"):
        read_plain("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="closed"):
        read_plain("-")


def test_a_long_file_streams(write):
    path = write(
        b"".join(b"%07d a prompt of the usual length, with a few words in it\n" % i for i in range(20_000))
    )
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_lines(path, Faults("it"))) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        assert len(read_plain(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 13 << 19
    finally:
        tracemalloc.stop()
