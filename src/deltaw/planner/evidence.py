"""What is said about rank, alpha, targets and cost in guides and notes, claim by claim: true, wrong or depends, and why.

`deltaw advise --claims` prints it, docs/advice.md is made of it. A claim is wrong where its reason is, also where its
number is a fair default. Kinds of evidence: measured by a command of this repository, published, computed, rule of thumb.
"""

from typing import NamedTuple

from deltaw.planner.measured import (
    EACH_ROW,
    MERGED,
    METHODS,
    MOUNTED,
    PROBED,
    SCAN,
    STEP,
    STEP_DROPOUT,
    STEP_OF_FULL,
    span,
)
from deltaw.planner.sources import (
    COMPUTED,
    COSTS,
    LESS,
    LORA,
    MEASURED,
    PEFT,
    PLAN,
    PROBE,
    PUBLISHED,
    QLORA,
    RATES,
    REGRET,
    STEPS,
    TASKS,
    TOOLS,
)
from deltaw.planner.sources import METHODS as METHODS_PAGE

TRUE, WRONG, DEPENDS = "true", "wrong", "depends"
VERDICTS = (TRUE, WRONG, DEPENDS)


class Claim(NamedTuple):
    topic: str
    said: str
    verdict: str
    answer: str
    evidence: str
    source: str
    kind: str


TIERS, ALPHA, REMEDIES, TARGETS, METHOD, COST = (
    "rank by task", "alpha as a multiple of rank", "three remedies", "targets", "method and training", "cost",
)  # fmt: skip

