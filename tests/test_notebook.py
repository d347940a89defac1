"""The notebook for a free GPU. ``test_pages.py`` checks its commands and links."""

import json
import os
import sys

import pytest

from .common import ROOT
from .pages import BASH, cells

NOTEBOOK = ROOT / "docs/notebooks/quick_start.ipynb"
SWITCH = "FAST = False"


def test_its_code_compiles_and_nothing_else_is_in_it():
    python = [x for x in cells(NOTEBOOK, "code") if not x.startswith(BASH)]
    for text in python:
        compile(text, "a cell", "exec")
    assert sum(SWITCH in text for text in python) == 1 and SWITCH in python[0]
    content = json.loads(NOTEBOOK.read_text())
    assert content["nbformat"] == 4 and len(content["cells"]) <= 25
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(ids) == len(set(ids))


@pytest.mark.sweep
def test_it_runs_on_a_cpu(tmp_path, monkeypatch):
    nbformat, nbclient = map(pytest.importorskip, ("nbformat", "nbclient"))
    pytest.importorskip("ipykernel")
    command = tmp_path / "bin/d2kd"  # of this source, whatever else is installed
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m d2kd "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = first.source.replace(SWITCH, "FAST = True")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1800, resources=resources).execute()
    folder = tmp_path / "quick_start_fast"
    for name in ("output/mine/distilled/model_best.pth", "exported/model.onnx"):
        assert (folder / name).is_file(), name
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    kinds = [kind for given in outputs for x in given for kind in x.get("data", ())]
    assert (
        sum(kind.startswith("image/") for kind in kinds) >= 2 + 3
    )  # of the data, of the detections
    assert "pictures in the report" in str(outputs)
    assert "objects; the first scores" in str(outputs[-1])
