"""The plugin is found however walproto was installed: from a wheel, with ``pip install .``, and
editable.

Each way gets a virtual environment of its own, which has nothing but walproto; what walproto
requires is lent to it by PYTHONPATH, where no editable install of walproto can be seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
SOURCES = ("setup.cfg", "pyproject.toml", "README.rst", "LICENSE", "walproto", "twisted")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, for building leaves files behind."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = PROJECT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "dropin.cache")
            shutil.copytree(source, checkout / name, ignore=ignored)
        else:
            shutil.copy(source, checkout / name)
    return checkout


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory),
        cwd=checkout,
    )
    (built,) = directory.glob("*.whl")
    return built


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "twisted/plugins/walsender.py" in names
    assert "walproto/py.typed" in names
    assert not {name for name in names if name.startswith(("tests/", "twisted/__init__"))}
    modules = {str(path.relative_to(PROJECT)) for path in (PROJECT / "walproto").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules | {
        "twisted/plugins/walsender.py"
    }


@pytest.mark.parametrize("way", ["wheel", "pip install .", "pip install -e ."])
def test_the_plugin_is_found(way: str, checkout: Path, wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    what: dict[str, list[str | Path]] = {
        "wheel": [wheel],
        "pip install .": [checkout],
        "pip install -e .": ["-e", checkout],
    }
    requirements = sysconfig.get_paths()["purelib"]
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-build-isolation", "--disable-pip-version-check"),
        *what[way],
        cwd=tmp_path,
        PYTHONPATH=requirements,
    )
    where = run(
        *(python, "-c", "import walproto; print(walproto.__file__)"),
        cwd=tmp_path,
        PYTHONPATH=requirements,
    )
    home = checkout if way == "pip install -e ." else environment
    assert Path(where.strip()).is_relative_to(home)
    for arguments in (["--help"], ["walsender", "--help"]):
        told = run(python, "-m", "twisted", *arguments, cwd=tmp_path, PYTHONPATH=requirements)
        assert "walsender" in told
    assert "--wal-dir" in told
