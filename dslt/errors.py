"""The one error that is the user's to mend. May be imported from anywhere; imports nothing.

`dslt` prints an InputError's message and exits with status 2, without a traceback. Every other
exception is a bug of ours and keeps its traceback.
"""


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message says what was found, what was expected, where (path and line, or both shapes) and
    what to try next.
    """
