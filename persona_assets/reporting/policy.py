"""What a page may do, said in the page: run nothing, ask for nothing, look as its own style says.

The templates' Content-Security-Policy allows one style sheet by its hash, which stands there once
the sheet is rendered.
"""

from __future__ import annotations

import base64
import hashlib
import re

_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)
_HASH = "'sha256-'"


def guarded(html: str) -> str:
    """A rendered page, with the hash of its one style sheet in its policy.

    Raises:
        ValueError: it has no such policy, or not one style sheet.
    """
    styles = _STYLE.findall(html)
    if len(styles) != 1 or html.count(_HASH) != 1:
        raise ValueError(f"a page of {len(styles)} style sheets and {html.count(_HASH)} policies")
    digest = base64.b64encode(hashlib.sha256(styles[0].encode("utf-8")).digest()).decode("ascii")
    return html.replace(_HASH, f"'sha256-{digest}'")
