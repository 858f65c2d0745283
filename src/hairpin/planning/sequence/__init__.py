"""One long sequence over ranks: how attention along it is routed, and what that costs."""
