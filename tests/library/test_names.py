"""Names are safe as file names, references are exact, and a history never goes to and fro."""

import pytest

from deltaw.core.errors import ConflictError, FileError, NotFoundError, UseError
from deltaw.library import history, names
from deltaw.library.history import History

A, B, C = (f"sha256:{digit * 64}" for digit in "abc")


@pytest.mark.parametrize("name", ["a", "sql", "sql-v2", "team.sql_2", "0", "a" * 100])
def test_names(name: str) -> None:
    assert names.checked(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "/etc", ".hidden", "a.", "-a", "a..b", "a b", "SQL", "ß", "a\n", "a\0b", "a=1",
     "a@2", "sha256:00", "a" * 101, "~", "a:b", "%2e%2e"],
)  # fmt: skip
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UseError, match="no name for an adapter") as caught:
        names.checked(name)
    hint = str(caught.value).partition("for example ")[2].strip("'")
    assert not hint or names.checked(hint) == hint


def test_the_hint_is_near() -> None:
    with pytest.raises(UseError, match="'sql-v2'"):
        names.checked("SQL v2")


def test_references() -> None:
    assert names.parse("sql") == ("sql", None, None)
    assert names.parse("sql@3") == ("sql", 3, None)
    assert names.parse("sha256:0123abcd") == (None, None, "sha256:0123abcd")
    for wrong in (
        "sql@",
        "sql@0",
        "sql@-1",
        "sql@x",
        "sql@1@2",
        "@1",
        "sha256:",
        "sha256:0123abc",
        "sha256:XYZ12345",
        "../x@1",
    ):
        with pytest.raises(UseError):
            names.parse(wrong)


def moves(*digests: str) -> History:
    found = History("sql")
    for digest in digests:
        found = found.moved(digest, "now", "add")
    return found


def now(found: History) -> tuple[int, str]:
    return found.at().number, found.at().digest


def test_generations_grow() -> None:
    assert now(moves(A, B, B, C)) == (3, C)  # the same again is no change
    assert moves(A, B).at(1).digest == A
    with pytest.raises(NotFoundError, match=r"no generation 7; it has 1, 2"):
        moves(A, B).at(7)


def test_rollback_goes_back_and_never_to_and_fro() -> None:
    found = moves(A, B, C).rolled_back(None, "t")
    assert now(found) == (4, B) and found.at().of == 2
    found = found.rolled_back(None, "t")
    assert now(found) == (5, A)
    with pytest.raises(UseError, match="nothing before generation 1"):
        found.rolled_back(None, "t")
    assert now(found.rolled_back(3, "t")) == (6, C)  # forward again, by number
    with pytest.raises(UseError, match="holds already"):
        found.rolled_back(1, "t")


def test_what_came_before_a_rollback_is_not_what_it_took_away() -> None:
    found = moves(A, B).rolled_back(None, "t").moved(C, "t", "add")  # A B A C
    assert now(found.rolled_back(None, "t")) == (5, A)


def test_numbers_are_never_used_again() -> None:
    gone = moves(A, B).without(None)
    assert gone.current is None and now(gone.moved(C, "t", "add")) == (3, C)
    assert gone.moved(C, "t", "add").at().before is None
    gone.expect(0)
    with pytest.raises(ConflictError, match="does not exist, expected it at generation 2"):
        gone.expect(2)
    with pytest.raises(ConflictError, match="is at generation 2, expected it new"):
        moves(A, B).expect(0)
    moves(A, B).expect(2)
    moves(A, B).expect(None)


def test_removing_one_generation() -> None:
    found = moves(A, B, C).without(2)
    assert [one.number for one in found.generations] == [1, 3] and now(found.rolled_back(None, "t")) == (4, A)
    with pytest.raises(UseError, match="points to generation 3 now"):
        found.without(3)
    with pytest.raises(NotFoundError):
        found.without(2)
    between = moves(A, B, A, C).without(2)  # A A C: back is A, and then there is nothing
    back = between.rolled_back(None, "t")
    assert now(back) == (5, A)
    with pytest.raises(UseError, match="nothing before"):
        back.rolled_back(None, "t")
    assert moves(A).without(None).digests == set()


def test_round_trip_and_edits() -> None:
    found = moves(A, B).rolled_back(None, "t").without(2)
    assert history.from_dict(found.to_dict(), "sql", "file") == found
    for name, edit in {
        "other": {},
        "sql": {"last": 1},
        "sql ": {"generations": [{**found.to_dict()["generations"][0], "digest": "../x"}]},
    }.items():
        with pytest.raises(FileError, match="history"):
            history.from_dict({**found.to_dict(), **edit}, name, "file")
    for broken in (
        {},
        {"name": "sql", "last": 1, "generations": [{}]},
        {"name": "sql", "last": None, "generations": []},
    ):
        with pytest.raises(FileError):
            history.from_dict(broken, "sql", "file")
