"""Checks that the datasets of a workspace fit together: a dataset's identity holds the fingerprints of its inputs."""

from collections.abc import Iterator, Sequence

from .corpus_plan import read_plan
from .dataset import Dataset
from .errors import DamagedPart


def check_inputs(datasets: Sequence[Dataset], *, tokenizers: set[str]) -> Iterator[tuple[Dataset, str, str]]:
    """Datasets whose inputs are missing from the workspace, each with the problem and what to do.

    Args:
        datasets: all datasets of the workspace that can be opened.
        tokenizers: digests of the stored tokenizers.
    """
    by_fingerprint = {dataset.fingerprint: dataset for dataset in datasets}
    corpora = {dataset.name: dataset for dataset in datasets if dataset.kind == "corpus"}
    for dataset in datasets:
        remedy = f"Run its recipe again, or remove {dataset.folder} if you do not need it."
        for fingerprint in input_fingerprints(dataset):
            if fingerprint not in by_fingerprint:
                yield dataset, f"was made from a dataset that no longer exists here (fingerprint {fingerprint[:12]}…)", remedy
        corpus = corpora.get(dataset.description.get("corpus", ""))
        if "corpus" in dataset.identity and corpus is not None and corpus.fingerprint != dataset.identity["corpus"]:
            yield dataset, f"was made from a different corpus than the current corpus/{corpus.name}", remedy
        for digest in sorted(tokenizer_digests(dataset) - tokenizers):
            yield dataset, f"needs the tokenizer {digest[:12]}…, which is not in tokenizers/", remedy


def check_counts(datasets: Sequence[Dataset]) -> Iterator[tuple[Dataset, int, str]]:
    """Parts whose numbers of tokens or segments differ from those of the target model's part, with the problem.

    All parts must have readable manifests.
    """
    by_fingerprint = {dataset.fingerprint: dataset for dataset in datasets}
    plans = {dataset.fingerprint: _planned_documents(dataset) for dataset in datasets if dataset.kind == "corpus"}
    for dataset in datasets:
        own = by_fingerprint.get(_positions_of(dataset) or "")
        own_parts = set() if own is None else set(own.parts())
        for part in dataset.parts():
            counts = dataset.manifest(part).counts
            if own is not None and part in own_parts:
                expected = own.manifest(part).counts
                for what in ("tokens", "segments"):
                    if what in counts and what in expected and counts[what] != expected[what]:
                        yield dataset, part, f"has {counts[what]} {what}, but {own.kind}/{own.name} has {expected[what]} in this part"
            planned = plans.get(dataset.fingerprint, {}).get(part)
            if planned is not None and counts.get("documents", planned) != planned:
                yield dataset, part, f"has {counts['documents']} documents, but plan.json says {planned}"


def input_fingerprints(dataset: Dataset) -> list[str]:
    """Fingerprints of the datasets that a dataset was made from."""
    identity = dataset.identity
    match dataset.kind:
        case "distributions" | "evaluations":
            return [identity["corpus"]]
        case "token_matches":
            return [identity["source"], identity["target"]]
        case "vocab_maps":
            return [identity["matches"]] if "matches" in identity else []
        case "alignments":
            return [identity[key] for key in ("source", "target", "vocabulary") if key in identity]
        case "ensembles":
            return list(identity["members"])
        case "targets":
            return list(dict.fromkeys(fingerprint for source in identity["sources"] for fingerprint in source))
        case _:
            return []


def tokenizer_digests(dataset: Dataset) -> set[str]:
    """Digests of the tokenizers of a dataset."""
    identity = dataset.identity
    match dataset.kind:
        case "corpus":
            return set(identity["segmented_for"])
        case "distributions" | "evaluations":
            return {identity["tokenizer"]}
        case "vocab_maps":
            return {identity["source"], identity["target"]}
        case _:
            return set()


def _positions_of(dataset: Dataset) -> str | None:
    """Fingerprint of the distributions whose positions a dataset uses."""
    match dataset.kind:
        case "alignments" | "token_matches":
            return dataset.identity["target"]
        case "targets":
            return dataset.identity["sources"][0][0]
        case _:
            return None


def _planned_documents(corpus: Dataset) -> dict[int, int]:
    try:
        summary = read_plan(corpus.folder)
    except DamagedPart:  # reported when the plan itself is checked
        return {}
    return {part: facts["documents"] for part, facts in enumerate(summary["parts"])} if summary else {}
