"""Inputs for fuzz tests: good files, damaged in a way that a seed repeats.

``MATCHBOX_FUZZ`` is the number of inputs per parser; `make test` takes each test's default, `make fuzz` a million.
"""

import os
import random
import re
from collections.abc import Iterator, Sequence

NUMBER = re.compile(rb"-?[0-9]+(\.[0-9]+)?")
NUMBERS = (  # what parsers trip over, in text
    *(b"0", b"-1", b"1", b"2", b"3", b"7", b"255", b"65536", b"2147483647", b"2147483648", b"-2147483649"),
    *(
        b"1e9",
        b"1e999",
        b"-0.0",
        b"nan",
        b"inf",
        b"0x10",
        b"1_000",
        b"16.5",
        b"9" * 400,
        b"",
        b" ",
        b"1 2",
        b"\xd9\xa3",
    ),
)
BYTES = (  # and in binary
    *(b"\0", b"\xff", b"\r", b"\n", b"\t", b"#", b"=", b"[", b"]", b"{", b"}", b",", b'"', b"\xef\xbb\xbf", b"\xc3"),
    *(b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\0\xc0\x7f", b"\0\0\x80\x7f"),
)
MAX_BYTES = 1 << 16  # repeated doubling must not be what is slow


def num_inputs(default: int = 50_000) -> int:
    """How many inputs a fuzz test takes: ``MATCHBOX_FUZZ``, or what keeps it within seconds."""
    return int(os.environ.get("MATCHBOX_FUZZ", default))


def mutations(seeds: Sequence[bytes], tokens: Sequence[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """``count`` damaged copies of ``seeds``: one to four changes each; ``tokens`` are words of the format.

    The same arguments give the same inputs: ``itertools.islice(mutations(...), n, n + 1)`` is the n-th again.
    """
    rng = random.Random(seed)
    for _ in range(count):
        data = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
            data = rng.choice(CHANGES)(rng, data, seeds, tokens)
        yield data[:MAX_BYTES]


def _flip(rng, data, seeds, tokens):
    at = rng.randrange(len(data) or 1)
    return data[:at] + bytes([(data[at] if data else 0) ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _overwrite(rng, data, seeds, tokens):
    at, new = rng.randrange(len(data) + 1), rng.choice(BYTES)
    return data[:at] + new + data[at + len(new) :]


def _insert(rng, data, seeds, tokens):
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((*BYTES, rng.randbytes(3))) + data[at:]


def _delete(rng, data, seeds, tokens):
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 2, 4, 8, 64)) :]


def _truncate(rng, data, seeds, tokens):
    return data[: rng.randrange(len(data) + 1)]


def _repeat(rng, data, seeds, tokens):
    start = rng.randrange(len(data) + 1)
    part = data[start : start + rng.choice((1, 8, 64, 256))]
    return data[:start] + part * rng.choice((2, 3, 9)) + data[start:]


def _join(rng, data, seeds, tokens):
    """The beginning of one file and the end of another."""
    other = rng.choice(seeds)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _token(rng, data, seeds, tokens):
    """A word of the format anywhere."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(tokens or BYTES) + data[at:]


def _number(rng, data, seeds, tokens):
    """Another number in the place of one."""
    found = NUMBER.search(data, rng.randrange(len(data) + 1)) or NUMBER.search(data)
    return data[: found.start()] + rng.choice(NUMBERS) + data[found.end() :] if found else data


def _line(rng, data, seeds, tokens):
    """A line removed, doubled, moved or exchanged for a word."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    line = lines.pop(at)
    for new in rng.choice(((), (line, line), (rng.choice(tokens or BYTES),))):
        lines.insert(at, new)
    if rng.randrange(4) == 0:
        lines.insert(rng.randrange(len(lines) + 1), line)
    return b"\n".join(lines)


CHANGES = (
    _flip,
    _overwrite,
    _insert,
    _delete,
    _truncate,
    _repeat,
    _join,
    _token,
    _token,
    _number,
    _number,
    _number,
    _line,
)
