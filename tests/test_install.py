"""Set-up: the Detectron2 installer on small stand-in archives, the packaged recipes, the first message."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from .common import load_tool

ROOT = Path(__file__).resolve().parents[1]
NAME = "pb1-detectron2-0.6"

# A module whose text every repair finds; each test that wants a repair to fail takes something away.
SOURCES = {
    "data/transforms/transform.py": "interp = Image.LINEAR\n",
    "data/build.py": "a = np.int, np.int64, np.bool_\n",
    "data/datasets/pascal_voc.py": "a = np.str\n",
    "evaluation/pascal_voc_evaluation.py": "a = np.bool\n",
    "evaluation/sem_seg_evaluation.py": "a = (np.float, np.int)\n",
    "structures/masks.py": "a = np.bool\n",
    "utils/video_visualizer.py": "a = np.bool\n",
    "utils/visualizer.py": "a = np.bool\n",
    "modeling/meta_arch/retinanet.py": "norm_name = str(type(get_norm(norm, 1)))\n",
    "model_zoo/model_zoo.py": """\
        import pkg_resources
        def get_config_file(config_path):
            return pkg_resources.resource_filename(
                "detectron2.model_zoo", os.path.join("configs", config_path)
            )
        """,
    "model_zoo/configs/common/train.py": "train = {}\n",
    "modeling/meta_arch/fcos.py": """\
        class FCOS:
            def match_anchors(self, anchors, gt_instances):
                for gt_per_image in gt_instances:
                    gt_centers = gt_per_image.gt_boxes.get_centers()
            def label_anchors(self, matched_indices, gt_instances):
                for gt_index, gt_per_image in zip(matched_indices, gt_instances):
                    label = gt_per_image.gt_classes[gt_index.clip(min=0)]
        """,
}


@pytest.fixture
def installer():
    """A fresh copy of the script as a module, so that a test may change its constants."""
    return load_tool("install_detectron2")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The only place where pip may look: an empty folder, and no network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_archive(folder: Path, sources: dict[str, str] = SOURCES) -> str:
    """Write an archive like the real one, only tiny, and return its SHA-256."""
    files = {f"detectron2/{path}": textwrap.dedent(text) for path, text in sources.items()}
    packages = {"detectron2"} | {str(Path(path).parent) for path in files if "configs" not in path}
    projects = ("PointRend/point_rend", "DeepLab/deeplab", "Panoptic-DeepLab/panoptic_deeplab")
    packages |= {f"projects/{project}" for project in projects}
    for package in packages | {"detectron2/data", "detectron2/modeling"}:
        files[f"{package}/__init__.py"] = ""
    # The real one imports torch and compiles; here only its metadata is asked for.
    files["setup.py"] = (
        "from setuptools import setup\nsetup(name='pb1-detectron2', version='0.6', packages=[])\n"
    )
    files["PKG-INFO"] = "Metadata-Version: 2.1\nName: pb1-detectron2\nVersion: 0.6\n"
    archive = folder / f"{NAME}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path, text in files.items():
            member = tarfile.TarInfo(f"{NAME}/{path}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(archive.read_bytes()).hexdigest()


def run(arguments: list, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, arguments)), capture_output=True, text=True, **kwargs)


def test_the_wheel_is_pure_python_and_repaired(installer, index, tmp_path, monkeypatch):
    monkeypatch.setattr(installer, "SHA256", write_archive(index))
    installer.main(["--wheel-dir", str(tmp_path / "wheels")])

    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name == "detectron2-0.6-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as packed:
        text = {name: packed.read(name).decode() for name in packed.namelist()}
    assert text["detectron2/data/transforms/transform.py"] == "interp = Image.BILINEAR\n"
    assert text["detectron2/data/build.py"] == "a = int, np.int64, np.bool_\n"
    assert "get_norm(norm, 32)" in text["detectron2/modeling/meta_arch/retinanet.py"]
    assert "pkg_resources" not in text["detectron2/model_zoo/model_zoo.py"]
    assert "detectron2/model_zoo/configs/common/train.py" in text
    assert "detectron2/projects/point_rend/__init__.py" in text
    assert "Requires-Dist: tabulate" in text["detectron2-0.6.dist-info/METADATA"]
    for name in ("_C", "modeling/meta_arch/fcos", "model_zoo/model_zoo"):
        compile(text[f"detectron2/{name}.py"], name, "exec")


def test_the_stand_in_names_what_is_missing(installer):
    stand_in = {}
    exec(installer.STAND_IN, stand_in)
    assert stand_in["has_cuda"]() is False
    with pytest.raises(RuntimeError, match=r"detectron2\._C\.box_iou_rotated is not available"):
        stand_in["__getattr__"]("box_iou_rotated")(1, 2)


@pytest.mark.parametrize("path", [path for path in SOURCES if "configs" not in path])
def test_a_repair_without_its_text_is_an_error(installer, tmp_path, path):
    for name, text in (SOURCES | {path: "pass\n"}).items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    with pytest.raises(installer.Failure, match=f"detectron2/{path}: nothing matches .*; expected"):
        installer.repair(tmp_path)


def test_a_wrong_hash_is_one_error_line(index, tmp_path):
    digest = write_archive(index)
    script = ROOT / "tools/install_detectron2.py"
    result = run([sys.executable, script, "--wheel-dir", tmp_path / "wheels"])
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        f"error: pb1-detectron2==0.6: the archive's SHA-256 is {digest}; expected "
    )
    assert not (tmp_path / "wheels").exists()


def test_no_network_is_one_error_line(index, tmp_path):
    script = ROOT / "tools/install_detectron2.py"
    result = run([sys.executable, script, "--wheel-dir", tmp_path / "wheels"])
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: pb1-detectron2==0.6: cannot be downloaded (pip: ")
    assert not (tmp_path / "wheels").exists()


def test_nothing_is_installed_when_a_requirement_is_missing(installer, index, monkeypatch):
    monkeypatch.setattr(installer, "REQUIREMENTS", ("d2kd-no-such-package",))
    with pytest.raises(installer.Failure, match="detectron2 0.6: cannot be installed .*no-such"):
        installer.install(index / "detectron2-0.6-py3-none-any.whl", None)


def test_an_installed_detectron2_is_left_alone_unless_forced(installer, monkeypatch, capsys):
    installed = []
    monkeypatch.setattr(installer, "download", lambda folder: folder)
    monkeypatch.setattr(installer, "build", lambda archive, destination: destination)
    monkeypatch.setattr(installer, "install", lambda *arguments: installed.append(arguments))

    installer.main([])
    assert not installed and "left alone" in capsys.readouterr().out
    installer.main(["--force"])
    assert len(installed) == 1


def test_fcos_learns_from_an_image_without_objects():
    import torch
    from detectron2 import model_zoo
    from detectron2.config import instantiate
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    model = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    model.backbone.bottom_up.stages.norm = model.backbone.bottom_up.stem.norm = "BN"
    nothing = Instances(
        (64, 64), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long()
    )
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    with EventStorage():
        losses = instantiate(model)([{"image": image, "instances": nothing}])
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_without_detectron2_the_import_says_how_to_get_it(tmp_path):
    # -S leaves out site-packages, and with them Detectron2.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import d2kd"
    result = run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: d2kd needs Detectron2")
    assert "tools/install_detectron2.py" in last


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds d2kd as its wheel installs it, and nothing else."""
    # Built from a copy: setuptools writes build/ and *.egg-info beside setup.py.
    scratch = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("d2kd", "configs", "projects"):
        shutil.copytree(ROOT / name, scratch / "source" / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, scratch / "source")
    target = scratch / "target"
    pip = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--no-index"]
    result = run([*pip, "--no-build-isolation", "--target", target, scratch / "source"])
    assert result.returncode == 0, result.stderr
    return target


@pytest.mark.parametrize("folder", ["d2kd", "configs", "projects"])
def test_the_wheel_holds_every_module_and_recipe(installed, folder):
    target = installed / "d2kd" / ("" if folder == "d2kd" else folder)
    found = [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.html")]
    files = {path.relative_to(ROOT / folder) for path in found}
    assert files
    assert not [file for file in files if not (target / file).is_file()]


def test_recipes_load_from_the_wheel(installed, tmp_path):
    code = """
        import sys
        from pathlib import Path
        import d2kd
        from d2kd.config import get_config, load
        root = Path(d2kd.__file__).parent
        assert root.parent == Path(sys.argv[1]), root
        get_config("common/train.py")
        recipes = sorted(root.glob("projects/*/configs/*.py"))
        assert recipes
        for recipe in recipes:
            assert "model" in load(str(recipe)), recipe
        """
    search = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": search.rstrip(os.pathsep)}
    command = [sys.executable, "-c", textwrap.dedent(code), installed]
    result = run(command, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
