"""A trained detector as one file that needs neither Detectron2 nor this project: ONNX or TorchScript.

The graph takes an image of any size and gives detections; proposals, RoIAlign and NMS are inside. It is Detectron2's
own inference, traced through its ``TracingAdapter``. Letters: H and W of the image, D detections.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..modeling import outputs_of
from ..utils.compat import tracing_adapter
from ..utils.errors import InputError
from ..utils.io import written_whole

FORMATS = {"onnx": ".onnx", "torchscript": ".ts"}
"""What can be written, and the suffix of its file."""

OPSET = 17  # of ONNX; RoIAlign as Detectron2 has it came with 16
EXAMPLE = (192, 160)  # H and W of the image that is traced; it leaves no mark in the graph
FIELDS = {
    "boxes": "pred_boxes",
    "scores": "scores",
    "classes": "pred_classes",
    "masks": "pred_masks",
}
"""Outputs of a file, in this order, and the field of Detectron2's ``Instances`` each is; masks where there are some."""

BOX_TOLERANCE, SCORE_TOLERANCE, MASK_TOLERANCE = 0.1, 1e-3, 0.01
"""How far a detection of the file may lie from the detector's to be the same: in pixels, of 1, and in the share of
the box's pixels that one mask has and the other has not."""


def exportable(detector: nn.Module) -> nn.Module:
    """The detector in ``eval()`` on the CPU, if :func:`write` can write all that it finds.

    Raises:
        InputError: another kind of detector than a Faster, Mask or Cascade R-CNN on an FPN, a RetinaNet, an FCOS
            or a GFL.
    """
    outputs_of(detector)
    if getattr(getattr(detector, "roi_heads", None), "keypoint_on", False):
        raise InputError(type(detector).__name__, "RoI heads with keypoints", "boxes and masks")
    return detector.cpu().eval()


def of_image(detector: nn.Module, image: Tensor) -> nn.Module:
    """A detector as a function of one image, to be traced inside :func:`tracing`.

    Args:
        detector: what :func:`exportable` returns, or another of Detectron2's interface.
        image: an example.

    Returns:
        Detectron2's ``TracingAdapter``, whose ``flattened_inputs`` are the example. It takes ``(3, H, W)`` float32
        from 0 to 255, channels in the detector's ``input_format``, and returns, best first: boxes ``(D, 4)``, XYXY
        in pixels of the image; scores ``(D,)``; classes ``(D,)`` int64; of a Mask R-CNN masks ``(D, 1, 28, 28)``,
        the probability at each point of the box, as its head gives them.
    """
    return tracing_adapter()(detector, [{"image": image}], _found).eval()


