"""Set-up: the Detectron2 installer on small stand-in archives, the packaged recipes, the first message."""

import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import detectron2
import pytest
import yaml

from d2kd import __version__, tools
from d2kd.tools import COMMANDS, install_detectron2
from d2kd.utils.errors import InputError

from .common import ROOT, command, refusal
from .tiny_run import draw_data

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


install = command("install-detectron2")


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


def test_the_wheel_is_pure_python_and_repaired(index, tmp_path, monkeypatch):
    monkeypatch.setattr(install_detectron2, "SHA256", write_archive(index))
    install(["--wheel-dir", tmp_path / "wheels"])

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


def test_the_stand_in_names_what_is_missing():
    stand_in = {}
    exec(install_detectron2.STAND_IN, stand_in)
    assert stand_in["has_cuda"]() is False
    with pytest.raises(RuntimeError, match=r"detectron2\._C\.box_iou_rotated is not available"):
        stand_in["__getattr__"]("box_iou_rotated")(1, 2)


@pytest.mark.parametrize("path", [*(path for path in SOURCES if "configs" not in path), "_C.py"])
def test_a_repair_without_its_text_is_an_error(tmp_path, path):
    for name, text in (SOURCES | {path: "pass\n"}).items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    found = "exists" if path == "_C.py" else "nothing matches .*"
    with pytest.raises(InputError, match=f"detectron2/{path}: {found}; expected"):
        install_detectron2.repair(tmp_path)


def test_each_fault_of_the_archive_is_one_error_line(index, tmp_path, monkeypatch, capfd):
    wheels = tmp_path / "wheels"
    words = ["--wheel-dir", wheels]
    assert "0.6: cannot be downloaded (pip: " in refusal(install, words, capfd)
    digest = write_archive(index)
    line = refusal(install, words, capfd)
    assert f"pb1-detectron2==0.6: the archive's SHA-256 is {digest}; expected " in line
    monkeypatch.setattr(install_detectron2, "SHA256", digest)
    (tmp_path / "file").touch()
    line = refusal(install, ["--wheel-dir", tmp_path / "file"], capfd)
    assert f"{tmp_path}/file: File exists" in line
    monkeypatch.setattr(install_detectron2, "SETUP", "raise ValueError('%.0s')")
    assert "the wheel cannot be built (pip: " in refusal(install, words, capfd)
    assert not wheels.exists()
    tarfile.open(tmp_path / "other.tar.gz", "w:gz").close()
    with pytest.raises(InputError, match="other.tar.gz: holds no folder detectron2; expected"):
        install_detectron2.build_wheel(tmp_path / "other.tar.gz", tmp_path)
    monkeypatch.setattr(install_detectron2, "REQUIREMENTS", ("d2kd-no-such-package",))
    with pytest.raises(InputError, match="detectron2 0.6: cannot be installed .*no-such"):
        install_detectron2.install(index / "detectron2-0.6-py3-none-any.whl", None)


def test_an_installed_detectron2_is_left_alone_unless_forced(monkeypatch, capsys):
    installed = []
    monkeypatch.setattr(install_detectron2, "download", lambda folder: folder)
    monkeypatch.setattr(install_detectron2, "build_wheel", lambda archive, destination: destination)
    monkeypatch.setattr(install_detectron2, "install", lambda *given: installed.append(given))

    install([])
    assert not installed and "left alone" in capsys.readouterr().out
    install(["--force"])
    assert len(installed) == 1


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Built from a copy: setuptools writes build/ and *.egg-info beside setup.py.
    scratch = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("d2kd", "configs", "projects"):
        shutil.copytree(ROOT / name, scratch / "source" / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, scratch / "source")
    options = f"--no-deps --no-index --no-build-isolation -w {scratch} {scratch / 'source'}"
    pip("wheel", *options.split())
    (wheel,) = scratch.glob("d2kd-*.whl")
    return wheel


def pip(*words):
    result = run([sys.executable, "-m", "pip", "-q", *words])
    assert result.returncode == 0, result.stderr


def environment_with(wheel, folder):
    """A virtual environment that holds d2kd as its wheel installs it, and nothing else."""
    venv.create(folder, symlinks=True)
    pip("--python", folder / "bin/python", "install", "--no-deps", "--no-index", wheel)
    return folder


