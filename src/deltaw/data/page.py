"""What `deltaw plan` found, as one HTML file without network or scripts: checks, sources, lengths, rows token by token."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deltaw.core.html import document, table
from deltaw.data.dataset import DataReport
from deltaw.data.encode import Encoded
from deltaw.data.preflight import Check
from deltaw.data.preview import Piece, pieces

MOST = 600
"""Tokens shown of a row: a longer one loses its middle."""
OWN_STYLE = """.fine{color:#1a7f37}.warning{color:#9a6700}.fatal{color:#cf222e}.verdict{font-weight:600}
.bar{background:#54aeff;height:1em;min-width:1px}.bars td:last-child{width:70%}
.row{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.7 ui-monospace,monospace;background:#f6f8fa;padding:1em}
.row span{border-left:1px solid #d0d7de}.row .learnt{background:#aceebb}.row .special{color:#8250df;font-weight:600}"""
BREAK = "↵\n"


def page(
    title: str,
    plan: str,
    report: DataReport,
    held_out: str,
    checks: Sequence[Check],
    rows: Iterable[Encoded],
    tokenizer: Any,
    processor: Any = None,
) -> str:
    """The page. plan: what is trained, as text; held_out: a line on the rows that are held out."""
    lost = sum(report.dropped.values())
    facts = {
        "rows": f"{report.rows:,}", "kept": f"{report.rows - lost:,}",
        **({"pieces of the texts": f"{report.kept:,}"} if report.kept > report.rows else {}),
        "dropped": f"{lost:,}", **{f"dropped: {reason}": f"{count:,}" for reason, count in report.dropped.items()},
        "cut": f"{report.cut:,}", "held out": held_out.removeprefix("held out "),
        "tokens": f"{report.total_tokens:,}", "tokens that are learnt": f"{report.supervised_tokens:,}",
        **({"images": report.pictured} if report.images else {}),
        "longest": f"{report.longest:,} tokens",
        **{f"length at {percent} %": f"{length:,} tokens" for percent, length in report.percentiles.items()},
    }  # fmt: skip
    sources = [("source", "form", "rows", "weight")]
    sources += [(part.source, part.form, f"{part.rows:,}", f"{part.weight:g}") for part in report.parts]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return document(title, [
        "<h2>Checks</h2>", _checks(checks),
        "<h2>Sources</h2>", table(sources, head=True), "<h2>Rows</h2>", table(facts.items()),
        "<h2>Lengths</h2>", _bars(report.histogram),
        '<h2>Rows as the model sees them</h2><p>On green: what is learnt. Violet: special tokens. Every token begins '
        "with a line; its number is under the mouse.</p>",
        *(_row(row, tokenizer, special, processor) for row in rows),
        "<h2>What is trained</h2>", f"<pre>{html.escape(plan)}</pre>",
    ], "plan", OWN_STYLE)  # fmt: skip


def _checks(checks: Sequence[Check]) -> str:
    lines = []
    for check in checks:
        fix = f"<br>fix: {html.escape(check.fix)}" if check.fix else ""
        verdict = f'<td class="verdict {check.verdict}">{check.verdict}</td>'
        lines.append(f"<tr>{verdict}<th>{html.escape(check.name)}</th><td>{html.escape(check.found)}{fix}</td></tr>")
    return f"<table>{''.join(lines)}</table>"


def _bars(histogram: Mapping[int, int]) -> str:
    most = max(histogram.values(), default=1)
    lines = (
        f"<tr><th>≤ {bound:,} tokens</th><td>{count:,}</td>"
        f'<td><div class="bar" style="width:{100 * count / most:.1f}%"></div></td></tr>'
        for bound, count in histogram.items()
    )
    return f'<table class="bars">{"".join(lines)}</table>'


def _row(row: Encoded, tokenizer: Any, special: set[int], processor: Any) -> str:
    whole = list(pieces(row, tokenizer, processor)) if row.images else []
    if not whole or len(whole) > MOST:
        whole = list(pieces(row, tokenizer)) if len(row.ids) <= MOST else [*_ends(row, tokenizer)]
    shown = whole
    parts = [part if isinstance(part, str) else _piece(part, tokenizer, special) for part in shown]
    before = f"<p>{row.cut:,} tokens were cut away before:</p>" if row.cut else ""
    return f'{before}<div class="row">{"".join(parts)}</div>'


def _ends(row: Encoded, tokenizer: Any) -> Iterable[Piece | str]:
    half = MOST // 2
    yield from pieces(Encoded(row.ids[:half], row.labels[:half]), tokenizer)
    yield f"\n… {len(row.ids) - MOST:,} tokens …\n"
    yield from pieces(Encoded(row.ids[-half:], row.labels[-half:]), tokenizer)


def _piece(piece: Piece, tokenizer: Any, special: set[int]) -> str:
    kinds = [*(["learnt"] if piece.learnt else []), *(["special"] if special.intersection(piece.ids) else [])]
    names = tokenizer.convert_ids_to_tokens(piece.ids)
    about = html.escape(", ".join(f"{number} {name}" for number, name in zip(piece.ids, names, strict=True)))
    text = html.escape(piece.text.replace("\n", BREAK)) or "·"
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f'<span{kind} title="{about}">{text}</span>'
