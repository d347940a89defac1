"""Export a trained detector to a file that runs without Detectron2, and compare it with the original.

    d2kd export --config-file RECIPE --weights FILE --output DIR [--format onnx torchscript]
                [--table [--baseline FILE]] [KEY=VALUE …]

RECIPE is a LazyConfig; if it has a teacher, its student is exported. The input of ``DIR/model.onnx`` (``model.ts``) is
an image of any size, float32 (3, H, W) in [0, 255]; its outputs are boxes, scores and classes, and masks of a Mask
R-CNN. Supported are Faster, Mask and Cascade R-CNN, RetinaNet, FCOS and GFL. The detections of student and file are
compared on the first test images; the exit code is 1 if more than 1 % differ. ``--table`` measures teacher, baseline,
student and file, and writes ``DIR/table.txt`` and ``DIR/table.json``.
"""

import argparse
from pathlib import Path

from ..utils.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, help="a LazyConfig recipe")
    parser.add_argument("--weights", required=True, help="the student's checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="output folder")
    parser.add_argument(
        "--format", nargs="+", choices=["onnx", "torchscript"], default=["onnx"], help="file format"
    )
    parser.add_argument("--table", action="store_true", help="measure AP, time, size, operations")
    parser.add_argument("--baseline", metavar="FILE", help="weights trained without a teacher")
    parser.add_argument(
        "--images", type=int, default=20, help="test images to compare and to time; 0: none"
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
        export_detector,
        import_optional,
        prepare_for_export,
    )
    from ..utils.io import check_output_folder, write_json, write_text

    check_output_folder(args.output, "--output")
    if args.images < (1 if args.table else 0):
        raise InputError("--images", args.images, "at least 1 with --table, else 0")
    if args.baseline and not args.table:
        raise InputError("--baseline", "given without --table", "both")
    if "onnx" in args.format:
        import_optional("onnx"), import_optional("onnxruntime")

    config = with_defaults(load(args.config_file, args.opts))
    student = prepare_for_export(table.build_student(config, args.weights, args.table))
    about = table.export_metadata(config, student, args.weights)
    batches = table.first_test_images(config, args.images) if args.images else []
    rows = []
    if args.table:
        rows.append(table.teacher_row(config, student))
        if args.baseline:
            baseline = table.build_student(config, args.baseline, True)
            rows.append(table.detector_row("baseline", baseline))
        rows = [row for row in rows if row] + [table.detector_row("student", student)]

    differ = False
    for form in args.format:
        path = args.output / f"model{FORMATS[form]}"
        export_detector(student, path, about)
        exported = ExportedDetector(path)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {', '.join(exported.classes)}")
        if batches:
            total, unmatched = table.compare_detections(student, exported, batches)
            differ |= unmatched * 100 > total
            print(
                f"{len(batches)} images, {total} detections of both, {unmatched} without a match "
                f"(boxes to {BOX_TOLERANCE} px, scores to {SCORE_TOLERANCE})"
            )
        rows.append(table.exported_row(f"exported, {form}", exported, student))
    if args.table:
        result = table.measure_rows(config, rows, batches, args.output)
        text = table.format_rows(result)
        write_text(args.output / "table.txt", text + "\n")
        write_json(args.output / "table.json", result)
        print(f"\n{text}")
    if differ:
        raise SystemExit(1)
