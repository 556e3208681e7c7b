"""vLLM as an engine: a worker extension, a middleware and a weight-transfer backend. No fork, one process tree.

`serve` starts vLLM's server with `http`, its middleware, in the same process; there `driver` implements `Engine`. In
vLLM's workers `worker` is the extension, `mapping` learns where the tensors' elements live, and `memory` stages and
writes them. `wire` is what passes between driver and workers, `features` what a vLLM must offer, `backend` a way in for
tools that drive vLLM by its own weight-update calls.
"""
