"""README.md of an adapter: what it changes, on which base, who can read it, and the lines that load it."""

import re

from deltaw.core.state import AdapterState


def card(state: AdapterState, layout: str) -> str:
    """A short model card with the header that model hubs read."""
    methods = ", ".join(sorted({method.name for method in state.methods.values()}))
    base = f"`{state.base.name}` ({state.base.layer})" if state.base else "not recorded"
    reads = "PEFT and everything that reads its format, and deltaw" if layout == "peft" else "deltaw"
    held = state.base.quantized if state.base and state.base.quantized else "as it was when training began"
    warning = (
        f"\n**It belongs to the quantised base ({held}) and to no other:** it makes up for what quantising rounded off "
        "(`init: loftq`). On the original weights, or quantised otherwise, its answers are wrong. `deltaw merge --into "
        "dequantized` writes both as one plain model.\n"
        if any(method.corrects for method in state.methods.values())
        else ""
    )
    named = state.base is not None and re.fullmatch(r"[\w.\-]+/[\w.\-]+", state.base.name)
    header = [f"library_name: {'peft' if layout == 'peft' else 'deltaw'}", f"tags: [{methods}, deltaw]"]
    header += [f"base_model: {state.base.name}"] if named and state.base else []
    return (
        "---\n" + "\n".join(header) + "\n---\n\n# Adapter\n\n"
        f"| | |\n|---|---|\n| base | {base} |\n| methods | {methods} |\n| modules | {len(state.methods)} |\n"
        f"| parameters | {state.parameters:,} |\n| read by | {reads} |\n{warning}\n"
        "It holds the trained change only, not the base. With the base loaded as `model`:\n\n"
        '```python\nimport deltaw\n\ndeltaw.load(model, "path/of/this/folder")\n```\n'
    )
