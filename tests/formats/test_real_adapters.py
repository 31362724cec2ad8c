"""Adapters made by strangers: seven real ones to PEFT's logits, and 103 real configs parsed or refused by name."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import deltaw
from deltaw.core.errors import ConfigError, FileError
from deltaw.formats import directory
from deltaw.formats.peft_config import method_of

IDS = torch.randint(1, 998, (2, 12), generator=torch.Generator().manual_seed(0))


# The adapters touch attention and heads only: vocabularies and feed-forward layers may be small, which saves a minute.


def distilbert(labels: int) -> torch.nn.Module:
    config = transformers.DistilBertConfig(num_labels=labels, vocab_size=1000, hidden_dim=64)
    return transformers.DistilBertForSequenceClassification(config)


def gpt2(**changes: int) -> transformers.GPT2Config:
    return transformers.GPT2Config(vocab_size=1000, n_inner=64, bos_token_id=0, eos_token_id=0, **changes)


def gpt2_classifier() -> torch.nn.Module:
    return transformers.GPT2ForSequenceClassification(gpt2(num_labels=6, pad_token_id=999))


def bert() -> torch.nn.Module:
    config = transformers.BertConfig(num_labels=2, vocab_size=1000, intermediate_size=64)
    return transformers.BertForSequenceClassification(config)


REAL = {
    "Tashu014__lora-imdb-distilbert": lambda: distilbert(2),
    "dayanidhi04__emotion-classification-distilbert-lora": lambda: distilbert(6),
    "anirudh-ak__peft-gpt2/model/lora_model": gpt2_classifier,
    "stathopoan__Apply-Lightweight-Fine-Tuning-to-a-Foundation-LLM-Model/lora_model": gpt2_classifier,
    "yoonyerin__be-great": lambda: transformers.GPT2LMHeadModel(gpt2()),
    "niket-sharma__LLMs-from-groundup/lora_adapters": lambda: transformers.GPT2LMHeadModel(gpt2(n_layer=6)),
    "Hareshjethani__BERT-GPT2-Multitask-Finetuning": bert,
}


@pytest.mark.shared
@pytest.mark.parametrize("folder", REAL)
def test_real_adapter_gives_pefts_logits(folder: str, shared: Path) -> None:
    from peft import PeftModel

    path = shared / "adapters" / folder
    torch.manual_seed(0)
    model = REAL[folder]().eval()
    with torch.no_grad():
        base = model(input_ids=IDS).logits
        pickled = not (path / "adapter_model.safetensors").exists()
        if pickled:
            with pytest.raises(FileError, match="allow_pickle"):
                deltaw.load(model, path, allow_base_mismatch=True)
        report = deltaw.load(model, path, allow_base_mismatch=True, allow_pickle=pickled)
        assert report.base == "unknown" and "does not say which base" in str(report)
        ours = model(input_ids=IDS).logits
        deltaw.detach(model)
        assert torch.equal(model(input_ids=IDS).logits, base)
        theirs = PeftModel.from_pretrained(model, str(path)).eval()(input_ids=IDS).logits
    assert float((ours - base).abs().max()) > 1e-3
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.shared
def test_dead_names_of_a_real_adapter_are_reported(shared: Path) -> None:
    state, notes = directory.read(shared / "adapters/Tashu014__lora-imdb-distilbert")
    assert notes == ["modules_to_save names 'score', for which the file holds no tensor"]
    assert "pre_classifier" in {
        site.path for site in state.methods
    }  # a tensor the config does not name lands all the same


@pytest.mark.shared
def test_every_config_of_the_corpus_parses_or_is_refused_by_name(shared: Path) -> None:
    files = sorted((shared / "adapters/peft_method_comparison_configs").rglob("adapter_config.json"))
    assert len(files) == 103
    parsed, refused = [], {}
    for file in files:
        config = json.loads(file.read_text())
        try:
            parsed.append((file.parent.name, method_of(config)))
        except ConfigError as error:
            refused[file.parent.name] = str(error)
            special = [key for key in ("use_bdlora", "kasa_config") if config.get(key)]
            special += ["mica"] if config.get("init_lora_weights") == "mica" else []
            assert config["peft_type"] != "LORA" or special
            assert config["peft_type"] in str(error) or all(word.lower() in str(error).lower() for word in special)
    names = {type(method).__name__ for _, method in parsed}
    assert names == {"LoRA", "DoRA", "AdaLoRA", "LoHa", "LoKr", "OFT", "BOFT", "IA3", "VeRA", "LlamaAdapter"}
    assert len(parsed) == 29
    assert any(getattr(method, "rslora", False) for _, method in parsed)
