"""Export a trained detector to an ONNX or TorchScript file that needs neither Detectron2 nor d2kd.

The graph maps an image of any size to detections, with proposals, RoIAlign and NMS inside. It is Detectron2's
inference, traced with its ``TracingAdapter``. Notation: H, W: image size; D: number of detections.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..modeling import get_outputs_class
from ..utils.compat import tracing_adapter
from ..utils.errors import InputError
from ..utils.io import atomic_write

FORMATS = {"onnx": ".onnx", "torchscript": ".ts"}
"""Format -> file suffix."""

OPSET = 17  # of ONNX; Detectron2's RoIAlign needs at least 16
EXAMPLE = (192, 160)  # H and W of the image used for tracing; the graph does not depend on it
FIELDS = {
    "boxes": "pred_boxes",
    "scores": "scores",
    "classes": "pred_classes",
    "masks": "pred_masks",
}
"""Names of the outputs, in this order -> field of Detectron2's ``Instances``. Not every detector has masks."""
TYPES = {"boxes": "tensor(float)", "scores": "tensor(float)", "classes": "tensor(int64)"}
"""Names of the outputs that every ONNX file has -> ONNX's name of their type."""

BOX_TOLERANCE, SCORE_TOLERANCE, MASK_TOLERANCE = 0.1, 1e-3, 0.01
"""Largest differences between matching detections: of box coordinates in pixels, of scores, and of masks as the
fraction of the box's pixels in which they differ."""


def prepare_for_export(detector: nn.Module) -> nn.Module:
    """Return the detector in eval mode on the CPU, after checking that :func:`export_detector` supports it.

    Raises:
        InputError: if it is not a Faster, Mask or Cascade R-CNN with FPN, a RetinaNet, an FCOS or a GFL.
    """
    get_outputs_class(detector)
    if getattr(getattr(detector, "roi_heads", None), "keypoint_on", False):
        raise InputError(type(detector).__name__, "RoI heads with keypoints", "boxes and masks")
    return detector.cpu().eval()


def single_image_model(detector: nn.Module, image: Tensor) -> nn.Module:
    """Wrap a detector as a function of one image, to be traced inside :func:`tracing`.

    Args:
        detector: the result of :func:`prepare_for_export`, or another detector with Detectron2's interface.
        image: an example image.

    Returns:
        Detectron2's ``TracingAdapter``, whose ``flattened_inputs`` are the example. Its input is a (3, H, W) float32
        image in [0, 255] in the detector's ``input_format``. Its outputs, sorted by score, are boxes (D, 4), XYXY in
        pixels of the image; scores (D,); classes (D,), int64; and of a Mask R-CNN masks (D, 1, 28, 28), the
        probabilities predicted by its mask head.
    """
    return tracing_adapter()(detector, [{"image": image}], _detect).eval()


def _detect(detector: nn.Module, inputs: list[dict]) -> list[Boxes | Tensor]:
    if hasattr(detector, "roi_heads"):  # its postprocessing would paste masks into the image
        (found,) = detector.inference(inputs, do_postprocess=False)
        found = found[found.pred_boxes.nonempty()]
    else:
        found = detector(inputs)[0]["instances"]
    return [found.get(field) for field in FIELDS.values() if found.has(field)]


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Patch Detectron2 during tracing, so that the graph is valid for every image and can be saved.

    Warnings of tracing, and of the deprecated exporter, are suppressed.
    """
    modeling = "detectron2.modeling"
    with (
        warnings.catch_warnings(),
        # min(limit, size) would become a constant. It is only used as the end of a slice, for which limit works, too.
        mock.patch(f"{modeling}.meta_arch.dense_detector.min", lambda limit, size: limit),
        # This only changes gradients, and TorchScript cannot save Python functions.
        mock.patch(f"{modeling}.roi_heads.cascade_rcnn._ScaleGradient.apply", lambda x, scale: x),
    ):
        for category in (FutureWarning, DeprecationWarning, UserWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", category)
        yield


def export_detector(detector: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the detector to a file, atomically; the suffix selects the format.

    Args:
        detector: the result of :func:`prepare_for_export`.
        path: ``*.onnx`` or ``*.ts``.
        metadata: strings to save in the file, together with the names of its ``outputs``: in ONNX's
            ``metadata_props``, or TorchScript's extra file ``metadata.json``.

    Raises:
        InputError: if the packages to write ONNX are not installed.
    """
    image = torch.rand(3, *EXAMPLE, generator=torch.Generator().manual_seed(0)) * 255
    model = single_image_model(detector, image)
    with torch.no_grad(), tracing(), atomic_write(path) as temporary:
        outputs = list(FIELDS)[: len(model(image))]
        metadata = {**metadata, "outputs": " ".join(outputs)}
        if Path(path).suffix == FORMATS["torchscript"]:
            traced = torch.jit.trace(model, model.flattened_inputs, check_trace=False)
            extra = {"metadata.json": json.dumps(metadata)}
            torch.jit.save(traced, str(temporary), _extra_files=extra)
            return
        onnx = import_optional("onnx")
        torch.onnx.export(
            model,
            model.flattened_inputs,
            str(temporary),
            dynamo=False,  # the exporter that supports sizes that depend on the image
            opset_version=OPSET,
            input_names=["image"],
            output_names=outputs,
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: {0: "detections"} for name in outputs},
            },
        )
        graph = onnx.load(temporary)
        onnx.helper.set_model_props(graph, metadata)
        onnx.checker.check_model(graph)
        onnx.save(graph, temporary)


