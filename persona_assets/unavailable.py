"""What an asset may be tried again for: a service that does not answer now and may later."""

from __future__ import annotations


class Unavailable(RuntimeError):
    """A service over the network did not answer, or asked for patience.

    The same request may succeed later, and costs nothing to send again. Whatever is wrong with
    what was asked (a name, a key, a budget) is no such error: asking again would not mend it.
    """
