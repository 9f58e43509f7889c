"""Conversations through the pipeline: what is masked, what is scored, and what a first-time user may get wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from fuseline.cli import main
from fuseline.store.corpus_plan import read_plan
from fuseline.store.dataset import Dataset
from fuseline.store.sql.database import Database
from fuseline.store.tokenizer import Tokenizer
from fuseline.store.workspace import Workspace
from fuseline.train.config import TrainingConfig, TrainJob
from fuseline.train.data import TargetsData
from fuseline.train.loss import IGNORED
from fuseline.train.model_folder import copy_tokenizer
from support.chat import PUBLISHED, TEXTS, save_tokenizer
from support.rounding import stored
from support.tiny import save_model

RECIPE = """
[corpus]
path = "chat.jsonl"
split_column = "split"
context_length = 256
part_bytes = 4096

[corpus.chat]

[target]
name = "pivot"
model = "models/smollm2"
dtype = "float32"

[[sources]]
name = "other"
model = "models/llama-2"
dtype = "float32"

[[sources]]
name = "own"
model = "models/gemma-2"
dtype = "float32"
chat_template = "own"

[distributions]
top_k = 4

[fusion]
unit = "document"

[evaluation]
split = "test"
"""


def fuseline(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code != 0
    return result.output


def conversations() -> list[dict]:
    random = np.random.default_rng(0)
    sentences = [sentence.strip() + "." for text in TEXTS[:3] for sentence in text.split(".") if sentence.strip()]
    rows = []
    for number in range(40):
        messages = []
        for _ in range(1 + number % 5):
            question, answer = random.choice(sentences), " ".join(random.choice(sentences, 1 + number % 2))
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": f"{answer} {number}"}]
        messages[-1]["content"] += "<|im_end|> </s> <end_of_turn>" if number % 7 == 0 else ""
        rows.append({"messages": messages, "split": "test" if number % 8 == 0 else "train"})
    return [*rows, {"messages": rows[0]["messages"][:1], "split": "train"}]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    families = {"smollm2": "byte-level", "llama-2": "sentencepiece", "gemma-2": "metaspace"}
    for seed, published in enumerate(each for each in PUBLISHED if each.name in families):
        model = folder / "models" / published.name
        tokenizer = save_tokenizer(
            folder / "tokenizers" / published.name, published=published, family=families[published.name], trained=folder
        )
        save_model(model, tokenizer_folder=tokenizer, seed=seed, hidden_size=16, layers=1)
        (tokenizer / "chat_template.jinja").rename(model / "chat_template.jinja")
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, conversations())))
    (folder / "chat.toml").write_text(RECIPE)
    fuseline("ingest", "corpus", folder / "chat.toml", "-w", folder / "workspace")
    fuseline("ingest", "distributions", folder / "chat.toml", "-w", folder / "workspace")
    fuseline("align", folder / "chat.toml", "-w", folder / "workspace")
    fuseline("fuse", folder / "chat.toml", "-w", folder / "workspace")
    return folder


def dataset(project: Path, kind: str, name: str) -> Dataset:
    return Dataset.open(project / "workspace" / kind / name)


def assistant_bytes(table: pl.DataFrame) -> list[bytes]:
    """What the corpus says the assistant wrote in each segment."""
    rows = table.select("text", "assistant_spans").iter_rows()
    return [b"".join(text.encode()[span["start"] : span["end"]] for span in spans) for text, spans in rows]


def test_the_corpus_holds_whole_conversations_and_says_what_it_refused(project):
    plan = read_plan(project / "workspace/corpus/corpus")
    assert plan is not None
    assert (plan["documents"], plan["refused"]) == (40, 1)
    assert plan["why_refused"] == [f"{project / 'chat.jsonl'}, line 41: it has no message of the assistant"]
    corpus = dataset(project, "corpus", "corpus")
    tables = pl.concat([corpus.table(part) for part in corpus.parts()])
    said = {(message["content"]) for row in conversations()[:40] for message in row["messages"] if message["role"] == "assistant"}
    written = "".join(part.decode() for part in assistant_bytes(tables))
    assert all(f"{text}<|im_end|>" in written for text in said)
    assert max(tables["segment"]) > 0  # some are cut


def test_the_mask_is_the_assistants_text_in_every_model_and_in_the_targets(project):
    corpus, pivot, targets = (dataset(project, *name) for name in (("corpus", "corpus"), ("distributions", "pivot"), ("targets", "fused")))
    for part in pivot.parts():
        table = corpus.table(part)
        ends_T, offsets, mask_T, n_scored_S, nll_S, gold_T = pivot.read(
            part, "byte_ends_T", "segment_offsets", "label_mask_T", "n_scored_S", "nll_S", "gold_logprob_T"
        )
        (copied_T,) = targets.read(part, "label_mask_T")
        np.testing.assert_array_equal(copied_T, mask_T)
        for s, (text, expected) in enumerate(zip(table["text"], assistant_bytes(table), strict=True)):
            rows = range(offsets[s], offsets[s + 1] - 1)
            assert b"".join(text.encode()[ends_T[j] : ends_T[j + 1]] for j in rows if mask_T[j]) == expected
            labels = [j for j in rows if mask_T[j]]
            assert n_scored_S[s] == len(labels)
            nll = -gold_T[labels].astype(np.float64).sum()
            assert nll_S[s] == pytest.approx(nll, abs=stored(nll))


def test_sources_are_scored_over_the_same_text(project):
    """In whatever template they read it, and whatever ends a turn there."""
    answers = Database(Workspace.open(project / "workspace")).sql(
        "SELECT doc_id, model, sum(scored_bytes) AS n FROM segments WHERE kind = 'distributions' GROUP BY ALL"
    )
    by_document: dict[int, dict[str, int]] = {}
    for doc_id, model, n in answers.iter_rows():
        by_document.setdefault(doc_id, {})[model] = n
    assert all(of["other"] == of["pivot"] for of in by_document.values())
    compared = [of for of in by_document.values() if "own" in of]
    assert compared
    assert all(abs(of["own"] - of["pivot"]) <= 6 for of in compared)  # its template trims


def test_aligned_positions_of_a_rendering_of_its_own_have_read_the_same_answer(project):
    pivot, own, alignment = (
        dataset(project, *name) for name in (("distributions", "pivot"), ("distributions", "own"), ("alignments", "own--pivot"))
    )
    n_checked = 0
    for part in alignment.parts():
        position_T, ahead_T = alignment.read(part, "source_position_T", "ahead_T")
        ends_T, mask_T = pivot.read(part, "byte_ends_T", "label_mask_T")
        source_ends_T, source_mask_T = own.read(part, "byte_ends_T", "label_mask_T")
        is_met_T = mask_T & (position_T >= 0) & (ahead_T == 0)
        assert (source_ends_T[position_T[is_met_T]] == ends_T[is_met_T]).all()
        n_checked += int((source_mask_T[position_T[is_met_T]]).sum())
    assert n_checked > 100


def test_nothing_but_the_answers_is_trained_on(project):
    targets = dataset(project, "targets", "fused")
    config = TrainingConfig(sequence_length=256, global_batch_size=4, seed=1)
    data = TargetsData(targets, parts=targets.parts(), vocab_size=1000, config=config)
    tokenizer = Tokenizer.from_model_folder(project / "models/smollm2")
    assistant, end = tokenizer.backend.token_to_id("<|im_start|>"), tokenizer.backend.token_to_id("<|im_end|>")
    n_labels = 0
    for step in range(data.steps):
        for batch in data.micro_batches(step, data_rank=0):
            labels = batch.labels_T[batch.labels_T != IGNORED]
            assert assistant not in labels
            n_labels += len(labels)
            assert batch.soft is not None
            assert (batch.soft.topk_masses_NK.sum(1)[batch.labels_T == IGNORED] == 0).all()
            assert (batch.soft.topk_masses_NK.sum(1)[batch.labels_T != IGNORED] > 0).all()
            assert end in labels
    total = sum(int(targets.read(part, "label_mask_T")[0].sum()) for part in targets.parts())
    assert n_labels >= total


def test_sql_says_which_tokens_are_labels(project):
    output = fuseline(
        "sql", "-w", project / "workspace", "--format", "json",
        "SELECT count(*) FILTER (is_label) AS n, count(*) FILTER (is_label AND gold_token = '<|im_end|>') AS ends FROM targets",
    )  # fmt: skip
    (row,) = json.loads(output)
    targets = dataset(project, "targets", "fused")
    assert row["n"] == sum(int(targets.read(part, "label_mask_T")[0].sum()) for part in targets.parts())
    assert row["ends"] == sum(len(each["messages"]) // 2 for each in conversations()[:40] if each["split"] == "train")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[corpus.chat]\n", "[corpus.chat]\ncolumn = 'turns'\n", "not turns. Name the column with corpus.chat.column"),
        ("[corpus.chat]\n", "[corpus.chat]\ntemplate = 'none.jinja'\n", "corpus.chat.template (none.jinja) cannot be read"),
        ("[corpus.chat]\n", "[corpus.chat]\ndate = 'today'\n", "corpus.chat.date"),
        ("[corpus.chat]\n", "", "'own' needs [corpus.chat]. Remove it"),
        ('model = "models/smollm2"\n', 'model = "models/smollm2"\nchat_template = "own"\n', "'own' is only for sources"),
        ('model = "models/smollm2"', 'model = "models/plain"', "has no chat template for conversations"),
    ],
)
def test_a_mistake_is_reported(project, tmp_path, old, new, said):
    plain = project / "models" / "plain"
    if not plain.exists():
        plain.mkdir()
        for path in (project / "models" / "smollm2").iterdir():
            if path.name != "chat_template.jinja":
                shutil.copy(path, plain)
    recipe = project / f"mistake-{abs(hash((old, new)))}.toml"
    recipe.write_text(RECIPE.replace(old, new, 1))
    assert said in refused("ingest", "corpus", recipe, "-w", tmp_path / "workspace")


def test_a_row_that_is_no_conversation_is_named(project, tmp_path):
    rows = [*conversations()[:3], {"messages": [{"role": "wizard", "content": "x"}], "split": "train"}]
    (project / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = project / "bad.toml"
    recipe.write_text(RECIPE.replace("chat.jsonl", "bad.jsonl"))
    output = refused("ingest", "corpus", recipe, "-w", tmp_path / "workspace")
    assert "bad.jsonl, line 4, messages: message 1: the role ('wizard') must be one of" in output


def texts_of(project: Path, rows: list[dict], *, name: str, workspace: Path) -> list[str]:
    (project / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = project / f"{name}.toml"
    recipe.write_text(RECIPE.replace("chat.jsonl", f"{name}.jsonl").replace('split = "test"', 'split = "train"'))
    recipe.write_text(recipe.read_text().replace('[evaluation]\nsplit = "train"\n', ""))
    fuseline("ingest", "corpus", recipe, "-w", workspace)
    return Workspace.open(workspace).sql("SELECT doc_id, string_agg(text, '' ORDER BY segment) AS t FROM texts GROUP BY 1")["t"].to_list()


def test_rows_that_differ_in_their_keys_and_types_are_read_as_what_they_are(project, tmp_path):
    """`datasets` makes JSON text of whatever differs from row to row."""
    rows = [
        {"messages": each["messages"], "split": split} for each, split in zip(conversations()[:6], ["test"] + ["train"] * 5, strict=True)
    ]
    expected = texts_of(project, rows, name="plain", workspace=tmp_path / "plain")
    rows[2] = {"split": "train", "messages": [{**message, "weight": 1} for message in rows[2]["messages"]]}
    parts = [{"type": "text", "text": rows[3]["messages"][0]["content"]}]
    rows[3] = {"split": "train", "messages": [{"role": "user", "content": parts}, *rows[3]["messages"][1:]], "id": 3}
    assert sorted(texts_of(project, rows, name="differ", workspace=tmp_path / "differ")) == sorted(expected)
    rows[4]["messages"][0]["content"] = 42
    (project / "number.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = project / "number.toml"
    recipe.write_text(RECIPE.replace("chat.jsonl", "number.jsonl"))
    assert "number.jsonl, line 5, messages: message 1: the text is of type int" in refused(
        "ingest", "corpus", recipe, "-w", tmp_path / "number"
    )


def test_a_person_can_talk_with_a_model(project):
    folder = project / "models" / "smollm2"
    one = fuseline("chat", folder, "-m", "say <|im_end|> now", "--max-tokens", 8)
    assert one == fuseline("chat", folder, "-m", "say <|im_end|> now", "--max-tokens", 8)
    sampled = [fuseline("chat", folder, "-m", "go on", "--temperature", 1.5, "--seed", 3, "--max-tokens", 12) for _ in range(2)]
    assert sampled[0] == sampled[1]
    result = CliRunner().invoke(main, ["chat", str(folder), "--max-tokens", "4"], input="one\n\n/reset\ntwo\n")
    assert result.exit_code == 0
    assert result.stdout == "".join(fuseline("chat", folder, "-m", text, "--max-tokens", 4) for text in ("one", "two"))
    assert "must together be at most the model's context (512)" in refused("chat", folder, "-m", "x", "--max-tokens", 600)
    assert "There is no folder" in refused("chat", project / "nothing", "-m", "x")


def test_the_page_of_an_alignment_measures_the_answers_alone(project):
    """So a source's bits per byte through the map are those in its own tokens, as of plain text."""
    from fuseline.align.show import show_alignment

    workspace = Workspace.open(project / "workspace")
    doc_id = int(workspace.sql("SELECT min(doc_id) AS d FROM segments WHERE model = 'own' AND kind = 'distributions'")["d"][0])
    for alignment in ("other--pivot", "own--pivot"):
        summary = show_alignment(workspace, doc_id=doc_id, segment=None, alignment=alignment, vocabulary_map=None).summary
        assert summary.mapped_bpb == pytest.approx(summary.source_bpb, rel=0.03)
        assert summary.mapped_bytes == 1


