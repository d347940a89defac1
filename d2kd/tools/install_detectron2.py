"""Install Detectron2 0.6 without a compiler: download, verify and patch it, build a pure-Python wheel, install.

Detectron2 is not on PyPI under its own name, and its last release does not work with current versions of torch,
NumPy, Pillow and setuptools. ``pb1-detectron2`` has its unchanged Python files, but not the C++ sources, so pip alone
cannot install it. This command downloads that archive with pip, verifies its SHA-256, applies patches, each of which
must match, and packs a wheel of Detectron2 0.6. It lacks the compiled operators: rotated boxes, deformable
convolutions and the fast COCO evaluator. An existing installation of Detectron2 is not changed.

torch and setuptools must be installed: the archive's own ``setup.py`` imports them when pip asks for its metadata.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from ..utils.errors import InputError

ARCHIVE = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

# Detectron2's dependencies. As for Detectron2, torch, torchvision and OpenCV must be installed separately, because
# the right build depends on the machine.
REQUIREMENTS = (
    "Pillow>=9.1",
    "black",  # LazyConfig.to_py
    "cloudpickle",  # its train loops and its dataset workers
    "fvcore>=0.1.5.post20220119",
    "hydra-core>=1.1",
    "iopath>=0.1.7",
    "matplotlib",  # Visualizer
    "numpy",
    "omegaconf>=2.1",
    "pycocotools>=2.0.2",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)

STAND_IN = '''\
"""Stands in for Detectron2's compiled operators, which this build does not have."""

_MISSING = "Detectron2 was built without its compiled operators, so {} is not available; "
_MISSING += "an official build of Detectron2 with compiled operators has it"


def get_compiler_version():
    return "none (built without compiled operators)"


def get_cuda_version():
    return "none (built without compiled operators)"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise RuntimeError(_MISSING.format("detectron2._C." + name))

    return missing
