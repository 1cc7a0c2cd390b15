"""TensorRT on Jetson and NVIDIA GPUs: build an engine, prove what it runs, run it.

    onnx_copy      the portable ONNX file -> the copy TensorRT reads (float16, opset 17)
    build          that copy -> a serialized engine ("plan"), with progress
    plugin         lpvit::BlockSparseLinear for TensorRT, on the kernels of lpvit_engines.cuda
    log, inspector what TensorRT said, and what it really built
    sparsity       whether sparse layers run sparse kernels
    plan_file      the plan on disk with its manifest, refused on another device
    engine         the Engine that runs it

Nothing in here has run on a device yet; docs/tensorrt.md says what each part was checked against.
"""
