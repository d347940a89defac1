"""The documentation's site builds without a warning, and needs nothing from other servers."""

import os
import re
import subprocess
import sys

from .common import ROOT


def test_the_site(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api/losses/index.html").read_text()
    assert 'id="d2kd.losses.DistillLoss.normalizer"' in reference
    for path in tmp_path.rglob("*.html"):
        text = path.read_text()
        fetched = re.findall(r"<(?:script|img|link|iframe)\b[^>]*=\"?https?://[^>]*>", text)
        assert not [tag for tag in fetched if "canonical" not in tag], path
        assert not re.findall(r":(?:class|func|meth|mod|attr|data):", text), path