'''

# The archive's setup.py compiles C++ code; this one does not. build() fills in the requirements.
SETUP = """\
from setuptools import find_packages, setup

projects = {
    "detectron2.projects.point_rend": "projects/PointRend/point_rend",
    "detectron2.projects.deeplab": "projects/DeepLab/deeplab",
    "detectron2.projects.panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}
setup(
    name="detectron2",
    version="0.6",
    description="Detectron2 0.6, Python files only, repaired for current libraries",
    url="https://github.com/facebookresearch/detectron2",
    license="Apache-2.0",
    packages=find_packages(include=["detectron2", "detectron2.*"]) + list(projects),
    package_dir=projects,
    package_data={"detectron2.model_zoo": ["configs/**/*.py", "configs/**/*.yaml"]},
    python_requires=">=3.10",
    install_requires=%r,
)
"""


class Repair(NamedTuple):
    """One replacement in one file of the archive; ``old`` is a regular expression."""

    reason: str
    path: str
    old: str
    new: str


def _numpy_aliases(*paths: str) -> list[Repair]:
    """Replace ``np.bool`` and similar aliases in each of these files."""
    reason = "aliases of the builtins are gone from NumPy 1.24"
    return [
        Repair(reason, path, r"\bnp\.(bool|int|float|object|str)\b(?!_)", r"\1") for path in paths
    ]


REPAIRS = [
    Repair(
        "Image.LINEAR is gone from Pillow 10",
        "data/transforms/transform.py",
        r"\bImage\.LINEAR\b",
        "Image.BILINEAR",
    ),
    *_numpy_aliases(
        "data/build.py",
        "data/datasets/pascal_voc.py",
        "evaluation/pascal_voc_evaluation.py",
        "evaluation/sem_seg_evaluation.py",
        "structures/masks.py",
        "utils/video_visualizer.py",
        "utils/visualizer.py",
    ),
    Repair(
        "a GroupNorm of one channel cannot be built, even to get its name",
        "modeling/meta_arch/retinanet.py",
        r"get_norm\(norm, 1\)",
        "get_norm(norm, 32)",
    ),
    Repair(
        "pkg_resources is gone from setuptools",
        "model_zoo/model_zoo.py",
        r"import pkg_resources\n",
        "from importlib.resources import files\n",
    ),
    Repair(
        "pkg_resources is gone from setuptools",
        "model_zoo/model_zoo.py",
        r'pkg_resources\.resource_filename\(\s*"detectron2\.model_zoo", '
        r'os\.path\.join\("configs", config_path\)\s*\)',
        'str(files("detectron2.model_zoo").joinpath("configs", config_path))',
    ),
    Repair(
        "an image without objects has nothing to match",
        "modeling/meta_arch/fcos.py",
        r"(?P<loop>        for gt_per_image in gt_instances:\n)(?=            gt_centers = )",
        r"\g<loop>"
        "            if len(gt_per_image) == 0:\n"
        "                no_match = torch.full((len(anchors),), -1, device=anchors.device)\n"
        "                matched_indices.append(no_match)\n"
        "                continue\n",
    ),
    Repair(
        "an image without objects has no label to look up: every anchor is background",
        "modeling/meta_arch/fcos.py",
        r"(?P<loop>        for gt_index, gt_per_image in zip\(matched_indices, gt_instances\):\n)"
        r"(?=            label = )",
        r"\g<loop>"
        "            if len(gt_per_image) == 0:\n"
        "                matched_labels.append(torch.full_like(gt_index, self.num_classes))\n"
        "                no_boxes = gt_per_image.gt_boxes.tensor.new_zeros((len(gt_index), 4))\n"
        "                matched_boxes.append(Boxes(no_boxes))\n"
        "                continue\n",
    ),
]


def repair(package: Path) -> None:
    """Apply all repairs to the unpacked folder ``detectron2``; raise InputError if one does not match."""
    for one in REPAIRS:
        path = package / one.path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        text, count = re.subn(one.old, one.new, text)
        if count == 0:
            found = f"nothing matches {one.old!r}"
            raise InputError(f"detectron2/{one.path}", found, f"the text to repair ({one.reason})")
        path.write_text(text, encoding="utf-8")
    stand_in = package / "_C.py"
    if stand_in.exists():
        raise InputError("detectron2/_C.py", "exists", "an archive without it")
    stand_in.write_text(STAND_IN, encoding="utf-8")


def pip(*arguments: object, show: bool = False) -> subprocess.CompletedProcess:
    """Run this interpreter's pip, and capture its output unless ``show`` is true."""
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    return subprocess.run(
        command, stdout=None if show else subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def pip_error(result: subprocess.CompletedProcess) -> str:
    """Return the last exception or error in pip's output."""
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"\w+Error: ", line)]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return "pip: " + (raised or errors or lines or [f"exit status {result.returncode}"])[-1]


def download(folder: Path) -> Path:
    """Download the archive into ``folder``; pip verifies its hash before executing any of it."""
    for module in ("torch", "setuptools"):
        if importlib.util.find_spec(module) is None:
            packages = "pip install torch torchvision setuptools, before Detectron2"
            raise InputError(module, "not installed", packages)
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{ARCHIVE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    result = pip(
        *("download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"),
        *("--require-hashes", "-r", requirement, "-d", folder),
    )
    if result.returncode:
        got = re.search(r"Got\s+([0-9a-f]{64})", result.stderr)
        if got:
            raise InputError(ARCHIVE, f"the archive's SHA-256 is {got[1]}", SHA256)
        raise InputError(
            ARCHIVE,
            f"cannot be downloaded ({pip_error(result)})",
            "a package index that has it, such as PyPI",
        )
    return next(folder.glob("*.tar.gz"))


def build_wheel(archive: Path, destination: Path) -> Path:
    """Repair the archive's files and build a wheel from them in ``destination``."""
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        source = Path(scratch, archive.name.removesuffix(".tar.gz"))
        if not (source / "detectron2").is_dir():
            raise InputError(
                archive.name, "holds no folder detectron2", f"the source archive {ARCHIVE}"
            )
        repair(source / "detectron2")
        shutil.rmtree(next(source.glob("*.egg-info"), source / "none"), ignore_errors=True)
        (source / "setup.py").write_text(SETUP % (REQUIREMENTS,), encoding="utf-8")
        result = pip(
            "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", scratch, source
        )
        if result.returncode:
            raise InputError(
                "detectron2 0.6",
                f"the wheel cannot be built ({pip_error(result)})",
                "a working setuptools",
            )
        wheel = next(Path(scratch).glob("*.whl"))
        destination.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(wheel, destination / wheel.name))


def install(wheel: Path, constraints: Path | None) -> None:
    """Install first the requirements, then the wheel, so that a failure leaves no broken Detectron2."""
    limits = ("-c", constraints) if constraints else ()
    for arguments in (
        (*limits, *REQUIREMENTS),
        ("--no-deps", "--force-reinstall", "--no-index", wheel),
    ):
        result = pip("install", "--quiet", *arguments, show=True)
        if result.returncode:
            raise InputError(
                "detectron2 0.6",
                f"cannot be installed ({pip_error(result)})",
                "the packages it needs in pip's index",
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wheel-dir", type=Path, metavar="DIR", help="build the wheel into DIR and install nothing"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a Detectron2 that is already installed"
    )
    parser.add_argument(
        "--constraint", "-c", type=Path, metavar="FILE", help="a constraints file for pip"
    )


def run(args: argparse.Namespace) -> None:
    spec = importlib.util.find_spec("detectron2")
    if spec and not args.force and not args.wheel_dir:
        where = spec.origin or "an unfinished folder"
        print(f"Detectron2 is installed already ({where}) and left alone; --force replaces it.")
        return
    try:
        with tempfile.TemporaryDirectory() as scratch:
            print(
                f"Downloading {ARCHIVE}, checking its SHA-256, applying {len(REPAIRS) + 1} repairs …",
                flush=True,
            )
            wheel = build_wheel(download(Path(scratch)), args.wheel_dir or Path(scratch))
            if args.wheel_dir:
                print(f"Built {wheel}")
            else:
                install(wheel, args.constraint)
                print("Installed Detectron2 0.6 (without compiled operators).")
    except OSError as error:
        raise InputError(error.filename, error.strerror, "a usable path") from error
