"""The section of docs/measurements.md on image-text models: questions about digits, and Easy-VQA. `make_docs.py` writes it."""

from typing import Any

from measured_pages import grid, results

DIGITS = """
## Questions about handwritten digits, in two stages

`python -m benchmarks digits_vqa`: a CLIP tower trained on {train:,} of scikit-learn's digits and their names (it names {tower} of the
test images right), a Llama trained on facts about number words, and a new projector between them, one
`LlavaForConditionalGeneration`. Stage 1 trains the projector to name digits; stage 2 learns six questions from the same images.
Four of them the language model knows about words; two (is it prime, what comes before) are new to it. {steps} steps of {batch} rows
a stage. Accuracy on {test} images that nothing was trained on, each question counting the same, mean ± sd over {seeds} seeds. An
answer is right when greedy decoding says exactly it.

"""
ARMS = {
    "base": "before stage 1: the projector is random",
    "none": "stage 1 only",
    "projector": "projector trained on",
    "fixed": "LoRA on the language model, projector fixed",
    "trained": "LoRA on the language model, projector trained on",
    "all": "LoRA on vision and language model, projector trained on",
    "full": "the language model whole, projector fixed",
    "control": "LoRA on the language model, projector fixed; images shuffled among questions",
}
HOW = {
    "lora": "LoRA (r 8, α 16)",
    "full": "training parts whole in stage 2",
    "projector": "the projector where it alone is trained on",
}
EASY = """
## Easy-VQA with LoRA on all three parts

`python -m benchmarks easy_vqa`: images of one shape each as files, seen at 24 × 24 pixels; a small CLIP tower, a projector of two
layers and the bundled `tiny`. The tower first learns shapes and colours, as far as the training questions tell them (of the test
images it gets {shape} of the shapes and {colour} of the colours right). Stage 1 trains the projector on the questions for a shape or
a colour ({align_steps} steps) and is merged into the base. Stage 2, {steps} steps of {batch} rows from a fixed sample of {asked:,} of the
38,575 training questions, trains LoRA r 16, α 32 on the tower's attention, on the projector and on the language model,
{parameters:,} parameters, and nothing else. Right answers to a fixed sample of {scored:,} of the 9,673 test questions, mean ± sd over
{seeds} seeds; an answer is right when greedy decoding says exactly it.

"""


def images() -> str:
    """Both tables with their pictures; nothing where they were not measured."""
    page, found = "", results("digits_vqa")
    if found is not None:
        page += digits(found)
    found = results("easy_vqa")
    return page if found is None else page + easy(found)


def digits(found: dict[str, Any]) -> str:
    seeds = len(found["tower"]["seeds"])
    text = DIGITS.format(**{**found, "tower": share(found["tower"]), "seeds": seeds})
    rows = [
        [said, f"{found['parameters'].get(arm, found['parameters'][found['control_of']]):,}", share(one["known"]), share(one["new"])]
        for arm, said in ARMS.items()
        if (one := found["arms"].get(arm)) is not None
    ]  # fmt: skip
    text += grid(["stage 2", "trained parameters", "4 known questions", "2 new questions"], rows)
    each = [
        [arm_said, *(f"{value:.1%}" for value in found["arms"][arm]["questions"].values())]
        for arm, arm_said in ARMS.items()
        if arm in ("none", "fixed", "control") and arm in found["arms"]
    ]
    text += "\nBy question:\n\n" + grid(["", *next(iter(found["arms"].values()))["questions"]], each)
    tried = "; ".join(f"{HOW[how]} {_rates(losses, found['chosen'][how])}" for how, losses in found["tried"].items())
    return text + (
        f"\nRates tried on seed 0, with the held-out loss on {found['valid']} training images: {tried}. Stage 1 "
        f"ran at {found['align_rate']:g}. Arms that differ by less than their sd are not told apart here. "
        f"Processor time: {_minutes(found['seconds'])} minutes a seed on one shared core, all arms.\n\n"
        "![Test images, a question, and what is said after each stage](pictures/digits_vqa.svg)\n"
    )


def easy(found: dict[str, Any]) -> str:
    scores = found["scores"]
    tower = {kind: share(one) for kind, one in found["tower"].items()}
    text = EASY.format(**{**found, **tower, "seeds": len(scores["stage 2"]["all"]["seeds"])})
    said = {
        "stage 1": "stage 1 only",
        "stage 2": "LoRA on all three parts",
        "shuffled": "the same, images shuffled among questions",
    }
    kinds = list(scores["stage 2"])
    rows = [
        [f"always the most frequent {name}", f"{value:.1%}", *["–"] * (len(kinds) - 1)]
        for name, value in (("answer", found["majority"]["one answer"]), ("answer to the question", found["majority"]["by question"]))
    ]  # fmt: skip
    rows += [[text, *(share(scores[name][kind]) for kind in kinds)] for name, text in said.items()]
    text += grid(["", *(kind if kind != "all" else "all questions" for kind in kinds)], rows)
    return text + (
        f"\nLoRA's rates tried on seed 0 for {found['try_steps']} steps, with the loss on {found['checked']} held-out questions: "
        f"{_rates(found['tried'], found['chosen'])}.\n\n"
        "![Test images, a question, and what is said after each stage](pictures/easy_vqa.svg)\n"
    )


def _rates(losses: dict[str, float], chosen: float) -> str:
    told = ", ".join(f"{rate} ({loss:.3f})" for rate, loss in losses.items())
    rates = [float(rate) for rate in losses]
    edge = ", the highest tried" if chosen == max(rates) else ", the lowest tried" if chosen == min(rates) else ""
    return f"{told}, taken {chosen:g}{edge}"


def _minutes(seconds: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{each / 60:.1f}" for each in (min(seconds), max(seconds))))


def share(found: dict[str, Any]) -> str:
    mean = f"{found['mean']:.1%}"
    return mean if found["sd"] is None else f"{mean} ± {100 * found['sd']:.1f}"
