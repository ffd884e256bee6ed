"""Snapshots of the code at submission, so that later edits do not affect queued jobs.

A snapshot is a git checkout of the commit, plus the uncommitted changes and the untracked files in the project's
folders, so that records made from it name the same commit. It is named by its content and shared between submissions.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from experiments import ROOT
from experiments.errors import UserError, shortened

FOLDERS = ("configs", "diablo", "experiments", "eval", "analysis", "slurm")
DIFF = ("diff", "--binary", "--no-color", "--no-ext-diff", "--src-prefix=a/", "--dst-prefix=b/", "HEAD")


def take_snapshot(folder: Path, project: Path = ROOT) -> dict[str, Any]:
    """Create the snapshot under `folder`, unless it exists, and return its description."""
    tracked = (project / ".git").exists() and shutil.which("git") is not None
    commit = _git(project, "rev-parse", "HEAD").decode().strip() if tracked else None
    changes = _git(project, *DIFF) if tracked else b""
    untracked = _untracked(project) if tracked else _all_files(project)
    digest = hashlib.sha256(f"{commit}\n".encode() + changes)
    for name in untracked:
        digest.update(f"\n{name}\n".encode() + (project / name).read_bytes())
    code = folder / digest.hexdigest()[:12]
    about = {"folder": str(code), "commit": commit, "changed": bool(changes), "untracked": untracked if commit else []}
    if code.is_dir():
        return about
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=".making-"))
    aside.chmod(0o755)
    try:
        if commit is not None:
            _git(project, "clone", "--quiet", "--shared", "--no-checkout", str(project), str(aside))
            _git(aside, "checkout", "--quiet", "--detach", commit)
            if changes:
                _git(aside, "apply", "--whitespace=nowarn", "-", text=changes)
                (folder / f"{code.name}.diff").write_bytes(changes)
        for name in untracked:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(project / name, aside / name)
        aside.rename(code)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return about


def _untracked(project: Path) -> list[str]:
    listed = _git(project, "ls-files", "-z", "--others", "--exclude-standard", "--", *FOLDERS).decode()
    return sorted(name for name in listed.split("\0") if name)


def _all_files(project: Path) -> list[str]:
    """Return everything in the project's folders, for a copy that is not a git checkout."""
    files = (path for folder in FOLDERS for path in (project / folder).rglob("*"))
    return sorted(str(p.relative_to(project)) for p in files if p.is_file() and "__pycache__" not in p.parts)


def _git(folder: Path, *arguments: str, text: bytes | None = None) -> bytes:
    result = subprocess.run(["git", "-C", str(folder), *arguments], input=text, capture_output=True)
    if result.returncode:
        said = shortened(result.stderr.decode(errors="replace").splitlines())
        raise UserError(f"git {arguments[0]} in {folder}, for the snapshot of the code: {said}")
    return result.stdout
