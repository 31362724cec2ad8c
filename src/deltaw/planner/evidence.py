"""What is said about rank, alpha, targets and cost in guides and notes, claim by claim: true, wrong or depends, and why.

`deltaw advise --claims` prints it, docs/advice.md is made of it. A claim is wrong where its reason is, also where its
number is a fair default. Kinds of evidence: measured by a command of this repository, published, computed, rule of thumb.
"""

from typing import NamedTuple

from deltaw.planner import measured as m
from deltaw.planner import sources as by

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
        f"{by.LORA}, Table 6", by.PUBLISHED,
    ),
    Claim(
        TIERS, "Domain questions, reasoning: rank 16 to 32", DEPENDS,
        "A fair default for some thousand rows on all linear layers; nobody has shown that the kind of task asks for it.",
        "GPT-2 M on E2E: held-out loss 1.23 at rank 1, 1.17 at 8, 1.16 from 16 to 512. Code instructions on Llama-2-7B go "
        "on rising: HumanEval .358 at 16, .417 at 64, .498 at 256, all weights .497.",
        f"{by.LORA}, Table 18; {by.LESS}", by.PUBLISHED,
    ),
    Claim(
        TIERS, "Full chains of thought: rank 64 to 128", DEPENDS,
        "On many long rows, because they hold much to learn; learnt by reinforcement rank 1 is enough.",
        "Supervised runs leave the common loss curve at a step that grows with rank; in policy gradients rank 1 equals all weights.",
        by.REGRET, by.PUBLISHED,
    ),
    Claim(
        TIERS, "Full change of style, translation: rank 256 to 512 and more, at nearly the cost of full fine-tuning", DEPENDS,
        "The direction is right for a new language or much data, but no rank makes up for it: train all weights then. Cost in "
        "parameters is; in memory the gradients and moments of the base are still saved.",
        "Qwen3-0.6B, all linear layers: rank 256 is 27.1 % of the model's parameters, 512 is 54.2 %, and on its 1024 × 1024 "
        "layers 512 is W's own size. Continued pretraining: HumanEval .224 at rank 256, .263 with all weights.",
        f"{by.PLAN}; {by.LESS}; {by.LORA}, footnote 6", by.PUBLISHED,
    ),
    Claim(
        TIERS, "Rank 4 to 16, by how complex the task is", DEPENDS,
        "The range of the paper's small tasks; too narrow for large data, where supervised training took 256.",
        "A parameter holds about two bits; with more than that in the data LoRA falls behind the loss curve of all weights.",
        by.REGRET, by.PUBLISHED,
    ),
    Claim(
        TIERS, "Rank = √(difference between the new task and the old one)", WRONG,
        "Made up: no paper has it, and the difference has no unit and no way to be measured.",
        "The nearest there is: capacity of about two bits a parameter against the bits in the data.",
        by.REGRET, by.PUBLISHED,
    ),
    Claim(
        TIERS, "A change is low-rank: the top 100 of 100,000 singular values hold 99 %", WRONG,
        "LoRA's change has rank r because it is made so. That such a change is enough for many tasks is another statement.",
        "A 12288 × 12288 matrix has 12,288 of them. The change of full fine-tuning needs about half of its directions for 90 %.",
        by.LESS, by.PUBLISHED,
    ),
    Claim(
        TIERS, "Rank matters most, then scaling, then targets", WRONG,
        "The other way round: learning rate, then targets, then data, then rank.",
        "Nine variants of LoRA come within 1 to 2 % of each other once each has its rate. At equal size attention alone at "
        "rank 256 loses to the MLPs at 128. Rank 1 to 64 on q and v moves GPT-3 by less than a point.",
        f"{by.RATES}; {by.REGRET}; {by.LORA}, Table 6", by.PUBLISHED,
    ),
    Claim(
        ALPHA, "α = r: cautious (factor 1; rank 16, α 16)", DEPENDS,
        "The factor is right, the word only at a fixed learning rate: tune the rate and it is gone.",
        "Under Adam without weight decay (α, A₀, rate of A, rate of B) and (α/(pq), p·A₀, p·rate, q·rate) train alike.",
        by.REGRET, by.PUBLISHED,
    ),
    Claim(
        ALPHA, "α = 2r: medium (factor 2; rank 16, α 32)", DEPENDS,
        "The factor is right, and it is the default here. Medium says nothing: it is what the usual rates were found at.",
        "Hu et al. used α/r of 1, 2 and 8, QLoRA 0.25; Biderman et al. recommend 2r.",
        f"{by.LORA}; {by.QLORA}; {by.LESS}", by.PUBLISHED,
    ),
    Claim(
        ALPHA, "α = 4r: aggressive (factor 4; rank 16, α 64)", DEPENDS,
        "The factor is right. It acts as twice the rate of B at 2r, so that half the rate of B takes it back.",
        "Hu et al. trained GPT-2 at 8 (rank 4, α 32, rate 2e-4).",
        f"{by.LORA}, Table 11", by.PUBLISHED,
    ),
    Claim(
        ALPHA, "The LoRA paper recommends α as a multiple of r", WRONG,
        "It sets α to the first rank tried, and does not tune it.",
        "α/r in its runs: 1 (RoBERTa-base), 2 (its scripts), 8 (GPT-2). 2r is the advice of later work.",
        f"{by.LORA}, §4.1; {by.LESS}", by.PUBLISHED,
    ),
    Claim(
        ALPHA, "α = 2r is the industry's standard", DEPENDS,
        "A common default, and no standard.",
        "rank/α: PEFT 8/8, Unsloth 16/16, LLaMA-Factory 8/16, TRL 16/32, torchtune and LitGPT 8/16, mlx-lm a factor of 20, "
        "QLoRA 64/16.",
        f"{by.TOOLS}; {by.QLORA}", by.PUBLISHED,
    ),
    Claim(
        ALPHA, "α is the factor of the change", WRONG,
        "The factor is α/r (rsLoRA: α/√r); without /r the change grows with the rank.",
        "Rank 8, α 16: factor 2, not 16. Rank 32, α 64 with rslora: 11.31.",
        f"{by.LORA}, §4.1; {by.PLAN}", by.COMPUTED,
    ),
    Claim(
        ALPHA, "A large α learns more strongly and forgets more, a small one is stable and may not learn", DEPENDS,
        "True of a change of α alone. It is no dial of its own: the learning rate does the same.",
        "Tuning α is about the same as tuning the rate under Adam.",
        f"{by.LORA}, §4.1", by.PUBLISHED,
    ),
    Claim(
        REMEDIES, "The loss does not fall: α is too small, set α = 2r", WRONG,
        "Look first at what is learnt (all labels masked?), the rate, the targets, the template. Then raise the rate. Who is "
        "at 2r already gets no advice from this.",
        "On `tiny` LoRA's best rate is 50 times the default 2e-4, at the same α = 2r.",
        by.METHODS, by.MEASURED,
    ),
    Claim(
        REMEDIES, "The model became dull: α is too large, set α = r", DEPENDS,
        "Too strong a change is possible. Cheaper and reversible: a strength below 1 when it is used (`--adapter folder=0.5`), "
        "fewer epochs, a lower rate, some rows of the old kind.",
        "A strength w is α·w exactly, without training again; forgetting follows the rate: all weights at 1e-5 forget .030, "
        "LoRA at 1e-4 .050.",
        by.PEFT, by.PUBLISHED,
    ),
    Claim(
        REMEDIES, "Not sure: α = 2r", DEPENDS,
        "A fair default, and the same value as the first remedy: the three rules hold two settings between them.",
        "What is worth a sweep is the rate: three values a factor of three apart.",
        by.RATES, by.PUBLISHED,
    ),
    Claim(
        TARGETS, "Adapt q and v alone: they matter most and hold most parameters", WRONG,
        "All linear layers, or the MLPs, are at least as good at equal size.",
        "q and v are 16.7 % of a GPT-3 layer, 16.6 % of a Llama-7B's, 20 % of Qwen3-0.6B's linear layers. The paper studied "
        "attention only for simplicity. Rank 10 on the MLPs 49.4 %, rank 32 on q and v 47.8 %.",
        f"{by.LORA}, Table 5; {by.REGRET}; {by.PEFT}", by.PUBLISHED,
    ),
    Claim(
        TARGETS, "q, k, v, o, up and down are all linear layers", WRONG,
        "gate_proj is missing: a third of every gated MLP stays as it is.",
        "Qwen3-0.6B at rank 32: 16,515,072 parameters instead of 20,185,088.",
        by.PLAN, by.COMPUTED,
    ),
    Claim(
        TARGETS, "Attention projections are the best value", WRONG,
        "Not at equal parameters.",
        "Attention at rank 256 (0.25 B) ends above the loss of the MLPs at 128 (0.24 B); the MLPs alone do as well as all.",
        by.REGRET, by.PUBLISHED,
    ),
    Claim(
        TARGETS, "Different layers should have different ranks", DEPENDS,
        f"They may (rank_pattern, adalora, init: eva). Whether it pays is to be measured: ranks by the gradients of the frozen "
        f"base were {m.PROBED.verdict} than one rank for all on the bundled task at equal parameters.",
        m.PROBED.said, by.PROBE, by.MEASURED,
    ),
    Claim(
        METHOD, "A newer variant is better than LoRA", DEPENDS,
        "Each has a rate of its own; tuned, they are close. Choose by size, time and merging.",
        f"Held-out loss on the bundled task: lora {m.METHODS['lora'].loss:.4f}, dora {m.METHODS['dora'].loss:.4f}, oft "
        f"{m.METHODS['oft'].loss:.4f}, loha {m.METHODS['loha'].loss:.4f}; vera, ia3 and llama_adapter took ten times LoRA's rate.",
        f"{by.METHODS}; {by.RATES}", by.MEASURED,
    ),
    Claim(
        METHOD, "LoRA is as good as full fine-tuning", DEPENDS,
        "Where the data are within its capacity, the batch is moderate, the MLPs are adapted and the rate is tuned.",
        f"SCAN: LoRA {m.SCAN[0][0]:.1%} ± {m.SCAN[0][1]:.1%}, all weights {m.SCAN[1][0]:.1%} ± {m.SCAN[1][1]:.1%}. "
        "Continued pretraining: HumanEval .224 and .263.",
        f"{by.TASKS}; {by.LESS}", by.MEASURED,
    ),
    Claim(
        METHOD, "GPT-3 on RTE: full fine-tuning 85.2 %, LoRA 85.8 %", WRONG,
        "No such result exists; 85.2 is RoBERTa-large with LoRA, 85.8 GPT-3 with all weights on a thousand rows of MNLI.",
        "GPT-3 with LoRA (37.7 M) and all weights: WikiSQL 74.0 and 73.8, MNLI 91.6 and 89.5, SAMSum R1 53.4 and 52.0.",
        f"{by.LORA}, Tables 2, 4, 16", by.PUBLISHED,
    ),
    Claim(
        METHOD, "Both factors start at random", WRONG,
        "One starts at zero, or the model differs before the first step; with both at zero nothing ever learns.",
        "A ~ U(±1/√in), B = 0: the first output is the base's to the bit, the first gradient of A is zero and that of B is not.",
        f"{by.LORA}, §4.1; tests/contract", by.COMPUTED,
    ),
    Claim(
        METHOD, "LoRA forgets less", DEPENDS,
        "Often, at an equal loss on the new task; not by itself.",
        "LoRA r 32 at 1e-4 forgets .050, all weights at 1e-5 .030.",
        f"{by.PEFT}; {by.LESS}", by.PUBLISHED,
    ),
    Claim(
        METHOD, "The learning rate of full fine-tuning will do", WRONG,
        "LoRA wants about ten times that; 15 times in runs of less than 100 steps.",
        "9.8 times over 14 models, moving less than twofold from rank 4 to 512. GPT-3: 2e-4 and 5e-6.",
        f"{by.REGRET}; {by.LORA}, Table 12", by.PUBLISHED,
    ),
    Claim(
        METHOD, "A dropout of 0.05 or 0.1 against overfitting", DEPENDS,
        "Legal, on the input of the change alone; no result asks for it by default, and it costs time.",
        f"A training step over the frozen base's: {m.span(m.STEP)} without, {m.span(m.STEP_DROPOUT)} with 0.05.",
        by.STEPS, by.MEASURED,
    ),
    Claim(
        COST, "Merged, an adapter costs nothing in use", TRUE,
        "One matrix is one matrix again.",
        f"A decoding step merged takes {m.span(m.MERGED)} of the base's.",
        by.COSTS, by.MEASURED,
    ),
    Claim(
        COST, "LoRA has no latency", WRONG,
        "Not mounted: two more products in every adapted layer. They multiply little and start often.",
        f"12288 × 12288 at rank 8 multiplies 0.13 % more, 4096 × 4096 at 16 0.78 %; a decoding step of a 75 M model with one "
        f"adapter mounted takes {m.span(m.MOUNTED)} of the base's, with one for every row {m.span(m.EACH_ROW)}.",
        by.COSTS, by.MEASURED,
    ),
    Claim(
        COST, "Adapter layers slow inference by 10 to 20 %", DEPENDS,
        "On the size of the call: little where much is computed at once, a third for a single short one.",
        "A forward of GPT-2 M: +20.7 and +30.3 % at 1 × 128 tokens (two kinds), +5.0 and +8.4 at 16 × 256, +2.2 and +3.0 at 32 × 512.",
        f"{by.LORA}, Table 1", by.PUBLISHED,
    ),
    Claim(
        COST, "Training memory falls to 0.05 %", WRONG,
        "The frozen base stays in memory, and activations do.",
        "By the same figures (175 + 0.035 + 0.07)/700 = 25.0 %; the paper went from 1.2 TB to 350 GB, 29 %.",
        f"{by.LORA}, §4.2; {by.PLAN}", by.COMPUTED,
    ),
    Claim(
        COST, "A 12288 × 12288 matrix at rank 8 has 768 times fewer parameters to train", TRUE,
        "d/(2r) of a square matrix; of the model it says nothing.",
        "150,994,944 and 196,608. 1024 × 1024 at rank 4: 128 times; 114 times where the bias is trained too, which LoRA leaves frozen.",
        by.PLAN, by.COMPUTED,
    ),
    Claim(
        COST, "LoRA trains 0.01 % of the parameters", DEPENDS,
        "On GPT-3 at rank 4 on q and v.",
        "GPT-3: 18,874,368 of 175,255.8 M, 0.0108 %. Llama-7B, all linear layers, rank 16: 39,976,960, 0.593 %.",
        by.PLAN, by.COMPUTED,
    ),
    Claim(
        COST, "LoRA trains much faster", DEPENDS,
        "At most a third less arithmetic: the forward, and the backward through W, remain.",
        f"(2N² + 6NR)/(3N²) of the multiplications, 0.674 at N 4096, R 16; measured {m.span(m.STEP_OF_FULL)} of the time of all weights.",
        f"{by.REGRET}; {by.STEPS}", by.MEASURED,
    ),
)  # fmt: skip
"""In the order in which they are shown."""


def table(topic: str) -> list[Claim]:
    return [claim for claim in CLAIMS if claim.topic == topic]


def topics() -> list[str]:
    return list(dict.fromkeys(claim.topic for claim in CLAIMS))
