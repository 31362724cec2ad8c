"""A library keeps content once, by its digest; names move, roll back and go; what an alias points to stays."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaw
from deltaw.core.errors import ConflictError, DeltawError, FileError, NotFoundError, UseError
from deltaw.formats import directory
from deltaw.library import content, lineage
from deltaw.library.audit import audit
from deltaw.library.store import Library

WEIGHTS, CONFIG, OURS = "adapter_model.safetensors", "adapter_config.json", "deltaw.json"


def edit(file: Path, **changes: object) -> None:
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | changes))


def files(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def test_what_goes_in_comes_out(make, library: Library) -> None:
    folder = make("a", 1, {"metrics": {"loss": 0.5}, "task_type": "CAUSAL_LM"})
    added = library.add(folder, "sql")
    entry = library.resolve("sql")
    assert added.new and added.entry == entry and (entry.name, entry.generation) == ("sql", 1)
    before, after = directory.open_directory(folder), directory.open_directory(entry.folder)
    assert after.digest == before.digest == entry.record.tensors
    for site, group in before.state.tensors.items():
        assert all(torch.equal(tensor, after.state.tensors[site][name]) for name, tensor in group.items())
    facts = entry.record
    assert (facts.parameters, facts.sites, facts.methods, facts.ranks) == (2 * (14 + 11), 2, ("lora",), (2,))
    assert facts.meta["metrics"] == {"loss": 0.5} and facts.layer == "Sequential" and facts.parents == ()
    delta = sum(
        float(f.scale * (f.b @ f.a).norm()) ** 2 for s in before.state.methods if (f := before.state.factors(s))
    )
    assert facts.change == pytest.approx(delta**0.5)
    assert facts.bytes == sum((entry.folder / name).stat().st_size for name in files(entry.folder))
    assert library.resolve("sql@1") == entry and library.resolve(entry.digest[:15]).digest == entry.digest
    assert audit(library).faults == ()
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    deltaw.load(model, entry.folder, allow_base_mismatch=True)


def test_the_same_content_is_kept_once(make, library: Library) -> None:
    first = library.add(make("a", 1, {"metrics": {"loss": 1.0}}), "one")
    again = library.add(make("b", 1, {"metrics": {"loss": 1.0}}), "two")
    other = library.add(make("c", 1, {"metrics": {"loss": 2.0}}), "three")
    assert first.new and not again.new and not other.new
    assert len({x.entry.digest for x in (first, again, other)}) == 1 and len(library.records()) == 1
    assert not any("first copy" in remark for remark in again.remarks)
    assert any("keeps the recipe, metrics and card of the first copy" in remark for remark in other.remarks)
    assert library.add(make("d", 1), "one").entry.generation == 1  # nothing moved


def test_the_digest_is_of_what_an_adapter_computes(make, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return content.of_folder(folder)

    base = digest(make("a", 1))
    assert digest(make("b", 2)) != base  # other values
    assert digest(make("c", 1, alpha=9.0)) != base  # the same tensors under another scale
    assert digest(make("d", 1, {"metrics": {"loss": 3}})) == base
    same, folder = make("e", 1), make("f", 1)
    record = json.loads((same / CONFIG).read_text())
    record["target_modules"] = record["target_modules"][::-1]
    (same / CONFIG).write_text(json.dumps(dict(reversed(record.items())) | {"peft_version": "9.9"}, indent=7))
    assert digest(same) == base
    (folder / OURS).unlink()
    assert digest(folder) != base  # which base it belongs to is lost
    for name, text in {"chat_template.jinja": "x", "tokens.json": '{"<a>": 1}'}.items():
        (same / name).write_text(text)
        assert digest(same) != base
        (same / name).unlink()
    (same / "README.md").write_text("another card")
    assert digest(same) == base


def test_the_order_of_patterns_counts(make) -> None:
    """The first hit wins in alpha_pattern, so that its order is part of what the adapter computes."""
    folder, digests = make("a", 1), []
    for order in ({"0": 1.0, ".*": 2.0}, {".*": 2.0, "0": 1.0}):
        edit(folder / CONFIG, alpha_pattern=order)
        digests.append(content.of_folder(folder))
    assert digests[0] != digests[1]


def test_names_move_and_roll_back(make, library: Library) -> None:
    a, b, c = (library.add(make(name, seed), "sql").entry for seed, name in enumerate("abc"))
    assert [library.resolve(f"sql@{n}").digest for n in (1, 2, 3)] == [a.digest, b.digest, c.digest]
    assert library.alias("prod", "sql").digest == c.digest
    assert library.rollback("sql").digest == b.digest and library.resolve("prod").digest == c.digest
    assert library.rollback("sql").digest == a.digest and library.resolve("sql").generation == 5
    assert library.rollback("sql", 3).digest == c.digest
    assert library.alias("prod", "sql@1").digest == a.digest and library.alias("prod", b.digest).digest == b.digest
    assert library.names() == ["prod", "sql"]
    with pytest.raises(NotFoundError, match="did you mean 'prod'"):
        library.resolve("prd")
    for act in (library.resolve, library.rollback, library.remove, lambda name: library.alias("x", name)):
        with pytest.raises(NotFoundError, match="no adapter 'nothing'"):
            act("nothing")
    assert audit(library).faults == ()


def test_compare_and_swap(make, library: Library) -> None:
    a, b = make("a", 1), make("b", 2)
    with pytest.raises(ConflictError, match="does not exist, expected it at generation 1"):
        library.add(a, "sql", expected=1)
    assert library.names() == [] and library.records() == {}  # nothing was written
    library.add(a, "sql", expected=0)
    for act in (
        lambda: library.add(b, "sql", expected=0),
        lambda: library.alias("sql", "sql", expected=7),
        lambda: library.rollback("sql", expected=7),
        lambda: library.remove("sql", expected=7),
    ):
        with pytest.raises(ConflictError, match="is at generation 1"):
            act()
    assert library.add(b, "sql", expected=1).entry.generation == 2
    library.remove("sql", expected=2)
    assert library.add(b, "sql", expected=0).entry.generation == 3


def test_nothing_goes_that_anything_points_to(make, mix, library: Library) -> None:
    a, b = make("a", 1), make("b", 2)
    one, two = library.add(a, "one").entry, library.add(b, "two").entry
    mixed = library.add(mix("m", {a: 0.7, b: -0.3}), "mixed").entry
    library.alias("prod", "one")
    assert library.remove("one") == [] and library.resolve("prod").digest == one.digest
    assert library.remove("prod") == []  # the mix came from it
    assert library.resolve(one.digest).digest == one.digest
    library.alias("two", mixed.digest)
    assert library.remove("two@1") == [] and library.remove("mixed") == []
    with pytest.raises(UseError, match="roll it back first"):
        library.remove("two@2")
    with pytest.raises(UseError, match="is content"):
        library.remove(mixed.digest)
    assert library.remove("two") == sorted([one.digest, two.digest, mixed.digest])
    assert library.names() == [] and library.records() == {} and audit(library).remarks == ()


def test_lineage(make, mix, library: Library) -> None:
    a, b = make("a", 1), make("b", 2)
    m = mix("m", {a: 0.7, b: -0.3})
    n = mix("n", {m: 1.0, make("c", 3): 0.5})
    for name, folder in {"a": a, "m": m, "n": n}.items():
        added = library.add(folder, name)
    assert any("its parent sha256:" in remark and "is not in the library" in remark for remark in added.remarks)
    assert len(added.entry.record.outside) == 1
    records = library.records()
    tree = lineage.tree(added.entry.digest, records)
    label = {library.resolve(name).digest: name for name in library.names()}
    lines = lineage.drawn(tree, label)
    assert lines[:3] == ["n", "├── 1 × m", "│   ├── 0.7 × a"]
    assert lines[3].startswith("│   └── -0.3 × sha256:") and lines[3].endswith("not in the library")
    assert lineage.children(library.resolve("a").digest, records) == [library.resolve("m").digest]
    assert lineage.reachable([added.entry.digest], records) == set(records)
    found = audit(library)
    assert found.faults == () and sum("was never in the library" in remark for remark in found.remarks) == 2
    library.add(b, "b")
    assert len(audit(library).remarks) == 1


def test_a_mix_of_one_alone_is_not_its_own_parent_for_ever(make, mix, library: Library) -> None:
    folder = make("a", 1, alpha=2.0)
    same = mix("same", {folder: 1.0})
    assert directory.open_directory(same).digest == directory.open_directory(folder).digest
    entry = library.add(same, "same").entry
    assert lineage.tree(entry.digest, library.records()).parents == () and audit(library).faults == ()
    assert not library.add(folder, "a").new  # one content, and it is not its own parent
    own = {"parents": [entry.record.tensors]}
    other = library.add(make("other", 1, own, alpha=4.0), "other").entry  # the same tensors under another scale
    twin = library.add(make("twin", 1, own, alpha=6.0), "twin").entry
    for one in (other, twin):
        assert 2 <= len(lineage.drawn(lineage.tree(one.digest, library.records()), {})) <= 3
    library.remove("a")
    assert library.remove("same") == [] and audit(library).faults == ()


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]),
        lambda f: edit(f / CONFIG, lora_alpha=77),
        lambda f: save_file({k: t * float("nan") for k, t in load_file(f / WEIGHTS).items()}, f / WEIGHTS),
        lambda f: save_file({**load_file(f / WEIGHTS), "more": torch.ones(1)}, f / WEIGHTS),
        lambda f: (f / WEIGHTS).unlink(),
        lambda f: (f / OURS).write_text("{"),
        lambda f: (f / CONFIG).unlink(),
    ],
)
def test_what_does_not_read_is_not_added(make, library: Library, damage) -> None:
    folder = make("a", 1)
    damage(folder)
    with pytest.raises(DeltawError):
        library.add(folder, "sql")
    assert not library.path.exists()


def test_a_pickle_is_written_as_safetensors(make, library: Library) -> None:
    folder = make("a", 1)
    tensors = load_file(folder / WEIGHTS)
    torch.save(tensors, folder / "adapter_model.bin")
    assert any("adapter_model.bin" in remark for remark in library.add(folder, "both").remarks)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileError, match="--allow-pickle"):
        library.add(folder, "sql")
    library.remove("both")
    entry = library.add(folder, "sql", allow_pickle=True).entry
    assert "adapter_model.bin" not in files(entry.folder) and WEIGHTS in files(entry.folder)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in load_file(entry.folder / WEIGHTS).items())
    assert not library.add(make("b", 1), "sql").new  # the same adapter, however it was stored


def test_adapters_of_strangers(shared: Path, library: Library) -> None:
    given = shared / "adapters"
    where = {
        "imdb": "Tashu014__lora-imdb-distilbert",
        "emotions": "dayanidhi04__emotion-classification-distilbert-lora",
        "gpt2": "anirudh-ak__peft-gpt2/model/lora_model",
        "great": "yoonyerin__be-great",
        "bert": "Hareshjethani__BERT-GPT2-Multitask-Finetuning",
    }
    for name, folder in where.items():
        added = library.add(given / folder, name, allow_pickle=name == "great")
        assert added.new and not library.add(given / folder, name, allow_pickle=name == "great").new
        facts = added.entry.record
        assert facts.layer is None and facts.base and "lora" in facts.methods
        assert any("do not say which base" in remark for remark in added.remarks)
        before = directory.open_directory(given / folder, allow_pickle=True).state
        assert before.methods == directory.open_directory(added.entry.folder).state.methods
        assert facts.parameters == before.parameters
    assert any("SOURCE.txt" in remark for remark in added.remarks)
    found = audit(library)
    assert found.faults == () and (found.adapters, found.names) == (5, 5)
    with pytest.raises(DeltawError):
        library.add(given / "catundchat__stable-diffusion-v1.5-lora", "sd")


def test_another_directory_is_left_alone(make, tmp_path: Path) -> None:
    folder = make("a", 1)
    with pytest.raises(UseError, match=r"is not a library \(it holds"):
        Library(tmp_path)
    with pytest.raises(UseError, match="is not a library"):
        Library(folder / CONFIG)
    nowhere = Library(tmp_path / "nowhere")
    for act in (lambda: nowhere.rollback("x"), lambda: nowhere.remove("x"), lambda: nowhere.alias("x", "y")):
        with pytest.raises(NotFoundError, match="no library at"):
            act()
    assert nowhere.names() == [] and not (tmp_path / "nowhere").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert Library(empty).add(folder, "sql").new
    (empty / "library.json").write_text('{"format": 2}')
    with pytest.raises(FileError, match="upgrade"):
        Library(empty)


def test_a_full_disk_leaves_what_was_there(make, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library.add(make("a", 1), "sql")
    before, other = files(library.path), make("b", 2)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for broken in ("shutil.copyfile", "os.replace", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, full)
            with pytest.raises(FileError, match=r"cannot be changed: No space left"):
                library.add(other, "sql")
        assert [name for name in files(library.path) if "/." not in name] == before
        assert library.resolve("sql").generation == 1 and audit(library).faults == ()
    assert library.add(other, "sql").entry.generation == 2 and not any("/." in f for f in files(library.path))


def test_a_library_that_is_read_only(make, library: Library) -> None:
    library.add(make("a", 1), "sql")
    (library.path / "lock").unlink()
    entry = library.resolve("sql")
    assert {path.stat().st_mode & 0o777 for path in entry.folder.iterdir()} == {0o444}
    assert audit(library).faults == () and not (library.path / "lock").exists()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda b, lib: flip(b / "adapter" / WEIGHTS), ["cannot be read", "not those that deltaw.json describes"]),
        (lambda b, lib: overwrite(b / "adapter/tokens.json", '{"<a>": 1}'), ["is not what it was"]),
        (lambda b, lib: overwrite(b / "adapter" / CONFIG, "{}"), ["cannot be read"]),
        (lambda b, lib: edit_read_only(b / "record.json", parameters=5), ["says another parameters"]),
        (lambda b, lib: edit_read_only(b / "record.json", meta=None), ["cannot be read", "meta hold what they cannot"]),
        (lambda b, lib: edit_read_only(b / "record.json", bytes="5", ranks=["x"]), ["bytes, ranks hold"]),
        (lambda b, lib: (b / "record.json").unlink(), ["cannot be read"]),
        (lambda b, lib: shutil.rmtree(b), ["sql@1 points to sha256:", "lost its parent"]),
        (lambda b, lib: overwrite(b / "adapter/virus.py", "x"), ["virus.py is no part of a library"]),
        (lambda b, lib: link(b / "adapter" / WEIGHTS), [f"{WEIGHTS} is no part of a library"]),
        (lambda b, lib: link(b), ["is no part of a library", "sql@1 points to sha256:"]),
        (lambda b, lib: overwrite(lib / "names/sql.json", "{}"), ["history"]),
        (lambda b, lib: overwrite(lib / "names/Sql.json", "{}"), ["Sql.json is no part"]),
        (lambda b, lib: overwrite(lib / "blobs/notes.txt", "x"), ["notes.txt is no part"]),
        (lambda b, lib: overwrite(lib / "notes.txt", "x"), ["notes.txt is no part"]),
    ],
)
def test_verify_finds_it(make, mix, library: Library, harm, words: list[str]) -> None:
    a = make("a", 1)
    blob = library.blob(library.add(a, "sql").entry.digest)
    library.add(mix("m", {a: 0.5, make("b", 2): 0.5}), "mixed")
    assert audit(library).faults == ()
    harm(blob, library.path)
    found = "\n".join(audit(library).faults)
    assert all(word in found for word in words), found


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)


def link(path: Path) -> None:
    """What lies elsewhere can change without the library."""
    elsewhere = path.rename(path.parents[3] / f"elsewhere-{path.name}")
    path.symlink_to(elsewhere)


def overwrite(file: Path, text: str) -> None:
    if file.exists():
        file.chmod(0o644)
    file.write_text(text)


def edit_read_only(file: Path, **changes: object) -> None:
    file.chmod(0o644)
    edit(file, **changes)


@pytest.mark.parametrize(
    "harm",
    [
        lambda b: flip(b / "adapter" / WEIGHTS),
        lambda b: (b / "record.json").unlink(),
        lambda b: edit_read_only(b / "record.json", methods=[1]),
        shutil.rmtree,
    ],
)
def test_adding_it_again_repairs_it(make, library: Library, harm) -> None:
    folder = make("a", 1)
    blob = library.blob(library.add(folder, "sql").entry.digest)
    library.add(make("b", 2), "other")
    harm(blob)
    assert audit(library).faults != ()
    assert library.add(folder, "sql").new and library.resolve("sql").generation == 1
    assert audit(library).faults == ()


def test_a_name_without_content_can_be_removed(make, library: Library) -> None:
    shutil.rmtree(library.blob(library.add(make("a", 1), "sql").entry.digest))
    with pytest.raises(FileError, match=r"sql points to sha256:.* which is not in"):
        library.resolve("sql")
    library.remove("sql")
    assert audit(library).faults == ()