def import_optional(name: str) -> ModuleType:
    """Import a package of the extra ``export``.

    Raises:
        InputError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            name, f"cannot be imported ({error})", "pip install 'd2kd[export]'"
        ) from error


class ExportedDetector:
    """Runs a file of :func:`export_detector`; callable with Detectron2's batches.

    Args:
        path: ``*.onnx``, which onnxruntime runs, or ``*.ts``.

    Attributes:
        metadata: the strings saved with :func:`export_detector`.

    Raises:
        InputError: if the file cannot be read, or onnxruntime is not installed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        runtime = (
            None if self.path.suffix == FORMATS["torchscript"] else import_optional("onnxruntime")
        )
        try:
            self._open(runtime)
        except Exception as error:  # torch and onnxruntime have different exceptions
            found = f"cannot be read ({type(error).__name__})"
            raise InputError(path, found, "a file that `d2kd export` wrote") from error

    def _open(self, onnxruntime: ModuleType | None) -> None:
        if onnxruntime is None:
            extra = {"metadata.json": ""}
            with tracing():
                self._module = torch.jit.load(str(self.path), _extra_files=extra)
            self.metadata = json.loads(extra["metadata.json"])
            return
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only; the warnings are about constant folding
        self._module = None
        self._session = onnxruntime.InferenceSession(
            str(self.path), options, providers=["CPUExecutionProvider"]
        )
        self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        found = [one.name for one in self._session.get_outputs()]
        self._outputs = [name for name in FIELDS if name in found]

    def check_form(self) -> None:
        """Check that an ONNX file, maybe of another program, has the form of those of :func:`export_detector`.

        Raises:
            InputError: it has other inputs or outputs, or metadata are missing.
        """
        inputs = [(x.name, x.type, len(x.shape)) for x in self._session.get_inputs()]
        outputs = {x.name: x.type for x in self._session.get_outputs()}
        wrong = [name for name, kind in TYPES.items() if outputs.get(name) != kind]
        names, sides = (_parse_json(self.metadata.get(key)) for key in ("classes", "resize"))
        found = None
        if inputs != [("image", "tensor(float)", 3)]:
            found = f"inputs {', '.join(f'{n}: {t} of {d} dimensions' for n, t, d in inputs)}"
        elif wrong:
            found = f"output {wrong[0]}: {outputs.get(wrong[0], 'missing')}"
        elif not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
            found = f"metadata classes: {self.metadata.get('classes', 'missing')}"
        elif self.metadata.get("image_format") not in ("BGR", "RGB"):
            found = f"metadata image_format: {self.metadata.get('image_format', 'missing')}"
        elif "resize" in self.metadata and not (
            isinstance(sides, list) and len(sides) == 2 and all(type(n) is int for n in sides)
        ):
            found = f"metadata resize: {self.metadata['resize']}"
        if found is not None:
            expected = (
                "input image: float32 (3, H, W); outputs boxes, scores: float32, classes: int64; metadata classes: "
                'JSON such as ["cat", "dog"], image_format: BGR or RGB, and if they are resized, resize: [800, 1333]'
            )
            raise InputError(self.path, found, expected)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the input of an ONNX file; None if the file takes images of any size."""
        _, *size = self._session.get_inputs()[0].shape
        return tuple(size) if all(isinstance(side, int) for side in size) else None

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of their indices."""
        return json.loads(self.metadata["classes"])

    @torch.no_grad()
    def detect(self, image: Tensor) -> tuple[Tensor, ...]:
        """Run the file on an image; inputs and outputs are those of :func:`single_image_model`."""
        image = image.float()
        if self._module is not None:
            return self._module(image)
        return tuple(
            map(torch.from_numpy, self._session.run(self._outputs, {"image": image.numpy()}))
        )

    def __call__(self, batched_inputs: list[dict]) -> list[dict]:
        """Return each image's ``instances`` as Detectron2's detectors do, at its ``height`` and ``width``."""
        results = []
        for one in batched_inputs:
            boxes, *others = self.detect(one["image"])
            size = tuple(one["image"].shape[-2:])
            fields = zip(FIELDS.values(), (Boxes(boxes), *others), strict=False)
            found = Instances(size, **dict(fields))
            height, width = one.get("height", size[0]), one.get("width", size[1])
            results.append({"instances": detector_postprocess(found, height, width)})
        return results


def _parse_json(text: str | None) -> Any:
    """Return the content of a JSON text; None if there is none, or it is invalid."""
    with contextlib.suppress(TypeError, ValueError):
        return json.loads(text)
    return None


def count_mismatches(a: Instances, b: Instances) -> int:
    """Count the detections in ``a`` and ``b`` without a match in the other.

    Two detections match if they have the same class, and boxes, scores and masks differ by no more than
    :data:`BOX_TOLERANCE`, :data:`SCORE_TOLERANCE` and :data:`MASK_TOLERANCE`. Their order is ignored, because
    detections with equal scores may be swapped.
    """
    box = (a.pred_boxes.tensor[:, None] - b.pred_boxes.tensor).abs().amax(dim=-1)
    score = (a.scores[:, None] - b.scores).abs()
    same = (box <= BOX_TOLERANCE) & (score <= SCORE_TOLERANCE)
    same &= a.pred_classes[:, None] == b.pred_classes
    if a.has("pred_masks") or b.has("pred_masks"):
        row, other = pairs = same.nonzero(as_tuple=True)
        pixels = (a.pred_masks[row] != b.pred_masks[other]).sum(dim=(1, 2))
        same[pairs] = pixels <= (MASK_TOLERANCE * a.pred_boxes.area()[row]).clamp(min=1)
    return int((~same.any(dim=1)).sum() + (~same.any(dim=0)).sum())