def site_packages(environment):
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    return environment_with(wheel, tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def complete(wheel, tmp_path_factory):
    """A virtual environment that has d2kd's wheel, and the packages of this one in place of a download."""
    folder = environment_with(wheel, tmp_path_factory.mktemp("complete"))
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    others.add(str(Path(detectron2.__file__).parents[1]))  # may be a source tree
    (site_packages(folder) / "others.pth").write_text("\n".join(sorted(others)))
    return folder


@pytest.fixture(scope="module")
def installed(bare):
    """The folder of the environment's packages."""
    return site_packages(bare)


FIRST = [
    ("train --config-file x", "detectron2: not installed; expected `d2kd install-detectron2`"),
    ("install-detectron2", "torch: not installed; expected pip install torch"),
]


def test_what_a_user_finds_without_detectron2(bare):
    def d2kd(*words):
        return run([bare / "bin/d2kd", *words], env={})

    shown = d2kd("--help")
    assert shown.returncode == 0 and all(f"\n    {name}" in shown.stdout for name in COMMANDS)
    for words in ([], ["tarin"], ["train"]):
        refused = d2kd(*words)
        assert refused.returncode == 2 and refused.stderr.startswith("usage: d2kd ")
    assert d2kd("--version").stdout == f"d2kd {__version__}\n"
    for words, line in FIRST:
        refused = d2kd(*words.split())
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert refused.stderr.startswith(f"error: {line}")


def test_every_command_has_a_file_in_tools_with_the_same_help(bare):
    shown = {}
    for file in (ROOT / "tools").glob("*.py"):
        result = run([bare / "bin/python", file, "--help"], env={})
        shown[re.match(r"usage: d2kd (\S+)", result.stdout)[1]] = result.stdout
    assert shown.keys() == COMMANDS.keys()
    for name, text in shown.items():
        assert run([bare / "bin/d2kd", name, "--help"], env={}).stdout == text


def test_without_detectron2_the_import_says_how_to_get_it(bare, tmp_path):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2/__init__.py").touch()
    code = f"""
        import sys
        import d2kd
        try:
            import d2kd.losses
        except ModuleNotFoundError as error:
            print(error)
        sys.path.append({str(tmp_path)!r})  # as if it were installed now
        import d2kd.losses
        """
    result = run([bare / "bin/python", "-I", "-c", textwrap.dedent(code)])
    assert result.stdout.startswith("d2kd needs Detectron2")
    assert "`d2kd install-detectron2`" in result.stdout
    assert re.search(r"ModuleNotFoundError: No module named '(numpy|torch)'\n$", result.stderr)


@pytest.mark.parametrize("folder", ["d2kd", "configs", "projects"])
def test_the_wheel_holds_every_module_and_recipe(installed, folder):
    target = installed / "d2kd" / ("" if folder == "d2kd" else folder)
    found = [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.html")]
    files = {path.relative_to(ROOT / folder) for path in found}
    assert files
    assert not [file for file in files if not (target / file).is_file()]


@pytest.mark.sweep
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
        recipes = [x for x in recipes if "vitdet" not in x.name]  # for later versions of Detectron2
        assert recipes
        for recipe in recipes:
            assert "model" in load(str(recipe)), recipe
        """
    search = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": search.rstrip(os.pathsep)}
    words = [sys.executable, "-c", textwrap.dedent(code), installed]
    result = run(words, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def outside(complete, tmp_path):
    """Runs a command of the environment in a folder outside the checkout: (name, words) -> what it prints."""

    def outside(name, *words):
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        own = {"D2KD_DATASETS": str(tmp_path), "D2KD_CACHE": str(tmp_path)}
        done = run([complete / "bin" / name, *words], cwd=tmp_path, env=kept | own)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return outside


STUDY = "projects/TAR/studies/few_labels.py"


def test_the_wheel_outside_the_checkout(outside, complete, tmp_path):
    """Its help, a first recipe for own data, and a study by its name."""
    assert outside("d2kd", "--version") == f"d2kd {__version__}\n"
    assert "install-detectron2" in outside("d2kd", "--help")
    draw_data(tmp_path / "train")
    draw_data(tmp_path / "val")
    data = ["--data", "train/data.json", "--val", "val/data.json"]
    code = f"""
        import d2kd
        from d2kd.config import load
        from d2kd.study import load_and_plan
        from d2kd.tools import main
        main(["init", *{data}, "--output", "mine.py"])
        assert d2kd.__file__ == {str(site_packages(complete) / "d2kd/__init__.py")!r}
        for name in ("alone", "teacher"):
            assert load(f"mine.py:{{name}}").train.output_dir == f"output/mine/{{name}}"
        print(*sorted(run.name for run in load_and_plan({STUDY!r}, [0], [], True)[1]))
        """
    names = outside("python", "-c", textwrap.dedent(code)).splitlines()[-1].split()
    assert {"teacher", "baseline_seed0", "tar_seed0", "teacher_labels_seed0"} < set(names)


@pytest.mark.sweep
def test_a_study_by_its_name_outside_the_checkout(outside, tmp_path):
    printed = outside("d2kd", "study", STUDY, "--fast")
    assert "the figures mean nothing" in printed
    for name in ("table.md", "report.html", "tar_seed0/model_final.pth"):
        assert (tmp_path / "output/few_labels_fast" / name).is_file(), name


def test_one_version():
    """Of the package, of the changelog's newest entry, which has a date, and of the citation."""
    newest = re.search(
        r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert newest[1] == cited[1] == __version__


def test_the_workflow_runs_make():
    """On every version of Python that the page of versions names as run, and from a checkout."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    assert workflow[True].keys() == {"push", "pull_request"}  # YAML reads "on" as true
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    (named,) = re.findall(r"^\| Python \| ([^|]+) \|", (ROOT / "docs/install.md").read_text(), re.M)
    assert versions == re.findall(r"\d\.\d+", named)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for name, job in workflow["jobs"].items():
        checkout, python, command = job["steps"]
        assert checkout["uses"].startswith("actions/checkout@") and python["with"]["cache"] == "pip"
        files = python["with"]["cache-dependency-path"].split()
        assert files == ["setup.py", "constraints.txt"] and name in targets
        assert command["run"] == f"make {name}" and job["runs-on"] == "ubuntu-latest"


@pytest.mark.parametrize("words, line", FIRST)
def test_what_has_to_be_there_first(refuses, monkeypatch, words, line):
    for module in (importlib.util, tools):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    refuses(lambda: tools.main(words.split()), line)
