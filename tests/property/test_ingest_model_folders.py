"""Random model folders are read as transformers reads them: output layer, files of weights, bos and roles."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fuseline.ingest.agreement import disagreements
from fuseline.ingest.model_config import ModelConfig
from fuseline.ingest.models import ModelFolder
from fuseline.store.errors import DataError
from fuseline.store.roles import CLASS_DEFAULTS, CLASS_OF_MODEL_TYPE, ROLES
from fuseline.store.tied import HEADS
from fuseline.store.tokenizer import Tokenizer
from fuseline.store.transformers_folder import for_transformers
from fuseline.store.weights import EMBEDDINGS
from fuseline.train.config import TrainingConfig
from fuseline.train.cost import count_parameters
from fuseline.train.families import read_architecture
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

VOCAB = 600  # of the byte-level tokenizer
SHAPE = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "gemma": GemmaConfig(**SHAPE, head_dim=8),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=8),
    "gpt-neox": GPTNeoXConfig(**SHAPE),
    "mpt": MptConfig(vocab_size=VOCAB, d_model=16, n_heads=2, n_layers=2),
}
TRAINING = TrainingConfig(sequence_length=64, global_batch_size=2)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
slow = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def sources(tmp_path_factory, byte_level_folder) -> dict[str, Path]:
    """A model of each family with an output layer of its own, in the files that transformers writes."""
    folder = tmp_path_factory.mktemp("families")
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        config.tie_word_embeddings = False
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(byte_level_folder / file, folder / name / file)
    return {name: folder / name for name in FAMILIES}


@pytest.fixture
def fresh(tmp_path):
    """Copies of a folder, one after another in the same place."""

    def copy(source: Path) -> Path:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        return Path(shutil.copytree(source, tmp_path / "model"))

    return copy


def opened(folder: Path) -> list[str]:
    """What is said of a folder that is opened."""
    model = ModelFolder(ModelConfig(name="m", model="m"), folder).check()
    shutil.rmtree(folder.parent / "verdicts", ignore_errors=True)
    return [*model.remarks, *disagreements(model, cache=folder.parent / "verdicts")]


def load(folder: Path):
    """The model and the tensors that transformers filled with random numbers."""
    with for_transformers(folder) as readable:
        return load_unchecked(readable)


def load_unchecked(folder: Path):
    """As transformers loads a folder by itself."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True)
    return model, info["missing_keys"]


@slow
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    says=st.sampled_from([True, False, None]),
    stored=st.sampled_from(["both, different", "both, equal", "both, equal in another dtype", "embeddings", "head"]),
    prefix=st.booleans(),
    mark=st.booleans(),
)
@example(family="llama", says=True, stored="both, different", prefix=True, mark=False)
@example(family="gemma", says=None, stored="both, different", prefix=True, mark=True)
@example(family="gemma3", says=True, stored="head", prefix=False, mark=False)
@example(family="mpt", says=None, stored="embeddings", prefix=True, mark=False)
@example(family="gpt-neox", says=None, stored="embeddings", prefix=True, mark=False)
def test_the_output_layer_is_what_transformers_takes_for_it(sources, fresh, family, says, stored, prefix, mark):
    folder = fresh(sources[family])
    tensors = load_file(folder / WEIGHTS)
    head, embeddings = (next(name for name in tensors if name.endswith(ends)) for ends in (HEADS, EMBEDDINGS))
    if "equal" in stored:
        tensors[head] = tensors[embeddings].to(torch.float64 if "dtype" in stored else torch.float32).clone()
    for name in {"embeddings": [head], "head": [embeddings]}.get(stored, []):
        del tensors[name]
    if not prefix:
        tensors = {name if name == head else name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": says}
    if says is None:
        del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8-sig" if mark else "utf-8")
    model, missing = load(folder)
    if missing:
        with pytest.raises(DataError, match=r"lacks weights: .*"):
            opened(folder)
        return
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert any("tie_word_embeddings" in remark for remark in opened(folder)) == (not is_tied and bool(model.config.tie_word_embeddings))
    architecture = read_architecture(folder, training=TRAINING)
    assert architecture.tied_embeddings == is_tied
    assert count_parameters(folder, architecture=architecture) == model.num_parameters()


@slow
@given(
    n_files=st.integers(1, 3),
    has_index=st.booleans(),
    lacks=st.sampled_from([None, None, "a file", "a tensor", "a tensor of the index"]),
    single=st.booleans(),
    extra=st.sampled_from([None, "consolidated.safetensors", "pytorch_model.bin"]),
)
@example(n_files=2, has_index=False, lacks=None, single=False, extra=None)
@example(n_files=2, has_index=True, lacks="a file", single=False, extra=None)
@example(n_files=2, has_index=True, lacks="a tensor", single=False, extra=None)
@example(n_files=1, has_index=True, lacks=None, single=True, extra="consolidated.safetensors")
def test_the_weights_are_in_the_files_that_transformers_reads(sources, fresh, n_files, has_index, lacks, single, extra):
    folder = fresh(sources["llama"])
    tensors = load_file(folder / WEIGHTS)
    if not single:
        (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {f"model-{1 + i:05d}-of-{n_files:05d}.safetensors": names[i::n_files] for i in range(n_files)}
    index = {name: file for file, held in files.items() for name in held}
    for file, held in files.items():
        held = held[1:] if lacks == "a tensor" and file.startswith("model-00001") else held
        save_file({name: tensors[name] + 1 for name in held}, folder / file, metadata={"format": "pt"})
    if lacks == "a file":
        (folder / max(files)).unlink()
    if lacks == "a tensor of the index":
        del index[names[3]]
    if has_index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if extra is not None:
        save_file(tensors, folder / extra, metadata={"format": "pt"})
    try:
        model, missing = load_unchecked(folder)
    except (OSError, RuntimeError, KeyError):
        model, missing = None, {"all"}
    if missing:
        with pytest.raises(
            DataError, match=r"(lacks weights|has shards of a model but no|has no model\.safetensors|has no \*\.safetensors)"
        ):
            opened(folder)
        return
    opened(folder)
    read = ModelFolder(ModelConfig(name="m", model="m"), folder)
    norm = load_file(next(path for path in read.weight_files if "model.norm.weight" in load_file(path)))["model.norm.weight"]
    assert torch.equal(model.model.norm.weight, norm)
    assert read.n_parameters == model.num_parameters()


# Control tokens of the tokenizers, ids 0 to 2.
TOKENS = {"tiny-source": ["<unk>", "<s>", "</s>"], "tiny-target": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}
MODEL_TYPES = ["llama", *sorted(CLASS_OF_MODEL_TYPE)]
SENTENCEPIECE = {
    "CodeLlamaTokenizer",
    "GemmaTokenizer",
}  # of byte-level tokens transformers builds no tokenizer of these classes that works
OVERRIDING = {"qwen2"}  # whatever class is named, transformers takes its own, whose defaults may add roles
CLASSES = [None, "PreTrainedTokenizerFast", "LlamaTokenizerFast", "TokenizersBackend", *sorted(CLASS_DEFAULTS)]


def template(before: list, after: list) -> dict:
    tokens = {token: {"id": token, "ids": [token_id], "tokens": [token]} for token, token_id in before + after}
    single = [*before, ("$", None), *after]
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}} if token == "$" else {"SpecialToken": {"id": token, "type_id": 0}} for token, _ in single
    ]
    return {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": tokens,
    }


