"""A language model with gated linear attention: model and seams; its loss is `models.llm`'s."""

from hairpin.models.linear_llm.model import LinearLLM, LinearLLMConfig, small, tiny
from hairpin.models.linear_llm.seams import ATTENDS, ROUTED

__all__ = ["ATTENDS", "ROUTED", "LinearLLM", "LinearLLMConfig", "small", "tiny"]
