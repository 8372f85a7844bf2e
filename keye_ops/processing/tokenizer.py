"""The checkpoint's tokenizer, read through the ``tokenizers`` package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keye_ops.json_file import read_json
from keye_ops.processing.config import existing_folder

_END_OF_TEXT = "<|endoftext|>"


class KeyeTokenizer:
    """Text to token ids and back.

    Build it with :meth:`from_pretrained`.
    """

    def __init__(self, backend: Any, source: str, pad_token: str = _END_OF_TEXT) -> None:
        self._backend = backend
        self._source = source
        self.pad_token = pad_token

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> KeyeTokenizer:
        """Read ``tokenizer.json`` of a checkpoint folder.

        Tokens that only ``tokenizer_config.json`` lists are added.

        Raises:
            FileNotFoundError: the folder or ``tokenizer.json`` is missing.
            ValueError: an unreadable file, or a listed token whose id is not the next free one.
            ImportError: the ``tokenizers`` package is missing.
        """
        folder = existing_folder("KeyeTokenizer.from_pretrained", folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"KeyeTokenizer.from_pretrained: no such file: {path}")
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(
                'tokenizing needs the tokenizers package: pip install "keye-ops[model]"'
            ) from error
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path}: cannot be read as a tokenizer ({error})") from error
        # Length limits belong to a training setup; a prompt must never be cut silently.
        backend.no_truncation()
        backend.no_padding()
        settings_path = folder / "tokenizer_config.json"
        settings = read_json(settings_path) if settings_path.exists() else {}
        _add_listed_tokens(backend, settings.get("added_tokens_decoder") or {}, settings_path)
        pad = settings.get("pad_token") or _END_OF_TEXT
        return cls(backend, str(path), pad["content"] if isinstance(pad, dict) else pad)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added in front or behind."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. Ids that the tokenizer does not have are left out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int:
        """Id of one token by its name.

        Raises:
            ValueError: the tokenizer has no such token.
        """
        index = self._backend.token_to_id(token)
        if index is None:
            raise ValueError(f"KeyeTokenizer.token_id: {self._source} has no token {token!r}")
        return index

    @property
    def pad_token_id(self) -> int:
        """Id of the padding token."""
        return self.token_id(self.pad_token)


def _add_listed_tokens(backend: Any, listed: dict[str, dict], path: Path) -> None:
    from tokenizers import AddedToken

    for wanted, fields in sorted(listed.items(), key=lambda item: int(item[0])):
        content = fields["content"]
        if backend.token_to_id(content) is None:
            flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
            token = AddedToken(content, **{f: fields[f] for f in flags if f in fields})
            special = fields.get("special", False)
            (backend.add_special_tokens if special else backend.add_tokens)([token])
        if backend.token_to_id(content) != int(wanted):
            raise ValueError(
                f"{path}: token {content!r} must have id {wanted}, "
                f"tokenizer.json gives {backend.token_to_id(content)}"
            )
