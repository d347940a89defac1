"""TAR on COCO: Faster R-CNN R-50 FPN, 1x, from Detectron2's Mask R-CNN ViTDet-B, of a box AP of 51.6. It was not run.

A Detectron2 after 0.6 is needed, for its ``SimpleFeaturePyramid``. The teacher pads the student's images to squares of 1024
pixels, the size for which it has position embeddings, so no side may be longer.
"""

from d2kd.config import distill, method

model, dataloader, optimizer, lr_multiplier, train = distill(
    "baselines/faster_rcnn_R_50_FPN_1x.py",
    teacher=(
        "common/models/mask_rcnn_vitdet.py",
        "https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/mask_rcnn_vitdet_b/f325346929/"
        "model_final_61ccd1.pkl",
    ),
    **method("tar"),
)

for part in (dataloader.train, dataloader.test):
    part.mapper.augmentations[0].max_size = 1024
