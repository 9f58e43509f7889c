"""Shows a document under two tokenizers (`align.show`): in the terminal, or as a self-contained HTML page."""

import base64
import hashlib
import html
import json
import re
import unicodedata
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING, Any

from .. import __version__

if TYPE_CHECKING:
    import rich.console
    import rich.text

    from ..align.show import Entries, Row, ShownDocument, TargetPosition

_MARKS = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": r"\r"})
_FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and symbols by category, but invisible
_STYLES = {"same": "", "inside": "yellow", "none": "red"}
_SHOWN_ENTRIES = 3  # of each distribution, in the terminal


def visible(text: str) -> str:
    """A token's text with invisible characters shown: spaces as ·, line breaks as ⏎, other characters without a shape as \\u200b."""
    marked = text.translate(_MARKS)
    return "".join(char if _has_shape(char, before=marked[:place]) else f"\\u{ord(char):04x}" for place, char in enumerate(marked)) or "∅"


def _has_shape(char: str, *, before: str) -> bool:
    if char in _FILLERS or not char.isprintable():
        return False
    return bool(before) or not unicodedata.category(char).startswith("M")  # a combining character needs one before it


def kind_of(position: "TargetPosition") -> str:
    """`same`: the source has read the same text (with `dtw`: is matched); `inside`: within a source token; `none`: no distribution."""
    return "none" if position.source is None else "inside" if position.ahead else "same"


# ---- page ------------------------------------------------------------------------------------------------------------------------------


def page(document: "ShownDocument") -> str:
    """A self-contained HTML page."""
    partners: dict[int, list[int]] = {}
    for t, position in enumerate(document.target_positions):
        if position.source is not None:
            partners.setdefault(position.source, []).append(t)
    values = {
        "TITLE": f"{document.source_name} → {document.target_name}, document {document.doc_id}",
        "SOURCE": document.source_name,
        "TARGET": document.target_name,
        "VERSION": __version__,
        "DOMAIN": f" · {document.domain}" if document.domain else "",
        "CORPUS": document.corpus,
        "DOCUMENT": str(document.doc_id),
        "MAP": document.vocabulary_map,
        "ALIGNMENT": document.alignment,
        "MATCHED": _matched(document),
        **_figures(document),
    }
    text = resources.files(__package__).joinpath("alignment_page.html").read_text(encoding="utf-8")
    escaped = {key: html.escape(value) for key, value in values.items()}
    escaped["ROWS"] = "".join(_row(document, row, partners) for row in document.rows)
    escaped["DATA"] = _data(document, partners)
    escaped["POLICY"] = _policy(text)
    return re.sub(r"\{\{([A-Z_]+)\}\}", lambda place: escaped[place[1]], text)  # in one pass: a document may contain `{{DATA}}`


def _matched(document: "ShownDocument") -> str:
    """What it means that the position map pairs two positions. With `dtw` the two texts read so far may differ."""
    return "the two are matched" if document.positions == "dtw" else "both have read the same text"


def _figures(document: "ShownDocument") -> dict[str, str]:
    summary = document.summary
    return {
        "POSITIONS": f"{summary.positions:,}",
        "BYTES": f"{summary.text_bytes:,}",
        "COVERED": _percent((summary.same + summary.inside) / max(summary.positions, 1)),
        "SAME": _percent(summary.same / max(summary.positions, 1)),
        "INSIDE": _percent(summary.inside / max(summary.positions, 1)),
        "SOURCE_BPB": _number(summary.source_bpb),
        "MAPPED_BPB": _number(summary.mapped_bpb),
        "MAPPED_BYTES": _percent(summary.mapped_bytes),
        "TARGET_BPB": _number(summary.target_bpb),
        "AGREEMENT": "–" if summary.agreement is None else _percent(summary.agreement),
        **{key.upper(): _percent(getattr(summary, key)) for key in ("mapped", "merged", "lost", "tail")},
        **{f"{key.upper()}_WIDTH": f"{100 * getattr(summary, key):.2f}" for key in ("mapped", "merged", "lost", "tail")},
    }


def _policy(page: str) -> str:
    """What a browser may do: run the page's own script (identified by its hash) and apply styles. It may load and send nothing."""
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _row(document: "ShownDocument", row: "Row", partners: dict[int, list[int]]) -> str:
    source = "".join(_source_token(document, u, partners) for u in row.source)
    target = "".join(
        _token(f"t{t}", kind_of(document.target_positions[t]), document.target_texts[document.target_positions[t].token])
        for t in row.target
    )
    sides = [("source", document.source_name, source), ("target", document.target_name, target)]
    cells = "".join(f'<div class="side {side}" data-model="{html.escape(name)}">{tokens}</div>' for side, name, tokens in sides)
    return f'<section class="row">{cells}</section>\n'


def _source_token(document: "ShownDocument", u: int, partners: dict[int, list[int]]) -> str:
    here = [document.target_positions[t] for t in partners.get(u, [])]
    kind = "none" if not here else "same" if any(position.ahead == 0 for position in here) else "inside"
    return _token(f"s{u}", kind, document.source_texts[document.source_positions[u].token])


