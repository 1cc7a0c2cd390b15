"""Block-sparse linear layers on NVIDIA GPUs, from kernels compiled ahead of time.

The way of a layer: packing.pack turns the blocks of a weight into the device format, once, when an
engine is built; kernel.open_kernel loads the binary of the device at hand; Kernel.launch runs it.
A device needs the driver's libcuda.so.1 and nothing else: no Triton, no torch, no nvcc.
torch_op offers the same kernels to a torch model.
"""
