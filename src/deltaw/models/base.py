"""Loading a base: `tiny` (bundled), a local folder, or a hub id → model and tokenizer, frozen and in eval mode; of a base that
reads images its processor too.

A local path never touches the network. An adapter's folder is not a base: the error says which base it needs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaw.core import plugins
from deltaw.core.errors import FileError, UseError, did_you_mean
from deltaw.core.files import read_json
from deltaw.models import quantize as quantizing
from deltaw.models.classes import loader

TINY = Path(__file__).parent / "tiny"
DEFAULT_LENGTH = 2048  # rows of a base that reads more are not longer unless the user says so
OURS = "deltaw_image_text"
"""The model_type of configurations that are of our own class (`deltaw.models.image_text`)."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Base:
    """A loaded base. `name` is what the user wrote; `max_length` the longest row it was made for."""

    name: str
    model: nn.Module
    tokenizer: Any
    max_length: int
    processor: Any | None = None
    """transformers' processor of a base that reads images, with `tokenizer` in it; None where it reads text only."""


def resolve(name: str) -> str:
    """`tiny` → the bundled folder; an existing folder → itself, checked; anything else is a hub id."""
    if name == "tiny":
        return str(TINY)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return str(folder)
        if (folder / "adapter_config.json").is_file():
            raise UseError(
                f"{name!r} is an adapter, not a base: it holds only its own factors. It was trained on "
                f"{named_base(folder) or 'a base it does not name'!r}; load that, then put the adapter on it with "
                f"deltaw.load or --adapter {name}"
            )
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise FileError(f"{name!r} is not a model folder: no config.json in it (it holds {inside})")
    if (
        folder.is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") > 1
        or ("/" not in name and not named_hub(name))
    ):
        near = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise FileError(
            f"no base {name!r}: not a folder, not a hub id, not 'tiny'{did_you_mean(folder.name, [*near, 'tiny'])}"
        )
    return name


def named_hub(name: str) -> bool:
    """Is a name without an owner (gpt2) one that the hub's cache knows? Others would be misspelt folders."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def named_base(folder: Path) -> str | None:
    """The base that an adapter folder names: in deltaw.json, else in PEFT's config."""
    found = _named(folder, "deltaw.json", ("base", "name"))
    return found or _named(folder, "adapter_config.json", ("base_model_name_or_path",))


def named_class(folder: Path) -> str | None:
    """The class of the model that an adapter folder was trained on, where its files say it."""
    return _named(folder, "deltaw.json", ("base", "layer"))


def named_quantization(folder: Path, base: str) -> str:
    """How to quantise `base` for an adapter folder: as it was trained, unless the base's own files are quantised."""
    found = _named(folder, "deltaw.json", ("base", "quantized"))
    if found not in quantizing.KINDS or quantizing.method_of(read_config(base)) is not None:
        return "none"
    return found


def _named(folder: Path, file: str, keys: tuple[str, ...]) -> str | None:
    """A text in a JSON file of an adapter folder."""
    if not (folder / file).is_file():
        return None
    value: Any = read_json(folder / file, "fetch the adapter's folder again")
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return str(value) if value else None


def base_of_adapter(folder: Path) -> str:
    """The base to load for an adapter folder. FileError where the folder is missing, UseError where it names none."""
    if not folder.is_dir():
        near = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise FileError(f"no adapter folder {str(folder)!r}{did_you_mean(folder.name, near)}")
    name = named_base(folder)
    if name is None and (folder / "adapter").is_dir():
        raise UseError(f"{folder} is a run, its adapter is in a folder of its own: give {folder / 'adapter'}")
    if name is None:
        raise UseError(f"{folder} does not name the base it was trained on: give it with --model")
    return name


def pick_dtype(dtype: str) -> torch.dtype:
    """auto: bf16 on an accelerator that computes in it, else fp32. UseError for a name that is not known."""
    if dtype not in ("auto", *DTYPES):
        raise UseError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPES)}")
    if dtype != "auto":
        return DTYPES[dtype]
    return (
        torch.bfloat16
        if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float32
    )


