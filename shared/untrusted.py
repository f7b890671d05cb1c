"""What decoding a stranger's JSON may raise, so that nobody forgets half of it.

msgspec names only part of what can be wrong: text that is no UTF-8 and brackets that nest by the
thousand come as Python's own errors, and would end whoever expects a `DecodeError` alone.
"""

import msgspec

NOT_JSON = (
    msgspec.DecodeError,  # ValidationError included
    UnicodeDecodeError,
    RecursionError,
)
