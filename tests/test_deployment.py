"""docs/clusters.md, the container recipe and the release workflow: what can be checked of them with no cluster or engine."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from effattn import __main__ as command_line
from effattn import _diagnostics

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "clusters.md").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
RECIPE = (ROOT / "docker" / "Dockerfile").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def steps():
    return [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def assert_is_bash(code):
    checked = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, ""), code


def doctors():
    """Arguments of every `effattn doctor` of the page, of shell blocks and of manifests."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    commands = re.findall(r"-m effattn (doctor[^)|;&#\n]*)", "\n".join(lines))
    for manifest in map(yaml.safe_load, blocks("yaml")):
        commands += [shlex.join(words[3:]) for words in _commands(manifest) if words[:3] == ["python", "-m", "effattn"]]
    return commands


def _commands(node):
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "command":
                yield value
            else:
                yield from _commands(value)
    elif isinstance(node, list):
        for value in node:
            yield from _commands(value)


@pytest.mark.parametrize("code", blocks("bash"))
def test_shell_of_the_page_parses(code):
    assert_is_bash(code)


@pytest.mark.parametrize("words", doctors())
def test_doctor_takes_what_the_page_gives_it(words, monkeypatch):
    asked = []
    monkeypatch.setattr(_diagnostics, "doctor", lambda: asked.append("plain") or 0)
    monkeypatch.setattr(_diagnostics, "doctor_gpu", lambda seconds, report: asked.append(seconds) or 0)
    arguments = [word for word in shlex.split(words) if not word.startswith("2>")]
    assert command_line.main(arguments) == 0
    assert asked == [
        60.0 if "--seconds" not in arguments else float(arguments[arguments.index("--seconds") + 1])
    ] or asked == ["plain"]


def test_the_page_has_commands_of_every_kind():
    assert len(doctors()) >= 6
    assert any("--json" in words for words in doctors())


def test_manifests_run_pods_whose_containers_are_complete():
    kinds = {manifest["kind"]: manifest for manifest in map(yaml.safe_load, blocks("yaml"))}
    assert set(kinds) == {"Job", "Pod"}
    for pod in (kinds["Job"]["spec"]["template"]["spec"], kinds["Pod"]["spec"]):
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert container["image"]
            assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1
            assert all(isinstance(word, str) for word in container["command"])
            assert all(isinstance(variable["value"], str) for variable in container.get("env", []))
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
    assert kinds["Job"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    probe = kinds["Pod"]["spec"]["containers"][0]["startupProbe"]
    assert float(probe["exec"]["command"][-1]) < probe["timeoutSeconds"] < probe["periodSeconds"]


def test_environment_variables_of_the_page_are_read_by_the_package():
    sources = "".join(path.read_text() for path in (ROOT / "effattn").glob("*.py"))
    sources += "".join(path.read_text() for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    names = set(re.findall(r"\bEFFATTN_[A-Z_]+\b", PAGE))
    assert names
    assert {name for name in names if name not in sources} == set()


# ---- the release ----


@pytest.mark.parametrize("step", steps(), ids=lambda step: step.get("name") or step.get("uses") or step["run"][:20])
def test_steps_are_shell_or_pinned_actions(step):
    if "run" in step:
        assert_is_bash(step["run"])
        assert "${{" not in step["run"]  # values come by env, where nobody's text becomes a command
    else:
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+(\.\d+\.\d+)?", step["uses"])


def test_only_the_job_that_publishes_may_write():
    assert WORKFLOW["permissions"] == {}
    for name, job in WORKFLOW["jobs"].items():
        assert ("write" in job["permissions"].values()) == (name == "publish")
    assert WORKFLOW["jobs"]["publish"]["environment"] == "pypi"
    assert set(WORKFLOW["jobs"]["publish"]["needs"]) == set(WORKFLOW["jobs"]) - {"publish"}


def test_no_secret_is_read():
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def test_release_builds_what_the_recipe_can_build():
    assert "ARG CUDA=13-0\n" in RECIPE
    assert WORKFLOW["jobs"]["wheel"]["strategy"]["matrix"]["cuda"] == ["13-0", "12-9"]
    assert re.search(r"FROM quay\.io/pypa/manylinux_2_28_x86_64:\d{4}\.\d\d\.\d\d-\d AS build", RECIPE)
    assert 'CUDA="${CUDA%%-*}" make wheel' in RECIPE
    assert re.search(r"^wheel:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_context_of_the_container_leaves_out_only_what_git_ignores():
    """Else the wheel would say that its tree has uncommitted changes."""
    patterns = (ROOT / ".dockerignore").read_text().split()
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {pattern.removeprefix("**/").rstrip("/") for pattern in patterns} <= {line.rstrip("/") for line in ignored}
