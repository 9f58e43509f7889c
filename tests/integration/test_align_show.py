"""`fuseline align show`: what it shows is what is stored, in the terminal and on the page; what it cannot show it says."""

import base64
import hashlib
import html
import json
import math
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
from click.testing import CliRunner
from fuseline.align.show import ShownDocument, show_alignment
from fuseline.cli import main
from fuseline.commands.alignment_view import page, visible
from fuseline.store.errors import DataError
from fuseline.store.workspace import Workspace
from support.tiny import save_model, train_composing
from support.workspaces import RECIPE, write_project

HOSTILE = "</script><b>not bold</b> & \u200b naïve 漢字\n\tend."


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, corpus_texts, models_dir) -> Workspace:
    """Stages up to the fusion, over texts of which some look like markup."""
    recipe = write_project(tmp_path_factory.mktemp("show") / "project", texts=[f"{HOSTILE} {text}" for text in corpus_texts])
    return made(recipe, root=recipe.parent / "workspace", models_dir=models_dir)


def made(recipe: Path, *, root: Path, models_dir: Path) -> Workspace:
    for stage in (("ingest", "corpus"), ("ingest", "distributions"), ("align",), ("fuse",)):
        result = CliRunner().invoke(main, [*stage, str(recipe), "-w", str(root), "--models", str(models_dir)])
        assert result.exit_code == 0, result.output
    return Workspace.open(root)


WAYS = {
    "anchored": 'positions = "span"',
    "first": 'positions = "span"\nvocabulary = "exact"\ngold_anchor = false\ncollisions = "first"',
    "warped": 'positions = "dtw"\ndtw_match = "em"\nvocabulary = "exact"',
}


@pytest.fixture(scope="module")
def several(workspace, tmp_path_factory, models_dir) -> Workspace:
    """The workspace with other alignments beside the first; `span` is there once, and fused with two maps."""
    folder = Path(shutil.copytree(workspace.root.parent, tmp_path_factory.mktemp("several") / "project"))
    for name, way in WAYS.items():
        recipe = folder / f"{name}.toml"
        recipe.write_text(RECIPE.replace("[training]", f'[alignment]\n{way}\n\n[fusion]\nname = "{name}"\n\n[training]'))
        made(recipe, root=folder / "workspace", models_dir=models_dir)
    return Workspace.open(folder / "workspace")


@pytest.fixture(scope="module")
def doc_id(workspace) -> int:
    """A document of several segments."""
    return workspace.sql("SELECT doc_id FROM target_segments GROUP BY doc_id HAVING count(*) > 1 ORDER BY doc_id LIMIT 1")["doc_id"].item()


@pytest.fixture(scope="module")
def shown(workspace, doc_id) -> ShownDocument:
    return show_alignment(workspace, doc_id=doc_id)


