"""A spatial-temporal diffusion transformer for video: model, seams, flow loss and sampler."""

from hairpin.models.video_dit.flow import FlowLoss, flow_loss, sample
from hairpin.models.video_dit.model import VideoDiT, VideoDiTConfig, digits, large, tiny
from hairpin.models.video_dit.seams import ATTENDS

__all__ = [
    "ATTENDS",
    "FlowLoss",
    "VideoDiT",
    "VideoDiTConfig",
    "digits",
    "flow_loss",
    "large",
    "sample",
    "tiny",
]
