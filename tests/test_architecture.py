"""The shape of the project: who may import whom, what importing costs, and the map of files."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "service", "training")
LONGEST = 600


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere in it, in full."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            assert node.module is not None
            yield node.module


def requirements(*extras: str) -> set[str]:
    """The distributions that pyproject.toml declares, with those of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("models", {"service", "training", "sluicegate", "tests", "benchmarks", "scripts"}),
        ("service", {"training", "sluicegate", "tests", "benchmarks", "scripts"}),
        ("training", {"service", "sluicegate", "tests", "benchmarks", "scripts"}),
    ],
)
def test_imports_point_towards_models(package: str, forbidden: set[str]) -> None:
    files = sources(package)
    assert files

    for path in files:
        crossed = {module for module in imports(path) if module.split(".")[0] in forbidden}
        assert not crossed, f"{name(path)} imports {sorted(crossed)}"


@pytest.mark.parametrize(
    ("package", "extras"),
    [("models", ("train",)), ("service", ("tracing",)), ("training", ("train", "report"))],
)
def test_what_is_imported_is_declared(package: str, extras: tuple[str, ...]) -> None:
    declared = requirements(*extras)
    distributions = packages_distributions()

    for path in sources(package):
        for module in imports(path):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top in PACKAGES:
                continue
            providers = {canonicalize_name(item) for item in distributions.get(top, [top])}
            assert providers & declared, f"{name(path)} imports {top}, which is not declared"


@pytest.mark.parametrize("module", ["models.taxonomy", "models.text_guard", "service.app"])
def test_serving_loads_no_training_library(module: str) -> None:
    check = (
        f"import sys, {module}; "
        "print(sorted({'torch', 'transformers', 'training'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_judging_reports_to_nobody(tmp_path: Path) -> None:
    # From 1.29 on, importing ONNX Runtime on Linux leaves a device identifier in the home
    # directory and reports sessions to its maker, unless ORT_DISABLE_TELEMETRY is set before.
    command = [str(Path(sys.executable).parent / "sluicegate"), "moderate", "Good morning."]
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name] == []


def test_the_taxonomy_loads_nothing_at_all() -> None:
    outside = {
        module
        for module in imports(ROOT / "models" / "taxonomy.py")
        if module.split(".")[0] not in sys.stdlib_module_names
    }

    assert not outside


def test_packages_are_only_folders() -> None:
    found = [path for path in sources(*PACKAGES, "tests") if path.name == "__init__.py"]

    assert len(found) >= len(PACKAGES)
    assert [name(path) for path in found if path.read_text(encoding="utf-8")] == []


def test_the_readme_names_every_source_file() -> None:
    named = Counter(re.findall(r"[\w.-]+\.py\b", (ROOT / "README.md").read_text(encoding="utf-8")))
    files = sources(*PACKAGES, "benchmarks", "scripts")
    # Names come twice where two folders have the same one, such as models/guard.py.
    written = Counter(path.name for path in files if path.name != "__init__.py")

    assert written - named == Counter()


def test_no_source_file_is_long() -> None:
    files = [ROOT / "sluicegate.py", *sources(*PACKAGES, "benchmarks", "scripts")]
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}

    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}
