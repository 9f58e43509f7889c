"""Makes mergekit_reference.safetensors: small models, and what mergekit merges them into.

    python -m venv env && env/bin/pip install mergekit==0.1.5 && env/bin/python tests/data/mergekit_reference.py

The file has the tensors of all models in float32, `inputs/<model>/<tensor>`, and of each case what came out of float32 models,
`f32/<case>/<tensor>`, and of bfloat16 models, `bf16/<case>/<tensor>`. The cases are in its metadata, as mergekit read them.
"""

import json
import tempfile
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
LAYER = {
    "input_layernorm": [16],
    "post_attention_layernorm": [16],
    "self_attn.q_proj": [16, 16],
    "self_attn.k_proj": [8, 16],
    "self_attn.v_proj": [8, 16],
    "self_attn.o_proj": [16, 16],
    "mlp.gate_proj": [24, 16],
    "mlp.up_proj": [24, 16],
    "mlp.down_proj": [16, 24],
}
SHAPES = {
    "model.embed_tokens.weight": [48, 16],
    **{f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()},
    "model.norm.weight": [16],
    "lm_head.weight": [48, 16],
}
MODELS = ("one", "two", "three")
WEIGHTS = dict(zip(MODELS, (0.5, 1.0, 1.75), strict=True))


def models() -> dict[str, dict[str, torch.Tensor]]:
    """A base, models that moved from it, and `near`, which moved little."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: list[int], scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).bfloat16().float()

    base = {name: draw(shape, 0.1) for name, shape in SHAPES.items()}
    found = {"base": base}
    for index, model in enumerate(MODELS):
        found[model] = {}
        for name, tensor in base.items():
            change = draw(SHAPES[name], 0.02 * (1 + index))
            stays = torch.rand(tensor.shape, generator=generator) < 0.2
            found[model][name] = torch.where(stays, tensor, tensor + change).bfloat16().float()
    for model in MODELS[:2]:
        found[f"near-{model}"] = {name: base[name] + (found[model][name] - base[name]) * 2.0**-8 for name in base}
    return found


def case(method: str, *, names=MODELS, base="base", parameters=None, per_model=None) -> dict:
    entries = [{"model": name, "parameters": {key: of[name] for key, of in (per_model or {}).items()}} for name in names]
    return {"merge_method": method, "base_model": base, "models": entries, "parameters": parameters or {}}


DENSITY = dict(zip(MODELS, (0.3, 0.5, 0.8), strict=True))
CASES = {
    "linear": case("linear", base=None, per_model={"weight": WEIGHTS}),
    "linear-sum": case("linear", base=None, per_model={"weight": WEIGHTS}, parameters={"normalize": False}),
    "slerp": case("slerp", names=("base", "one"), parameters={"t": 0.3}),
    "slerp-near": case("slerp", names=("base", "near-one"), parameters={"t": 0.7}),
    "task_arithmetic": case("task_arithmetic", per_model={"weight": WEIGHTS}, parameters={"lambda": 0.6}),
    "task_arithmetic-mean": case("task_arithmetic", per_model={"weight": WEIGHTS}, parameters={"normalize": True}),
    "ties": case("ties", per_model={"weight": WEIGHTS, "density": DENSITY}),
    "ties-sum": case("ties", per_model={"weight": WEIGHTS}, parameters={"density": 0.2, "normalize": False, "lambda": 0.7}),
    "dare_linear": case("dare_linear", per_model={"weight": WEIGHTS}, parameters={"density": 1.0}),
    "dare_ties": case("dare_ties", per_model={"weight": WEIGHTS}, parameters={"density": 1.0, "normalize": True}),
    "sce": case("sce", parameters={"select_topk": 0.1}),
    "sce-half": case("sce", names=MODELS[:2], parameters={"select_topk": 0.5}),
    "sce-all": case("sce", parameters={"select_topk": 1.0}),
    "sce-near": case("sce", names=("near-one", "near-two"), parameters={"select_topk": 0.5}),
}


def main() -> None:
    found = models()
    result = {f"inputs/{model}/{name}": tensor for model, tensors in found.items() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        for code, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            places = {model: Path(folder) / code / model for model in found}
            for model, place in places.items():
                place.mkdir(parents=True)
                (place / "config.json").write_text(json.dumps(CONFIG))
                tensors = {name: tensor.to(dtype) for name, tensor in found[model].items()}
                save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
            for name, asked in CASES.items():
                if code == "bf16" and name.endswith("-near"):  # bfloat16 rounds such changes away
                    continue
                text = yaml.safe_dump(asked | {"dtype": "float32", "out_dtype": {"f32": "float32", "bf16": "bfloat16"}[code]})
                data = yaml.safe_load(text)
                data["base_model"] = data["base_model"] and str(places[data["base_model"]])
                for entry in data["models"]:
                    entry["model"] = str(places[entry["model"]])
                output = Path(folder) / code / "merged" / name
                run_merge(MergeConfiguration.model_validate(data), str(output), MergeOptions(copy_tokenizer=False))
                for file in output.glob("*.safetensors"):
                    result |= {f"{code}/{name}/{key}": tensor for key, tensor in load_file(file).items()}
    metadata = {"cases": json.dumps(CASES), "config": json.dumps(CONFIG)}
    save_file(result, Path(__file__).with_name("mergekit_reference.safetensors"), metadata=metadata)


if __name__ == "__main__":
    main()
