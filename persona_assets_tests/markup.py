"""Markdown as GitHub and Dagster's interface render it: what a reader gets to see of a text."""

from __future__ import annotations

from markdown_it import MarkdownIt

#: With tables, and raw HTML, which comes through as tokens html_block and html_inline.
PARSER = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")

#: What a model or a question may hold, each short enough not to be cut.
HOSTILE = (
    "<img src=x onerror=alert(1)><script>alert(2)</script>",
    "</td></tr></table><iframe src=//x.example>",
    "[click](javascript:alert(1)) ![seen](https://x.example/p.png)",
    "[a]: https://x.example 'b' <https://x.example> [a][a]",
    "| one | more | cell |",
    "salt\n| --- | --- |\n| forged | row |",
    "salt\n\n# Heading\n\n> quoted\n\n---\n- item",
    "`code` ``more`` ``` *b* __c__ ~~d~~ $x$ &lt; &#60;",
    "\\| \\` \\<b> \\\\",
    "\x1b[2J\x1b]8;;https://x.example\x07salt\u202etlas\u200b",
)


def cells_of(markdown: str) -> list[list[str]]:
    """The text of every cell of the one table that ``markdown`` is, head first.

    Raises:
        AssertionError: it is more than a table, or a cell holds more than text.
    """
    tokens = PARSER.parse(markdown)
    assert [token.type for token in tokens if token.level == 0] == ["table_open", "table_close"]
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            assert {t.type for t in token.children} <= {"text", "text_special"}, token.content
            rows[-1].append("".join(t.content for t in token.children))
        else:
            assert token.type.startswith(("table_", "thead_", "tbody_", "tr_", "th_", "td_"))
    return rows
