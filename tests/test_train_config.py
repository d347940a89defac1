"""``train`` of a recipe: every key has a type, and what is wrong is one line before work starts."""

import copy
import dataclasses
import threading

import pytest
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog
from detectron2.engine import hooks
from detectron2.solver.build import get_default_optimizer_params
from omegaconf import OmegaConf
from torch.optim import AdamW

from d2kd.config import Train, apply_overrides, get_config, load, train_defaults, with_defaults
from d2kd.config.saving import save_config
from d2kd.config.train import scale_to_batch_size
from d2kd.engine import Trainer
from d2kd.engine.optimizer import params_with_backbone_lr
from d2kd.utils.errors import InputError

from .test_trainer import data  # noqa: F401  (a fixture)
from .tiny_run import distiller, recipe, without_evaluation

BASE = "baselines/faster_rcnn_small_shapes.py"


@pytest.fixture(scope="module")
def base():
    return load(BASE)


def test_the_defaults_are_stated_once(base):
    assert get_config("common/train.py").train == train_defaults()
    assert list(base.train) == [field.name for field in dataclasses.fields(Train)]
    bare = copy.deepcopy(base)
    bare.train = {}
    assert with_defaults(bare).train == train_defaults()
    assert bare.train == {} and with_defaults(with_defaults(base)) == with_defaults(base)


WRONG = {
    "train.max_iter: foo; expected an integer": {"max_iter": "foo"},
    "train.max_iter: 2.5; expected an integer": {"max_iter": 2.5},
    "train.max_iter: True; expected an integer": {"max_iter": True},
    "train.max_iter: None; expected an integer": {"max_iter": None},
    "train.max_iter: 0; expected an integer, at least 1": {"max_iter": 0},
    "train.max_itr: no such key; expected max_iter; a hook's own is": {"max_itr": 5},
    "train.reference_batch_size: -1; expected an integer, at least 0": {"reference_batch_size": -1},
    "train.zebra: no such key; expected one of output_dir, .*train.user.zebra": {"zebra": 5},
    "train.amp.enable: no such key; expected enabled": {"amp": {"enable": True}},
    "train.amp.enabled: perhaps; expected true or false": {"amp": {"enabled": "perhaps"}},
    "train.amp.dtype: int8; expected float16 or bfloat16": {"amp": {"dtype": "int8"}},
    "train.clip_gradients: 3; expected keys such as enabled": {"clip_gradients": 3},
    "train.user: 3; expected a mapping": {"user": 3},
    "train.eval_period: .*0.002.*; expected an integer": {"eval_period": "${optimizer.lr}"},
    "train.eval_period: .*'nothing' not found": {"eval_period": "${nothing}"},
    "train.checkpointer.period: 0; expected an integer, at": {"checkpointer": {"period": 0}},
    "train.best_checkpoint: False; expected a string": {"best_checkpoint": False},
    r"train.max_iter: \?\?\?; expected an integer": {"max_iter": "???"},
    "train.seed: 4294967296; expected an integer below": {"seed": 2**32},
    "train.clip_gradients.clip_value: nan; expected a number above 0": {
        "clip_gradients": {"clip_value": float("nan")}
    },
    "clip_gradients.norm_type: 0.0; expected a number": {"clip_gradients": {"norm_type": 0}},
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_one_line(base, line):
    config = copy.deepcopy(base)
    config.train.update(WRONG[line])
    with pytest.raises(InputError, match=line) as error:
        with_defaults(config)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=line):
        Trainer(config)


def test_a_misspelt_argument_of_a_node_is_named(refuses):
    with_teacher = load("projects/TAR/configs/tar_shapes.py")
    line = "model.losses.tar.feature_wieght: no such argument of TARLoss; expected feature_weight"
    key = line.partition(":")[0]
    refuses(lambda: apply_overrides(copy.deepcopy(with_teacher), [f"{key}=3"]), line)
    wrong = copy.deepcopy(with_teacher)
    wrong.model.losses.tar.feature_wieght = 3
    refuses(lambda: with_defaults(wrong), line)
    wrong.model.losses.tar.pop("feature_wieght")
    wrong.dataloader.train.mapper.zebra = None
    refuses(
        lambda: with_defaults(wrong), "mapper.zebra: no such argument of .*; expected one of is_tr"
    )
    assert apply_overrides(
        with_teacher, ["model.losses.tar.cls_margin=2.0"]
    )  # not in the recipe yet


