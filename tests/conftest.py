"""What the tests share: tiny but real models, tokenizers and corpora, made once per session, in the Hugging Face format."""

import os
import sys
import tempfile
from pathlib import Path

# Before anything imports `datasets` or `huggingface_hub`: no network, and a cache that goes away.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = (CACHE := tempfile.TemporaryDirectory(prefix="fuseline-hf-")).name
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from support import warm
from support.tiny import save_model, train_byte_level, train_sentencepiece

warm.offer(Path(CACHE.name))


@pytest.fixture
def cold(monkeypatch) -> None:
    """Processes are started as usual, not forked from the warm server."""
    monkeypatch.setenv(warm.COLD, "1")


@pytest.fixture(scope="session")
def corpus_texts() -> list[str]:
    """The demo corpus's documents."""
    import fuseline
    import polars as pl

    return pl.read_parquet(Path(fuseline.__file__).parent / "recipes" / "demo-corpus" / "demo.parquet")["text"].to_list()


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory, corpus_texts) -> Path:
    """A byte-level BPE tokenizer without bos (as GPT-2's), in a model folder without weights."""
    return train_byte_level(tmp_path_factory.mktemp("byte-level"), texts=corpus_texts)


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory, corpus_texts) -> Path:
    """A SentencePiece-style BPE tokenizer with dummy prefix, byte fallback and bos (as Llama-2's), in a model folder without weights."""
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"), texts=corpus_texts)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory, byte_level_folder, sentencepiece_folder) -> Path:
    """Folder with two tiny random Llama models of different vocabularies: `tiny-target` (byte-level) and `tiny-source` (SentencePiece)."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "tiny-target", tokenizer_folder=byte_level_folder, seed=1)
    save_model(folder / "tiny-source", tokenizer_folder=sentencepiece_folder, seed=2)
    return folder


@pytest.fixture(scope="session")
def pair(byte_level_folder, sentencepiece_folder) -> dict:
    """The two tokenizers, by family."""
    from fuseline.store.tokenizer import Tokenizer

    return {
        "byte_level": Tokenizer.from_model_folder(byte_level_folder),
        "sentencepiece": Tokenizer.from_model_folder(sentencepiece_folder),
    }


@pytest.fixture(params=["byte_level", "sentencepiece"])
def source_and_target(request, pair) -> tuple:
    """Each of the two tokenizers with the other."""
    (other,) = pair.keys() - {request.param}
    return pair[request.param], pair[other]
