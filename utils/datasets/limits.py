"""Which pictures are taken, and how much of a data set may be bad. No heavy import: flags read their defaults here."""

import argparse
from typing import NamedTuple


class Limits(NamedTuple):
    """The same for everything that reads a data set."""

    max_pixels: int = 50_000_000  # of one picture
    allow_truncated: bool = False  # JPEGs without their end, whose missing part a decoder fills with grey
    max_bad: float = 0.01  # share of pictures, and of rows, that may be set aside; 0 is strict

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Limits":
        """From the flags of a script; one that it does not have is at its default."""
        return cls(**{name: getattr(args, name) for name in cls._fields if hasattr(args, name)})


LIMITS = Limits()
