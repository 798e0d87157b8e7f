"""A GPU in software: compiled Triton kernels, executed on the CPU.

Triton's interpreter runs a kernel's source. It shows neither warps nor shared memory, nor the order in which memory
becomes visible, nor what the compiler did. Here the PTX that Triton compiles for sm_80, sm_86, sm_89, sm_90 or sm_120
runs instruction by instruction, on the memory of CPU tensors, through Triton's own launch path:

    from machine.driver import Machine, running

    with running(Machine("sm_90")):
        kernel[grid](...)  # or a whole model over it: everything that launches a Triton kernel

`pytest -m machine` runs what is proved with it, `make machine` the long version. Needed are NumPy, torch and Triton.

The files, in the order of a reader:

    ptx           text -> instructions                    warp        32 lanes, branches that they take apart
    translate     segments -> functions of vectors        block       warps and their barrier
    instructions  those that compute                      scheduler   a launch, and the adversary
    accesses      those that reach memory                 memory      global memory: bounds, late stores, order
    arithmetic    what instructions compute               shared      shared memory: bounds, races
    matrix        mma.sync, ldmatrix, stmatrix            wgmma       descriptors, swizzles, async groups
    copies        cp.async                                driver      the driver for Triton
    faults        what is reported

What is modelled, with sections of the PTX ISA manual 9.1
- Every global access lies in a tensor of the launch, every shared one in the block's allocation, those of ldmatrix,
  cp.async and wgmma included; all are aligned to their size (6.4.1).
- Warps of a block that use one shared byte, one of them storing another value, need a barrier between them (8.7.1,
  9.7.13.1). A barrier takes all warps that have not ended, and whole warps only.
- Plain global stores stay with their warp, then behind a barrier with their block, and reach other programs late, in any
  order, lane by lane (8.2.4), at the latest with a release that is ordered after them (8.8). A weak load that nothing
  orders behind another program's store reads poison (8.7.1). The lanes of a strong load see different moments.
- Which warp goes on, and for how long, which lane's store wins where several store to one address, when an asynchronous
  copy or product reads and writes between its issue and its wait (9.7.9.25.3, 9.7.15.7): all drawn from a seed.
- Registers and shared memory begin as poison (8.2.6). Accumulators of a wgmma under way are poison until its wait. What
  ordinary stores have put into shared memory is poison to wgmma before a fence.proxy.async (9.7.15.4).
- ex2, rcp, sqrt, rsqrt, tanh and div are off by any amount within their bounds (9.7.3), the same for the same operand.
  tf32 operands lose their low 13 bits (9.7.15.5.2; for mma.sync the manual says nothing, and others have measured it).
- Programs that wait for each other need a cooperative launch that fits the device. Where nobody can go on, the error says
  who waits for what. Whatever the machine does not know (an instruction, a modifier, a type) is an error that names it.

What is not
- ptxas: the machine code it makes, its registers and spills (`kernels/compile.py` reads those), and its freedom to fuse a
  multiplication with an addition where neither has an explicit rounding (9.7.3.3).
- Clocks: nothing here says how long anything takes. The driver, streams, several launches at once, several GPUs.
- Reordering inside a warp: its own loads and stores take effect in the order of the program for itself. Caches: a load
  with a cache hint is a load. Textures, clusters, TMA, mbarriers, tcgen05 (so no sm_100), dynamic parallelism.
- A matrix product sums in fp64 and rounds once an instruction; the manual leaves order and rounding open (9.7.14.5.14).
- fma is exact but for one result in 2^29. The value of a NaN is that of this processor.
"""
