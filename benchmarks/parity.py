"""Our pieces against the outputs of the published FuseLLM code, case by case; exits with 1 if one differs.

    python benchmarks/parity.py FIXTURE.json.gz --source SOURCE/tokenizer.json --target TARGET/tokenizer.json
        [--source-piece ID=PIECE …] [--target-piece ID=PIECE …]

A case of the fixture holds `source_ids`, `target_ids`, `source_topk_ids`, `source_topk_logits`; and what the published code made of them:
`dtw_cost`, `dtw_target_to_source`, `vocab_map` (of spellings), `em_ids`, `em_logits`, `mined_ids`, `mined_logits`. A piece is given by hand
where the published code's tokenizer spelled an id in another way than the file does.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path

import numpy as np
from fuseline.align.dtw import Spellings
from fuseline.align.reference import nearest_pieces
from fuseline.store.roles import ROLES
from fuseline.store.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.published import align_published

_COLUMNS = ("path", "cost", "map", "em ids", "em logits", "mined ids", "mined logits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fixture", type=Path)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--source-piece", action="append", default=[])
    parser.add_argument("--target-piece", action="append", default=[])
    arguments = parser.parse_args()
    source, target = (read_tokenizer(path) for path in (arguments.source, arguments.target))
    source_pieces, target_pieces = (
        with_given([tokenizer.backend.id_to_token(token_id) or "" for token_id in range(tokenizer.vocab_size)], given)
        for tokenizer, given in ((source, arguments.source_piece), (target, arguments.target_piece))
    )
    marks = {"source_word_start": source.word_start, "target_word_start": target.word_start}
    mined_ids_V, distance_V = nearest_pieces(
        source_pieces, target_pieces=target_pieces, target_ids=target.backend.get_vocab(with_added_tokens=True), **marks
    )
    spelled_ids_V = np.where(distance_V == 0, mined_ids_V, -1).astype(np.int32)
    spellings = Spellings.of_pieces(source_pieces, target_pieces=target_pieces, **marks)
    respelled = {piece.replace(source.word_start, target.word_start): v for v, piece in enumerate(source_pieces)}

    cases = json.loads(gzip.decompress(arguments.fixture.read_bytes()))["cases"]
    print("| case | source tokens | target tokens |", *(f"{column} |" for column in _COLUMNS))
    print("|---" * (3 + len(_COLUMNS)) + "|")
    n_equal = 0
    for number, case in enumerate(cases):
        given = {
            "topk_ids_UK": np.array(case["source_topk_ids"]),
            "topk_logits_UK": np.array(case["source_topk_logits"]),
            "target_ids_T": np.array(case["target_ids"]),
            "spellings": spellings,
            "agreeing_ids_V": mined_ids_V,
        }
        source_ids_U = np.array(case["source_ids"])
        em = align_published(source_ids_U, match="em", entry_ids_V=spelled_ids_V, **given)
        mined = align_published(source_ids_U, match="mined", entry_ids_V=mined_ids_V, **given)
        runs = [
            list(range(first, last + 1)) for first, last in zip(mined.matches.first_T.tolist(), mined.matches.last_T.tolist(), strict=True)
        ]
        # The published map names lost tokens by a spelling that is not in the vocabulary.
        expected_map = {respelled.get(piece): target.backend.token_to_id(to) for piece, to in case["vocab_map"].items()}
        equal = (
            runs == case["dtw_target_to_source"],
            mined.matches.cost_S[0] == case["dtw_cost"],
            all(v is not None and mined_ids_V[v] == (-1 if w is None else w) for v, w in expected_map.items()),
            em.ids == case["em_ids"],
            em.logits == case["em_logits"],
            mined.ids == case["mined_ids"],
            mined.logits == case["mined_logits"],
        )
        n_equal += all(equal)
        print(f"| {number} | {len(source_ids_U)} | {len(case['target_ids'])} |", *(f"{'equal' if one else 'DIFFERS'} |" for one in equal))
    print(f"\n{n_equal} of {len(cases)} cases are equal in everything")
    sys.exit(n_equal != len(cases))


def read_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path.read_text(encoding="utf-8"), roles=dict.fromkeys(ROLES), prepends_bos=False)


def with_given(pieces: list[str], given: list[str]) -> list[str]:
    """The pieces with those in place that are given as ID=PIECE; another token spelled so gives up its spelling."""
    by_id = dict(entry.split("=", 1) for entry in given)
    changed = ["" if piece in by_id.values() else piece for piece in pieces]
    for token_id, piece in by_id.items():
        changed[int(token_id)] = piece
    return changed


if __name__ == "__main__":
    main()
