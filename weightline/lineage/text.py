"""Formats numbers, and escapes text from manifests for Markdown and mermaid. Pure.

Writers of manifests choose stage and run names freely, so names must neither break a table nor become markup.
"""

from __future__ import annotations

import re

_MERMAID_PLAIN = re.compile(r"[A-Za-z0-9 .,%+_/()=-]")
_MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~-])")
_MAX_NAME_LENGTH = 60


def escape_mermaid(text: str) -> str:
    """Returns the text for use inside a quoted mermaid label: special characters become numeric entities."""
    return "".join(c if _MERMAID_PLAIN.fullmatch(c) else f"#{ord(c)};" for c in shorten(text))


def escape_markdown(text: str) -> str:
    """Returns the text for use in a cell of a Markdown table: without markup, HTML, or the end of a cell or line."""
    plain = shorten(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN_SPECIAL.sub(r"\\\1", plain)


def escape_markdown_url(url: str) -> str:
    """Returns a URL as inline code: it is shown, is never a link, and cannot end the code."""
    return "`" + " ".join(url.replace("`", "'").split()) + "`"


def slug(text: str) -> str:
    """Returns lowercase letters, digits and dashes: "My_Chain v2" -> "my-chain-v2"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def shorten(text: str) -> str:
    """Returns the text as one line of at most 60 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_NAME_LENGTH else line[: _MAX_NAME_LENGTH - 3] + "..."


def format_nbytes(nbytes: float) -> str:
    """Returns a number of bytes with a unit, a power of 1000: 51234 -> "51.2 kB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def format_percent(fraction: float) -> str:
    """Returns a fraction in percent: 0.00671 -> "0.67 %"."""
    return f"{100 * fraction:.2f} %"


def format_time(stamp: str | None) -> str:
    """Returns the time of day of an ISO 8601 stamp: "2026-11-24T06:49:36.123Z" -> "06:49:36"; "-" without one."""
    return stamp[11:19] if stamp and len(stamp) >= 19 else "-"
