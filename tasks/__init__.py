"""The work, one module for each stage. Plain Python: nothing here imports Prefect or flows.

The graph          snapshot       sources, benchmarks, champion -> data/raw, data/benchmarks, data/champion
(dvc.yaml)         base           model reference -> safetensors and tokenizer
                   ingest         raw rows -> checked examples, quarantine
                   dedupe         examples -> survivors
                   split          survivors -> train, validation, test
                   augment        train -> train and paraphrases
                   decontaminate  train -> train without evaluation questions
                   pack           train -> tokenised, masked, packed rows
                   sft            packed rows -> adapter
                   evaluate       adapter, base, champion -> scores of each item
                   gate           scores -> verdict
After the graph    register       adapter -> model version
                   promote        model version -> champion
                   report         all of it -> one HTML page
"""

import logging
import sys

# bitsandbytes, transformers and PEFT fetch code from a hub through the package `kernels`; bitsandbytes does
# so while it is imported. None makes that import fail, of which bitsandbytes warns at every start.
sys.modules["kernels"] = None  # type: ignore[assignment]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
