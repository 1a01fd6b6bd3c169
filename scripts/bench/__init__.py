"""The benchmarks of ``scripts/benchmark.py``, one module each, with a function ``measure(quick)``."""

BENCHMARKS = {  # name: what it answers
    "interpolation": "mixing hidden states, forward and backward, against a copy of the same bytes",
    "mixed_loss": "the mixed cross-entropy against the plain one",
    "memory": "memory that mixing needs at its peak, and what autograd keeps",
    "step": "a training step with manifold mixup against one without",
    "methods": "a training step of every way to mix",
    "calls": "what the calls of mixing cost beside matrix products, in a bare loop",
    "gpu": "a training step on a GPU with manifold mixup against one without",
    "look": "the look before the first training step: time in forward passes, and memory",
    "layers": "a training step with 1 to 16 eligible layers",
    "scaling": "how the costs grow with batch, width, layers and classes",
    "epoch": "an epoch of mnist_bottleneck against a bare PyTorch loop",
    "loading": "batches cut from tensors against DataLoaders with 0 and 2 workers",
    "trainer": "what Lightning's logging, progress bar and checkpoints add to an epoch",
    "arithmetic": "floating point operations a second against the matrix product's rate; optimizers; allocators",
    "jobs": "two single-threaded runs at a time against one run with two threads after another",
    "end_to_end": "the whole command mnist_bottleneck against a straightforward Lightning project",
}
