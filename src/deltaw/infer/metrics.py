"""Numbers for generated answers, each of (answers, references per answer): the best reference counts.

exact_match   share of answers equal to a reference, white space at the ends aside
rouge_l       mean F1 of the longest common subsequence of words       rouge-score
bleu          corpus BLEU, lower-cased, in [0, 100]                     sacrebleu
"""

from collections.abc import Callable, Sequence

from deltaw.core.errors import UseError, did_you_mean

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], float]


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    hits = [
        answer.strip() in {text.strip() for text in wanted} for answer, wanted in zip(answers, references, strict=True)
    ]
    return sum(hits) / len(hits)


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing("rouge_l", "rouge-score") from None
    scorer = RougeScorer(["rougeL"], split_summaries=False)
    best = [
        max(scorer.score(text, answer)["rougeL"].fmeasure for text in wanted)
        for answer, wanted in zip(answers, references, strict=True)
    ]
    return sum(best) / len(best)


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    try:
        import sacrebleu
    except ImportError:
        raise _missing("bleu", "sacrebleu") from None
    width = max(map(len, references))
    columns = [[wanted[n] if n < len(wanted) else None for wanted in references] for n in range(width)]
    return float(sacrebleu.corpus_bleu(list(answers), columns, lowercase=True).score)


METRICS: dict[str, Metric] = {"exact_match": exact_match, "rouge_l": rouge_l, "bleu": bleu}


def metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Metrics by name; UseError for others."""
    for name in names:
        if name not in METRICS:
            raise UseError(f"no metric {name!r}{did_you_mean(name, METRICS)}; there are {', '.join(METRICS)}")
    return {name: METRICS[name] for name in names}


def _missing(metric: str, package: str) -> UseError:
    return UseError(f"the metric {metric} needs {package}: pip install 'deltaw[eval]'")
