"""Stages of the pipeline, one module or package each: plain commands that never import Prefect or flows.

The graph          snapshot       sources, benchmarks, champion -> data/{raw,benchmarks,champion}
(dvc.yaml)         base           model reference -> safetensors and tokenizer
                   ingest         raw rows -> checked examples, quarantine
                   dedupe         examples -> survivors
                   split          survivors -> train, validation, test
                   augment        train -> train and paraphrases
                   decontaminate  train -> train without evaluation questions
                   pack           train -> tokenised, masked, packed rows
                   sft            packed rows -> adapter
                   evaluate       adapter, base, champion -> per-item scores
                   gate           scores -> verdict
After the graph    register       adapter -> model version
                   promote        model version -> champion
                   report         all outputs -> one HTML page
"""
