"""Library shared by the stages, the flows and the CLI. It imports none of them.

core        parameters, errors, file I/O, data paths, the shared main()
data        training data and evaluation: schemas, tokens, text comparison, benchmarks, paired scores
raw         shards in data/raw: readers, row checks, erased rows
replies     replies from other models, cached by content
pipeline    the graph in dvc.yaml, and processes that end with their parent
tracking    MLflow runs
registry    MLflow Model Registry: versions, record of promotions, lineage, served model
"""

import importlib.metadata
import logging
import sys

# bitsandbytes (on import), transformers and PEFT fetch code from a hub through the package `kernels`.
# None makes `import kernels` fail. bitsandbytes would log a warning about that at every start.
sys.modules["kernels"] = None  # type: ignore[assignment]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> str:
    """Return `nightshift.__version__`, which only an installed package has.

    Raises:
        AttributeError: The module has no such attribute.
    """
    if name == "__version__":
        return importlib.metadata.version("nightshift-finetune")
    raise AttributeError(f"module 'nightshift' has no attribute {name!r}")
