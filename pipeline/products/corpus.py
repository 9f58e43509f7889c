"""The corpus: documents in parts, cut into segments."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...ingest.corpus import CorpusStage, corpus_identity
from ...ingest.corpus_config import corpus_choices
from ...ingest.earlier_corpus import kept_identity, require_read_right
from ...store.fingerprint import Identity
from .cost import Cost, Sizes
from .product import AtLeast, Drawing, OpenSite, PartsProduct, Product, Site, opened

# English text compresses to this share. Each document also has numbers, a digest and names.
_COMPRESSED, _DOCUMENT_BYTES = 0.45, 60


@dataclass(frozen=True, eq=False, kw_only=True)
class Corpus(PartsProduct):
    """`corpus/<name>`."""

    kind: ClassVar[str] = "corpus"
    command: ClassVar[str] = "ingest corpus"
    noun: ClassVar[str] = "corpus"

    @classmethod
    def of(cls, drawing: Drawing) -> Iterator["Corpus"]:
        yield cls(recipe=drawing.recipe)

    @property
    def role(self) -> str:
        return ""

    @property
    def name(self) -> str:
        return self.suffixed(self.recipe.corpus.name)

    @property
    def inputs(self) -> tuple[Product, ...]:
        return ()

    @property
    def choices(self) -> Mapping[str, Any]:
        config = self.recipe.corpus
        chosen = config.model_dump(exclude={"name", "expected_documents", "expected_bytes", "expected_held_out_bytes"})
        # Conversations are written in the target's template.
        return chosen if config.chat is None else chosen | {"target": (self.recipe.target.model, self.recipe.target.revision)}

    @property
    def title(self) -> str:
        return f"{self.noun} {self.name}" if self.suffix else self.noun

    @property
    def corpus(self) -> None:
        return None

    def planned_parts(self, plan: Mapping[str, Any] | None) -> list[int] | None:
        return None if plan is None else list(range(len(plan["parts"])))

    def identity(self, site: Site) -> Identity:
        place = opened(site)
        if place is None:
            return AtLeast(corpus_choices(self.recipe.corpus))
        stored, asked = self.stored(site.layout), self._asked(place)
        return asked if stored is None else kept_identity(stored, asked=asked)

    def _asked(self, site: OpenSite) -> dict[str, Any]:
        """The identity in the form of this version."""
        tokenizers = [
            model.tokenizer
            for recipe in site.recipes(self)
            for model in site.models(recipe).values()
            if model.config.chat_template == "shared"  # the other models write conversations in their own templates
        ]
        unique = list({tokenizer.digest: tokenizer for tokenizer in tokenizers}.values())
        asked = corpus_identity(self.recipe.corpus, data_files=site.data_files(self), tokenizers=unique, chat=site.template(self))
        stored = self.stored(site.layout)
        # Segments are fixed when the corpus is first made, so that a source that is added later does not invalidate stored data.
        return asked if stored is None else asked | {"segmented_for": stored.identity["segmented_for"]}

    def description(self, site: OpenSite) -> dict[str, Any]:
        return {"source": site.data_files(self).where}

    def stage(self, site: OpenSite) -> CorpusStage:
        for recipe in site.recipes(self):
            for model in site.models(recipe).values():
                site.tokenizer_folder(model)
        dataset = site.dataset(self)
        folders = [site.layout.folder("tokenizers", digest) for digest in dataset.identity["segmented_for"]]
        chat = site.template(self)
        stage = CorpusStage(dataset, config=self.recipe.corpus, data_files=site.data_files(self), tokenizer_folders=folders, chat=chat)
        require_read_right(stage, asked=self._asked(site))
        return stage

    def cost(self, sizes: Sizes) -> Cost:
        text = sizes.text(self, "train"), sizes.text(self, self.recipe.evaluation.split)
        n_bytes, documents = sum(each.text_bytes for each in text), sum(each.documents for each in text)
        return Cost(stored_bytes=_COMPRESSED * n_bytes + _DOCUMENT_BYTES * documents, tokens=sizes.tokens(self, "train"))
