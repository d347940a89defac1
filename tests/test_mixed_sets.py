"""Training on several data sets in a stated ratio: which images are drawn, and what run.json says of it."""

import json
from collections import Counter

import numpy as np
import pytest
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetCatalog,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.utils import comm
from omegaconf import OmegaConf
from torch.utils.data import ConcatDataset

from d2kd.config import with_defaults
from d2kd.data import build_train_loader, coco_dataset, training_records, use_seeded_loaders
from d2kd.data.loader import images_used
from d2kd.engine import Trainer

from .tiny_run import draw_data, recipe, without_evaluation


class Probe:
    """A mapper that reports what it was given and what it drew."""

    def __call__(self, record):
        return {"index": record["index"], "draw": np.random.rand()}


SIZES = {"few": 3, "many": 10}


def records(sizes=SIZES):
    names = [name for name, size in sizes.items() for _ in range(size)]
    return [
        {"index": i, "width": 2 + i % 3, "height": 3, "dataset_name": name}
        for i, name in enumerate(names)
    ]


def build(start=0, dataset=None, batch_size=4, **options):
    options = {"aspect_ratio_grouping": False, "seed": 1, **options}
    dataset = records() if dataset is None else dataset
    return build_train_loader(
        dataset, mapper=Probe(), total_batch_size=batch_size, start=start, **options
    )


def stream(batches, **options):
    return [
        [(one["index"], one["draw"]) for one in batch]
        for batch, _ in zip(build(**options), range(batches))
    ]


def drawn(batches):
    return Counter(index for batch in batches for index, _ in batch)


@pytest.mark.parametrize("ratio", [[1, 1], [3, 1], [1, 7.5], [0.2, 0.7]])
def test_the_ratio_holds_in_expectation(ratio):
    counts, batches = drawn(stream(3000, ratio=ratio)), 3000
    few = sum(counts[i] for i in range(3))
    expected = 4 * batches * ratio[0] / sum(ratio)
    # Each image and epoch is rounded by itself, which varies less than one independent draw of a set for each position.
    assert abs(few - expected) < 4 * np.sqrt(4 * batches) / 2
    for images in (range(3), range(3, 13)):
        of_each = [counts[i] for i in images]
        assert min(of_each) > 0.8 * np.mean(of_each)


def test_every_image_is_drawn_in_an_epoch_its_number_rounded():
    """Three images as often as ten: 3 1/3 times each, so three or four times; the others once."""
    counts = Counter()
    lengths = []
    batches = build(ratio=[1, 1]).batch_sampler
    for epoch in range(300):
        order = batches._order(False, epoch)
        lengths.append(len(order))
        of_this = Counter(order.tolist())
        assert {of_this[i] for i in range(3)} <= {3, 4}
        assert all(of_this[i] == 1 for i in range(3, 13))
        counts += of_this
    assert len(set(lengths)) > 1
    assert all(abs(counts[i] / 300 - 10 / 3) < 0.15 for i in range(3))


def test_without_a_ratio_or_with_that_of_the_sizes_the_stream_is_the_plain_one():
    plain = [{k: v for k, v in one.items() if k != "dataset_name"} for one in records()]
    expected = stream(20, dataset=plain)
    assert stream(20) == stream(20, ratio=[3, 10]) == stream(20, ratio=[0.3, 1.0]) == expected
    assert stream(20, ratio=[1, 1]) != expected


@pytest.mark.parametrize("grouping", [False, True])
def test_a_stream_with_a_ratio_depends_on_seed_and_position_alone(grouping, monkeypatch):
    options = {"ratio": [5, 2], "aspect_ratio_grouping": grouping}
    expected = stream(30, **options)
    assert stream(30, num_workers=2, **options) == expected
    assert stream(30, seed=2, **options) != expected
    for start in (1, 7, 19):
        assert stream(5, start=start, **options) == expected[start : start + 5]
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(stream(30, **options))
    if not grouping:
        for batch, first, second in zip(expected, *shares):
            assert batch[0::2] == first and batch[1::2] == second


