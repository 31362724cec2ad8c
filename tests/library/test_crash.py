"""Killed between any two steps on the disk, a library reads as before or after; several processes lose nothing."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deltaw.core.errors import ConflictError
from deltaw.library import place
from deltaw.library.audit import audit
from deltaw.library.store import Library

STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile", "shutil.rmtree"}


def child(act: Callable[[], None], kill_at: int | None = None) -> int:
    """Run `act` in a process of its own, killed at its n-th step on the disk. The number of the signal, or 0."""
    number = os.fork()
    if number:
        return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    try:
        torch.set_num_threads(1)
        if kill_at is not None:
            left = [kill_at]

            def watch(event: str, args: tuple[object, ...]) -> None:
                if event in STEPS and (event != "open" or (isinstance(args[2], int) and args[2] & 3)):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
        act()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(9)


def whole(library: Library) -> None:
    """It reads: every name resolves, and nothing is at fault."""
    found = audit(library)
    assert found.faults == (), found.faults
    for name in library.names():
        library.resolve(name)


@pytest.mark.parametrize("what", ["first", "add", "alias", "rollback", "remove"])
def test_killed_at_any_step(make, mix, tmp_path: Path, what: str) -> None:
    a, b, new = make("a", 1), make("b", 2), make("c", 3)
    start = Library(tmp_path / "start")
    if what != "first":
        start.add(a, "sql")
    if what in ("rollback", "remove"):
        start.add(b, "sql")
        start.add(mix("m", {a: 1.0, b: 2.0}), "mixed")
        start.add(make("d", 4), "lonely")
    acts: dict[str, Callable[[Library], object]] = {
        "first": lambda lib: lib.add(new, "sql"),
        "add": lambda lib: lib.add(new, "sql"),
        "alias": lambda lib: lib.alias("prod", "sql"),
        "rollback": lambda lib: lib.rollback("sql"),
        "remove": lambda lib: lib.remove("lonely"),
    }
    act, seen = acts[what], set()
    for step in range(200):
        copy = tmp_path / f"at-{step}"
        if start.path.exists():
            shutil.copytree(start.path, copy)
        ended = child(lambda copy=copy: act(Library(copy)), step)
        library = Library(copy)
        whole(library)
        after = {name: library.history(name).at().digest for name in library.names()}
        seen.add(tuple(sorted(after.items())))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        if what != "remove" or "lonely" in after:
            act(library)  # again, from what was left
        elif library.names():
            library.alias("other", "sql")
        whole(library)
        assert place.drafts(copy) == []
        shutil.rmtree(copy)
    assert ended == 0 and step >= 4
    assert len(seen) == 2  # before and after, and nothing in between


def test_several_processes_lose_nothing(make, library: Library) -> None:
    folders = [make(f"f{n}", n) for n in range(6)]
    library.add(folders[0], "sql")

    def work(own: int) -> None:
        mine = Library(library.path)
        for n in range(4):
            mine.add(folders[(own + n) % 6], f"own-{own}")
            mine.alias("shared", f"own-{own}")
            mine.add(folders[own], f"brief-{own}")
            mine.remove(f"brief-{own}")

    children = []
    for own in range(3):
        number = os.fork()
        if number == 0:
            try:
                torch.set_num_threads(1)
                work(own)
                os._exit(0)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                os._exit(9)
        children.append(number)
    assert [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in children] == [0, 0, 0]
    whole(library)
    assert library.names() == ["own-0", "own-1", "own-2", "shared", "sql"]
    numbers = [one.number for one in library.history("shared").generations]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 4
    assert all(len(library.history(f"own-{own}").generations) == 4 for own in range(3))


def test_of_those_who_expect_the_same_one_wins(make, library: Library) -> None:
    folders = [make(f"f{n}", n) for n in range(5)]
    library.add(folders[4], "sql")

    def swap(own: int) -> None:
        try:
            Library(library.path).add(folders[own], "sql", expected=1)
        except ConflictError:
            os._exit(3)

    numbers = []
    for own in range(4):
        number = os.fork()
        if number == 0:
            torch.set_num_threads(1)
            swap(own)
            os._exit(0)
        numbers.append(number)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers)
    assert codes == [0, 3, 3, 3] and library.resolve("sql").generation == 2
    whole(library)
    assert len(library.records()) == 2  # the losers wrote nothing
