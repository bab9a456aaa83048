"""Engine steps on a CUDA device: paged attention for decodes, packed prompts, CUDA graphs.

`pytest -m gpu` runs it on a device, all but flash attention. The ordinary tests run the kernel in Triton's interpreter,
and everything but flash attention and graph capture on a CPU.
"""