def test_a_target_that_cannot_be_inspected_is_left_to_its_call(base):
    odd = copy.deepcopy(base)
    odd.train.user = {
        "a": {"_target_": "no.such.module", "x": 1},
        "b": {"_target_": "builtins.dict", "x": 1},
        "c": {"_target_": None, "x": 1},
    }
    assert list(with_defaults(odd).train.user) == ["a", "b", "c"]


@pytest.mark.parametrize("value", [None, 5, "x", [1]])
@pytest.mark.parametrize("key, expected", [("train", "a mapping"), ("optimizer", "a node")])
def test_it_is_a_mapping(base, key, expected, value):
    config = copy.deepcopy(base)
    config[key] = value
    with pytest.raises(InputError, match=f"{key}: .*; expected {expected}"):
        with_defaults(config)


def test_overrides_are_checked_too(base):
    for text, line in {
        "train.max_iter=foo": "train.max_iter: foo; expected an integer",
        "train.mx=3": "train.mx: no 'mx' in train",
        "train.checkpointer.period=-1": "train.checkpointer.period: -1; expected an integer, at",
    }.items():
        with pytest.raises(InputError, match=line):
            apply_overrides(copy.deepcopy(base), [text])
    words = "train.user.ema.decay=0.9 train.checkpointer.max_to_keep=null train.seed=null".split()
    config = apply_overrides(copy.deepcopy(base), words)
    assert config.train.user.ema.decay == 0.9
    assert config.train.checkpointer.max_to_keep is None and config.train.seed is None


def test_it_stays_an_ordinary_mapping(base):
    """As a recipe writes it; what it wrote is checked when it is used."""
    config = copy.deepcopy(base)
    config.train.clip_gradients = dict(config.train.clip_gradients, clip_value=3)
    config.train.eval_period = "${train.max_iter}"
    config.train.user = {"schedule": L(AdamW)(lr=1.0)}
    complete = with_defaults(config)
    assert complete.train.clip_gradients.clip_value == 3.0
    assert complete.train.user.schedule._target_ is AdamW
    complete.train.max_iter = 7
    assert complete.train.eval_period == 7
    assert OmegaConf.is_interpolation(complete.train, "eval_period")


def _for_16(data, output, **train):  # noqa: F811
    """A recipe for 16 images per batch, with an optimizer of the losses, and interpolations of what is scaled."""
    train = {"max_iter": 6, "reference_batch_size": 16, "draw_period": 3, "eval_period": 0, **train}
    config = recipe(data, output, distiller(), **train)
    config.train.checkpointer.period = "${train.max_iter}"
    params = L(params_with_backbone_lr)(base_lr="${..lr}", backbone_lr_multiplier=0.1)
    config.optimizer.params = params
    groups = L(get_default_optimizer_params)(base_lr=0.1)
    config.train.loss_optimizer = {"optimizer": L(AdamW)(params=groups, lr="${optimizer.lr}")}
    return without_evaluation(config)


def test_a_recipe_is_adapted_to_its_batch_size_once(data, tmp_path, caplog):  # noqa: F811
    """Learning rates and lengths of the whole run; a saved or resumed run is not adapted again."""
    config = _for_16(data, tmp_path / "out")
    config.optimizer.lr, config.dataloader.train.total_batch_size = 0.02, 4
    before = copy.deepcopy(config)
    trainer = Trainer(config)
    assert config == before
    assert caplog.text.count("Adapted from 16 to 4 images per batch: optimizer.lr=0.005") == 1
    adapted = trainer.cfg
    assert adapted.optimizer.lr == pytest.approx(0.005)
    assert adapted.optimizer.params.base_lr == adapted.optimizer.lr
    own = adapted.train.loss_optimizer.optimizer
    assert (own.lr, own.params.base_lr) == pytest.approx((0.005, 0.025))
    train = adapted.train
    assert (train.max_iter, train.checkpointer.period, train.draw_period) == (24, 24, 12)
    assert (train.eval_period, train.log_period, train.reference_batch_size) == (0, 1, 4)
    assert adapted.model.max_iter == trainer.max_iter == trainer.scheduler._max_iter == 24
    rates = sorted({round(rate, 6) for rate in trainer.scheduler.base_lrs})
    assert rates == pytest.approx([0.0005, 0.005, 0.025])
    save_config(adapted, tmp_path / "config.yaml")
    saved = load(str(tmp_path / "config.yaml"))
    caplog.clear()
    again = Trainer(saved).cfg
    assert again == saved and "Adapted" not in caplog.text
    assert (again.optimizer.lr, again.train.max_iter) == (adapted.optimizer.lr, 24)


