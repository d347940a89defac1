"""Does TAR help a small detector on the generated shapes, and more than what its seconds buy otherwise?

A Faster R-CNN with a thin backbone learns alone, alone for as long as TAR takes, beside a teacher by plain feature
imitation, and by TAR. The schedule is cut to fit one seed into twenty minutes on two cores, and short schedules
flatter every method.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler
from omegaconf import OmegaConf
from torch.optim import SGD

from d2kd.config import distill, get_config
from d2kd.data import shapes
from d2kd.losses import DistillLosses, ImitationLoss, TARLoss
from d2kd.modeling import Teacher

STUDENT_STEPS, TEACHER_STEPS = 500, 900


def _detector(width, blocks):
    model = get_config("common/models/faster_rcnn_small.py").model
    model.backbone.bottom_up.width = width
    model.backbone.bottom_up.blocks = [blocks] * 4
    return model


def _recipe(model, steps):
    return OmegaConf.create(
        dict(
            model=model,
            dataloader=get_config("common/data/shapes.py").dataloader,
            optimizer=L(SGD)(
                params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
                lr=0.01,
                momentum=0.9,
                weight_decay=1e-4,
            ),
            lr_multiplier=L(WarmupParamScheduler)(
                scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
                warmup_factor=0.01,
                warmup_length=0.1,
            ),
            train=dict(
                max_iter=steps,
                checkpointer=dict(period=100, max_to_keep=1),
                eval_period=steps // 4,
                best_checkpoint="",
                log_period=10,
                clip_gradients=dict(enabled=True, clip_value=10.0),
            ),
        ),
        flags={"allow_objects": True},
    )


_teacher = _recipe(_detector(width=32, blocks=2), TEACHER_STEPS)
_student = _recipe(_detector(width=8, blocks=1), STUDENT_STEPS)


def _taught(**losses):
    """The student's recipe beside the teacher, whose weights the study fills in."""
    teacher = L(Teacher)(detector=_teacher.model, weights="")
    return distill(_student, teacher=teacher, losses=L(DistillLosses)(**losses))._asdict()


def _only(**weights):
    """TAR with one of its terms."""
    none = dict(feature_weight=0, classification_weight=0, regression_weight=0)
    return _taught(tar=L(TARLoss)(**(none | weights)))


runs = dict(
    teacher=dict(config=_teacher, once=True),
    baseline=dict(config=_student),
    baseline_equal_time=dict(config=_student, steps_like="tar"),
    imitation=dict(config=_taught(imitation=L(ImitationLoss)()), teacher="teacher"),
    tar=dict(config=_taught(tar=L(TARLoss)()), teacher="teacher"),
    # Asked for by name: --runs tar tar_feature …
    tar_feature=dict(config=_only(feature_weight=0.01), teacher="teacher", optional=True),
    tar_classification=dict(
        config=_only(classification_weight=1.0), teacher="teacher", optional=True
    ),
    tar_regression=dict(config=_only(regression_weight=1.0), teacher="teacher", optional=True),
)

study = dict(
    title="TAR on generated shapes: Faster R-CNN, a thin student and its teacher",
    test="shapes_test",
    seeds=[0],
    baseline="baseline",
    compare=["baseline_equal_time", "imitation"],
    featured="tar",
    fast=[
        "train.max_iter=12",
        "train.eval_period=6",
        "train.checkpointer.period=6",
        "train.log_period=2",
        "dataloader.train.total_batch_size=4",
    ],
    fast_setup=L(shapes.register)(train=32, val=16, test=24),
)
