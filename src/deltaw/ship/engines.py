"""Which adapter files the serving engines take: one table of rules each, with the version it was read from.

Read as code: vLLM 0.33.0 (`vllm/lora`), SGLang 0.5.23 (`srt/lora`), LoRAX, Text Generation Inference, llama.cpp's
`convert_lora_to_gguf.py` and `llama-adapter.h`, Ollama's `convert`; as documentation: KServe. What vLLM's config checks
refuse was run. Conclusions hold for these versions only, and for bases that the engine has LoRA for at all.
"""

from collections.abc import Collection, Sequence

from deltaw.core.errors import UseError, did_you_mean
from deltaw.ship import rules as r
from deltaw.ship import rules_scale as s
from deltaw.ship.acceptance import Engine, Facts, Opinion, Rule, judge

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be; 16 is its default."""
VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
HEAD = r"base_model\.model\.(.+\.)?(classifier|score)\.(weight|bias)"
COPIES = r".*\.(embed_tokens|lm_head)\.base_layer\.weight"


def vllm_rank(f: Facts) -> str | None:
    limit = next((limit for limit in VLLM_RANKS if limit >= f.rank), None)
    return f"rank {f.rank}: start it with --max-lora-rank {limit}" if limit is not None and f.rank > 16 else None


def vllm_towers(f: Facts) -> str | None:
    """Of a model that reads images it adapts the language model alone, unless it is told otherwise; the rest is left with a line
    in its log."""
    parts = f.base.parts if f.base is not None else None
    away = [path for path in f.factors if parts is not None and parts.of(path) not in ("language", "head")]
    return (
        f"start it with --enable-tower-connector-lora (experimental), or it passes over {r.kinds(away)}"
        if away
        else None
    )


def sglang_start(f: Facts) -> str | None:
    names = " ".join(sorted({r.leaf(path) for path in f.factors}))
    return (
        f"start it with --max-lora-rank {f.rank} --lora-target-modules {names}, or name it in --lora-paths"
        if names
        else None
    )


FILE = (
    Rule("config", "refuses", r.no_config, stays=True),
    Rule("weights", "refuses", r.no_weights, stays=True),
    Rule("nothing", "refuses", r.nothing, stays=True),
    Rule("options", "unknown", r.unknown_options, "not verified", stays=True),
)
NAN = Rule("nonfinite", "ignores", r.nonfinite, stays=True)
TYPE = Rule("type", "mis-reads", r.another_method, "inferred")
HALF = Rule("pair", "refuses", r.half_pairs, "not verified", stays=True)
SHAPES = Rule("shapes", "refuses", r.other_shapes, "not verified", stays=True)

VLLM_COMMON = (
    *FILE,
    TYPE,
    Rule("required", "refuses", r.lacks("r", "lora_alpha", "target_modules"), "measured"),
    Rule("ranks", "refuses", r.ranks_invalid, "measured"),
    Rule("saved", "refuses", r.saves_more_than(("classifier", "score")), "measured"),
    Rule("head", "refuses", r.heads_not_one),
    Rule("causal", "refuses", r.head_of_causal),
    Rule("dora", "refuses", r.switched("use_dora", "DoRA"), "measured"),
    Rule("lora_bias", "refuses", r.switched("lora_bias", "a bias on B"), "measured"),
    Rule("bias", "refuses", r.biased, "measured"),
    Rule("alora", "refuses", r.switched("alora_invocation_tokens", "activated LoRA"), "measured"),
    Rule("replication", "refuses", r.switched("layer_replication", "layer replication"), "measured"),
    Rule("bdlora", "refuses", r.switched("use_bdlora", "BD-LoRA"), "measured"),
    Rule("qalora", "refuses", r.switched("use_qalora", "QA-LoRA"), "measured"),
    Rule("init", "refuses", r.init_not_in(VLLM_INITS), "measured"),
    Rule("keys", "refuses", r.keys_beside(f"{HEAD}|{COPIES}", "keys that it does not support")),
    HALF,
    Rule("names", "refuses", r.wrong_names(("embed_tokens", "lm_head"))),
    Rule("places", "ignores", r.wrong_places(("embed_tokens", "lm_head"))),
    Rule("vocabulary", "refuses", r.other_vocabulary, stays=True),
    Rule("experts", "refuses", r.experts_uneven),
    Rule("stacks", "needs", r.experts_fused, "not verified"),
    Rule("towers", "needs", vllm_towers, "not verified"),
    Rule("shapes", "mis-reads", r.other_shapes, stays=True),
    Rule("arrow", "ignores", r.switched("arrow_config", "routing between adapters is not done"), "measured"),
    Rule("kasa", "ignores", r.switched("kasa_config", "KaSA's third factor is not there"), "measured"),
    NAN,
)
VLLM = Engine(
    "vllm",
    "0.33.0",
    (
        *VLLM_COMMON,
        Rule("rank", "refuses", r.rank_above(VLLM_RANKS[-1]), "measured"),
        Rule("start", "needs", vllm_rank),
    ),
)
KSERVE = Engine(
    "kserve",
    "docs 3895e79, on vLLM 0.33.0",
    (*VLLM_COMMON, Rule("rank", "refuses", r.rank_above(64), "doc")),
)
SGLANG = Engine(
    "sglang",
    "0.5.23",
    (
        *FILE,
        Rule("required", "refuses", r.lacks("r", "lora_alpha", "target_modules"), "not verified"),
        Rule("type", "refuses", r.not_lora),
        Rule("dora", "refuses", r.switched("use_dora", "DoRA")),
        Rule("tokens", "refuses", r.new_tokens),
        Rule("targets", "refuses", r.target_text),
        Rule("q-without-v", "refuses", s.q_without_v, "measured"),
        Rule("group-ranks", "refuses", s.group_ranks, "measured"),
        HALF,
        Rule("alone", "ignores", s.without_its_first, "inferred"),
        Rule("scale", "mis-scales", s.scaled_by(s.global_scale, ("use_rslora", *s.PATTERNS))),
        Rule("bias", "ignores", r.biased),
        Rule("saved", "ignores", r.saves_more_than(())),
        Rule("keys", "ignores", r.keys_beside(COPIES, "tensors that it passes over")),
        Rule("embedding", "ignores", r.embedding_untargeted, "not verified"),
        Rule("places", "ignores", r.wrong_places(("embed_tokens", "lm_head"))),
        SHAPES,
        NAN,
        Rule("start", "needs", sglang_start),
    ),
)
LORAX_RULES = (
    *FILE,
    TYPE,
    Rule("stacked", "refuses", s.ranks_uneven, "code, LoRAX 1e223be"),
    Rule("pair", "ignores", r.half_pairs, stays=True),
    Rule("layers", "ignores", s.layers_missing),
    Rule("scale", "mis-scales", s.scaled_by(s.global_rslora, s.PATTERNS)),
    Rule("padding", "mis-scales", s.scaled_after_padding, "code, LoRAX 1e223be and TGI e582eed"),
    Rule("dora", "ignores", r.switched("use_dora", "DoRA runs as plain LoRA, its magnitudes are not used"), "inferred"),
    Rule("bias", "ignores", r.biased),
    Rule("saved", "ignores", r.saves_more_than(())),
    Rule("keys", "ignores", r.keys_beside(COPIES, "tensors that it passes over")),
    Rule("embedding", "ignores", r.embedding_not_read),
    Rule("places", "ignores", r.wrong_places(())),
    SHAPES,
    NAN,
    Rule("parallel", "needs", s.padded_on_more, "code, LoRAX 1e223be and TGI e582eed"),
)
LORAX = Engine("lorax", "a7394ba, 2026-05-28", LORAX_RULES)
TGI = Engine("tgi", "db931fc, 2026-01-08", (*LORAX_RULES, Rule("pickle", "refuses", r.pickled)))
GGUF_KEYS = r".*\.base_layer\.weight.*|.*_layernorm.*|.*\.norm.*"
LLAMA_CPP = Engine(
    "llama.cpp",
    "convert_lora_to_gguf.py 0b03ada",
    (
        *FILE,
        TYPE,
        Rule("required", "refuses", r.lacks("lora_alpha")),
        Rule("keys", "refuses", r.keys_beside(GGUF_KEYS, "it ends at tensors that are no factors")),
        Rule("pair", "refuses", r.half_pairs, stays=True),
        Rule("head", "refuses", r.tied_head, "inferred", stays=True),
        Rule("scale", "mis-scales", s.scaled_by(s.tensor_scale, ("use_rslora", "alpha_pattern"))),
        Rule("names", "refuses", r.wrong_names(("embed_tokens",)), "inferred"),
        SHAPES,
        NAN,
        Rule("base", "needs", r.base_unnamed),
    ),
)
OLLAMA = Engine(
    "ollama",
    "fb30760, 2026-08-21",
    (
        *FILE,
        TYPE,
        Rule("alpha", "refuses", r.alpha_not_whole),
        Rule("base", "refuses", r.base_not_in(("LlamaForCausalLM", "Gemma2ForCausalLM")), stays=True),
        Rule("keys", "refuses", r.keys_beside(r"(?!)", "tensors that are no factors"), "not verified"),
        HALF,
        Rule("names", "refuses", r.names_beside(s.LLAMA), "inferred"),
        Rule("flat", "mis-reads", r.flat_factors, "code, Ollama 0242080"),
        Rule("scale", "mis-scales", s.scaled_by(s.tensor_scale, ("use_rslora", "alpha_pattern"))),
        SHAPES,
        NAN,
    ),
)
ENGINES = {one.name: one for one in (VLLM, SGLANG, LORAX, TGI, LLAMA_CPP, OLLAMA, KSERVE)}


def known(names: Collection[str]) -> None:
    """UseError for engines that there is no table for."""
    wrong = [name for name in names if name not in ENGINES]
    if wrong:
        raise UseError(f"no engine {wrong[0]!r}{did_you_mean(wrong[0], ENGINES)}; known are {', '.join(ENGINES)}")


def check(facts: Facts, names: Sequence[str] = ()) -> list[Opinion]:
    """What these engines (all where none is named) make of an adapter folder. UseError for unknown names."""
    known(names)
    return [judge(ENGINES[name], facts) for name in names or ENGINES]