def pick_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_tokenizer(name: str) -> tuple[Any, int | None]:
    """The tokenizer of a base and the longest row it reads, where it says one; no weight is read."""
    source = resolve(name)
    transformers = require_transformers()
    try:
        config = config_of(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise unreadable(name, error) from error
    if not len(tokenizer):
        raise FileError(
            f"the base {name!r} has no tokenizer in its folder: save one there, with tokenizer.save_pretrained"
        )
    _pad(tokenizer)
    return tokenizer, limit_of(config)


def _pad(tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id  # labels come from spans, so that padding as eos is safe


def load_processor(name: str, tokenizer: Any = None) -> Any | None:
    """transformers' processor of a base that reads images, with `tokenizer` in the place of its own where one is given; None
    for a base that reads text only. The tokenizer gets the processor's template. FileError where the folder of the base has
    no processor, UseError for a missing library."""
    if not loader(read_config(name), require_transformers()).images:
        return None
    try:
        processor = require_transformers().AutoProcessor.from_pretrained(resolve(name))
    except ImportError as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UseError(
            f"the processor of {name!r} cannot be made: {reason}. Install it, with pip install 'deltaw[vision]' for pillow"
        ) from None
    except Exception as error:
        raise _without_processor(name, " ".join(f"{type(error).__name__}: {error}".split())[:200]) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise _without_processor(name, f"what is there is a {type(processor).__name__}")
    if tokenizer is not None:
        processor.tokenizer = tokenizer
    tokenizer_of(processor)
    return processor


def tokenizer_of(processor: Any) -> Any:
    """The processor's tokenizer, with the processor's template and a token to pad with."""
    tokenizer = processor.tokenizer
    tokenizer.chat_template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    _pad(tokenizer)
    return tokenizer


def _without_processor(name: str, reason: str) -> FileError:
    return FileError(
        f"the base {name!r} reads images and has no processor in its folder that can be loaded ({reason}): save one there, "
        "with processor.save_pretrained"
    )


def limit_of(config: Any) -> int | None:
    """The longest row that a base reads, where its configuration says one."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limit = next((found for name in names if (found := getattr(text, name, None))), None)
    return None if limit is None else int(limit)


def load_base(name: str, *, dtype: str = "auto", device: torch.device | None = None, quantize: str = "none") -> Base:
    """Model and tokenizer of a language model, and its processor where it reads images; in `dtype` (auto, fp32, bf16), on
    `device` (best by default).

    quantize: none, nf4, nf4-double or int8 (`deltaw.models.quantize`). Raises FileError when the base is not there or
    cannot be read, UseError when it cannot be quantised so, or when transformers or bitsandbytes is not installed.
    """
    quantizing.known(quantize)
    pick_dtype(dtype)
    tokenizer, limit = load_tokenizer(name)
    processor = load_processor(name, tokenizer)
    model = load_model(name, dtype=dtype, device=device, quantize=quantize)
    return Base(name, model, tokenizer, min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH), processor)


def load_model(name: str, *, dtype: str = "auto", device: torch.device | None = None, quantize: str = "none") -> Any:
    """The model of a base alone, as `load_base` has it."""
    quantizing.known(quantize)
    wanted, source, place = pick_dtype(dtype), resolve(name), device or pick_device()
    transformers, config = require_transformers(), read_config(name)
    options = quantizing.loading(name, quantize, config, wanted, place, transformers, lambda: outline(name))
    try:
        model = loader(config, transformers).auto.from_pretrained(source, dtype=wanted, **options)
    except Exception as error:
        raise unreadable(name, error) from error
    if name == "tiny":
        model.config._name_or_path = "tiny"  # what its adapters name as their base, on every machine
    if not options:
        model.to(place)
    quantizing.settle(model, name, quantize)
    return model.eval().requires_grad_(False)


def read_config(name: str) -> Any:
    """transformers' configuration of a base."""
    source = resolve(name)
    try:
        return config_of(source)
    except Exception as error:  # whatever a foreign folder raises, it is one thing: a base that cannot be loaded
        raise unreadable(name, error) from error


def config_of(source: str) -> Any:
    """transformers' configuration of a folder or hub id; it learns our own kinds of models when it meets one."""
    transformers = require_transformers()
    record, _ = transformers.PreTrainedConfig.get_config_dict(source)
    if record.get("model_type") == OURS:
        know_our_own()
    return transformers.AutoConfig.from_pretrained(source)


def know_our_own() -> None:
    """Make the models of `deltaw.models.image_text` known to transformers' Auto classes: no trust_remote_code is needed."""
    require_transformers()
    plugins.load("deltaw.models.image_text")


def outline(name: str) -> Any:
    """The model of a base without its weights: all modules and shapes, on the meta device; only its configuration is read."""
    config, transformers = read_config(name), require_transformers()
    try:
        with torch.device("meta"):
            return loader(config, transformers).auto.from_config(config)
    except Exception as error:
        raise unreadable(name, error) from error


def unreadable(name: str, error: Exception) -> FileError:
    """What a library's error about a base says: that nothing answers to its name, or what is wrong with its files."""
    if isinstance(error, OSError) and name != "tiny" and not Path(name).expanduser().is_dir():
        return FileError(
            f"no base {name!r}: not a folder, not 'tiny', and no hub id that answers ({said(error)}): check its spelling, "
            "or give its folder"
        )
    of_machine = isinstance(error, ImportError | MemoryError | RuntimeError)  # a package or memory is missing, no file
    fix = "" if of_machine else "; fetch it again, whole, or give another base"
    return FileError(f"the base {name!r} cannot be loaded: {said(error)}{fix}")


def said(error: Exception) -> str:
    """The words of a library's error on one line, for a sentence of ours; the classes of errors are not for users."""
    text = " ".join(str(error).split())[:300].rstrip(". ")
    if isinstance(error, KeyError):
        return f"{text} is missing"
    return text or "its files hold something else"


def require_transformers() -> Any:
    """transformers, or one line that says how to install it."""
    try:
        import transformers
    except ImportError:
        raise UseError("this needs transformers: pip install 'deltaw[train]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
