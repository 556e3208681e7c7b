"""Numbers for people, and text from manifests made harmless for Markdown and mermaid. Pure.

Stage and run names are whatever a writer put into a manifest: they must neither break a table nor become markup.
"""

from __future__ import annotations

import re

_MERMAID_PLAIN = re.compile(r"[A-Za-z0-9 .,%+_/()=-]")
_MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~-])")
_MAX_NAME_LENGTH = 60


def escape_mermaid(text: str) -> str:
    """The text as it may stand inside a quoted mermaid label: every unusual character as a numeric entity."""
    return "".join(c if _MERMAID_PLAIN.fullmatch(c) else f"#{ord(c)};" for c in shorten(text))


def escape_markdown(text: str) -> str:
    """The text as it may stand in a cell of a Markdown table: no markup, no HTML, no end of cell or line."""
    plain = shorten(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN_SPECIAL.sub(r"\\\1", plain)


def escape_markdown_url(url: str) -> str:
    """Returns a URL as inline code: it is shown, is never a link, and cannot end the code."""
    return "`" + " ".join(url.replace("`", "'").split()) + "`"


def slug(text: str) -> str:
    """Returns lowercase letters, digits and dashes: "My_Chain v2" -> "my-chain-v2"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def shorten(text: str) -> str:
    """One line of at most 60 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_NAME_LENGTH else line[: _MAX_NAME_LENGTH - 3] + "..."


def format_nbytes(nbytes: int) -> str:
    """51234 -> "51.2 kB". Powers of 1000."""
    amount = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def format_percent(fraction: float) -> str:
    """0.00671 -> "0.67 %"."""
    return f"{100 * fraction:.2f} %"


def format_time(stamp: str | None) -> str:
    """ "2026-11-24T06:49:36.123Z" -> "06:49:36"."""
    return stamp[11:19] if stamp and len(stamp) >= 19 else "-"
