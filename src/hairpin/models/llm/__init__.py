"""A language model of the Llama family: model, seams and loss."""

from hairpin.models.llm.loss import IGNORED, TokenLoss, token_losses
from hairpin.models.llm.model import LLM, LLMConfig, small, tiny
from hairpin.models.llm.seams import ATTENDS, ROUTED

__all__ = [
    "ATTENDS",
    "IGNORED",
    "LLM",
    "ROUTED",
    "LLMConfig",
    "TokenLoss",
    "small",
    "tiny",
    "token_losses",
]
