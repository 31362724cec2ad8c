"""Which class of transformers a base is, by its configuration.

    a causal language model        AutoModelForCausalLM
    one that reads images          AutoModelForImageTextToText, where the configuration is one of an image-text model;
                                   not where it names (architectures) the text-only class of the same family

Classes that are registered with these (`AutoModelForImageTextToText.register`) count as transformers' own.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Loader:
    """What loads a base, where nothing else is said."""

    auto: Any
    """The Auto class."""
    model: Any | None
    """The class that it will be; None where transformers has none for the configuration."""
    images: bool
    """Does it read images, so that a processor goes with it?"""


def loader(config: Any, transformers: Any) -> Loader:
    """What loads the base of this configuration."""
    text = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    seeing = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    blind = text is not None and text is not seeing and text.__name__ in (config.architectures or ())
    if seeing is None or blind:
        return Loader(transformers.AutoModelForCausalLM, text, False)
    return Loader(transformers.AutoModelForImageTextToText, seeing, True)


def class_for(config: Any, transformers: Any, layer: str | None = None) -> Any | None:
    """The class whose `from_pretrained` loads the base: what `loader` says, or the class that the configuration names,
    whichever is called `layer`; else the named one, unless that is a bare body without a head. None where there is none."""
    usual, body = loader(config, transformers), transformers.MODEL_MAPPING.get(type(config), None)
    called = (getattr(config, "architectures", None) or [""])[0]
    named = getattr(transformers, called, None) if called else None
    wanted = usual.model is not None and usual.model.__name__ == layer
    if usual.model is not None and (wanted or named is None or (named is body and called != layer)):
        return usual.auto
    return named
