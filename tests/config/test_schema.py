"""The configuration: strict, all faults at once, one table of defaults, and round trips."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from deltaw.config import describe, parse, schema
from deltaw.core import method
from deltaw.core.errors import ConfigError

MINIMAL = {"model": "tiny", "data": {"train": "rows.jsonl"}}


def test_round_trip_with_everything_set() -> None:
    record = {
        **MINIMAL,
        "adapter": {
            "method": "lora",
            "rank": 8,
            "alpha": 12,
            "rank_pattern": {"q_proj": 4},
            "targets": ["q_proj", "mlp"],
            "layers": "0-3",
        },
        "train": {"learning_rate": "1e-3", "epochs": 2, "eval_every": 10},
        "output": "runs/x",
    }
    config = parse.parse(record)
    assert config.train.learning_rate == 1e-3 and config.adapter.method.rank == 8  # type: ignore[attr-defined]
    assert parse.parse(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adaptr": {}}, ["'adaptr'", "did you mean 'adapter'"]),
        ({"train": {"learning_rat": 1}}, ["train.learning_rat", "did you mean 'learning_rate'"]),
        ({"adapter": {"method": "lroa"}}, ["no method 'lroa'", "did you mean 'lora'"]),
        ({"adapter": {"ranks": 4}}, ["adapter.ranks", "did you mean 'rank'"]),
        ({"adapter": {"rank": 0}}, ["rank=0", "at least 1"]),
        ({"adapter": {"dropout": -0.1}}, ["dropout=-0.1", "[0, 1)"]),
        ({"adapter": {"alpha": float("nan")}}, ["alpha=nan"]),
        ({"train": {"learning_rate": "fast"}}, ["train.learning_rate='fast'", "number"]),
        ({"train": {"learning_rate": -1}}, ["train.learning_rate=-1.0", "above 0"]),
        ({"train": {"batch_size": 0}}, ["train.batch_size=0"]),
        ({"train": {"dtype": "fp8"}}, ["train.dtype='fp8'", "'bf16'"]),
        ({"train": {"warmup": 1.5}}, ["train.warmup=1.5"]),
        ({"data": {}}, ["data.train is missing"]),
        ({"data": {"train": "x", "eval": 1.5}}, ["data.eval=1.5"]),
        ({"data": {"train": "x", "max_length": 1}}, ["data.max_length=1"]),
        ({"data": {"train": "x", "pattern": "("}}, ["data.pattern='('", "not a regular expression"]),
        ({"data": {"train": "x", "pattern": "a"}}, ["data.pattern='a'", "no named groups"]),
        ({"data": {"train": [{"path": "x", "wieght": 2}]}}, ["data.train[0].wieght", "did you mean 'weight'"]),
        ({"data": {"train": {"path": "x", "weight": 0}}}, ["data.train.weight=0.0", "above 0"]),
        ({"adapter": {"r": 8}}, ["no key 'adapter.r'; here it is called 'adapter.rank'"]),
        (
            {"adapter": {"method": "oft", "rank": 8}},
            [
                "no key 'adapter.rank', a field of other methods: oft has block, share",
                "adapter={method: oft} starts afresh",
            ],
        ),
        ({"adapter": {"lora_dropout": 0.1}}, ["here it is called 'adapter.dropout'"]),
        ({"learning_rate": 1}, ["it belongs to its section: 'train.learning_rate'"]),
        ({"train": {"cutoff_len": 9}}, ["it belongs to its section: 'data.max_length'"]),
        (
            {"trian": {}, "train": {"batch_size": 0, "clip": -1, "x": 1}, "adapter": {"dropout": 2}},
            ["5 faults", "'trian'", "train.batch_size=0", "train.clip=-1", "train.x", "dropout=2"],
        ),
        ({"data": {"train": "x", "turns": "first"}}, ["data.turns='first'", "'last'"]),
    ],
)
def test_fault_names_what_was_given_and_the_fix(change: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse.parse({**MINIMAL, **change})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.code == 2


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse.parse({**MINIMAL, "adapter": {"rank": 0, "dropout": 2}, "train": {"lr": 1}, "outputs": "x"})
    assert len(caught.value.faults) == 4


@pytest.mark.parametrize("record", [None, [], "tiny", {"model": "tiny"}])
def test_not_a_configuration(record: object) -> None:
    with pytest.raises(ConfigError):
        parse.parse(record)


def test_overrides(tmp_path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: tiny\ndata: {train: rows.jsonl}\ntrain: {epochs: 3}\n")
    config = parse.read(file, ["train.learning_rate=5e-4", "adapter.rank=4", "output=runs/y"])
    assert (config.train.epochs, config.train.learning_rate, config.adapter.method.rank) == (3, 5e-4, 4)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="not an override"):
        parse.read(file, ["epochs"])


def test_overrides_reach_into_lists() -> None:
    stages = [{"name": "a", "train": {"max_steps": 1, "seed": 3}}, {"name": "b"}]
    record = {"model": "tiny", "data": {"train": ["x", {"path": "y"}]}, "stages": stages}
    given = ["stages[0].train.max_steps=2", "stages[1].data.turns=last", "data.train[1].rows=5", "data.train[0]=z"]
    found = parse.override(record, given)
    assert found["stages"][0] == {"name": "a", "train": {"max_steps": 2, "seed": 3}}
    assert found["stages"][1] == {"name": "b", "data": {"turns": "last"}}
    assert found["data"]["train"] == ["z", {"path": "y", "rows": 5}] and stages[0]["train"]["max_steps"] == 1
    assert parse.parse(found).stages[0].train["max_steps"] == 2
    for key, said in {
        "stages[2].name": r"stages\[2\] is not there: stages has stages\[0\] to stages\[1\]",
        "data.eval[0].path": r"data.eval\[0\] is not there: data.eval is no list with entries",
        "model[1]": r"model\[1\] is not there: model is no list",
    }.items():
        with pytest.raises(ConfigError, match=said):
            parse.override(record, [f"{key}=x"])


def test_unreadable_files(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("model: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse.read(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"did you mean 'config.yaml'"):
        parse.read(tmp_path / "confg.yaml")


def test_json_schema_lists_every_field_with_a_sentence() -> None:
    described = describe.json_schema()
    for section, cls in (("data", schema.DataConfig), ("train", schema.TrainConfig)):
        properties = described["properties"][section]["properties"]
        assert properties.keys() == {f.name for f in dataclasses.fields(cls)}
        assert all(prop.get("description") for prop in properties.values())
    for alternative in described["properties"]["adapter"]["oneOf"]:
        # methods of other packages answer for themselves
        if method.get(alternative["title"]).__module__.startswith("deltaw."):
            fields = {k: v for k, v in alternative["properties"].items() if k != "method"}
            assert all(field["description"] for field in fields.values()), alternative["title"]
    assert {alternative["title"] for alternative in described["properties"]["adapter"]["oneOf"]} >= {"lora", "dora"}


def test_a_method_written_at_a_prompt_is_described_without_sentences() -> None:
    code = """
