"""What the README shows works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

from d2kd.config import is_distiller, load

README = (Path(__file__).parents[1] / "README.md").read_text()
FILES = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", README, flags=re.DOTALL))


def test_the_example_loss_in_a_package_of_its_own(tmp_path):
    for name in ("my_method/loss.py", "my_method/recipe.py", "my_method/test_loss.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(FILES[name])
    (tmp_path / "my_method" / "__init__.py").touch()
    code = (
        "from my_method.test_loss import test_properties; test_properties();"
        "from d2kd.config import load; print(load('my_method/recipe.py').model.losses)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "ChannelDirection" in done.stdout


def test_the_recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(FILES["recipe.py"])
    config = load(str(path))
    assert is_distiller(config.model) and config.model.teacher.weights == "teacher.pkl"


def test_every_path_it_names_is_there():
    root = Path(__file__).parents[1]
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    tools = re.findall(r"\btools/\w+\.py", README)
    assert len(links) > 5 and tools
    assert not [path for path in (*links, *tools) if not (root / path).exists()]
