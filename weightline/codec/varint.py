"""Unsigned LEB128 numbers: seven bits per byte, low bits first; the top bit is set when more bytes follow."""

from __future__ import annotations

from weightline.errors import PayloadError


def put_numbers(out: bytearray, *values: int) -> None:
    """Appends each value, which must not be negative."""
    for value in values:
        rest = value
        while rest >= 128:
            out.append(rest & 127 | 128)
            rest >>= 7
        out.append(rest)


class NumberReader:
    """A cursor over untrusted bytes. Every read is checked; PayloadError(rule) when it fails."""

    def __init__(self, raw: bytes, rule: str) -> None:
        self._raw = raw
        self._at = 0
        self._rule = rule

    def number(self) -> int:
        """Returns the next number, below 2**63."""
        raw, at = self._raw, self._at
        if at + 1 < len(raw):  # most numbers have one byte or two
            first = raw[at]
            if first < 128:
                self._at = at + 1
                return first
            second = raw[at + 1]
            if second < 128:
                self._at = at + 2
                return first & 127 | second << 7
        return self._long_number()

    def _long_number(self) -> int:
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise PayloadError("a number has more than 63 bits", rule=self._rule)

    def take(self, count: int) -> bytes:
        """Returns the next `count` bytes."""
        if count > len(self._raw) - self._at:
            raise PayloadError(f"truncated: {count} bytes needed at {self._at} of {len(self._raw)}", rule=self._rule)
        self._at += count
        return self._raw[self._at - count : self._at]

    @property
    def num_left(self) -> int:
        """Returns the number of remaining bytes."""
        return len(self._raw) - self._at

    def rest(self) -> bytes:
        """Returns all remaining bytes."""
        return self.take(self.num_left)

    def rest_of_words(self, word_nbytes: int = 4) -> bytes:
        """Returns all remaining bytes. PayloadError unless they are a whole number of words."""
        rest = self.rest()
        if len(rest) % word_nbytes:
            raise PayloadError(f"{len(rest)} bytes are not a whole number of words", rule=self._rule)
        return rest
