"""The rooms of the project: who may import whom, and that every public name can be tried."""

import ast
import graphlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import onehour

SOURCE = Path(onehour.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ROOMS = sorted(path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists())
SHARED = ("config", "entry", "files", "leaving", "lock", "machine", "messages", "noise", "sidefile")
"""What a recipe is, how anyone's code is found, what is written and by whom, cores, what is shown and read; noise."""


def name_of(path: Path) -> str:
    """onehour.training.loop of src/onehour/training/loop.py."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, by its full name."""
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            named = {f"{module}.{alias.name}" for alias in node.names}
            yield from named if named <= MODULES else {module} | named  # files of a package, not the package


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def of_room(room: str) -> list[Path]:
    return [path for path in FILES if under(name_of(path), f"onehour.{room}")]


MAY = {
    "rules": ("rules",),
    "models": ("models", "rules", *SHARED),
    "data": ("data", "rules", *SHARED),
    "dist": ("dist", "rules", *SHARED),
    "training": ("training", "models", "data", "dist", "rules", "execution", *SHARED),
    "study": ("study", "training.record", "recipes", "rules", *SHARED),
    "sweeps": ("sweeps", "study", "training", "runs", "execution", "data.sources", "dist", "rules", *SHARED),
    "check": ("check", "rules", "leaving"),
    "cli": (
        *("cli", "planner", "recipes", "execution", "api", "runs"),
        *("translate", "check", "sweeps", "study", "training", "data", "dist", "rules", *SHARED),
    ),
}


def test_every_room_has_its_rule():
    assert set(ROOMS) <= set(MAY)
    assert {"rules", "models", "data", "dist", "training", "study"} <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str):
    allowed = [f"onehour.{other}" for other in MAY[room]]
    for path in of_room(room):
        ours = {name for name in imports(path) if under(name, "onehour")} - {"onehour"}  # its version
        wrong = {name for name in ours if not under(name, *allowed)}
        assert not wrong, f"{path.relative_to(SOURCE)} imports {sorted(wrong)}"
        assert room in ("dist", "cli") or not any(under(name, "onehour.cli") for name in ours)


def test_torch_distributed_is_imported_where_processes_are():
    """And where a rule for anyone's loop asks which process it is in."""
    for path in FILES:
        if any(under(name, "torch.distributed") for name in imports(path)):
            assert under(name_of(path), "onehour.dist", "onehour.check", "onehour.rules.sampler"), path


@pytest.mark.parametrize("name", ["minibatch", "schedule", "shuffle", "keys", "names", "arguments"])
def test_rules_that_a_plan_needs_import_no_torch(name: str):
    found = set(imports(SOURCE / "rules" / f"{name}.py"))
    assert not any(under(module, "torch") for module in found)
    assert {module.split(".")[0] for module in found} <= {*sys.stdlib_module_names, "numpy", "onehour"}


PLAN_NEEDS = ("config", "entry", "execution", "planner", "recipes")
COMMAND_LINE = [*of_room("cli"), *(SOURCE / f"{name}.py" for name in PLAN_NEEDS)]


def test_the_command_line_imports_torch_only_where_something_trains():
    """At the head of the file; what a function imports is imported when it is called."""
    late = ("torch", "onehour.api", "onehour.runs", "onehour.training", "onehour.study.report")
    for path in COMMAND_LINE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        heads = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {alias.name for node in heads if isinstance(node, ast.Import) for alias in node.names}
        modules |= {str(node.module) for node in heads if isinstance(node, ast.ImportFrom)}
        assert not any(under(module, *late) for module in modules), path


def test_no_file_imports_itself_by_way_of_others():
    """Wherever in a file an import stands; but the package, whose names load on first use."""
    names = {name_of(path) for path in FILES} - {"onehour"}
    graph = {name_of(path): set(imports(path)) & names - {name_of(path)} for path in FILES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises where there is a cycle
    assert order.index("onehour.rules.arguments") < order.index("onehour.config") < order.index("onehour.api")


PUBLIC = sorted(onehour._HOME_OF)


def test_a_public_name_has_a_docstring_with_a_runnable_example():
    for name in PUBLIC:
        doc = getattr(home(name), name).__doc__ or ""
        assert len(doc.strip().splitlines()[0]) > 20, f"{name} does not say what it is"
        assert ">>> " in doc, f"{name} has no example"
        assert "+SKIP" not in doc, f"{name}'s example does not run"


def home(name: str) -> ModuleType:
    return importlib.import_module(f"onehour.{onehour._HOME_OF[name]}")


def test_all_is_sorted_and_resolves():
    assert onehour.__all__ == sorted(set(onehour.__all__))
    assert set(dir(onehour)) == {*onehour.__all__, "__version__"}
    for name in PUBLIC:
        assert callable(getattr(home(name), name))
        assert name in home(name).__all__
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = onehour.trian  # pyright: ignore[reportAttributeAccessIssue]


def test_at_most_30_names_are_listed_and_the_others_still_resolve():
    assert len(onehour.__all__) <= 30
    from onehour import GhostBatchNorm1d, GhostBatchNorm3d, StreamSampler, initialize

    others = {each.__name__ for each in (GhostBatchNorm1d, GhostBatchNorm3d, StreamSampler, initialize)}
    assert others == set(PUBLIC) - set(onehour.__all__)


def test_lazy_names_are_those_that_type_checkers_see():
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen: dict[str, str] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name  # a re-export
            seen[alias.name] = str(node.module).removeprefix("onehour.")
    assert seen == onehour._HOME_OF


def test_names_that_users_were_promised_are_there():
    assert set(onehour.__all__) >= {
        *("Minibatch", "linear_scaling", "sqrt_scaling", "step_decay", "cosine_decay", "gradual_warmup"),
        *("scaled_step_schedule", "ScheduleLR"),
        *("constant_warmup", "parameter_groups", "momentum_form", "correct_momentum", "SampleStream"),
        *("GhostBatchNorm2d", "convert_batchnorm", "accumulate", "init_weights_", "global_mean", "plan", "train"),
    }


def test_a_file_is_one_room():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 450, path
        assert ast.get_docstring(ast.parse(text)), path
