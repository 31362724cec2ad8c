"""Questions about the folder, its config and the names of its tensors: what engines refuse or pass over.

Each is pure and answers with a sentence, or None where the rule says nothing of this folder. Those about scales and layers
are in `deltaw.ship.rules_scale`; which engine asks which, and where that was read, stands in `deltaw.ship.engines`.
"""

import re
from collections.abc import Collection, Iterable

from deltaw.formats.directory import CONFIG
from deltaw.formats.weights import PICKLED, WEIGHTS
from deltaw.ship.acceptance import Facts, Question

KNOWN = {
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias",
    "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_bdlora",
    "use_dora", "use_qalora", "use_rslora", "velora_config",
}  # fmt: skip
"""The keys of a LORA config in PEFT 0.21; ours are among them."""
HEAD = re.compile(r"base_model\.model\.(.+\.)?(classifier|score)\.weight")


def leaf(path: str) -> str:
    return path.rpartition(".")[2]


def folded(path: str) -> str:
    """The path with a star for each number: modules of repeated layers are one kind."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def some(items: Iterable[str], most: int = 4) -> str:
    known = sorted(set(items))
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


def kinds(paths: Iterable[str]) -> str:
    """Keys or paths for people."""
    return some(folded(path.removeprefix("base_model.model.")) for path in paths)


# The folder and its config


def no_config(f: Facts) -> str | None:
    return None if CONFIG in f.files else f"there is no {CONFIG}"


def no_weights(f: Facts) -> str | None:
    return None if {WEIGHTS, PICKLED} & f.files else f"there is no {WEIGHTS}; it must be one file, no shards"


def pickled(f: Facts) -> str | None:
    return f"there is only {PICKLED}, it reads safetensors" if WEIGHTS not in f.files and PICKLED in f.files else None


def lacks(*keys: str) -> Question:
    def trips(f: Facts) -> str | None:
        missing = [key for key in keys if f.config.get(key) is None]
        return f"{CONFIG} lacks {', '.join(missing)}" if missing and CONFIG in f.files else None

    return trips


def not_lora(f: Facts) -> str | None:
    word = f.config.get("peft_type")
    return None if word == "LORA" or CONFIG not in f.files else f"peft_type is {word}, it reads LORA"


def another_method(f: Facts) -> str | None:
    word = f.config.get("peft_type")
    return None if word in (None, "LORA") else f"peft_type is {word}, it does not look and computes what LoRA would"


def unknown_options(f: Facts) -> str | None:
    """Keys with a value: what a newer PEFT or another tool means by them may change what the tensors mean."""
    if f.config.get("peft_type", "LORA") != "LORA":
        return None
    more = [key for key, value in f.config.items() if value and key not in KNOWN]
    return f"key{'s' * (len(more) > 1)} the rules do not know: {some(more)}" if more else None


def switched(key: str, what: str) -> Question:
    """An option is on."""
    return lambda f: f"{what} ({key})" if f.config.get(key) else None


def biased(f: Facts) -> str | None:
    return f"trained biases (bias: {f.config['bias']})" if f.config.get("bias") not in (None, "none") else None


def init_not_in(known: Collection[str]) -> Question:
    def trips(f: Facts) -> str | None:
        init = f.config.get("init_lora_weights")
        wrong = isinstance(init, str) and init not in known
        return f"init_lora_weights is {init}, it knows {', '.join(known)}" if wrong else None

    return trips


def ranks_invalid(f: Facts) -> str | None:
    told = {"r": f.config.get("r"), **dict(f.config.get("rank_pattern") or {})}
    wrong = [f"{key}={r!r}" for key, r in told.items() if r is not None and not (type(r) is int and r > 0)]
    return f"ranks must be whole numbers above 0, not {', '.join(wrong)}" if wrong else None


def rank_above(limit: int) -> Question:
    return lambda f: f"rank {f.rank} is above its limit of {limit}" if f.rank > limit else None


def target_text(f: Facts) -> str | None:
    targets = f.config.get("target_modules")
    if not isinstance(targets, str) or targets in ("all", "all-linear"):
        return None
    return f"target_modules is the expression {targets[:60]!r}, it reads lists of names"


def alpha_not_whole(f: Facts) -> str | None:
    alpha = f.config.get("lora_alpha")
    if alpha is None or (type(alpha) is int and 0 <= alpha < 2**32):
        return None
    return f"lora_alpha is {alpha!r}, it reads whole numbers without a point"


def saves_more_than(allowed: Collection[str]) -> Question:
    def trips(f: Facts) -> str | None:
        more = set(f.config.get("modules_to_save") or ()) - set(allowed)
        return f"whole modules beside the factors (modules_to_save: {some(more)})" if more else None

    return trips


def heads_not_one(f: Facts) -> str | None:
    """Of a file that says it brings a classifier: it must be a single matrix."""
    if not set(f.config.get("modules_to_save") or ()) & {"classifier", "score"}:
        return None
    shapes = [f.header[key][1] for key in f.others if HEAD.fullmatch(key)]
    if len(shapes) == 1 and len(shapes[0]) == 2:
        return None
    return f"it takes one matrix as classifier, the file has {', '.join(map(str, shapes)) or 'none'}"


def head_of_causal(f: Facts) -> str | None:
    causal = [name for name in f.architectures if "ForCausalLM" in name]
    return (
        f"modules_to_save is for classifiers, the base is {causal[0]}"
        if causal and f.config.get("modules_to_save")
        else None
    )


def base_unnamed(f: Facts) -> str | None:
    return None if f.config.get("base_model_name_or_path") else f"{CONFIG} names no base: give it with --base"


def base_not_in(known: Collection[str]) -> Question:
    def trips(f: Facts) -> str | None:
        wrong = f.architectures and not set(f.architectures) & set(known)
        return f"the base is {f.architectures[0]}, it converts adapters of {', '.join(known)}" if wrong else None

    return trips


def new_tokens(f: Facts) -> str | None:
    size = f.about("vocab_size")
    found = [token for token, number in f.added.items() if size is not None and type(number) is int and number >= size]
    return f"added_tokens.json brings tokens beyond the vocabulary of {size}: {some(found)}" if found else None


# The tensors


def nothing(f: Facts) -> str | None:
    if f.factors or not {WEIGHTS, PICKLED} & f.files:
        return None
    return "no tensor has the key of a factor (base_model.model.<path>.lora_A.weight, lora_B.weight)"


def keys_beside(allowed: str, effect: str) -> Question:
    """Keys that are no factors and not of the form `allowed`; effect: what becomes of them."""

    def trips(f: Facts) -> str | None:
        more = [key for key in f.others if not re.fullmatch(allowed, key)]
        return f"{effect}: {kinds(more)}" if more else None

    return trips


def half_pairs(f: Facts) -> str | None:
    half = [path for path, ends in f.factors.items() if len(ends) % 2]
    return f"one factor of two is missing at {kinds(half)}" if half else None


def nonfinite(f: Facts) -> str | None:
    return f"NaN or infinite values, for which it does not look: {kinds(f.nonfinite)}" if f.nonfinite else None


def _embeddings(f: Facts) -> list[str]:
    return [path for path, ends in f.factors.items() if any(end.startswith("lora_embedding") for end in ends)]


def embedding_not_read(f: Facts) -> str | None:
    found = _embeddings(f)
    return f"LoRA on embeddings is left out: {kinds(found)}" if found else None


def embedding_untargeted(f: Facts) -> str | None:
    targets = f.config.get("target_modules") or ()
    names = set() if isinstance(targets, str) else {leaf(name) for name in targets}
    found = [path for path in _embeddings(f) if leaf(path) not in names]
    return f"target_modules does not name {kinds(found)}, which is left out" if found else None


def other_vocabulary(f: Facts) -> str | None:
    size = f.about("vocab_size")
    wide = {ends["lora_embedding_A"][1] for ends in f.factors.values() if "lora_embedding_A" in ends} - {size}
    return f"LoRA on an embedding of {min(wide)} tokens, the base has {size}" if size is not None and wide else None


def tied_head(f: Facts) -> str | None:
    tied = bool(f.about("tie_word_embeddings")) and "lm_head" in map(leaf, f.factors)
    return "LoRA on lm_head, which this base ties to its embeddings" if tied else None


def wrong_names(extra: Collection[str]) -> Question:
    """Last names that no linear layer of the base has."""

    def trips(f: Facts) -> str | None:
        known = {*map(leaf, f.linear or ()), *extra}
        wrong = {leaf(path) for path in f.factors if path not in f.stacks} - known
        return f"the base has no linear layer called {some(wrong)}" if f.linear is not None and wrong else None

    return trips


def wrong_places(extra: Collection[str]) -> Question:
    """Paths that the base does not have: nothing happens there, and nobody says so."""

    def trips(f: Facts) -> str | None:
        there = f.factors if f.linear is None else {*f.linear, *f.stacks}
        wrong = [path for path in f.factors if path not in there and leaf(path) not in extra]
        return (
            f"the base has no linear layer at {kinds(wrong)}: nothing happens there, without a word" if wrong else None
        )

    return trips


def names_beside(known: Collection[str]) -> Question:
    def trips(f: Facts) -> str | None:
        wrong = {leaf(path) for path in f.factors} - set(known)
        return f"it has no name for {some(wrong)}, only for {', '.join(sorted(known))}" if wrong else None

    return trips


def other_shapes(f: Facts) -> str | None:
    found = set()
    for path, ends in f.factors.items():
        there, a, b = (f.linear or {}).get(path), ends.get("lora_A.weight"), ends.get("lora_B.weight")
        if there is not None and a and b and (b[0], a[-1]) != there:
            found.add(f"{folded(path)} is {b[0]}×{a[-1]}, in the base {there[0]}×{there[1]}")
    return f"other shapes than the base's: {some(found, 2)}" if found else None


def flat_factors(f: Facts) -> str | None:
    """A with more rows than columns, or B with fewer: taken for the transpose."""
    pairs = {path: (ends.get("lora_A.weight"), ends.get("lora_B.weight")) for path, ends in f.factors.items()}
    wrong = [path for path, (a, b) in pairs.items() if a and b and (a[0] > a[1] or b[0] < b[1])]
    return f"the rank is above a side of {kinds(wrong)}, whose factors it takes for transposed ones" if wrong else None


def experts_uneven(f: Facts) -> str | None:
    """Of experts with keys of their own: all must be there, of one rank in each projection."""
    found: dict[tuple[str, str], dict[int, int]] = {}
    for path, rank in f.ranks.items():
        if hit := re.fullmatch(r"(.+\.experts)\.(\d+)\.(.+)", path):
            found.setdefault((hit[1], hit[3]), {})[int(hit[2])] = rank
    told = [f.about(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")]
    count = next((n for n in told if n), max((max(ranks) + 1 for ranks in found.values()), default=0))
    wrong = [at for at, ranks in found.items() if len(ranks) < count or len(set(ranks.values())) > 1]
    return (
        f"experts are missing, or have unlike ranks: {kinds(f'{at}.*.{name}' for at, name in wrong)}" if wrong else None
    )


def experts_fused(f: Facts) -> str | None:
    return f"factors of a stack of experts ({kinds(f.stacks)}): load it with is_3d_lora_weight" if f.stacks else None
