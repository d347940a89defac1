"""A trained detector as one file that needs neither Detectron2 nor this project: ONNX or TorchScript.

The graph takes an image of any size and gives detections; proposals, RoIAlign and NMS are inside. It is the
detector's own parts traced, with the selection of detections written so that it holds for any number of boxes.
Letters: H and W of the image, D detections, K classes, R boxes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import nms

from .engine.run_info import written_whole
from .errors import InputError
from .modeling import DenseOutputs, RCNNOutputs, outputs_of
from .modeling.outputs import box_stages

FORMATS = {"onnx": ".onnx", "torchscript": ".ts"}
"""What can be written, and the suffix of its file."""

OPSET = 17  # of ONNX; RoIAlign as Detectron2 has it came with 16
EXAMPLE = (192, 160)  # H and W of the image that is traced; it leaves no mark in the graph
OUTPUTS = ("boxes", "scores", "classes")
EXPORTABLE = "a Faster R-CNN on an FPN, a RetinaNet, an FCOS or a GFL"
BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3
"""How far, in pixels and of 1, a detection of the file may lie from the detector's to be the same."""


class Exportable(nn.Module):
    """A detector as a function of one image, to be traced.

    Args:
        detector: of those named in :data:`EXPORTABLE`; put in ``eval()`` on the CPU.

    Raises:
        InputError: another kind of detector.
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.kind = outputs_of(detector)
        if self.kind is RCNNOutputs:
            heads = detector.roi_heads
            if len(box_stages(heads)) > 1 or getattr(heads, "mask_on", False):
                what = "masks" if getattr(heads, "mask_on", False) else "several stages"
                raise InputError(type(detector).__name__, f"RoI heads with {what}", EXPORTABLE)
        self.detector = detector.cpu()
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            image: ``(3, H, W)`` float32 from 0 to 255, channels in the detector's ``input_format``.

        Returns:
            best first: boxes ``(D, 4)``, XYXY in pixels of the image; scores ``(D,)``; classes ``(D,)`` int64.
        """
        said = self.kind(self.detector, [{"image": image}])
        find = self._of_regions if self.kind is RCNNOutputs else self._of_anchors
        limit = limits(image)
        boxes, scores, classes = find(said, limit)
        boxes = clipped(boxes, limit)
        seen = nonempty(boxes)
        return boxes[seen], scores[seen], classes[seen]

    def _of_regions(self, said: RCNNOutputs, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Proposals of the RPN, judged once: ``fast_rcnn_inference`` on one image."""
        said.region_boxes = [[said.proposals[0].proposal_boxes]]
        (region,) = said.regions
        predictor = self.detector.roi_heads.box_predictor
        scores = region.pred_class_logits.softmax(dim=-1)[:, :-1]
        boxes = region.box2box_transform.apply_deltas(
            region.pred_proposal_deltas, region.box_tensor
        )
        boxes = clipped(boxes.reshape(scores.shape[0], -1, 4), limit)
        row, classes = (scores > predictor.test_score_thresh).nonzero().unbind(dim=1)
        column = classes if boxes.shape[1] > 1 else torch.zeros_like(classes)
        return best(
            boxes[row, column],
            scores[row, classes],
            classes,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )

    def _of_anchors(self, said: DenseOutputs, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best of each level: ``DenseDetector._decode_multi_level_predictions`` on one image.

        The first ``test_topk_candidates`` of what passes the threshold are what passes among the first: this
        order of the two has sizes that do not depend on the picture.
        """
        detector, found = self.detector, []
        centerness = said.pred_centerness if len(said.predictions) > 2 else None
        for level, anchors in enumerate(said.anchors):
            score = said.pred_logits[level][0].sigmoid()
            if centerness is not None:
                score = (score * centerness[level][0].sigmoid()).sqrt()
            score, index = score.flatten().topk(
                at_most(score.numel(), detector.test_topk_candidates)
            )
            passed = score > detector.test_score_thresh
            score, index = score[passed], index[passed]
            row = index.div(detector.num_classes, rounding_mode="floor")
            deltas = said.pred_anchor_deltas[level][0][row]
            boxes = detector.box2box_transform.apply_deltas(deltas, anchors.tensor[row])
            found.append((boxes, score, index - row * detector.num_classes))
        boxes, scores, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
        if hasattr(detector.head, "reg_max"):  # GFL, other than the rest, clips before NMS
            boxes = clipped(boxes, limit)
            seen = nonempty(boxes)
            boxes, scores, classes = boxes[seen], scores[seen], classes[seen]
        return best(
            boxes, scores, classes, detector.test_nms_thresh, detector.max_detections_per_image
        )


def at_most(count: int | Tensor, limit: int) -> int | Tensor:
    """The smaller number; while tracing a size is a tensor, which ``min`` would turn into a constant."""
    return count.clamp(max=limit) if isinstance(count, Tensor) else min(count, limit)


def limits(image: Tensor) -> Tensor:
    """``(4,)``: how far each coordinate of a box may go."""
    # Multiplied and not converted, so that a trace keeps the sizes variable.
    height, width = (image.new_ones(()) * side for side in image.shape[-2:])
    return torch.stack([width, height, width, height])


def clipped(boxes: Tensor, limit: Tensor) -> Tensor:
    """Boxes ``(…, 4)`` inside the image."""
    return torch.minimum(boxes.clamp(min=0), limit)


def nonempty(boxes: Tensor) -> Tensor:
    """``(R,)`` whether a box has an area."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def best(
    boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``count`` after NMS within each class, best first; none are negative: all.

    Boxes of different classes are moved so far apart that they never meet. ``torchvision.ops.batched_nms``
    does so, too, but its way overlaps where coordinates are negative, and its graph branches.
    """
    values = torch.cat([boxes.flatten(), boxes.new_zeros(1)])
    apart = classes.to(boxes) * (values.max() - values.min() + 1)
    keep = nms(boxes + apart[:, None], scores, threshold)
    if count >= 0:
        keep = keep[:count]
    return boxes[keep], scores[keep], classes[keep]


def write(model: Exportable, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the model, whole or not at all; the suffix of ``path`` says in which format.

    Args:
        model: what to trace.
        path: ``*.onnx`` or ``*.ts``.
        metadata: strings by key, kept in the file: ONNX's ``metadata_props``; TorchScript's extra file
            ``metadata.json``.

    Raises:
        InputError: the packages that write ONNX are missing.
    """
    image = torch.rand(3, *EXAMPLE, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad(), quiet_tracing(), written_whole(path) as temporary:
        if Path(path).suffix == FORMATS["torchscript"]:
            traced = torch.jit.trace(model, (image,), check_trace=False)
            extra = {"metadata.json": json.dumps(dict(metadata))}
            torch.jit.save(traced, str(temporary), _extra_files=extra)
            return
        onnx = imported("onnx")
        torch.onnx.export(
            model,
            (image,),
            str(temporary),
            dynamo=False,  # the exporter for graphs whose sizes depend on the picture
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(OUTPUTS),
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: {0: "detections"} for name in OUTPUTS},
            },
        )
        graph = onnx.load(temporary)
        onnx.helper.set_model_props(graph, dict(metadata))
        onnx.checker.check_model(graph)
        onnx.save(graph, temporary)


@contextlib.contextmanager
def quiet_tracing() -> Iterator[None]:
    """Without the remarks that tracing, and an exporter on its way out, make at every line of Detectron2."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", category)
        yield


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
            raise InputError(path, found, "a file that export_student.py wrote") from error

    def _open(self, onnxruntime: ModuleType | None) -> None:
        if onnxruntime is None:
            extra = {"metadata.json": ""}
            with quiet_tracing():
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
    def detect(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`Exportable.forward` says of an image."""
        image = image.float()
        if self._module is not None:
            return self._module(image)
        found = self._session.run(list(OUTPUTS), {"image": image.numpy()})
        return tuple(torch.from_numpy(values) for values in found)

    def __call__(self, batched_inputs: list[dict]) -> list[dict]:
        """As a detector of Detectron2 in ``eval()``: each image's ``instances``, in its ``height`` and ``width``."""
        results = []
        for one in batched_inputs:
            size = tuple(one["image"].shape[-2:])
            boxes, scores, classes = self.detect(one["image"])
            found = Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
            height, width = one.get("height", size[0]), one.get("width", size[1])
            results.append({"instances": detector_postprocess(found, height, width)})
        return results


def strangers(ours: Instances, theirs: Instances) -> int:
    """How many detections, of either side, the other side does not have.

    Two are the same if their class is, and boxes and scores differ by no more than :data:`BOX_TOLERANCE` pixels
    and :data:`SCORE_TOLERANCE`. Their order does not count: equal scores may change places.
    """
    box = (ours.pred_boxes.tensor[:, None] - theirs.pred_boxes.tensor).abs().amax(dim=-1)
    score = (ours.scores[:, None] - theirs.scores).abs()
    same = (box <= BOX_TOLERANCE) & (score <= SCORE_TOLERANCE)
    same &= ours.pred_classes[:, None] == theirs.pred_classes
    return int((~same.any(dim=1)).sum() + (~same.any(dim=0)).sum())
