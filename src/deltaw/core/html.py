"""HTML pages in one file, without network or scripts: how every page of ours is made.

document(title, parts)  →  <!doctype html> … style, parts, one below the other
"""

import html
from collections.abc import Iterable, Mapping, Sequence

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:760px;margin:2em auto;padding:0 1em;color:#1b1f24}
table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ddd;padding:.3em .6em;text-align:left;vertical-align:top}
pre{background:#f6f8fa;padding:1em;overflow:auto}svg text{font:12px system-ui,sans-serif;fill:#57606a}"""


def document(title: str, parts: Iterable[str], verb: str = "", style: str = "") -> str:
    """The page. title: plain text; parts: HTML; verb: the command that made it; style: CSS beside `STYLE`."""
    name = html.escape(" · ".join([title, f"deltaw {verb}".strip()]))
    css = f"{STYLE}\n{style}" if style else STYLE
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{css}</style>'
    return "\n".join([head, f"<h1>{html.escape(title)}</h1>", *parts, "</html>"]) + "\n"


def table(rows: Iterable[Sequence[str]], head: bool = False) -> str:
    """Rows of plain text. head: the first row names the columns; else the first column names the rows."""
    lines = []
    for number, row in enumerate(rows):
        kinds = ["th"] * len(row) if head and not number else ["th" if not head else "td", *["td"] * (len(row) - 1)]
        cells = (f"<{kind}>{html.escape(cell)}</{kind}>" for kind, cell in zip(kinds, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def facts(record: Mapping[str, object]) -> str:
    """Names and values, one a line."""
    return table((str(name), str(value)) for name, value in record.items())
