"""The `[target]` and the `[[sources]]` of a recipe."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ModelConfig(BaseModel):
    """The `[target]` or one of the `[[sources]]` of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$", description="name of the model in the workspace")
    model: str = Field(description="model id on the Hugging Face hub, or a folder in its format (safetensors)")
    revision: str | None = Field(None, description="commit, tag or branch of a hub model; for a local folder, the commit that it must have")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="number format of the weights in forward passes; for that of the computation, see docs/machines.md"
    )
    prepends_bos: bool | None = Field(None, description="start each segment with bos; by default as the model's tokenizer does")
    chat_template: Literal["shared", "own"] = Field(
        "shared",
        description="for a source, with [corpus.chat]: read conversations as in the corpus, or in the source's own chat template",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    expected_parameters: float | None = Field(None, gt=0, description="for --dry-run if the model is not available")
    expected_vocab_size: int | None = Field(None, gt=0, description="for --dry-run if the model is not available")