@pytest.mark.parametrize("grouping", [False, True])
def test_used_images_are_counted_of_all_processes(grouping, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    found, counts = Counter(), []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        loader = build(ratio=[2, 1], aspect_ratio_grouping=grouping, start=5)
        counts.append(images_used(loader, 11))
        found += drawn(stream(11, ratio=[2, 1], aspect_ratio_grouping=grouping))
    of_few = sum(found[i] for i in range(3))
    assert counts == [{"few": of_few, "many": 44 - of_few}] * 2
    assert images_used(build(), 0) == {"few": 0, "many": 0}


def test_images_of_unknown_sets_are_not_counted():
    unknown = [{"index": 0}]
    assert images_used(build(dataset=unknown), 3) is None
    assert images_used([unknown], 3) is None


@pytest.fixture
def sets(tmp_path):
    """Three registered sets: of 6 images, two of them empty; of 3 without any object; and of 2 with objects."""
    names = []
    for name, objects in (("six", (1, 2, 0, 1, 0, 1)), ("empty", (0, 0, 0)), ("two", (1, 1))):
        draw_data(tmp_path / name, objects)
        root = str(tmp_path / name)
        names.append(coco_dataset(name, f"{root}/data.json", root))
    return names


def test_records_are_detectron2s_with_the_name_of_their_set(sets):
    for options in ({}, {"filter_empty": False}):
        names = ["six", "two"]
        found = training_records(names, **options)
        assert [r.pop("dataset_name") for r in found] == ["six"] * (len(found) - 2) + ["two"] * 2
        assert found == get_detection_dataset_dicts(names, **options)
    assert len(training_records("six")) == 4
    DatasetCatalog.register("map-style", lambda: ConcatDataset([[{"index": 0}]]))
    assert len(training_records("map-style")) == 1


@pytest.mark.parametrize(
    "ratio, line",
    [
        ([1], "ratio: 1 numbers; expected one for each of few, many"),
        ([1, 2, 3], "ratio: 3 numbers; expected one for each of few, many"),
        ({"few": 1, "many": 2}, "ratio: {'few': 1, 'many': 2}; expected a list of numbers"),
        ("12", "ratio: '12'; expected a list of numbers, one for each of few, many"),
        (2, "ratio: 2; expected a list of numbers"),
        ([1, 0], "ratio: 0; expected numbers above 0"),
        ([1, -2.0], "ratio: -2.0; expected numbers above 0"),
        ([1, float("nan")], "ratio: nan; expected numbers above 0"),
        ([1, float("inf")], "ratio: inf; expected numbers above 0"),
        ([True, 1], "ratio: True; expected numbers above 0"),
        (["1", "2"], "ratio: '1'; expected numbers above 0"),
        (
            [1, 1e-9],
            "ratio: numbers by which an epoch has 1e.10 images; expected at most 1e.08",
        ),
        ([1e-320, 1e300], "ratio: .* an epoch has (inf|nan) images"),
    ],
)
def test_odd_ratios(refuses, ratio, line):
    refuses(lambda: build(ratio=ratio), f"error: dataloader.train.{line}")


def test_what_a_ratio_needs(refuses, sets):
    line = "dataloader.train.ratio: images that do not say their data set; expected dataset=L"
    refuses(lambda: build(dataset=[{"index": 0}], ratio=[1]), line)
    refuses(lambda: build(dataset=ConcatDataset([records()]), ratio=[1, 1]), line)
    line = "data set 'empty': no image with an object; expected .*filter_empty=False"
    refuses(lambda: training_records(["six", "empty"]), line)
    assert len(training_records(["six", "empty"], filter_empty=False)) == 9
    nodes = OmegaConf.create({"train": L(build_detection_train_loader)(sampler="mine")})
    use_seeded_loaders(nodes, seed=9)
    nodes.train.ratio = [1, 1]
    line = "ratio: beside options that Detectron2's loader has alone; expected d2kd's build_train"
    refuses(lambda: use_seeded_loaders(nodes, seed=9), line)


def mixed_run(tmp_path, detectron2s=False, **train):
    """A run on two sets of 6 and 2 images, in the ratio 1 : 3, in batches of 2."""
    for name, objects in (("one", (1, 2, 1, 1, 2, 1)), ("two", (1, 1))):
        if not (tmp_path / name).exists():
            draw_data(tmp_path / name, objects)
    config = recipe(tmp_path / "one", tmp_path / "run", max_iter=6, **train)
    train_node = config.dataloader.train
    root = str(tmp_path / "two")
    second = L(coco_dataset)(name="two", json_file=f"{root}/data.json", image_root=root)
    train_node.dataset.names = [train_node.dataset.names, second]
    train_node.ratio = [1, 3]
    if detectron2s:
        train_node._target_ = build_detection_train_loader
    return without_evaluation(config)


def used(tmp_path):
    rows = json.loads((tmp_path / "run" / "run.json").read_text())["rows"]
    return [row["images_used"] for row in rows]


def test_a_run_says_which_images_it_used(tmp_path):
    """Interrupted, resumed and uninterrupted runs say the same; a recipe of Detectron2's loader may have a ratio, too."""
    trainer = Trainer(with_defaults(mixed_run(tmp_path)))
    batches = [[one["dataset_name"] for one in b] for b, _ in zip(trainer.data_loader, range(6))]
    trainer.train()
    expected = Counter(name for batch in batches for name in batch)
    assert len(expected) == 2 and expected.total() == 6 * len(batches[0])
    assert used(tmp_path) == [expected]

    config = with_defaults(mixed_run(tmp_path, detectron2s=True))
    config.train.checkpointer.period = 2
    stopped = Trainer(config)
    run_step = stopped.run_step

    def interrupted():
        if stopped.iter == 4:
            raise KeyboardInterrupt
        run_step()

    stopped.run_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    (first,) = used(tmp_path)
    assert first == Counter(name for batch in batches[:4] for name in batch)
    resumed = Trainer(config)
    resumed.resume_or_load()
    assert resumed.start_iter == 4
    resumed.train()
    assert used(tmp_path) == [first, expected]
