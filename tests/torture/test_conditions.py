"""Odd conditions: read-only, deleted, moved or linked folders, odd names, a full disk, a closed standard output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torture.harness import ACTIONS, CASES, difference, snapshot

pytestmark = pytest.mark.torture


def run_shell(folder: Path, text: str) -> subprocess.CompletedProcess:
    """Run the command line in a shell, where its streams can be closed; ``mingpt`` is this package's."""
    text = text.replace("mingpt ", f"{sys.executable} -m mingpt ", 1)
    return subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("change", ["deleted", "moved"])
@pytest.mark.parametrize("k", [12, 30, 50])
def test_a_folder_that_goes_while_it_is_in_use(bench, change, k):
    """D8: it is not made again with half of what belongs in it."""
    folder = bench.fresh("pretrain")
    first = bench.run("pretrain", folder, k=k, action=ACTIONS["stop"])
    assert "pid" in first, "the command has fewer file calls"
    if change == "deleted":
        shutil.rmtree(folder / "run")
    else:
        (folder / "run").rename(folder / "elsewhere")
    end = bench.server.run(**{"continue": first["pid"]})
    assert (end["rc"], end["err"].count("error: "), "Traceback" in end["err"]) == (2, 1, False), end
    assert "run" in end["err"].splitlines()[-1]
    assert not list((folder / "run").rglob("*.*")), "the folder was made again"
    assert bench.run("pretrain", folder)["rc"] == 0
    shutil.rmtree(folder / "elsewhere", ignore_errors=True)
    assert difference(snapshot(folder), snapshot(bench.done("pretrain"))) == ""


@pytest.mark.parametrize("name", ["ä ü/日本", "with 'quotes' and $x", "-", "." + "n" * 200, "a\nb"])
def test_odd_names(bench, name):
    folder = bench.fresh("pretrain")
    job = {"argv": [each if each != "run" else f"./{name}" for each in CASES["pretrain"].job["argv"]]}
    result = bench.run("pretrain", folder, **job)
    assert result["rc"] == 0, result["err"]
    assert (folder / name / "model.safetensors").is_file()


@pytest.mark.parametrize("length", [230, 241, 246, 249, 255, 300])
def test_d12_a_long_name_fails_before_the_work_or_not_at_all(bench, length):
    folder = bench.fresh("predict")
    job = {"argv": [each.replace("out.jsonl", "o" * length) for each in CASES["predict"].job["argv"]]}
    result = bench.run("predict", folder, **job)
    if result["rc"] == 0:
        assert (folder / ("o" * length)).read_text().count("\n") == 5
    else:
        assert result["rc"] == 2
        assert "File name too long" in result["err"]
        assert "Predicting" not in result["err"]
    assert result["rc"] == 0 or length > 246


@pytest.mark.parametrize("target", ["folder", "file"])
def test_d12_a_symbolic_link_stays_one(bench, target):
    folder = bench.fresh("pretrain")
    if target == "folder":
        (folder / "real").mkdir()
        (folder / "run").symlink_to("real")
    else:
        (folder / "run").mkdir()
        (folder / "run" / "model.safetensors").symlink_to(folder / "real.safetensors")
    assert bench.run("pretrain", folder)["rc"] == 0
    link = folder / ("run" if target == "folder" else "run/model.safetensors")
    assert link.is_symlink()
    assert link.resolve().exists()
    assert bench.run("pretrain", folder)["rc"] == 0


def test_what_cannot_be_written_can_be_read(bench, tmp_path):
    """A finished run on a medium that is read only: mounted so, where the tests may mount, else by its permissions."""
    folder = bench.fresh("reproduce")
    shutil.copytree(bench.done("reproduce") / "run", folder / "run")
    if os.geteuid() == 0:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder / "run")]
        shutil.copytree(folder / "run", tmp_path / "copy")
        is_mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
        if is_mounted:
            shutil.copytree(tmp_path / "copy", folder / "run", dirs_exist_ok=True)
            subprocess.run(["mount", "-o", "remount,ro", str(folder / "run")], check=True)
    else:
        is_mounted = False
        subprocess.run(["chmod", "-R", "a-w", str(folder / "run")], check=True)
    try:
        assert bench.run("reproduce", folder)["rc"] == 0
        new = bench.server.run(argv=["prefix", "Modulo", "--run", "run"], cwd=str(folder), root="")
        assert new["rc"] == (2 if is_mounted or os.geteuid() else 0)
        assert "Traceback" not in new["err"]
    finally:
        if is_mounted:
            subprocess.run(["umount", str(folder / "run")], check=True)
        subprocess.run(["chmod", "-R", "u+w", str(folder / "run")], check=True)


def test_a_full_disk(bench, tmp_path):
    """On a disk of 64 kB the command says which file does not fit; with room, the same command goes on."""
    folder = bench.fresh("pretrain")
    (folder / "run").mkdir()
    size = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder / "run")]
    if os.geteuid() or subprocess.run(size, check=False, capture_output=True).returncode:
        first = bench.run("pretrain", folder, k=20, action=ACTIONS["no space from then on"])
        is_mounted = False
    else:
        first, is_mounted = bench.run("pretrain", folder), True
    try:
        assert first["rc"] == 2, first["err"]
        assert "No space left on device" in first["err"]
        assert "/run/" in first["err"]
        if is_mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(folder / "run")], check=True)
        assert bench.run("pretrain", folder)["rc"] == 0
        assert difference(snapshot(folder), snapshot(bench.done("pretrain"))) == ""
    finally:
        if is_mounted:
            subprocess.run(["umount", str(folder / "run")], check=True)


def test_a_closed_or_broken_output(bench):
    folder = bench.fresh("prefix")
    shutil.copytree(bench.done("prefix") / "run", folder / "run", dirs_exist_ok=True)
    for text in ("mingpt tasks | true", "mingpt tasks >&-", "mingpt eval --run run --rows 2 >&-", "mingpt tasks 2>&-"):
        result = run_shell(folder, text)
        assert "Traceback" not in result.stderr + result.stdout, text
        assert "Exception ignored" not in result.stderr, text


def test_the_clock_may_go_backwards(bench, monkeypatch):
    """Nothing is decided by a clock: files from the future are as good as any."""
    folder = bench.fresh("pretrain")
    bench.run("pretrain", folder, k=40, action=ACTIONS["kill"])
    future = time.time() + 10**8
    for path in folder.rglob("*"):
        os.utime(path, (future, future))
    assert bench.run("pretrain", folder)["rc"] == 0
    assert difference(snapshot(folder), snapshot(bench.done("pretrain"))) == ""