def _found(detector: nn.Module, inputs: list[dict]) -> list[Boxes | Tensor]:
    if hasattr(detector, "roi_heads"):  # its postprocessing would paste the masks
        (found,) = detector.inference(inputs, do_postprocess=False)
        found = found[found.pred_boxes.nonempty()]
    else:
        found = detector(inputs)[0]["instances"]
    return [found.get(field) for field in FIELDS.values() if found.has(field)]


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """For the time of a trace, so that it holds for every image and can be saved.

    Without the remarks, too, that tracing, and an exporter on its way out, make at every line of Detectron2.
    """
    modeling = "detectron2.modeling"
    with (
        warnings.catch_warnings(),
        # The smaller of a limit and a size would be a constant; the slice that it is for ends by itself.
        mock.patch(f"{modeling}.meta_arch.dense_detector.min", lambda limit, size: limit),
        # It changes gradients alone, and TorchScript cannot save a function of Python.
        mock.patch(f"{modeling}.roi_heads.cascade_rcnn._ScaleGradient.apply", lambda x, scale: x),
    ):
        for category in (FutureWarning, DeprecationWarning, UserWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", category)
        yield


def write(detector: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the detector, whole or not at all; the suffix of ``path`` says in which format.

    Args:
        detector: what :func:`exportable` returned.
        path: ``*.onnx`` or ``*.ts``.
        metadata: strings by key, kept in the file, with the names of its ``outputs``: ONNX's ``metadata_props``;
            TorchScript's extra file ``metadata.json``.

    Raises:
        InputError: the packages that write ONNX are missing.
    """
    image = torch.rand(3, *EXAMPLE, generator=torch.Generator().manual_seed(0)) * 255
    model = of_image(detector, image)
    with torch.no_grad(), tracing(), written_whole(path) as temporary:
        outputs = list(FIELDS)[: len(model(image))]
        metadata = {**metadata, "outputs": " ".join(outputs)}
        if Path(path).suffix == FORMATS["torchscript"]:
            traced = torch.jit.trace(model, model.flattened_inputs, check_trace=False)
            extra = {"metadata.json": json.dumps(metadata)}
            torch.jit.save(traced, str(temporary), _extra_files=extra)
            return
        onnx = imported("onnx")
        torch.onnx.export(
            model,
            model.flattened_inputs,
            str(temporary),
            dynamo=False,  # the exporter for graphs whose sizes depend on the picture
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


def imported(name: str) -> ModuleType:
    """A package of the extra ``export``.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            name, f"cannot be imported ({error})", "pip install 'd2kd[export]'"
        ) from error


class ExportedDetector:
    """A file that :func:`write` wrote, run as any program may run it; callable on Detectron2's batches.

    Args:
        path: ``*.onnx``, for onnxruntime, or ``*.ts``.

    Attributes:
        metadata: strings by key, as they were given.

    Raises:
        InputError: the file cannot be read, or onnxruntime is missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        runtime = None if self.path.suffix == FORMATS["torchscript"] else imported("onnxruntime")
        try:
            self._open(runtime)
        except Exception as error:  # torch and onnxruntime each have their own
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
        options.log_severity_level = 3  # errors; a graph without constants to fold is none
        self._module = None
        self._session = onnxruntime.InferenceSession(
            str(self.path), options, providers=["CPUExecutionProvider"]
        )
        self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        return json.loads(self.metadata["classes"])

    @torch.no_grad()
    def detect(self, image: Tensor) -> tuple[Tensor, ...]:
        """What the file gives for an image, see :func:`of_image`."""
        image = image.float()
        if self._module is not None:
            return self._module(image)
        return tuple(map(torch.from_numpy, self._session.run(None, {"image": image.numpy()})))

    def __call__(self, batched_inputs: list[dict]) -> list[dict]:
        """As a detector of Detectron2 in ``eval()``: each image's ``instances``, in its ``height`` and ``width``."""
        results = []
        for one in batched_inputs:
            boxes, *others = self.detect(one["image"])
            size = tuple(one["image"].shape[-2:])
            fields = zip(FIELDS.values(), (Boxes(boxes), *others), strict=False)
            found = Instances(size, **dict(fields))
            height, width = one.get("height", size[0]), one.get("width", size[1])
            results.append({"instances": detector_postprocess(found, height, width)})
        return results


def strangers(ours: Instances, theirs: Instances) -> int:
    """How many detections, of either side, the other side does not have.

    Two are the same if their class is, and boxes, scores and masks differ by no more than :data:`BOX_TOLERANCE`,
    :data:`SCORE_TOLERANCE` and :data:`MASK_TOLERANCE`. Their order does not count: equal scores may change places.
    """
    box = (ours.pred_boxes.tensor[:, None] - theirs.pred_boxes.tensor).abs().amax(dim=-1)
    score = (ours.scores[:, None] - theirs.scores).abs()
    same = (box <= BOX_TOLERANCE) & (score <= SCORE_TOLERANCE)
    same &= ours.pred_classes[:, None] == theirs.pred_classes
    if ours.has("pred_masks") or theirs.has("pred_masks"):
        row, other = pairs = same.nonzero(as_tuple=True)
        pixels = (ours.pred_masks[row] != theirs.pred_masks[other]).sum(dim=(1, 2))
        same[pairs] = pixels <= (MASK_TOLERANCE * ours.pred_boxes.area()[row]).clamp(min=1)
    return int((~same.any(dim=1)).sum() + (~same.any(dim=0)).sum())
