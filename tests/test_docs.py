"""The documents are true of the code: figures come from committed results, and every name in them exists."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import onehour

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
NAMED = re.compile(r"`((?:src|tests|benchmarks|campaigns|docs|examples)/[\w./-]+?)(?:::([\w.]+))?`")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """docs/tables.py."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_those_of_the_committed_results(tables: ModuleType):
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        assert tables.render(text) == text, f"{page.relative_to(ROOT)} is not up to date: run python docs/tables.py"


def test_every_block_is_one_that_can_be_written(tables: ModuleType):
    text = "".join(page.read_text(encoding="utf-8") for page in tables.pages())
    assert set(re.findall(r"<!-- results:(\w+) -->", text)) == set(tables.BLOCKS)
    assert text.count("<!-- results:") == text.count("<!-- /results -->") == len(tables.BLOCK.findall(text))


def test_a_block_is_written_anew_and_the_rest_stays(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = "a\n<!-- results:check -->\nold\n<!-- /results -->\nb\n"
    unknown = "_Not measured yet: `python benchmarks/check.py`._"
    assert tables.render(page) == page.replace("old", unknown)
    (tmp_path / "check.json").write_text(
        '{"provenance": {"date": "2026-01-02", "commit": "0123456789", "torch": "2.13.0", "gpu": "GPU"}, "rows":'
        ' [{"case": "c", "processes": 2, "bare_ms": 3.14, "watched_cpu_ratio": 1.054, "after_cpu_ratio": 1}]}'
    )
    written = tables.render(page)
    assert "| c | 2 | 3.1 | +5.4 % | +0.0 % |" in written
    assert "2026-01-02, commit 0123456, torch 2.13.0, GPU." in written
    assert tables.render(written) == written


def test_the_sample_has_the_labels_that_a_run_ends_with(tables: ModuleType):
    source = (ROOT / "src/onehour/study/outcome.py").read_text(encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (sample,) = (match[0] for match in tables.BLOCK.finditer(text) if match[2] == "outcome")
    if "Not measured yet" in sample:
        pytest.skip("no results are committed yet")
    labels = [line[:13] for line in sample.partition("…\n")[2].splitlines()[:6]]
    assert [label.split()[0] for label in labels] == ["final", "reference", "verdict", "speed", "run", "curve"]
    for label in labels:
        assert f'"{label}' in source


def test_every_named_file_and_function_exists():
    for page in PAGES:
        for path, name in NAMED.findall(page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"there is no {path}, which {page} names"
            assert not name or name in names_in(ROOT / path), f"{path} has no {name}, which {page} names"


@cache
def names_in(path: Path) -> set[str]:
    """Functions, classes, methods and top-level constants of a file."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                targets = [t for target in node.targets for t in getattr(target, "elts", [target])]
                found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def test_the_references_recipe_is_one(tmp_path: Path):
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my.toml").write_text(block)
    recipe = onehour.Recipe.from_toml(tmp_path / "my.toml")
    assert (recipe.name, recipe.target_lr, recipe.weight_decay) == ("mine", 0.2, onehour.Recipe().weight_decay)


def test_the_map_goes_through_the_whole_paper():
    text = (ROOT / "docs" / "paper-to-code.md").read_text(encoding="utf-8")
    parts = [f"§{number}" for number in ("2.1", "2.2", "2.3", "3", "4", "5.1", "5.2", "5.3", "5.4", "5.5")]
    parts += [f"Remark {number}" for number in range(1, 5)] + [f"eq {number}" for number in range(2, 11)]
    parts += [f"F{number}" for number in range(1, 9)] + ["T1", "T2a", "T2b", "T2c", "T3a", "T3b"]
    for part in parts:
        assert re.search(rf"{re.escape(part)}\b", text), f"{part} is missing"


def test_every_rule_has_its_place():
    """Every public name that comes from rules/, but for those that only others are made of."""
    text = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    _, table, rest = re.split(r"^(\| rule .*?)\n\n", text, maxsplit=1, flags=re.DOTALL | re.MULTILINE)
    rules = {name for name, home in onehour._HOME_OF.items() if home.startswith("rules.")}
    rules &= set(onehour.__all__)
    left_out = {"GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d", "seed_for", "Minibatch"}
    for name in rules - left_out:
        assert name in table, f"the table of the rules does not name {name}"
        assert name in rest, f"docs/rules.md does not say when {name} is needed"


def test_no_page_names_a_place_of_someones_machine():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt|opt)/", text), page
