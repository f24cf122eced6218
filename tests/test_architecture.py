"""The tree is the architecture: imports go down, the core is lean and small, the public names are these."""

import ast
import graphlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adalora

SOURCE = Path(adalora.__file__).parent

# Each row may import from the rows above it only. A package stands for all its modules, which may import one
# another as long as no circle arises.
CORE = (
    {"errors", "functional", "allocation", "verdicts", "sketch"},
    {"quantized"},
    {"schedule", "layers", "files", "jsonfiles", "checks", "presets", "sharding", "quantizedmodels"},
    {"config", "optimizers", "masking", "runstate", "gathering"},
    {"stepsize", "pending", "runmanifest"},
    {"conversion"},
    {"importance", "targets", "compaction"},
    {"budget", "fisher", "basis"},
    {"refactoring"},
    {"averages", "injection", "reading"},
    {"regularizer", "report", "stored", "merging", "start", "grouping", "runfolder"},
    {"attachment", "checkpoint"},
    {"allocator"},
    {"export", "whole"},
)
RINGS = (
    {"sections", "yamlfiles", "runfiles"},
    {"integrations", "recipe", "drawings", "claiming"},
    {"methods", "tasks"},
    {"plan", "card", "records", "resolve", "htmlreport", "screen", "trainer", "failures"},
    {"resuming", "job"},
    {"reloading", "result"},
    {"train"},
    {"summary"},
    {"study"},
    {"demo"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, row in enumerate(CORE + RINGS) for name in row}
CORE_NAMES = set().union(*CORE)
FILES = {
    ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(SOURCE.rglob("*.py"))
}
CORE_FILES = {name: file for name, file in FILES.items() if name in CORE_NAMES}


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """(module, whether it is ours) of every import statement in a file, wherever in the file it stands."""
    file = FILES[name]
    package = list(file.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.removeprefix("adalora."), alias.name.split(".")[0] == "adalora"
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                module = package[: len(package) - node.level + 1] + module
            elif module[0] == "adalora":
                module = module[1:]
            else:
                yield ".".join(module), False
                continue
            for alias in node.names:
                inner = ".".join([*module, alias.name])
                yield inner if inner in FILES else ".".join(module), True


def top(module: str) -> str:
    return module.split(".")[0]


def test_every_file_has_a_place_in_the_order() -> None:
    unplaced = [name for name in FILES if top(name) not in RANK and name not in ("__init__", "")]
    assert unplaced == [], "add them to CORE or RINGS"
    assert {name for name in CORE_NAMES if name not in FILES} == set()


@pytest.mark.parametrize("name", [name for name in FILES if top(name) in RANK])
def test_imports_go_down_only(name: str) -> None:
    upward = [
        module
        for module, ours in imports(name)
        if ours and not (top(module) == top(name) and "." in module) and not RANK.get(top(module), 99) < RANK[top(name)]
    ]
    assert upward == []


def test_no_circle_of_imports() -> None:
    graph = {name: {module for module, ours in imports(name) if ours and module != name} for name in FILES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert len(order) >= len(FILES)


@pytest.mark.parametrize("name", CORE_FILES)
def test_the_core_imports_torch_and_safetensors_only(name: str) -> None:
    foreign = {top(module) for module, ours in imports(name) if not ours} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "safetensors"}


def test_frameworks_are_imported_in_their_rings_only() -> None:
    for name in FILES:
        found = {top(module) for module, ours in imports(name) if not ours}
        if "peft" in found:
            assert top(name) == "methods", name
        if "transformers" in found:
            assert RANK[top(name)] >= RANK["integrations"], name


def test_importing_the_package_loads_torch_and_safetensors_and_nothing_else() -> None:
    """What torch itself pulls in is torch's affair."""
    code = (
        "import sys, torch, safetensors.torch; before = set(sys.modules); from adalora import *; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before})); "
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    added, everything = (set(line.split()) for line in output.splitlines())
    assert added - set(sys.stdlib_module_names) == {"adalora"}
    for name in (
        "transformers",
        "peft",
        "accelerate",
        "scipy",
        "matplotlib",
        "sklearn",
        "pydantic",
        "rich",
        "typer",
        "yaml",
        "bitsandbytes",
        "torchao",
    ):
        assert name not in everything


def test_the_package_itself_loads_without_torch() -> None:
    """So that a command line answers at once; each public name fetches what it needs."""
    code = "import sys, adalora; print('torch' in sys.modules, adalora.__version__)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", adalora.__version__]


def test_public_names_are_exactly_these() -> None:
    assert sorted(adalora.__all__) == [
        "AdaLoraConfig",
        "AdaLoraError",
        "AdaLoraWarning",
        "RankAllocator",
        "adapter_parameters",
        "disabled",
        "eject",
        "export_lora",
        "export_merged",
        "inject",
        "load_adapter",
        "merge",
        "merged",
        "orthogonality_penalty",
        "parameter_groups",
        "rank_report",
        "save_adapter",
        "unmerge",
    ]
    assert sorted(dir(adalora)) == sorted([*adalora.__all__, "__version__"])
    for name in adalora.__all__:
        assert getattr(adalora, name).__module__ == f"adalora.{adalora._HOME[name]}"
    with pytest.raises(AttributeError, match="module 'adalora' has no attribute 'RankAlocator'"):
        _ = adalora.RankAlocator


def test_every_public_name_is_documented() -> None:
    assert [name for name in adalora.__all__ if not getattr(adalora, name).__doc__] == []


def test_version_is_that_of_the_distribution() -> None:
    assert adalora.__version__ == importlib.metadata.version("adalora")


@pytest.mark.parametrize("name", CORE_FILES)
def test_core_files_and_functions_stay_short(name: str) -> None:
    text = CORE_FILES[name].read_text()
    assert len(text.splitlines()) <= 250
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > 40}
    assert long == {}


@pytest.mark.parametrize("name", CORE_FILES)
def test_public_functions_and_classes_of_the_core_have_docstrings(name: str) -> None:
    tree = ast.parse(CORE_FILES[name].read_text())
    assert ast.get_docstring(tree)
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert bare == []


def test_the_reference_shares_nothing_with_the_library() -> None:
    text = (Path(__file__).parent / "reference.py").read_text()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {top(getattr(node, "module", None) or node.names[0].name) for node in nodes}
    assert modules <= {"__future__", "math", "collections", "dataclasses", "torch"}