def command(workspace: Workspace, *arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["align", "show", "-w", str(workspace.root), *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def test_each_position_has_the_tokens_and_the_partner_that_sql_has(workspace, shown, doc_id):
    rows = workspace.sql("FROM alignments WHERE doc_id = $doc ORDER BY segment, position", {"doc": doc_id}).to_dicts()
    assert len(rows) == len(shown.target_positions) > 100
    kinds = set()
    for row, position in zip(rows, shown.target_positions, strict=True):
        assert shown.target_texts[position.token] == row["token"]
        kinds.add((position.source is None, position.ahead > 0))
        if position.source is not None:
            assert shown.source_texts[shown.source_positions[position.source].token] == row["source_token"]
            assert position.ahead == row["bytes_ahead"]
    assert len(kinds) >= 2, "the case is too easy"


def test_distributions_before_the_map_and_the_targets_own_are_those_that_are_stored(workspace, shown, doc_id):
    query = "FROM positions WHERE doc_id = $doc AND model = $model AND split = 'train' ORDER BY segment, position"
    source, target = (workspace.sql(query, {"doc": doc_id, "model": model}).to_dicts() for model in ("source", "target"))
    for row, position in zip(source, shown.source_positions, strict=True):
        stored = dict(zip(row["topk_ids"], map(math.exp, row["topk_logprobs"]), strict=True))
        assert dict(position.entries) == pytest.approx(stored, rel=1e-5)
        assert position.next_token == row["gold_id"]
    for row, position in zip(target, shown.target_positions, strict=True):
        own = dict(position.own_entries)
        assert row["gold_id"] is None or row["gold_id"] in own, "the token that follows is always there"
        assert set(row["topk_ids"]) <= set(own)


def test_its_masses_are_those_of_the_fused_targets(workspace, shown, doc_id):
    found = workspace.sql(
        "SELECT sum(lost * n_spoken) / sum(n_spoken) AS lost, sum(tail * n_spoken) / sum(n_spoken) AS tail, sum(n_spoken) AS n, "
        "sum(gold_nll) AS gold_nll FROM target_sources WHERE doc_id = $doc AND source = 'source'",
        {"doc": doc_id},
    ).row(0, named=True)
    summary = shown.summary
    assert (summary.lost, summary.tail) == pytest.approx((found["lost"], found["tail"]), rel=1e-4)
    assert summary.same + summary.inside == found["n"]
    assert summary.mapped + summary.merged + summary.lost + summary.tail == pytest.approx(1, abs=1e-5)
    bpb = workspace.sql(
        "SELECT model, sum(nll) / sum(scored_bytes) / ln(2) AS bpb FROM segments WHERE doc_id = $doc AND kind = 'distributions' GROUP BY 1",
        {"doc": doc_id},
    )
    assert {"source": summary.source_bpb, "target": summary.target_bpb} == pytest.approx(dict(bpb.iter_rows()), rel=1e-6)
    assert 0.9 < summary.mapped_bytes <= 1


def test_rows_cut_both_sides_at_the_same_byte_and_leave_nothing_out(shown):
    for side, positions in (("source", shown.source_positions), ("target", shown.target_positions)):
        assert [place for row in shown.rows for place in getattr(row, side)] == list(range(len(positions)))
    for row in shown.rows:
        texts = [
            "".join(getattr(shown, f"{side}_texts")[getattr(shown, f"{side}_positions")[place].token] for place in getattr(row, side))
            for side in ("source", "target")
        ]
        if "\\x" not in "".join(texts):  # bytes that are no character by themselves are cut otherwise
            assert texts[0].replace("<s>", "").strip(" ") == texts[1].strip(" ")


def test_the_page_needs_nothing_from_outside_and_nothing_of_the_text_is_markup(shown):
    text = page(shown)
    assert not re.search(r"""(?:src|href)=|url\(|@import|https?://""", text)
    assert "{{" not in text
    assert text.count("</script>") == 2
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', text)
    assert html.unescape(policy).startswith(f"default-src 'none'; script-src 'sha256-{digest}'; ")
    assert "<b>" not in text
    spans = re.findall(r'<span class="[sin]" id="([st])(\d+)">(.*?)</span>', text)
    assert len(spans) == len(shown.source_positions) + len(shown.target_positions)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
    for side, place, token in spans:
        record = data["source" if side == "s" else "target"][int(place)]
        assert html.unescape(token) == data["sourceTexts" if side == "s" else "targetTexts"][str(record[0])]
    for u, record in enumerate(data["source"]):
        assert record[4] == [t for t, position in enumerate(data["target"]) if position[2] == u]


@pytest.mark.parametrize(("name", "vocabulary"), [("anchored", "prefix"), ("first", "exact")])
def test_each_map_is_shown_as_the_targets_are_that_were_fused_with_it(several, doc_id, name, vocabulary):
    shown = show_alignment(several, doc_id=doc_id, alignment="source--target--span", vocabulary_map=f"source--target--{vocabulary}")
    masses = ", ".join(f"sum({mass} * n_spoken) / sum(n_spoken) AS {mass}" for mass in ("mapped", "merged", "lost"))
    found = several.sql(
        f"SELECT {masses} FROM target_sources WHERE doc_id = $doc AND name = $name AND source = 'source'", {"doc": doc_id, "name": name}
    )
    assert (shown.summary.mapped, shown.summary.merged, shown.summary.lost) == pytest.approx(found.row(0), rel=1e-4)


def test_a_map_that_does_not_know_what_is_left_of_tokens_is_refused_for_cover(several, doc_id):
    code, output = command(several, "--doc", doc_id, "--alignment", "source--target", "--map", "source--target--exact")
    assert code == 2
    assert "with rests of tokens, which cover needs, there are: source--target--prefix." in " ".join(output.split())


def test_of_warped_strings_it_is_said_that_they_are_matched(several, doc_id, workspace):
    arguments = ("--doc", doc_id, "--alignment", "source--target--dtw-em")
    document = show_alignment(several, doc_id=doc_id, alignment="source--target--dtw-em")
    for text in (command(several, *arguments)[1], page(document)):
        assert "where the two are matched," in " ".join(text.split())
        assert "read the same" not in text
    assert "where both have read the same text," in " ".join(command(workspace, "--doc", doc_id)[1].split())


def test_bits_per_byte_are_of_the_texts_bytes_where_the_tokenizer_rewrites_them(corpus_texts, models_dir, tmp_path):
    texts = [unicodedata.normalize("NFD", f"Résumé naïve {text}") for text in corpus_texts]
    tokenizer = train_composing(tmp_path / "composing", texts=texts)
    save_model(tmp_path / "models" / "tiny-target", tokenizer_folder=tokenizer, seed=1)
    shutil.copytree(models_dir / "tiny-source", tmp_path / "models" / "tiny-source")
    workspace = made(write_project(tmp_path / "project", texts=texts), root=tmp_path / "workspace", models_dir=tmp_path / "models")
    shown = show_alignment(workspace, doc_id=0)
    (n_bytes,) = workspace.sql(
        "SELECT sum(scored_bytes) FROM segments WHERE doc_id = 0 AND kind = 'distributions' AND model = 'target'"
    ).row(0)
    (nats,) = workspace.sql("SELECT sum(gold_nll) FROM target_sources WHERE doc_id = 0 AND source = 'source'").row(0)
    assert shown.summary.mapped_bytes == 1
    assert shown.summary.mapped_bpb == pytest.approx(nats / n_bytes / math.log(2), rel=1e-6)


def test_what_cannot_be_seen_is_shown():
    assert visible(" a\n\t\u200b\ufe0f") == "·a⏎⇥\\u200b\ufe0f"
    assert visible("\u0301") == "\\u0301"
    assert visible("\u3164") == "\\u3164"
    assert visible("") == "∅"
    assert visible("\\xe2") == "\\xe2"


def test_the_terminal_shows_the_text_and_with_details_each_position(workspace, shown, doc_id, tmp_path):
    code, output = command(workspace, "--doc", doc_id)
    assert code == 0, output
    assert f"source → target, document {doc_id} of corpus" in output
    assert "⏎" in output
    assert "bits per byte" in output
    code, detailed = command(workspace, "--doc", doc_id, "--segment", 0, "--details")
    assert code == 0, detailed
    assert "through the map" in detailed
    code, output = command(workspace, "--doc", doc_id, "--html", tmp_path / "page.html")
    assert code == 0, output
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page(shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--doc", 4000], "There is no document 4000 in corpus/corpus: it has the documents 0 to "),
        (["--doc", 0, "--segment", 77], "Document 0 has no segment 77: it has the segments 0 to "),
        (["--doc", 0, "--alignment", "a--b"], "There is no alignment a--b; there are: source--target."),
        (["--doc", 0, "--map", "none"], "There is no none among the vocabulary maps"),
        ([], "Missing option '--doc'"),
    ],
)
def test_what_is_not_there_is_reported(workspace, arguments, message):
    code, output = command(workspace, *arguments)
    assert code == 2
    assert message in output.replace("\n", " ")


def test_a_document_of_another_split_and_a_part_that_is_gone_are_reported(workspace):
    first = "SELECT min(doc_id) AS doc_id FROM documents WHERE split = $split"
    held_out, trained = (workspace.sql(first, {"split": split})["doc_id"].item() for split in ("test", "train"))
    code, output = command(workspace, "--doc", held_out)
    assert (code, f"Document {held_out} is in the split test" in output) == (2, True)
    part = workspace.sql("SELECT part FROM documents WHERE doc_id = $d", {"d": trained})["part"].item()
    manifest = workspace.root / "alignments" / "source--target" / f"part-{part:05d}.json"
    aside = Path(f"{manifest}.aside")
    manifest.rename(aside)
    try:
        with pytest.raises(DataError, match=f"alignments/source--target lacks part {part}"):
            show_alignment(workspace, doc_id=trained)
    finally:
        aside.rename(manifest)


def test_align_with_a_recipe_is_align_run():
    runner = CliRunner()
    for arguments in (["align", "nowhere.toml"], ["align", "run", "nowhere.toml"], ["align", "--workers", "2", "nowhere.toml"]):
        result = runner.invoke(main, arguments)
        assert (result.exit_code, "The recipe nowhere.toml cannot be read" in result.output) == (2, True), result.output
    assert "align [OPTIONS] RECIPE" in runner.invoke(main, ["align", "--help"]).output
