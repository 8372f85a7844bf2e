"""C++ source as tokens: enough of the language to tell code from comments and strings."""

from __future__ import annotations

import re
from dataclasses import dataclass

# NOTE: >> and >>> are no tokens here: they may close template parameter lists.
KINDS = {
    "space": r"\s+",
    "comment": r"//(?:[^\\\n]|\\[\s\S])*|/\*[\s\S]*?\*/",
    "directive": r"(?m:^)[ \t]*\#(?:[^\\\n/]|\\[\s\S]|/(?![/*])|/\*[\s\S]*?\*/)*",
    "string": r'\w*R"(?P<mark>[^()\s]*)\([\s\S]*?\)(?P=mark)"|\w*"(?:[^"\\\n]|\\[\s\S])*"'
    r"|(?:\b[uUL]|u8)?'(?:[^'\\\n]|\\[\s\S])+'",
    "number": r"\.?\d(?:[eEpP][+-]|'?\w|\.)*",
    "word": r"[A-Za-z_]\w*",
    "operator": r"<<<|<<=|>>=|->\*?|\+\+|--|<<|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|::|\.\.\.|[^\s\w]",
}
TOKEN = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in KINDS.items()))


@dataclass(frozen=True)
class Token:
    """One token: its kind (a key of KINDS), its text and where it begins."""

    kind: str
    text: str
    begin: int

    @property
    def end(self) -> int:
        """Where the text goes on behind the token."""
        return self.begin + len(self.text)


def tokenize(text: str) -> list[Token]:
    """Cut text into tokens; nothing is left out but space and comments."""
    found = ((match, match.lastgroup) for match in TOKEN.finditer(text))
    tokens = []
    for match, kind in found:
        # The group inside of a raw string is the last that matched.
        kind = "string" if kind == "mark" else kind
        if kind not in ("space", "comment"):
            tokens.append(Token(kind, match[0], match.start()))
    return tokens


def line_number(text: str, offset: int) -> int:
    """The line, counted from 1, of an offset."""
    return text.count("\n", 0, offset) + 1
