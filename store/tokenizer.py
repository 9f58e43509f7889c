"""A stored tokenizer: its `tokenizer.json`, the bytes of each token, and the ids of tokens with a role.

The raw `tokenizer.json` is used, with the `tokenizers` library: `AutoTokenizer` of transformers 5 rebuilds some tokenizers with a different
pre-tokenizer (for Llama-2, 31 of 46 published test vectors match; with the raw file, all 46).

Text is data: control tokens that appear literally in a document (`</s>`, `<|endoftext|>`) are encoded as ordinary text.

Axes: V tokens of the vocabulary, T tokens of many segments, S segments.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import tokenizers
from numpy.typing import NDArray

from . import durable
from .arrays import id_dtype
from .equivalence import WORD_START, places_in_text
from .errors import DataError
from .model_files import check_model_files
from .model_json import LARGEST_MODEL_JSON
from .roles import ROLES, read_roles
from .tokenizer_limits import backend_of, panics_as_errors, require_quick, require_small_ids

BYTE_LEVEL_WORD_START = "Ġ"  # the same in byte-level BPE
NOT_LOSSLESS = "the tokens' bytes are not the text's: the tokenizer cannot represent this text"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_CONTROL_TOKEN = re.compile(r"<\|.*\|>|</?s>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """The bytes of each token. Special tokens, and ids without a token, have none."""

    buffer_B: NDArray[np.uint8]  # the bytes of all tokens, one after another
    offsets_V1: NDArray[np.int64]  # token v's bytes are buffer_B[offsets_V1[v] : offsets_V1[v + 1]]
    is_special_V: NDArray[np.bool_]  # control tokens: they never represent text

    @classmethod
    def from_list(cls, token_bytes: Sequence[bytes], *, is_special_V: NDArray[np.bool_]) -> Self:
        """Pack a list of byte strings."""
        lengths = np.fromiter(map(len, token_bytes), np.int64, len(token_bytes))
        return cls(np.frombuffer(b"".join(token_bytes), np.uint8), np.concatenate([[0], np.cumsum(lengths)]), is_special_V)

    @property
    def lengths_V(self) -> NDArray[np.int64]:
        """Number of bytes of each token."""
        return np.diff(self.offsets_V1)

    def __len__(self) -> int:
        return len(self.is_special_V)

    def __getitem__(self, token_id: int) -> bytes:
        return self.buffer_B[self.offsets_V1[token_id] : self.offsets_V1[token_id + 1]].tobytes()

    def to_list(self) -> list[bytes]:
        """The byte string of every token, by id."""
        data = self.buffer_B.tobytes()
        return [data[start:end] for start, end in pairwise(self.offsets_V1.tolist())]

    def concatenate(self, token_ids_T: NDArray[Any]) -> NDArray[np.uint8]:
        """The bytes of a sequence of tokens, one after another."""
        lengths_T = self.lengths_V[token_ids_T]
        starts_T = self.offsets_V1[:-1][token_ids_T]
        shift_T = starts_T - (np.cumsum(lengths_T) - lengths_T)
        return self.buffer_B[np.repeat(shift_T, lengths_T) + np.arange(lengths_T.sum())]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSegments:
    """Token ids of several segments, with the beginning-of-sequence token if the model was trained with one."""

    token_ids_T: NDArray[Any]  # uint16 or uint32
    segment_offsets: NDArray[np.int64]  # segment s is token_ids_T[segment_offsets[s] : segment_offsets[s + 1]]
    n_bytes_S: NDArray[np.int64]  # length of each segment's text in UTF-8
    is_lossless_S: NDArray[np.bool_]  # the tokens' bytes are the segment's, or an equivalent's (`equivalence`)
    # Byte offset in its segment at which each token ends, -1 for a bos before a dummy prefix; None if the tokens' lengths give it.
    byte_ends_T: NDArray[np.int32] | None = None

    def select(self, keep_S: NDArray[np.bool_]) -> "EncodedSegments":
        """Only the segments for which `keep_S` is true."""
        lengths_S = np.diff(self.segment_offsets)
        keep_T = np.repeat(keep_S, lengths_S)
        return EncodedSegments(
            token_ids_T=self.token_ids_T[keep_T],
            segment_offsets=np.concatenate([[0], np.cumsum(lengths_S[keep_S])]),
            n_bytes_S=self.n_bytes_S[keep_S],
            is_lossless_S=self.is_lossless_S[keep_S],
            byte_ends_T=None if self.byte_ends_T is None else self.byte_ends_T[keep_T],
        )


class Tokenizer:
    """Encodes text and knows the bytes of every token."""

    def __init__(self, definition: str, *, roles: dict[str, int | None], prepends_bos: bool) -> None:
        """Make it from the text of a `tokenizer.json`, the ids of the roles in `ROLES`, and whether sequences start with bos.

        Raises:
            DataError: the definition is not a tokenizer, or it loses text (WordPiece).
        """
        self.definition, self.roles, self.prepends_bos = definition, roles, prepends_bos
        self.backend = backend_of(definition)
        self.is_byte_level = "ByteLevel" in repr(self.backend.pre_tokenizer) + repr(self.backend.decoder)
        if not self.is_byte_level and not any(mark in definition for mark in (WORD_START, r"\u2581", '"Metaspace"')):
            raise DataError("The tokenizer must be byte-level or SentencePiece-style: one that loses text (WordPiece) cannot be aligned.")
        self._encode_control_tokens_as_text()

    def _encode_control_tokens_as_text(self) -> None:
        added = self.backend.get_added_tokens_decoder()
        of_role = {added[token_id].content for token_id in self.roles.values() if token_id in added}
        unmarked = [
            token.content
            for token in added.values()
            if not token.special and (token.content in of_role or _CONTROL_TOKEN.fullmatch(token.content))
        ]
        self.backend.add_special_tokens([tokenizers.AddedToken(content, special=True) for content in unmarked])
        self.backend.encode_special_tokens = True

    @classmethod
    def from_model_folder(cls, folder: Path, *, prepends_bos: bool | None = None) -> Self:
        """Read the tokenizer of a model in the Hugging Face format.

        Args:
            folder: holds `tokenizer.json` and usually `tokenizer_config.json`.
            prepends_bos: whether sequences start with bos; by default as in the model's own tokenizer.

        Raises:
            DataError: the folder holds no usable tokenizer.
        """
        check_model_files(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise DataError(f"{folder} has no tokenizer.json. Save the model's fast tokenizer into it (tokenizer.save_pretrained).")
        try:
            if path.stat().st_size > LARGEST_MODEL_JSON:
                raise DataError(f"tokenizer.json is larger than {LARGEST_MODEL_JSON >> 20} MiB.")
            tokenizer = cls(path.read_text(encoding="utf-8-sig"), roles=dict.fromkeys(ROLES), prepends_bos=False)
            require_quick(tokenizer.backend)
            with panics_as_errors():
                roles, starts_with_bos = read_roles(
                    folder, backend=tokenizer.backend, is_byte_level=tokenizer.is_byte_level, prepends_bos=prepends_bos
                )
            tokenizer.roles, tokenizer.prepends_bos = roles, starts_with_bos
            tokenizer._encode_control_tokens_as_text()
            _ = tokenizer.token_bytes  # every use needs it, and large ids make it impossible
        except (DataError, ValueError) as error:
            raise DataError(f"{folder}: {error}") from error
        if starts_with_bos and roles["bos"] is None:
            raise DataError(
                f"{folder}: texts must start with bos, but the tokenizer names no bos_token. Name it in tokenizer_config.json, or set "
                "prepends_bos = false in the recipe."
            )
        return tokenizer

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that determines how text becomes ids."""
        return tokenizer_digest(self.definition, roles=self.roles, prepends_bos=self.prepends_bos)

    def with_fewer_roles(self, digest: str) -> Self | None:
        """The same tokenizer with fewer roles, if it has the digest.

        Earlier versions read roles only from tokenizer_config.json. Their datasets are valid if text is read in the same way.
        """
        for kept in product([True, False], repeat=len(self.roles)):
            roles = {role: token_id if keeps else None for (role, token_id), keeps in zip(self.roles.items(), kept, strict=True)}
            if self.prepends_bos and roles["bos"] is None:
                continue
            if tokenizer_digest(self.definition, roles=roles, prepends_bos=self.prepends_bos) == digest:
                return type(self)(self.definition, roles=roles, prepends_bos=self.prepends_bos)
        return None

    @property
    def vocab_size(self) -> int:
        """The highest id plus one."""
        return len(self.token_bytes)

    @property
    def largest_id(self) -> int:
        """The highest id of text or bos. Some tokenizers have control tokens with higher ids, for which the model has no embedding."""
        of_text = int(np.flatnonzero(~self.token_bytes.is_special_V).max(initial=-1))
        bos = self.roles["bos"] if self.prepends_bos else None
        return of_text if bos is None else max(of_text, bos)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of every token of the vocabulary."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        require_small_ids(vocabulary)
        added = self.backend.get_added_tokens_decoder()
        table = [b""] * (max(vocabulary.values()) + 1)
        special_V = np.zeros(len(table), np.bool_)
        for token, token_id in vocabulary.items():
            if token_id in added and added[token_id].special:
                special_V[token_id] = True
            elif token_id in added and WORD_START not in token:
                table[token_id] = added[token_id].content.encode()
            else:
                table[token_id] = _byte_level_bytes(token) if self.is_byte_level else _sentencepiece_bytes(token)
        if self.roles["unk"] is not None:
            special_V[self.roles["unk"]], table[self.roles["unk"]] = True, b""
        return TokenBytes.from_list(table, is_special_V=special_V)

    @cached_property
    def pieces(self) -> list[str]:
        """The spelling of each token in the vocabulary (`Ġthe`, `▁the`, `<0x0A>`), by id; empty for ids without a token."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        table = [""] * self.vocab_size
        for piece in sorted(vocabulary):
            table[vocabulary[piece]] = piece
        return table

    @property
    def word_start(self) -> str:
        """The character that represents a space inside the pieces."""
        return BYTE_LEVEL_WORD_START if self.is_byte_level else WORD_START

    @cached_property
    def byte_fallback_ids(self) -> frozenset[int]:
        """The byte tokens, `<0xE2>`, with which SentencePiece writes a character that is not in its vocabulary."""
        if self.is_byte_level:
            return frozenset()
        return frozenset(token_id for token, token_id in self.backend.get_vocab().items() if _BYTE_TOKEN.fullmatch(token))

    @cached_property
    def has_dummy_prefix(self) -> bool:
        """Whether a space that is not in the text is added before its first word, as in SentencePiece."""
        ids = self.backend.encode("a", add_special_tokens=False).ids
        return b"".join(self.token_bytes[token_id] for token_id in ids) == b" a"

    @cached_property
    def rewrites(self) -> bool:
        """Whether some texts are read as equivalent ones (`equivalence`): composed, or with the space mark read as a space."""
        return self.encode_segments(["e\u0301", f"a{WORD_START}b"]).byte_ends_T is not None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens of any kind.

        Raises:
            DataError: a text is not valid Unicode.
        """
        try:
            with panics_as_errors():
                return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError:  # the library's only sign of a lone surrogate
            _require_unicode(texts)
            raise

    def encode_segments(self, texts: Sequence[str]) -> EncodedSegments:
        """Token ids of segments as the model reads them, and whether the tokens reproduce each segment's bytes."""
        bos_id = self.roles["bos"]
        bos = [bos_id] if self.prepends_bos and bos_id is not None else []
        ids = [bos + ids for ids in self.encode(texts)]
        offsets = np.concatenate([[0], np.cumsum([len(segment) for segment in ids])]).astype(np.int64)
        token_ids_T = np.fromiter((token for segment in ids for token in segment), id_dtype(self.vocab_size), int(offsets[-1]))
        texts_bytes = [text.encode() for text in texts]
        n_bytes_S = np.fromiter(map(len, texts_bytes), np.int64, len(texts))
        decoded = self.decode_segments(token_ids_T, segment_offsets=offsets, n_bytes_S=n_bytes_S)
        lossless_S = np.fromiter(map(bytes.__eq__, texts_bytes, decoded), np.bool_, len(texts))
        ends_T = None
        for s in np.flatnonzero(~lossless_S).tolist():
            start, end = offsets[s : s + 2]
            rewritten_ends_T = self._ends_in_rewritten(texts[s], token_ids_T[start:end])
            if rewritten_ends_T is not None:
                if ends_T is None:
                    ends_T = self.byte_ends(token_ids_T, segment_offsets=offsets, n_bytes_S=n_bytes_S, dummy_prefix=True).astype(np.int32)
                ends_T[start:end] = rewritten_ends_T
                lossless_S[s] = True
        return EncodedSegments(
            token_ids_T=token_ids_T, segment_offsets=offsets, n_bytes_S=n_bytes_S, is_lossless_S=lossless_S, byte_ends_T=ends_T
        )

    def _ends_in_rewritten(self, text: str, token_ids_T: NDArray[Any]) -> NDArray[np.int64] | None:
        """Byte offsets in a text at which the tokens of its equivalent end; None if the tokens do not form an equivalent."""
        rewritten = self.token_bytes.concatenate(token_ids_T).tobytes()
        for n_dummy in (0, 1) if self.has_dummy_prefix else (0,):
            places = places_in_text(text, rewritten=rewritten[n_dummy:])
            if places is not None:
                ends_T = np.cumsum(self.token_bytes.lengths_V[token_ids_T]) - n_dummy
                return np.where(ends_T < 0, -1, places[np.maximum(ends_T, 0)])
        return None

    def decode_segments(
        self, token_ids_T: NDArray[Any], *, segment_offsets: NDArray[np.int64], n_bytes_S: NDArray[np.int64]
    ) -> list[bytes]:
        """The text of each segment's tokens, in UTF-8."""
        data = self.token_bytes.concatenate(token_ids_T).tobytes()
        starts_S, ends_S = self._byte_spans(token_ids_T, segment_offsets=segment_offsets, n_bytes_S=n_bytes_S)
        return [data[start:end] for start, end in zip(starts_S.tolist(), ends_S.tolist(), strict=True)]

    def byte_ends(
        self, token_ids_T: NDArray[Any], *, segment_offsets: NDArray[np.int64], n_bytes_S: NDArray[np.int64], dummy_prefix: bool = False
    ) -> NDArray[np.int64]:
        """The byte offset in its segment at which each token ends (e_j and f_i of the method); 0 for a leading bos.

        With `dummy_prefix` it is -1 before a dummy prefix, which is not text: the token after a bos then starts with it.
        """
        starts_S, _ = self._byte_spans(token_ids_T, segment_offsets=segment_offsets, n_bytes_S=n_bytes_S)
        ends_T = np.cumsum(self.token_bytes.lengths_V[token_ids_T])
        return np.maximum(ends_T - np.repeat(starts_S, np.diff(segment_offsets)), -1 if dummy_prefix else 0)

    def _byte_spans(
        self, token_ids_T: NDArray[Any], *, segment_offsets: NDArray[np.int64], n_bytes_S: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each segment's text starts and ends in the concatenated bytes of its tokens.

        A dummy prefix adds one byte to the text. Some tokenizers omit it if the text itself starts with a space, so the lengths of each
        segment decide.
        """
        bounds = np.concatenate([[0], np.cumsum(self.token_bytes.lengths_V[token_ids_T])])[segment_offsets]
        starts_S, ends_S = bounds[:-1], bounds[1:]
        return starts_S + (self.has_dummy_prefix & (ends_S - starts_S == n_bytes_S + 1)), ends_S

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, `settings.json` and `token_bytes.parquet` (id, bytes, is_special), unless they exist."""
        if folder.exists():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with durable.temporary(folder) as temporary:
            temporary.mkdir()
            (temporary / "tokenizer.json").write_text(self.definition, encoding="utf-8")
            settings = {"roles": self.roles, "prepends_bos": self.prepends_bos}
            (temporary / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
            columns = {
                "token_id": range(self.vocab_size),
                "bytes": self.token_bytes.to_list(),
                "is_special": self.token_bytes.is_special_V,
            }
            schema = {"token_id": pl.UInt32, "bytes": pl.Binary, "is_special": pl.Boolean}
            durable.write_parquet(temporary / "token_bytes.parquet", pl.DataFrame(columns, schema=schema))
            with contextlib.suppress(FileExistsError):  # another worker was faster; the same digest means the same content
                durable.publish_new(temporary, to=folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        return cls((folder / "tokenizer.json").read_text(encoding="utf-8"), **settings)


def changed_reading(stored: Path, *, now: Tokenizer) -> str | None:
    """How a stored tokenizer with the same tokenizer.json was read differently, as a sentence; None if it is another tokenizer."""
    if not (stored / "settings.json").exists():
        return None
    before = Tokenizer.load(stored)
    if before.definition != now.definition or before.digest == now.digest:
        return None
    readings = [
        ", ".join([f"{role} {token_id}" for role, token_id in each.roles.items()] + ["bos before texts" if each.prepends_bos else "no bos"])
        for each in (before, now)
    ]
    as_before = Tokenizer(now.definition, roles=now.roles, prepends_bos=before.prepends_bos)
    is_about_bos = before.prepends_bos != now.prepends_bos and as_before.with_fewer_roles(before.digest) is not None
    keep = f"To keep the earlier reading, set prepends_bos = {str(before.prepends_bos).lower()} for the model in the recipe; or use"
    return (
        f"Earlier, fuseline read the tokenizer as ({readings[0]}). Now it reads it as ({readings[1]}). "
        f"{keep if is_about_bos else 'Use'} another --workspace."
    )


def tokenizer_digest(definition: str, *, roles: dict[str, int | None], prepends_bos: bool) -> str:
    """SHA-256 (hex) of the text of a `tokenizer.json` and its settings; it is the name of the tokenizer's folder."""
    settings = json.dumps([roles, prepends_bos], sort_keys=True)
    return hashlib.sha256(f"{settings}\n{definition}".encode()).hexdigest()


def _added_tokens(definition: str) -> list[dict[str, Any]]:
    """The `added_tokens` of a `tokenizer.json`, without parsing the vocabulary after them, which may take most of a second."""
    before, key, rest = definition.partition('"added_tokens":')
    if key and '"vocab"' not in before:
        return json.JSONDecoder().raw_decode(rest.lstrip())[0]
    return json.loads(definition).get("added_tokens", [])


def token_texts(folder: Path) -> list[str]:
    """The readable text of each token of a stored tokenizer, by id: bytes that are not UTF-8 are written `\\xe2`, special tokens as the
    tokenizer writes them."""
    special = {token["id"]: token["content"] for token in _added_tokens((folder / "tokenizer.json").read_text(encoding="utf-8"))}
    table = durable.read_parquet(folder / "token_bytes.parquet", columns=["bytes", "is_special"])
    return [
        special.get(token_id, "") if is_special else data.decode(errors="backslashreplace")
        for token_id, (data, is_special) in enumerate(table.iter_rows())
    ]


def _require_unicode(texts: Sequence[str]) -> None:
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"Text {index} of {len(texts)} is not valid Unicode ({error}). Correct or remove it.") from error


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (GPT-2): the byte itself if printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    return bytes(_ALPHABET[char] for char in token) if all(char in _ALPHABET for char in token) else token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(WORD_START, " ").encode()