@pytest.mark.parametrize("positions", ["cover", "span"])
def test_the_end_of_a_turn_has_the_sources_probability_of_it_alone(project, tmp_path, positions):
    """Not that of the turns that follow, which its own template writes otherwise."""
    recipe = project / f"{positions}.toml"
    chosen = f'[alignment]\npositions = "{positions}"\n[fusion]\nname = "fused-{positions}"\nmethod = "fixed"\nweights = {{ own = 1.0 }}\n'
    recipe.write_text(RECIPE.replace("[fusion]\n", chosen))
    for command in ("align", "fuse"):
        fuseline(command, recipe, "-w", project / "workspace")
    rows = Workspace.open(project / "workspace").sql(
        f"""SELECT t.doc_id, t.segment, sum(t.gold_logprob) AS fused, any_value(own) AS own FROM targets t JOIN (
                SELECT doc_id, segment, sum(gold_logprob) AS own FROM positions
                WHERE model = 'own' AND is_label AND gold_token = '<end_of_turn>' GROUP BY ALL) USING (doc_id, segment)
            WHERE name = 'fused-{positions}' AND is_label AND gold_token = '<|im_end|>' GROUP BY ALL"""
    )
    assert len(rows) > 5
    np.testing.assert_allclose(rows["fused"], rows["own"], rtol=0.02)


