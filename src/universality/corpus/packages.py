"""Harvest an installed package without importing it: its docstrings, or its code without them, from syntax trees."""

import ast
import importlib.util
import inspect
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from universality.errors import StudyError

Definition: TypeAlias = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_DOCUMENTED = (ast.Module, *_DEFINITIONS)


class _Module(NamedTuple):
    """A file of a package: its dotted name, its bytes, its syntax tree."""

    name: str
    source: bytes
    tree: ast.Module


def docstrings(package: str, key: str) -> Iterator[tuple[str, str]]:
    """(dotted name, cleaned docstring) of every module, class and function of `package`, sorted by file, then line.

    Raises StudyError naming `key` when no such package is installed. Files that are not valid Python (templates) are
    passed over.
    """
    for module in _modules(package, key):
        for node, name in _walk(module):
            text = ast.get_docstring(node, clean=False) if isinstance(node, _DOCUMENTED) else None
            if text:
                yield name, inspect.cleandoc(text)


def source_code(package: str, key: str) -> Iterator[tuple[str, str]]:
    """(dotted name, source text) of every function and class of `package` that is in no other, in the same order.

    The text has comments, decorators and all that is defined within, but no docstrings. Raises as `docstrings` does.
    """
    for module in _modules(package, key):
        text = _Text(module.source)
        for node, name in _walk(module, into_definitions=False):
            if isinstance(node, _DEFINITIONS):
                yield name, text.without_docstrings(node)


def _modules(package: str, key: str) -> Iterator[_Module]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise StudyError(f"{key}.packages: {package!r} is not an installed package")
    root = Path(spec.submodule_search_locations[0])
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts):
        source = path.read_bytes()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            continue
        parts = path.relative_to(root).with_suffix("").parts
        yield _Module(".".join((package, *(p for p in parts if p != "__init__"))), source, tree)


def _walk(module: _Module, into_definitions: bool = True) -> Iterator[tuple[ast.AST, str]]:
    """Statements in the order of the file, each with the dotted name of what it is or is part of.

    Expressions are not entered: they hold no definitions and can nest deeply.
    """
    waiting: list[tuple[ast.AST, str]] = [(module.tree, module.name)]
    while waiting:
        node, name = waiting.pop()
        yield node, name
        if isinstance(node, _DEFINITIONS) and not into_definitions:
            continue
        inner = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
        named = [(child, f"{name}.{child.name}" if isinstance(child, _DEFINITIONS) else name) for child in inner]
        waiting += reversed(named)


class _Text:
    """A file's text in UTF-8, in which a syntax tree tells places by line and byte."""

    def __init__(self, source: bytes):
        self._text = importlib.util.decode_source(source).encode()
        self._lines = [0]  # where each begins
        for line in self._text.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def without_docstrings(self, node: Definition) -> str:
        """The definition from its decorators on, not indented."""
        first = min(part.lineno for part in (node, *node.decorator_list))
        kept, start = [], self._lines[first - 1]
        for left, right in self._docstrings(node):
            kept.append(self._text[start:left])
            start = right
        kept.append(self._text[start : self._end(node)])
        return textwrap.dedent(b"".join(kept).decode()).strip("\n")

    def _docstrings(self, node: Definition) -> list[tuple[int, int]]:
        """Where the docstrings of a definition and of those within it begin and end; whole lines, if they fill them."""
        found = []
        for inner in ast.walk(node):
            if isinstance(inner, _DEFINITIONS) and ast.get_docstring(inner, clean=False) is not None:
                statement = inner.body[0]
                line = self._lines[statement.lineno - 1]
                start, end = line + statement.col_offset, self._end(statement)
                rest = self._text[end : self._lines[statement.end_lineno or 0]]
                alone = not self._text[line:start].strip() and not rest.strip()
                found.append((line, end + len(rest)) if alone else (start, end))
        return sorted(found)

    def _end(self, node: ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._lines[node.end_lineno - 1] + node.end_col_offset
