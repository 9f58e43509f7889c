"""Published chat templates with their real tokenizers: are conversations read as transformers reads them, and how fast.

    python benchmarks/chat_templates.py CONVERSATIONS MODEL[=TEMPLATE.jinja] …

CONVERSATIONS is a file with a column `messages` (recipes/chat-corpus/chat.parquet). A MODEL is a folder with tokenizer.json and
tokenizer_config.json; its own chat template is taken unless a file is named. Of each: the conversations that the template takes; those
whose tokens are the ones that transformers' tokenizer makes of the rendered text; those of which also all is trained on that the assistant
wrote, and nothing else, to the byte; and conversations and tokens a second of one core.
"""

import argparse
from pathlib import Path

import numpy as np
import polars as pl
from fuseline.ingest.chat.conversations import Conversation, read_messages
from fuseline.ingest.chat.reader import ConversationsReader
from fuseline.ingest.chat.template import ChatTemplate, RefusedConversation
from fuseline.store.tokenizer import Tokenizer
from timer import timer
from transformers import PreTrainedTokenizerFast


def measure(folder: Path, *, source: str | None, conversations: list[Conversation]) -> dict[str, object]:
    tokenizer = Tokenizer.from_model_folder(folder)
    template = ChatTemplate.of_model(folder, tokenizer=tokenizer, date="2024-07-26", source=source)
    assert template is not None, f"{folder} has no chat template"
    reader = ConversationsReader(tokenizer, template=template, rendering="shared")
    reader.encode([template.render(conversations[0])])  # what is made once
    rendered, taken = [], []
    with timer() as rendering:
        for conversation in conversations:
            try:
                rendered.append(template.render(conversation))
                taken.append(conversation)
            except RefusedConversation:
                continue
    with timer() as reading:
        read = reader.encode(rendered)
    hugging_face = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    offsets, ends_T = read.segments.segment_offsets, read.segments.byte_ends_T
    same = exact = 0
    for s, text in enumerate(rendered):
        rows = slice(offsets[s], offsets[s + 1])
        same += read.segments.token_ids_T[rows].tolist() == hugging_face(text.text, add_special_tokens=False)["input_ids"]
        ends = [0, *ends_T[rows].tolist()]
        labels = np.flatnonzero(read.label_mask_T[rows]) + 1
        said = b"".join(text.text.encode()[ends[j] : ends[j + 1]] for j in labels.tolist())
        exact += said == "".join(text.text[start:end] for start, end in text.assistant_spans).encode()
    return {
        "model": folder.name,
        "end of turn": template.end_of_turn,
        "taken": f"{len(rendered)} of {len(conversations)}",
        "tokens of transformers": f"{same} of {len(rendered)}",
        "exact masks": f"{exact} of {len(rendered)}",
        "rendered a second": round(len(conversations) / rendering.wall),
        "tokens read a second": round(int(offsets[-1]) / reading.wall),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args()
    conversations = [read_messages(messages) for messages in pl.read_parquet(arguments.conversations)["messages"].to_list()]
    rows = []
    for named in arguments.models:
        folder, _, template = named.partition("=")
        source = Path(template).read_text(encoding="utf-8") if template else None
        rows.append(measure(Path(folder), source=source, conversations=conversations))
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=200, tbl_formatting="MARKDOWN", tbl_hide_column_data_types=True):
        print(pl.DataFrame(rows))


if __name__ == "__main__":
    main()
