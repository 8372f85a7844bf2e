"""Small faults to plant in a C++ source, found by its tokens.

The sources are formatted by clang-format: a binary operator has spaces around it, and what opens or
closes a template argument list has none before it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from cpp_lexer import Token, line_number, tokenize

BINARY = {
    "relational": {
        "<": ("<=", ">="),
        "<=": ("<", ">"),
        ">": (">=", "<="),
        ">=": (">", "<"),
        "==": ("!=",),
        "!=": ("==",),
    },
    "arithmetic": {"+": ("-",), "-": ("+",), "*": ("+",), "/": ("*",), "%": ("/",)},
    "logical": {"&&": ("||",), "||": ("&&",)},
    "bitwise": {"&": ("|",), "|": ("&",), "^": ("|",), "<<": (">>",)},
    "assignment": {
        "+=": ("-=",),
        "-=": ("+=",),
        "*=": ("/=",),
        "/=": ("*=",),
        "%=": ("/=",),
        "&=": ("|=",),
        "|=": ("&=",),
        "^=": ("|=",),
        "<<=": (">>=",),
        ">>=": ("<<=",),
    },
    # Always the first, or the second unless the condition has a || in it.
    "condition": {"?": ("|| true ?", "&& false ?")},
}
EXTREMES = {"min": "max", "max": "min", "fminf": "fmaxf", "fmaxf": "fminf"}
# What follows them in parentheses has no effect on the host, or only on whether it compiles.
DECLARATIONS = ("static_assert", "alignas", "__attribute__", "__launch_bounds__", "KEYE_KERNEL")
# Calls that only tell the compiler what to hold in registers.
HINTS = ("forget", "forget_unpacked")
KEYWORDS = ("return", "if", "for", "while", "switch", "else", "do", "using", "case", "sizeof")
CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Mutation:
    """A replacement of text[begin:end], and the operator that made it."""

    operator: str
    begin: int
    end: int
    replacement: str

    def apply(self, text: str) -> str:
        """The source with the fault, and as many lines as before."""
        lines = text.count("\n", self.begin, self.end) - self.replacement.count("\n")
        return text[: self.begin] + self.replacement + "\n" * lines + text[self.end :]

    def line(self, text: str) -> int:
        """The line of the fault."""
        return line_number(text, self.begin)

    def diff(self, text: str) -> str:
        """The lines that change, before and after."""
        lines = difflib.unified_diff(text.splitlines(), self.apply(text).splitlines(), n=0)
        return "\n".join(line for line in list(lines)[3:] if not line.startswith("@@"))


class Source:
    """A source and its tokens: which bracket closes which, and which tokens to leave alone."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = tokenize(text)
        self.closing = dict(self._brackets())
        self.skipped = set(self._skipped())

    def at(self, index: int) -> str:
        """The text of a token, or nothing past either end."""
        return self.tokens[index].text if 0 <= index < len(self.tokens) else ""

    def is_binary(self, token: Token) -> bool:
        """Whether an operator stands between two operands."""
        return self.text[token.begin - 1].isspace() and self.text[token.end : token.end + 1] in (
            " ",
            "\n",
        )

    def is_shift(self, index: int) -> bool:
        """Whether two > make a shift to the right."""
        first, second = self.tokens[index], self.tokens[index + 1]
        spaced = self.text[first.begin - 1].isspace() and self.text[second.end].isspace()
        return spaced and second.text == ">" and first.end == second.begin

    def is_declarator(self, index: int) -> bool:
        """Whether a [ belongs to a declaration: T x[N], T (&x)[N]."""
        before, word = self.at(index - 1), self.tokens[index - 1].kind == "word"
        if before == ")":
            opening = next(i for i, j in self.closing.items() if j == index - 1)
            return self.at(opening + 1) in ("&", "*")
        if before == "]":
            opening = next(i for i, j in self.closing.items() if j == index - 1)
            return self.is_declarator(opening)
        earlier = self.tokens[index - 2] if index >= 2 else None
        if not word or earlier is None or earlier.text in KEYWORDS:
            return False
        if earlier.text == ",":  # float x[N], y[N]: after a declarator, not after an argument
            return self._declares_several(index - 2)
        return earlier.kind == "word" or (
            earlier.text in ("*", "&", ">") and not self.is_binary(earlier)
        )

    def _declares_several(self, comma: int) -> bool:
        index = comma - 1
        while index >= 0 and self.at(index) not in (";", "{", "}", "(", ",", "="):
            if self.at(index) == "[" and self.is_declarator(index):
                return True
            index -= 1
        return self.at(index) == "," and self._declares_several(index)

    def _brackets(self) -> Iterator[tuple[int, int]]:
        stack: list[int] = []
        for index, token in enumerate(self.tokens):
            if token.kind != "operator":
                continue
            if token.text in CLOSING:
                stack.append(index)
            elif stack and token.text == CLOSING[self.at(stack[-1])]:
                yield stack.pop(), index

    def template_end(self, index: int) -> int | None:
        """The > of a < that opens template parameters or arguments; None for a comparison."""
        if self.at(index - 1) != "template" and self.is_binary(self.tokens[index]):
            return None
        depth = 0
        while index < len(self.tokens) and self.at(index) not in (";", "{"):
            if self.at(index) in ("(", "["):
                index = self.closing.get(index, index)
            depth += {"<": 1, ">": -1}.get(self.at(index), 0)
            if depth == 0:
                return index
            index += 1
        return None

    def _skipped(self) -> Iterator[int]:
        for index, token in enumerate(self.tokens):
            end = index if token.kind in ("directive", "string") else None
            if token.text == "<" and token.kind == "operator":
                end = self.template_end(index)
            elif token.text in DECLARATIONS and self.at(index + 1) == "(":
                end = self.closing.get(index + 1)
            elif token.text == "[" and index and self.is_declarator(index):
                end = self.closing.get(index)
            elif token.text == "operator":
                end = index + 1
            elif token.text in ("using", "namespace", "friend"):
                end = next(i for i in range(index, len(self.tokens)) if self.at(i) in (";", "{"))
            if end is not None:
                yield from range(index, end + 1)


