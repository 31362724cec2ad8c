"""Which characters of the texts a tokenizer loses: reads as unknown, leaves out, or gives back as others.

Every different character is tried once. Only rows with one that did not come back are encoded and decoded again, to see
what became of it there: a vocabulary of words may know it in some and not by itself. So nothing is sampled, and a
byte-level tokenizer, which has every character, costs one set of characters a row.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

NAMED = {"CJK": "Chinese", "HANGUL": "Korean", "HIRAGANA": "Japanese (Hiragana)", "KATAKANA": "Japanese (Katakana)"}
KINDS = {"P": "punctuation", "S": "symbols", "N": "digits", "Z": "white space", "C": "control characters"}
EXAMPLES, SCRIPTS, FEW = 5, 4, 16


def script(character: str) -> str:
    """Chinese, Cyrillic, Latin …; symbols, punctuation, white space and the like for what belongs to no script."""
    if character.isspace():
        return KINDS["Z"]
    kind = KINDS.get(unicodedata.category(character)[0])
    name = unicodedata.name(character, "unnamed").split()[0]
    return kind or ("symbols" if name == "VARIATION" else NAMED.get(name, name.capitalize()))


class Characters:
    """The account of all texts that were added. Numbers are of occurrences; blanks and line ends count in none."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._met = {" "}  # words that are not known take blanks with them
        self._absent: set[str] = set()
        """Did not come back by themselves."""
        self._others: set[str] = set()
        """Of those: came back as others (a small letter for a capital one)."""
        self._bytes: set[str] = set()
        """As many tokens as bytes."""
        self.lost: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.spelled: Counter[str] = Counter()
        """Learnt characters that are written byte by byte: the tokenizer was made for other scripts."""
        self.texts = self.rows = 0
        """All rows, and those with a character that is lost or changed."""
        self.learnt = self.rest = 0
        """Characters that are learnt, and all others."""
        self._gone = [0, 0]
        """Those of them that are lost."""

    def add(self, learnt: str, rest: str) -> None:
        """One row: what is learnt in it, and what else it says."""
        here = set(learnt), set(rest)
        if fresh := (here[0] | here[1]) - self._met:
            self._meet(sorted(fresh))
        self.texts += 1
        self.learnt += _written(learnt)
        self.rest += _written(rest)
        if spelled := self._bytes & here[0]:
            self.spelled.update(_counted(learnt, spelled))
        absent = [self._absent & one for one in here]
        if not any(absent):
            return
        hit = False
        for number, text in enumerate((learnt, rest)):
            lost, changed = self._missing(text, absent[number])
            self._gone[number] += sum(count for character, count in lost.items() if not character.isspace())
            self.lost.update(lost)
            self.changed.update(changed)
            hit = hit or bool(lost or changed)
        self.rows += hit

    def shares(self) -> dict[str, float]:
        """How much is lost, of what is learnt and of the rest."""
        whole = {"to learn": self.learnt, "of the prompts": self.rest}
        return {name: gone / max(1, all_) for (name, all_), gone in zip(whole.items(), self._gone, strict=True)}

    def _missing(self, text: str, absent: set[str]) -> tuple[Counter[str], Counter[str]]:
        """(lost, changed): how many of these characters do not come back from a text."""
        found: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        back = self._back(self._ids([text])[0]) if absent else ""
        for character, count in _counted(text, absent).items():
            if (missing := count - back.count(character)) > 0:
                found[character in self._others][character] += missing
        return found

    def _meet(self, characters: list[str]) -> None:
        """Try characters for the first time: by themselves, then between letters, where white space counts too."""
        self._met.update(characters)
        ids = self._ids([c * times for times in (1, 2) for c in characters])
        alone, twice = ids[: len(characters)], ids[len(characters) :]
        for c, one, two in zip(characters, alone, twice, strict=True):
            size = len(c.encode())
            if size > 1 and len(two) - len(one) >= size:
                self._bytes.add(c)
            if c in self._back(one):
                continue
            between = self._ids([f"a{c}a"])[0]
            back = self._back(between)
            if back.count(c) >= f"a{c}a".count(c):
                continue
            self._absent.add(c)
            if back[1:-1] and self._tokenizer.unk_token_id not in between:
                self._others.add(c)
        self._bytes -= self._absent

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _back(self, ids: list[int]) -> str:
        """The text of tokens, without the word for an unknown one."""
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def said(self, counts: Counter[str]) -> str:
        """`Chinese (all 812: 的 一 是 …), punctuation (2 of 9: 。 ，)`: how many different ones of those in the rows."""
        met, groups = Counter(map(script, self._met)), dict[str, list[str]]()
        for character, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            groups.setdefault(script(character), []).append(character)
        order = sorted(groups, key=lambda name: -sum(counts[c] for c in groups[name]))
        told = [f"{name} ({_share(len(groups[name]), met[name])}: {_listed(groups[name])})" for name in order[:SCRIPTS]]
        return ", ".join(told) + (", …" if len(order) > SCRIPTS else "")


def _written(text: str) -> int:
    return len(text) - text.count(" ") - text.count("\n")


def _counted(text: str, characters: set[str]) -> dict[str, int]:
    counts = Counter(text) if len(characters) > FEW else None  # one walk, where that is quicker than a search for each
    return {c: text.count(c) if counts is None else counts[c] for c in characters}


def _share(part: int, whole: int) -> str:
    return f"all {whole:,}" if part == whole else f"{part:,} of {whole:,}"


def _listed(characters: Iterable[str]) -> str:
    listed = [c if c.isprintable() and not c.isspace() else f"U+{ord(c):04X}" for c in characters]
    return " ".join(listed[:EXAMPLES]) + (" …" if len(listed) > EXAMPLES else "")
