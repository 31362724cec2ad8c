"""Tiny random-config models of seven families, and inputs for them; shared by the PEFT tests."""

from collections.abc import Callable

import torch
import transformers as t

IDS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GQA = {**SMALL, "num_key_value_heads": 2}


def llama() -> torch.nn.Module:
    return t.LlamaForCausalLM(t.LlamaConfig(**GQA))


def qwen() -> torch.nn.Module:
    return t.Qwen2ForCausalLM(t.Qwen2Config(**GQA))  # biases on q, k, v


def gemma() -> torch.nn.Module:
    return t.GemmaForCausalLM(t.GemmaConfig(**GQA, head_dim=8, tie_word_embeddings=True))


def gpt2() -> torch.nn.Module:
    config = t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return t.GPT2LMHeadModel(config)


def bert() -> torch.nn.Module:
    return t.BertForSequenceClassification(t.BertConfig(**SMALL, num_labels=3))


def t5() -> torch.nn.Module:
    config = t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return t.T5ForConditionalGeneration(config)


def clip() -> torch.nn.Module:
    side = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**side, "vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 63}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config={**side, "image_size": 16, "patch_size": 8}))


FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": llama, "qwen": qwen, "gemma": gemma, "gpt2": gpt2, "bert": bert, "t5": t5, "clip": clip,
}  # fmt: skip


def build(family: str) -> torch.nn.Module:
    """The same weights every time."""
    torch.manual_seed(7)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # random norms, biases and wider weights: nothing may hide in ones and zeros
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@torch.no_grad()
def outputs(family: str, model: torch.nn.Module) -> torch.Tensor:
    if family == "t5":
        return model(input_ids=IDS, decoder_input_ids=IDS).logits
    if family == "clip":
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        result = model(input_ids=IDS, pixel_values=pixels)
        return torch.cat([result.text_embeds.flatten(), result.image_embeds.flatten()])
    return model(input_ids=IDS).logits


def randomise(model: torch.nn.Module) -> None:
    """Move every trainable tensor, so that the adapter has an effect."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
