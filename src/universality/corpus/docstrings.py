"""Harvest the docstrings of an installed package without importing it: parse its files, walk their syntax trees."""

import ast
import importlib.util
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path

from universality.errors import StudyError

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def harvest(package: str) -> Iterator[tuple[str, str]]:
    """(dotted name, cleaned docstring) of every module, class and function of `package`, sorted by file, then line.

    Raises StudyError when no such package is installed. Files that are not valid Python (templates) are passed over.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise StudyError(f"corpus.documents.source.packages: {package!r} is not an installed package")
    root = Path(spec.submodule_search_locations[0])
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            continue
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join((package, *(p for p in parts if p != "__init__")))
        yield from _walk(tree, module)


def _walk(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """Docstrings in the order of the file. Only statements are entered: expressions hold none and can nest deeply."""
    waiting: list[tuple[ast.AST, str]] = [(tree, module)]
    while waiting:
        node, name = waiting.pop()
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield name, inspect.cleandoc(text)
        inner = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
        named = [(child, f"{name}.{child.name}" if isinstance(child, _DOCUMENTED[1:]) else name) for child in inner]
        waiting += reversed(named)
