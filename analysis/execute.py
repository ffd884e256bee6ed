"""Executes notebooks and stores them with their outputs, small enough to commit.

    python -m analysis.execute analysis/notebooks/*.ipynb

A hash of the code that produced the outputs is stored too, so that a test can tell whether they are those of today's
code. nbclient, nbformat and ipykernel are in requirements-dev.txt.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

from experiments.errors import run_command

HASH = "executed_code_sha256"
COLOURS = 48
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def code_hash(notebook: Any) -> str:
    """Return the hash of a notebook's code cells, in order."""
    sources = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    joined = ["".join(source) for source in sources]  # a list of lines in the file, one string in nbformat
    return hashlib.sha256(json.dumps(joined).encode()).hexdigest()


def text_outputs(notebook: Any) -> list[list[str]]:
    """Return the text that each code cell shows, without progress on standard error."""
    found: list[list[str]] = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        texts: list[str] = []
        for output in cell["outputs"]:
            data = output.get("data", {})
            told = data.get("text/markdown") or data.get("text/plain") or output.get("text", "")
            if output.get("name") != "stderr":
                texts.append(ADDRESS.sub("", "".join(told)))
        found.append(texts)
    return found


def execute(path: Path) -> Any:
    """Execute a notebook in its folder and return it with outputs, the code's hash, and nothing that varies."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(path.parent)}}).execute()
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.execution_count = number + 1
        cell.metadata.pop("execution", None)  # times
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number + 1
            for kind in ("text/html", "image/svg+xml"):  # the same as text or as a picture, several times as large
                if len(output.get("data", {})) > 1:
                    output["data"].pop(kind, None)
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = _smaller(output["data"]["image/png"])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        HASH: code_hash(notebook),
    }
    return notebook


def _smaller(png: str) -> str:
    """Reduce a picture, as base64 text, to a palette: a third of its size."""
    from PIL.Image import Dither
    from PIL.PngImagePlugin import PngImageFile

    picture, small = PngImageFile(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    picture.convert("RGB").quantize(COLOURS, dither=Dither.NONE).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.execute", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="notebook", help="an .ipynb file, written in place")
    options = parser.parse_args(arguments)
    import nbformat

    for path in options.notebooks:
        nbformat.write(execute(path), path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_command(main)