@pytest.mark.parametrize("reference", [0, None, 2])
def test_a_recipe_for_its_batch_size_stays_as_it_is(data, tmp_path, reference):  # noqa: F811
    config = _for_16(data, tmp_path / "out", reference_batch_size=reference, max_iter=5)
    adapted = with_defaults(config)
    scale_to_batch_size(adapted)
    assert adapted == with_defaults(config)


def test_a_larger_batch_shortens_a_run_but_no_period_to_nothing(data):  # noqa: F811
    config = with_defaults(_for_16(data, "out", reference_batch_size=1, max_iter=3))
    config.train.checkpointer.period, config.dataloader.train.total_batch_size = 1, 8
    config.optimizer.params.base_lr = 0.5
    scale_to_batch_size(config)
    assert (config.train.max_iter, config.train.checkpointer.period) == (1, 1)
    assert config.optimizer.lr == 0.04 and config.optimizer.params.base_lr == 4


def test_what_cannot_be_adapted(data, refuses):  # noqa: F811
    config = _for_16(data, "out")
    del config.train.loss_optimizer.optimizer["lr"]
    refuses(lambda: Trainer(config), "train.loss_optimizer.optimizer.lr: none to scale; expected a")
    del config.dataloader.train["total_batch_size"]
    line = "train.reference_batch_size: 16, and no dataloader.train.total_batch_size; expected 0"
    refuses(lambda: Trainer(config), line)


def overridden(name):
    def method(cls, cfg, *args, **options):
        if name == "build_test_loader":
            assert {*args, *options.values()} <= {*DatasetCatalog.list()}
        else:
            cls.built.append(name)
        return getattr(super(Mine, cls), name)(cfg, *args, **options)

    return classmethod(method)


class Mine(Trainer):
    """Overrides what Detectron2 documents."""

    built = []
    build_model, build_optimizer = overridden("build_model"), overridden("build_optimizer")
    build_train_loader = overridden("build_train_loader")
    test, build_test_loader = overridden("test"), overridden("build_test_loader")
    build_evaluator = overridden("build_evaluator")

    def build_hooks(self):
        def log(trainer):
            trainer.storage.put_scalar("mine", trainer.cfg.train.user.mine)

        return [*super().build_hooks(), hooks.CallbackHook(after_step=log)]


def test_a_subclass_overrides_what_detectron2_documents(data, tmp_path):  # noqa: F811
    config = recipe(data, tmp_path, distiller(), max_iter=1, user={"mine": 3})
    Mine.built.clear()
    trainer = Mine(config)
    assert trainer.built == ["build_model", "build_optimizer", "build_train_loader"]
    trainer.train()
    assert trainer.built[3:] == ["test", "build_evaluator"] * 2  # the teacher's, the student's
    assert '"mine": 3' in (tmp_path / "metrics.json").read_text()  # though its hook came last
    config.train.max_iter = 2
    trainer = Mine(config)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 1 and trainer.built.count("build_train_loader") == 3
    trainer.train()


def test_what_a_subclass_does_not_load_is_not_measured(data, tmp_path):  # noqa: F811
    class Unmeasured(Trainer):
        @classmethod
        def build_test_loader(cls, cfg, dataset_name):
            return None

    assert Unmeasured(recipe(data, tmp_path, max_iter=1)).train() == {}


def test_a_recipe_that_cannot_be_written_is_trained_all_the_same(data, tmp_path):  # noqa: F811
    lock = threading.Lock()
    config = recipe(data, tmp_path, max_iter=1, user={"f": lambda: lock})
    Trainer(without_evaluation(config)).train()
    assert (tmp_path / "model_final.pth").is_file()
    assert "config.yaml: cannot be written" in (tmp_path / "log.txt").read_text()


def test_checkpoints_come_before_evaluations_and_the_log_is_written_last(data, tmp_path):  # noqa: F811
    names = [type(hook).__name__ for hook in Trainer(recipe(data, tmp_path, distiller()))._hooks]
    order = "EvalTeacher MeasureFeatures IterationTimer LRScheduler PeriodicCheckpoint ResumableEvalHook"
    assert names == [*order.split(), "BestCheckpoint", "LazyPeriodicWriter"]
