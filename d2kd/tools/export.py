"""Hand a trained detector on: a file that runs without Detectron2, and a table that says what it is worth.

    d2kd export --config-file RECIPE --weights FILE --output DIR [--format onnx torchscript]
                [--table [--baseline FILE]] [KEY=VALUE …]

RECIPE is a LazyConfig; of one with a teacher the student is exported. ``DIR/model.onnx`` (``model.ts``) takes an image,
float32 (3, H, W) from 0 to 255 of any size, and gives boxes, scores and classes, of a Mask R-CNN masks, too. The
student is a Faster, Mask or Cascade R-CNN, a RetinaNet, an FCOS or a GFL. Its detections are compared with the file's
on the first test images; the exit code is 1 if more than one in a hundred differ. ``--table`` measures
teacher, baseline, student and file: ``DIR/table.txt`` and ``DIR/table.json``.
"""

import argparse
from pathlib import Path

from ..utils.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, help="a LazyConfig recipe")
    parser.add_argument("--weights", required=True, help="the student's checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    parser.add_argument(
        "--format", nargs="+", choices=["onnx", "torchscript"], default=["onnx"], help="of the file"
    )
    parser.add_argument("--table", action="store_true", help="measure AP, time, size, operations")
    parser.add_argument("--baseline", metavar="FILE", help="the student's recipe trained alone")
    parser.add_argument(
        "--images", type=int, default=20, help="of the test data to compare and to time; 0: none"
    )
    parser.add_argument("opts", nargs="*", help="overrides of the recipe")


def run(args: argparse.Namespace) -> None:
    from ..config import load, with_defaults
    from ..export import table
    from ..export.formats import (
        BOX_TOLERANCE,
        FORMATS,
        SCORE_TOLERANCE,
        ExportedDetector,
        exportable,
        imported,
        write,
    )
    from ..utils.io import write_json, write_text

    if args.output.exists() and not args.output.is_dir():
        raise InputError("--output", f"{args.output} is a file", "a folder")
    if args.images < (1 if args.table else 0):
        raise InputError("--images", args.images, "at least 1 with --table, else 0")
    if args.baseline and not args.table:
        raise InputError("--baseline", "given without --table", "both")
    if "onnx" in args.format:
        imported("onnx"), imported("onnxruntime")

    config = with_defaults(load(args.config_file, args.opts))
    student = exportable(table.built(config, args.weights))
    about = table.metadata(config, student, args.weights)
    batches = table.first_images(config, args.images) if args.images else []
    rows = []
    if args.table:
        rows.append(table.teacher_row(config, student))
        if args.baseline:
            baseline = table.built(config, args.baseline)
            rows.append(table.detector_row("baseline", baseline))
        rows = [row for row in rows if row] + [table.detector_row("student", student)]

    differ = False
    for form in args.format:
        path = args.output / f"model{FORMATS[form]}"
        write(student, path, about)
        exported = ExportedDetector(path)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {', '.join(exported.classes)}")
        if batches:
            total, alone = table.agreement(student, exported, batches)
            differ |= alone * 100 > total
            print(
                f"{len(batches)} images, {total} detections of both, {alone} not the other's "
                f"(boxes to {BOX_TOLERANCE} px, scores to {SCORE_TOLERANCE})"
            )
        rows.append(table.exported_row(f"exported, {form}", exported, student))
    if args.table:
        result = table.compare(config, rows, batches, args.output)
        text = table.table(result)
        write_text(args.output / "table.txt", text + "\n")
        write_json(args.output / "table.json", result)
        print(f"\n{text}")
    if differ:
        raise SystemExit(1)
