"""What is shipped: the version, the pinned dependencies, the image and the compose file."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))
TRAINING = ROOT / "training" / "configs"
OURS = ("serve", "dev", "oldest")


def locked(constraints: str) -> dict[str, set[Version]]:
    """The versions in one constraints file: more than one where Pythons differ."""
    versions: dict[str, set[Version]] = {}
    for line in read(f"constraints/{constraints}.txt").splitlines():
        if found := re.match(r"([a-z0-9-]+)==([^ ]+)", line):
            versions.setdefault(found[1], set()).add(Version(found[2]))
    return versions


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]

    assert f"\n## [{version}]" in read("CHANGELOG.md")
    assert yaml.safe_load(read("helm/Chart.yaml"))["appVersion"] == version
    compose = yaml.safe_load(read("docker-compose.yml"))
    assert compose["services"]["sluicegate"]["image"] == f"sluicegate:{version}"
    assert f"IMAGE ?= sluicegate:{version}\n" in read("Makefile")


def test_the_changelog_has_a_place_for_what_comes_next() -> None:
    headings = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)

    assert headings[0] == "Unreleased"
    assert PROJECT["version"] in headings


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_every_pinned_file_has_its_hash_and_no_address(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "://" not in text
    assert "index-url" not in text

    # A requirement goes on over lines that end in a backslash.
    entries = [
        entry for entry in text.replace("\\\n", " ").splitlines() if not entry.startswith("#")
    ]
    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9-]+==[^ ]+ ", entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}( |$)", entry), entry


@pytest.mark.parametrize("constraints", OURS)
def test_torch_and_cuda_are_never_pinned(constraints: str) -> None:
    pinned = locked(constraints)

    assert not [name for name in pinned if re.match(r"torch$|triton|nvidia-|cuda-", name)]


@pytest.mark.parametrize("constraints", OURS)
def test_the_declared_ranges_hold_both_ends(constraints: str) -> None:
    pinned = locked(constraints)
    lines = list(PROJECT["dependencies"])
    if constraints != "serve":
        lines += PROJECT["optional-dependencies"]["train"]
        lines += PROJECT["optional-dependencies"]["report"]

    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        if name == "torch":
            continue
        assert pinned[name], name
        outside = [version for version in pinned[name] if version not in requirement.specifier]
        assert not outside, f"{requirement} leaves out {outside}"


def test_the_two_ends_lie_on_either_side_of_what_vllm_allows() -> None:
    oldest, newest = locked("oldest"), locked("dev")

    assert max(oldest["fastapi"]) < Version("0.137") <= min(newest["fastapi"])
    assert max(oldest["transformers"]) < Version("5.21") <= min(newest["transformers"])


def test_what_is_tested_is_what_serves() -> None:
    tested = locked("dev")

    assert {name: tested[name] for name in locked("serve")} == locked("serve")


def test_the_base_install_has_no_training_library() -> None:
    assert not {"torch", "transformers", "safetensors", "onnx"} & locked("serve").keys()


def test_the_wheel_carries_the_weights_and_the_configurations(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in ("models", "service", "training"):
        shutil.copytree(ROOT / folder, source / folder)
    for file in ("pyproject.toml", "README.md", "LICENSE", "sluicegate.py"):
        shutil.copy(ROOT / file, source)
    for guard in ("some-guard", "sluicegate-judge-0"):
        weight = source / "models" / "weights" / guard / "guard.int8.onnx"
        weight.parent.mkdir(parents=True)
        weight.write_bytes(b"weights")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), str(source)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("sluicegate-*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {"models/weights/some-guard/guard.int8.onnx", "sluicegate.py"} <= names
    # What only measures, under a licence of its own, stays where it is.
    assert not any("judge" in name for name in names if name.startswith("models/"))
    parent = TRAINING.parent
    needed = [*TRAINING.rglob("*.yaml"), *parent.glob("labels/*"), *parent.glob("written/*")]
    assert {f"training/{path.relative_to(parent)}" for path in needed} <= names


def test_the_image_is_built_from_the_pins_and_runs_without_root() -> None:
    dockerfile = read("Dockerfile")

    assert "--require-hashes -r constraints/serve.txt" in dockerfile
    assert "\nUSER 10001:10001\n" in dockerfile
    # Whoever runs the image says so, not the image.
    assert not re.search(r"^ *SLUICEGATE_ALLOW_UNAUTHENTICATED", dockerfile, re.MULTILINE)


def run(tool: str, *arguments: str) -> None:
    """Runs a tool of this environment; it must find nothing."""
    program = shutil.which(tool, path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"{tool} is not installed in this environment")
    done = subprocess.run(
        [program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    run("hadolint", "Dockerfile")


def test_the_compose_file_is_valid() -> None:
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")


def test_redis_keeps_what_it_is_given() -> None:
    redis = yaml.safe_load(read("docker-compose.yml"))["services"]["redis"]
    command = redis["command"]

    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
