"""All commands say the same of the same damage: one thing to do, as a whole command."""

import json
import shutil
from pathlib import Path

import pytest
from fuseline.store import catalog
from fuseline.store.errors import DamagedPart, DataError
from fuseline.store.fingerprint import sealed
from fuseline.store.status import dataset_statuses
from fuseline.store.upkeep import usage
from fuseline.store.verify import verify
from fuseline.store.workspace import Workspace
from support.small import small_workspace


@pytest.fixture(scope="module")
def made(tmp_path_factory, byte_level_folder) -> Path:
    return small_workspace(tmp_path_factory.mktemp("small") / "workspace", tokenizer_folder=byte_level_folder).root


@pytest.fixture
def workspace(made, tmp_path) -> Workspace:
    return Workspace.open(Path(shutil.copytree(made, tmp_path / "my workspace")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": ["a"]}, "counts (['a']) must be an object"),
        ({"files": 3}, "files (3) must be an object"),
        ({"files": {"": "ab"}}, "files: size and CRC-32 of '' must be whole numbers from 0"),
        ({"files": {"../x": [1, 2]}}, "must be the plain name of a file in this folder"),
    ],
)
def test_a_bad_manifest_is_reported_by_all_commands_in_the_same_words(workspace, changes, message):
    path = workspace.root / "targets" / "fused" / "part-00000.json"
    record = json.loads(path.read_text())
    del record["checksum"]
    path.write_text(json.dumps(sealed(record | changes)))
    (finding,) = verify(workspace).findings
    assert message in finding.problem
    assert finding.remedy == f"Make it again with: fuseline store repair RECIPE -w '{workspace.root}'"
    for read in (dataset_statuses, usage, catalog.rebuild):
        with pytest.raises(DamagedPart) as raised:
            read(workspace)
        assert str(raised.value) == f"{path} {finding.problem}. {finding.remedy}"


def test_the_remedy_of_a_catalog_names_the_workspace(workspace):
    workspace.catalog_path.unlink()
    (finding,) = verify(workspace).findings
    assert finding.remedy.endswith(f"fuseline store rebuild -w '{workspace.root}'")
    workspace.catalog_path.write_text("x")
    with pytest.raises(DataError) as raised:
        catalog.known_parts(workspace)
    assert str(raised.value).endswith(finding.remedy)


@pytest.mark.parametrize("text", ["[]", "3", "{"])
def test_a_workspace_whose_record_is_none_is_refused(workspace, text):
    (workspace.root / "workspace.json").write_text(text)
    for use in (Workspace.open, Workspace.create):
        with pytest.raises(DamagedPart, match=r"workspace\.json cannot be read .* replace the file's content with \{\}\."):
            use(workspace.root)
