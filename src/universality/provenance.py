"""Which source files a stage's results depend on: the closure of its command module under import.

Snakemake gets one hash over these files as a parameter of the stage's rules, DVC the files themselves as dependencies,
so an edited module reruns exactly the stages that use it, whatever git does to modification times.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "universality"
LOCK = "requirements.lock"  # the pinned libraries are part of what makes a result


@cache
def source_files(source: Path, module: str) -> tuple[Path, ...]:
    """Files under `source` (the folder that holds the package) that `module` imports, directly or not, sorted.

    Imports inside functions count; a module's packages count too, since importing it runs them.
    """
    seen: set[Path] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = _file(source, ".".join(parts[:end]))
            if path is not None and path not in seen:
                seen.add(path)
                waiting += _imports(path, path.read_bytes())
    return tuple(sorted(seen))


def code_hash(root: Path, module: str, extra: tuple[str, ...] = ()) -> str:
    """16 hexadecimal digits over names and contents of the module's source files, `extra` files and the lock file."""
    digest = hashlib.sha256()
    for path in (*source_files(root / "src", module), *(root / name for name in (*extra, LOCK))):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def running_code(module: str) -> str:
    """Hash of the source files of `module` as they are installed and running."""
    digest = hashlib.sha256()
    for path in source_files(Path(__file__).parents[1], module):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache  # closures overlap: without these caches most files are looked up and parsed several times a reading of rules
def _file(source: Path, name: str) -> Path | None:
    base = source.joinpath(*name.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


@cache
def _imports(path: Path, content: bytes) -> list[str]:
    names = []
    for node in _import_statements(content):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(f"{path}: {ast.unparse(node)}: relative; write the full name, which can be followed")
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.split(".")[0] == PACKAGE]


_IMPORT = re.compile(rb"^[ \t]*(from[ \t]+[\w.]+[ \t]+import[ \t]*(?:\([^)]*\)|[^\n(]+)|import[ \t][^\n]+)", re.M)
_WITHIN_A_LINE = rb"[:;][ \t]*(?:from|import)[ \t]"
_OVER_TWO_LINES = rb"^[ \t]*(?:from|import)[ \t][^\n]*\\$"
_NOT_SEEN = re.compile(_WITHIN_A_LINE + b"|" + _OVER_TWO_LINES, re.M)


def _import_statements(content: bytes) -> list[ast.stmt]:
    """All of a file, and perhaps some that its texts quote.

    Every reading of the rules and every job looks for them, and parsing whole files takes ten times as long: that is
    for files in which a line only looks like an import.
    """
    try:
        if not _NOT_SEEN.search(content):
            return [statement for found in _IMPORT.findall(content) for statement in ast.parse(found).body]
    except SyntaxError:
        pass
    return list(_statements(ast.parse(content)))


def _statements(block: ast.AST) -> Iterator[ast.stmt]:
    """All statements in a block; most of a syntax tree is expressions, which import nothing."""
    for node in ast.iter_child_nodes(block):
        if isinstance(node, ast.stmt):
            yield node
        if isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _statements(node)
