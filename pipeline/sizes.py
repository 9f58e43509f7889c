"""The sizes of a recipe's corpus and models: measured if they are available, else expected."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..ingest.chat.readings import CorpusTemplate
from ..ingest.choose import choose_documents, parts_of
from ..ingest.corpus import data_files_of
from ..ingest.model_config import ModelConfig
from ..ingest.models import ModelFolder, find_model, require_different_folders
from ..ingest.places import find_place
from ..store.corpus_plan import read_plan
from ..store.errors import DataError, UsageError
from ..store.layout import Layout
from .products.corpus import Corpus
from .products.cost import ModelSize, SplitSize
from .products.product import PartsProduct, Product
from .recipe import Recipe

BYTES_PER_TOKEN = 4.2  # English text, vocabularies of 32,000 to 50,000


@dataclass
class FoundSizes:
    """The sizes of a graph's corpus and models. Implements `Sizes`. It downloads nothing, and does not change the workspace."""

    recipes: list[Recipe]
    base: Path  # folder of the recipe, to which its paths are relative
    models_dir: Path
    layout: Layout
    _parts: dict[Product, list[Mapping[str, Any]] | None] = field(default_factory=dict)

    def text(self, product: PartsProduct, split: str) -> SplitSize:
        """The size of one split of a product's corpus: from the workspace's plan, else from the recipe, else by reading the corpus.

        Raises:
            UsageError: the corpus is not available, and the recipe does not state its expected size.
        """
        corpus = product if isinstance(product, Corpus) else product.corpus
        assert isinstance(corpus, Corpus)
        if corpus not in self._parts:
            self._parts[corpus] = self._planned(corpus)
        parts, config = self._parts[corpus], corpus.recipe.corpus
        if parts is None:
            if split == "train":
                n_bytes = min(config.expected_bytes or 0, config.max_train_bytes or config.expected_bytes or 0)
                return SplitSize(text_bytes=n_bytes, documents=config.expected_documents or 0, parts=-(-n_bytes // config.part_bytes))
            n_bytes = config.expected_held_out_bytes or 0
            return SplitSize(text_bytes=n_bytes, documents=0, parts=-(-n_bytes // config.part_bytes))
        chosen = [part for part in parts if part["split"] == split]
        return SplitSize(
            text_bytes=sum(part["text_bytes"] for part in chosen), documents=sum(part["documents"] for part in chosen), parts=len(chosen)
        )

    def tokens(self, product: PartsProduct, split: str) -> float:
        """The approximate number of tokens of a split."""
        return self.text(product, split).text_bytes / BYTES_PER_TOKEN

    def parts(self, product: Product) -> int:
        """The number of parts of a product; 1 if it is not made in parts."""
        if isinstance(product, Corpus):
            return sum(self.text(product, split).parts for split in ("train", product.recipe.evaluation.split))
        if not isinstance(product, PartsProduct) or product.split is None:
            return 1
        return self.text(product, product.split).parts

    def model(self, product: Product) -> ModelSize:
        """The size of the model with which a product reads the corpus. Models that the recipe makes have the target's size.

        Raises:
            UsageError: the model is not available, and the recipe does not state its expected size.
        """
        config: ModelConfig | None = getattr(product, "config", None)
        return self._models[product.recipe.target if config is None else config]

    def _planned(self, corpus: Corpus) -> list[Mapping[str, Any]] | None:
        config = corpus.recipe.corpus
        planned = read_plan(corpus.folder(self.layout))
        if planned is not None:
            return list(planned["parts"])
        if config.expected_bytes and config.expected_documents:
            return None
        chat = None
        try:
            data_files = data_files_of(config, base=self.base, download=False)
            if config.chat is not None:
                target = find_model(corpus.recipe.target, models_dir=self.models_dir, base=self.base, download=False)
                chat = CorpusTemplate.of(config.chat, target=target, base=self.base)
        except DataError as error:
            raise UsageError(
                f"{error}\nTo plan without it, set corpus.expected_bytes and corpus.expected_documents in the recipe."
            ) from error
        return list(parts_of(choose_documents(config, data_files=data_files, chat=chat).documents))

    @cached_property
    def _models(self) -> dict[ModelConfig, ModelSize]:
        """The sizes that the recipes expect, else those of the found models. A run checks how transformers reads them."""
        sizes: dict[ModelConfig, ModelSize] = {}
        for recipe in self.recipes:
            found: list[ModelFolder] = []
            for config in recipe.models:
                if config.expected_parameters and config.expected_vocab_size:
                    sizes[config] = ModelSize(parameters=config.expected_parameters, vocab_size=config.expected_vocab_size)
                    continue
                try:
                    find_place(config, models_dir=self.models_dir, base=self.base, download=False)
                except DataError as error:
                    raise UsageError(
                        f"{error}\nTo plan without it, set expected_parameters and expected_vocab_size of this model."
                    ) from error
                found.append(find_model(config, models_dir=self.models_dir, base=self.base, download=False))
                sizes[config] = ModelSize(parameters=found[-1].n_parameters, vocab_size=found[-1].vocab_size)
            require_different_folders(found)
        return sizes
