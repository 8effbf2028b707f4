"""Text from elsewhere on a terminal: what would move its cursor or turn its lines is spelt out.

Open to all; imports nothing.
"""


def printable(text: str, keep: str = "\n") -> str:
    """`text` with escapes such as `\\x1b` for all that is not printable and not in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )
