"""The house: names, sizes, layers and the version, pinned."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest

import sgmd_dist

ROOT = Path(__file__).resolve().parents[2]
SOURCE_DIRS = ("sgmd_dist", "kernels", "launch")
MAX_LINES = 400


def sources() -> list[Path]:
    return sorted(path for folder in SOURCE_DIRS for path in (ROOT / folder).rglob("*.py"))


def run_python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` as `python -c` in `cwd`, which is then first on sys.path, and wait for it."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, text=True, capture_output=True, timeout=240)


def printed_by(code: str, cwd: Path, **environment: str) -> list[str]:
    done = run_python(code, cwd, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# `kernels` is also the name of a PyPI package that diffusers and transformers look for.


def pypi_kernels_is_installed() -> bool:
    return any(distribution.name == "kernels" for distribution in importlib.metadata.distributions())


def test_the_kernels_folder_is_no_package():
    assert (ROOT / "kernels" / "sgmd_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_resolves_to_no_module_of_ours_in_the_repo_root():
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    [origin] = printed_by(code, ROOT)
    if pypi_kernels_is_installed():
        assert ROOT / "kernels" not in Path(origin).parents
    else:
        assert origin == "None"  # no spec, or that of a namespace


def test_diffusers_and_transformers_do_not_take_our_folder_for_the_pypi_package():
    code = """
from diffusers.utils.import_utils import is_kernels_available as in_diffusers
from transformers.utils.import_utils import is_kernels_available as in_transformers
import transformers.integrations.hub_kernels
from transformers import UMT5EncoderModel
from diffusers import WanTransformer3DModel
print("imported", in_diffusers(), in_transformers())
"""
    imported, in_diffusers, in_transformers = printed_by(code, ROOT)
    assert imported == "imported"
    if not pypi_kernels_is_installed():
        assert (in_diffusers, in_transformers) == ("False", "False")


@pytest.mark.skipif(pypi_kernels_is_installed(), reason="the PyPI package `kernels` is installed")
def test_transformers_would_run_our_folder_if_it_were_a_package(tmp_path: Path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("print('ran')")
    code = "from transformers.utils.import_utils import is_kernels_available as it; it()"
    assert printed_by(code, tmp_path) == ["ran"]


def test_sgmd_kernels_is_importable_and_brings_torch_at_most():
    code = """
import sys, sgmd_kernels
print(*{"sgmd_dist", "diffusers", "transformers", "triton", "flash_attn"} & set(sys.modules))
"""
    assert printed_by(code, ROOT, PYTHONPATH=str(ROOT / "kernels")) == []


# Layers


def test_the_import_contracts_hold():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = run_python(code, ROOT, PYTHONPATH=str(ROOT / "kernels"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


# Files


def test_no_source_file_is_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_every_module_is_named_after_what_it_holds():
    vague = {"utils.py", "util.py", "helper.py", "helpers.py", "misc.py", "common.py"}
    assert [str(path) for path in sources() if path.name in vague] == []


def test_every_folder_of_sgmd_dist_is_a_package():
    folders = {path.parent for path in (ROOT / "sgmd_dist").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_test_files_have_unique_names_and_lie_in_plain_folders():
    tests = ROOT / "tests"
    names = Counter(path.name for path in tests.rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []
    assert list(tests.rglob("__init__.py")) == []


# Version


def test_there_is_one_version():
    assert importlib.metadata.version("sgmd_dist") == sgmd_dist.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert "version" in project["dynamic"]


def test_no_folder_of_tests_is_passed_over(request: pytest.FixtureRequest) -> None:
    """pytest by itself does not look into a folder named `dist`."""
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    patterns = request.config.getini("norecursedirs")
    assert "dist" in folders
    assert not [folder for folder in folders if any(fnmatch(folder, pattern) for pattern in patterns)]
