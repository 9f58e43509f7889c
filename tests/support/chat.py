"""Published chat templates, with small tokenizers of several families that have their control tokens."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from support.tiny import train_byte_level, train_composing, train_sentencepiece, train_unigram

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
TEXTS = [
    "The model reads a question and answers it. Then it is asked again, and answers again, until nobody asks.\n\nSome answers are long.",
    "It's 12 o'clock: a dog, two cats and 3 birds – naïve ones – are in the garden.\n\tWhat do they do there? user assistant model system",
    "日本語のテキストと русский текст, with <brackets> [and] others | like </these>.",
] * 20


@dataclass(frozen=True)
class Published:
    """A template and, independently of our code, what it makes the assistant write."""

    name: str
    special: tuple[str, ...]  # its control tokens
    added: tuple[str, ...] = ()  # those that published tokenizers have as added tokens that are not special
    bos: str | None = None
    eos: str | None = None
    before: str = ""  # what the assistant writes before its text
    after: str = ""  # and after it, before the end of its turn
    end_of_turn: str = ""
    strips: bool = False  # texts lose the white space around them
    takes_system: bool = True
    right_strips: bool = False  # the control tokens take the white space after them

    @property
    def source(self) -> str:
        return (TEMPLATES / f"{self.name}.jinja").read_text()

    def written(self, text: str) -> str:
        """What the assistant writes, but for the end-of-turn token."""
        return f"{self.before}{text.strip() if self.strips else text}{self.after}"


PUBLISHED = [
    Published("smollm2", ("<|im_start|>", "<|im_end|>"), bos="<|im_start|>", eos="<|im_end|>", end_of_turn="<|im_end|>"),
    Published("qwen2.5", ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), eos="<|im_end|>", end_of_turn="<|im_end|>"),
    Published(
        "llama-3.1", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        bos="<|begin_of_text|>", eos="<|end_of_text|>", end_of_turn="<|eot_id|>", strips=True,
    ),
    Published(
        "gemma-2", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>", end_of_turn="<end_of_turn>",
        strips=True, takes_system=False,
    ),
    Published(
        "phi-3.5", ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), eos="<|endoftext|>",
        end_of_turn="<|end|>", right_strips=True,
    ),
    Published(
        "mistral-nemo", ("<s>", "</s>", "[INST]", "[/INST]"), bos="<s>", eos="</s>", end_of_turn="</s>", takes_system=False,
    ),
    Published(
        "llama-2", ("<s>", "</s>"), bos="<s>", eos="</s>", before=" ", after=" ", end_of_turn="</s>", strips=True, takes_system=False,
    ),
    Published(
        "deepseek-r1-distill", ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), added=("<｜User｜>", "<｜Assistant｜>"),
        bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", end_of_turn="<｜end▁of▁sentence｜>",
    ),
]  # fmt: skip
FAMILIES = {
    "byte-level": train_byte_level, "composing": train_composing, "sentencepiece": train_sentencepiece, "metaspace": train_sentencepiece,
    "unigram": train_unigram,
}  # fmt: skip


@cache
def _trained(family: str, folder: Path) -> str:
    definition = json.loads((FAMILIES[family](folder / family, texts=TEXTS) / "tokenizer.json").read_text())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] == "<unk>"]
    definition["post_processor"] = None
    if family == "unigram":  # where control tokens are pieces, text that spells them cannot be read, which is reported
        definition["model"]["vocab"][1:3] = [["\ue000", 0.0], ["\ue001", 0.0]]
    if family == "metaspace":  # as Mistral's later ones: a space is put before the text's start alone
        definition["normalizer"] = None
        definition["pre_tokenizer"] = json.loads(pre_tokenizers.Metaspace(prepend_scheme="first", split=False).__getstate__())
    return json.dumps(definition)


def save_tokenizer(folder: Path, *, published: Published, family: str, trained: Path) -> Path:
    """Save a tokenizer of a family with the control tokens of a template, and the template; `trained` holds what was trained already."""
    tokenizer = Tokenizer.from_str(_trained(family, trained))
    tokenizer.add_special_tokens([AddedToken(token, special=True, rstrip=published.right_strips) for token in published.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in published.added])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": published.bos, "eos_token": published.eos, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    (folder / "chat_template.jinja").write_text(published.source)
    return folder
