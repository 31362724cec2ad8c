"""Where an image stands in text: a token of the tokenizer, a row of the embeddings, and what the chat template writes for it."""

from typing import Any

IMAGE = "<image>"
ROWS = 64
"""New rows come in these numbers: products with a table of another size are slower on a GPU."""

BLOCKS = (
    "{%- set found = namespace(all=[]) -%}{%- for message in messages -%}"
    "{%- if message.content is defined and message.content is sequence and message.content is not string"
    " and message.content is not mapping -%}"
    "{%- set text = namespace(all='') -%}{%- for block in message.content -%}"
    "{%- set text.all = text.all + (block if block is string else '" + IMAGE + "' if block.type == 'image' else block.text)"
    " -%}{%- endfor -%}"
    "{%- set found.all = found.all + [dict(message, content=text.all)] -%}"
    "{%- else -%}{%- set found.all = found.all + [message] -%}{%- endif -%}"
    "{%- endfor -%}{%- set messages = found.all -%}{{- '' }}"
)  # fmt: skip
"""In front of a template: content in blocks becomes text, other messages are left as they are, and nothing is written. It ends
with an expression because the line break after a tag would be taken from the template that follows."""


def with_blocks(template: str | None) -> str | None:
    """A chat template that takes content in blocks, images among them; for text it renders what `template` does."""
    return None if template is None else BLOCKS + template


def add_image_token(tokenizer: Any) -> int:
    """The id of the image token, which is added where the tokenizer has none."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE))


def rows_for(token: int, rows: int) -> int:
    """Rows of an embedding table that has one for `token`: as many as it had where that is enough."""
    return rows if token < rows else -(-(token + 1) // ROWS) * ROWS
