"""The work, one module for each stage. Only commands; nothing here imports Prefect or flows.

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