def test_a_template_that_never_ends_a_turn_is_refused_and_one_of_the_recipes_goes_with_the_model(project, tmp_path):
    endless = project / "endless.jinja"
    endless.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    recipe = project / "template.toml"
    recipe.write_text(
        RECIPE.replace("[corpus.chat]\n", "[corpus.chat]\ntemplate = 'endless.jinja'\n") + "[training]\nsequence_length = 256\n"
    )
    assert "would never learn to stop" in refused("ingest", "corpus", recipe, "-w", tmp_path / "endless")
    written = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    endless.write_text(written)
    for command in (["ingest", "corpus"], ["ingest", "distributions"], ["align"], ["fuse"], ["train", "--prepare"]):
        fuseline(*command, recipe, "-w", tmp_path / "workspace")
    job = TrainJob.load(tmp_path / "workspace" / "runs" / "fused")
    assert job.chat_template == written
    copy_tokenizer(job.model_folder, to=tmp_path, chat_template=job.chat_template)
    assert (tmp_path / "chat_template.jinja").read_text() == written
    assert (tmp_path / "tokenizer.json").read_text() == (job.model_folder / "tokenizer.json").read_text()


def test_a_source_that_is_to_read_another_template_is_of_other_inputs_to_the_status(project):
    recipe = project / "other-reading.toml"
    recipe.write_text(RECIPE.replace('chat_template = "own"\n', ""))
    shown = fuseline("status", recipe, "-w", project / "workspace", "--json")
    states = {(each["kind"], each["name"]): each["state"] for each in json.loads(shown)["wanted"]}
    assert states["distributions", "own"] == "different inputs"
    assert states["distributions", "other"] == "done"


def test_what_was_made_when_fewer_roles_were_read_is_kept(project, tmp_path):
    """As earlier versions, which did not read special_tokens_map.json."""
    folder = Path(shutil.copytree(project, tmp_path / "project"))
    for model, token in (("smollm2", "<|im_end|>"), ("llama-2", "</s>"), ("gemma-2", "<eos>")):
        (folder / "models" / model / "special_tokens_map.json").write_text(json.dumps({"pad_token": token}))
    assert Tokenizer.from_model_folder(folder / "models" / "smollm2").roles["pad"] is not None

    def states() -> dict[str, str]:
        shown = fuseline("status", folder / "chat.toml", "-w", folder / "workspace", "--json")
        return {each["kind"]: each["state"] for each in json.loads(shown)["wanted"] if each["name"] != "pivot--test"}

    made = {kind: states()[kind] for kind in ("corpus", "distributions", "vocab_maps", "alignments", "targets")}
    assert made == dict.fromkeys(made, "done")
    shutil.rmtree(folder / "workspace" / "distributions" / "pivot")
    assert states()["corpus"] == "done"  # its control tokens are still the target's