def mutations(text: str) -> list[Mutation]:
    """Every mutation of a source, in order of place."""
    source = Source(text)
    found = [*_tokens(source), *_conditions(source), *_calls(source), *_indices(source)]
    return sorted(found, key=lambda each: (each.begin, each.end, each.replacement))


def _tokens(source: Source) -> Iterator[Mutation]:
    in_for = {
        inside
        for index, token in enumerate(source.tokens)
        if token.text == "for" and index + 1 in source.closing
        for inside in range(index, source.closing[index + 1])
    }
    for index, token in enumerate(source.tokens):
        if index in source.skipped:
            continue

        def replace(operator: str, *texts: str, token: Token = token) -> Iterator[Mutation]:
            for text in texts:
                yield Mutation(operator, token.begin, token.end, text)

        before, after = source.at(index - 1), source.at(index + 1)
        if token.kind == "number":
            yield from replace("constant", *_neighbours(token.text))
        elif token.text in EXTREMES and after in ("(", "<"):
            yield from replace("extreme", EXTREMES[token.text])
        elif token.text in ("++", "--") and index not in in_for:
            yield from replace("assignment", "--" if token.text == "++" else "++")
        elif token.text == after == ">" and source.is_shift(index):
            yield Mutation("bitwise", token.begin, token.end + 1, "<<")
        elif token.kind == "operator" and source.is_binary(token):
            for operator, replacements in BINARY.items():
                yield from replace(operator, *replacements.get(token.text, ()))
        elif token.text in ("!", "~") or (token.text == "-" and not _ends_operand(before)):
            yield from replace("unary", "")


def _neighbours(number: str) -> tuple[str, str]:
    plain = re.fullmatch(r"(\d+)([uUlLzZ]*)", number)
    if plain is None:
        return f"({number} + 1)", f"({number} - 1)"
    value = int(plain[1])
    return f"{value + 1}{plain[2]}", f"{value - 1}{plain[2]}"


def _ends_operand(text: str) -> bool:
    return text in (")", "]") or (re.fullmatch(r"[\w.']+", text) is not None and text != "return")


def _conditions(source: Source) -> Iterator[Mutation]:
    for index, token in enumerate(source.tokens):
        opening = index + (2 if source.at(index + 1) == "constexpr" else 1)
        if token.text not in ("if", "while") or opening not in source.closing:
            continue
        begin = source.tokens[opening].end
        end = source.tokens[source.closing[opening]].begin
        # NOTE: a loop that never ends says nothing that the time limit has not said before.
        for text in ("true", "false") if token.text == "if" else ("false",):
            yield Mutation("condition", begin, end, text)


def _calls(source: Source) -> Iterator[Mutation]:
    """Statements that are one call: barriers, waits, fences, stores."""
    headers = {
        source.closing[index + 1 + (source.at(index + 1) == "constexpr")]
        for index, token in enumerate(source.tokens)
        if token.text in ("if", "for", "while")
        and index + 1 + (source.at(index + 1) == "constexpr") in source.closing
    }
    for start, token in enumerate(source.tokens):
        previous = source.tokens[start - 1] if start else token
        begins = previous.text in ("{", "}", ";", "else") or previous.kind == "directive"
        if not (begins or start - 1 in headers) or token.kind != "word":
            continue
        if token.text in KEYWORDS or token.text in DECLARATIONS:
            continue
        index, called = start + 1, False
        while source.at(index) != ";":
            if source.at(index) == "(" and source.at(index - 1) in HINTS:
                called = False
                break
            if source.at(index) in (".", "->", "::"):
                index, called = index + 2, False
            elif source.at(index) == "<" and (end := source.template_end(index)) is not None:
                index = end + 1
            elif source.at(index) in ("(", "[") and index in source.closing:
                called = source.at(index) == "("
                index = source.closing[index] + 1
            else:
                called = False
                break
        if called:
            yield Mutation("call", token.begin, source.tokens[index].end, ";")


def _indices(source: Source) -> Iterator[Mutation]:
    for index, closing in source.closing.items():
        if source.at(index) != "[" or index in source.skipped or closing == index + 1:
            continue
        if not _ends_operand(source.at(index - 1)):
            continue
        begin, end = source.tokens[index].end, source.tokens[closing].begin
        yield Mutation("index", begin, end, f"({source.text[begin:end]}) + 1")