from dataclasses import dataclass
from deltaw.core.method import Method, register

@register("at_a_prompt")
@dataclass(frozen=True, kw_only=True)
class AtAPrompt(Method):
    size: int = 1
"""
    exec(compile(code, "<prompt>", "exec"), {"__name__": "prompt"})
    titles = [alternative["title"] for alternative in describe.json_schema()["properties"]["adapter"]["oneOf"]]
    method._METHODS.pop("at_a_prompt")
    assert "at_a_prompt" in titles


def test_option_list_is_frozen() -> None:
    """Adding an option is a decision: it needs an owner, a sentence and a line here."""
    assert [f.name for f in dataclasses.fields(schema.TrainConfig)] == [
        "objective", "epochs", "max_steps", "learning_rate", "batch_size", "gradient_accumulation", "schedule", "warmup",
        "weight_decay", "clip", "seed", "dtype", "eval_every", "save_every", "log_every", "keep", "optimizer", "rates",
        "group_by_length", "neftune", "checkpointing", "best", "generate", "metrics", "early_stopping", "report_to",
    ]  # fmt: skip
    assert [f.name for f in dataclasses.fields(schema.DataConfig)] == [
        "train", "eval", "general", "columns", "pattern", "template", "tokens", "max_length", "overflow", "train_on_prompt", "turns",
        "pairs", "streaming", "packing",
    ]  # fmt: skip


def test_generated_pages_are_up_to_date() -> None:
    """scripts/make_docs.py writes them from the schema, the methods and the results: run it after changing any."""
    root = Path(__file__).resolve().parents[2]
    for name, text in runpy.run_path(str(root / "scripts" / "make_docs.py"))["pages"]().items():
        assert (root / "docs" / name).read_text(encoding="utf-8") == text, name


def test_every_method_says_what_it_is() -> None:
    """The first line of its file is a formula (with its source after two blanks), and it has words for when to use it."""
    root = Path(__file__).resolve().parents[2]
    made = runpy.run_path(str(root / "scripts" / "make_docs.py"))
    for name in made["ours"]():
        formula, source = made["described"](method.get(name))
        assert formula and method.get(name).suits, name
        assert source or name in ("full", "token_rows"), name
