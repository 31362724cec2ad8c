"""Checks of the rows before a run, each with a verdict, what was found and the fix; a fatal one stops the run.

Fatal is what would train nothing, or something else than was meant, without a word. What no row survives with (a template
that never stops or is not prefix-preserving, rows that are all too long, held-out rows that are none) is an error while the
rows are encoded, and comes before these.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from rich.text import Text

from deltaw.core.errors import DataError, faults
from deltaw.data.characters import Characters
from deltaw.data.collate import Collator
from deltaw.data.dataset import JUDGED, DataReport, cure
from deltaw.data.encode import IGNORE, Encoded
from deltaw.data.forms import READ
from deltaw.data.observed import Observed
from deltaw.data.processors import reader
from deltaw.data.stream import Side

MUCH = 0.05
"""Share of the rows that may be dropped, cut or repeated without a warning."""
MOST = 0.5
"""Share of the learnt characters that may be lost before the run is refused, or spelled in bytes without a warning."""
STYLES = {"fine": "green", "warning": "yellow", "fatal": "bold red"}


@dataclasses.dataclass(frozen=True)
class Check:
    name: str
    verdict: Literal["fine", "warning", "fatal"]
    found: str
    fix: str = ""


def checks(train: Side, held_out: Side | None, tokenizer: Any, processor: Any = None) -> tuple[Check, ...]:
    """All of them, in the order in which they are shown."""
    seen = train.seen
    assert seen is not None
    return (
        fields(train.report, processor is not None),
        learnt(train.report),
        stop_token(seen, tokenizer),
        padding(train.encoded[0], tokenizer),
        template(train, tokenizer),
        left_out(train.report),
        cut(train.report),
        repeated(seen),
        apart(seen, held_out),
        characters(train, held_out),
        *([images(train, tokenizer, processor)] if train.report.images else []),
    )


def refuse(found: Sequence[Check]) -> None:
    """DataError that names all that is fatal."""
    fatal = [f"{check.found}: {check.fix}" for check in found if check.verdict == "fatal"]
    if fatal:
        raise faults(DataError, "these rows cannot be trained on", fatal)


def said(found: Sequence[Check]) -> Text:
    """For people, a line or two each; colours where they are shown."""
    width = max(len(check.name) for check in found)
    text = Text()
    for check in found:
        text.append(f"{check.verdict:<8} ", STYLES[check.verdict]).append(f"{check.name:<{width}}  {check.found}\n")
        if check.fix:
            text.append(f"{'':<9}{'':<{width}}  fix: {check.fix}\n")
    return text


def fields(report: DataReport, sees: bool = False) -> Check:
    """What was recognised, and what rows say besides. sees: the base reads images."""
    ours = {name for names in READ.values() for name in names} - {"text", "label"} | {"context", "system_prompt"}
    forms = ", ".join(dict.fromkeys(part.form for part in report.parts))
    unread = [name for part in report.parts for name in part.unread]
    if not unread:
        return Check("fields", "fine", f"{forms}; every field is read")
    text = f"{forms}; not read of the rows: {', '.join(map(repr, dict.fromkeys(unread)))}"
    if pictures := list(dict.fromkeys(name for part in report.parts for name in part.meant)):
        names = ", ".join(map(repr, pictures))
        fix = f"rename {names} to `image`, or map it: columns: {{image: {pictures[0]}}}"
        which = "which" if len(pictures) == len(set(unread)) else names
        looks = "look like images" if len(pictures) > 1 else "looks like an image"
        text += f"; {which} {looks}, and rows are learnt without"
        return Check("fields", "warning", text, fix if sees else f"{fix}, with a base that reads images")
    meant = [name for name in dict.fromkeys(unread) if name in ours]
    if not meant:
        return Check("fields", "fine", text)
    names = ", ".join(map(repr, meant))
    return Check("fields", "warning", text, f"put {names} into a field of this form, or write the rows as messages")


def learnt(report: DataReport) -> Check:
    if not report.supervised_tokens:
        return Check("supervised tokens", "fatal", "no token is learnt", "give the rows answers")
    return Check(
        "supervised tokens", "fine", f"{report.supervised_tokens:,} of {report.total_tokens:,} tokens are learnt"
    )


def stop_token(seen: Observed, tokenizer: Any) -> Check:
    """Is there one at the end of what each row learns?"""
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(number)) for number in sorted(seen.stops))
    ended = sum(seen.stops.values())
    if not seen.endless:
        return Check("stop token", "fine", f"{names} is learnt at the end of all {ended:,} rows")
    if tokenizer.eos_token_id is None:
        fix = "set the tokenizer's eos_token, which is put after every text"
    else:
        fix = f"end every answer with {tokenizer.eos_token!r} in the template"
    text = f"{seen.endless:,} of {ended + seen.endless:,} rows learn no stop token, so that answers would not end"
    texts = tokenizer.eos_token_id is None  # of raw texts; answers are refused without one
    return Check("stop token", "warning" if texts or ended else "fatal", text, fix)


def padding(row: Encoded, tokenizer: Any) -> Check:
    """Padding a row, also with its own stop token, must leave what it learns: seen on a batch that pads it."""
    row, longer = (
        Encoded(row.ids, row.labels),
        Encoded(row.ids * 2, row.labels * 2),
    )  # images have nothing to do with it
    labels = Collator(tokenizer)([row, longer])["labels"][0].tolist()
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if labels != [IGNORE, *row.labels[1:], *[IGNORE] * len(row.ids)]:
        return Check(
            "padding",
            "fatal",
            "padding a row changes what is learnt in it",
            "give the tokenizer a pad_token of its own",
        )
    if pad is not None and pad == end:
        token = repr(tokenizer.convert_ids_to_tokens(pad))
        return Check("padding", "fine", f"{token} pads and ends answers; only where it pads is it masked")
    return Check("padding", "fine", "padding is masked, and is not the token that ends answers")


def template(train: Side, tokenizer: Any) -> Check:
    """Would the model meet in use the tokens that it was trained on? A row that does not begin so is refused earlier."""
    first = train.encoded[0]
    if all(part.form == "text" for part in train.report.parts):
        return Check("template", "fine", "none: texts are learnt as they are")
    if tokenizer.chat_template is not None:
        return Check(
            "template",
            "fine",
            "prefix-preserving: up to each answer all rows are the tokens that generation begins with",
        )
    found = "the base has no chat template: an answer follows its prompt directly"
    return Check(
        "template", "warning" if IGNORE in first.labels else "fine", found,
        "data.template: plain marks both" if IGNORE in first.labels else "",
    )  # fmt: skip


def left_out(report: DataReport) -> Check:
    unwanted = report.dropped.get(JUDGED, 0)
    dropped = {reason: count for reason, count in report.dropped.items() if reason != JUDGED}
    return _share(
        "dropped rows", sum(dropped.values()), report.rows - unwanted, "are left out",
        ", ".join(f"{reason}: {count:,}" for reason, count in dropped.items()), cure(dropped),
    )  # fmt: skip


def cut(report: DataReport) -> Check:
    fix = "raise data.max_length, or shorten the rows"
    return _share("cut rows", report.cut, report.rows, "lose their beginning", "too long", fix)


def repeated(seen: Observed) -> Check:
    fix = "take them out, or mean it: a source's weight repeats rows too"
    noun = "pieces" if seen.pieces > seen.characters.texts else "rows"  # a text is cut into several
    return _share("repeated rows", seen.repeated(), seen.pieces, "are the same as an earlier one", "", fix, noun)


def _share(name: str, part: int, whole: int, what: str, why: str, fix: str, noun: str = "rows") -> Check:
    share = part / max(1, whole)
    if not part:
        return Check(name, "fine", f"none of {whole:,} {noun}")
    text = f"{part:,} of {whole:,} {noun} ({share:.1%}) {what}{f' ({why})' if why else ''}"
    return Check(name, "warning", text, fix) if share > MUCH else Check(name, "fine", text)


def apart(seen: Observed, held_out: Side | None) -> Check:
    """Rows held out must be others than those trained on."""
    if held_out is None or held_out.seen is None:
        return Check("held-out rows", "fine", "none are held out")
    shared = held_out.seen.shared(seen)
    images, all_images = held_out.seen.shared_images(seen)
    note = f"; {images:,} of their {all_images:,} images are trained on, in other rows" if images else ""
    if not shared:
        return Check("held-out rows", "fine", f"none of {held_out.report.kept:,} is trained on{note}")
    return Check(
        "held-out rows", "warning",
        f"{shared:,} of the held-out rows are trained on too: their loss says nothing of new rows",
        "take them out of data.train or data.eval; a share (data.eval: 0.05) keeps equal rows on one side",
    )  # fmt: skip


def characters(train: Side, held_out: Side | None) -> Check:
    """Text that the tokenizer cannot hold is not learnt, whatever the loss says."""
    assert train.seen is not None
    found = given_back(train.seen.characters)
    if found.verdict == "fine" and held_out is not None and held_out.seen is not None:
        other = given_back(held_out.seen.characters)
        if other.verdict != "fine":
            return dataclasses.replace(other, verdict="warning", found=f"of the held-out rows, {other.found}")
    return found


def images(train: Side, tokenizer: Any, processor: Any) -> Check:
    """Does the processor, which will make the batches, read a row as it was encoded, and is no part of an image learnt?"""
    report = train.report
    row = next(row for row in train.encoded if row.images)
    part = reader(processor).placeholder(row.images[0], tokenizer)
    try:
        learnt = int((Collator(tokenizer, processor=processor)([row])["labels"] == part).sum())
    except DataError as error:
        return Check("images", "fatal", str(error), "choose another base, or another template")
    if learnt:
        return Check("images", "fatal", f"{learnt:,} tokens of images are learnt", "take them out of the labels")
    share = report.image_tokens / max(1, report.total_tokens)
    return Check("images", "fine", f"{report.pictured}, {share:.0%} of all; none of them is learnt")


def given_back(seen: Characters) -> Check:
    name, parts = "characters", []
    another = "choose a base whose tokenizer has them, as all byte-level ones do, or take these rows out"
    if seen.lost:
        count = sum(seen.lost.values())
        parts.append(f"the tokenizer has no token for {count:,} characters: {seen.said(seen.lost)}")
    if seen.changed:
        parts.append(f"{sum(seen.changed.values()):,} characters come back as others: {seen.said(seen.changed)}")
    if parts:
        text = "; ".join([*parts, f"in {seen.rows:,} of {seen.texts:,} rows"])
        most = {what: share for what, share in seen.shares().items() if share > MOST}
        if not most:
            return Check(name, "warning", text, another)
        head = " and ".join(f"{share:.0%} of the characters {what}" for what, share in most.items())
        return Check(name, "fatal", f"{head} are lost: {text}", another)
    spelled = sum(seen.spelled.values()) / max(1, seen.learnt)
    if spelled <= MOST:
        return Check(name, "fine", "the tokenizer gives every character back")
    return Check(
        name, "warning",
        f"all come back, but {spelled:.0%} of those to learn are spelled byte by byte: {seen.said(seen.spelled)}",
        "the base has hardly met this script and its rows are long: choose one that was trained on it",
    )  # fmt: skip
