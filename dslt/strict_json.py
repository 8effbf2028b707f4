"""JSON from outside: whatever is wrong with it is a ValueError. Open to all.

The standard library's reader also raises RecursionError, and takes escapes such as `\\ud800`, half
of a surrogate pair, which make texts that no UTF-8 file can hold.
"""

import json


def loads(text: str | bytes):
    """The value of a JSON document; raises ValueError for what is none or holds half characters."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")  # the library's own decoding lets halves pass
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError(
            "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; mend or "
            "remove it"
        ) from None
    return value
