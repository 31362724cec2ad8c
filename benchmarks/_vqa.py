"""What the experiments with images share: rows in LLaVA's form, runs that are not repeated, answers scored in batches."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deltaw
from deltaw.config.schema import Source
from deltaw.core.route import names
from deltaw.data.collate import Collator
from deltaw.data.dataset import encode_rows
from deltaw.data.encode import IGNORE, Policy
from deltaw.data.rows import read_rows
from deltaw.models.base import Base
from deltaw.runs.directory import RunDirectory
from deltaw.training.run import Shelf

Asked = tuple[str, str, str]
"""(image, question, answer), the image's name as seen from the folder of the rows."""


def write_rows(file: Path, asked: Sequence[Asked]) -> str:
    """As LLaVA's json."""
    rows = [
        {
            "id": number,
            "image": image,
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
        }
        for number, (image, question, answer) in enumerate(asked)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows), encoding="utf-8")
    return str(file)


def shuffled(asked: Sequence[Asked]) -> list[Asked]:
    """The same questions, each about an image that another row has: what is right without looking at the image."""
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()
    return [(asked[other][0], question, answer) for (_, question, answer), other in zip(asked, order, strict=True)]


def made(folder: Path, make: Callable[[Path], dict[str, float]]) -> dict[str, float]:
    """What `make` says of the pieces that it writes into the folder; said again, not made again, where they are there."""
    said = folder / "pieces.json"
    if not said.exists():
        folder.mkdir(parents=True, exist_ok=True)
        said.write_text(json.dumps(make(folder)), encoding="utf-8")
    found: dict[str, float] = json.loads(said.read_text(encoding="utf-8"))
    return found


def trained(record: Mapping[str, Any], shelf: Shelf) -> Path:
    """The adapter of this run, which is made by deltaw.train unless it is there."""
    output = Path(record["output"])
    if not (output / "adapter").exists():
        deltaw.train(record, quiet=True, shelf=shelf)
    return output / "adapter"


def held_out(adapter: Path) -> float:
    """The loss on held-out rows that the run of an adapter ended with."""
    return float(RunDirectory(adapter.parent).events("end")[-1]["losses"]["held_out"])


class Judge:
    """Says which answers of a base with an adapter are right: where the wanted token is the likeliest at every place of an
    answer, its stop token too, which is where greedy decoding says exactly it. Batches are made once for a file of rows."""

    def __init__(self, base: Base, size: int = 64):
        self.base, self.size = base, size
        self._batches: dict[str, list[dict[str, Tensor]]] = {}

    def __call__(self, rows: str, adapter: Path | None = None) -> tuple[list[bool], list[str]]:
        """(right, what is said) of every row of the file, in its order."""
        model = self.base.model
        for name in list(names(model)):
            deltaw.detach(model, name)
        if adapter is not None:
            deltaw.load(model, adapter)
        model.eval()
        right: list[bool] = []
        said: list[str] = []
        for batch in self._of(rows):
            found, wanted = _likeliest(model, batch), batch["labels"][:, 1:]
            answer = wanted != IGNORE
            right += ((found == wanted) | ~answer).all(1).tolist()
            words = [line[place].tolist() for line, place in zip(found, answer, strict=True)]
            said += [self.base.tokenizer.decode(one, skip_special_tokens=True).strip() for one in words]
        return right, said

    def _of(self, rows: str) -> list[dict[str, Tensor]]:
        if rows not in self._batches:
            base, collate = self.base, Collator(self.base.tokenizer, processor=self.base.processor)
            read = read_rows(Source(path=rows))
            encoded, report = encode_rows(
                read, base.tokenizer, Policy(base.max_length), purpose="score", processor=base.processor
            )
            assert report.kept == len(read), "a row was left out, which would move all others"
            self._batches[rows] = [collate(encoded[n : n + self.size]) for n in range(0, len(encoded), self.size)]
        return self._batches[rows]


@torch.no_grad()
def _likeliest(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """[B, T - 1]: the token that the model would say after each place."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return model(**inputs, use_cache=False).logits[:, :-1].argmax(-1)


def spread(values: Sequence[float]) -> dict[str, Any]:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "seeds": list(values)}


def shares(asked: Sequence[Asked], right: Sequence[bool]) -> dict[str, float]:
    """Share of right answers to each question."""
    found: dict[str, list[bool]] = {}
    for (_, question, _), one in zip(asked, right, strict=True):
        found.setdefault(question, []).append(one)
    return {question: sum(each) / len(each) for question, each in found.items()}
