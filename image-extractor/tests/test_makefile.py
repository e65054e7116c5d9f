"""The commands that make would run: an environment of the user's own is never changed."""

import os
import shutil
import subprocess

import pytest
from conftest import PACKAGE


def would_run(*words, folder):
    """Commands that make prints instead of running them, in a copy without an environment."""
    if shutil.which("make") is None:
        pytest.skip("make is absent")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(PACKAGE / name, folder)
    shutil.copytree(PACKAGE / "scripts", folder / "scripts", dirs_exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if k not in ("VENV", "SETUP", "PYTHON")}
    clean = {k: v for k, v in clean.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", *words],
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_without_set_up_the_named_environment_is_used_and_not_installed_into(tmp_path):
    for target in ("test", "lint", "demo", "bench"):
        printed = would_run("VENV=/my/env", "SETUP=no", target, folder=tmp_path)
        assert printed.startswith("/my/env/bin/"), printed
        assert "pip" not in printed


def test_an_environment_named_above_is_found(tmp_path):
    (tmp_path / "env").mkdir()
    (tmp_path / "package").mkdir()
    printed = would_run("VENV=env", "SETUP=no", "test", folder=tmp_path / "package")
    assert printed.startswith("../env/bin/python")


def test_set_up_and_clean_touch_only_their_own_environment(tmp_path):
    for target in ("test", "clean"):
        assert "/my/env" not in would_run("VENV=/my/env", target, folder=tmp_path)
    assert "pip install" in would_run("VENV=/my/env", "test", folder=tmp_path)
    assert would_run("clean", folder=tmp_path).startswith("rm -rf .venv ")