CLAIMS = (
    Claim(
        TIERS, "Style or spelling: rank 8", DEPENDS,
        "8 is enough for little data, and so often are 4 and 1; the name of the task does not set it, the amount of data does.",
        "GPT-3, q and v: MNLI 91.3 at rank 1, 91.6 at 8, 91.4 at 64; WikiSQL 73.4, 73.8, 73.5.",
        f"{LORA}, Table 6", PUBLISHED,
    ),
    Claim(
        TIERS, "Domain questions, reasoning: rank 16 to 32", DEPENDS,
        "A fair default for some thousand rows on all linear layers; nobody has shown that the kind of task asks for it.",
        "GPT-2 M on E2E: held-out loss 1.23 at rank 1, 1.17 at 8, 1.16 from 16 to 512. Code instructions on Llama-2-7B go "
        "on rising: HumanEval .358 at 16, .417 at 64, .498 at 256, all weights .497.",
        f"{LORA}, Table 18; {LESS}", PUBLISHED,
    ),
    Claim(
        TIERS, "Full chains of thought: rank 64 to 128", DEPENDS,
        "On many long rows, because they hold much to learn; learnt by reinforcement rank 1 is enough.",
        "Supervised runs leave the common loss curve at a step that grows with rank; in policy gradients rank 1 equals all weights.",
        REGRET, PUBLISHED,
    ),
    Claim(
        TIERS, "Full change of style, translation: rank 256 to 512 and more, at nearly the cost of full fine-tuning", DEPENDS,
        "The direction is right for a new language or much data, but no rank makes up for it: train all weights then. Cost in "
        "parameters is; in memory the gradients and moments of the base are still saved.",
        "Qwen3-0.6B, all linear layers: rank 256 is 27.1 % of the model's parameters, 512 is 54.2 %, and on its 1024 × 1024 "
        "layers 512 is W's own size. Continued pretraining: HumanEval .224 at rank 256, .263 with all weights.",
        f"{PLAN}; {LESS}; {LORA}, footnote 6", PUBLISHED,
    ),
    Claim(
        TIERS, "Rank 4 to 16, by how complex the task is", DEPENDS,
        "The range of the paper's small tasks; too narrow for large data, where supervised training took 256.",
        "A parameter holds about two bits; with more than that in the data LoRA falls behind the loss curve of all weights.",
        REGRET, PUBLISHED,
    ),
    Claim(
        TIERS, "Rank = √(difference between the new task and the old one)", WRONG,
        "Made up: no paper has it, and the difference has no unit and no way to be measured.",
        "The nearest there is: capacity of about two bits a parameter against the bits in the data.",
        REGRET, PUBLISHED,
    ),
    Claim(
        TIERS, "Rank matters most, then scaling, then targets", WRONG,
        "The other way round: learning rate, then targets, then data, then rank.",
        "Nine variants of LoRA come within 1 to 2 % of each other once each has its rate. At equal size attention alone at "
        "rank 256 loses to the MLPs at 128. Rank 1 to 64 on q and v moves GPT-3 by less than a point.",
        f"{RATES}; {REGRET}; {LORA}, Table 6", PUBLISHED,
    ),
    Claim(
        ALPHA, "α = r: cautious (factor 1; rank 16, α 16)", DEPENDS,
        "The factor is right, the word only at a fixed learning rate: tune the rate and it is gone.",
        "Under Adam without weight decay (α, A₀, rate of A, rate of B) and (α/(pq), p·A₀, p·rate, q·rate) train alike.",
        REGRET, PUBLISHED,
    ),
    Claim(
        ALPHA, "α = 2r: medium (factor 2; rank 16, α 32)", DEPENDS,
        "The factor is right, and it is the default here. Medium says nothing: it is what the usual rates were found at.",
        "Hu et al. used α/r of 1, 2 and 8, QLoRA 0.25; Biderman et al. recommend 2r.",
        f"{LORA}; {QLORA}; {LESS}", PUBLISHED,
    ),
    Claim(
        ALPHA, "α = 4r: aggressive (factor 4; rank 16, α 64)", DEPENDS,
        "The factor is right. It acts as twice the rate of B at 2r, so that half the rate of B takes it back.",
        "Hu et al. trained GPT-2 at 8 (rank 4, α 32, rate 2e-4).",
        f"{LORA}, Table 11", PUBLISHED,
    ),
    Claim(
        ALPHA, "The LoRA paper recommends α as a multiple of r", WRONG,
        "It sets α to the first rank tried, and does not tune it.",
        "α/r in its runs: 1 (RoBERTa-base), 2 (its scripts), 8 (GPT-2). 2r is the advice of later work.",
        f"{LORA}, §4.1; {LESS}", PUBLISHED,
    ),
    Claim(
        ALPHA, "α = 2r is the industry's standard", DEPENDS,
        "A common default, and no standard.",
        "rank/α: PEFT 8/8, Unsloth 16/16, LLaMA-Factory 8/16, TRL 16/32, torchtune and LitGPT 8/16, mlx-lm a factor of 20, "
        "QLoRA 64/16.",
        f"{TOOLS}; {QLORA}", PUBLISHED,
    ),
    Claim(
        ALPHA, "α is the factor of the change", WRONG,
        "The factor is α/r (rsLoRA: α/√r); without /r the change grows with the rank.",
        "Rank 8, α 16: factor 2, not 16. Rank 32, α 64 with rslora: 11.31.",
        f"{LORA}, §4.1; {PLAN}", COMPUTED,
    ),
    Claim(
        ALPHA, "A large α learns more strongly and forgets more, a small one is stable and may not learn", DEPENDS,
        "True of a change of α alone. It is no dial of its own: the learning rate does the same.",
        "Tuning α is about the same as tuning the rate under Adam.",
        f"{LORA}, §4.1", PUBLISHED,
    ),
    Claim(
        REMEDIES, "The loss does not fall: α is too small, set α = 2r", WRONG,
        "Look first at what is learnt (all labels masked?), the rate, the targets, the template. Then raise the rate. Who is "
        "at 2r already gets no advice from this.",
        "On `tiny` LoRA's best rate is 50 times the default 2e-4, at the same α = 2r.",
        METHODS_PAGE, MEASURED,
    ),
    Claim(
        REMEDIES, "The model became dull: α is too large, set α = r", DEPENDS,
        "Too strong a change is possible. Cheaper and reversible: a strength below 1 when it is used (`--adapter folder=0.5`), "
        "fewer epochs, a lower rate, some rows of the old kind.",
        "A strength w is α·w exactly, without training again; forgetting follows the rate: all weights at 1e-5 forget .030, "
        "LoRA at 1e-4 .050.",
        PEFT, PUBLISHED,
    ),
    Claim(
        REMEDIES, "Not sure: α = 2r", DEPENDS,
        "A fair default, and the same value as the first remedy: the three rules hold two settings between them.",
        "What is worth a sweep is the rate: three values a factor of three apart.",
        RATES, PUBLISHED,
    ),
    Claim(
        TARGETS, "Adapt q and v alone: they matter most and hold most parameters", WRONG,
        "All linear layers, or the MLPs, are at least as good at equal size.",
        "q and v are 16.7 % of a GPT-3 layer, 16.6 % of a Llama-7B's, 20 % of Qwen3-0.6B's linear layers. The paper studied "
        "attention only for simplicity. Rank 10 on the MLPs 49.4 %, rank 32 on q and v 47.8 %.",
        f"{LORA}, Table 5; {REGRET}; {PEFT}", PUBLISHED,
    ),
    Claim(
        TARGETS, "q, k, v, o, up and down are all linear layers", WRONG,
        "gate_proj is missing: a third of every gated MLP stays as it is.",
        "Qwen3-0.6B at rank 32: 16,515,072 parameters instead of 20,185,088.",
        PLAN, COMPUTED,
    ),
    Claim(
        TARGETS, "Attention projections are the best value", WRONG,
        "Not at equal parameters.",
        "Attention at rank 256 (0.25 B) ends above the loss of the MLPs at 128 (0.24 B); the MLPs alone do as well as all.",
        REGRET, PUBLISHED,
    ),
    Claim(
        TARGETS, "Different layers should have different ranks", DEPENDS,
        f"They may (rank_pattern, adalora, init: eva). Whether it pays is to be measured: ranks by the gradients of the frozen "
        f"base were {PROBED.verdict} than one rank for all on the bundled task at equal parameters.",
        PROBED.said, PROBE, MEASURED,
    ),
    Claim(
        METHOD, "A newer variant is better than LoRA", DEPENDS,
        "Each has a rate of its own; tuned, they are close. Choose by size, time and merging.",
        f"Held-out loss on the bundled task: lora {METHODS['lora'].loss:.4f}, dora {METHODS['dora'].loss:.4f}, oft "
        f"{METHODS['oft'].loss:.4f}, loha {METHODS['loha'].loss:.4f}; vera, ia3 and llama_adapter took ten times LoRA's rate.",
        f"{METHODS_PAGE}; {RATES}", MEASURED,
    ),
    Claim(
        METHOD, "LoRA is as good as full fine-tuning", DEPENDS,
        "Where the data are within its capacity, the batch is moderate, the MLPs are adapted and the rate is tuned.",
        f"SCAN: LoRA {SCAN[0][0]:.1%} ± {SCAN[0][1]:.1%}, all weights {SCAN[1][0]:.1%} ± {SCAN[1][1]:.1%}. "
        "Continued pretraining: HumanEval .224 and .263.",
        f"{TASKS}; {LESS}", MEASURED,
    ),
    Claim(
        METHOD, "LoRA forgets less", DEPENDS,
        "Often, at an equal loss on the new task; not by itself.",
        "LoRA r 32 at 1e-4 forgets .050, all weights at 1e-5 .030.",
        f"{PEFT}; {LESS}", PUBLISHED,
    ),
    Claim(
        METHOD, "The learning rate of full fine-tuning will do", WRONG,
        "LoRA wants about ten times that; 15 times in runs of less than 100 steps.",
        "9.8 times over 14 models, moving less than twofold from rank 4 to 512. GPT-3: 2e-4 and 5e-6.",
        f"{REGRET}; {LORA}, Table 12", PUBLISHED,
    ),
    Claim(
        METHOD, "A dropout of 0.05 or 0.1 against overfitting", DEPENDS,
        "Legal, on the input of the change alone; no result asks for it by default, and it costs time.",
        f"A training step over the frozen base's: {span(STEP)} without, {span(STEP_DROPOUT)} with 0.05.",
        STEPS, MEASURED,
    ),
    Claim(
        COST, "Merged, an adapter costs nothing in use", TRUE,
        "One matrix is one matrix again.",
        f"A decoding step merged takes {span(MERGED)} of the base's.",
        COSTS, MEASURED,
    ),
    Claim(
        COST, "LoRA has no latency", WRONG,
        "Not mounted: two more products in every adapted layer. They multiply little and start often.",
        f"12288 × 12288 at rank 8 multiplies 0.13 % more, 4096 × 4096 at 16 0.78 %; a decoding step of a 75 M model with one "
        f"adapter mounted takes {span(MOUNTED)} of the base's, with one for every row {span(EACH_ROW)}.",
        COSTS, MEASURED,
    ),
    Claim(
        COST, "Training memory falls to 0.05 %", WRONG,
        "The frozen base stays in memory, and activations do.",
        "By the same figures (175 + 0.035 + 0.07)/700 = 25.0 %; the paper went from 1.2 TB to 350 GB, 29 %.",
        f"{LORA}, §4.2; {PLAN}", COMPUTED,
    ),
    Claim(
        COST, "LoRA trains 0.01 % of the parameters", DEPENDS,
        "On GPT-3 at rank 4 on q and v.",
        "GPT-3: 18,874,368 of 175,255.8 M, 0.0108 %. Llama-7B, all linear layers, rank 16: 39,976,960, 0.593 %.",
        PLAN, COMPUTED,
    ),
    Claim(
        COST, "LoRA trains much faster", DEPENDS,
        "At most a third less arithmetic: the forward, and the backward through W, remain.",
        f"(2N² + 6NR)/(3N²) of the multiplications, 0.674 at N 4096, R 16; measured {span(STEP_OF_FULL)} of the time of all weights.",
        f"{REGRET}; {STEPS}", MEASURED,
    ),
)  # fmt: skip
"""In the order in which they are shown."""


def table(topic: str) -> list[Claim]:
    return [claim for claim in CLAIMS if claim.topic == topic]


def topics() -> list[str]:
    return list(dict.fromkeys(claim.topic for claim in CLAIMS))
