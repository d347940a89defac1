"""Time and memory of reading an annotation file of COCO's size.

    python -m tests.coco_file_size [--images 118000] [--annotations 860000] [--processes 1 4]

The file is generated: boxes of random places, each with a polygon of 24 points. Reading and checking, and building Detectron2's
records, are measured in CPU seconds of each process; the peak is of its resident memory, above that after imports.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
from pathlib import Path
from time import process_time as clock  # of its own work, whatever else the machine does

import numpy as np


def write(path: Path, images: int, annotations: int) -> None:
    """Write a file as COCO's tools do."""
    random = np.random.RandomState(0)
    with open(path, "w") as file:
        file.write('{"images": [')
        one = '{"id": %d, "file_name": "%012d.jpg", "width": 640, "height": 480}'
        file.write(", ".join(one % (k, k) for k in range(images)))
        file.write('], "categories": ')
        file.write(json.dumps([{"id": k + 1, "name": f"class {k}"} for k in range(80)]))
        file.write(', "annotations": [')
        for start in range(0, annotations, 10_000):
            count = min(10_000, annotations - start)
            x, y, w, h = random.randint(1, 240, (4, count)).tolist()
            points = random.randint(100, 30_000, (count, 48)) / 100
            rows = (
                f'{{"id": {start + k + 1}, "image_id": {random.randint(images)}, "category_id": '
                f'{k % 80 + 1}, "bbox": [{x[k]}.5, {y[k]}.25, {w[k]}.5, {h[k]}.75], "area": '
                f'{w[k] * h[k]}.5, "iscrowd": 0, "segmentation": [{points[k].tolist()}]}}'
                for k in range(count)
            )
            file.write((", " if start else "") + ", ".join(rows))
        file.write("]}")


def peak() -> float:
    """Peak of the resident memory so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(path: str, barrier, queue) -> None:
    from d2kd.data.coco_file import read_coco_file, summarize_coco_file

    barrier.wait()
    before, start = peak(), clock()
    summarize_coco_file(path)
    checked, most = clock() - start, peak() - before
    start = clock()
    records = read_coco_file(path).records("images")
    queue.put((checked, most, clock() - start, peak() - before, len(records)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--annotations", type=int, default=860_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "instances.json")
        write(path, args.images, args.annotations)
        print(
            f"{path.stat().st_size / 1e6:.0f} MB, {args.images} images, {args.annotations} objects"
        )
        for count in args.processes:
            barrier, queue = context.Barrier(count), context.Queue()
            started = [
                context.Process(target=measure, args=(str(path), barrier, queue))
                for _ in range(count)
            ]
            for process in started:
                process.start()
            found = np.array([queue.get() for _ in started])
            for process in started:
                process.join()
            checked, most, built, all_of_it, _ = found.max(axis=0)
            print(
                f"{count} process(es): checked in {checked:.1f} s, {most:.2f} GiB; "
                f"records {built:.1f} s more, {all_of_it:.2f} GiB in all (CPU seconds, of the slowest, each)"
            )


if __name__ == "__main__":
    main()