def _token(place: str, kind: str, text: str) -> str:
    breaks = "<br>" if "\n" in text else ""
    return f'<span class="{kind[0]}" id="{place}">{html.escape(visible(text))}</span><wbr>{breaks}'


def _data(document: "ShownDocument", partners: dict[int, list[int]]) -> str:
    """The data for the details of a chosen token; entries are [token, probability]."""
    record = {
        "sourceTexts": {token: visible(text) for token, text in document.source_texts.items()},
        "targetTexts": {token: visible(text) for token, text in document.target_texts.items()},
        "source": [
            [position.token, position.next_token, _short(position.next_prob), _listed(position.entries), partners.get(u, [])]
            for u, position in enumerate(document.source_positions)
        ],
        "target": [
            [
                position.token, position.next_token, position.source, position.ahead, _short(position.next_prob),
                _short(position.own_next_prob), [_short(getattr(position, key)) for key in ("mapped", "merged", "lost", "tail")],
                _listed(position.entries), _listed(position.own_entries),
            ]
            for position in document.target_positions
        ],
    }  # fmt: skip
    # The text in a script element must not look like its end tag.
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _short(prob: float | None) -> float | None:
    return None if prob is None else float(f"{prob:.4g}")


def _listed(entries: "Entries") -> list[list[Any]]:
    return [[token, _short(prob)] for token, prob in entries]


# ---- terminal --------------------------------------------------------------------------------------------------------------------------


def print_alignment(document: "ShownDocument", *, console: "rich.console.Console", details: bool) -> None:
    """Show it in a terminal: figures, then both tokenizations side by side; with `details` a line for each target position."""
    import rich.box
    import rich.table

    summary = document.summary
    console.print(f"{document.source_name} → {document.target_name}, document {document.doc_id} of {document.corpus}", style="bold")
    console.print(
        f"alignment {document.alignment}, vocabulary map {document.vocabulary_map}\n"
        f"positions with a distribution: {_percent((summary.same + summary.inside) / max(summary.positions, 1))} of {summary.positions:,} "
        f"({_percent(summary.same / max(summary.positions, 1))} where {_matched(document)}, "
        f"{_percent(summary.inside / max(summary.positions, 1))} inside a token of {document.source_name})\n"
        f"bits per byte of the text: {document.source_name} {_number(summary.source_bpb)}, through the map {_number(summary.mapped_bpb)} "
        f"(over {_percent(summary.mapped_bytes)} of the bytes), {document.target_name} {_number(summary.target_bpb)}\n"
        f"probability of the source: mapped {_percent(summary.mapped)}, merged {_percent(summary.merged)}, lost {_percent(summary.lost)}, "
        f"not stored {_percent(summary.tail)}"
    )
    console.print(
        "[yellow]ends inside a token of the other model[/]   [red]has no matching position[/]   | ends a token   · space   ⏎ line break",
        markup=True,
    )
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, expand=True, padding=(0, 1))
    table.add_column(document.source_name, ratio=1, overflow="fold")
    table.add_column(document.target_name, ratio=1, overflow="fold")
    spoken = {position.source for position in document.target_positions if position.ahead == 0}
    heard = {position.source for position in document.target_positions}
    for row in document.rows:
        source = [
            (document.source_texts[document.source_positions[u].token], "same" if u in spoken else "inside" if u in heard else "none")
            for u in row.source
        ]
        here = [document.target_positions[t] for t in row.target]
        target = [(document.target_texts[position.token], kind_of(position)) for position in here]
        table.add_row(_run(source), _run(target))
    console.print(table)
    if details:
        console.print(_details(document))


def _run(tokens: list[tuple[str, str]]) -> "rich.text.Text":
    import rich.text

    text = rich.text.Text()
    for token, kind in tokens:
        text.append(visible(token), style=_STYLES[kind])
        text.append("|\n" if "\n" in token else "|", style="bright_black")
    text.rstrip()
    return text


def _details(document: "ShownDocument") -> "rich.table.Table":
    import rich.box
    import rich.table

    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, expand=True)
    for column in ("", "token", "next", f"{document.source_name}, its own tokens", "through the map", document.target_name, "lost", "tail"):
        table.add_column(column, overflow="fold")
    for t, position in enumerate(document.target_positions):
        before = [] if position.source is None else document.source_positions[position.source].entries
        next_token = "" if position.next_token is None else visible(document.target_texts[position.next_token])
        cells = [
            _told(before, document.source_texts, None),
            _told(position.entries, document.target_texts, position.next_prob),
            _told(position.own_entries, document.target_texts, position.own_next_prob),
        ]
        masses = ["", ""] if position.source is None else [f"{position.lost:.3f}", f"{position.tail:.3f}"]
        table.add_row(
            str(t), visible(document.target_texts[position.token]), next_token, *cells, *masses, style=_STYLES[kind_of(position)] or None
        )
    return table


def _told(entries: "Entries", texts: Any, next_prob: float | None) -> str:
    shown: Iterator[str] = (f"{visible(texts[token])} {prob:.3f}" for token, prob in entries[:_SHOWN_ENTRIES])
    head = [] if next_prob is None else [f"next {next_prob:.3f}:"]
    return "  ".join([*head, *shown])
