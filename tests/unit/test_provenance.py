import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from universality.provenance import _imports, code_hash, source_files
from universality.study.dvc import STAGES

ROOT = Path(__file__).parents[2]
MODULES = sorted({f"{stage.package}.{module}" for stage in STAGES for module in stage.modules})


# Each module in a process of its own, forked from one that has the libraries, most of what an import takes.
_IMPORT_EACH = """
import importlib, json, os, sys
import matplotlib.pyplot, numba, pandas, pyarrow.parquet, scipy.sparse, scipy.stats, sklearn, torch, transformers
from universality.models import loading  # what it takes of transformers; forgotten again, with all else of ours
for name in [n for n in sys.modules if n.split(".")[0] == "universality"]: del sys.modules[name]
for line in sys.stdin:
    if os.fork() == 0:
        for name in json.loads(line):
            importlib.import_module(name)
        print(json.dumps(sorted(n for n in sys.modules if n.split('.')[0] == 'universality')), flush=True)
        os._exit(0)
    if os.wait()[1]:
        print('[]', flush=True)
"""


def test_closures_are_closed_under_real_imports():
    """Import every module of a closure: nothing of ours outside it may have been loaded."""
    closures = {}
    for module in MODULES:
        files = source_files(ROOT / "src", f"universality.{module}")
        parts = (file.relative_to(ROOT / "src").with_suffix("").parts for file in files)
        closures[module] = [".".join(part).removesuffix(".__init__") for part in parts]
    asked = "".join(json.dumps(names) + "\n" for names in closures.values())
    run = subprocess.run([sys.executable, "-c", _IMPORT_EACH], input=asked, capture_output=True, text=True, check=True)
    for (module, names), loaded in zip(closures.items(), map(json.loads, run.stdout.splitlines()), strict=True):
        assert f"universality.{module}" in loaded, (module, run.stderr)
        assert set(loaded) <= set(names), module


def test_stages_do_not_depend_on_how_earlier_ones_compute():
    def packages(stage):
        files = source_files(ROOT / "src", f"universality.{stage}.commands")
        return {f.relative_to(ROOT / "src" / "universality").parts[0] for f in files}

    # SAEs may be trained on a stream, which runs a model.
    assert "models" not in packages("features") | packages("alignment") | packages("report")
    assert "saes" not in packages("models") | packages("activations") | packages("circuits") | packages("alignment")
    assert not {"alignment", "circuits", "report"} & packages("features")
    # How dictionaries are measured does not decide on what is trained.
    names = {f.name for f in source_files(ROOT / "src", "universality.saes.commands")}
    assert "training.py" in names
    assert not {"evaluation.py", "splicing.py", "neuronpedia.py", "bootstrap.py"} & names


def test_how_the_store_is_read_does_not_decide_on_what_is_in_it():
    files = source_files(ROOT / "src", "universality.activations.commands")
    names = {file.name for file in files if file.parent.name == "activations"}
    assert "writer.py" in names
    assert not {"store.py", "batches.py", "shuffle.py", "statistics.py", "stream.py"} & names


def imports_by_parsing(content: str) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(content)) if isinstance(node, ast.Import | ast.ImportFrom)]
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named = {f"{n.module}.{alias.name}" for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
    return {name for name in plain | named if name.startswith("universality")}


@pytest.mark.parametrize(
    "content",
    [
        "if x: from universality.a import b\n",
        "x = 1; import universality.a\n",
        "from universality.a import (  # (of two)\n    b,\n    c,\n)\n",
        "from universality.a \\\n    import b\n",
        "def f():\n    'import what is\\nfrom here import it'\n    import universality.a as b, universality.c\n",
        "try:\n    from universality.a import b\nexcept ImportError:\n\timport universality.c\n",
    ],
)
def test_imports_are_found_without_parsing_all(content, tmp_path):
    assert set(_imports(tmp_path / "x.py", content.encode())) == imports_by_parsing(content)


def test_imports_of_all_our_files_are_found_without_parsing_all():
    for path in (ROOT / "src").rglob("*.py"):
        assert set(_imports(path, path.read_bytes())) == imports_by_parsing(path.read_text()), path


@pytest.fixture
def tree(tmp_path):
    package = tmp_path / "src" / "universality"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text("from universality import shared\n")
    (package / "inner" / "commands.py").write_text("def run():\n    from universality.inner.work import do\n")
    (package / "inner" / "work.py").write_text("import universality.deep\n")
    for name in ("shared", "deep", "unused"):
        (package / f"{name}.py").write_text("x = 1\n")
    (tmp_path / "requirements.lock").write_text("numpy==1\n")
    source_files.cache_clear()
    return tmp_path


def test_imports_in_functions_and_packages_count_and_the_rest_does_not(tree):
    names = {f.name for f in source_files(tree / "src", "universality.inner.commands") if f.name != "__init__.py"}
    assert names == {"commands.py", "work.py", "deep.py", "shared.py"}


def test_the_hash_follows_content_and_the_lock_file_alone(tree):
    def current():
        source_files.cache_clear()
        return code_hash(tree, "universality.inner.commands")

    before = current()
    (tree / "src" / "universality" / "unused.py").write_text("x = 2\n")
    (tree / "src" / "universality" / "deep.py").touch()
    assert current() == before
    (tree / "src" / "universality" / "deep.py").write_text("x = 2\n")
    edited = current()
    assert edited != before
    (tree / "requirements.lock").write_text("numpy==2\n")
    assert current() != edited
