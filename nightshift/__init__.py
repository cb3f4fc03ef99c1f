"""The library: what stages, flows and the command line share. It imports none of them.

core        parameters, errors, files, the data's paths, what every program's main() does
data        rows on their way to the training: schemas, tokens, texts, benchmarks, paired scores
raw         the shards below data/raw: how their rows are read, which are forgotten
replies     replies of another model, kept by content
pipeline    the graph of dvc.yaml, and processes that end with their parent
tracking    MLflow's runs
registry    MLflow's registry: versions, the record of promotions, lineage, the served model
"""

import logging
import sys

# bitsandbytes, transformers and PEFT fetch code from a hub through the package `kernels`; bitsandbytes does
# so while it is imported. None makes that import fail, of which bitsandbytes warns at every start.
sys.modules["kernels"] = None  # type: ignore[assignment]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
