"""The architectures, by what goes in.

timm and transformers import torchvision, which describes two operators of its compiled library when it is imported.
Beside a build of torch for which that library does not load they are declared here, without code: no model calls them.
"""

import torch

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
