"""A model folder of a kind that cannot be used is refused when it is opened: one message with the next step, before any part is made."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.workspaces import RECIPE, run, write_project

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = {"base_model_name_or_path": "org/the-base", "peft_type": "LORA", "r": 4}
MERGE = r"AutoPeftModelForCausalLM.from_pretrained("


@pytest.fixture
def models(models_dir, tmp_path) -> Path:
    return Path(shutil.copytree(models_dir, tmp_path / "models"))


@pytest.fixture
def project(tmp_path, corpus_texts) -> Path:
    return write_project(tmp_path / "project", texts=corpus_texts)


def ingest(project: Path, models: Path) -> tuple[int, str]:
    return run("ingest", "corpus", project, "-w", project.parent / "workspace", "--models", models)


def change(folder: Path, edit: Callable[[dict], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, folder / "adapter_model.safetensors")


def adapter_with_config(folder: Path) -> None:
    adapter_beside(folder)
    (folder / WEIGHTS).unlink()


def adapter_alone(folder: Path) -> None:
    adapter_with_config(folder)
    (folder / "config.json").unlink()


def adapter_of_pickles(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.bin")


def shards_without_index(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / "model-00002-of-00003.safetensors", metadata={"format": "pt"})


def other_name(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "weights.safetensors")


def pickles(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def index_of_a_missing_tensor(folder: Path) -> None:
    names = [*load_file(folder / WEIGHTS), "model.layers.0.mlp.down_proj.weight"]
    change(folder, lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.weight"))
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))


def no_head(folder: Path) -> None:
    configure(folder, tie_word_embeddings=False)


def other_width(folder: Path) -> None:
    configure(folder, intermediate_size=48)


def pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (
            adapter_beside,
            ["adapter (adapter_config.json) of the base model org/the-base", MERGE, "move adapter_config.json and adapter_model"],
        ),
        (adapter_with_config, ["holds an adapter (adapter_config.json) of the base model org/the-base", MERGE]),
        (adapter_alone, ["holds an adapter (adapter_config.json) of the base model org/the-base", MERGE]),
        (adapter_of_pickles, ["holds an adapter (adapter_model.bin)", MERGE]),
        (
            lambda folder: configure(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
            ["quant_method = 'gptq'", "dequantize()"],
        ),
        (lambda folder: configure(folder, quantization_config={"load_in_4bit": True}), ["quantized", "remove quantization_config"]),
        (
            shards_without_index,
            [f"no {INDEX}. Download {INDEX}, model-00001-of-00003.safetensors, model-00003-of-00003.safetensors into it"],
        ),
        (other_name, [f"only weights.safetensors. If that is the model in the Hugging Face format, rename it to {WEIGHTS}"]),
        (pickles, ["no *.safetensors file", "convert them first"]),
        (index_of_a_missing_tensor, ["lacks weights: model.layers.0.mlp.down_proj.weight. Download them again"]),
        (no_head, ["lacks weights: lm_head.weight", "set tie_word_embeddings = true in config.json"]),
        (
            other_width,
            ["the shape of model.layers.0.mlp.down_proj.weight in the weights [32, 64] must equal", "[32, 48]", "Correct config.json"],
        ),
        (pointer, ["is a git-lfs pointer", "git lfs pull"]),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_when_it_is_opened(project, models, damage, messages):
    damage(models / "tiny-source")
    code, output = ingest(project, models)
    assert code == 1
    for message in messages:
        assert message in output
    assert "tiny-source" in output
    assert not (project.parent / "workspace" / "corpus").exists()


def test_tensors_that_a_target_does_not_have_are_refused_before_anything_is_made(project, models):
    change(models / "tiny-target", lambda tensors: tensors.update({"vision.weight": torch.zeros(2)}))
    code, output = run("run", project, "-w", project.parent / "workspace", "--models", models)
    assert code == 1
    assert "has 1 tensors that its config.json does not describe; training would drop them: vision.weight. Use it as a source" in output
    code, output = ingest(project, models)
    assert code == 0  # as a source it can be used
    assert "Warning: model target: 1 tensors in its weights are not used" in output


def test_what_is_odd_about_a_folder_is_reported_each_time_and_found_once(project, models):
    change(models / "tiny-source", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 0.1}))
    config = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"}
    (models / "tiny-target" / "tokenizer_config.json").write_text(json.dumps(config))
    for _ in range(2):
        code, output = ingest(project, models)
        assert code == 0
        assert "Warning: model source: config.json says tie_word_embeddings = true, but the stored output layer differs" in output
        assert "Warning: model target: its texts start with [1], but those of AutoTokenizer of transformers with no token" in output
        assert "set prepends_bos = false for this model in the recipe" in output
    assert len(list((project.parent / "workspace" / "models").glob("*.json"))) == 2


def test_a_revision_of_a_local_folder(project, models):
    project.write_text(RECIPE.replace('model = "tiny-source"', f'model = "{models / "tiny-source"}"\nrevision = "main"'))
    code, output = ingest(project, models)
    assert code == 2
    assert "Remove revision from the recipe" in output
    project.write_text(RECIPE.replace('model = "tiny-source"', 'model = "org/tiny-source"\nrevision = "main"'))
    code, output = ingest(project, models)
    assert code == 0
    assert "Warning: model source: " in output
    assert "does not know whether it is revision 'main'" in output


def test_models_of_two_owners_that_are_one_folder(project, models):
    project.write_text(RECIPE.replace('"tiny-target"', '"one/tiny-source"').replace('"tiny-source"', '"two/tiny-source"'))
    code, output = ingest(project, models)
    assert code == 1
    assert "The models target (one/tiny-source) and source (two/tiny-source) are different, but" in output


def test_byte_order_marks_in_a_model_folder_change_nothing(project, models, corpus_texts):
    code, output = ingest(project, models)
    assert code == 0, output
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        path = models / "tiny-source" / name
        path.write_text(path.read_text(), encoding="utf-8-sig")
    code, output = run("ingest", "distributions", project, "-w", project.parent / "workspace", "--models", models)
    assert code == 0, output
    assert "distributions source: 100%" in output


def test_what_was_made_with_another_reading_of_the_tokenizer_is_refused_with_both(project, models):
    """As earlier versions, which did not know a bos that tokenizer.json alone names."""
    text = project.read_text()
    project.write_text(text.replace('model = "tiny-source"', 'model = "tiny-source"\nprepends_bos = false'))
    arguments = (project, "-w", project.parent / "workspace", "--models", models)
    assert run("ingest", "corpus", *arguments)[0] == 0
    assert run("ingest", "distributions", *arguments)[0] == 0
    project.write_text(text)
    code, output = run("ingest", "distributions", *arguments)
    assert code == 1
    assert "distributions/source was made from different inputs" in output
    assert "Earlier, fuseline read the tokenizer as (bos 1, eos 2, pad None, unk 0, no bos). Now it reads it as (bos 1, " in output
    assert "To keep the earlier reading, set prepends_bos = false for the model in the recipe; or use another --workspace." in output


def test_what_was_made_when_fewer_roles_were_read_is_kept(project, models):
    """As earlier versions, which read neither special_tokens_map.json nor the defaults of the tokenizer's class."""
    path, arguments = models / "tiny-source" / "tokenizer_config.json", (project, "-w", project.parent / "workspace", "--models", models)
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pad_token": None, "unk_token": None}))
    assert run("ingest", "corpus", *arguments)[0] == 0
    assert run("ingest", "distributions", *arguments)[0] == 0
    folder = project.parent / "workspace" / "distributions" / "source"
    before = {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}
    path.write_text(json.dumps(config | {"pad_token": "</s>", "unk_token": "<unk>"}))
    code, output = run("ingest", "distributions", *arguments)
    assert code == 0, output
    assert {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()} == before
    path.write_text(json.dumps(config | {"unk_token": None, "eos_token": "<unk>"}))  # another eos is another reading
    code, output = run("ingest", "distributions", *arguments)
    assert code == 1
    assert "Now it reads it as (bos 1, eos 0, pad None, unk None, " in output
    assert "). Use another --workspace." in output
