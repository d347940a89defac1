"""What every recipe's ``train`` may say. Keys and meanings are Detectron2's where it has them."""

train = dict(
    output_dir="./output",
    init_checkpoint="",  # weights to start the student from; what fits by name is loaded
    max_iter=90000,
    seed=0,  # of weights, batches and sampling; negative: drawn anew for each run
    device="auto",  # CUDA where there is some, else the CPU
    amp=dict(enabled=False, dtype="float16"),  # or "bfloat16", the only one of the two for a CPU
    clip_gradients=dict(
        enabled=False,
        clip_type="full_model",  # one norm over all; "norm": each parameter's; "value": each entry
        clip_value=1.0,
        norm_type=2.0,
    ),
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=5000, max_to_keep=100),
    best_checkpoint="bbox/AP",  # the metric whose best state becomes model_best.pth; "": none
    eval_period=5000,  # 0: at the end alone
    eval_teacher=True,  # measure the teacher before the first step
    draw_period=0,  # iterations between pictures of detections in TensorBoard; 0: none
    draw_images=4,  # how many of them each time, always the first of the test data
    log_period=20,
    cudnn_benchmark=False,
    # distiller: see icd.py beside this; without it the losses' parameters are trained as the student's
)
