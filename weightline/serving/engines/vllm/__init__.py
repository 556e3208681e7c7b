"""vLLM as an engine: a worker extension, a middleware and a weight-transfer backend. No fork, one process tree.

`serve` starts vLLM's server with the middleware `http` in the same process, where `driver` implements `Engine`. In
vLLM's workers `worker` is the extension, `mapping` determines the addresses of the tensors' elements, and `memory`
stages and writes them. `wire` defines the messages between driver and workers, `features` the features that a vLLM must
have, and `backend` serves tools that drive vLLM by its own weight-update calls.
"""
