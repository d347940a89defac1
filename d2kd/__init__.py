"""d2kd: knowledge distillation for Detectron2's detectors."""

import importlib.util
import sys
import warnings

__version__ = "0.2.0"


class _NeedsDetectron2:
    """Import hook that raises without Detectron2. The commands, and what they import, are exempt: one installs it."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        package, _, module = name.partition(".")
        without = module.split(".")[0] in ("__main__", "tools") or module in (
            "utils",
            "utils.errors",
        )
        if package != "d2kd" or without:
            return
        if importlib.util.find_spec("detectron2") is None:  # it may be installed by now
            raise ModuleNotFoundError(
                "d2kd needs Detectron2, which is not on PyPI: run `d2kd install-detectron2`, "
                "or install an official build (https://detectron2.readthedocs.io)",
                name="detectron2",
            )


# find_spec() and not import, so that errors inside Detectron2 keep their message and `--help` stays fast.
if importlib.util.find_spec("detectron2") is None:
    sys.meta_path.insert(0, _NeedsDetectron2)

# PyTorch's deprecation warnings about code in Detectron2 and fvcore, which users of d2kd cannot change.
warnings.filterwarnings("ignore", "`torch.jit.script", category=FutureWarning)
warnings.filterwarnings("ignore", "`torch.jit.script", category=DeprecationWarning)
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", category=UserWarning)
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", category=FutureWarning)
