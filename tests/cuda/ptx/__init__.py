"""A PTX interpreter in numpy: runs the PTX that ships, on a machine without a GPU.

It executes one CTA at a time, all threads in lockstep, and covers what the kernels use: the launch
ABI, cp.async pipelines, ldmatrix and stmatrix, the fragments of mma, wgmma on swizzled shared
memory, the epilogues. It is strict where a GPU is silent:

* every access to global memory must fall inside one buffer and be aligned;
* a cp.async lands at its wait_group and no sooner, so a missing wait reads old bytes;
* shared memory remembers which warp touched a byte since the last barrier: reading what another
  warp wrote, or overwriting what another warp read, without a barrier between is an error;
* wgmma reads its shared memory until it is waited for: a write to it before that, a read of its
  accumulators before that, and a missing proxy fence or wgmma.fence are errors;
* an instruction it does not know is an error.

It does not cover tcgen05, wgmma on operands that are not K-major and swizzled, branches that
diverge inside a CTA, nor what ptxas makes of the PTX. ex2.approx and div.full are computed exactly;
the hardware may be off by two units in the last place of a float32.
"""