def test_the_classes_of_model_types_are_those_of_transformers():
    classes = {kind: name.removesuffix("Fast") for kind, name in TOKENIZER_MAPPING_NAMES.items() if isinstance(name, str)}
    known = {kind: name for kind, name in classes.items() if name in CLASS_DEFAULTS and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert known == CLASS_OF_MODEL_TYPE


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bos_and_roles_are_those_of_autotokenizer(models_dir, fresh, data):
    draw = data.draw
    model = draw(st.sampled_from(sorted(TOKENS)))
    unknown, first, second = TOKENS[model]
    folder = fresh(models_dir / model)
    (folder / "tokenizer_config.json").unlink()
    model_type = draw(st.sampled_from(MODEL_TYPES))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    definition = json.loads((folder / "tokenizer.json").read_text())
    before = draw(st.sampled_from([[], [(first, 1)], [(second, 2)]]))
    after = draw(st.sampled_from([[], [(second, 2)]]))
    if draw(st.booleans()):
        definition["post_processor"] = template(before, after)
    elif model == "tiny-source":
        definition["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    mark = draw(st.sampled_from(["utf-8", "utf-8-sig"]))
    roles = st.dictionaries(
        st.sampled_from([f"{role}_token" for role in ROLES]),
        st.sampled_from([None, first, second, unknown, {"__type": "AddedToken", "content": first, "special": True}]),
    )
    name, add_bos_token = None, "absent"
    if draw(st.booleans()):
        config = draw(roles)
        name = None if model_type in OVERRIDING else draw(st.sampled_from(CLASSES))
        config |= {"tokenizer_class": name} if name else {}
        add_bos_token = draw(st.sampled_from(["absent", True, False, None]))
        config |= {} if add_bos_token == "absent" else {"add_bos_token": add_bos_token}
        if draw(st.booleans()):
            config["added_tokens_decoder"] = {
                str(token_id): {
                    "content": token,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "single_word": False,
                    "special": True,
                }
                for token_id, token in enumerate(TOKENS[model])
            }
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding=mark)
    if draw(st.booleans()):
        named = {
            key: value if not isinstance(value, dict) else {"content": value["content"], "lstrip": False}
            for key, value in draw(roles).items()
        }
        (folder / "special_tokens_map.json").write_text(json.dumps(named), encoding=mark)
    assume(model == "tiny-source" or (name or CLASS_OF_MODEL_TYPE.get(model_type)) not in SENTENCEPIECE)
    with for_transformers(folder) as readable:
        theirs = AutoTokenizer.from_pretrained(readable)
    whole, alone = theirs("hello").input_ids, theirs("hello", add_special_tokens=False).input_ids
    asks = model == "tiny-target" and (name or "").startswith("LlamaTokenizer") and add_bos_token is True
    if asks:  # read as in transformers 4, and reported
        return
    ours = Tokenizer.from_model_folder(folder)
    leading = next(whole[:start] for start in range(len(whole)) if whole[start : start + len(alone)] == alone)
    assert ([ours.roles["bos"]] if ours.prepends_bos else []) == leading
    for role in ROLES:
        token_id = getattr(theirs, f"{role}_token_id")
        if token_id is None or token_id < ours.vocab_size:  # else transformers adds the token
            assert ours.roles[role] == token_id or (role == "bos" and [ours.roles[role]] == leading), role


def test_a_byte_level_llama_tokenizer_that_asks_for_bos_gets_it_and_the_difference_is_reported(byte_level_folder, models_dir, tmp_path):
    """As DeepSeek's: transformers 5 forgets its bos."""
    folder = Path(shutil.copytree(models_dir / "tiny-target", tmp_path / "model"))
    config = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (said,) = opened(folder)
    assert "its texts start with [1], but those of AutoTokenizer of transformers with no token" in said
    assert "set prepends_bos = false for this model in the recipe" in said
    told = ModelFolder(ModelConfig(name="m", model="m", prepends_bos=False), folder)
    assert list(disagreements(told, cache=tmp_path / "told")) == []
