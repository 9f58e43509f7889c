"""Reads real tokenizers: which family, what of a corpus they read without loss, and whether they give published token ids.

    python benchmarks/real_tokenizers.py FOLDER --texts corpus.parquet [--vectors DIR] [--expect llama2=ggml-vocab-llama-spm.gguf …]

FOLDER holds a folder with tokenizer.json for each tokenizer. DIR holds llama.cpp's test vectors, pairs of files NAME.inp and NAME.out;
--expect says which are whose. Exits with 1 if an id differs, or if a tokenizer turns text into a control token.
"""

import argparse
import sys
from pathlib import Path

import polars as pl
from fuseline.store.errors import DataError
from fuseline.store.tokenizer import Tokenizer

HARD = [
    "</s> <s> <unk> <|endoftext|> <|im_start|> <bos> <eos> <pad> [UNK]", "a▁b", "e\u0301 \u212b 각", "ﬁ ½", "\0\x01\x7f",
    "x\r\ny\n\n\n z\t\t", "  two  spaces  ", "👩‍👩‍👧‍👦🇨🇭", "漢字かな交じり文", "مرحبا بالعالم", "\u200b\ufeff\u00a0\u3000", "Ġ Ċ <0x41>",
    "1234567890" * 5, "",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=Path, required=True, help="Parquet with a column `text`")
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--expect", nargs="*", default=[], metavar="TOKENIZER=VECTORS")
    arguments = parser.parse_args()
    if arguments.expect and arguments.vectors is None:
        parser.error("--expect needs --vectors")
    texts = pl.read_parquet(arguments.texts)["text"].head(200).to_list()
    expected = dict(pair.split("=", 1) for pair in arguments.expect)
    rows, failed = [], False
    for folder in sorted(path for path in arguments.folder.iterdir() if (path / "tokenizer.json").exists()):
        row: dict[str, object] = {"tokenizer": folder.name}
        try:
            tokenizer = Tokenizer.from_model_folder(folder)
        except DataError as error:
            rows.append(row | {"family": f"refused: {str(error).rpartition(': ')[2]}"})
            continue
        read, hard = (tokenizer.encode_segments(part) for part in (texts, HARD))
        readable = hard.select(hard.is_lossless_S)
        controls = tokenizer.token_bytes.is_special_V[readable.token_ids_T].sum() - len(readable.n_bytes_S) * tokenizer.prepends_bos
        row |= {
            "vocabulary": tokenizer.vocab_size,
            "family": ("byte-level" if tokenizer.is_byte_level else "SentencePiece") + ", bos" * tokenizer.prepends_bos
            + ", dummy prefix" * tokenizer.has_dummy_prefix,
            "corpus read": float(read.is_lossless_S.mean()),
            "hard texts read": f"{hard.is_lossless_S.sum()} of {len(HARD)}",
            "control tokens": int(controls),
        }  # fmt: skip
        failed |= controls > 0
        if folder.name in expected:
            right, n = compare(tokenizer, arguments.vectors / expected[folder.name])
            row["published ids"] = f"{right} of {n}"
            failed |= right < n
        rows.append(row)
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=220, fmt_str_lengths=90):
        print(pl.DataFrame(rows, infer_schema_length=None))
    return int(failed)


def compare(tokenizer: Tokenizer, vectors: Path) -> tuple[int, int]:
    """How many of a file's texts get their published ids, and how many there are."""
    given = Path(f"{vectors}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    wanted = [[int(token) for token in line.split()] for line in Path(f"{vectors}.out").read_text(encoding="utf-8").splitlines()]
    return sum(ids == line for ids, line in zip(tokenizer.encode(given), wanted, strict=True)), len(given)


if __name__ == "__main__":
    sys.exit(main())
