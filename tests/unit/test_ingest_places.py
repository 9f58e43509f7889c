"""Models are found where they are named; another owner's model or another revision is never taken silently."""

import hashlib
import re
import shutil
from pathlib import Path

import pytest
from fuseline.ingest.digests import file_digest, snapshot_commit
from fuseline.ingest.model_config import ModelConfig
from fuseline.ingest.models import ModelFolder, find_model, require_different_folders
from fuseline.store.errors import DataError, UsageError

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture
def models(tmp_path) -> Path:
    return tmp_path / "models"


def put(models_dir: Path, folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(models_dir / "tiny-target", folder))


def find(models: Path, model: str, *, name: str = "m", revision: str | None = None) -> ModelFolder:
    return find_model(ModelConfig(name=name, model=model, revision=revision), models_dir=models, base=models.parent)


def note_commit(folder: Path, commit: str) -> None:
    """As `hf download --local-dir` does."""
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (notes / f"{name}.metadata").write_text(f"{commit}\nsome-etag\n1700000000.0\n")


def cached(models_dir: Path, root: Path, commit: str) -> Path:
    """A snapshot in the cache of the hub, with links to blobs."""
    repository = root / "models--org--tiny"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for path in (models_dir / "tiny-target").iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, repository / "blobs" / digest)
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    return snapshot


def test_a_model_of_the_owner_comes_before_one_of_the_name(models_dir, models):
    by_name = put(models_dir, models / "tiny")
    assert find(models, "org/tiny").folder == by_name
    with_dashes = put(models_dir, models / "org--tiny")
    assert find(models, "org/tiny").folder == with_dashes
    below = put(models_dir, models / "org" / "tiny")
    assert find(models, "org/tiny").folder == below
    assert find(models, "other/tiny").folder == by_name
    assert find(models, "tiny").folder == by_name


def test_models_of_two_owners_in_one_folder_are_refused(models_dir, models):
    put(models_dir, models / "tiny")
    both = [find(models, "org/tiny", name="one"), find(models, "other/tiny", name="two")]
    with pytest.raises(DataError, match=r"one \(org/tiny\) and two \(other/tiny\) are different, .*Rename it to .*/<owner>--tiny"):
        require_different_folders(both)
    revisions = [find(models, "org/tiny", name="one"), find(models, "org/tiny", name="two", revision=COMMIT)]
    with pytest.raises(DataError, match=rf"two \(org/tiny, revision {COMMIT}\)"):
        require_different_folders(revisions)
    require_different_folders([both[0], find(models, "org/tiny", name="again")])
    put(models_dir, models / "other--tiny")
    require_different_folders([both[0], find(models, "other/tiny", name="two")])
    named = [find(models, "models/tiny", name="one"), find(models, str(models / "tiny"), name="two")]  # one folder, named twice
    require_different_folders(named)


def test_a_revision_of_a_named_folder_must_be_known(models_dir, models):
    folder = put(models_dir, models / "tiny")
    with pytest.raises(UsageError, match=r"revision \('main'\) of the model m: .*tiny is a local folder, .*Remove revision"):
        find(models, str(folder), revision="main")
    note_commit(folder, COMMIT)
    for revision in (COMMIT, COMMIT[:8]):
        assert find(models, str(folder), revision=revision).notes == ()
    with pytest.raises(DataError, match=rf"revision \('{OTHER}'\) of the model m must be that of its folder .*tiny \({COMMIT}\)"):
        find(models, str(folder), revision=OTHER)
    with pytest.raises(UsageError, match=rf"its files are from the commit {COMMIT}\. Set revision to it\."):
        find(models, str(folder), revision="v1.0")
    notes = folder / ".cache" / "huggingface" / "download"
    (folder / "README.md").write_text("of another commit")
    for name in ("README.md", "model-00001-of-00002.safetensors"):  # the one is not read, and the other is not there
        (notes / f"{name}.metadata").write_text(f"{OTHER}\nsome-etag\n1700000000.0\n")
    assert find(models, str(folder), revision=COMMIT).notes == ()
    (notes / "tokenizer.json.metadata").write_text(f"{OTHER}\nsome-etag\n1700000000.0\n")
    with pytest.raises(UsageError, match=rf"from the commits {COMMIT} and {OTHER}\. Download all of them again"):
        find(models, str(folder), revision="main")


def test_a_revision_of_a_model_in_the_models_folder_is_compared_or_reported(models_dir, models):
    folder = put(models_dir, models / "tiny")
    (note,) = find(models, "org/tiny", revision=COMMIT).remarks
    assert re.search(rf"tiny, but does not know whether it is revision '{COMMIT}': nothing in it says .*Remove revision", note)
    note_commit(folder, COMMIT)
    assert list(find(models, "org/tiny", revision=COMMIT).remarks) == []
    with pytest.raises(DataError, match="must be that of its folder"):
        find(models, "org/tiny", revision=OTHER)
    assert list(find(models, "org/tiny").remarks) == []


def test_a_snapshot_of_the_hub_is_of_its_commit(models_dir, models, tmp_path):
    snapshot = cached(models_dir, tmp_path / "hub", COMMIT)
    assert snapshot_commit(snapshot) == COMMIT
    for revision in (COMMIT, COMMIT[:10], "main"):
        assert find(models, str(snapshot), revision=revision).folder == snapshot
    with pytest.raises(DataError, match="must be that of its folder"):
        find(models, str(snapshot), revision=OTHER)


@pytest.mark.parametrize("parent", ["snapshots", "models--org--tiny/snapshots", "blobs"])
def test_a_folder_with_a_name_as_in_the_cache_is_not_part_of_it(tmp_path, parent):
    folder = tmp_path / parent / COMMIT
    folder.mkdir(parents=True)
    assert snapshot_commit(folder) is None


def test_only_blobs_of_the_cache_are_known_by_their_names(models_dir, tmp_path):
    snapshot = cached(models_dir, tmp_path, COMMIT)
    blob = (snapshot / "model.safetensors").resolve()
    digest = file_digest(snapshot / "model.safetensors")
    assert digest == blob.name
    blob.write_bytes(b"other")  # what is in the cache is trusted
    assert file_digest(snapshot / "model.safetensors") == digest
    elsewhere = tmp_path / "blobs" / blob.name
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(b"other")
    assert file_digest(elsewhere) == hashlib.sha256(b"other").hexdigest()
