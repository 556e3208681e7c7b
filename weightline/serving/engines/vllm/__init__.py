"""vLLM as an engine: a worker extension, a weight-transfer backend and a middleware. No fork, one process tree.

`worker`, `backend`, `state` and what they import run inside vLLM's workers; `engine`, a transport (`offline`, `online`,
`remote`) and `middleware` in the process that drives them.
"""
