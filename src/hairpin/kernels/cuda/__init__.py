"""The Triton twins, one file per operation, each behind custom operations of torch.

They take tensors on any device, so that Triton's interpreter can run them on a CPU.
"""
