"""A PTX interpreter in numpy: runs the PTX that ships, on a machine without a GPU.

It executes one CTA at a time, all threads in lockstep, and covers what the mma.sync kernels use:
the launch ABI, cp.async pipelines, ldmatrix, the fragments of mma, the epilogues. It is strict
where a GPU is silent:

* every access to global memory must fall inside one buffer and be aligned;
* a cp.async lands at its wait_group and no sooner, so a missing wait reads old bytes;
* shared memory remembers which warp touched a byte since the last barrier: reading what another
  warp wrote, or overwriting what another warp read, without a barrier between is an error;
* an instruction it does not know is an error.

It does not cover wgmma and tcgen05, branches that diverge inside a CTA, nor what ptxas makes of the
PTX. ex2.approx and div.full are computed exactly; the hardware may be off by two units in the last
place of a float32.
"""
