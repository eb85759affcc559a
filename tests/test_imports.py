"""Who may import whom: read from the sources, so that an import inside a function counts too."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "lowrank_geo": ROOT / "lowrank_geo",
    "lowrank_geo.kernels": ROOT / "kernels",
    "lowrank_geo.models": ROOT / "models",
}

# The parts with a closed list of what of ours they import; the others are only kept free of cycles.
MAY_IMPORT: dict[str, set[str]] = {
    "geometry": set(),
    "precision": set(),
    "guard": set(),
    "kernels": {"kernels"},
    "reference": {"geometry", "msign", "orthonormal"},
    "operators": {"kernels", "msign", "orthonormal", "precision", "reference"},
    "binding": {"guard", "kernels", "operators"},
    "dispatch": {"binding", "kernels", "reference"},
    "gradients": {"guard"},
    "functional": {"dispatch", "gradients", "reference"},
    "models": {"models"},
    "data": {"data"},
    "orthonormal": {"geometry"},
    "msign": {"geometry", "orthonormal"},
    "init": {"geometry"},
    "convolution": {"gradients", "reference"},
    "branches": {"gradients", "geometry"},
    "retraction": {"dispatch", "geometry", "orthonormal"},
    "manifold": {"geometry", "retraction"},
    "lowrank_layer": {"branches", "functional", "geometry", "gradients", "guard"},
    "layers": {"functional", "geometry", "init", "lowrank_layer"},
    "conv_layers": {"convolution", "geometry", "gradients", "init", "lowrank_layer"},
    "optim": {
        "dispatch",
        "gradients",
        "geometry",
        "msign",
        "orthonormal",
        "precision",
        "retraction",
        "guard",
        "branches",
        "layers",
        "lowrank_layer",
        "optim",
    },
}


def sources() -> dict[str, Path]:
    """Module name -> file, for everything that the wheel ships."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts))
            found[name.removesuffix(".__init__")] = file
    return found


SOURCES = sources()


def imports(file: Path) -> set[str]:
    """Names of the modules that a file imports; of `from a import b`, a.b if that is a module of ours, else a."""
    found: set[str] = set()
    for node in running(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{file.name} imports relatively, which breaks kernels and models"
            )
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else str(node.module) for name in full}
    return found


def running(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    yield node
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from running(child)


def part(module: str) -> str:
    """lowrank_geo.optim.base -> optim; the package itself -> lowrank_geo."""
    return module.removeprefix("lowrank_geo.").split(".")[0]


def ours(module: str) -> set[str]:
    return {name for name in imports(SOURCES[module]) if name.split(".")[0] == "lowrank_geo"}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_only_what_stands_before_it(name):
    members = [module for module in SOURCES if part(module) == name]
    assert members
    for module in members:
        assert {part(other) for other in ours(module)} <= MAY_IMPORT[name], module


def test_imports_have_no_cycle():
    graph = {module: ours(module) for module in SOURCES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_only_the_entry_points_import_the_command_line():
    users = {module for module in SOURCES if "cli" in {part(other) for other in ours(module)}}
    assert {part(module) for module in users} <= {"cli", "__main__"}


def test_kernels_import_only_torch_and_triton():
    for module in SOURCES:
        if part(module) == "kernels":
            roots = {name.split(".")[0] for name in imports(SOURCES[module])}
            assert roots <= {"torch", "triton", "math", "lowrank_geo"}, module


def test_nothing_imports_the_folders_under_their_bare_names():
    for module, file in SOURCES.items():
        assert not {name.split(".")[0] for name in imports(file)} & {"kernels", "models"}, module


HEAVY = (
    "transformers",
    "peft",
    "datasets",
    "matplotlib",
    "typer",
    "rich",
    "geoopt",
    "tokenizers",
    "scipy",
)


@pytest.mark.parametrize(
    "module, names",
    [("lowrank_geo", HEAVY), ("lowrank_geo.cli.app", ("torch._dynamo", "matplotlib", "datasets"))],
)
def test_importing_loads_no_heavy_package(tmp_path, module, names):
    code = f"import {module}, sys; print([m for m in {names} if m in sys.modules])"
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
