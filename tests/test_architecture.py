"""The structure of the tree: import layers, no import cycles, short files, few arguments, a page that names every module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"race_dist": ROOT / "race_dist", "race_dist.kernels": ROOT / "kernels", "race_dist.launch": ROOT / "launch"}

# Bottom to top, as in docs/architecture.md: a module imports only from its own package and from layers below.
FOUNDATION = {"carry", "checks", "files", "hashing", "kernels", "machine", "messages", "output_paths", "rank_environment"}
FOUNDATION |= {"checkpoint_files", "config_loader", "exit_codes", "renamed_modules", "sketch", "strict_config", "terminal"}
LAYERS = (
    *(FOUNDATION, {"ops"}, {"distributed"}, {"parallel"}, {"attention"}, {"explain"}, {"nn"}, {"models"}),
    *({"streaming"}, {"planning"}, {"training"}, {"integrations"}, {"launch"}, {"benchmarks"}, {"cli"}),
)

MAX_LINES = 500
MAX_POSITIONAL = 12
# Calls whose arguments another library dictates, or that are the public interface of the paper's operator.
MANY_ARGUMENTS: set[str] = set()


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its installed name."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


@cache
def imports(file: Path) -> frozenset[str]:
    """Modules of this package that a file imports, at its top or inside functions; imports for type checking do not count."""
    tree = ast.parse(file.read_text())
    typing = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "race_dist":
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & modules().keys()
            found |= submodules or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("race_dist.")}
    return frozenset(found)


def layer_of(module: str) -> int | None:
    """The position in LAYERS of a module's first name below the package; None for the package itself."""
    names = module.split(".")
    if len(names) == 1:
        return None
    positions = [position for position, layer in enumerate(LAYERS) if names[1] in layer]
    assert positions, f"{module} belongs to no layer: give it one in docs/architecture.md and in {Path(__file__).name}"
    return positions[0]


def test_modules_import_only_from_layers_below() -> None:
    wrong = []
    for name, file in modules().items():
        layer = layer_of(name)
        for target in imports(file):
            target_layer = layer_of(target)
            same_package = name.split(".")[1:2] == target.split(".")[1:2]
            if layer is not None and target_layer is not None and not (target_layer < layer or same_package or layer == 0):
                wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    """Between modules, also by imports inside functions. A package counts as imported only where its own names are."""
    edges = {name: imports(file) & modules().keys() - {name} for name, file in modules().items()}
    cycles = [" -> ".join(cycle) for cycle in strongly_connected(edges) if len(cycle) > 1]
    assert not cycles, "\n".join(cycles)


def strongly_connected(edges: dict[str, frozenset[str]]) -> Iterator[list[str]]:
    """Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> Iterator[list[str]]:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in index:
                yield from visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            start = stack.index(name)
            yield sorted(stack[start:])
            del stack[start:]

    for name in edges:
        if name not in index:
            yield from visit(name)


def test_the_cycle_test_finds_cycles() -> None:
    edges = {name: frozenset(to) for name, to in {"a": "b", "b": "c", "c": "a", "d": "a"}.items()}
    assert sorted(strongly_connected(edges)) == [["a", "b", "c"], ["d"]]


def test_kernels_know_nothing_of_process_groups_and_modules() -> None:
    for name, file in modules().items():
        if name.startswith("race_dist.kernels"):
            code = re.sub(r'""".*?"""', "", file.read_text(), flags=re.DOTALL)
            assert not re.search(r"torch\.distributed|\bnn\.Module\b", code), name


def test_collectives_are_called_in_the_distributed_package_only() -> None:
    calls = re.compile(r"\bdist\.(?:all_reduce|all_gather\w*|all_to_all\w*|broadcast\w*|reduce_scatter\w*|isend|irecv)\(")
    allowed = ("race_dist.distributed", "race_dist.integrations", "race_dist.benchmarks", "race_dist.launch")
    wrong = [name for name, file in modules().items() if calls.search(file.read_text()) and not name.startswith(allowed)]
    assert not wrong


def test_no_file_is_too_long() -> None:
    files = [*modules().values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    long = {str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text().splitlines())) > MAX_LINES}
    assert not long, f"files past {MAX_LINES} lines: split them by meaning"


def test_no_function_takes_too_many_positional_arguments() -> None:
    """Kernels are launched with positional arguments and are left out; the functions that they call are not."""
    found = set()
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.endswith("_kernel"):
                arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls", "ctx")]
                if len(arguments) > MAX_POSITIONAL:
                    found.add(f"{name}.{node.name}")
    assert found == MANY_ARGUMENTS, f"functions with more than {MAX_POSITIONAL} positional arguments: name the group"


def test_the_architecture_page_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    tree = page.partition("## The tree")[2]
    for name, file in modules().items():
        path = file.relative_to(ROOT)
        if path.name not in ("__init__.py", "__main__.py"):
            assert re.search(rf"^ *{re.escape(path.name)} ", tree, re.MULTILINE), (
                f"{name}: give {path} a line in docs/architecture.md"
            )


def test_the_architecture_page_names_what_exists() -> None:
    """Files and functions of the call paths and of the index."""
    page = (ROOT / "docs" / "architecture.md").read_text().partition("## The tree")[0]
    for path, names in re.findall(r"`([\w/]+\.py)`((?:[:,] `[\w.]+`)*)", page):
        file = ROOT / path if (ROOT / path).exists() else ROOT / "race_dist" / path
        assert file.is_file(), path
        tree = ast.parse(file.read_text())
        defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
        for name in re.findall(r"[\w.]+", names):
            assert set(name.split(".")) <= defined, f"{path} does not define {name}"
