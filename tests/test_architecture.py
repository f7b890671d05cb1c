"""The arrows between our packages, checked on the source: what may import what."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cloud_coordinator", "edge_agent", "shared", "simulations")
ALLOWED = {
    "shared": {"shared"},
    "cloud_coordinator": {"shared", "cloud_coordinator"},
    "edge_agent": {"shared", "edge_agent"},
    "simulations": set(PACKAGES),
}
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# Each heavy library has its doors: the modules that may import it. The trainer child, the run
# worker, the SuperLink child and the model pipeline are processes of their own.
DOORS = {
    "torch": (
        "shared/tasks/",
        "edge_agent/training.py",
        "edge_agent/training_app.py",
        "cloud_coordinator/models/export.py",
        "cloud_coordinator/rounds/initial_model.py",
        "simulations/",
    ),
    "flwr": (
        "edge_agent/training_app.py",
        "edge_agent/secure_messages.py",
        "edge_agent/flower_node.py",
        "cloud_coordinator/flower/",
        "cloud_coordinator/rounds/exchange.py",
        "cloud_coordinator/rounds/training_rounds.py",
        "simulations/",
    ),
    "onnx": ("cloud_coordinator/models/",),
    "onnxruntime": ("cloud_coordinator/models/", "edge_agent/inference/", "simulations/"),
    "grpc": ("edge_agent/inference/grpc_server.py",),
    "aiomqtt": ("shared/mqtt.py",),
    "sqlalchemy": ("cloud_coordinator/",),
    "fastapi": (
        "cloud_coordinator/",
        "simulations/benchmarks/fastapi_serving.py",
        "simulations/benchmarks/delivery.py",
    ),
    "tuf": ("cloud_coordinator/trust/", "edge_agent/fetcher.py", "edge_agent/trusted_models.py"),
    "securesystemslib": ("cloud_coordinator/trust/",),
}


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield each imported module's name, and whether it is imported when the module loads."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or "", id(node) not in inside


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_packages_import_only_along_the_arrows(path: Path) -> None:
    package = name_of(path).split("/")[0]
    ours = {name.split(".")[0] for name, _ in imports_of(path)} & set(PACKAGES)
    assert ours <= ALLOWED[package]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_libraries_are_imported_at_their_doors_only(path: Path) -> None:
    imported = {name.split(".")[0] for name, _ in imports_of(path)}
    for library, doors in DOORS.items():
        if library in imported:
            assert name_of(path).startswith(doors), f"{name_of(path)} imports {library}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_pickle_is_nowhere(path: Path) -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert not {name.split(".")[0] for name, _ in imports_of(path)} & forbidden


def test_modules_form_no_cycle() -> None:
    graph = {
        name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__"): {
            name for name, at_load in imports_of(path) if at_load
        }
        for path in MODULES
    }
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join((*trail, module))}"
        if module in finished or module not in graph:
            return
        for imported in graph[module]:
            visit(imported, (*trail, module))
        finished.add(module)

    for module in graph:
        visit(module, ())
